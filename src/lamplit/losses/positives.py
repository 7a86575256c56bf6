"""Positives beside the diagonal: pairs of a text and an image whose rows share an image or a caption.

They are found tile by tile, by comparing ids, and only so many are kept: the memory does not grow with their number.
Their logits are float64, and apart from the others in every sum: a small loss is no difference of large numbers.

Shapes: B pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamplit.losses.tiles import Tiles

_DENSE = 1 / 32  # from this share of a tile on, the product of the whole tile is faster than single ones
_KEPT = 2**20  # positives, of 24 bytes each, that are found once


class Found(NamedTuple):
    """The positives of a tile, its diagonal apart."""

    texts: Tensor  # (N,) places in the text block
    images: Tensor  # (N,) places in the image block
    logits: Tensor  # (N,) float64, in units of ln 2


class Positives:
    """Which rows are positives of each other.

    Attributes:
        counts: positives of each row, itself included, (B,).
    """

    def __init__(self, groups: list[Tensor], counts: Tensor) -> None:
        self.counts = counts
        self._groups = [group.int() for group in groups]  # (B,) each: by image, by text
        self._shared = counts > 1
        self._kept: dict[tuple[int, int], Found | None] = {}
        self._room = _KEPT

    def in_tile(self, tiles: Tiles, j: int, i: int, *, keep: bool = False) -> Found | None:
        """Find the positives of text block j and image block i; None if there are none beside the diagonal.

        Args:
            tiles: of always the same vectors and scale.
            j: the text block.
            i: the image block.
            keep: the tile is visited again; what is found is kept if there is room, and else found again.
        """
        if (j, i) in self._kept:
            return self._kept[j, i]
        found = self._find(tiles, j, i)
        size = 0 if found is None else len(found.logits)
        if keep and size <= self._room:
            self._room -= size
            self._kept[j, i] = found
        return found

    def _find(self, tiles: Tiles, j: int, i: int) -> Found | None:
        texts, images = (self._shared[tiles.blocks[k]].nonzero().squeeze(1) for k in (j, i))
        same: Tensor | None = None
        for group in self._groups:
            equal = group[tiles.blocks[j]][texts, None] == group[tiles.blocks[i]][images]
            same = equal if same is None else same.logical_or_(equal)
        assert same is not None
        if i == j:
            same.fill_diagonal_(False)
        rows, columns = same.nonzero().unbind(1)
        if len(rows) == 0:
            return None
        texts, images = texts[rows], images[columns]
        if len(rows) > _DENSE * tiles.side**2:
            return Found(texts, images, tiles.wide_logits(j, i)[texts, images])
        logits = tiles.single_logits(texts + tiles.blocks[j].start, images + tiles.blocks[i].start)
        return Found(texts, images, logits)


def find_positives(ids: list[Tensor]) -> Positives | None:
    """Find the rows with more than one positive; None if there is none.

    Args:
        ids: of images, of texts, of both or of none, (B,) each.
    """
    groups = [_number_groups(one) for one in ids]
    if not groups:
        return None
    # Rows of the same image, plus those of the same text, less those of both.
    counts = sum(_group_sizes(group) for group in groups)
    if len(groups) == 2:
        counts = counts - _group_sizes(_number_groups(groups[0] * len(groups[0]) + groups[1]))
    assert isinstance(counts, Tensor)
    return Positives(groups, counts) if bool((counts > 1).any()) else None


def _number_groups(ids: Tensor) -> Tensor:
    """Return each row's group, numbered from 0."""
    group: Tensor
    _, group = torch.unique(ids, return_inverse=True)
    return group


def _group_sizes(group: Tensor) -> Tensor:
    return group.bincount()[group]


class PositiveSums:
    """Sums over the positives of each text and of each image, (2, B) each, of powers of two and of logits.

    Attributes:
        own: logits of the pairs themselves, (B,).
        counts: positives of each row, (B,).
        maxima: largest logits.
        scaled: the sums of powers, over two to the largest.
    """

    def __init__(self, own: Tensor, positives: Positives | None) -> None:
        self.own = own
        self.counts = torch.ones_like(own) if positives is None else positives.counts.to(own.dtype)
        self.maxima = own.expand(2, -1).clone()
        self.scaled = torch.ones_like(self.maxima)
        self._above_own = torch.zeros_like(self.maxima)  # sums of logits less the pair's own

    def add(self, side: int, block: slice, rows: Tensor, logits: Tensor) -> None:
        """Add positives of a block: texts if `side` is 0, images if it is 1."""
        before = self.maxima[side, block]
        maxima = before.scatter_reduce(0, rows, logits, "amax")
        powers = torch.zeros_like(maxima).index_add(0, rows, (logits - maxima[rows]).exp2_())
        self.scaled[side, block].mul_((before - maxima).exp2_()).add_(powers)
        self._above_own[side, block].index_add_(0, rows, logits - self.own[block][rows])
        before.copy_(maxima)

    def logarithms(self) -> Tensor:
        """Return the binary logarithms of the sums of powers."""
        return self.maxima + self.scaled.log2()

    def excess(self) -> Tensor:
        """Return the same less the mean logits: 0 for a row without other positives."""
        return (self.maxima - self.own - self._above_own / self.counts) + self.scaled.log2()
