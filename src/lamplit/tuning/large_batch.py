"""Gradients of a batch that does not fit into memory, equal to those of one that does.

The loss of a contrastive batch needs all its texts at once, but only their vectors. So the texts are encoded
in chunks, the loss and its gradient on the vectors are taken once, and each chunk is back-propagated on its
own (GradCache, Gao et al. 2021). Chunks whose graphs fit into the memory budget are kept; the others are
encoded a second time, with the same dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_TOKENS = 8192


def backward_in_chunks(
    encode: Callable[[list[list[int]]], Tensor],
    tokens: Sequence[list[int]],
    loss_of: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    chunk_tokens: int = CHUNK_TOKENS,
    memory_budget: int | None = None,
) -> Tensor:
    """Add the gradient of `loss_of(unit vectors of tokens)` to whatever `encode` and `loss_of` depend on.

    Args:
        encode: maps n lists of token ids to (n, D) vectors.
        tokens: B lists of token ids.
        loss_of: maps (B, D) unit vectors to a scalar loss.
        device: where the vectors are.
        chunk_tokens: about how many tokens are encoded at a time.
        memory_budget: bytes of activations that may be kept; by default half of what is free.

    Returns:
        The loss, detached.
    """
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    chunks = [[tokens[i] for i in chunk] for chunk in _cut(order, tokens, chunk_tokens)]
    left = _free_memory(device) // 2 if memory_budget is None else memory_budget
    outputs: list[Tensor] = []
    states: list[Tensor | None] = []  # random state before a chunk that will be encoded again; None if kept
    for chunk in chunks:
        state = _random_state(device)
        saved = _Saved()
        with saved, torch.set_grad_enabled(left > 0):
            outputs.append(encode(chunk))
        left -= saved.num_bytes
        states.append(None if outputs[-1].requires_grad else state)
    vectors = torch.cat([output.detach() for output in outputs]).float().requires_grad_()
    place = torch.empty(len(order), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(order))
    loss = loss_of(F.normalize(vectors, dim=-1)[place.to(device)])
    torch.autograd.backward(loss)
    assert vectors.grad is not None
    after = _random_state(device)
    start = 0
    for index, chunk in enumerate(chunks):
        output = outputs[index]
        outputs[index] = torch.empty(0)  # its graph goes as soon as it is used
        again = states[index]
        if again is not None:
            _set_random_state(device, again)
            output = encode(chunk)
        torch.autograd.backward(output, vectors.grad[start : start + len(chunk)].to(output.dtype))
        start += len(chunk)
    _set_random_state(device, after)
    return loss.detach()


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(self.storages.values())


def _cut(order: list[int], tokens: Sequence[list[int]], chunk_tokens: int) -> list[list[int]]:
    """Cut sorted texts into chunks of about `chunk_tokens` tokens, at least one text each."""
    chunks: list[list[int]] = []
    room = 0
    for i in order:
        if room < len(tokens[i]) or not chunks:
            chunks.append([])
            room = chunk_tokens
        chunks[-1].append(i)
        room -= len(tokens[i])
    return chunks


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
