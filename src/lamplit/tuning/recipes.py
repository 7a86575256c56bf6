"""The paper's settings as files: `lamplit tune STORE --recipe NAME`."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from lamplit.errors import UsageError
from lamplit.tuning.settings import TuneSettings

_FOLDER = files("lamplit") / "tuning" / "paper"
_TABLES = {"title", "source", "paper", "settings"}


def recipe_names() -> list[str]:
    """Name the recipes that come with lamplit."""
    return sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))


def list_recipes() -> list[str]:
    """Name the recipes that come with lamplit, as `read_recipe` takes them."""
    return recipe_names()


def read_recipe(recipe: str) -> dict[str, Any]:
    """Read a recipe: `title`, `source`, what the `paper` says in its own units, and the `settings` of a run.

    Args:
        recipe: a name out of `recipe_names`, or a TOML file of your own.

    Raises:
        UsageError: there is no such recipe, or it has what a recipe has not.
    """
    file = Path(recipe) if recipe.endswith(".toml") else _FOLDER / f"{recipe}.toml"
    if not file.is_file():
        raise UsageError(f"there is no recipe {recipe!r}; expected a TOML file, or one of {', '.join(recipe_names())}")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {recipe} is not TOML: {error}") from error
    settings = values.get("settings")
    known = TuneSettings.__dataclass_fields__
    unknown = [key for key in values if key not in _TABLES]
    if not isinstance(settings, dict):
        raise UsageError(f"recipe {recipe} has no [settings]; they are what lamplit tune takes: {', '.join(known)}")
    unknown += [f"settings.{key}" for key in settings if key not in known]
    if unknown:
        raise UsageError(f"recipe {recipe} has keys that mean nothing: {', '.join(unknown)}; known: {', '.join(known)}")
    return values
