"""Positives beside the diagonal: pairs of a text and an image whose rows share an image or a caption.

They are found tile by tile, by comparing ids, and only so many are kept: the memory does not grow with their number.
Their logits are float64, and apart from the others in every sum: a small loss is no difference of large numbers.

Shapes: B pairs; b of them have their texts here, in a process of its own all B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamplit.losses.tiles import Tiles

Exchange = Callable[[Tensor], Tensor]  # maps (n,) float64 values of this rank to those of the others, (W - 1, n)

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
        blocks = tiles.text_blocks[j], tiles.blocks[i]
        texts, images = (self._shared[block].nonzero().squeeze(1) for block in blocks)
        same: Tensor | None = None
        for group in self._groups:
            equal = group[blocks[0]][texts, None] == group[blocks[1]][images]
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
        logits = tiles.single_logits(texts + blocks[0].start, images + blocks[1].start)
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


@dataclass(frozen=True)
class Peers:
    """The other ranks of a loss, to which the images are known in the order of the batch.

    Attributes:
        order: (B,) row of the batch of each image, in the order of this rank.
        exchange: returns what the others give, in a fixed order.
    """

    order: Tensor
    exchange: Exchange

    def ask(self, values: Tensor, more: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange (B,) values, and of the chosen rows, (B,), more; return (W - 1, B) and (W - 1, number of chosen)."""
        back = torch.argsort(self.order)
        received = self.exchange(torch.cat([values[back], more[back][chosen[back]]]))
        theirs, theirs_chosen = received[:, : len(values)], received[:, len(values) :]
        spread = received.new_empty(theirs.shape)
        spread[:, chosen[back]] = theirs_chosen
        return theirs[:, self.order], spread[:, self.order][:, chosen]


class PositiveSums:
    """Sums over the positives of each text and of each image, (2, B) each, of powers of two and of logits.

    Texts that are not here have one positive, of the logit 0, and so no loss; an image begins with none.

    Args:
        own: logits of the pairs whose texts are here, (b,).
        size: B.
        positives: which rows are positives of each other.

    Attributes:
        here: the rows whose texts are here.
        own: logits of the pairs themselves, (B,); 0 where they are not known.
        counts: positives of each row, (B,).
        maxima: largest logits.
        scaled: the sums of powers, over two to the largest.
    """

    def __init__(self, own: Tensor, size: int, positives: Positives | None) -> None:
        self.here, self._elsewhere = slice(len(own)), slice(len(own), None)
        self.own = F.pad(own, (0, size - len(own)))
        self.counts = torch.ones_like(self.own) if positives is None else positives.counts.to(own.dtype)
        self.maxima = self.own.expand(2, -1).clone()
        self.maxima[1, self._elsewhere] = torch.finfo(own.dtype).min
        self.scaled = torch.ones_like(self.maxima)
        self.scaled[1, self._elsewhere] = 0
        self._found = self.scaled.clone()  # how many were added up
        self._above_own = torch.zeros_like(self.maxima)  # sums of logits less the pair's own

    def add(self, side: int, block: slice, rows: Tensor, logits: Tensor) -> None:
        """Add positives of a block: texts if `side` is 0, images if it is 1."""
        before = self.maxima[side, block]
        maxima = before.scatter_reduce(0, rows, logits, "amax")
        powers = torch.zeros_like(maxima).index_add(0, rows, (logits - maxima[rows]).exp2_())
        self.scaled[side, block].mul_((before - maxima).exp2_()).add_(powers)
        self._above_own[side, block].index_add_(0, rows, logits - self.own[block][rows])
        self._found[side, block].index_add_(0, rows, torch.ones_like(logits))
        before.copy_(maxima)

    def logarithms(self) -> Tensor:
        """Return the binary logarithms of the sums of powers."""
        return self.maxima + self.scaled.log2()

    def excess(self) -> Tensor:
        """Return the same less the mean logits: 0 for a row without other positives.

        Of an image whose text is elsewhere only its share of the mean: the logarithm is counted there.
        """
        of_own = self.own * (self._found / self.counts)
        found = (self.maxima - of_own - self._above_own / self.counts) + self.scaled.log2()
        found[1, self._elsewhere] = -(self._above_own / self.counts)[1, self._elsewhere]
        return found

    def join(self, others: Tensor, peers: Peers) -> Tensor:
        """Make the images' sums those of all ranks.

        For an image without other positives than its own text, the rank of that text sends the sum of both. So every
        other rank has the sum over all texts, and that rank the two apart, for one number an image.

        Args:
            others: (B,) binary logarithms of the sums over the others of each image.
            peers: the other ranks.

        Returns:
            `others` of all ranks, (B,); with the positive that is elsewhere, if it is the only one.
        """
        positives, shared = self.logarithms()[1], self.counts > 1
        sent = torch.where(shared, others, torch.logaddexp2(others, positives))
        of_others, of_positives = peers.ask(sent, positives, shared)
        self.maxima[1, shared] = _add_powers(positives[shared], of_positives)
        self.scaled[1, shared] = 1
        return _add_powers(others, of_others)


def _add_powers(first: Tensor, more: Tensor) -> Tensor:
    """Add up powers of two by their binary logarithms, (n,) and (m, n)."""
    return (torch.cat([first[None], more]) * math.log(2)).logsumexp(0) / math.log(2)
