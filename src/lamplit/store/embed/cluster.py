"""Units of a source that the machines of a Ray cluster embed: Ray carries the work, the store's commits carry the rows.

Neither Ray Data nor a writer of Lance for Ray is used: what is to be kept goes from a worker to the store's disk.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lamplit.data.sources import read_pairs
from lamplit.errors import LamplitError, PairsError, StoreError, UsageError, first_line, require
from lamplit.progress import progress_bar
from lamplit.store.embed import unit_embedding
from lamplit.store.embed.backends import BackendName
from lamplit.store.embed.unit_embedding import HowToEmbed, UnitEmbedder, by_kind, kind_of_reason
from lamplit.store.embed_report import EmbedReport
from lamplit.towers.devices import pick_device
from lamplit.towers.images.image_tower import open_image_tower

_ATTEMPTS = 3  # at one unit
_POLL = 1.0  # seconds between looks at what is done
_OBJECT_STORE = 80 * 2**20  # bytes; through Ray go numbers and reasons alone


@dataclass(frozen=True)
class ClusterJob:
    """What every process opens for itself; the names are those of `embed`."""

    folder: str  # that relative paths begin at
    source: str
    out: str
    image_tower: str
    image_tower_weights: str | None
    pool: str | None
    image_column: str | None
    text_column: str | None
    split: str | None
    mean_center: bool
    backend: BackendName
    batch_size: int
    workers: int
    max_pixels: int
    device: str | None
    unit_rows: int | None

    def open(self) -> UnitEmbedder:
        """Open the source, the tower and the store in this process.

        Raises:
            PairsError: the source cannot be read.
            TowerError: the tower cannot be opened.
            StoreError: the store belongs to another tower.
        """
        pairs = read_pairs(self.source, image_column=self.image_column, text_column=self.text_column, split=self.split)
        tower = open_image_tower(self.image_tower, weights=self.image_tower_weights, pool=self.pool)
        device = pick_device("cpu" if self.backend == "onnx" else self.device)
        how = HowToEmbed(self.mean_center, self.backend, device, self.batch_size, self.workers, self.max_pixels)
        return UnitEmbedder(pairs, tower, self.out, how, self.unit_rows)


class UnitWorker:
    """Embeds units in a process of the cluster; it opens what it needs with the first one."""

    def __init__(self, job: ClusterJob, threads: int) -> None:
        self._job, self._threads = job, threads
        self._embedder: UnitEmbedder | None = None

    def embed(self, name: str) -> EmbedReport | None:
        """Embed the unit of a name; None if another process was first.

        Raises:
            PairsError: this machine does not see the source as the driver does.
        """
        if self._embedder is None:
            try:
                os.chdir(self._job.folder)
            except OSError as error:
                raise PairsError(
                    f"a machine of the cluster does not have the folder {self._job.folder}; all machines must see the "
                    "source and the store under the same names"
                ) from error
            torch.set_num_threads(self._threads)
            self._embedder = self._job.open()
        unit = next((unit for unit in self._embedder.units if unit.name == name), None)
        if unit is None:
            raise PairsError(
                f"a machine of the cluster sees {self._job.source} otherwise than the first one: it was changed "
                "meanwhile, or is another one there; type the same command again"
            )
        return self._embedder.embed(unit, lambda _: None)


def embed_on_cluster(
    job: ClusterJob, cluster: str, num_workers: int | None, report: EmbedReport, *, progress: bool
) -> None:
    """Embed all units that nobody has embedded yet, on a Ray cluster; commit them every few minutes.

    Args:
        job: what to embed.
        cluster: `ray`, or `ray://HOST:PORT`.
        num_workers: processes that embed; by default one for each GPU, or one a machine if there is none.
        report: what the units' own reports are added to.
        progress: show a bar on stderr.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: the cluster cannot be reached.
        StoreError: a unit failed three times, or the store cannot be written.
        LamplitError: what a worker raised.
    """
    ray = _import_ray(cluster)
    embedder = replace(job, device="cpu").open()  # it embeds nothing
    embedder.commit()
    left = [unit.name for unit in embedder.left()]
    if left:
        with _connected(ray, cluster), progress_bar("embed", None, shown=progress) as shown:
            committed_at, done, kinds = time.monotonic(), len(embedder.units) - len(left), Counter[str]()
            for found in _Crew(ray, job, num_workers, len(left)).embed(left):
                if found is not None:
                    done += 1
                    report.add(found)
                    kinds.update(map(kind_of_reason, found.skipped))
                    note = f"{done} of {len(embedder.units)} units{by_kind(kinds)}"
                    shown(found.num_usable + len(found.skipped), note)
                if time.monotonic() - committed_at >= unit_embedding.COMMIT_SECONDS:
                    embedder.commit()
                    committed_at = time.monotonic()
    embedder.finish(report)


class _Crew:
    """Workers of a cluster, each of which embeds a unit at a time; one that is lost is replaced."""

    def __init__(self, ray: Any, job: ClusterJob, count: int | None, most: int) -> None:
        self._ray = ray
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if job.device != "cpu" and job.backend != "onnx" else 0
        machines = sum(node["Alive"] for node in ray.nodes())
        self._count = min(count or gpus or machines, most)
        threads = max(1, int(resources.get("CPU", 1)) // self._count)
        options = {"num_gpus": 1} if gpus else {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        kind = ray.remote(UnitWorker).options(**options)
        self._start: Callable[[], Any] = lambda: kind.remote(job, threads)

    def embed(self, names: Sequence[str]) -> Iterator[EmbedReport | None]:
        """Embed units; yield what was done with each when it is done, and None when nothing has been for a while."""
        waiting, attempts = deque(names), Counter[str]()
        idle = [self._start() for _ in range(self._count)]
        busy: dict[Any, tuple[Any, str]] = {}
        while waiting or busy:
            while waiting and idle:
                worker, name = idle.pop(), waiting.popleft()
                busy[worker.embed.remote(name)] = worker, name
            done, _ = self._ray.wait(list(busy), timeout=_POLL)
            for task in done:
                worker, name = busy.pop(task)
                try:
                    yield self._ray.get(task) or _NOTHING
                except self._ray.exceptions.RayError as error:
                    _require_retry(error, name, attempts)
                    waiting.append(name)
                    worker = worker if isinstance(error, self._ray.exceptions.RayTaskError) else self._start()
                idle.append(worker)
            if not done:
                yield None


_NOTHING = EmbedReport("", "")  # of a unit that another process had embedded


def _require_retry(error: Exception, name: str, attempts: Counter[str]) -> None:
    """Raise what says that the unit of a name need not be tried again: lamplit's own errors, or a third failure."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, LamplitError):
        raise cause from None
    attempts[name] += 1
    if attempts[name] == _ATTEMPTS:
        raise StoreError(
            f"unit {name} failed {_ATTEMPTS} times ({first_line(cause or error)}); what was embedded before is kept"
        ) from error


def _import_ray(cluster: str) -> Any:
    """Import Ray, which reads its variables then.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it would tell its makers
    if _is_local(cluster):  # so that its processes listen on the loopback alone, on any system
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return require("ray", "ray")


def _is_local(cluster: str) -> bool:
    return cluster == "ray" and "RAY_ADDRESS" not in os.environ


@contextmanager
def _connected(ray: Any, cluster: str) -> Iterator[None]:
    """Connect to a cluster; start one on this machine alone if none is named, and end it afterwards.

    Raises:
        UsageError: the cluster cannot be reached.
    """
    options: dict[str, Any] = {"address": cluster} if cluster != "ray" else {}
    if _is_local(cluster):
        options = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lance warns of every fork, and Ray's are followed by another program
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"the cluster {cluster} cannot be reached: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()
