"""Where the files that are derived from a store lie, and what they say of search. They may be deleted at any time."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamplit.files import cache_folder
from lamplit.store.lance_store import Store
from lamplit.unit_vectors import as_array

SMALL = 50_000  # images; up to here the product of all rows takes 10 ms on one core, and no file is derived
FOLDER = "_search"
DESCRIPTION = "search.json"


def search_folders(store: Store) -> list[Path]:
    """Return the folders that the files of search may lie in, the first choice first.

    The first is inside the store, where Lance leaves it alone; the second is in the user's cache, for a store that
    cannot be written to.
    """
    path = Path(store.path)
    spare = cache_folder() / "search" / blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
    return [path / FOLDER, spare] if path.is_dir() else [spare]


def search_name(store: Store, space: str) -> str:
    """Name the files of search: by the store's rows as they are now, and by the joint space of a model."""
    return f"{store.version_digest}-{space}"


def centers(store: Store) -> tuple[NDArray[np.float32], ...]:
    """Return the (D,) mean of a mean-centred store, or nothing: what `TowerIdentity.space` takes."""
    return () if store.center is None else (as_array(store.center),)


def is_exact(store: Store) -> bool:
    """Tell whether every search of the store is exact: it is so small that it has no bit planes."""
    return len(store) <= SMALL


def measured_recall(store: Store) -> float | None:
    """Return the recall@10 of a search by a model without an image head; None if it was not measured yet.

    It is measured on a sample: 1 does not mean that search is exact, see `is_exact`.
    """
    name = search_name(store, store.tower.space(centers(store)))
    for folder in search_folders(store):
        try:
            return float(json.loads((folder / name / DESCRIPTION).read_text(encoding="utf-8"))["recall"])
        except (OSError, ValueError, LookupError, TypeError):  # not made yet, or damaged: a search makes it again
            continue
    return None
