"""Rows that several short texts share, so that one pass reads texts of all lengths and next to nothing is padded.

A mask of the attention lets a text's tokens see each other alone, and positions begin anew with every text. Whether an
encoder follows both is tried out on it: not every one takes them, and none says so.

Shapes: B texts, R rows of L tokens, T tokens of all texts together.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from lamplit.towers.loading import READ_ERRORS

Sight = Literal["all", "before"]  # what a token sees of its text: all of it, or what comes before it
MOST_TOKENS = 64  # of a text that shares a row; encoders that look at a window see more than that
ROW_COST = 1.05  # of a token, beside one in a pass of texts of one length: the attention goes over the whole row
_LEAST_ROW, _MOST_ROW = 40, 72  # tokens; shorter rows are filled worse, longer ones spend more on attention
_TRIED_SIZES = 8


@dataclass(frozen=True)
class SharedRows:
    """Which texts share a row.

    Attributes:
        texts: of each row, by their places in the batch.
        length: of the rows, in tokens.
    """

    texts: list[list[int]]
    length: int

    @property
    def cost(self) -> float:
        """Tokens of a pass of texts of one length that take as long."""
        return ROW_COST * len(self.texts) * self.length


def share_rows(lengths: Sequence[int]) -> SharedRows:
    """Deal texts of these lengths to rows that are filled alike; of some numbers of rows, choose what pads least."""
    total = sum(lengths)
    fewest, most = max(1, total // _MOST_ROW), max(1, math.ceil(total / _LEAST_ROW))
    step = max(1, math.ceil((most - fewest) / _TRIED_SIZES))
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return min((_deal(lengths, order, count) for count in range(fewest, most + 1, step)), key=lambda rows: rows.cost)


def _deal(lengths: Sequence[int], order: Sequence[int], count: int) -> SharedRows:
    """Give each text, longest first, to the row that holds least."""
    filled = [(0, row) for row in range(count)]
    texts: list[list[int]] = [[] for _ in range(count)]
    for place in order:
        held, row = filled[0]
        heapq.heapreplace(filled, (held + lengths[place], row))
        texts[row].append(place)
    return SharedRows([row for row in texts if row], max(held for held, _ in filled))


@dataclass(frozen=True)
class RowInputs:
    """What an encoder takes to read shared rows, and where the texts lie in what it returns."""

    ids: Tensor  # (R, L) token ids
    positions: Tensor  # (R, L)
    mask: Tensor  # (R, 1, L, L), added to the logits of attention
    first: Tensor  # (B,) places of the first tokens among R × L
    lengths: Tensor  # (B,)

    def read(self, encoder: nn.Module) -> Tensor:
        """Return the encoder's vectors, (R × L, width)."""
        output = encoder(input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions)
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)

    def pool(self, hidden: Tensor, pooling: str) -> Tensor:
        """Return each text's first vector (`cls`), its last one, or their mean: (B, width)."""
        if pooling == "mean":
            return self._mean(hidden)
        return hidden[self.first if pooling == "cls" else self.first + self.lengths - 1]

    def _mean(self, hidden: Tensor) -> Tensor:
        row = self.first // self.ids.shape[1]
        # A product for each row, since adding up by index has no fixed order on a GPU.
        place = torch.arange(self.ids.shape[1], device=hidden.device)
        start = (self.first % self.ids.shape[1])[:, None]
        weights = ((place >= start) & (place < start + self.lengths[:, None])) / self.lengths[:, None]
        by_row = hidden.view(*self.ids.shape, -1)
        return torch.bmm(weights[:, None].to(hidden.dtype), by_row[row])[:, 0]


def row_inputs(
    tokens: Sequence[Sequence[int]], rows: SharedRows, encoder: nn.Module, *, sight: Sight, pad_id: int
) -> RowInputs:
    """Lay out B lists of token ids for an encoder, of which some share a row; `pad_id` fills a row up."""
    shape, padding = (len(rows.texts), rows.length), _padding(encoder)
    like = next(encoder.parameters())
    ids, positions = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    owners = torch.full(shape, -1)
    first = torch.empty(len(tokens), dtype=torch.long)
    for row, places in enumerate(rows.texts):
        row_ids = [token for place in places for token in tokens[place]]
        row_positions = [number for place in places for number in _positions(tokens[place], padding)]
        row_owners = [place for place in places for _ in tokens[place]]
        used = len(row_ids)
        ids[row, :used] = torch.tensor(row_ids)
        positions[row, :used] = torch.tensor(row_positions)
        owners[row, :used] = torch.tensor(row_owners)
        start = row * rows.length
        for place in places:
            first[place] = start
            start += len(tokens[place])
    sees = owners[:, :, None] == owners[:, None, :]
    if sight == "before":
        sees = sees.tril()
    mask = torch.zeros(sees.shape).masked_fill_(~sees, -math.inf)
    lengths = torch.tensor([len(ids_) for ids_ in tokens])
    device = like.device
    return RowInputs(ids.to(device), positions.to(device), mask[:, None].to(like), first.to(device), lengths.to(device))


@torch.no_grad()
def find_sight(encoder: nn.Module, longest: int, vocabulary: int, pad_id: int) -> Sight | None:
    """Try whether an encoder reads texts that share a row as it reads them alone; None if it does not.

    It reads in the precision of its weights, also inside `autocast`: what is found must not depend on when it is asked,
    or a run that goes on would group its texts otherwise than one that was never stopped.

    Args:
        encoder: takes `input_ids`, `attention_mask` and `position_ids`, if it can do this at all.
        longest: text that it reads, in tokens.
        vocabulary: number of token ids.
        pad_id: the id of padding, which a text may hold, too.
    """
    modes = {module: module.training for module in encoder.modules()}
    device = next(encoder.parameters()).device
    size = min(longest, MOST_TOKENS)
    # Ids from the middle of the vocabulary are no special tokens.
    texts = [[vocabulary // 4 + 7 * i % (vocabulary // 2 + 1) for i in range(n)] for n in (size, max(1, size // 2), 1)]
    texts[0][size // 2] = pad_id
    rows = SharedRows([[1, 0, 2]], sum(map(len, texts)))
    encoder.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            alone = [encoder(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0] for ids in texts]
            true = torch.cat([alone[place] for place in rows.texts[0]])
            for sight in ("all", "before"):
                given = row_inputs(texts, rows, encoder, sight=sight, pad_id=pad_id)
                if _is_close(given.read(encoder), true):
                    return sight
    except (*READ_ERRORS, NotImplementedError):  # it takes no such mask, or no positions
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return None


def _is_close(found: Tensor, true: Tensor) -> bool:
    tolerance = 1e-4 if true.dtype == torch.float32 else 0.02
    return found.shape == true.shape and bool((found - true).abs().max() <= tolerance * true.abs().max())


def _positions(ids: Sequence[int], padding: int | None) -> Sequence[int]:
    """Number a text's tokens: from 0, or, if there is a position of padding, from behind it, without the padding."""
    if padding is None:
        return range(len(ids))
    count = accumulate(token != padding for token in ids)
    return [padding if token == padding else padding + number for token, number in zip(ids, count, strict=True)]


def _padding(encoder: nn.Module) -> int | None:
    """Return the position of padding, and its id, in RoBERTa and its like, which count from behind it; else None."""
    for name, part in encoder.named_modules():
        if name.endswith("embeddings.position_embeddings"):
            padding: int | None = getattr(part, "padding_idx", None)
            return padding
    return None
