"""The dials of a tuning run, each beside the reason for its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from lamplit.errors import UsageError


@dataclass(frozen=True)
class TuneSettings:
    """What a run does; saved with it, and compared when it is resumed."""

    text_tower: str
    """Text tower: hf:NAME_OR_FOLDER, lit:NAME, demo:minilm, or scratch:SIZE (tiny, small, base, large, huge, giant)."""
    mode: Literal["auto", "LL", "LU", "Lu", "UL", "UU", "Uu", "uL", "uU", "uu"] = "auto"
    """The paper's two letters, image tower first: L locked, U pre-trained and tuned, u from scratch (section 3.3).
    With L first, vectors of the store are read, else its images. auto: L with U, or u where the text tower is new."""
    text_column: str = "texts"
    """Column of the store with the texts; another language's, say."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """The paper's loss, or SigLIP's."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """AdamW, or Adafactor as the paper uses it for large towers."""
    lr: float | None = None
    """Peak learning rate; by default 1e-3 from scratch (the paper's), 1e-5 for a pre-trained text tower, and ten
    times that with LoRA, whose matrices begin at nothing."""
    weight_decay: float = 0.1
    """In torch's sense (times the learning rate); the paper's 1e-4 at 1e-3 is 0.1 here."""
    batch_size: int = 1024
    """Pairs in one loss; larger is better (section 5.5), and memory does not limit it."""
    epochs: float = 20.0
    """Passes over the training pairs."""
    steps: int | None = None
    """Steps in all, instead of epochs."""
    warmup_ratio: float = 0.1
    """Part of the steps over which the learning rate rises."""
    grad_clip: float = 1.0
    """Largest norm of the gradient over all that trains."""
    image_lr: float | None = None
    """Peak rate of an image tower that trains; by default 1e-3 from scratch and 1e-5 pre-trained. The paper's
    appendix H tries a tenth of the text's."""
    image_weight_decay: float | None = None
    """Of an image tower that trains; by default the text's."""
    image_delay: float = 0.0
    """Part of the steps before an image tower begins to train (the paper's appendix H, "delay"); its warm-up and its
    cosine begin there."""
    image_head: bool = False
    """A linear layer behind the image tower, from the identity on; the paper's best setting has none."""
    augment: Literal["none", "inception"] = "none"
    """What is done to images that are read in training: the paper's Inception crop (5 % to 100 % of the area), or
    the tower's own resizing. A store's vectors are of whole images, whatever this says."""
    context_length: int | None = None
    """Longest text in tokens; by default what the text tower was made for."""
    val_fraction: float = 0.2
    """Part of the distinct captions that is never seen; at most 5,000 of them."""
    closed_form: bool = True
    """Begin from a head in closed form (from the image tower's classifier and the training pairs)."""
    num_evals: int = 10
    """How often held-out recall is measured; each time a checkpoint is written, too."""
    patience: int | None = None
    """Stop after so many evaluations without a better recall."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast where the processor has it in hardware; elsewhere it is slower."""
    lora: int | None = None
    """Rank of low-rank changes to the text tower, which train in the place of its weights; nothing for full tuning."""
    seed: int = 0
    """Of the split, the order of the pairs and dropout."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: naming the setting and its range.
        """
        ranges = {
            "batch_size": (self.batch_size >= 2, "at least 2: a contrastive loss compares"),
            "epochs": (self.epochs > 0, "more than 0"),
            "steps": (self.steps is None or self.steps >= 1, "at least 1"),
            "warmup_ratio": (0 <= self.warmup_ratio <= 1, "between 0 and 1"),
            "val_fraction": (0 <= self.val_fraction < 1, "at least 0 and less than 1"),
            "num_evals": (self.num_evals >= 1, "at least 1"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1"),
            "lr": (self.lr is None or self.lr > 0, "more than 0"),
            "image_lr": (self.image_lr is None or self.image_lr > 0, "more than 0"),
            "image_weight_decay": (self.image_weight_decay is None or self.image_weight_decay >= 0, "at least 0"),
            "image_delay": (0 <= self.image_delay < 1, "at least 0 and less than 1"),
            "grad_clip": (self.grad_clip > 0, "more than 0"),
            "lora": (self.lora is None or self.lora >= 1, "a rank of at least 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "context_length": (self.context_length is None or self.context_length >= 3, "at least 3"),
        }
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                choices = get_args(kind)
                ranges[name] = (getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)}; expected {expected}")
        if self.mode[-1] in "LU" and self.text_tower.startswith("scratch:"):
            raise UsageError(
                f"{self.text_tower} has no pre-trained weights; mode {self.mode} needs a text tower that has"
            )
        if self.lora is not None and not (self.pretrained_text and self.text_trains):
            raise UsageError(
                f"lora changes pre-trained weights that may change, and {self.text_tower} has none in mode {self.mode}"
            )
        pixels = ("image_lr", "image_weight_decay", "image_delay", "augment")
        given = [name for name in pixels if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if given and not self.image_trains:
            raise UsageError(
                f"{', '.join(given)} is for an image tower that trains, and in mode {self.mode} it is locked; "
                "give a mode that begins with U or u"
            )

    @property
    def image_trains(self) -> bool:
        """Whether the image tower changes, so that images are read."""
        return self.mode[0] in "Uu"

    @property
    def text_trains(self) -> bool:
        """Whether the text encoder changes; its head always does."""
        return not self.mode.endswith("L")

    @property
    def pretrained_text(self) -> bool:
        """Whether the text tower starts from pre-trained weights."""
        return not self.mode.endswith("u") and not self.text_tower.startswith("scratch:")

    @property
    def peak_lr(self) -> float:
        """The learning rate of all but the image tower, after warm-up."""
        default = 1e-3 if not self.pretrained_text else 1e-5 if self.lora is None else 1e-4
        return self.lr if self.lr is not None else default

    @property
    def peak_image_lr(self) -> float:
        """The learning rate of the image tower, after its warm-up."""
        return self.image_lr if self.image_lr is not None else 1e-5 if self.mode[0] == "U" else 1e-3

    @property
    def mode_used(self) -> str:
        """The two letters, where `mode` leaves them open."""
        return self.mode if self.mode != "auto" else "LU" if self.pretrained_text else "Lu"
