"""The service of a store as it is now: opened again when somebody has written to the store.

A request is answered by the service that was there when it began, whatever comes meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pyarrow as pa

from lamplit.app.encoding import LATER, pool_of, run
from lamplit.app.kept_answers import KeptAnswers
from lamplit.app.service import Service
from lamplit.errors import StoreError
from lamplit.store.lance_store import Store

logger = logging.getLogger(__name__)
_KEPT_MAPS = 32  # of some 300 kB each at most
_KEPT_WHERES = 32  # of some 500 kB each
_KEPT_THUMBNAILS = 4096  # of some 15 kB each
CHECK_SECONDS = 5.0  # between two looks at the store
_REST = 10  # times as long as it took to open the store, before it is opened again: files of search may be made anew


@dataclass(frozen=True)
class Opened:
    """A service, and what it has answered.

    Attributes:
        service: answers for one version of the store.
        described: of it, as JSON.
        maps: answers about the map.
        thumbnails: small images by id.
        wheres: images with what words read in them, by id and words.
    """

    service: Service
    described: str
    maps: KeptAnswers = field(default_factory=lambda: KeptAnswers(_KEPT_MAPS))
    thumbnails: KeptAnswers = field(default_factory=lambda: KeptAnswers(_KEPT_THUMBNAILS))
    wheres: KeptAnswers = field(default_factory=lambda: KeptAnswers(_KEPT_WHERES))


class Live:
    """Holds what is open.

    Args:
        service: of the store as it is at the beginning.
        describe: describes a service, as JSON.

    Attributes:
        now: what is open now.
    """

    def __init__(self, service: Service, describe: Callable[[Service], str]) -> None:
        self._describe = describe
        self._pool = pool_of(1, "store", LATER)
        self._told = ""  # why the store cannot be opened, so that it is said once
        self.now = Opened(service, describe(service))

    @asynccontextmanager
    async def watched(self, _: object = None) -> AsyncIterator[None]:
        """Look after the store for as long as the server runs."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _watch(self) -> None:
        wait = CHECK_SECONDS
        while True:
            await asyncio.sleep(wait)
            began = time.monotonic()
            found = await run(self._pool, self._opened_again)
            if found is not None:
                self.now = found
            wait = max(CHECK_SECONDS, _REST * (time.monotonic() - began))

    def _opened_again(self) -> Opened | None:
        """Open the store if it has changed."""
        before = self.now.service
        try:
            store = Store(before.store.path)
            if store.version_digest == before.store.version_digest:
                return None
            service = before.of(store)
            found = Opened(service, self._describe(service))
        # It is gone, of another tower, or being moved or copied; what is open stays open.
        except (StoreError, OSError, pa.ArrowException) as error:
            if str(error) != self._told:
                logger.warning("the store has changed and cannot be opened again: %s", error)
            self._told = str(error)
            return None
        self._told = ""
        return found
