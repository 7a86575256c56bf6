"""The command `lamplit app`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

import lamplit
from lamplit.cli.terminal import AsJson, Device, ModelName, chosen_classes, print_line


def serve(
    model: ModelName,
    store: Annotated[str, typer.Argument(help="Store that lamplit embed made with the image tower of the model.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. Everybody who reaches it can search: there is no password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free one.")] = 7860,
    classes_file: Annotated[
        Path | None,
        typer.Option(
            help="Classes that the page begins with: one per line, or a .json file that lamplit classes wrote."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name of a reverse proxy in front of the page, such as photos.example.com; again for more."),
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path of the page behind a reverse proxy, such as /photos.")] = "",
    processes: Annotated[
        int,
        typer.Option(
            min=1, help="Processes that answer on this port; each takes the memory of the towers, not of the store."
        ),
    ] = 1,
    device: Device = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a web page and an HTTP API: search, classify, explore, and the curves of the run.

    In Python: lamplit.serve.
    """
    # Read by numpy's and torch's libraries when they are loaded, which is not yet. Several requests, each with all
    # cores, hold each other up.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def started(address: str) -> None:
        print_line(json.dumps({"address": address}) if as_json else f"{address}  (Ctrl-C ends it)")
        if open_page:
            typer.launch(address)

    lamplit.serve(
        model, store, host=host, port=port, classes=chosen_classes(None, classes_file) if classes_file else None,
        device=device, allow_hosts=allow_host or (), root_path=root_path, processes=processes, started=started,
    )  # fmt: skip
