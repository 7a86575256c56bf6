"""The command `lamplit search`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import lamplit
from lamplit.cli import tables
from lamplit.cli.terminal import AsJson, draws_thumbnails, print_line, show
from lamplit.errors import UsageError

if TYPE_CHECKING:
    from lamplit.retrieval.searcher import Hit


def search(
    model: Annotated[str, typer.Argument(help="Folder of a model, or lit:NAME, a published one.")],
    store: Annotated[str, typer.Argument(help="What lamplit embed made, with the tower the model reads.")],
    query: Annotated[
        str | None,
        typer.Argument(help='Words; a sum such as \'"beach" - 0.5 * "people"\'; or - for one query per line of stdin.'),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many images.")] = 10,
    page: Annotated[int, typer.Option(min=1, help="Which k of them: 2 for the next best after the first.")] = 1,
    image: Annotated[Path | None, typer.Option(help="An image, instead of words or added to them.")] = None,
    where: Annotated[
        str | None, typer.Option(help="SQL condition on the store's columns: \"year > 2019 and folder = 'trip'\".")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look at every image, however many there are.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Draw what is found into this PNG, too.")] = None,
    thumbnails: Annotated[
        bool | None,
        typer.Option(
            help="Show each image, too: in a terminal that can, by itself; by --thumbnails as blocks in every other."
        ),
    ] = None,
    paths: Annotated[bool, typer.Option("--paths", help="Print paths alone, one per line.")] = False,
    null: Annotated[bool, typer.Option("-0", help="Print paths alone, each with a zero byte behind it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find images by words, by an image, or by sums of both."""
    from lamplit.towers.texts.word_reader import open_words

    if query is None and image is None:
        raise UsageError('give words or an image: lamplit search MODEL STORE "words", or --image FILE')
    if paths + null + as_json > 1:
        raise UsageError("--json, --paths and -0 are three ways to print; give one")
    reader = open_words(model) if image is None else None
    if reader is None:
        opened = lamplit.load(model, towers="text" if image is None else "image" if query is None else "both")
    searcher = lamplit.Searcher(reader or opened, lamplit.Store(store), exact=exact)
    drawn = not (as_json or paths or null) and draws_thumbnails(thumbnails)
    many = query == "-"
    found: dict[str, list[Hit]] = {}
    for words in _stdin() if many else [query]:
        name = words or str(image)
        found[name] = searcher.search(words, image=image, k=k, offset=(page - 1) * k, where=where)
        if not as_json:
            _print(name if many else None, found[name], paths=paths, null=null, drawn=drawn)
    if as_json:
        listed = [{"query": name, "hits": [asdict(hit) for hit in hits]} for name, hits in found.items()]
        print_line(json.dumps(listed if many else listed[0]["hits"], indent=2, ensure_ascii=False, default=str))
    if sheet is not None and found:
        from lamplit.retrieval.contact_sheet import contact_sheet

        contact_sheet(found, sheet)
    if reader is None and image is None:
        from lamplit.exports.text_graph import write_words

        write_words(model)  # for the next time


def _stdin() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _print(title: str | None, hits: list[Hit], *, paths: bool, null: bool, drawn: bool) -> None:
    if null:
        typer.echo("".join(f"{hit.path}\0" for hit in hits), nl=False)
    elif paths:
        typer.echo("".join(f"{hit.path}\n" for hit in hits), nl=False)
    else:
        if title is not None:
            print_line(title)
        if drawn and hits:
            from lamplit.cli.thumbnails import print_hits

            print_hits(hits)
            return
        show(hits, tables.hits, as_json=False)
