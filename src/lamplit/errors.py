"""The errors that lamplit raises on purpose.

LamplitError
├── UsageError          an argument, column or file name that cannot be what was meant
├── PairsError          pairs that cannot be read
├── ImageError          one image that cannot be used (skipped and listed, never fatal to a run)
├── TowerError          a tower that cannot be opened, or weights that do not fit it
├── StoreError          a store that cannot be read, or belongs to another tower
├── TuneError           a tuning run that cannot go on
└── MissingExtraError   an optional part that is not installed
"""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any


def first_line(error: Exception) -> str:
    """Return the first line of an error of another library; the rest is mostly advice for its own users."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def kind_of(value: object) -> str:
    """Name the type of a value with its article: a str, an int; None is None.

    Example:
        >>> kind_of(3)
        'an int'
    """
    if value is None:
        return "None"
    name = type(value).__name__
    has_vowel = name[0] in "aeiouAEIOU" or name == "ndarray"
    return f"{'an' if has_vowel else 'a'} {name}"


def nearest_names(wanted: str, names: Iterable[str], most: int = 10) -> str:
    """Name the first few of many, those that look like `wanted` before all others.

    Example:
        >>> nearest_names("label", ["id", "path", "labels"], most=2)
        'labels, id and 1 more'
    """
    names = list(names)
    near = get_close_matches(wanted, names)
    ordered = [*near, *(name for name in names if name not in near)]
    more = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


class LamplitError(Exception):
    """Base of every error lamplit raises on purpose; its text says what happened and what to do."""


class UsageError(LamplitError):
    """An argument, column or file name cannot be what was meant."""


class PairsError(LamplitError):
    """Pairs cannot be read."""


class ImageError(LamplitError):
    """One image cannot be used. Its text is the reason listed in `skipped.jsonl`."""


class TowerError(LamplitError):
    """A tower cannot be opened, or its weights do not fit."""


class StoreError(LamplitError):
    """A store cannot be read, or was made by another tower."""


class TuneError(LamplitError):
    """A tuning run cannot go on."""


class MissingExtraError(LamplitError):
    """An optional part is not installed."""

    def __init__(self, package: str, extra: str | None = None, *, problem: str = "is not installed") -> None:
        wanted = package if extra is None else f"'lamplit[{extra}]'"
        super().__init__(f"{package} {problem}; type: pip install {wanted}")


def require(module: str, extra: str) -> Any:
    """Import an optional module, or raise an error that says which extra brings it.

    Args:
        module: the name to import, such as `matplotlib.figure`.
        extra: the extra of lamplit that installs it.

    Raises:
        MissingExtraError: the module, or one that it needs, is not installed or cannot be imported.

    Example:
        >>> require("json", "plots").dumps([1])
        '[1]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError((error.name or module).partition(".")[0], extra) from error
    except ImportError as error:
        problem = f"is installed, but cannot be imported ({first_line(error)})"
        raise MissingExtraError(module.partition(".")[0], extra, problem=problem) from error
