"""What a process of a run tells the others when it fails; they would see only that its connections are closed."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lamplit.errors import LamplitError, TuneError

# So long a process stays to be heard. Those that listen need a moment; one that was killed is not waited for longer.
_FAREWELL = timedelta(seconds=5)
_FAILED, _LEFT, _ENDED = "failed", "left", "ended"


class LostRankError(TuneError):
    """Another process is gone, and did not say why."""


class RankFailures:
    """Notices of one group of processes, in the store where these have met.

    As a context it hears of errors: this process tells the others, and closes its connections, so that none waits for
    it.

    Args:
        store: a `torch.distributed.Store` that the first process serves.
        rank: number of this process.
        size: how many there are.

    Attributes:
        has_left: whether this process has left the group.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.has_left = False

    def heard(self) -> str | None:
        """Return who failed and why, in a sentence without its end; None if none has said so."""
        with suppress(dist.DistError):
            if self._store.check([_FAILED]):
                rank, reason = json.loads(self._store.get(_FAILED))
                return f"process {rank} of {self._size} failed: {reason.rstrip('.')}"
        return None

    def end(self) -> None:
        """Say that this process ends, if it is the first: then nothing keeps the others."""
        if self._rank == 0:
            self._store.set(_ENDED, "")

    def __enter__(self) -> None:
        """Begin to hear."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leave the group, if there was an error; Ctrl-C ends all processes by itself."""
        if not isinstance(error, Exception):
            return
        self.has_left = True
        if not isinstance(error, LostRankError):
            self._tell(error)
        if dist.get_backend() == "gloo":  # nccl would wait for the others
            dist.destroy_process_group()
        if not isinstance(error, LostRankError):
            self._stay()

    def _tell(self, error: Exception) -> None:
        """Say why this process fails. Who hears of a failure fails, too, but the first one counts."""
        reason = str(error) if isinstance(error, LamplitError) else f"{type(error).__name__}: {error}"
        with suppress(dist.DistError):
            self._store.compare_set(_FAILED, "", json.dumps([self._rank, reason]))

    def _stay(self) -> None:
        """Stay for a moment: the first process until the others have heard, they until the first one ends.

        What the first one prints is seen, and torchrun ends all that are left as soon as one of them ends.
        """
        others = [f"{_LEFT} {rank}" for rank in range(1, self._size)]
        with suppress(dist.DistError):
            self._store.set(f"{_LEFT} {self._rank}", "")
            self._store.wait(others if self._rank == 0 else [_ENDED], _FAREWELL)
