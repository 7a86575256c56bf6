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

from lamplit.data.caption_hash import hash_captions, hash_names, number
from lamplit.data.split_record import PARTS, SplitRecord, is_in
from lamplit.errors import UsageError
from lamplit.metrics.ranking import retrieval_metrics
from lamplit.store.arrays.caption_arrays import Captions, CaptionTexts, read_captions, seeded_hashes
from lamplit.store.lance_store import Store

MAX_HELD_OUT = 5000  # distinct captions; more would only make every evaluation slower
_LARGE = 0.1  # of the pairs in one component of several images: then captions are held out, not components
_CLASS_IMAGES, _CLASS_FRACTION = 3, 0.02  # a caption of more images is taken for the name of a class
_DROPPED = -1  # pairs of no part

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Links:
    """Images and texts with the true pairs between them: pair l is (image_index[l], text_index[l])."""

    texts: Sequence[str]  # M distinct texts
    image_index: Tensor  # (L,) rows of the store, of 32 or 64 bits
    text_index: Tensor  # (L,) indices into texts, of 32 or 64 bits

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.image_index)


@dataclass(frozen=True)
class Split:
    """The pairs of a store in three parts that share no caption and no image.

    Attributes:
        train: pairs to tune on, a pair for each row and text; the texts stay in the store until they are asked for.
        held_out: pairs to choose the best checkpoint by. Here, and in `test`, rows of one content are one image.
        test: pairs to measure once, at the end.
        record: the captions and contents of each part, to be kept with the model.
        captions: all captions of the store.
        numbers: which of them are tuned on, (M,).
        dropped: pairs of no part, since their caption or image is in another.
        warnings: what is unusual in this split, a plain sentence each.
    """

    train: Links
    held_out: Links
    test: Links
    record: SplitRecord
    captions: Captions
    numbers: NDArray[np.int32]
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
    first, index = number(hash_captions(flat))
    row_of: Integers = np.repeat(np.asarray(rows, np.int64), counts)
    text_index: Integers = index.astype(np.int64)
    if contents is not None:
        row_of, text_index = _join_contents(row_of, text_index, np.repeat(contents, counts))
    return Links([flat[i] for i in first], torch.from_numpy(row_of), torch.from_numpy(text_index))


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
    *,
    progress: bool = False,
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
        progress: show bars on stderr.

    Raises:
        StoreError: there is no such column.
        UsageError: fewer than two pairs are left to tune on.
    """
    captions = read_captions(store, text_column, progress=progress)
    order = seeded_hashes(captions, seed, progress=progress)
    found = split_captions(captions, order, fraction, test_fraction, base)
    if len(found.train) < 2:
        raise UsageError(
            f"{store.path} has {len(found.train)} pairs to tune on in column {text_column!r} "
            f"({len(np.unique(captions.rows))} of {len(store)} images have a text there); tuning compares pairs, so "
            "give at least 2"
        )
    return found


def split_captions(
    captions: Captions,
    order: NDArray[np.uint64],
    fraction: float,
    test_fraction: float = 0.0,
    base: SplitRecord | None = None,
) -> Split:
    """Split pairs as `split_store` does.

    Args:
        captions: L pairs and M distinct captions.
        order: hashes with a seed, (M,), by which captions are taken.
        fraction: of the distinct captions, to be held out.
        test_fraction: of the distinct captions, to be kept for the test.
        base: what the text tower was tuned on before.
    """
    text, image = captions.index, captions.images[captions.rows]
    wanted = [min(round(each * len(order)), MAX_HELD_OUT) for each in (fraction, test_fraction)]
    component = _components(image, text)
    seen = np.zeros(len(text), bool)  # pairs of which the text tower knows the text or the image
    if base is not None:
        seen = is_in(captions.hashes, base.captions("train"))[text]
        seen |= is_in(captions.contents, base.contents("train"))[captions.rows]
    if component is None:
        parts = _by_caption(image, text, order, wanted, seen)
    else:
        parts = _by_component(component, text, order, wanted, seen)
    del component, seen
    chosen = {part: np.flatnonzero(parts == place) for place, part in enumerate(PARTS)}
    record = SplitRecord.make(
        captions.column,
        {part: captions.hashes[text[pairs]] for part, pairs in chosen.items()},
        {part: captions.contents[captions.rows[pairs]] for part, pairs in chosen.items()},
    )
    train, numbers = _train(captions, chosen["train"])
    held_out, test = (_measured(captions, chosen[part]) for part in PARTS[1:])
    warnings = _empty_parts((fraction, test_fraction), (held_out, test), len(order))
    warnings += _lost_classes(captions, image, parts)
    if dropped := int((parts == _DROPPED).sum()):
        warnings.append(
            f"{dropped} pairs are left out, neither tuned on nor held out: they share an image with a held-out pair"
        )
    return Split(train, held_out, test, record, captions, numbers, dropped, warnings)


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
    ends = (image, text + np.int32(num_images))
    graph = coo_array((np.ones(len(image), bool), ends), shape=(num_images + num_texts,) * 2)
    count, labels = connected_components(graph, directed=False)
    del graph, ends
    component = labels[image]
    pairs = np.bincount(component, minlength=count)
    images = np.bincount(labels[:num_images], minlength=count)
    return None if ((pairs > _LARGE * len(image)) & (images > 1)).any() else component


def _by_component(
    component: Integers, text: Integers, order: NDArray[np.uint64], wanted: list[int], seen: NDArray[np.bool_]
) -> Integers:
    """Return the part of each pair, (L,), where components stay together; those with a `seen` pair are tuned on."""
    count = int(component.max(initial=-1)) + 1
    of_text = np.zeros(len(order), np.int32)
    of_text[text] = component
    lowest = np.full(count, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, of_text, order)
    left = np.argsort(lowest, kind="stable")
    left = left[~np.isin(left, component[seen])]
    captions = np.bincount(of_text, minlength=count)
    part = np.zeros(count, np.int8)
    for place, captions_wanted in enumerate(wanted, 1):
        taken = _fill(captions[left], captions_wanted)
        part[left[taken]] = place
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
    parts = (held_out.astype(np.int8) + 2 * (both & ~held_out).astype(np.int8))[text]
    taken = np.zeros(int(image.max()) + 1, np.int8)  # the part of each image
    for place in (2, 1):  # an image of both is held out
        taken[image[parts == place]] = place
    parts[taken[image] != parts] = _DROPPED
    return parts


def _lowest(values: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """Mark the `count` lowest of distinct values."""
    if not count:
        return np.zeros(len(values), bool)
    marked: NDArray[np.bool_] = values <= np.partition(values, count - 1)[count - 1]
    return marked


def _train(captions: Captions, pairs: Integers) -> tuple[Links, NDArray[np.int32]]:
    """Return the links of (n,) pairs, and the numbers of their captions, (M,), as they appear in them."""
    numbers, index = _number_again(captions.index[pairs], len(captions.hashes))
    rows, text_index = torch.from_numpy(captions.rows[pairs]), torch.from_numpy(index)
    return Links(CaptionTexts(captions, numbers), rows, text_index), numbers


def _measured(captions: Captions, pairs: Integers) -> Links:
    """Return the links of (n,) pairs with their texts; rows of one content are one image."""
    numbers, index = _number_again(captions.index[pairs], len(captions.hashes))
    every_row = captions.rows[pairs].astype(np.int64)
    rows, text_index = _join_contents(every_row, index.astype(np.int64), captions.contents[every_row])
    return Links(captions.take(numbers), torch.from_numpy(rows), torch.from_numpy(text_index))


def _number_again(values: NDArray[np.int32], count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Number values below `count` as they appear: return the distinct ones, in this order, and the new numbers."""
    first = np.full(count, -1, np.int32)
    first[values[::-1]] = np.arange(len(values) - 1, -1, -1, dtype=np.int32)  # the last one written stays
    found = np.flatnonzero(first >= 0)
    distinct: NDArray[np.int32] = found[np.argsort(first[found])].astype(np.int32)
    first[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct, first[values]


def _join_contents(rows: Integers, index: Integers, contents: NDArray[np.uint64]) -> tuple[Integers, Integers]:
    """Take the first of the rows of each content for all of them; return the rows and texts of each pair, once."""
    first, place = number(contents)
    rows = rows[first[place]]
    once, _ = number((rows * (int(index.max(initial=-1)) + 1) + index).astype(np.uint64))
    return rows[once], index[once]


def _empty_parts(fractions: Sequence[float], parts: Sequence[Links], captions: int) -> list[str]:
    effects = ("no recall is measured, and the last model is kept", "there is no test")
    return [
        f"nothing is {verb}: no linked captions fit {fraction:g} of {captions} distinct captions, so {effect}"
        for fraction, part, verb, effect in zip(fractions, parts, ("held out", "kept for a test"), effects, strict=True)
        if fraction and not len(part)
    ]


def _lost_classes(captions: Captions, image: Integers, parts: Integers) -> list[str]:
    """Warn of captions that many images share, and that are not tuned on."""
    num_images = np.count_nonzero(np.bincount(image))
    measured = parts > 0
    distinct = np.unique(np.stack([image[measured], captions.index[measured], parts[measured]]), axis=1)
    images = np.bincount(distinct[1], minlength=1)
    lost = np.flatnonzero((images >= _CLASS_IMAGES) & (images > _CLASS_FRACTION * num_images))
    if not len(lost):
        return []
    texts = captions.take(lost[:3])
    shown = ", ".join(f"{text!r} ({images[i]} images)" for text, i in zip(texts, lost, strict=False))
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return [
        f"captions that many images share are held out, so the model never reads them: {shown}{more}. If captions are "
        "the names of classes, tune on all of them (--val-fraction 0) and measure on other images"
    ]
