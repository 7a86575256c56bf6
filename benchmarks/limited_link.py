"""A link of limited rate between two network namespaces of this machine: as between two machines, but for the delay."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class End:
    """One end of a link.

    Attributes:
        command: what a command is put behind, to run there.
        interface: name of the network card.
    """

    command: tuple[str, ...]
    interface: str


LOOPBACK = (End((), "lo"),) * 2


@contextmanager
def limited_link(megabits: float) -> Iterator[tuple[End, End]]:
    """Make two namespaces and a link between them; remove them at the end. Linux, root and iproute2 are needed.

    Args:
        megabits: a second, in each direction, with all headers.

    Raises:
        OSError: this machine does not let us.
    """
    names = [f"lamplit-{os.getpid()}-{number}" for number in range(2)]
    cards = [f"lp{os.getpid()}-{number}" for number in range(2)]
    with ExitStack() as undo:
        for name in names:
            _run("ip", "netns", "add", name)
            undo.callback(_run, "ip", "netns", "delete", name)  # and with it its network card
        pair = ["ip", "link", "add", cards[0], "netns", names[0], "type", "veth"]
        _run(*pair, "peer", "name", cards[1], "netns", names[1])
        ends = []
        for number, (name, card) in enumerate(zip(names, cards, strict=True)):
            inside = ("ip", "netns", "exec", name)
            _run(*inside, "ip", "address", "add", f"10.213.71.{number + 1}/24", "dev", card)
            for each in ("lo", card):
                _run(*inside, "ip", "link", "set", each, "up")
            limit = ["rate", f"{megabits}mbit", "burst", "128kb", "latency", "100ms"]
            _run(*inside, "tc", "qdisc", "add", "dev", card, "root", "tbf", *limit)
            ends.append(End(inside, card))
        yield ends[0], ends[1]


def _run(*command: str) -> None:
    """Run a command; OSError says what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
