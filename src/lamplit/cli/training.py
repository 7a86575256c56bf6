"""The commands that make models: `lamplit tune`, `compare`, `merge`, `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import lamplit
from lamplit.cli import tables
from lamplit.cli.terminal import (
    AsJson,
    Device,
    default_workers,
    print_line,
    show,
    split_names,
)
from lamplit.errors import UsageError


def tune(
    context: typer.Context,
    store: Annotated[str, typer.Argument(help="What lamplit embed made.")],
    out: Annotated[Path, typer.Option(help="Folder of the run and its model.")],
    text_tower: Annotated[
        str | None, typer.Option(help="hf:NAME_OR_FOLDER, lit:NAME, demo:minilm, scratch:tiny, :small, :base ...")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The paper's settings by name, or a TOML file; options replace its values.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="auto, or image and text tower: L locked, U pre-trained and tuned, u from scratch.")
    ] = "auto",
    text_column: Annotated[str, typer.Option(help="Column of the store with the texts.")] = "texts",
    loss: Annotated[str, typer.Option(help="softmax or sigmoid.")] = "softmax",
    optimizer: Annotated[str, typer.Option(help="adamw or adafactor.")] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Peak rate; 1e-3 from scratch, 1e-5 pre-trained, 1e-4 LoRA.")] = None,
    weight_decay: Annotated[float, typer.Option(help="In torch's sense.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Pairs in one loss; memory does not limit it.")] = 1024,
    epochs: Annotated[float, typer.Option(help="Passes over the training pairs.")] = 20.0,
    steps: Annotated[int | None, typer.Option(help="Steps in all, instead of epochs.")] = None,
    warmup_ratio: Annotated[float, typer.Option(help="Part of the steps over which the rate rises.")] = 0.1,
    grad_clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    image_lr: Annotated[float | None, typer.Option(help="Peak rate of an image tower that trains.")] = None,
    image_weight_decay: Annotated[float | None, typer.Option(help="Its weight decay; by default the text's.")] = None,
    image_delay: Annotated[float, typer.Option(help="Part of the steps before it begins to train.")] = 0.0,
    image_head: Annotated[bool, typer.Option("--image-head", help="A linear layer behind the image tower.")] = False,
    augment: Annotated[str, typer.Option(help="none or inception, of images that are read in training.")] = "none",
    context_length: Annotated[int | None, typer.Option(help="Longest text in tokens.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Part of the captions that is never seen.")] = 0.2,
    closed_form: Annotated[bool, typer.Option(help="Begin from a head in closed form.")] = True,
    num_evals: Annotated[int, typer.Option(help="How often recall is measured and a checkpoint written.")] = 10,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without gain.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    lora: Annotated[int | None, typer.Option(help="Rank of low-rank changes that train in the text tower.")] = None,
    seed: Annotated[int, typer.Option(help="Of split, order and dropout.")] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode, where images are read.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Tune a text tower on a store, or both towers on its images; run again to resume."""
    from lamplit.tuning.recipes import read_recipe

    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    known = lamplit.TuneSettings.__dataclass_fields__
    values = {name: value for name, value in context.params.items() if name in known}
    if recipe is not None:
        values |= {name: value for name, value in read_recipe(recipe)["settings"].items() if name not in given}
    if values["text_tower"] is None:
        raise UsageError("no text tower: give --text-tower hf:NAME_OR_FOLDER, or a --recipe that names one")
    settings = lamplit.TuneSettings(**values)
    num_workers = (default_workers() if settings.image_trains else 0) if workers is None else workers
    report = lamplit.tune(store, out, settings, device=device, workers=num_workers, progress=True)
    _prepare_search(out)
    show(report, tables.tune_report, as_json)


def compare(
    source: Annotated[str, typer.Argument(help="Pairs, or a store.")],
    text_towers: Annotated[str, typer.Option(help="Text towers, by commas.")],
    out: Annotated[Path, typer.Option(help="Folder of the comparison; run again to go on.")],
    image_towers: Annotated[str | None, typer.Option(help="Image towers, by commas; a store has its own.")] = None,
    modes: Annotated[str, typer.Option(help="Lock modes, by commas.")] = "LU",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each choice, each with a split of its own.")] = 3,
    epochs: Annotated[float, typer.Option(help="Passes over the training pairs.")] = 20.0,
    batch_size: Annotated[int, typer.Option(help="Pairs in one loss.")] = 1024,
    recipe: Annotated[str | None, typer.Option(help="Other settings for all runs: a recipe, or a TOML file.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode ahead of the tower.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tune every choice of towers and mode on the same pairs; print and plot recall with its spread."""
    from lamplit.tuning.recipes import read_recipe

    settings = {"epochs": epochs, "batch_size": batch_size} | (read_recipe(recipe)["settings"] if recipe else {})
    result = lamplit.compare(
        source, out, image_towers=split_names(image_towers), 
        text_towers=split_names(text_towers), modes=split_names(modes), seeds=seeds,
        settings=settings, workers=default_workers() if workers is None else workers, progress=True,
    )  # fmt: skip
    show(result, tables.comparison, as_json)


def merge(
    model: Annotated[Path, typer.Argument(help="Folder of a model that was tuned with --lora.")],
    out: Annotated[Path, typer.Option(help="Folder of the ordinary model to write.")],
    as_json: AsJson = False,
) -> None:
    """Merge LoRA into the text tower: an ordinary model with the same vectors."""
    lamplit.merge_lora(model, out)
    _prepare_search(out)
    print_line(json.dumps({"model": str(out)}) if as_json else out)


def export(
    source: Annotated[str, typer.Argument(help="Folder of a model; a store, for clip-retrieval.")],
    to: Annotated[
        str, typer.Option(help="onnx, transformers, open-clip or sentence-transformers; clip-retrieval for a store.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    int8: Annotated[bool, typer.Option("--int8", help="With onnx: int8 files too, and what they lose.")] = False,
    sample: Annotated[
        str | None, typer.Option(help="Pairs to compare on; by default sentences and patterns made here.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device of the model's vectors that are compared; by default cpu.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for another library, checked to give the same vectors there; or the vectors of a store."""
    if to == "clip-retrieval":
        show(lamplit.export_vectors(source, out), tables.vectors_report, as_json)
    else:
        report = lamplit.export(source, out, to=to, int8=int8, sample=sample, device=device)  # type: ignore[arg-type]
        show(report, tables.export_report, as_json)


def _prepare_search(model: Path) -> None:
    from lamplit.exports.text_graph import write_words

    write_words(model)
