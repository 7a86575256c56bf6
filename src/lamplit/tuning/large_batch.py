"""Compute the gradients of a batch that does not fit into memory, equal to those of one that does.

The loss of a contrastive batch needs all its vectors at once, but only the vectors. So each side is encoded in
chunks, the loss and its gradient on the vectors are taken once, and each chunk is back-propagated on its own
(GradCache, Gao et al. 2021). Chunks whose graphs fit into the memory budget are kept; the others are encoded a
second time, with the same dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.towers.devices import random_states, set_random_states

CHUNK_TOKENS = 8192
_LARGE_TABLE = 4096  # rows of an embedding from which a gradient of all rows costs more than one of those that are used


@dataclass(frozen=True)
class Part:
    """The side of a batch that trains, cut into chunks that are encoded one at a time.

    Attributes:
        encode: maps a chunk to (n, D) vectors.
        chunks: what `encode` takes.
        order: (B,) the row of the batch that each vector belongs to, in the order of the chunks.
        again: maps a chunk to its vectors a second time; `encode` does if this is None.
        gather: maps (B, D) unit vectors to those of a larger batch, of which this is one process's part; None if it is
            the whole.
    """

    encode: Callable[[Any], Tensor]
    chunks: Sequence[Any]
    order: Tensor
    again: Callable[[Any], Tensor] | None = None
    gather: Callable[[Tensor], Tensor] | None = None


def cut_texts(
    encode: Callable[[list[list[int]]], Tensor], tokens: Sequence[list[int]], chunk_tokens: int = CHUNK_TOKENS
) -> Part:
    """Cut B lists of token ids, sorted by length, into chunks of about `chunk_tokens` tokens."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    chunks: list[list[list[int]]] = []
    room = 0
    for i in order:
        if room < len(tokens[i]) or not chunks:
            chunks.append([])
            room = chunk_tokens
        chunks[-1].append(tokens[i])
        room -= len(tokens[i])
    return Part(encode, chunks, torch.tensor(order))


def backward_in_chunks(
    sides: Sequence[Part | Tensor],
    loss_of: Callable[..., Tensor],
    *,
    device: torch.device,
    memory_budget: int | None = None,
    sharers: int = 1,
) -> Tensor:
    """Add the gradient of `loss_of(unit vectors of each side)` to all parameters of `encode` and `loss_of`.

    Args:
        sides: for each a part to encode, or (B, D) unit vectors if it does not train.
        loss_of: maps (B, D) unit vectors of every side to a scalar loss.
        device: where the vectors are.
        memory_budget: bytes of activations that may be kept; by default half of what is free.
        sharers: how many processes share that half.

    Returns:
        The loss, detached.
    """
    left = _free_memory(device) // (2 * sharers) if memory_budget is None else memory_budget
    encoded: dict[int, _Encoded] = {}
    for number, side in enumerate(sides):
        if isinstance(side, Part):
            encoded[number] = _Encoded(side, device, left)
            left -= encoded[number].num_bytes
    vectors = [encoded[number].rows() if number in encoded else side for number, side in enumerate(sides)]
    loss = loss_of(*vectors)
    torch.autograd.backward(loss)
    after = _random_state(device)
    for part in encoded.values():
        part.backward()
    _set_random_state(device, after)
    return loss.detach()


class SparseEmbeddings:
    """Lets large embeddings of a module collect the gradients of a step row by row; at the end they are as ever.

    A batch uses a few thousand rows of a table of tens of thousands, in several forward passes, and each of these would
    write and add a gradient as large as the table. The sums are the same but for the order of the additions. Only
    on a CPU: elsewhere memory is fast, and MPS has no sparse tensors. The memory of the gradients is used again in
    the next step.

    Example:
        >>> embeddings = SparseEmbeddings(tower)
        >>> with embeddings:
        ...     loss = backward_in_chunks([zimg, cut_texts(tower, tokens)], loss_of, device=tower.device)
    """

    def __init__(self, module: nn.Module) -> None:
        self.tables = [table for table in module.modules() if isinstance(table, nn.Embedding) and _gains(table)]
        self.dense: dict[nn.Embedding, Tensor] = {}

    def __enter__(self) -> None:
        for table in self.tables:
            table.sparse = True

    def __exit__(self, *_: object) -> None:
        for table in self.tables:
            table.sparse = False
            if table.weight.grad is not None and table.weight.grad.is_sparse:
                if table not in self.dense:
                    self.dense[table] = torch.empty_like(table.weight, requires_grad=False)
                table.weight.grad = self.dense[table].zero_().add_(table.weight.grad)


def _gains(table: nn.Embedding) -> bool:
    counts_rows = table.scale_grad_by_freq  # torch does that with dense gradients alone
    on_cpu = table.weight.device.type == "cpu"
    return table.num_embeddings >= _LARGE_TABLE and on_cpu and not table.sparse and not counts_rows


class _Encoded:
    """The vectors of a part, and what their backward pass needs."""

    def __init__(self, part: Part, device: torch.device, memory_budget: int) -> None:
        self.part, self.device, self.num_bytes = part, device, 0
        self.outputs: list[Tensor] = []
        self.states: list[Tensor | None] = []  # random state before a chunk that is encoded again; None if kept
        for chunk in part.chunks:
            state = _random_state(device)
            keeps = self.num_bytes < memory_budget
            saved = _Saved()
            with saved, torch.set_grad_enabled(keeps):
                self.outputs.append(part.encode(chunk))
            self.num_bytes += saved.num_bytes
            self.states.append(None if keeps else state)
        self.leaf = torch.cat([output.detach() for output in self.outputs]).float().requires_grad_()

    def rows(self) -> Tensor:
        """Return (B, D) unit vectors in the order of the batch, those of other processes with them."""
        index = torch.empty_like(self.part.order)
        index[self.part.order] = torch.arange(len(index))
        rows = F.normalize(self.leaf, dim=-1)[index.to(self.device)]
        return rows if self.part.gather is None else self.part.gather(rows)

    def backward(self) -> None:
        """Back-propagate the gradient on the vectors into the encoder."""
        assert self.leaf.grad is not None
        gradients = torch.split(self.leaf.grad, [len(output) for output in self.outputs])
        for index, gradient in enumerate(gradients):
            output = self.outputs[index]
            self.outputs[index] = torch.empty(0)  # its graph goes as soon as it is used
            state = self.states[index]
            if state is not None:
                _set_random_state(self.device, state)
                output = (self.part.again or self.part.encode)(self.part.chunks[index])
            torch.autograd.backward(output, gradient.to(output.dtype))


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


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        # What torch has taken for tensors that are gone is free to it, though the driver counts it as taken.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)


def _random_state(device: torch.device) -> Tensor:
    return random_states(device)[device.type]


def _set_random_state(device: torch.device, state: Tensor) -> None:
    set_random_states(device, {device.type: state})
