"""The processes of a run (ranks), which share every batch: all that goes from one to another goes through here.

torchrun starts them and tells each its number; `lamplit tune --processes` does the same on one machine. Tensors on the
CPU go through gloo, those on GPUs through nccl.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lamplit.errors import LamplitError, TuneError, UsageError
from lamplit.towers.devices import pick_device
from lamplit.tuning.rank_failures import LostRankError, RankFailures

Made = TypeVar("Made")
# A rank waits while the first reads a large store or measures. One that has died is noticed at once: its socket closes.
_PATIENCE = timedelta(days=1)
_MEETING = timedelta(minutes=30)  # machines of a cluster do not start at once
_A_TRY = timedelta(seconds=2)
_meetings = itertools.count()
_failures: RankFailures | None = None  # of the group that this process has opened


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; one alone sends nothing.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are, W.
        local_rank: number of this process on its machine.
        local_size: how many there are on this machine.
        failures: what those that fail tell the others; None for one alone, or in a process group of the caller's.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    failures: RankFailures | None = field(default=None, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def pick_device(self, device: str | None) -> torch.device:
        """Return the device of this process: each has a GPU of its own.

        Raises:
            UsageError: there is no such device, or there are not enough of them.
        """
        chosen = pick_device(device)
        if self.size == 1 or chosen.type == "cpu":
            return chosen
        if chosen.type != "cuda":
            raise UsageError(f"{self.size} processes cannot share a batch on {chosen.type}; type --device cpu")
        if self.local_size > torch.cuda.device_count():
            raise UsageError(
                f"{self.local_size} processes need as many GPUs, and here are {torch.cuda.device_count()}; start fewer "
                "processes, or type --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def first(self, make: Callable[[], Made]) -> Made:
        """Call `make` in the first process; return what it made, or raise what it raised on purpose, in all of them."""
        if self.size == 1:
            return make()
        said: list[Any] = [None]
        if self.is_first:
            try:
                said = [(make(), None)]
            except (LamplitError, OSError) as error:
                said = [(None, error)]
        with self.talking():
            dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        made, raised = said[0]
        if raised is not None:
            raise raised
        result: Made = made
        return result

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """Call `make` in the first process, then in the others, which find the files that it derived."""
        made: list[Made] = []
        self.first(lambda: made.append(make()))
        return made[0] if self.is_first else make()

    def require_shared(self, folder: Path) -> None:
        """Raise UsageError in all processes if one does not see what the first writes into a folder.

        Another machine may have a folder of the same name with the checkpoints of another run.
        """
        if self.size == 1:
            return
        file = folder / "ranks.txt"
        word = self.first(lambda: _write_word(file))
        sees: list[Any] = [None] * self.size
        with self.talking():
            dist.all_gather_object(sees, file.is_file() and file.read_text(encoding="utf-8") == word)
        self.first(file.unlink)
        if not all(sees):
            raise UsageError(
                f"process {sees.index(False)} of {self.size} does not see what process 0 writes into {folder}; give an "
                "--out on a disk that all machines share"
            )

    def deal(self, lengths: Tensor) -> Tensor:
        """Return the rows of a batch whose texts this process reads: (b,), each row one process's.

        Args:
            lengths: (B,) tokens of each text, B >= W. Every process gets about as many.
        """
        if self.size == 1:
            return torch.arange(len(lengths))
        # Like cards, the longest first, and every other round from the last player to the first.
        order = torch.argsort(lengths, descending=True, stable=True)
        turn = torch.arange(len(lengths))
        player = turn % self.size
        player = torch.where(turn // self.size % 2 == 1, self.size - 1 - player, player)
        return order[player == self.rank]

    def exchange(self, values: Tensor) -> Tensor:
        """Return what the other processes give at the same time: (W - 1, n) of (n,), in the order of the ranks."""
        if self.size == 1:
            return values.new_empty(0, len(values))
        parts = [torch.empty_like(values) for _ in range(self.size)]
        with self.talking():
            dist.all_gather(parts, values.contiguous())
        return torch.stack(parts[: self.rank] + parts[self.rank + 1 :])

    def agree(self, flags: Tensor) -> Tensor:
        """Return which of (B,) flags any process has raised."""
        if self.size == 1:
            return flags
        return flags | self.exchange(flags.to(torch.uint8)).bool().any(0)

    def gather(self, vectors: Tensor, owners: Tensor) -> Tensor:
        """Return the vectors of all processes, (B, D); what is done with them reaches each one's own as a gradient.

        Args:
            vectors: (b, D) of this process, in the order of its rows; what is more than these is left out.
            owners: (B,) the process to which each row belongs, the same in all.
        """
        if self.size == 1:
            return vectors
        gathered: Tensor = _Gathered.apply(vectors, owners, self)
        return gathered

    def merge(self, own: dict[str, str]) -> dict[str, str]:
        """Return what any process has noted."""
        if self.size == 1:
            return own
        notes: list[Any] = [None] * self.size
        with self.talking():
            dist.all_gather_object(notes, own)
        return {name: reason for each in notes for name, reason in each.items()}

    def add_up(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Replace the gradients of all parameters by their sums over the processes; return the sum of the losses."""
        if self.size == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters]
        # A parameter that no process used has no gradient, and the optimizer leaves it alone.
        used = torch.tensor([float(gradient is not None) for gradient in gradients], device=loss.device)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        flat = torch.cat([*(part.flatten().float() for part in parts), used, loss.reshape(1).float()])
        with self.talking():
            dist.all_reduce(flat)
        *sums, used, total = torch.split(flat, [*(part.numel() for part in parts), len(parts), 1])
        for parameter, part, is_used in zip(parameters, sums, used.tolist(), strict=True):
            parameter.grad = part.view(parameter.shape).to(parameter.dtype) if is_used else None
        return total.squeeze()

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Give the values of the first process to all, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            with self.talking():
                dist.broadcast(sent, src=0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)

    def encode(self, encode: Callable[[Sequence[str]], Tensor], texts: Sequence[str], width: int) -> Tensor:
        """Return (M, width) vectors of M texts, of which each process encodes its share."""
        if self.size == 1:
            return encode(texts)
        own = texts[self.rank :: self.size]
        vectors = encode(own) if own else None
        device = torch.device("cpu") if vectors is None else vectors.device
        part = torch.zeros(-(-len(texts) // self.size), width)
        if vectors is not None:
            part[: len(own)] = vectors.cpu()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with self.talking():
            dist.all_gather(parts, part)
        return torch.stack(parts, 1).flatten(0, 1)[: len(texts)].to(device)

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Raise TuneError if another process does not take part: with its own reason, if it has given one."""
        try:
            yield
        except RuntimeError as error:  # gloo's, and torch's DistError
            goes_on = "The same command goes on from the last checkpoint"
            if self.failures is not None and (reason := self.failures.heard()) is not None:
                raise TuneError(f"{reason}. {goes_on}") from error
            raise LostRankError(
                f"another process of this run does not answer: see what it said itself. {goes_on}"
            ) from error


class _Gathered(torch.autograd.Function):
    """Rows of all processes. Each uses all of them, so the gradients of a row are added up where it belongs."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, owners: Tensor, ranks: Ranks) -> Tensor:
        counts = torch.bincount(owners, minlength=ranks.size).tolist()
        own = torch.zeros(max(counts), vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        own[: counts[ranks.rank]] = vectors[: counts[ranks.rank]]
        parts = [torch.empty_like(own) for _ in counts]
        with ranks.talking():
            dist.all_gather(parts, own)
        rows = vectors.new_empty(len(owners), vectors.shape[1])
        for rank, part in enumerate(parts):
            rows[(owners == rank).to(rows.device)] = part[: counts[rank]]
        ctx.ranks, ctx.is_own, ctx.size = ranks, owners == ranks.rank, len(vectors)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        with ctx.ranks.talking():
            dist.all_reduce(total)
        own = total[ctx.is_own.to(total.device)]
        if len(own) < ctx.size:  # a process without a row of its own
            own = torch.cat([own, own.new_zeros(ctx.size - len(own), own.shape[1])])
        return own, None, None


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other processes of this run, if torchrun started this one or the caller has a process group.

    What another than the first process logs is not shown.
    """
    if not is_one_of_several() and not (dist.is_available() and dist.is_initialized()):
        yield Ranks()
        return
    if not dist.is_initialized():
        _open_group()
    failures = None if _failures is None or _failures.has_left else _failures
    rank, size = dist.get_rank(), dist.get_world_size()
    logger = logging.getLogger("lamplit")
    level = logger.level
    if rank > 0:
        logger.setLevel(logging.CRITICAL)
    try:
        local_rank, local_size = (
            int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size))
        )
        with failures or nullcontext():
            yield Ranks(rank, size, local_rank, local_size, failures)
    finally:
        logger.setLevel(level)


def is_one_of_several() -> bool:
    """Tell whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first_process() -> bool:
    """Tell whether this process is the one that prints: the only one, or the first that torchrun started."""
    return not is_one_of_several() or os.environ.get("RANK", "0") == "0"


def _write_word(file: Path) -> str:
    word = secrets.token_hex(8)
    file.write_text(word, encoding="utf-8")
    return word


def _open_group() -> None:
    """Open a group of processes, which serves all runs of this process until one fails."""
    global _failures
    if _failures is not None:
        _failures.end()
    _failures = None  # and with it the store of an earlier group
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    store, rank, size = _meet(f"lamplit {next(_meetings)}")
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    _failures = RankFailures(store, rank, size)
    atexit.register(_close_group)


def _close_group() -> None:
    if _failures is not None:
        _failures.end()
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(key: str) -> tuple[Any, int, int]:
    """Open a store of this start's own; return it with the number of this process, and how many there are.

    That of torchrun keeps what was written before it started all processes again (seen with torch 2.14), and gloo would
    call some that are gone. It tells where the first process of this start has opened a new one.
    """
    open_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    shared, rank, size = next(dist.rendezvous("env://", timeout=_MEETING))  # type: ignore[attr-defined]
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = open_store(host, 0, is_master=True, wait_for_workers=False, timeout=_MEETING)
        shared.set(key, str(store.port))
        # `shared` may be this process's own, and end when it is left.
        store.wait([str(other) for other in range(1, size)], _MEETING)
        return store, rank, size
    while True:
        port = int(shared.get(key))
        try:
            store = open_store(host, port, is_master=False, timeout=_A_TRY)
        except dist.DistError:  # of an earlier start
            time.sleep(_A_TRY.total_seconds() / 10)
        else:
            store.set_timeout(_MEETING)
            store.set(str(rank), "here")
            return store, rank, size
