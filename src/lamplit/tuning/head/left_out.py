"""Texts that are read in a step as if the closed form had been fitted without them.

A kernel head answers the texts that it was fitted to from memory: the loss of their pairs is small whatever the encoder
says, and its gradient teaches the encoder nothing about texts that it does not know. So where there are pairs enough,
each text of a batch is read as the head would read it if it had been left out of the fit, which ridge regression tells
of all texts at once (leave-one-out). The head itself does not train: it is fitted again to what the encoder says
whenever recall is measured.

The reading is exact wherever the encoder moves the text between two fits. An approximation by the diagonal of the
inverse gives a text a share of its own values, which the encoder learns to lean on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.head.closed_form import MAX_ANCHORS, Anchors, corrections_of
from lamplit.tuning.large_batch import Part
from lamplit.tuning.settings import MANY_PAIRS, TuneSettings
from lamplit.tuning.sides import EncodedTexts, Precision
from lamplit.tuning.tokens import Tokens


def leaves_out(settings: TuneSettings, tower: TextTower, pairs: int, texts: int) -> bool:
    """Return whether a run reads its texts as if they were left out of the closed form.

    It does with as many pairs as it takes to gain by it, and with no more texts than a head can know. A published head
    is not fitted, and what another model's head knew belongs to that model's encoder.

    Args:
        settings: of the run.
        tower: its text tower, before the head is replaced.
        pairs: number of training pairs.
        texts: number of their distinct texts.
    """
    only_text = settings.text_trains and not settings.image_trains and not settings.image_head
    fits = settings.has_kernel_head and tower.trained_scale is None and tower.carried is None
    return only_text and fits and pairs >= MANY_PAIRS and texts <= MAX_ANCHORS


class LeftOut(nn.Module):
    """How a kernel head that does not train reads each text that is tuned on as if it was not fitted to it.

    Args:
        tower: has a kernel head, which no optimizer changes from now on. The head's tensors are buffers here, so that
            checkpoints hold them.
        texts: number of distinct texts, M.

    Attributes:
        own: (M,) the anchor of each text; -1 if the head does not know it.
        weights: (A,) of the anchors in the fit; 0 for a place that no text took.
        corrections: of the anchors; not in checkpoints, since it follows from the others. A matrix of up to 1.6 GB.
    """

    own: Tensor
    weights: Tensor

    def __init__(self, tower: TextTower, texts: int) -> None:
        super().__init__()
        head = tower.head
        assert isinstance(head, KernelHead)
        self._head = [head.requires_grad_(False)]  # in a list, for it is a part of the text tower
        self.corrections: Tensor | None = None
        self.register_buffer("own", torch.full((texts,), -1, device=tower.device))
        self.register_buffer("weights", torch.zeros(head.anchors, device=tower.device))
        for name, parameter in head.named_parameters():
            self.register_buffer(name.replace(".", "_"), parameter.data)

    def take(self, texts: Tensor, anchors: Anchors) -> None:
        """Take what the head knows after a fit to some of the texts.

        Args:
            texts: which texts it was fitted to, (m,).
            anchors: of these.
        """
        self.own.fill_(-1)
        self.own[texts.to(self.own.device)] = anchors.place.to(self.own.device)
        self.weights.zero_()
        self.weights[: len(anchors.weights)].copy_(anchors.weights)
        self.corrections = anchors.corrections

    def recover(self) -> None:
        """Compute the corrections of a head that was fitted elsewhere, or before a checkpoint."""
        self.corrections = None  # two would not fit where one does
        self.corrections = corrections_of(self._head[0], self.weights[self.weights > 0])

    def read(self, features: Tensor, texts: Tensor) -> Tensor:
        """Return the (B, D) vectors that the head gives (B, H) features of these texts, (B,), not knowing them."""
        assert self.corrections is not None, "the head is fitted before the first step"
        own = self.own[texts.to(self.own.device)]
        return self._head[0].read_unknown(features, own, self.corrections[own.clamp(min=0)])


class LeftOutTexts(EncodedTexts):
    """Tokens, through a text tower that trains and whose head reads each text as if it was left out.

    Args:
        tower: has a kernel head.
        tokens: token ids of each text.
        precision: the autocast in which the tower runs.
        left_out: of the same texts.
    """

    def __init__(self, tower: TextTower, tokens: Tokens, precision: Precision, left_out: LeftOut) -> None:
        super().__init__(tower, tokens, precision)
        self.left_out = left_out

    def part(self, texts: Tensor, more: Sequence[list[int]] = ()) -> Part:
        """Return (B,) texts to encode; no more, since names are fitted with the head."""
        assert not more
        part = super().part(texts)
        chunks = zip(part.chunks, torch.split(texts[part.order], [*map(len, part.chunks)]), strict=True)
        return replace(part, encode=self._read, chunks=list(chunks))

    def _read(self, chunk: tuple[list[list[int]], Tensor]) -> Tensor:
        tokens, texts = chunk
        with self.precision():
            return self.left_out.read(self.tower.features(tokens), texts)
