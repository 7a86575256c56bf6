"""The process that draws foreign SVGs: reads them one after another, and answers each with a PNG or a reason.

It is run as a file, so it imports nothing of lamplit.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import IO

MAX_MEMORY = 2 * 2**30  # bytes of address space


def draw(svg: str) -> bytes:
    """Draw an SVG on white; return a PNG.

    Raises:
        ValueError: it is damaged.
    """
    import resvg_py

    # Without fonts: text would look as the machine's do. Widths in points need a resolution.
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white", dpi=96, skip_system_fonts=True))


def write(stream: IO[bytes], state: bytes, content: bytes) -> None:
    """Write a message: its state (`+`, or `-` for a reason), its length, its content."""
    stream.write(state + len(content).to_bytes(4, "big") + content)
    stream.flush()


def read(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """Read a message.

    Raises:
        EOFError: there is none, or the other process ended in the middle of it.
    """
    head = stream.read(5)
    content = stream.read(int.from_bytes(head[1:], "big"))
    if len(head) < 5 or len(content) < int.from_bytes(head[1:], "big"):
        raise EOFError
    return head[:1], content


def main() -> None:
    """Draw until the other process ends."""
    # Windows has no such module, and some systems no such bound; the bound of time holds there too.
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    with suppress(EOFError, OSError):
        while True:
            svg = read(sys.stdin.buffer)[1].decode()
            try:
                state, content = b"+", draw(svg)
            except ValueError as error:
                state, content = b"-", str(error).encode()
            write(sys.stdout.buffer, state, content)


if __name__ == "__main__":
    main()
