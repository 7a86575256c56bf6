"""Hooks of mkdocs: the command reference and the list of public names are made when the site is built.

`commands.md` and `api.md` hold a marker each. What takes its place comes from the program itself, so that neither page
can fall behind it.
"""

from __future__ import annotations

import html
import inspect
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter
from typer.main import get_command

import lamplit
from lamplit.cli.main import app as command_line

LIGHT, DARK = "default", "github-dark"  # styles of Pygments
COMMANDS, NAMES = "<!-- commands -->", "<!-- public names -->"

# Public names by the part of the package they come from. A name of another part lands under "Other".
GROUPS = {
    "model": "Models",
    "store": "Stores",
    "data": "Pairs and images",
    "tuning": "Tuning",
    "zeroshot": "Classification",
    "retrieval": "Search",
    "evaluation": "Evaluation",
    "metrics": "Evaluation",
    "towers": "Towers",
    "losses": "Losses",
    "exports": "Export",
    "inspection": "Export",
    "publishing": "Export",
    "app": "Serving",
    "errors": "Errors",
}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the colours of code, for a light and for a dark page."""
    css = "\n".join(
        HtmlFormatter(style=style).get_style_defs(f"[data-bs-theme={mode}] .highlight")
        for mode, style in (("light", LIGHT), ("dark", DARK))
    )
    files.append(File.generated(config, "pygments.css", content=css))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated in the place of the markers."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_reference())
    if NAMES in markdown:
        markdown = markdown.replace(NAMES, name_reference())
    return markdown


def commands() -> dict[str, Any]:
    """Map each command as it is typed, without "lamplit", to its object in Typer."""
    found: dict[str, Any] = {}

    def walk(command: Any, name: str) -> None:
        if hasattr(command, "commands"):
            for word, child in command.commands.items():
                walk(child, f"{name} {word}".strip())
        else:
            found[name] = command

    walk(get_command(command_line), "")
    return found


def command_reference() -> str:
    """Write every command with its arguments and options, as Markdown."""
    parts = []
    for name, command in commands().items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(["lamplit", name, *map(argument_usage, arguments), *map(option_usage, options)])
        parts += [
            f"## lamplit {name}",
            "",
            inspect.cleandoc(command.help or ""),
            "",
            "```text",
            wrapped(usage),
            "```",
            "",
        ]
        if arguments:
            rows = [(f"`{p.name.upper()}`", kind(p), p) for p in arguments]
            parts += ["| argument | type | what it is |", "| --- | --- | --- |", *map(row, rows), ""]
        if options:
            rows = [(option_names(p), kind(p), p) for p in options]
            parts += ["| option | type | what it does |", "| --- | --- | --- |", *map(row, rows), ""]
    return "\n".join(parts)


def argument_usage(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def option_usage(parameter: Any) -> str:
    """Only what must be given; the table has the rest."""
    return f"{parameter.opts[0]} {parameter.name.upper()}" if parameter.required else ""


def wrapped(usage: str) -> str:
    return re.sub(r" +", " ", usage).strip() + " [OPTIONS]"


def option_names(parameter: Any) -> str:
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def kind(parameter: Any) -> str:
    """Name the type as a reader would: text, path, number, or nothing for a switch."""
    if getattr(parameter, "is_flag", False):
        return "switch"
    annotation = str(parameter.type_descriptor.annotation)
    for word, name in (("Path", "path"), ("int", "integer"), ("float", "number"), ("str", "text")):
        if word in annotation:
            return name + (", repeatable" if parameter.multiple or parameter.nargs == -1 else "")
    return "text"


def row(entry: tuple[str, str, Any]) -> str:
    name, type_name, parameter = entry
    notes = [cell(parameter.help or "")]
    if parameter.required:
        notes.append("**Required.**")
    elif parameter.default not in (None, False, [], ()) and not callable(parameter.default):
        shown = parameter.secondary_opts[0] if parameter.default is False else parameter.default
        if type_name == "switch" and parameter.secondary_opts:
            shown = parameter.opts[0] if parameter.default else parameter.secondary_opts[0]
        notes.append(f"Default: `{shown}`.")
    return f"| {name} | {type_name} | {' '.join(notes)} |"


def cell(text: str) -> str:
    """Keep a help text from being read as Markdown or HTML."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([|*_`\[\]{}])", r"\\\1", text)


def name_reference() -> str:
    """List every public name under the part of the package it belongs to, for mkdocstrings to fill in."""
    groups: dict[str, list[str]] = {}
    for name in lamplit.__all__:
        value = getattr(lamplit, name)
        part = getattr(value, "__module__", "").removeprefix("lamplit.").split(".")[0]
        if not name.startswith("__"):
            groups.setdefault(GROUPS.get(part, "Other"), []).append(name)
    parts = []
    for title in dict.fromkeys([*GROUPS.values(), "Other"]):
        if title in groups:
            parts += [f"## {title}", ""]
            for name in sorted(groups[title], key=lambda n: (n[0].isupper(), n)):
                parts += [f"::: lamplit.{name}", ""]
    return "\n".join(parts)
