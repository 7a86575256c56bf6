"""The commands `lamplit classes` and `classify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import lamplit
from lamplit.cli import tables
from lamplit.cli.terminal import (
    AsJson,
    Device,
    ModelName,
    chosen_classes,
    class_names,
    default_workers,
    list_skipped,
    named_templates,
    print_line,
    print_note,
    show,
)
from lamplit.data.places.image_files import walk
from lamplit.errors import UsageError

_WORTH_WORKERS = 512  # images; a worker takes seconds to start


def classes(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The class list to write, such as classes.json.")],
    classes: Annotated[str | None, typer.Option(help="Class names, with commas between them.")] = None,
    classes_file: Annotated[Path | None, typer.Option(help="Class names, one per line.")] = None,
    templates: Annotated[
        str | None,
        typer.Option(
            help="File of prompts with {}, one per line; the name of a set; or suggest: the best on --sample."
        ),
    ] = None,
    sample: Annotated[str | None, typer.Option(help="Labelled images: a store, folder or file of pairs.")] = None,
    label_column: Annotated[
        str, typer.Option(help="Column of --sample with the class of each image; none: it is of none of them.")
    ] = "label",
    multi_label: Annotated[
        bool, typer.Option("--multi-label", help="An image may have several classes; labels with ; between them.")
    ] = False,
    keep_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of right answers that must reach the threshold; by default what balances both errors, or 0.95."
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make a list of your classes, calibrated on labelled images; classify then needs no text tower.

    In Python: lamplit.make_classes.
    """
    made = lamplit.make_classes(
        model, class_names(classes, classes_file), templates=named_templates(templates), sample=sample,
        label_column=label_column, multi_label=multi_label, keep_rate=keep_rate, device=device, progress=True,
    )  # fmt: skip
    made.save(out)
    report = made.report
    if report is None:
        print_line(json.dumps({"classes": str(out)}) if as_json else out)
    else:
        for note in report.notes:
            print_note(note)
        list_skipped(report.skipped)
        show({"classes": str(out), **asdict(report)} if as_json else report, tables.calibration, as_json)


def classify(
    model: ModelName,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    classes: Annotated[str | None, typer.Option(help="Class names, with commas between them.")] = None,
    classes_file: Annotated[
        Path | None, typer.Option(help="Class names, one per line; or the .json file that lamplit classes wrote.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompts with {}: a file, one per line, or a set such as clip-80.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes of each image to print.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are encoded together.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode images; by default half the cores for many images, else none."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Classify images by words."""
    walks = {image: walk(image) for image in images if image.is_dir()}
    files = [
        file
        for image in images
        for file in ([image / found for found in walks[image].images] if image in walks else [image])
    ]
    for note in (note for found in walks.values() for note in found.notes):
        print_note(note)
    list_skipped([problem for found in walks.values() for problem in found.problems])
    if workers is None:
        workers = default_workers() if len(files) >= _WORTH_WORKERS else 0
    result = lamplit.classify(
        model, files, chosen_classes(classes, classes_file), templates=named_templates(templates),
        top=top, batch_size=batch_size, workers=workers, device=device, progress=len(files) > batch_size,
    )  # fmt: skip
    list_skipped(result.skipped)
    if not result.predictions:
        raise UsageError(f"none of {len(files)} images could be used")
    show(result.predictions, tables.predictions, as_json)
