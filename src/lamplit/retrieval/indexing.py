"""An approximate index for stores with so many images that a scan of their sign bits is no longer quick.

A query among a million images of width 512 takes about 5 ms on two cores. Lance's IVF index looks only at the vectors
of some partitions, as many as the recall needs, and takes long to build. It holds the vectors as they are stored, so a
model with a centre or an image head does not use it.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lamplit.errors import UsageError
from lamplit.files import write_text
from lamplit.locations.paths import require_local
from lamplit.retrieval.collection import open_collection
from lamplit.retrieval.nearest import rank_many
from lamplit.retrieval.recall import TARGET_RECALL, sample_queries, worst_recall
from lamplit.store.arrays.derived import FOLDER
from lamplit.store.lance_store import Store, as_store

logger = logging.getLogger(__name__)
MIN_WORTHWHILE = 5_000_000  # images; with fewer, the scan of the bits is as quick and finds more
CANDIDATES = 200  # rows that the index gives; the best 100 of them are hits


@dataclass(frozen=True)
class IndexReport:
    """An index, and what it measured when it was built.

    Attributes:
        images: number of images in the store.
        partitions: number of partitions of the index.
        probes: number of partitions that a query looks at.
        recall: recall@10 against exact search, 0 to 1.
        milliseconds: median time of a query.
        seconds: time to build and measure.
    """

    images: int
    partitions: int
    probes: int
    recall: float
    milliseconds: float
    seconds: float


def build_index(store: Store | str | Path) -> IndexReport:
    """Build an IVF index into a store and measure how many partitions a query needs for a recall@10 of 0.99.

    On the command line: `lamplit index`.

    Args:
        store: an open store or its path.

    Returns:
        What was measured. The number of partitions is saved beside the store; every search reads it.

    Raises:
        UsageError: the store has fewer than 256 images, or is in object storage.
        StoreError: there is no store.

    Example:
        >>> lamplit.build_index("stamps.lance").recall
    """
    store = as_store(store)
    require_local(store.path, "a store with an index")
    if len(store) < 256:
        raise UsageError(f"{store.path} has {len(store)} images; an index needs at least 256")
    if len(store) < MIN_WORTHWHILE:
        logger.info("up to about %d images, search without an index is as quick and finds more", MIN_WORTHWHILE)
    began = time.perf_counter()
    partitions = max(2, round(len(store) ** 0.5))
    store.build_index(partitions)
    probes, recall, milliseconds = _measure(store, partitions)
    report = IndexReport(len(store), partitions, probes, recall, milliseconds, time.perf_counter() - began)
    file = _file(store)
    write_text(file, json.dumps(asdict(report)) + "\n")
    return report


def index_probes(store: Store) -> int | None:
    """Return how many partitions a query looks at; None if there is no index, or its report is gone."""
    try:
        return int(json.loads(_file(store).read_text(encoding="utf-8"))["probes"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _measure(store: Store, partitions: int) -> tuple[int, float, float]:
    # The same files that search will read.
    collection = open_collection(store, lambda zimg: zimg, store.tower.fingerprint)
    queries = sample_queries(collection.vectors)
    true = rank_many(collection.vectors, queries, 10)
    probes = 1
    while True:
        found, seconds = [], []
        for query in queries:
            began = time.perf_counter()
            near = np.zeros(len(store), bool)
            near[store.near(query, CANDIDATES, probes)] = True
            found.append(collection.rank(query, 10, near))
            seconds.append(time.perf_counter() - began)
        recall = worst_recall(found, true)
        if recall >= TARGET_RECALL or probes >= partitions:
            return probes, recall, 1000 * float(np.median(seconds))
        probes = min(2 * probes, partitions)


def _file(store: Store) -> Path:
    return Path(store.path) / FOLDER / "index.json"
