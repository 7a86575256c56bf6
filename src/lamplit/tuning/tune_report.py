"""The report of a run: what trained, what was measured, and the proof of the lock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from lamplit.model import LiT
from lamplit.towers.images.image_tower import ImageTower


@dataclass(repr=False)
class TuneReport:
    """The report of a finished run; `report.json` in its folder.

    `start`, `best` and `last` hold the figures on held-out captions by name: `image_to_text/recall@1` (also @5, @10),
    `image_to_text/median_rank`, the same of `text_to_image`, and `mean_recall`. They are empty if nothing is held out.
    Images with equal bytes are one image, and equal captions one caption. The best checkpoint was chosen by these
    captions, so `best` is slightly optimistic; `test`, of the same names, is not: its captions were measured once.

    Attributes:
        out: folder of the run; `lamplit.load` opens the best model there.
        mode: the two letters of the lock mode.
        image_tower: what made the vectors, such as `demo:efficientnet-lite0`.
        text_tower: what was tuned, such as `demo:minilm`.
        training_pairs: number of pairs to train on.
        held_out_pairs: number of pairs whose captions are held out.
        held_out_captions: number of distinct captions that are held out.
        test_pairs: number of pairs whose captions are kept for the test.
        test_captions: number of distinct captions that are kept for the test.
        dropped_pairs: number of pairs that are in no part, since they share an image with a held-out pair.
        trains: of each part of the model its `state` (trains, locked, or fitted in closed form at each evaluation),
            number of `parameters`, and `megabytes` in training.
        truncated_texts: number of training texts that are longer than the text tower reads.
        start: held-out figures before the first step.
        best: held-out figures of the model that was saved.
        last: held-out figures after the last step.
        test: figures of the model that was saved on the test's captions; empty if there are none.
        best_step: step after which the saved model was measured; 0 is before the first.
        steps: number of steps that were done.
        seconds: how long the run took.
        fingerprint_before: of the image tower, before the first step.
        fingerprint_after: of the image tower, computed again from its weights after the last step; the same as before
            if it was locked.
        skipped: images that could not be read in training, and why.
        warnings: what is unusual in the split, a sentence each.
    """

    out: str
    mode: str
    image_tower: str
    text_tower: str
    training_pairs: int
    held_out_pairs: int
    held_out_captions: int
    trains: dict[str, dict[str, float | str]]
    truncated_texts: int
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    steps: int = 0
    seconds: float = 0.0
    fingerprint_before: str = ""
    fingerprint_after: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    test_pairs: int = 0
    test_captions: int = 0
    dropped_pairs: int = 0
    warnings: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        recall = "image_to_text/recall@1"
        best = f"{recall} {self.best[recall]:.3f} at step {self.best_step} of " if recall in self.best else ""
        run = f"{self.mode}, {self.text_tower} reads {self.image_tower}"
        return f"<TuneReport {self.out}: {run}, {best}{self.steps} steps>"


def what_trains(
    model: LiT, image_tower: ImageTower | None, *, fits_head: bool = False
) -> dict[str, dict[str, float | str]]:
    """Describe each part of a model: its state (trains, locked or fitted), parameters, and megabytes in training."""
    assert model.text_tower is not None
    scalars = [model.log_scale, *([] if model.logit_bias is None else [model.logit_bias])]
    encoder, low_rank = model.text_tower.split_lora()
    parts: dict[str, Iterable[nn.Parameter]] = {
        "image tower": [] if image_tower is None else image_tower.parameters(),
        "image head": [] if model.image_head is None else model.image_head.parameters(),
        "text tower": encoder,
        "text tower's LoRA": low_rank,
        "text head": model.text_tower.head.parameters(),
        "logit scale": scalars,
    }
    absent = [*(["image head"] if model.image_head is None else []), *([] if low_rank else ["text tower's LoRA"])]
    described = {name: _part(list(parameters)) for name, parameters in parts.items() if name not in absent}
    if fits_head:
        described["text head"]["state"] = "fitted"
    return described


def _part(parameters: list[nn.Parameter]) -> dict[str, float | str]:
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    count = sum(parameter.numel() for parameter in parameters)
    # What trains needs its gradient and AdamW's two moments, too.
    megabytes = (count + 3 * trained) * 4 / 2**20
    return {"state": "trains" if trained else "locked", "parameters": count, "megabytes": round(megabytes, 1)}
