"""Named data sets, downloaded once into the user's cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from lamplit.data.named import makers
from lamplit.data.named.icons import choose_icons, make_icons
from lamplit.errors import UsageError
from lamplit.files import cache_folder

CATALOG = {
    "stamps": "701 images of things, captions in 78 languages (Tux Paint; GPL-2)",
    "openclipart": "3,200 drawings with titles and keywords (Open Clip Art; public domain)",
    "emoji": "1,911 emoji drawn by two vendors, with names (MIT; drawings Apache-2.0 and CC-BY-4.0)",
    "icons": "39,809 icons of 29 sets in colour, or any sets of Iconify, with names (each set has its licence)",
    "fashion-mnist": "70,000 grey images in 10 classes, without captions (Zalando; MIT)",
}
_MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "stamps": makers.make_stamps,
    "openclipart": makers.make_openclipart,
    "emoji": makers.make_emoji,
    "fashion-mnist": makers.make_fashion_mnist,
}


def fetch(
    name: str,
    folder: str | Path | None = None,
    *,
    sets: str | Iterable[str] | None = None,
    colour: bool | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Path:
    """Download a data set of the catalogue, unless it is in the cache, and return its file of pairs.

    On the command line: `lamplit data get`.

    Args:
        name: `stamps`, `openclipart`, `emoji`, `icons` or `fashion-mnist`.
        folder: the cache; None for `$LAMPLIT_CACHE`, or `~/.cache/lamplit` if that is not set.
        sets: for `icons`, names of Iconify's sets, such as `["noto", "mdi"]` or `"noto,mdi"`; None for many.
        colour: for `icons`, whether these many are the sets in colour (None, True) or those in black (False). Logos
            and flags of countries are not among them.
        workers: processes that draw icons; with any, a script needs `if __name__ == "__main__":`.
        progress: whether a progress bar is shown while icons are drawn.

    Returns:
        The path of `pairs.jsonl` or `pairs.parquet`, which `lamplit.embed` takes. The stamps have the columns `image`
        (path), `category` (animals, food, ...), `text` (the caption in English), and `text_de`, `text_fr`, ... (the
        caption in up to 77 other languages; null if there is none). The icons have `image` (PNG), `id`, `text` (their
        names in words), `set`, `style`, `category`, `licence` and `author`.

    Raises:
        UsageError: there is no such data set or no such set of icons, or the package manager that it comes through is
            not installed.
        MissingExtraError: what draws the icons is not installed.
        PairsError: it cannot be downloaded.

    Example:
        >>> lamplit.embed(lamplit.fetch("stamps"), "stamps.lance", image_tower="demo:efficientnet-lite0")
    """
    if name not in CATALOG:
        raise UsageError(f"there is no data set {name!r}; type one of {', '.join(CATALOG)}")
    make, key = _MAKERS.get(name), name
    if name == "icons":
        choice = choose_icons(sets, colour)
        make, key = partial(make_icons, choice=choice, workers=workers, progress=progress), choice.folder
    elif sets is not None or colour is not None:
        raise UsageError(f"{name} has no sets to choose from; leave out the sets and the colour, or fetch icons")
    assert make is not None
    folder = Path(folder or cache_folder()).absolute()
    target = folder / key
    if pairs := _find_pairs(target):
        return pairs
    if target.exists():
        raise UsageError(f"{target} exists but holds no pairs; remove it and fetch again")
    folder.mkdir(parents=True, exist_ok=True)
    # Made in a folder beside the target, and renamed when it is complete: an interrupted download leaves nothing.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as temporary:
        work, made = Path(temporary, "work"), Path(temporary, "made")
        work.mkdir()
        made.mkdir()
        make(work, made)
        try:
            made.rename(target)
        except OSError:  # another process was first
            if not _find_pairs(target):
                raise
    return next(target.glob("pairs.*"))


def _find_pairs(target: Path) -> Path | None:
    return next(target.glob("pairs.*"), None)
