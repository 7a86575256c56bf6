"""Settings of a tuning run, one by one or from a recipe: a TOML file of them."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from lamplit.errors import UsageError, kind_of

MANY_PAIRS = 500  # with 280 pairs a run whose texts are left out loses, and with 560 most gain
FEWEST_PAIRS, MOST_PAIRS = 64, 1024  # of a batch that is not given
MANY_WITH_HEAD = 10_000  # where the head trains: at 8,200 pairs a large rate loses, and at 28,000 it gains much
MAX_SEED = 2**63  # torch takes 64 bits with a sign
_FOLDER = files("lamplit") / "tuning" / "paper"
_TABLES = {"title", "source", "paper", "settings"}
_EXPECTED = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
OLD_NAMES = {  # of settings in run folders and recipes of earlier versions
    "text": "text_tower",
    "warmup": "warmup_ratio",
    "held_out": "val_fraction",
    "evaluations": "num_evals",
    "head_start": "closed_form",
    "image_start": "image_delay",
}


@dataclass(frozen=True)
class TuneSettings:
    """Settings of a tuning run; saved with it, and compared when it is resumed.

    On the command line: the options of `lamplit tune`, such as `--batch-size`, or a `--recipe`.

    Args:
        text_tower: Text tower: hf:NAME_OR_FOLDER, lit:NAME, model:FOLDER (that of a saved model: a small collection
            stands on a large one), demo:minilm, or scratch:SIZE with SIZE one of tiny, small, base, large, huge, giant.
        mode: Lock mode: two letters as in the paper (section 3.3), image tower first. L is pre-trained and locked, U
            pre-trained and tuned, u trained from scratch. auto is LU, or Lu if the text tower is a scratch one.
        text_column: Column of the store with the texts, or several with commas between; columns may hold the texts in
            other languages.
        loss: Contrastive loss: softmax as in the paper, or sigmoid as in SigLIP.
        optimizer: Optimizer: adamw, or adafactor as the paper uses it for large towers.
        lr: Peak learning rate of all parameters outside the image tower. By default 1e-3 from scratch (the paper's),
            1e-4 with LoRA, 1e-5 for a pre-trained text tower with a linear head; with a kernel head 2e-5, and 3e-4
            from 500 pairs on (10,000 if the head itself trains).
        weight_decay: Weight decay in torch's sense: it is multiplied by the learning rate. The paper's 1e-4 at a
            learning rate of 1e-3 is 0.1 here.
        batch_size: Pairs in one loss. With many pairs larger is better (section 5.5 of the paper), and memory does not
            limit it; with few, more steps are. By default 1,024; where the head is fitted again an eighth of the
            training pairs, from 64 to 1,024.
        epochs: Passes over the training pairs, rounded to whole steps: epochs times pairs divided by the batch size, at
            least 1. Every pass has each pair once, and a batch may begin in one pass and end in the next. By default
            20; with a kernel head 4, and from 10,000 pairs on 5; 2 where the head is fitted again.
        steps: Number of steps; replaces the number of epochs. 0 saves the model as it is before the first step: with a
            head in closed form, all that there is without tuning.
        warmup_ratio: Fraction of the steps over which the learning rate rises.
        grad_clip: Largest norm of the gradient over all parameters that train; a larger gradient is scaled down.
        image_lr: Peak learning rate of an image tower that trains. By default 1e-5 pre-trained and 1e-3 from scratch;
            the paper's appendix H tries a tenth of the text tower's.
        image_weight_decay: Weight decay of an image tower that trains. By default that of the text tower.
        image_delay: Fraction of the steps before the image tower begins to train, with its warm-up (the paper's
            appendix H).
        image_head: Train a linear layer behind the image tower, initialised to the identity. The paper's best setting
            has none.
        augment: Augmentation of images for an image tower that trains: the paper's Inception crop (5 % to 100 % of the
            area), or none. A locked image tower reads the store's vectors, which are of whole images.
        context_length: Longest text in tokens. By default what the text tower was made for.
        train_tokenizer: Give the text tower's vocabulary pieces of those words of the captions that it cannot write, as
            in a script that it has never read; their vectors begin at random. A tower from scratch makes a vocabulary
            anyway.
        val_fraction: Fraction of the distinct captions that is held out to measure recall, by which the best checkpoint
            is chosen; at most 5,000 captions. Captions and images that belong together are held out together.
        test_fraction: Fraction of the distinct captions that is kept apart from these, never looked at in tuning, and
            measured once at the end with the best checkpoint; at most 5,000 captions.
        closed_form: Initialise the text head in closed form, from the image tower's classifier and the training pairs.
        head: Text head: linear as in the paper, or kernel, which reads a text by its likeness to up to 20,000 texts of
            the pairs and the image tower's classifier. By default kernel for a pre-trained text tower that starts in
            closed form, else linear. Some exports can hold a linear one alone. From 500 pairs with at most 20,000
            texts on, a kernel head does not train where the text tower alone does: it is fitted again at each
            evaluation, and each text of a batch is read as if it had been left out of the fit.
        num_evals: How often held-out recall is measured, and a checkpoint written, in the run. By default 10, and 2
            where the head is fitted again each time.
        patience: Stop after this many evaluations without a better held-out recall. By default never.
        precision: Floating-point format: auto is bf16 autocast if the processor computes it in hardware, else fp32.
        lora: Rank of low-rank changes (LoRA) to the text tower, which train instead of its weights. By default all
            weights train.
        seed: Random seed of the split, the order of the pairs, and dropout.

    Raises:
        UsageError: a setting has a value out of its range, or two settings contradict each other.

    Example:
        >>> lamplit.TuneSettings("demo:minilm", mode="LU", epochs=5).for_pairs(562).lr
        2e-05
    """

    text_tower: str
    mode: Literal["auto", "LL", "LU", "Lu", "UL", "UU", "Uu", "uL", "uU", "uu"] = "auto"
    text_column: str = "texts"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    lr: float | None = None
    weight_decay: float = 0.1
    batch_size: int | None = None
    epochs: float | None = None
    steps: int | None = None
    warmup_ratio: float = 0.1
    grad_clip: float = 1.0
    image_lr: float | None = None
    image_weight_decay: float | None = None
    image_delay: float = 0.0
    image_head: bool = False
    augment: Literal["none", "inception"] = "none"
    context_length: int | None = None
    train_tokenizer: bool = False
    val_fraction: float = 0.2
    test_fraction: float = 0.0
    closed_form: bool = True
    head: Literal["auto", "linear", "kernel"] = "auto"
    num_evals: int | None = None
    patience: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    lora: int | None = None
    seed: int = 0

    @classmethod
    def from_recipe(cls, recipe: str | Path, **given: Any) -> Self:
        """Make settings from a recipe; what is `given` wins.

        Args:
            recipe: a name out of `list_recipes`, or a TOML file of your own.
            given: settings by name, instead of the recipe's.

        Raises:
            UsageError: there is no such recipe, or a setting has no such value.

        Example:
            >>> lamplit.TuneSettings.from_recipe("cc12m", batch_size=4096).batch_size
            4096
        """
        values = recipe_settings(recipe, **given)
        if "text_tower" not in values:
            raise UsageError(f"recipe {recipe} names no text tower; give text_tower=, --text-tower in the command")
        return cls(**values)

    def __post_init__(self) -> None:
        """Validate the settings."""
        self._check_types()
        ranges = {
            "batch_size": (
                self.batch_size is None or self.batch_size >= 2,
                "at least 2: a contrastive loss compares pairs",
            ),
            "epochs": (self.epochs is None or self.epochs > 0, "more than 0"),
            "steps": (self.steps is None or self.steps >= 0, "at least 0"),
            "warmup_ratio": (0 <= self.warmup_ratio <= 1, "between 0 and 1"),
            "val_fraction": (0 <= self.val_fraction < 1, "at least 0 and less than 1"),
            "test_fraction": (
                0 <= self.test_fraction < 1 - self.val_fraction,
                "at least 0, and with val_fraction less than 1",
            ),
            "num_evals": (self.num_evals is None or self.num_evals >= 1, "at least 1"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1"),
            "lr": (self.lr is None or self.lr > 0, "more than 0"),
            "image_lr": (self.image_lr is None or self.image_lr > 0, "more than 0"),
            "image_weight_decay": (self.image_weight_decay is None or self.image_weight_decay >= 0, "at least 0"),
            "image_delay": (0 <= self.image_delay < 1, "at least 0 and less than 1"),
            "grad_clip": (self.grad_clip > 0, "more than 0"),
            "lora": (self.lora is None or self.lora >= 1, "a rank of at least 1"),
            "seed": (0 <= self.seed < MAX_SEED, f"at least 0 and less than {MAX_SEED}"),
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
                f"lora needs a pre-trained text tower that trains, and {self.text_tower} is none in mode {self.mode}"
            )
        if self.train_tokenizer and not self.pretrained_text:
            raise UsageError(
                f"train_tokenizer is for a pre-trained text tower; {self.text_tower} in mode {self.mode_used} has "
                "nothing pre-trained (scratch: makes a vocabulary of the captions anyway)"
            )
        if self.head == "kernel" and not self.starts_in_closed_form:
            raise UsageError(
                "a kernel head starts in closed form, and here it does not: give head linear, or a mode that does not "
                "begin with u, with closed_form"
            )
        image_only = ("image_lr", "image_weight_decay", "image_delay", "augment")
        given = [name for name in image_only if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if given and not self.image_trains:
            raise UsageError(
                f"{', '.join(given)} cannot be given in mode {self.mode}, because its image tower is locked; "
                "give a mode that begins with U or u"
            )

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            kind, *others = get_args(hint) or (hint,)
            if kind not in _EXPECTED:  # a Literal, whose choices are checked with the ranges
                continue
            value = getattr(self, name)
            taken = (int, float) if kind is float else kind
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{name} is {value}; expected a finite number")
            if (value is None and others) or (
                isinstance(value, taken) and (kind is bool or not isinstance(value, bool))
            ):
                continue
            found = "None" if value is None else f"{value!r:.50}, {kind_of(value)}"
            raise UsageError(f"{name} is {found}; expected {_EXPECTED[kind]}{' or None' if others else ''}")

    @property
    def image_trains(self) -> bool:
        """Whether the image tower trains, so that images are read."""
        return self.mode[0] in "Uu"

    @property
    def text_trains(self) -> bool:
        """Whether the text encoder trains; its head always does."""
        return not self.mode.endswith("L")

    @property
    def pretrained_text(self) -> bool:
        """Whether the text tower starts from pre-trained weights."""
        return not self.mode.endswith("u") and not self.text_tower.startswith("scratch:")

    @property
    def starts_in_closed_form(self) -> bool:
        """Whether a head that is new starts in closed form: the store has no vectors of a tower from scratch."""
        return self.closed_form and self.mode[0] != "u"

    @property
    def has_kernel_head(self) -> bool:
        """Whether a text head that is new is a kernel head."""
        return self.head == "kernel" or (self.head == "auto" and self.starts_in_closed_form and self.pretrained_text)

    def for_pairs(self, pairs: int, *, leaves_out: bool = False) -> Self:
        """Return these settings with what was left open: `lr`, `epochs`, `batch_size` and `num_evals`.

        Args:
            pairs: number of training pairs.
            leaves_out: whether each text is read as if it was left out of the closed form, see `head`.
        """
        has_many = leaves_out or pairs >= MANY_WITH_HEAD
        if not self.pretrained_text:
            lr = 1e-3
        elif self.lora is not None:
            lr = 1e-4
        else:
            lr = 1e-5 if not self.has_kernel_head else 3e-4 if has_many else 2e-5
        epochs = 20.0 if not self.has_kernel_head else 2.0 if leaves_out else 5.0 if has_many else 4.0
        chosen: dict[str, Any] = {"lr": lr, "epochs": epochs, "num_evals": 2 if leaves_out else 10}
        chosen["batch_size"] = min(MOST_PAIRS, max(FEWEST_PAIRS, pairs // 8)) if leaves_out else MOST_PAIRS
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})

    def count_steps(self, pairs: int) -> int:
        """Return the number of steps with so many training pairs: `steps`, or what `epochs`, then given, come to."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "chosen by for_pairs"
        assert self.batch_size is not None, "chosen by for_pairs"
        return max(1, round(self.epochs * pairs / min(self.batch_size, pairs)))

    @property
    def peak_image_lr(self) -> float:
        """Learning rate of the image tower, after its warm-up."""
        return self.image_lr if self.image_lr is not None else 1e-5 if self.mode[0] == "U" else 1e-3

    @property
    def mode_used(self) -> str:
        """The two letters of the lock mode, also if `mode` is auto."""
        return self.mode if self.mode != "auto" else "LU" if self.pretrained_text else "Lu"


def list_recipes() -> list[str]:
    """List the names of the recipes that come with lamplit: the paper's runs."""
    return sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Read a recipe.

    Args:
        recipe: a name out of `list_recipes`, or a TOML file of your own.

    Returns:
        Its `title`, its `source`, what the `paper` says in its own units, and the `settings` of a run; a recipe of
        your own needs `settings` only.

    Raises:
        UsageError: there is no such recipe, or it has unknown keys.

    Example:
        >>> lamplit.read_recipe("cc12m")["settings"]["mode"]
        'LU'
    """
    file = Path(recipe) if str(recipe).endswith(".toml") else _FOLDER / f"{recipe}.toml"
    if not file.is_file():
        raise UsageError(f"there is no recipe {recipe!s}; expected a TOML file, or one of {', '.join(list_recipes())}")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {recipe} is not TOML: {error}") from error
    settings = values.get("settings")
    known = TuneSettings.__dataclass_fields__
    if not isinstance(settings, dict):
        raise UsageError(f"recipe {recipe} has no [settings]; they are what lamplit tune takes: {', '.join(known)}")
    renamed = [f"{key} is now {OLD_NAMES[key]}" for key in settings if key in OLD_NAMES]
    if renamed:
        raise UsageError(f"recipe {recipe} has settings of an earlier lamplit; rename them: {', '.join(renamed)}")
    unknown = [key for key in values if key not in _TABLES]
    unknown += [f"settings.{key}" for key in settings if key not in known]
    if unknown:
        raise UsageError(f"recipe {recipe} has unknown keys: {', '.join(unknown)}; known: {', '.join(known)}")
    return values


def recipe_settings(recipe: str | Path | None, **given: Any) -> dict[str, Any]:
    """Return the settings of a recipe by name, if there is one; what is `given` wins.

    Raises:
        UsageError: there is no such recipe, or it has unknown keys.
    """
    return (read_recipe(recipe)["settings"] if recipe is not None else {}) | given
