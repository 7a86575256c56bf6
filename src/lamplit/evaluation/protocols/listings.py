"""Annotation files, and the images that they name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from lamplit.data.json_text import parse_json
from lamplit.data.pairs import Pair, Pairs
from lamplit.data.valid_text import valid_id
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.tasks import ImageSet


def root_folder(root: str | Path, layout: str) -> Path:
    """Return the absolute folder of a data set.

    Raises:
        PairsError: there is none; `layout` says what it should hold.
    """
    folder = Path(root).expanduser().absolute()
    if not folder.is_dir():
        raise PairsError(f"{root} is no folder; expected one with {layout}")
    return folder


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        PairsError: it is not there, or is not JSON.
    """
    try:
        return parse_json(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise PairsError(f"{file.parent} has no {file.name}") from error
    except (OSError, ValueError) as error:
        raise PairsError(f"{file} cannot be read: {error}; get it again") from error


@contextmanager
def expecting(file: Path, layout: str) -> Iterator[None]:
    """Turn what goes wrong inside, where JSON is not what it should be, into an error that says so.

    Raises:
        PairsError: a key is missing, or a value is of another kind.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise PairsError(f"{file} is not laid out as expected, {layout}: {type(error).__name__}: {error}") from error


def list_of(value: Any, kind: type) -> list[Any]:
    """Return `value` if it is a list of `kind`.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TypeError(f"expected a list of {kind.__name__}, not {str(value)[:60]!r}")
    return value


def listed_images(key: str, root: Path, paths: Iterable[str]) -> ImageSet:
    """Make the images of a task from the paths that a data set lists, relative to its root: an id as a store has it.

    Raises:
        PairsError: there are none, some are missing, or a path leads out of the root.
    """
    names = list(paths)
    for path in names:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise PairsError(f"the list of {key} names the image {path}, which leads out of {root}")
    missing = [path for path in names if not (root / path).is_file()]
    if missing or not names:
        what = f"{len(missing):,} of the {len(names):,} images of {key} are" if names else f"every image of {key} is"
        first = f", first {missing[0]}" if missing else ""
        raise PairsError(f"{what} missing under {root}{first}; unpack the images there")
    pairs = Pairs(str(root), len(names), None, (), lambda: (Pair(path, root / path, (), {}) for path in names))
    return ImageSet(key, root, pairs, list(map(valid_id, names)))
