"""Files that are derived from a store: where they lie, how they are made, and what they say of search.

They lie in the folder `_search` of the store, which Lance leaves alone, or in the user's cache if the store cannot be
written to. The name of a folder begins with the digest of the rows that it was made from, those of the store or of a
part of it: what was made from rows that have changed is made again. They may be deleted at any time. A small store has
none but its map: its arrays are made in memory.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lamplit.files import cache_folder, replacing
from lamplit.locations.addresses import is_remote
from lamplit.store.lance_store import Store
from lamplit.store.store_parts import Part
from lamplit.unit_vectors import as_array

logger = logging.getLogger(__name__)
SMALL = 50_000  # images; up to here the product of all rows takes 10 ms on one core, and no file is derived
FOLDER = "_search"
RECALL = "recall"
Arrays = dict[str, NDArray[Any]]  # by name


def search_folders(store: Store) -> list[Path]:
    """Return the folders that the files of search may lie in, the first choice first.

    The first is inside the store, where Lance leaves it alone; the second is in the user's cache, for a store that
    cannot be written to.
    """
    path = Path(store.path)
    place = store.path if is_remote(path) else str(path.resolve())
    spare = cache_folder() / "search" / blake2b(place.encode(), digest_size=8).hexdigest()
    return [path / FOLDER, spare] if path.is_dir() and not is_remote(path) else [spare]


def search_name(rows: Store | Part, kind: str) -> str:
    """Name files by the rows that they are derived from, as they are now, and by what they are."""
    return f"{rows.version_digest if isinstance(rows, Store) else rows.digest}-{kind}"


def centers(store: Store) -> tuple[NDArray[np.float32], ...]:
    """Return the (D,) mean of a mean-centred store, or nothing: what `TowerIdentity.space` takes."""
    return () if store.center is None else (as_array(store.center),)


def is_exact(store: Store) -> bool:
    """Tell whether every search of the store is exact: it is so small that it has no bit planes."""
    return is_small(len(store))


def is_small(size: int) -> bool:
    """Tell whether so many rows are compared one by one, and nothing is kept of them."""
    return size <= SMALL


def measured_recall(store: Store) -> float | None:
    """Return the recall@10 of a search by a model without an image head; None if it was not measured yet.

    It is measured on a sample: 1 does not mean that search is exact, see `is_exact`.
    """
    space = store.tower.space(centers(store))
    parts = [part for part in store.parts if not is_small(len(part))]
    found = [find_derived(store, space, (RECALL,), part) for part in parts]
    return min((float(each[RECALL][0]) for each in found if each is not None), default=1.0) if all(found) else None


class Draft:
    """Named arrays while they are made: files of a folder, or memory.

    Args:
        folder: an empty folder; None for memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._arrays: dict[str, NDArray[Any]] = {}
        self._parts: dict[str, list[NDArray[Any]]] = {}  # of arrays that grow in memory
        self._files: dict[str, tuple[BinaryIO, np.dtype[Any], int]] = {}  # with the place where the values begin

    def create(self, name: str, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        """Return an array to fill."""
        if self.folder is None:
            made = np.empty(shape, kind)
        else:
            made = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape)
        self._arrays[name] = made
        return made

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Lengthen a one-dimensional array, whose length need not be known."""
        if self.folder is None:
            self._parts.setdefault(name, []).append(values)
            return
        if name not in self._files:
            opened = (self.folder / f"{name}.npy").open("wb")
            _write_header(opened, values.dtype, 0)
            self._files[name] = opened, values.dtype, opened.tell()
        values.tofile(self._files[name][0])

    def drop(self, name: str) -> None:
        """Remove an array that was needed for others alone."""
        del self._arrays[name]
        if self.folder is not None:
            (self.folder / f"{name}.npy").unlink()

    def finish(self) -> Arrays:
        """Return all arrays, and close their files."""
        for name, (file, kind, begin) in self._files.items():
            with file:
                length = (file.tell() - begin) // kind.itemsize
                file.seek(0)
                _write_header(file, kind, length)
            self._arrays[name] = open_array(Path(file.name))
        self._arrays |= {name: np.concatenate(parts) for name, parts in self._parts.items()}
        return self._arrays


def find_derived(
    store: Store,
    kind: str,
    names: Sequence[str],
    part: Part | None = None,
    *,
    is_whole: Callable[[Arrays], bool] = bool,
) -> Arrays | None:
    """Open arrays that were derived from a store, or a part of it, as it is now; None if they were not made.

    Arrays that are not `is_whole` count as not made.
    """
    for folder in search_folders(store):
        found = _read_arrays(folder / search_name(store if part is None else part, kind), names)
        if found is not None and is_whole(found):
            return found
    return None


def derive(
    store: Store,
    kind: str,
    names: Sequence[str],
    make: Callable[[Draft], None],
    *,
    part: Part | None = None,
    instead_of: str | None = None,
    keeps: bool = False,
    is_whole: Callable[[Arrays], bool] = bool,
) -> Arrays:
    """Open arrays that are derived from a store; make them first if they are not there.

    Args:
        store: what they are derived from.
        kind: what they are, as part of a file name.
        names: of the arrays.
        make: makes them.
        part: the part of the store that they are derived from; None for all of it.
        instead_of: how the kinds of arrays begin that are not needed any more once these are made.
        keeps: write files for few rows, too: they take long to make.
        is_whole: tells whether arrays that are there may be taken; others are made anew.

    Returns:
        The arrays by name: memory-mapped, or in memory if there are few rows or no file can be written.
    """
    rows = store if part is None else part
    if keeps or not is_small(len(rows)) or is_remote(store.path):  # from there, they took a while
        if (found := find_derived(store, kind, names, part, is_whole=is_whole)) is not None:
            return found
        for folder in search_folders(store):
            target = folder / search_name(rows, kind)
            try:
                with replacing(target) as partial:
                    partial.mkdir()
                    draft = Draft(partial)
                    make(draft)
                    draft.finish()
            except OSError as error:  # no permission, or a full disk
                logger.warning("no files of %s in %s: %s", kind, folder, error)
                continue
            remove_stale_files(folder, store)
            if instead_of is not None:
                _remove_others(folder, target.name, search_name(rows, instead_of))
            if (found := _read_arrays(target, names)) is not None:
                return found
    draft = Draft(None)
    make(draft)
    return draft.finish()


def remove_stale_files(folder: Path, store: Store) -> None:
    """Delete what was derived from rows that a store has no more. Open memory maps stay valid (POSIX).

    Nothing is deleted if the store has changed since it was opened: others may have derived what it needs now.
    """
    if Store(store.path).version_digest != store.version_digest:
        return
    current = (".", store.version_digest, *(part.digest for part in store.parts))
    for other in folder.iterdir():
        if other.is_dir() and not other.name.startswith(current):
            shutil.rmtree(other, ignore_errors=True)


def open_array(file: Path) -> NDArray[Any]:
    """Map a `.npy` file into memory.

    Raises:
        ValueError: it is damaged.
        OSError: it is not there.
    """
    # Mode "c": torch wants arrays that it could write to, and nothing ever writes.
    mapped: NDArray[Any] = np.load(file, mmap_mode="c", allow_pickle=False)
    return mapped


def _read_arrays(folder: Path, names: Sequence[str]) -> Arrays | None:
    try:
        return {name: open_array(folder / f"{name}.npy") for name in names}
    except (OSError, ValueError, EOFError):  # not made yet, or damaged
        return None


def _remove_others(folder: Path, name: str, beginning: str) -> None:
    for other in folder.iterdir():
        if other.is_dir() and other.name.startswith(beginning) and other.name != name:
            shutil.rmtree(other, ignore_errors=True)


def _write_header(file: BinaryIO, kind: np.dtype[Any], length: int) -> None:
    """Write the header of a one-dimensional `.npy` file; numpy leaves room in it for any length."""
    described = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, described)
