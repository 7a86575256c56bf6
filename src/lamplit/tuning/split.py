"""Split the pairs of a store into those that are tuned on, held out, and kept for a test at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lamplit.data.caption_hash import hash_captions, hash_names
from lamplit.data.split_record import PARTS, SplitRecord, is_in
from lamplit.errors import UsageError
from lamplit.metrics.ranking import retrieval_metrics
from lamplit.store.lance_store import Store

MAX_HELD_OUT = 5000  # distinct captions; more would only make every evaluation slower
_LARGE = 0.1  # of the pairs in one component of several images: then captions are held out, not components
_CLASS_IMAGES, _CLASS_FRACTION = 3, 0.02  # a caption of more images is taken for the name of a class
_DROPPED = -1  # pairs of no part

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Links:
    """Images and texts with the true pairs between them: pair l is (image_index[l], text_index[l])."""

    texts: list[str]  # M distinct texts
    image_index: Tensor  # (L,) rows of the store
    text_index: Tensor  # (L,) indices into texts

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.image_index)


@dataclass(frozen=True)
class Split:
    """The pairs of a store in three parts that share no caption and no image.

    Attributes:
        train: pairs to tune on, a pair for each row and text.
        held_out: pairs to choose the best checkpoint by. Here, and in `test`, rows of one content are one image.
        test: pairs to measure once, at the end.
        record: the captions and contents of each part, to be kept with the model.
        contents: hash of the content of each row of the store, (N,).
        dropped: pairs of no part, since their caption or image is in another.
        warnings: what is unusual in this split, a plain sentence each.
    """

    train: Links
    held_out: Links
    test: Links
    record: SplitRecord
    contents: NDArray[np.uint64]
    dropped: int = 0
    warnings: list[str] = field(default_factory=list)


def link(rows: Sequence[int], texts: Sequence[Sequence[str]], contents: NDArray[np.uint64] | None = None) -> Links:
    """Link rows of a store to their texts; texts that differ only in case are one.

    Args:
        rows: n rows.
        texts: the texts of each.
        contents: hash of the content of each; if given, rows of one content are one image, the first of them.
    """
    flat = [text for row_texts in texts for text in row_texts]
    counts = np.fromiter(map(len, texts), np.int64, len(texts))
    first, index = _by_appearance(hash_captions(flat))
    repeated = None if contents is None else np.repeat(contents, counts)
    return _links([flat[i] for i in first], np.repeat(np.asarray(rows, np.int64), counts), index, repeated)


def content_hashes(store: Store) -> NDArray[np.uint64]:
    """Hash what the images of a store are, not where they lie: (N,); rows with one number are one image."""
    return hash_names(store.column("hash"))


def split_store(
    store: Store,
    text_column: str,
    fraction: float,
    seed: int,
    test_fraction: float = 0.0,
    base: SplitRecord | None = None,
) -> Split:
    """Split the pairs of a store, so that no caption and no image of one part is in another.

    Captions and images that are linked by pairs are in one part. They are taken in the order of their lowest caption
    hash, until a part has the captions that it wants; what would be too many is passed over. If so linked pairs are a
    large part of all, captions are held out alone, and pairs that join two parts are dropped.

    Args:
        store: whose pairs to split.
        text_column: the column with the texts.
        fraction: of the distinct captions, to be held out; at most MAX_HELD_OUT of them.
        seed: another seed holds out other captions.
        test_fraction: of the distinct captions, to be kept for the test; at most MAX_HELD_OUT of them.
        base: what the text tower was tuned on before; none of it is held out.

    Raises:
        StoreError: there is no such column.
        UsageError: fewer than two pairs are left to tune on.
    """
    texts = store.texts(text_column)
    found = split_pairs(texts, content_hashes(store), fraction, seed, test_fraction, text_column=text_column, base=base)
    if len(found.train) < 2:
        raise UsageError(
            f"{store.path} has {len(found.train)} pairs to tune on in column {text_column!r} "
            f"({sum(map(bool, texts))} of {len(texts)} images have a text there); tuning compares pairs, so give at "
            "least 2"
        )
    return found


def split_pairs(
    texts: Sequence[Sequence[str]],
    contents: NDArray[np.uint64],
    fraction: float,
    seed: int,
    test_fraction: float = 0.0,
    *,
    text_column: str = "texts",
    base: SplitRecord | None = None,
) -> Split:
    """Split pairs as `split_store` does.

    Args:
        texts: the texts of N rows.
        contents: hash of the content of each row, (N,).
        fraction: of the distinct captions, to be held out.
        seed: of the order in which captions are taken.
        test_fraction: of the distinct captions, to be kept for the test.
        text_column: what the record calls the texts.
        base: what the text tower was tuned on before.
    """
    links = link(range(len(texts)), texts)
    text, rows = links.text_index.numpy(), links.image_index.numpy()
    distinct, image = np.unique(contents[rows], return_inverse=True)
    order, hashes = hash_captions(links.texts, seed), hash_captions(links.texts)
    wanted = [min(round(each * len(order)), MAX_HELD_OUT) for each in (fraction, test_fraction)]
    component = _components(image, text)
    seen = np.zeros(len(text), bool)  # pairs of which the text tower knows the text or the image
    if base is not None:
        seen = is_in(hashes, base.captions("train"))[text] | is_in(distinct, base.contents("train"))[image]
    if component is None:
        parts = _by_caption(image, text, order, wanted, seen)
    else:
        parts = _by_component(component, text, order, wanted, seen)
    train, held_out, test = (
        _links_of(links, parts == number, contents if number else None) for number in range(len(PARTS))
    )
    chosen = {part: parts == number for number, part in enumerate(PARTS)}
    record = SplitRecord.make(
        text_column,
        {part: hashes[text[pairs]] for part, pairs in chosen.items()},
        {part: distinct[image[pairs]] for part, pairs in chosen.items()},
    )
    warnings = _empty_parts((fraction, test_fraction), (held_out, test), len(order))
    warnings += _lost_classes(links.texts, image, text, parts)
    if dropped := int((parts == _DROPPED).sum()):
        warnings.append(
            f"{dropped} pairs are left out, neither tuned on nor held out: they share an image with a held-out pair"
        )
    return Split(train, held_out, test, record, contents, dropped, warnings)


def held_out_recall(zimg: Tensor, ztxt: Tensor, links: Links) -> dict[str, float]:
    """Measure recall both ways on linked pairs, and its mean (`mean_recall`), which decides the best model.

    Args:
        zimg: unit vectors of all rows of the store, (N, D).
        ztxt: unit vectors of the linked texts, (M, D).
        links: the true pairs.
    """
    rows, image_index = torch.unique(links.image_index, return_inverse=True)
    metrics = retrieval_metrics(zimg[rows].to(ztxt.device), ztxt, image_index, links.text_index)
    recalls = [value for name, value in metrics.items() if "recall@" in name]
    return metrics | {"mean_recall": sum(recalls) / len(recalls)}


def _components(image: Integers, text: Integers) -> Integers | None:
    """Return the component of each pair, (L,); None if one of several images has a large part of the pairs."""
    if not len(image):
        return image
    num_images, num_texts = int(image.max()) + 1, int(text.max()) + 1
    ends = (image, num_images + text)
    graph = coo_array((np.ones(len(image), bool), ends), shape=(num_images + num_texts,) * 2)
    count, labels = connected_components(graph, directed=False)
    component = labels[image].astype(np.int64)
    pairs = np.bincount(component, minlength=count)
    images = np.bincount(labels[:num_images], minlength=count)
    return None if ((pairs > _LARGE * len(image)) & (images > 1)).any() else component


def _by_component(
    component: Integers, text: Integers, order: NDArray[np.uint64], wanted: list[int], seen: NDArray[np.bool_]
) -> Integers:
    """Return the part of each pair, (L,), where components stay together; those with a `seen` pair are tuned on."""
    count = int(component.max(initial=-1)) + 1
    of_text = np.zeros(len(order), np.int64)
    of_text[text] = component
    lowest = np.full(count, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, of_text, order)
    left = np.argsort(lowest, kind="stable")
    left = left[~np.isin(left, component[seen])]
    captions = np.bincount(of_text, minlength=count)
    part = np.zeros(count, np.int64)
    for number, captions_wanted in enumerate(wanted, 1):
        taken = _fill(captions[left], captions_wanted)
        part[left[taken]] = number
        left = left[~taken]
    return part[component]


def _fill(sizes: Integers, wanted: int) -> NDArray[np.bool_]:
    """Take what comes, in its order, until `wanted` is reached; what would be too many is passed over."""
    taken = np.zeros(len(sizes), bool)
    fitting = np.flatnonzero(sizes <= wanted)
    while wanted and len(fitting):
        reached = sizes[fitting].cumsum()
        count = int(np.searchsorted(reached, wanted, "right"))
        taken[fitting[:count]] = True
        wanted -= int(reached[count - 1])
        fitting = fitting[count:][sizes[fitting[count:]] <= wanted]
    return taken


def _by_caption(
    image: Integers, text: Integers, order: NDArray[np.uint64], wanted: list[int], seen: NDArray[np.bool_]
) -> Integers:
    """Return the part of each pair, (L,), where captions alone stay together; _DROPPED if it joins two parts.

    Captions with a `seen` pair are tuned on.
    """
    known = np.unique(text[seen])
    order = order.copy()
    order[known] = np.iinfo(np.uint64).max
    most = len(order) - len(known)
    held_out, both = _lowest(order, min(wanted[0], most)), _lowest(order, min(sum(wanted), most))
    parts = (held_out.astype(np.int64) + 2 * (both & ~held_out))[text]
    taken = np.zeros(int(image.max()) + 1, np.int64)  # the part of each image
    for number in (2, 1):  # an image of both is held out
        taken[image[parts == number]] = number
    parts[taken[image] != parts] = _DROPPED
    return parts


def _lowest(values: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """Mark the `count` lowest of distinct values."""
    if not count:
        return np.zeros(len(values), bool)
    marked: NDArray[np.bool_] = values <= np.partition(values, count - 1)[count - 1]
    return marked


def _links_of(links: Links, chosen: NDArray[np.bool_], contents: NDArray[np.uint64] | None) -> Links:
    """Return some of the pairs, with the texts that are theirs; with `contents`, rows of one content are one image."""
    rows, index = links.image_index.numpy()[chosen], links.text_index.numpy()[chosen]
    first, place = _by_appearance(index)
    return _links([links.texts[i] for i in index[first]], rows, place, None if contents is None else contents[rows])


def _links(texts: list[str], rows: Integers, index: Integers, contents: NDArray[np.uint64] | None) -> Links:
    """Make links of (L,) rows and texts; with their contents, rows of one content are one image, each pair is once."""
    if contents is not None:
        first, place = _by_appearance(contents)
        rows = rows[first[place]]
        once, _ = _by_appearance(rows * len(texts) + index)
        rows, index = rows[once], index[once]
    return Links(texts, torch.from_numpy(rows), torch.from_numpy(index))


def _by_appearance(values: NDArray[Any]) -> tuple[Integers, Integers]:
    """Number (L,) values in the order in which they appear: return where each is first, (U,), and the numbers, (L,)."""
    _, first, index = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[index]


def _empty_parts(fractions: Sequence[float], parts: Sequence[Links], captions: int) -> list[str]:
    effects = ("no recall is measured, and the last model is kept", "there is no test")
    return [
        f"nothing is {verb}: no linked captions fit {fraction:g} of {captions} distinct captions, so {effect}"
        for fraction, part, verb, effect in zip(fractions, parts, ("held out", "kept for a test"), effects, strict=True)
        if fraction and not len(part)
    ]


def _lost_classes(texts: list[str], image: Integers, text: Integers, parts: Integers) -> list[str]:
    """Warn of captions that many images share, and that are not tuned on."""
    num_images = int(image.max(initial=-1)) + 1
    pairs = np.unique(np.stack([image, text, parts]), axis=1)
    images = np.bincount(pairs[1][pairs[2] > 0], minlength=len(texts))
    lost = np.flatnonzero((images >= _CLASS_IMAGES) & (images > _CLASS_FRACTION * num_images))
    if not len(lost):
        return []
    shown = ", ".join(f"{texts[i]!r} ({images[i]} images)" for i in lost[:3])
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return [
        f"captions that many images share are held out, so the model never reads them: {shown}{more}. If captions are "
        "the names of classes, tune on all of them (--val-fraction 0) and measure on other images"
    ]
