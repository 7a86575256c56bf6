"""What a run of `embed` did, and the list of the images that it could not use."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lamplit.data.skipped import Skipped
from lamplit.locations.paths import path_of, write_whole


@dataclass
class EmbedReport:
    """What one run of `embed` did; all counts are of images.

    Attributes:
        store: path of the store.
        image_tower: spec of the tower.
        backend: what ran the tower: torch, compile or onnx; none if no image had to be embedded.
        embedded: went through the tower.
        updated: rows that were replaced, because the image, its texts, its metadata or its path changed.
        unchanged: were stored with the same content.
        moved: same content under a new path; the stored vector is reused.
        copies: same content as an earlier image of this run, which went through the tower for both.
        missing: rows that stay in the store although their files are gone from the source's folder.
        pruned: such rows, deleted.
        without_text: are in the store without any text.
        not_kept: values of metadata that could not be kept, by column.
        notes: what to know about the source and the store, in plain sentences.
        skipped: could not be used, with the reasons; parts of the source that could not be read, too.
        skipped_file: where these are listed, one JSON object a line; None if there are none.
        units: number of units that the source was divided into; None if it was not.
        units_left: units that are not in the store yet, because other processes embed them, or are to embed them.
        seconds: wall-clock time of the run.
    """

    store: str
    image_tower: str
    backend: str = "none"
    embedded: int = 0
    updated: int = 0
    unchanged: int = 0
    moved: int = 0
    copies: int = 0
    missing: int = 0
    pruned: int = 0
    without_text: int = 0
    not_kept: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    skipped_file: str | None = None
    units: int | None = None
    units_left: int | None = None
    seconds: float = 0.0

    @property
    def num_usable(self) -> int:
        """Number of images that are in the store."""
        return self.embedded + self.moved + self.copies + self.unchanged

    def add(self, other: EmbedReport) -> None:
        """Add the counts, notes and skipped images of another run or unit; each note is listed once."""
        if self.backend == "none":
            self.backend = other.backend
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.not_kept = dict(Counter(self.not_kept) + Counter(other.not_kept))
        self.notes = list(dict.fromkeys([*self.notes, *other.notes]))
        self.skipped += other.skipped


_COUNTS = ("embedded", "updated", "unchanged", "moved", "copies", "without_text")


def list_skipped(out: str | Path, skipped: list[Skipped]) -> str | None:
    """Write the list of a run's skipped images beside the store, or remove the last run's; return its path."""
    file = path_of(f"{str(out).removesuffix('.lance')}.skipped.jsonl")
    if not skipped:
        file.unlink(missing_ok=True)
        return None
    write_whole(file, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in skipped))
    return str(file)
