"""What a source holds and cannot be used: one record with its reason, never an exception."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """An image, or a part of a source, that cannot be used, as listed in `skipped.jsonl`.

    Attributes:
        id: of the image in its source; the name of a shard or of a member that could not be read.
        path: of the image's file; the id again if the image has no file of its own.
        reason: why it cannot be used, as one sentence.
    """

    id: str
    path: str
    reason: str
