"""Icons of the sets that Iconify collects, drawn, with captions from their names.

A set is a JSON of SVG bodies by name. An alias is another name of an icon, or a turned or mirrored copy of it. A set
may say which endings or beginnings of its names are styles (`heart-outline`).
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from lamplit.data.decoding.svg import draw_svg, is_blank
from lamplit.data.decoding.workers import worker_context, worker_start
from lamplit.data.named.packages import fetch_npm_package
from lamplit.errors import ImageError, UsageError, nearest_names, require
from lamplit.progress import progress_bar

PACKAGE = "@iconify/json@2.2.535"
INTEGRITY = "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="
SIDE = 224  # pixels
ROW_GROUP = 1024  # icons that are drawn and written together
# Licences that allow to pass drawings on and to sell what is made with them.
FREE_LICENCES = frozenset((
    "Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0", "GPL-2.0-only",
    "GPL-2.0-or-later", "GPL-3.0", "GPL-3.0-or-later", "ISC", "MIT", "MPL-2.0", "OFL-1.1", "Unlicense",
))  # fmt: skip
# Sets whose names name a firm, a product or a country, rather than what is seen; beside those of the category Logos.
BRANDS = frozenset(("devicon", "devicon-plain", "file-icons", "ps", "skill-icons", "unjs"))
FLAGS = frozenset(("cif", "circle-flags", "flag", "flagpack"))
# Sets that number the drawings of one thing (`add-1`, `ice-cream-3`). Elsewhere a number at the end says what is seen
# (`keycap-3`, `uv-index-11`), and stays.
NUMBERING = re.compile(r"streamline(-|$)|glyphs-poly$|marketeq$")
_MAX_PARENTS = 10  # of an alias of an alias
_BOX = ("left", "top", "width", "height")
_TRANSFORMING = ("hFlip", "vFlip", "rotate", *_BOX)
_SCHEMA = pa.schema([
    ("image", pa.binary()), ("id", pa.string()), ("text", pa.list_(pa.string())),
    *((name, pa.string()) for name in ("set", "style", "category", "licence", "author")),
])  # fmt: skip
_SETS_COLUMNS = ("set", "title", "author", "author_url", "licence", "licence_url", "pictures", "blank", "left_out")


@dataclass(frozen=True)
class IconChoice:
    """Which sets of icons: those that are named, or all that are in colour, or all that are not."""

    sets: tuple[str, ...] = ()
    colour: bool = True

    @property
    def folder(self) -> str:
        """Name of the folder of this choice in the cache."""
        if not self.sets:
            return "icons" if self.colour else "icons-no-colour"
        name = "icons-" + "+".join(self.sets)
        return name if len(name) <= 100 else f"icons-{blake2b(name.encode(), digest_size=8).hexdigest()}"


class Icon(NamedTuple):
    """One picture of a set: its SVG, and what its names say."""

    name: str
    svg: str
    texts: list[str]
    style: str | None
    category: str | None


def choose_icons(sets: str | Iterable[str] | None, colour: bool | None) -> IconChoice:
    """Return the choice that these arguments of `fetch` make.

    Raises:
        UsageError: a name cannot be that of a set, or both say which sets.
    """
    if sets is None:
        return IconChoice(colour=colour is not False)
    names = sorted({name.strip() for name in (sets.split(",") if isinstance(sets, str) else sets)})
    for name in names:
        if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name):
            raise UsageError(f"{name!r} cannot be a set of icons; expected names such as noto or fluent-color")
    if not names:
        raise UsageError("no set of icons is named; expected names such as noto or fluent-color")
    if colour is not None:
        raise UsageError("sets of icons are chosen by their names or by colour, not by both; leave one out")
    return IconChoice(tuple(names))


def make_icons(work: Path, made: Path, *, choice: IconChoice, workers: int = 0, progress: bool = False) -> None:
    """Make a table of icons, 224 pixels wide, and `sets.csv`: each set's author and licence, and what was left out."""
    require("resvg_py", "svg")  # before the download
    root = fetch_npm_package(PACKAGE, work, INTEGRITY)
    about: dict[str, dict[str, Any]] = json.loads((root / "collections.json").read_text("utf-8"))
    chosen, left_out = choose_sets(about, choice)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    total = sum(about[name]["total"] for name in chosen)
    with (
        _drawing(workers) as draw,
        progress_bar("drawing", total, shown=progress) as advance,
        parquet.ParquetWriter(made / "pairs.parquet", _SCHEMA) as writer,
    ):
        for name in chosen:
            info = about[name]
            icons = read_icons(json.loads((root / "json" / f"{name}.json").read_text("utf-8")))
            while group := list(islice(icons, ROW_GROUP)):
                images = draw([icon.svg for icon in group])
                rows = [
                    {
                        "image": image, "id": f"{name}/{icon.name}", "text": icon.texts, "set": name,
                        "style": icon.style, "category": icon.category, "licence": info["license"]["spdx"],
                        "author": info["author"]["name"],
                    }
                    for icon, image in zip(group, images, strict=True)
                    if image is not None
                ]  # fmt: skip
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                counts[name].update(pictures=len(rows), blank=len(group) - len(rows))
                advance(len(group), name)
    _write_sets(made / "sets.csv", about, chosen, left_out, counts)


def choose_sets(about: dict[str, dict[str, Any]], choice: IconChoice) -> tuple[list[str], dict[str, str]]:
    """Return the sets of a choice, and why each other set of its kind is left out.

    Raises:
        UsageError: a set that is named does not exist, or its licence forbids to pass it on or to sell.
    """
    reasons = {
        name: _left_out(name, info) for name, info in about.items() if bool(info.get("palette")) == choice.colour
    }
    if not choice.sets:
        return [name for name, reason in reasons.items() if not reason], {k: v for k, v in reasons.items() if v}
    for name in choice.sets:
        if name not in about:
            raise UsageError(f"there is no set of icons {name!r}; type one of {nearest_names(name, about)}")
        if reason := _licence_reason(about[name]):
            raise UsageError(f"the set of icons {name!r} is left out: {reason}; choose another set")
    return list(choice.sets), {}


def _left_out(name: str, info: dict[str, Any]) -> str:
    if reason := _licence_reason(info):
        return reason
    if info.get("category") == "Logos" or name in BRANDS:
        return "logos"
    if name in FLAGS:
        return "flags"
    return "hidden by Iconify" if info.get("hidden") else ""


def _licence_reason(info: dict[str, Any]) -> str:
    licence = info["license"].get("spdx")
    return "" if licence in FREE_LICENCES else f"its licence ({licence}) does not allow every use"


def read_icons(data: dict[str, Any]) -> Iterator[Icon]:
    """Read the pictures of a set in Iconify's JSON format: its icons and turned or mirrored copies, but no hidden ones.

    Other names of a picture become further captions. The number at the end of a name is taken off in sets that number
    their drawings of one thing.
    """
    icons, aliases = data["icons"], data.get("aliases", {})
    others = defaultdict(list)
    for alias in aliases:
        if (name := _picture(alias, icons, aliases)) and name != alias and not aliases[alias].get("hidden"):
            others[name].append(alias)
    categories = {name: category for category, names in data.get("categories", {}).items() for name in names}
    numbers = bool(NUMBERING.match(data["prefix"]))
    for name in [*icons, *(alias for alias in aliases if _picture(alias, icons, aliases) == alias)]:
        icon = _merged(name, data)
        if icon is None or icon.get("hidden"):
            continue
        names = [_cut_style(each, data) for each in (name, *others[name])]
        texts = dict.fromkeys(words(each, numbers=numbers) for each, _ in names)
        category = categories.get(name) or categories.get(aliases.get(name, {}).get("parent"))
        category = category and re.sub("(?<=[a-z])(?=[A-Z])", " ", category)
        yield Icon(name, svg_of(icon), list(texts), names[0][1], category)


def words(name: str, *, numbers: bool = False) -> str:
    """Write a name in words; with `numbers`, without the number at its end.

    Example:
        >>> words("ice-cream-3", numbers=True)
        'ice cream'
    """
    if numbers:
        name = re.sub(r"(?<=.)-\d+$", "", name)
    return " ".join(re.split("[-_]+", name)).strip() or name


def svg_of(icon: dict[str, Any]) -> str:
    """Write an icon as an SVG, turned and mirrored as it says, in the middle of a square with a margin.

    The margin is that of the stamps: a centre crop of 7/8 keeps all of the icon.
    """
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", 16), icon.get("height", 16)
    turns = int(icon.get("rotate", 0)) % 4
    side = max(width, height) * 8 / 7
    scales = (-1 if icon.get("hFlip") else 1), (-1 if icon.get("vFlip") else 1)
    body = icon["body"]
    if turns or scales != (1, 1):  # about the middle: mirrored first, then turned
        x, y = left + width / 2, top + height / 2
        moves = f"translate({x} {y}) rotate({90 * turns}) scale({scales[0]} {scales[1]}) translate({-x} {-y})"
        body = f'<g transform="{moves}">{body}</g>'
    box = f"{left + (width - side) / 2} {top + (height - side) / 2} {side} {side}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIDE}" height="{SIDE}" viewBox="{box}">{body}</svg>'
    )


def _picture(name: str, icons: dict[str, Any], aliases: dict[str, Any]) -> str | None:
    """Return the icon, or the turned or mirrored copy, that a name stands for; None if there is none."""
    for _ in range(_MAX_PARENTS):
        if name in icons or any(key in aliases.get(name, {}) for key in _TRANSFORMING):
            return name
        if name not in aliases:
            return None
        name = aliases[name]["parent"]
    return None


def _merged(name: str, data: dict[str, Any]) -> dict[str, Any] | None:
    """Return an icon with what its set, and for an alias its parents, say about it; None if a parent is missing."""
    chain: list[dict[str, Any]] = []
    while name not in data["icons"]:
        if name not in data.get("aliases", {}) or len(chain) == _MAX_PARENTS:
            return None
        chain.append(data["aliases"][name])
        name = chain[-1]["parent"]
    icon: dict[str, Any] = {key: data[key] for key in _BOX if key in data} | data["icons"][name]
    for alias in reversed(chain):
        turned = {
            "hFlip": bool(icon.get("hFlip")) != bool(alias.get("hFlip")),
            "vFlip": bool(icon.get("vFlip")) != bool(alias.get("vFlip")),
            "rotate": icon.get("rotate", 0) + alias.get("rotate", 0),
        }
        icon = icon | alias | turned
    return icon


def _cut_style(name: str, data: dict[str, Any]) -> tuple[str, str | None]:
    """Take the style off a name; return the rest, and the style's title."""
    styles = []
    for key in ("suffixes", "prefixes"):
        titles = data.get(key, {})
        for part in sorted(filter(None, titles), key=len, reverse=True):
            cut = name.removesuffix(f"-{part}") if key == "suffixes" else name.removeprefix(f"{part}-")
            if cut and cut != name:
                name = cut
                styles.append(titles[part])
                break
        else:
            styles += [titles[""]] if "" in titles else []
    return name, ", ".join(styles) or None


@contextmanager
def _drawing(workers: int) -> Iterator[Callable[[Sequence[str]], list[bytes | None]]]:
    """Open what draws many SVGs, in processes: resvg keeps Python's lock, so threads draw no faster than one."""
    if workers == 0:
        yield lambda svgs: [_draw(svg) for svg in svgs]
        return
    with worker_context().Pool(workers, worker_start(), (0,)) as pool:
        yield partial(pool.map, _draw, chunksize=16)


def _draw(svg: str) -> bytes | None:
    """Draw an icon on white; None if nothing is to be seen."""
    try:
        image = draw_svg(svg)
    except ImageError:
        return None
    return None if is_blank(image) else image


def _write_sets(
    path: Path,
    about: dict[str, dict[str, Any]],
    chosen: list[str],
    left_out: dict[str, str],
    counts: dict[str, Counter[str]],
) -> None:
    """Write what the licences ask for: whose drawings these are, and under which terms."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_SETS_COLUMNS)
        for name in [*chosen, *left_out]:
            author, licence = about[name]["author"], about[name]["license"]
            writer.writerow((
                name, about[name]["name"], author["name"], author.get("url", ""), licence.get("spdx", ""),
                licence.get("url", ""), counts[name]["pictures"], counts[name]["blank"], left_out.get(name, ""),
            ))  # fmt: skip
