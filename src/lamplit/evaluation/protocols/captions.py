"""Readers of captioned data sets, for image-text retrieval: MS-COCO, Flickr30k, Crossmodal-3600 and XTD10.

Every caption of an image is an item of its own, and stays one where another image has the same. The paper
(appendix I.3) measures on MS-COCO's test split as Karpathy & Fei-Fei (2015) drew it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lamplit.data.json_text import parse_json
from lamplit.data.tables.columns import strip
from lamplit.data.valid_text import valid_id, valid_text
from lamplit.errors import PairsError
from lamplit.evaluation.protocols.listings import expecting, list_of, listed_images, read_json, root_folder
from lamplit.evaluation.protocols.tasks import ImageSet, Retrieval, Task

_KARPATHY = "from Karpathy's caption_datasets.zip"
_COCO = (
    f"val2014/ and dataset_coco.json ({_KARPATHY}), or annotations/captions_val2017.json or "
    "annotations/captions_val2014.json with its images"
)
_FLICKR30K = f"dataset_flickr30k.json ({_KARPATHY}) and flickr30k-images/ or images/"
_XM3600 = "captions.jsonl and images/"
_XTD = (
    "test_image_names.txt and test_1kcaptions_LANGUAGE.txt (there or in XTD10/, MIC/, STAIR/) and the images in "
    "images/ or COCO's train2014/ and val2014/"
)


def read_coco(root: str | Path) -> list[Task]:
    """Read MS-COCO: Karpathy's test split (5,000 images, 25,010 captions), or else an official validation split.

    The images of Karpathy's list are looked for in COCO's folders of 2014, then in those of 2017.

    Raises:
        PairsError: the folder is not laid out so, a file is broken, or images are missing.
    """
    folder = root_folder(root, _COCO)
    for file in (folder / "dataset_coco.json", folder / "annotations" / "dataset_coco.json"):
        if file.is_file():
            captions = _karpathy(file, lambda entry: _coco_image(folder, entry))
            images = listed_images("coco-test", folder, captions)
            split, published = "Karpathy's test split", (5000, 25010)
            return [_retrieval("coco", "MS-COCO", images, captions, split, published=published)]
    for year in ("2017", "2014"):
        file = folder / "annotations" / f"captions_val{year}.json"
        if file.is_file():
            captions = _official(file, f"val{year}")
            images = listed_images(f"coco-val{year}", folder, captions)
            note = (
                f"the official validation split of {year}, not Karpathy's test split of the paper: the figures are not "
                f"comparable; for that one, put dataset_coco.json ({_KARPATHY}) beside the images"
            )
            return [_retrieval("coco", "MS-COCO", images, captions, f"validation split of {year}", notes=(note,))]
    raise PairsError(f"{root} holds no captions of MS-COCO; expected {_COCO}")


def read_flickr30k(root: str | Path) -> list[Task]:
    """Read Flickr30k: Karpathy's test split, 1,000 images with 5 captions each.

    Raises:
        PairsError: the folder is not laid out so, a file is broken, or images are missing.
    """
    folder = root_folder(root, _FLICKR30K)
    file = folder / "dataset_flickr30k.json"
    found = [name for name in ("flickr30k-images", "images") if (folder / name).is_dir()]
    if not file.is_file() or not found:
        raise PairsError(f"{root} does not hold Flickr30k; expected {_FLICKR30K}")
    captions = _karpathy(file, lambda entry: f"{found[0]}/{entry['filename']}")
    images = listed_images("flickr30k-test", folder, captions)
    split, published = "Karpathy's test split", (1000, 5000)
    return [_retrieval("flickr30k", "Flickr30k", images, captions, split, published=published)]


def read_xm3600(root: str | Path) -> list[Task]:
    """Read Crossmodal-3600: 3,600 images, captioned in 36 languages by people who speak them; a task for each.

    Raises:
        PairsError: the folder is not laid out so, a file is broken, or images are missing.
    """
    folder = root_folder(root, _XM3600)
    file = folder / "captions.jsonl"
    if not file.is_file():
        raise PairsError(f"{root} does not hold Crossmodal-3600; expected {_XM3600}")
    languages: dict[str, dict[str, list[str]]] = {}
    paths: list[str] = []
    for row in _json_lines(file):
        with expecting(file, 'an object with "image/key" and {"caption": [texts]} for each language in each line'):
            paths.append(f"images/{row['image/key']}.jpg")
            for language, value in row.items():
                if not language.startswith("image/"):
                    texts = list_of(value["caption"], str)
                    languages.setdefault(language, {}).setdefault(paths[-1], []).extend(texts)
    images = listed_images("xm3600", folder, dict.fromkeys(paths))
    if not languages:
        raise PairsError(f"{file} has no captions")
    return [
        _retrieval(
            "xm3600", "Crossmodal-3600", images, languages[language], "all", language=language, published=(3600, None)
        )
        for language in sorted(languages)
    ]


def read_xtd(root: str | Path) -> list[Task]:
    """Read XTD10: 1,000 images of MS-COCO with one caption in each of up to 11 languages; a task for each.

    Raises:
        PairsError: the folder is not laid out so, a file is broken, or images are missing.
    """
    folder = root_folder(root, _XTD)
    # The authors keep what others wrote (German and French, Japanese) in folders of its own.
    folders = [folder / name for name in ("", "XTD10", "MIC", "STAIR")]
    indices = [place / "test_image_names.txt" for place in folders if (place / "test_image_names.txt").is_file()]
    files: dict[str, Path] = {}
    for file in (file for place in folders for file in sorted(place.glob("test_1kcaptions_*.txt"))):
        code = file.stem.removeprefix("test_1kcaptions_")
        files.setdefault({"jp": "ja"}.get(code, code), file)
    if not indices or not files:
        raise PairsError(f"{root} does not hold XTD10; expected {_XTD}")
    paths = [_xtd_image(folder, name) for name in map(str.strip, _lines(indices[0]))]
    images = listed_images("xtd", folder, dict.fromkeys(paths))
    tasks: list[Task] = []
    for language, file in sorted(files.items()):
        lines = _lines(file)
        if len(lines) != len(paths):
            raise PairsError(f"{file} has {len(lines):,} lines; expected {len(paths):,}, one for each image")
        captions: dict[str, list[str]] = {}
        for path, line in zip(paths, lines, strict=True):
            captions.setdefault(path, []).append(line)
        tasks.append(_retrieval("xtd", "XTD10", images, captions, "test", language=language, published=(1000, 1000)))
    return tasks


def _karpathy(file: Path, path_of: Callable[[Mapping[str, Any]], str]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    data = read_json(file)
    with expecting(file, '{"images": [{"filename", "split", "sentences": [{"raw"}]}]}'):
        for entry in data["images"]:
            if entry["split"] == "test":
                texts = [sentence["raw"] for sentence in entry["sentences"]]
                captions.setdefault(path_of(entry), []).extend(list_of(texts, str))
    return captions


def _coco_image(folder: Path, entry: Mapping[str, Any]) -> str:
    published = f"{entry['filepath']}/{entry['filename']}"
    later = [f"{place}/{int(entry['cocoid']):012}.jpg" for place in ("val2017", "train2017")]
    return next((path for path in (published, *later) if (folder / path).is_file()), published)


def _official(file: Path, place: str) -> dict[str, list[str]]:
    data = read_json(file)
    with expecting(file, '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'):
        paths = {image["id"]: f"{place}/{image['file_name']}" for image in data["images"]}
        captions: dict[str, list[str]] = {path: [] for path in paths.values()}
        for annotation in data["annotations"]:
            captions[paths[annotation["image_id"]]].extend(list_of([annotation["caption"]], str))
    return captions


def _xtd_image(folder: Path, name: str) -> str:
    # COCO_train2014_000000061844.jpg lies in COCO's own folder train2014.
    parts = name.split("_")
    coco = f"{parts[1]}/{name}" if len(parts) == 3 else name
    return coco if (folder / coco).is_file() else f"images/{name}"


def _json_lines(file: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise PairsError(f"line {number:,} of {file} is not JSON: {error}; get the file again") from error
    return rows


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise PairsError(f"{file} cannot be read: {error}; get it again") from error
    return text.rstrip().split("\n")  # not splitlines: a caption may hold a rarer separator


def _retrieval(
    benchmark: str,
    title: str,
    images: ImageSet,
    captions: Mapping[str, Sequence[str]],
    split: str,
    *,
    language: str = "en",
    published: tuple[int, int | None] | None = None,
    notes: tuple[str, ...] = (),
) -> Retrieval:
    """Make a task of the images that have captions; a note says if their numbers are not those that were published."""
    kept = {valid_id(path): texts for path, raw in captions.items() if (texts := strip(map(valid_text, raw)))}
    counts = (len(kept), sum(map(len, kept.values())))
    if not kept:
        raise PairsError(f"{title} has no captions in its split ({split}) of language {language}")
    for count, expected, what in zip(counts, published or (None, None), ("images", "captions"), strict=True):
        if expected not in (None, count):
            notes = (*notes, f"{count:,} {what} here, {expected:,} as published")
    split = f"{split}, {counts[0]:,} images, {counts[1]:,} captions"
    return Retrieval(benchmark, title, images, kept, split, language, notes)
