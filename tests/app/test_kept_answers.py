"""Answers that the page keeps."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lamplit.app.kept_answers import KeptAnswers

POOL = ThreadPoolExecutor(1)


class Maker:
    """Makes answers, and counts them; the first one waits until all have asked."""

    def __init__(self) -> None:
        self.made: list[tuple[object, ...]] = []
        self.go_on = threading.Event()

    def __call__(self, *question: object) -> bytes:
        self.go_on.wait(10)
        self.made.append(question)
        if question == ("broken",):
            raise ValueError("it cannot be answered")
        return repr(question).encode()


def test_many_who_ask_at_once_wait_for_one_answer() -> None:
    kept, make = KeptAnswers(2), Maker()

    async def ask() -> list[bytes]:
        asked = [asyncio.ensure_future(kept.get(POOL, make, "a", 1)) for _ in range(20)]
        await asyncio.sleep(0.05)
        make.go_on.set()
        return [*await asyncio.gather(*asked), await kept.get(POOL, make, "b", 1)]

    assert asyncio.run(ask()) == [b"('a', 1)"] * 20 + [b"('b', 1)"]
    assert make.made == [("a", 1), ("b", 1)]


def test_those_that_nobody_asked_for_longest_are_dropped() -> None:
    kept, make = KeptAnswers(2), Maker()
    make.go_on.set()

    async def ask() -> None:
        for name in ("a", "b", "a", "c", "a", "b"):
            assert await kept.get(POOL, make, name) == repr((name,)).encode()

    asyncio.run(ask())
    assert make.made == [("a",), ("b",), ("c",), ("b",)]


def test_errors_are_not_kept() -> None:
    kept, make = KeptAnswers(2), Maker()
    make.go_on.set()
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be answered"):
            asyncio.run(kept.get(POOL, make, "broken"))
    assert make.made == [("broken",), ("broken",)]
