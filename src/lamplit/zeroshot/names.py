"""Prompt templates and class names by name, each with its source and licence; the lists are in `facts/`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from lamplit.data.inputs import list_texts
from lamplit.errors import UsageError
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES


class Source(NamedTuple):
    """Where a list was copied from."""

    where: str
    licence: str


def template_sets() -> list[str]:
    """List the names of all template sets."""
    return sorted(_facts("templates.json"))


def templates(name: str) -> list[str]:
    """Return the templates of a set, each with `{}` for the class name.

    Raises:
        UsageError: there is no such set.
    """
    entry = _entry("templates.json", name)
    extended = templates(entry["extends"]) if "extends" in entry else []
    return [*extended, *entry["templates"]]


def known_template_sets() -> dict[str, Sequence[str]]:
    """Return every template set by its name; `lamplit` is the default one."""
    return {"lamplit": DEFAULT_TEMPLATES, **{name: templates(name) for name in template_sets()}}


def as_templates(
    given: str | Sequence[str] | None, sets: Mapping[str, Sequence[str]] | None = None, *, others: str = ""
) -> list[str]:
    """Return the templates that a caller means: prompts, one prompt, or the name of a set; None for the default ones.

    Args:
        given: what the caller gave.
        sets: the sets by name; by default `known_template_sets`.
        others: further words that the caller could have given, for the message.

    Raises:
        UsageError: there is no such set, or nothing is given, or something else than texts.
    """
    if given is None:
        return list(DEFAULT_TEMPLATES)
    if not isinstance(given, str):
        prompts, _ = list_texts(given)
        if not prompts:
            raise UsageError("no templates to put the classes into; give one a line, such as: a photo of a {}.")
        return prompts
    if "{}" in given:
        return [given]
    sets = known_template_sets() if sets is None else sets
    if given not in sets:
        raise UsageError(
            f"there are no templates {given!r}; expected prompts with {{}}, {others}or one of: {', '.join(sets)}"
        )
    return list(sets[given])


def template_source(name: str) -> Source:
    """Return the source of a template set, and its licence."""
    entry = _entry("templates.json", name)
    return Source(entry["source"], entry["licence"])


def class_name_sets() -> list[str]:
    """List the names of all sets of class names."""
    return sorted(_facts("class_names.json"))


def class_names(name: str) -> list[tuple[str, ...]]:
    """Return the class names of a set, in the order of the labels: one name each, or several.

    Two pairs of ImageNet's classes share a name (missile, sunglasses), as in CLIP's list.

    Raises:
        UsageError: there is no such set.
    """
    return [(item,) if isinstance(item, str) else tuple(item) for item in _entry("class_names.json", name)["names"]]


def class_keys(name: str) -> list[str]:
    """Return the data set's own names of its classes, such as its folders, as `plain` writes them."""
    entry = _entry("class_names.json", name)
    return [plain(key) for key in entry.get("classes") or [first for first, *_ in class_names(name)]]


def class_name_source(name: str) -> Source:
    """Return the source of a set of class names, and its licence."""
    entry = _entry("class_names.json", name)
    return Source(entry["source"], entry["licence"])


def plain(name: str) -> str:
    """Write a folder's name as words: in lower case, with spaces for `_` and `/`."""
    return " ".join(name.casefold().replace("_", " ").replace("/", " ").split())


def listed(names: Iterable[str], most: int = 5) -> str:
    """Name the first few of many, for an error."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@cache
def _facts(file: str) -> dict[str, Any]:
    content = resources.files("lamplit.zeroshot").joinpath("facts", file).read_text("utf-8")
    facts: dict[str, Any] = json.loads(content)
    return facts


def _entry(file: str, name: str) -> dict[str, Any]:
    facts = _facts(file)
    if name not in facts:
        kind = file.removesuffix(".json").replace("_", " ")
        raise UsageError(f"no {kind} are called {name!r}; there are {', '.join(sorted(facts))}")
    entry: dict[str, Any] = facts[name]
    return entry
