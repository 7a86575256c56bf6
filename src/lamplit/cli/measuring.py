"""The commands `lamplit evaluate` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import lamplit
from lamplit.cli import tables
from lamplit.cli.terminal import (
    AsJson,
    Device,
    ModelName,
    chosen_classes,
    default_workers,
    read_lines,
    show,
)
from lamplit.errors import UsageError

_OF_OWN_DATA = ("split", "text_column", "label_column", "classes_file")
_OF_BENCHMARKS = ("resize_mode", "canonical", "few_shot", "workers")


def evaluate(
    context: typer.Context,
    model: ModelName,
    source: Annotated[str | None, typer.Argument(help="Store, folder or file of pairs.")] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another model, measured on the same images and captions; repeat it for more."),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help="A benchmark of the paper and the folder of its data: NAME=PATH; repeat it for more."),
    ] = None,
    resize_mode: Annotated[
        str,
        typer.Option(
            help="How images are brought to the tower's size: squash (as the paper's public models), crop or own."
        ),
    ] = "squash",
    text_column: Annotated[
        str | None, typer.Option(help="Column with the texts; by default the one that was tuned on.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with classes, for zero-shot accuracy.")] = None,
    classes_file: Annotated[
        Path | None, typer.Option(help="Classes to choose from, one per line; or .json that lamplit classes wrote.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompts with {}: a file, one per line, or a set such as clip-80.")
    ] = None,
    canonical: Annotated[
        bool,
        typer.Option("--canonical", help="Lower-case prompts of benchmarks without punctuation, as big_vision does."),
    ] = False,
    few_shot: Annotated[
        int | None,
        typer.Option(min=1, help="Also fit a linear probe on this many training images of each class of a benchmark."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Captions to measure, and with --label-column their images: held_out (those the model's run kept "
            "back to choose its best checkpoint by), test (those it kept for the end), all, or auto: what the model "
            "was not tuned on."
        ),
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for one JSON file per result; see lamplit report.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode images of benchmarks ahead of the tower.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure recall both ways and zero-shot accuracy, on pairs of your own or on the paper's benchmarks.

    Of pairs that the model was tuned on, only the captions held out of tuning and their images are measured; see
    --split.

    In Python: lamplit.evaluate; of --benchmark: lamplit.run_benchmarks.
    """
    if source is None and not benchmark:
        raise UsageError("nothing to evaluate on; give a store or pairs, or --benchmark NAME=PATH for a benchmark")
    if source is None:
        _refuse(context, _OF_OWN_DATA, "own data, and there is none: give a store or pairs behind the model")
    if not benchmark:
        _refuse(context, _OF_BENCHMARKS, "benchmarks, and there is none: give --benchmark NAME=PATH")
    if classes_file is not None and label_column is None:
        raise UsageError("--classes-file needs --label-column, the column with the class of each image")
    prompts = _templates(templates)
    named = [_assigned(each) for each in benchmark or ()]
    results = []
    if source is not None:
        options: dict[str, Any] = {"templates": prompts} if prompts is not None else {}
        results += lamplit.evaluate(
            model, source, beside=beside or (), split=split, text_column=text_column, label_column=label_column,  # type: ignore[arg-type]
            class_names=chosen_classes(None, classes_file) if classes_file else None,
            out=out, device=device, progress=True, **options,
        )  # fmt: skip
    if named:
        for measured in (model, *(beside or ())):
            results += lamplit.run_benchmarks(
                measured, named, resize_mode=resize_mode, templates=prompts,  # type: ignore[arg-type]
                canonical=canonical, few_shot=few_shot, out=out, device=device,
                workers=default_workers() if workers is None else workers, progress=True,
            )  # fmt: skip
    show(results, tables.results, as_json)


def report(
    results: Annotated[Path, typer.Argument(help="Folder that lamplit evaluate --benchmark wrote.")],
    against: Annotated[
        str, typer.Option(help="paper, another folder of results, a CSV file of figures, or none.")
    ] = "paper",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; by default `report` inside the folder of results.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put results beside the published figures: Markdown, CSV, JSON and one page.

    In Python: lamplit.write_report.
    """
    written = lamplit.write_report(results, against=None if against == "none" else against, out=out)
    show(written, tables.results_report, as_json)


def _refuse(context: typer.Context, names: tuple[str, ...], belongs_to: str) -> None:
    """Refuse options that were typed but would change nothing."""
    typed = [name for name in names if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if typed:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in typed)
        verb, them = ("is", "it") if len(typed) == 1 else ("are", "them")
        raise UsageError(f"{options} {verb} for {belongs_to}, or leave {them} out")


def _assigned(by_equals: str) -> tuple[str, str]:
    name, equals, path = by_equals.partition("=")
    if not equals:
        raise UsageError(f"{by_equals!r} is not NAME=PATH, such as --benchmark imagenet=/data/imagenet")
    return name, path


def _templates(name: str | None) -> str | list[str] | None:
    """The name of a template set as it is, and a prompt too, or the prompts of a file."""
    from lamplit.zeroshot.names import known_template_sets

    return name if name is None or "{}" in name or name in known_template_sets() else read_lines(Path(name))
