"""A text head of two layers, as other libraries train it: BERT's pooler with a projection, or open_clip's `mlp`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Activation = Literal["gelu", "tanh"]
_MODULES = {"gelu": nn.GELU, "tanh": nn.Tanh}


class LayeredHead(nn.Module):
    """Maps (B, H) features of texts to (B, D) vectors by two linear layers with an activation between them."""

    def __init__(self, in_features: int, out_features: int, hidden_width: int, activation: Activation) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.hidden_width, self.activation = hidden_width, activation
        self.first = nn.Linear(in_features, hidden_width)
        self.between = _MODULES[activation]()
        self.last = nn.Linear(hidden_width, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, D) vectors of (B, H) features."""
        vectors: Tensor = self.last(self.between(self.first(features)))
        return vectors

    def layers(self) -> list[tuple[nn.Linear, nn.Module]]:
        """Return each layer with the activation after it."""
        return [(self.first, self.between), (self.last, nn.Identity())]


def copy_linear(layer: nn.Linear) -> nn.Linear:
    """Return a copy that has a bias, which is zero if the layer has none."""
    copy = nn.Linear(layer.in_features, layer.out_features)
    copy.weight.data.copy_(layer.weight.detach())
    copy.bias.data.zero_()
    if layer.bias is not None:
        copy.bias.data.copy_(layer.bias.detach())
    return copy


def layer_up(first: nn.Linear, activation: Activation, last: nn.Linear) -> LayeredHead:
    """Make a head of two layers with the weights of these."""
    head = LayeredHead(first.in_features, last.out_features, first.out_features, activation)
    head.first, head.last = copy_linear(first), copy_linear(last)
    return head
