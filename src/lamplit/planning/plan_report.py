"""What a plan says: what embedding and tuning will cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stage:
    """What a command will cost.

    Attributes:
        seconds: how long it takes.
        parts: these seconds by what they are spent on.
        disk: bytes of files that are large by their number of images or parameters, by name.
        memory: bytes that the model takes in the run; what a batch needs comes on top and is chosen to fit.
    """

    seconds: float
    parts: dict[str, float]
    disk: dict[str, int]
    memory: int


@dataclass
class Plan:
    """What embedding and tuning will cost; `lamplit plan` prints it.

    Attributes:
        source: what was read.
        images: number of images.
        pairs: number of pairs of an image and a text.
        captions: number of distinct texts.
        backend: what will run the image tower.
        steps: number of steps of the tuning.
        embed: cost of `lamplit embed`.
        tune: cost of `lamplit tune`.
        recall: what recall as many icons reached, of `expected_recall`.
        dollars: of both, at the price that was given; None without one.
        notes: what was not measured, a sentence each.
    """

    source: str
    images: int
    pairs: int
    captions: int
    backend: str
    steps: int
    embed: Stage
    tune: Stage
    recall: dict[str, float]
    dollars: float | None = None
    notes: list[str] = field(default_factory=list)
