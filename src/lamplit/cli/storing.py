"""The commands about stores: `data get`, `embed`, `import`, `embed-texts`, `index`, `map`, `duplicates` and `info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import lamplit
from lamplit.cli import tables
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
    print_note,
    show,
)
from lamplit.errors import UsageError


def data_get(
    name: Annotated[str, typer.Argument(help="stamps, openclipart, emoji, icons or fashion-mnist.")],
    folder: Annotated[
        Path | None, typer.Option(help="Folder to keep data sets in; by default the user's cache.")
    ] = None,
    sets: Annotated[
        str | None, typer.Option(help="For icons: names of Iconify's sets, such as noto,mdi, instead of many sets.")
    ] = None,
    colour: Annotated[
        bool | None,
        typer.Option("--colour/--no-colour", help="For icons: the sets in colour (the default), or those in black."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="For icons: number of processes that draw; by default half of the cores, at most 8."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a data set and print the path of its pairs file.

    In Python: lamplit.fetch.
    """
    pairs = lamplit.fetch(
        name, folder, sets=sets, colour=colour, workers=default_workers() if workers is None else workers, progress=True
    )
    print_line(json.dumps({"pairs": str(pairs)}) if as_json else pairs)


def embed(
    source: Annotated[str, typer.Argument(help="CSV, TSV, JSON, Parquet, Arrow, folder, webdataset tars or hub id.")],
    image_tower: Annotated[
        str,
        typer.Option(
            help="timm:NAME, hf:NAME_OR_FOLDER, open_clip:NAME/PRETRAINED, lit:NAME, dinotxt:FOLDER or "
            "demo:efficientnet-lite0."
        ),
    ],
    out: Annotated[str, typer.Option(help="The store to make or to add to, such as pairs.lance.")],
    image_tower_weights: TowerWeights = None,
    pool: Pool = None,
    image_column: ImageColumn = None,
    text_column: TextColumns = None,
    split: SplitName = None,
    mean_center: Annotated[
        bool, typer.Option("--mean-center", help="Subtract the mean vector of the store from every vector.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Delete rows that the source does not name and whose files are gone from its folder."
        ),
    ] = False,
    backend: Annotated[
        str, typer.Option(help="What runs the image tower: torch, compile, onnx (CPU), or auto, which measures.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images that are embedded together.")] = 64,
    workers: Workers = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Largest number of pixels of an image; larger ones are skipped.")
    ] = None,
    device: Device = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Embed one of N shards of the source, I from 0 to N - 1; for arrays of jobs on one store.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ray[://HOST:PORT]",
            help="Embed on a Ray cluster: 'ray' for that in RAY_ADDRESS, or without it this machine alone.",
        ),
    ] = None,
    cluster_workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of the cluster that embed; by default one for each GPU.")
    ] = None,
    unit_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows of the source in a unit, of which shards and clusters embed one at a time; by default a 64th of "
            "all, at most 250,000.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Embed images once with a locked image tower; run again for what is new, changed or moved."""
    limits: dict[str, Any] = {} if max_pixels is None else {"max_pixels": max_pixels}
    if backend not in ("auto", "torch", "compile", "onnx"):
        raise UsageError(f"there is no backend {backend!r}; expected auto, torch, compile or onnx")
    report = lamplit.embed(
        source, out, image_tower=image_tower, image_tower_weights=image_tower_weights, pool=pool,
        image_column=image_column, text_column=text_column, split=split, mean_center=mean_center, prune=prune,
        backend=backend, batch_size=batch_size,  # type: ignore[arg-type]
        shard=None if shard is None else _parse_shard(shard), cluster=cluster,
        cluster_workers=cluster_workers, unit_rows=unit_rows,
        workers=default_workers() if workers is None else workers, device=device, progress=True, **limits,
    )  # fmt: skip
    if report.units_left:
        print_note(
            f"{report.units_left:,} of {report.units:,} units are not in the store yet; the last process finishes it"
        )
    else:
        _prepare_store(out)
    if 0 < report.without_text < report.num_usable:
        print_note(f"{report.without_text:,} of {report.num_usable:,} images have no text")
    _print_notes(report)
    show(report, tables.record, as_json)


def import_(
    source: Annotated[
        str, typer.Argument(help="clip-retrieval's folder, a .npy, or Parquet or a Lance table with a vector column.")
    ],
    image_tower: Annotated[str, typer.Option(help="Name of the image tower that made the vectors; it is not opened.")],
    out: Annotated[str, typer.Option(help="The store to make, such as pairs.lance.")],
    pairs: Annotated[
        str | None, typer.Option(help="File with the texts and images of a .npy, in the order of its vectors.")
    ] = None,
    vector_column: Annotated[
        str | None, typer.Option(help="Column with the vectors; by default found by its name.")
    ] = None,
    image_column: ImageColumn = None,
    text_column: TextColumns = None,
    as_json: AsJson = False,
) -> None:
    """Make a store of vectors that other software made; no image is opened.

    In Python: lamplit.import_vectors.
    """
    report = lamplit.import_vectors(
        source, out, image_tower=image_tower, pairs=pairs, vector_column=vector_column, image_column=image_column,
        text_column=text_column, progress=True,
    )  # fmt: skip
    _prepare_store(out)
    _print_notes(report)
    show(report, tables.record, as_json)


def embed_texts(
    model: Annotated[str, typer.Argument(help="Folder of a model, or a name such as hf:NAME_OR_FOLDER.")],
    source: Annotated[str, typer.Argument(help="Table of texts with their translations; images are not opened.")],
    out: Annotated[str, typer.Option(help="The store to make or to add to, such as taught.lance.")],
    text_column: Annotated[
        str | None,
        typer.Option(help="Column with the texts that the model reads, or several; the others stay for tune to read."),
    ] = None,
    split: SplitName = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Embed texts once with a model's own text tower, to teach another one their translations without images."""
    report = lamplit.embed_texts(
        model, source, out, text_column=text_column, split=split, device=device, progress=True
    )  # fmt: skip
    _prepare_store(out)
    _print_notes(report)
    show(report, tables.record, as_json)


def index(
    store: Annotated[str, typer.Argument(help="Store that lamplit embed made.")],
    as_json: AsJson = False,
) -> None:
    """Build an approximate index (IVF) for a store of many millions of images; print its recall.

    In Python: lamplit.build_index.
    """
    from lamplit.retrieval.indexing import build_index

    show(build_index(lamplit.Store(store)), tables.record, as_json)


def map_(
    store: Annotated[str, typer.Argument(help="Store that lamplit embed or import made.")],
    as_json: AsJson = False,
) -> None:
    """Lay out all images of a store so that likely neighbours lie together, for the map of `lamplit app`.

    It takes about a minute for 36,000 images on two cores, and is kept with the store until its images change. Needs
    the extra `map`. In Python: lamplit.make_map.
    """
    from lamplit.retrieval.projection import make_map

    show(make_map(store, progress=True), tables.record, as_json)


def duplicates(
    store: Annotated[str, typer.Argument(help="Store that lamplit embed or import made.")],
    threshold: Annotated[
        float | None, typer.Option(help="Lowest cosine of two images that count as alike; by default 0.95.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG file for a contact sheet of the biggest groups.")] = None,
    as_json: AsJson = False,
) -> None:
    """List groups of images that are the same or nearly the same; nothing is deleted.

    In Python: lamplit.find_duplicates.
    """
    options: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
    if sheet is not None:
        from lamplit.retrieval.picture_files import picture_format

        picture_format(sheet)  # before anything is compared
    groups = lamplit.find_duplicates(store, progress=True, **options)
    if sheet is not None:
        from lamplit.retrieval.contact_sheet import duplicates_sheet

        duplicates_sheet(groups, sheet)
    show(groups, tables.duplicates, as_json)


def info(
    path: Annotated[str, typer.Argument(help="Folder of a model, a name such as hf:NAME_OR_FOLDER, or a store.")],
    as_json: AsJson = False,
) -> None:
    """Describe a model or a store.

    In Python: lamplit.describe.
    """
    from lamplit.inspection import describe

    show(describe(path), tables.description, as_json)


def _print_notes(report: lamplit.EmbedReport | lamplit.ImportReport | lamplit.TextsReport) -> None:
    for note in report.notes:
        print_note(note)
    for column, count in report.not_kept.items():
        print_note(f"{count:,} values of the column {column} could not be kept")


def _parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UsageError(f"the shard {text!r} is not I/N, such as 0/16 for the first one of 16")
    return int(index), int(count)


def _prepare_store(store: str) -> None:
    from lamplit.retrieval.collection import prepare

    prepare(lamplit.Store(store), progress=True)
