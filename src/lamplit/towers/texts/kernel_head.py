"""A text head that reads a text by its likeness to texts that it knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = 4096  # anchors that are read at once


@dataclass(frozen=True)
class KnownTexts:
    """What a kernel head knows, apart from the texts themselves.

    Attributes:
        mean: (H,) features of the mean text.
        directions: (A, H) unit directions of the known texts from the mean text.
        vectors: (A, D) unit vectors that the head gives them.
    """

    mean: Tensor
    directions: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.directions)


class KernelHead(nn.Module):
    """Maps (B, H) features of texts to (B, D) vectors: attention over A known texts, its anchors.

    A text's direction from the mean text is compared with each anchor's, and what comes out is the mean of the anchors'
    vectors, weighted by the softmax of these likenesses. Behind the normalisation of vectors that is regression with
    the kernel exp(sharpness * cosine), which the closed form solves; a linear head is the same with products alone. All
    of it trains like any other layer.

    Attributes:
        mean: (H,) features of the mean text.
        keys: (A, H) directions of the anchors, times the sharpness.
        values: (D, A) vectors of the anchors; they may have any length and sign.
    """

    def __init__(self, in_features: int, out_features: int, anchors: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.anchors = in_features, out_features, anchors
        self.mean = nn.Parameter(torch.zeros(in_features))
        self.keys = nn.Linear(in_features, anchors, bias=False)
        self.values = nn.Linear(anchors, out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, D) vectors of (B, H) features."""
        vectors: Tensor = self.values(self._weights(features))
        return vectors

    def read_unknown(self, features: Tensor, own: Tensor, corrections: Tensor) -> Tensor:
        """Return (B, D) vectors of (B, H) features, each as if the closed form had been fitted without this text.

        Args:
            features: of texts.
            own: the anchor that is this text, (B,); -1 for none.
            corrections: of these anchors, (B, A): how much of an anchor's values goes to each other one if it is gone.
        """
        place = own.clamp(min=0)[:, None]
        weights = self._weights(features).float()[:, : corrections.shape[1]]
        # What goes to the others adds up to so much of the anchor's own values.
        instead = torch.where(own[:, None] < 0, weights.gather(1, place), -(weights * corrections).sum(1, keepdim=True))
        return F.linear(weights.scatter(1, place, instead), self.values.weight[:, : corrections.shape[1]])

    def _weights(self, features: Tensor) -> Tensor:
        return torch.softmax(self.keys(F.normalize(features - self.mean, dim=-1)), dim=-1)

    @torch.no_grad()
    def known(self) -> KnownTexts:
        """Return the directions of the anchors, and the vectors that this head gives them."""
        keys = self.keys.weight[self.keys.weight.any(dim=1)]  # the others are places that no text took
        directions = F.normalize(keys, dim=-1)
        weights = (torch.softmax(self.keys(part), dim=-1) for part in torch.split(directions, _ROWS))
        vectors = torch.cat([F.normalize(self.values(part), dim=-1) for part in weights])
        return KnownTexts(self.mean.detach().clone(), directions, vectors)
