"""What every command of the command line shares: how results are printed and lines are read."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lamplit import tables
from lamplit.errors import UsageError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
stderr = Console(stderr=True)


def show(result: Any, table: Any, as_json: bool) -> None:
    """Print a result as JSON, or as tables."""
    if as_json:
        plain = [asdict(item) for item in result] if isinstance(result, list) else result
        plain = plain if isinstance(plain, dict | list) else asdict(plain)
        print_line(json.dumps(plain, indent=2, ensure_ascii=False, default=str))
    else:
        made: list[Table] = table(result)
        for each in made:
            if sys.stdout.isatty():
                Console().print(each)
            else:  # for pipes and files, which have no width to fit a table into
                print_line(tables.plain(each))


def print_line(value: object) -> None:
    """Print one thing as it is, for pipes."""
    typer.echo(str(value))


def lines_of(file: Path) -> list[str]:
    """Read a file of one thing per line, without the empty ones.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
