"""The command `lamplit app`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import lamplit
from lamplit.app.choice import ClassChoice
from lamplit.cli.terminal import AsJson, print_line, read_lines
from lamplit.errors import UsageError


def serve(
    model: Annotated[str, typer.Argument(help="Folder of a model, or lit:NAME, a published one.")],
    store: Annotated[str, typer.Argument(help="What lamplit embed made, with the tower the model reads.")],
    host: Annotated[str, typer.Option(help="Where to listen. Whoever reaches it may ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 7860,
    classes_file: Annotated[
        Path | None, typer.Option(help="Classes to begin with: lines, or a .json of lamplit classes.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a web page and an HTTP API: search, classify, explore, and the curves of the run."""

    def started(address: str) -> None:
        print_line(json.dumps({"address": address}) if as_json else f"{address}  (Ctrl-C ends it)")
        if open_page:
            typer.launch(address)

    choice = _choice(classes_file) if classes_file else None
    lamplit.serve(model, store, host=host, port=port, choice=choice, started=started)


def _choice(file: Path) -> ClassChoice:
    if file.suffix != ".json":
        return ClassChoice(read_lines(file))
    classes = lamplit.ClassList.load(file)
    if classes.multi_label:
        raise UsageError(f"{file} holds multi-label classes, which the page cannot show; lamplit classify can")
    return ClassChoice(classes.names, classes.templates, classes.thresholds[0] if classes.thresholds else None)
