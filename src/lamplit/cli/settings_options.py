"""Options of a command from a dataclass of settings: its fields, their types and defaults, and its docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

import typer

_FIELD_INDENT = " " * 4  # of a name in `Args:`; its further lines have twice as much


def field_docs(settings: type) -> dict[str, str]:
    """Read what the `Args:` section of a dataclass's docstring says about each field, as one line each."""
    names = {field.name for field in fields(settings)}
    docs: dict[str, str] = {}
    name, is_args = "", False
    for line in (inspect.getdoc(settings) or "").splitlines():
        if line.strip() and not line.startswith(" "):
            is_args = line == "Args:"
        elif is_args and line.strip():
            first, colon, text = line.strip().partition(": ")
            if colon and first in names and line.startswith(_FIELD_INDENT + first):
                name, docs[first] = first, text
            else:
                docs[name] += f" {line.strip()}"
    return docs


def with_settings(settings: type, panel: str, but: Collection[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Give a command the fields of a dataclass as options; it takes what was typed as `**given`.

    Args:
        settings: the dataclass.
        panel: title of these options in the help.
        but: names of the fields that do not become options.

    Returns:
        A decorator for a function whose first argument is a `typer.Context`.
    """
    docs, hints = field_docs(settings), get_type_hints(settings)
    options = []
    for field in fields(settings):
        if field.name in but:
            continue
        kind: Any = hints[field.name]
        default = field.default
        if default is MISSING:  # a recipe may have it, so it need not be typed
            kind, default = kind | None, None
        annotation = Annotated[kind, typer.Option(help=docs[field.name], rich_help_panel=panel)]
        parameter = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)
        options.append(parameter.replace(annotation=annotation))
    names = {option.name for option in options}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]

        def run(context: typer.Context, **values: Any) -> None:
            typed = {name for name in names if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
            command(context, **{name: value for name, value in values.items() if name in typed or name not in names})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        parameters = [*own, *options]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
