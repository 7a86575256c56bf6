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
    chosen_classes,
    class_names,
    files_of,
    list_skipped,
    print_line,
    read_lines,
    show,
)
from lamplit.errors import UsageError


def classes(
    model: Annotated[str, typer.Argument(help="Folder of a model, or lit:NAME, a published one.")],
    out: Annotated[Path, typer.Option(help="The class list to write, such as classes.json.")],
    classes: Annotated[str | None, typer.Option(help="Class names, by commas.")] = None,
    classes_file: Annotated[Path | None, typer.Option(help="Class names, one per line.")] = None,
    templates: Annotated[
        str | None,
        typer.Option(help="Prompts with {}, one per line; a set's name; or suggest, the best on the sample."),
    ] = None,
    sample: Annotated[str | None, typer.Option(help="Labelled images: store, folder or file of pairs.")] = None,
    label_column: Annotated[
        str, typer.Option(help="Its column with class names, or none for images of none of them.")
    ] = "label",
    multi_label: Annotated[
        bool, typer.Option("--multi-label", help="An image may have several of the classes; labels by ;.")
    ] = False,
    keep_rate: Annotated[
        float | None,
        typer.Option(help="Right answers that must stay; by default as many as balances both errors, or 0.95."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a list of your classes, calibrated on labelled images; classify then needs no text tower."""
    prompts = read_lines(Path(templates)) if templates and Path(templates).is_file() else templates
    made, report = lamplit.make_classes(
        lamplit.load(model), class_names(classes, classes_file), templates=prompts, sample=sample,
        label_column=label_column, multi_label=multi_label, keep_rate=keep_rate, progress=True,
    )  # fmt: skip
    made.save(out)
    if report is None:
        print_line(json.dumps({"classes": str(out)}) if as_json else out)
    else:
        list_skipped(report.skipped)
        show({"classes": str(out), **asdict(report)} if as_json else report, tables.calibration, as_json)


def classify(
    model: Annotated[str, typer.Argument(help="Folder of a model, or lit:NAME, a published one.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    classes: Annotated[str | None, typer.Option(help="Class names, by commas.")] = None,
    classes_file: Annotated[
        Path | None, typer.Option(help="Class names, one per line; or .json that lamplit classes wrote.")
    ] = None,
    templates: Annotated[Path | None, typer.Option(help="Prompts with {}, one per line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Classify images by words."""
    chosen = chosen_classes(classes, classes_file)
    saved = isinstance(chosen, lamplit.ClassList)
    files = [file for image in images for file in (files_of(image) if image.is_dir() else [image])]
    predictions, skipped = lamplit.classify(
        lamplit.load(model, towers="image" if saved else "both"), files, chosen,
        templates=read_lines(templates) if templates else None, top=top,
    )  # fmt: skip
    list_skipped(skipped)
    if not predictions:
        raise UsageError(f"none of {len(files)} images could be used")
    show(predictions, tables.predictions, as_json)
