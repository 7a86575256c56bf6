"""The commands about models: `lamplit tune`, `compare`, `merge`, `export`, `push`; and `plan`, which tells the cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import lamplit
from lamplit.cli import tables
from lamplit.cli.processes import run_in_processes
from lamplit.cli.settings_options import with_settings
from lamplit.cli.terminal import (
    AsJson,
    Device,
    ImageColumn,
    Pool,
    SplitName,
    TextColumns,
    TowerWeights,
    Workers,
    default_workers,
    print_line,
    show,
    split_names,
)
from lamplit.errors import UsageError
from lamplit.tuning.settings import TuneSettings, recipe_settings

Recipe = Annotated[
    str | None, typer.Option(help="The paper's settings by name, or a TOML file. Options that are typed win over it.")
]


@with_settings(TuneSettings, "Settings of the run")
def tune(
    context: typer.Context,
    store: Annotated[str, typer.Argument(help="A store that lamplit embed made.")],
    out: Annotated[Path, typer.Option(help="Folder of the run and its model.")],
    recipe: Recipe = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode images for an image tower that trains.")
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1, help="Processes of this machine that share each batch: one for each GPU, or for some cores."
        ),
    ] = 1,
    log_to: Annotated[
        str | None,
        typer.Option(
            help="More logs of the run's numbers, by commas: csv, tensorboard, wandb. They go on with the run."
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Tune a text tower on a store, or both towers on its images; run again to resume."""
    from lamplit.tuning.ranks import is_first_process, is_one_of_several

    if recipe is not None:
        settings = TuneSettings.from_recipe(recipe, **given)
    elif "text_tower" in given:
        settings = TuneSettings(**given)
    else:
        raise UsageError("no text tower: give --text-tower hf:NAME_OR_FOLDER, or a --recipe that names one")
    num_workers = (default_workers() if settings.image_trains else 0) if workers is None else workers
    if processes > 1 and not is_one_of_several():
        run_in_processes(processes)
        return
    report = lamplit.tune(
        store, out, settings, device=device, workers=num_workers, log_to=split_names(log_to), progress=True
    )
    if is_first_process():  # of those that torchrun started
        _prepare_search(out)
        show(report, tables.tune_report, as_json)


@with_settings(TuneSettings, "Settings of all runs", but=("text_tower", "mode", "seed"))
def compare(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Pairs of images and texts, or a store.")],
    text_towers: Annotated[str, typer.Option(help="Text towers to compare, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder of the comparison; run again to go on.")],
    image_towers: Annotated[
        str | None, typer.Option(help="Image towers to compare, separated by commas; a store has its own.")
    ] = None,
    modes: Annotated[str, typer.Option(help="Lock modes to compare, separated by commas.")] = "LU",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each choice; each has a seed and a split of its own.")] = 3,
    recipe: Recipe = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode images ahead of the tower.")] = None,
    device: Device = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Tune every choice of towers and mode on the same pairs; print and plot recall with its spread."""
    result = lamplit.compare(
        source, out, image_towers=split_names(image_towers), text_towers=split_names(text_towers),
        modes=split_names(modes), seeds=seeds, settings=recipe_settings(recipe, **given),
        device=device, workers=default_workers() if workers is None else workers, progress=True,
    )  # fmt: skip
    show(result, tables.comparison, as_json)


@with_settings(TuneSettings, "Settings of the run", but=("text_column",))
def plan(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="CSV, TSV, JSON, Parquet, Arrow, folder, webdataset tars or hub id.")],
    image_tower: Annotated[
        str, typer.Option(help="timm:NAME, hf:NAME_OR_FOLDER, lit:NAME or demo:efficientnet-lite0.")
    ],
    image_tower_weights: TowerWeights = None,
    pool: Pool = None,
    image_column: ImageColumn = None,
    text_column: TextColumns = None,
    split: SplitName = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="Reckon for so many images, of which the source is a sample.")
    ] = None,
    machines: Annotated[int, typer.Option(min=1, help="Machines like this one that do it together.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each machine, with one process for each.")] = 1,
    dollars_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of one machine, to tell what both runs cost.")
    ] = None,
    workers: Workers = None,
    device: Device = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Tell time, disk and memory of embed and tune before they run, by a pass of some seconds on this machine."""
    if "text_tower" not in given:
        raise UsageError("no text tower: give --text-tower hf:NAME_OR_FOLDER")
    found = lamplit.plan(
        source, TuneSettings(**given), image_tower=image_tower, image_tower_weights=image_tower_weights, pool=pool,
        image_column=image_column, text_column=text_column, split=split, images=images, machines=machines,
        gpus=gpus, dollars_per_hour=dollars_per_hour, device=device,
        workers=default_workers() if workers is None else workers,
    )  # fmt: skip
    show(found, tables.plan, as_json)


def merge(
    model: Annotated[Path, typer.Argument(help="Folder of a model that was tuned with --lora.")],
    out: Annotated[Path, typer.Option(help="Folder of the ordinary model to write.")],
    as_json: AsJson = False,
) -> None:
    """Merge LoRA into the text tower: an ordinary model with the same vectors.

    In Python: lamplit.merge_lora.
    """
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
    """Write a model for another library, checked to give the same vectors there; or the vectors of a store.

    In Python: lamplit.export; of a store: lamplit.export_vectors.
    """
    if to == "clip-retrieval":
        show(lamplit.export_vectors(source, out, progress=True), tables.record, as_json)
    else:
        report = lamplit.export(source, out, to=to, int8=int8, sample=sample, device=device)  # type: ignore[arg-type]
        show(report, tables.export_report, as_json)


def push(
    source: Annotated[Path, typer.Argument(help="Folder of a model; or a store, whose images stay here.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; made if it is not there.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the files into instead, new or empty; nothing is sent.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of results that lamplit evaluate wrote; those of the model go into its card."),
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The hub's word for the license, such as apache-2.0.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only its owner sees.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a model or a store on the Hugging Face hub, with a card that is made from what is known of it.

    In Python: lamplit.push.
    """
    report = lamplit.push(source, repository, out=out, results=results, license=license_name, private=private)
    show(report, tables.push_report, as_json)


def _prepare_search(model: Path) -> None:
    from lamplit.exports.text_graph import write_words

    write_words(model)
