"""What the commands share: results go to stdout, everything else to stderr; lists come from options and files."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import lamplit
from lamplit.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from lamplit.data.skipped import Skipped

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column with the images; by default it is found by its name.")]
TextColumns = Annotated[
    str | None,
    typer.Option(
        "--text-column", help="Column with the texts, or several columns by commas; by default it is found by its name."
    ),
]
ModelName = Annotated[
    str,
    typer.Argument(
        help="Folder of a model, or hf:NAME of one on the hub; or one of another library: hf:NAME_OR_FOLDER (CLIP, "
        "SigLIP and the like of transformers), open_clip:NAME/PRETRAINED or open_clip:FOLDER, st:NAME_OR_FOLDER "
        "(sentence-transformers), dinotxt:FOLDER (Meta's files), lit:NAME (published by the paper's authors)."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="torch device, such as cuda or cpu; by default the accelerator, if there is one.")
]
TowerWeights = Annotated[
    str | None, typer.Option(help="Weights file of the image tower, or 'random'; by default its library's.")
]
Pool = Annotated[
    str | None,
    typer.Option(help="How the image tower pools: cls, mean, map or cls+mean; by default as its library does."),
]
SplitName = Annotated[
    str | None, typer.Option(help="Split of the source to read, or 'all'; by default train, if there are several.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Number of processes that decode images; by default half of the cores, at most 8."),
]
stderr = Console(stderr=True)

_MAX_WAIT = 0.5  # seconds; nearly every terminal answers at once
_MAX_DELAY = 0.08  # seconds; textual-image, which asks again, waits 0.1 s, and a later answer is typed into the shell


def show(result: Any, table: Callable[[Any], list[Table]], as_json: bool) -> None:
    """Print a result as JSON, or as the tables that `table` makes of it."""
    if as_json:
        plain = [asdict(item) for item in result] if isinstance(result, list) else result
        plain = plain if isinstance(plain, dict | list) else asdict(plain)
        print_line(json.dumps(plain, indent=2, ensure_ascii=False, default=str))
    else:
        for each in table(result):
            if sys.stdout.isatty():
                Console().print(each)
            else:  # for pipes and files, which have no width to fit a table into
                print_line(_as_text(each))


def _as_text(table: Table) -> str:
    """Write a table as lines of cells between tabs."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = ["\t".join(str(cell).replace("\n", "; ") for cell in row) for row in rows]
    headers = ["\t".join(str(column.header) for column in table.columns)] if table.show_header else []
    return "\n".join([*([str(table.title)] if table.title else []), *headers, *lines])


def draws_thumbnails(asked: bool | None) -> bool:
    """Tell whether to draw thumbnails: on any terminal if `asked`; by default (None) on one that shows real images.

    Raises:
        MissingExtraError: thumbnails are asked for and textual-image is not installed.
    """
    if asked is False or os.environ.get("TERM") == "dumb" or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    if 0 in os.get_terminal_size(sys.stdout.fileno()):  # textual-image divides by the rows and columns
        return False
    if find_spec("textual_image") is None:
        if asked:
            raise MissingExtraError("textual-image", "thumbnails")
        return False
    return bool(asked) or _shows_images()


def _shows_images() -> bool:
    """Ask the terminal whether it knows kitty's graphics protocol or Sixel; it must answer quickly."""
    if sys.platform == "win32":
        return True  # textual-image asks; that console is always on this machine
    import termios  # missing on Windows
    import tty

    # A terminal that does not know the first question is silent; its answer to the second ends both.
    questions = "\x1b_Gi=1,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\" + "\x1b[c"
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal, termios.TCSANOW)
    try:
        sys.stdout.write(questions)
        sys.stdout.flush()
        start, answer = time.monotonic(), b""
        while not (attributes := re.search(rb"\x1b\[\?([\d;]*)c", answer)):
            left = start + _MAX_WAIT - time.monotonic()
            if left <= 0 or not select.select([terminal], [], [], left)[0]:
                break
            answer += os.read(terminal, 1024)
        is_quick = time.monotonic() - start < _MAX_DELAY
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
        erase_line()
    is_sixel = attributes is not None and b"4" in attributes[1].split(b";")
    return is_quick and (is_sixel or b"_Gi=1;OK" in answer)


def erase_line() -> None:
    """Erase what some terminals print when they are asked a question that they do not know."""
    sys.stdout.write("\r\x1b[K")
    sys.stdout.flush()


def print_line(value: object) -> None:
    """Print a value without formatting, for pipes."""
    typer.echo(str(value))


def list_skipped(skipped: list[Skipped]) -> None:
    """Name the images that could not be used, on stderr."""
    for item in skipped:
        stderr.print(f"skipped {item.path}: {item.reason}", markup=False, highlight=False, soft_wrap=True)


def print_note(text: str) -> None:
    """Print what a user should know, in a line of its own on stderr."""
    stderr.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def explain(error: Exception, debug: bool) -> None:
    """Print an error as one line, after its traceback if `debug`."""
    if debug:
        stderr.print_exception()
    text = _in_words(error) if isinstance(error, OSError) else str(error)
    stderr.print(f"error: {text}", markup=False, highlight=False, soft_wrap=True)


def _in_words(error: OSError) -> str:
    """Say what the system refused, for which file, and what to do about a full disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" for {error.filename}" if error.filename else ""
        return f"there is no space left{where}; free some, and type the same command again"
    return f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)


def class_names(by_commas: str | None, file: Path | None) -> list[str]:
    """Return class names from an option or from a file; exactly one of the two is given."""
    if (by_commas is None) == (file is None):
        raise UsageError("give the classes once: --classes a,b,c or --classes-file FILE")
    return read_lines(file) if file else split_names(by_commas)


def split_names(by_commas: str | None) -> list[str]:
    """Return the names between commas."""
    return [name.strip() for name in (by_commas or "").split(",") if name.strip()]


def read_lines(file: Path) -> list[str]:
    """Return the lines of a file that are not empty; a note says if its encoding was guessed."""
    from lamplit.data.tables.encodings import decode_text

    try:
        text, encoding = decode_text(file.read_bytes(), file.name)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if encoding.note_of_many:
        print_note(encoding.note)
    return [line.strip() for line in text.splitlines() if line.strip()]


def named_templates(name: str | None) -> str | list[str] | None:
    """Return the prompts of a file; of anything else its name, which may be that of a template set."""
    return read_lines(Path(name)) if name and Path(name).is_file() else name


def default_workers() -> int:
    """Return a number of decoding processes that leaves cores for the tower."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def chosen_classes(classes: str | None, file: Path | None) -> list[str] | lamplit.ClassList:
    """Return class names, or the class list that `lamplit classes` wrote."""
    if file is not None and file.suffix == ".json" and classes is None:
        return lamplit.ClassList.load(file)
    return class_names(classes, file)
