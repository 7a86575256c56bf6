"""Answers that are asked for again, in memory: they need neither a thread nor a turn behind a search."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future


class KeptAnswers:
    """Bytes by their question; of more than `size`, those that nobody asked for longest are dropped.

    Only the server's event loop may ask.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Hashable, Future[bytes]] = OrderedDict()

    async def get(self, pool: Executor, make: Callable[..., bytes], *question: Hashable) -> bytes:
        """Return what `make` answers to a question, made in a thread of the pool unless it is kept, or made now."""
        answer = self._kept.get(question)
        if answer is None or (answer.done() and answer.exception() is not None):
            answer = self._kept[question] = pool.submit(make, *question)
        self._kept.move_to_end(question)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        # Who goes away takes it from nobody else.
        return answer.result() if answer.done() else await asyncio.shield(asyncio.wrap_future(answer))
