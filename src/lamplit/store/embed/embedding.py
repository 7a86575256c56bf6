"""Embed pairs once with a locked image tower: from images to a store, resumable anywhere."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import nn

from lamplit.data.decoding.images import MAX_PIXELS
from lamplit.data.pairs import Pairs
from lamplit.data.skipped import Skipped
from lamplit.data.sources import read_pairs
from lamplit.errors import TowerError, UsageError, kind_of
from lamplit.locations.addresses import is_remote
from lamplit.progress import progress_bar
from lamplit.store.embed.backends import BackendName
from lamplit.store.embed.cluster import ClusterJob, embed_on_cluster
from lamplit.store.embed.embedding_pass import Runner, embed_pairs
from lamplit.store.embed.store_writer import StoreWriter
from lamplit.store.embed.unit_embedding import HowToEmbed, UnitEmbedder, embed_shard, nothing_embedded
from lamplit.store.embed_report import EmbedReport, list_skipped
from lamplit.store.lance_store import Store
from lamplit.store.published_stores import require_writable
from lamplit.towers.borrowing import borrowed
from lamplit.towers.devices import pick_device
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.two_towers import TwoTowers


def embed(
    source: str | Path | Pairs,
    out: str | Path,
    *,
    image_tower: str | nn.Module | ImageTower,
    image_tower_weights: str | Path | None = None,
    pool: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    split: str | None = None,
    mean_center: bool = False,
    prune: bool = False,
    backend: BackendName = "auto",
    batch_size: int = 64,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str | torch.device | None = None,
    shard: tuple[int, int] | None = None,
    cluster: str | None = None,
    cluster_workers: int | None = None,
    unit_rows: int | None = None,
    progress: bool = False,
) -> EmbedReport:
    """Embed the images of `source` into the store `out`, each once.

    Run again, it embeds only what is new or changed; killed, it goes on from the last commit. An image that was
    moved, renamed or copied is known by its content, and gets the vector that is stored. Images that cannot be
    used are skipped and listed with their reasons in `OUT.skipped.jsonl`.

    Only `prune` deletes rows. It deletes a row if three things are true: the source does not name it, its id and path
    are those of a file in the source's folder (for a table: the folder that the table is in), and that file is gone.
    So rows of other sources, of archives and of the hub stay.

    Several processes embed one source if each is given a `shard`: the source is divided into units, of which each
    process takes its own. A unit that is in the store, or that any process has embedded before, is not read again, so a
    shard may be started again, or twice. What is embedded is committed every few minutes, whoever embedded it. The last
    process finishes the store. A unit is known by the names of its files, the sizes of its tars and tables, and the
    tower: images that changed under their names are seen by a run without `shard`, as are files that are gone. With
    `cluster`, processes of a Ray cluster take all units, and one that is lost is replaced.

    On the command line: `lamplit embed`.

    Args:
        source: anything `read_pairs` reads, or the pairs themselves.
        out: the store to make or to add to: a path, or an address such as `s3://bucket/pairs.lance`.
        image_tower: what `open_image_tower` opens, or an open tower. A tower of yours is moved to `device` and locked
            while this runs, and is given back as it was.
        image_tower_weights: weights file for the tower, or `"random"`.
        pool: `cls`, `mean`, `map` or `cls+mean`, for a tower to be opened; by default its library's own pooling.
        image_column: column with the images; by default found by its name.
        text_column: column (or columns, with commas between) with the texts; by default found by its name.
        split: which split of the source to read, or `all`; by default `train`, if it has several.
        mean_center: for a new store, subtract the mean of its vectors from every vector that is read from it.
        prune: delete the rows of images that are gone, at the end of a run that read the source to its end.
        backend: what runs the tower: `torch`, `compile`, `onnx` (on the CPU), or `auto`, which measures. On Linux,
            torch on the CPU makes this process keep freed memory for itself (malloc's trim threshold).
        batch_size: images that are decoded and embedded together; torch on a CPU takes 16 of them at a time.
        workers: processes that decode ahead of the tower; with any, a script needs `if __name__ == "__main__":`.
        max_pixels: larger images are skipped without decoding them.
        device: torch device; by default the accelerator, if there is one.
        shard: I and N, with I from 0 to N - 1: embed the units I, I + N, I + 2N and so on of the source, no others.
        cluster: `ray` for the Ray cluster that the variable `RAY_ADDRESS` names, or without it one that is started on
            this machine; or `ray://HOST:PORT`. All machines see the source and the store under the same names.
        cluster_workers: processes of the cluster that embed; by default one for each GPU, or one a machine if there is
            none.
        unit_rows: how many rows of the source are one unit, about; by default a 64th of all, from 1,024 to 250,000.
            Processes that share a source must agree on it.
        progress: show a bar on stderr.

    Returns:
        Counts of what was embedded, reused and skipped.

    Raises:
        PairsError: the source cannot be read.
        TowerError: the tower cannot be opened, or the backend cannot run it.
        StoreError: the store belongs to another tower, or no image could be embedded.
        UsageError: `out` is something else than a store, there is no such pooling, shard or cluster, the tower is open
            already, the backend does not run on the device, or the source cannot be divided.
        MissingExtraError: Ray is not installed, or what reaches object storage is not.

    Example:
        >>> report = lamplit.embed("photos/", "photos.lance", image_tower="timm:vit_base_patch16_224")
        >>> report.embedded, len(report.skipped)
        (1200, 3)
    """
    started = time.monotonic()
    if backend not in get_args(BackendName):
        raise UsageError(f"backend is {backend!r}; expected one of {', '.join(get_args(BackendName))}")
    if isinstance(image_tower, TwoTowers):
        raise UsageError(
            f"image_tower is {kind_of(image_tower)}, a whole model; save it, and give image_tower='model:FOLDER'"
        )
    out = os.path.expanduser(out)
    require_writable(out)  # before a tower is opened
    _require_units(shard, cluster, unit_rows, prune=prune)
    if cluster is not None:
        if not (isinstance(source, str | Path) and isinstance(image_tower, str)):
            raise UsageError(
                "the machines of a cluster open the source and the tower themselves; give the names of both"
            )
        if image_tower_weights == "random":
            raise UsageError(
                "random weights are others in each process of a cluster; save some in a file, and give that"
            )
        report = EmbedReport(str(out), image_tower)
        job = ClusterJob(
            os.getcwd(), str(source), str(out), image_tower, _text(image_tower_weights), pool, image_column,
            text_column, split, mean_center, backend, batch_size, workers, max_pixels, _text(device), unit_rows,
        )  # fmt: skip
        embed_on_cluster(job, cluster, cluster_workers, report, progress=progress)
        report.seconds = time.monotonic() - started
        return report
    pairs = source
    if not isinstance(pairs, Pairs):
        pairs = read_pairs(pairs, image_column=image_column, text_column=text_column, split=split)
    if prune and is_remote(pairs.root):
        raise UsageError(
            f"prune looks for files that are gone from this machine; {pairs.source} is in object storage: leave it out"
        )
    chosen_device = _device_for(backend, device)
    with borrowed(image_tower) if isinstance(image_tower, nn.Module) else nullcontext():
        tower = _as_image_tower(image_tower, image_tower_weights, pool)
        report = EmbedReport(str(out), tower.spec)
        how = HowToEmbed(mean_center, backend, chosen_device, batch_size, workers, max_pixels)
        if shard is None:
            _embed_all(pairs, tower, out, how, report, prune=prune, progress=progress)
        else:
            embed_shard(UnitEmbedder(pairs, tower, out, how, unit_rows), shard, report, progress=progress)
    if 0 < report.without_text == report.num_usable and pairs.text_columns:
        report.notes.append(f"no image has a text: every cell of {' and '.join(pairs.text_columns)} is empty")
    report.seconds = time.monotonic() - started
    return report


def _embed_all(
    pairs: Pairs,
    tower: ImageTower,
    out: str | Path,
    how: HowToEmbed,
    report: EmbedReport,
    *,
    prune: bool,
    progress: bool,
) -> None:
    """Embed all pairs in this process."""
    writer = StoreWriter(out, tower.identity(), centered=how.centered)
    runner = Runner(tower, how.backend, how.device, pairs.count, how.batch_size)
    with progress_bar("embed", pairs.count, shown=progress) as shown:

        def advance(done: int) -> None:
            shown(done, f"{len(report.skipped)} skipped" if report.skipped else "")

        embed_pairs(pairs, runner, writer, report, workers=how.workers, max_pixels=how.max_pixels, advance=advance)
    report.skipped += pairs.problems
    # Where a part of the source could not be read, what it names is not known to be gone.
    report.missing, report.pruned = writer.finish(
        pairs.root, prune=prune and report.num_usable > 0 and not pairs.problems
    )
    report.updated, report.without_text = writer.updated, writer.without_text
    report.not_kept, report.notes = dict(writer.not_kept), [*pairs.notes, *writer.notes]
    report.skipped_file = list_skipped(out, report.skipped)
    if writer.store is None or len(writer.store) == 0:
        raise nothing_embedded(pairs.source, report.skipped, report.skipped_file)


class OpenSource(NamedTuple):
    """A store, and what to know about the pairs that it was made from for the occasion, if it was."""

    store: Store
    skipped: list[Skipped]
    notes: list[str]


@contextmanager
def open_source(
    source: str | Path | Store,
    tower: nn.Module | None,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Iterator[OpenSource]:
    """Open a store; or embed anything `read_pairs` reads, with a model's own image tower, into a temporary one.

    Raises:
        TowerError: the source is not a store, and the model is open without its image tower.
    """
    if isinstance(source, Store) or Store.exists(source):
        yield OpenSource(source if isinstance(source, Store) else Store(source), [], [])
        return
    if not isinstance(tower, ImageTower):
        raise TowerError(f"{source} is not a store, and the model is open without its image tower to embed it")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "images.lance"
        report = embed(source, out, image_tower=tower, device=device, progress=progress)
        store = Store(out)
        store.called = str(source)
        yield OpenSource(store, report.skipped, report.notes)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _require_units(shard: tuple[int, int] | None, cluster: str | None, unit_rows: int | None, *, prune: bool) -> None:
    """Raise if the arguments that divide a source do not go together."""
    if shard is None and cluster is None:
        if unit_rows is not None:
            raise UsageError("unit_rows is the size of the units that shards take; give a shard or a cluster, too")
        return
    if shard is not None and cluster is not None:
        raise UsageError("a cluster takes all units; leave the shard out")
    if cluster is not None and cluster != "ray" and not cluster.startswith("ray://"):
        raise UsageError(f"the cluster is {cluster!r}; expected ray or ray://HOST:PORT")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        index, count = shard
        raise UsageError(f"there is no shard {index} of {count}; of {count} shards they are 0 to {count - 1}")
    if unit_rows is not None and unit_rows < 1:
        raise UsageError(f"a unit of {unit_rows} rows is none; give 1 or more")
    if prune:
        raise UsageError(
            "a process that embeds some units does not see all files, so it cannot tell which rows are to be pruned; "
            "when all is done, embed once more with prune in one process: what is stored is not embedded again"
        )


def _device_for(backend: BackendName, device: str | torch.device | None) -> torch.device:
    chosen = pick_device("cpu" if backend == "onnx" and device is None else device)
    if backend == "onnx" and chosen.type != "cpu":
        raise UsageError(
            f"backend onnx runs on the CPU, not on {chosen}; leave the device out, or choose backend torch"
        )
    return chosen


def _as_image_tower(tower: str | nn.Module, weights: str | Path | None, pool: str | None) -> ImageTower:
    if not isinstance(tower, ImageTower):
        return open_image_tower(tower, weights=weights, pool=pool)
    if weights is not None:
        raise UsageError("an open tower has its weights; give weights= to open_image_tower")
    if pool is not None:
        raise UsageError("an open tower pools as it was opened; give pool= to open_image_tower")
    return tower
