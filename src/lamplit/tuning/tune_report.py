"""The report of a run: what trained, what was measured, and the proof of the lock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from lamplit.model import LiT
from lamplit.towers.images.image_tower import ImageTower


@dataclass
class TuneReport:
    """The report of a finished run; `report.json` in its folder."""

    out: str
    mode: str
    image_tower: str
    text_tower: str
    training_pairs: int
    held_out_pairs: int
    held_out_captions: int
    trains: dict[str, dict[str, float | str]]
    truncated_texts: int
    start: dict[str, float] = field(default_factory=dict)  # held-out recall before the first step
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    steps: int = 0
    seconds: float = 0.0
    fingerprint_before: str = ""
    fingerprint_after: str = ""  # of the image tower, computed again from its weights after the last step
    skipped: dict[str, str] = field(default_factory=dict)  # images that could not be read in training, and why


def what_trains(model: LiT, image_tower: ImageTower | None) -> dict[str, dict[str, float | str]]:
    """Describe each part of a model: its state (trains or locked), parameters, and megabytes in training."""
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
    return {name: _part(list(parameters)) for name, parameters in parts.items() if name not in absent}


def _part(parameters: list[nn.Parameter]) -> dict[str, float | str]:
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    count = sum(parameter.numel() for parameter in parameters)
    # What trains needs its gradient and AdamW's two moments, too.
    megabytes = (count + 3 * trained) * 4 / 2**20
    return {"state": "trains" if trained else "locked", "parameters": count, "megabytes": round(megabytes, 1)}
