"""The commands `lamplit search` and `locate`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import lamplit
from lamplit.cli import tables
from lamplit.cli.terminal import AsJson, Device, ModelName, draws_thumbnails, print_line, print_note, show
from lamplit.errors import UsageError

if TYPE_CHECKING:
    from lamplit.retrieval.searcher import Hit


def search(
    context: typer.Context,
    model: ModelName,
    store: Annotated[str, typer.Argument(help="Store that lamplit embed made with the image tower of the model.")],
    query: Annotated[
        str | None,
        typer.Argument(
            help='Words to search for; or a sum such as \'"beach" - 0.5 * "people"\'; or - to read one query per line '
            "from stdin."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of images to find.")] = 10,
    page: Annotated[
        int, typer.Option(min=1, help="Page of the results: 2 prints the next k images after the best k.")
    ] = 1,
    image: Annotated[
        Path | None, typer.Option(help="Image file to search by, instead of words or added to them.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Condition on the columns of the store, such as \"year > 2019 and folder = 'trip'\"."),
    ] = None,
    min_score: Annotated[
        str | None,
        typer.Option(
            help="Lowest cosine of an image to print; auto hides what is probably no answer, measured on the store."
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare the query with all images, however many there are.")
    ] = False,
    sheet: Annotated[Path | None, typer.Option(help="Image file to draw the found images into.")] = None,
    thumbnails: Annotated[
        bool | None,
        typer.Option(
            help="Show a thumbnail of each image. By default a terminal that can draw images does; --thumbnails draws "
            "them as coloured blocks in any other."
        ),
    ] = None,
    paths: Annotated[bool, typer.Option("--paths", help="Print only the paths of the images, one per line.")] = False,
    null: Annotated[
        bool, typer.Option("-0", help="Print only the paths of the images, each followed by a zero byte.")
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find images by words, by an image, or by sums of both."""
    from lamplit.retrieval.model_reader import ModelReader, as_reader

    if context.args:
        several = " ".join([query or "", *context.args])
        raise UsageError(f'put the words in quotes: lamplit search MODEL STORE "{several}"')
    if query is None and image is None:
        raise UsageError('give words or an image: lamplit search MODEL STORE "words", or --image FILE')
    least = _lowest_score(min_score, image)
    if paths + null + as_json > 1:
        raise UsageError("--json, --paths and -0 are three ways to print; give one")
    if sheet is not None:
        from lamplit.retrieval.picture_files import picture_format

        picture_format(sheet)  # before anything is searched
    reader = as_reader(model, texts=query is not None, images=image is not None, device=device)
    searcher = lamplit.Searcher(reader, store, exact=exact, progress=True)
    has_thumbnails = not (as_json or paths or null) and draws_thumbnails(thumbnails)
    is_many = query == "-"
    found: dict[str, list[Hit]] = {}
    for words in _stdin() if is_many else [query]:
        name = words or str(image)
        hits = searcher.search(words, image=image, k=k, offset=(page - 1) * k, where=where)
        found[name] = hits if least is None else _relevant(searcher, words, hits, least)
        if not as_json:
            title = name if is_many else None
            _print(title, found[name], paths=paths, null=null, has_thumbnails=has_thumbnails)
    if as_json:
        listed = [{"query": name, "hits": [asdict(hit) for hit in hits]} for name, hits in found.items()]
        print_line(json.dumps(listed if is_many else listed[0]["hits"], indent=2, ensure_ascii=False, default=str))
    if sheet is not None and found:
        from lamplit.retrieval.contact_sheet import contact_sheet

        contact_sheet(found, sheet)
    if image is None and isinstance(reader, ModelReader):
        from lamplit.exports.text_graph import write_words

        write_words(model)  # the next search by words needs no torch


def locate(
    context: typer.Context,
    model: ModelName,
    image: Annotated[Path, typer.Argument(help="Image file to look into.")],
    words: Annotated[str, typer.Argument(help='Words to look for; or a sum such as \'"beach" - "people"\'.')],
    out: Annotated[
        Path | None, typer.Option(help="Image file to draw the heat map into, over the image: .png, .jpg or .webp.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show where in an image words are read: their cosine with each place alone.

    In Python: lamplit.locate.
    """
    if context.args:
        several = " ".join([words, *context.args])
        raise UsageError(f'put the words in quotes: lamplit locate MODEL IMAGE "{several}"')
    if out is not None:
        from lamplit.retrieval.picture_files import picture_format

        picture_format(out)  # before the model is opened
    found = lamplit.locate(model, image, words, device=device)
    (x, y), (width, height) = found.peak, found.size
    peak = float(found.values.max())
    if as_json:
        about = {"x": x, "y": y, "value": peak, "score": found.score, "size": found.size, "window": found.window}
        print_line(json.dumps(about | {"values": found.values.tolist()}, indent=2))
    else:
        print_line(
            f"most at x {x:.0f}, y {y:.0f} of {width} x {height} pixels ({x / width:.0%} from the left, "
            f"{y / height:.0%} from the top): {peak:.3f} there, {found.score:.3f} the whole image"
        )
    if out is not None:
        found.save(out)


def _lowest_score(asked: str | None, image: Path | None) -> float | Literal["auto"] | None:
    if asked is None:
        return None
    if asked == "auto":
        if image is not None:
            raise UsageError("--min-score auto is for words; for an image give a number, such as --min-score 0.3")
        return "auto"
    with suppress(ValueError):
        if not math.isnan(score := float(asked)):
            return score
    raise UsageError(f"--min-score is {asked!r}; expected auto, or a number such as 0.3")


def _relevant(
    searcher: lamplit.Searcher, words: str | None, hits: list[Hit], least: float | Literal["auto"]
) -> list[Hit]:
    """Leave out hits below a score, and say how many."""
    lowest = searcher.min_score(searcher.encode(words)) if least == "auto" else least
    kept = [hit for hit in hits if hit.score >= lowest]
    if hidden := len(hits) - len(kept):
        why = ", and answers were measured to begin there" if least == "auto" else ""
        print_note(f"{hidden} of {len(hits)} images are hidden: their score is below {lowest:.3f}{why}")
    return kept


def _stdin() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _print(title: str | None, hits: list[Hit], *, paths: bool, null: bool, has_thumbnails: bool) -> None:
    if null:
        typer.echo("".join(f"{hit.path}\0" for hit in hits), nl=False)
        return
    if paths:
        typer.echo("".join(f"{hit.path}\n" for hit in hits), nl=False)
        return
    if title is not None:
        print_line(title)
    if has_thumbnails and hits:
        from lamplit.cli.thumbnails import print_hits

        print_hits(hits)
    else:
        show(hits, tables.hits, as_json=False)
