"""Take one step of each case as one of several processes; the first writes the summed gradients, and what was sent.

rank_gradients.py CASES OUT    (CASES and OUT are files of torch.save)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist

from lamplit.losses.shares import sigmoid_share, softmax_share
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.large_batch import Part, backward_in_chunks, cut_texts
from lamplit.tuning.ranks import Ranks, join_ranks


def main(cases_file: str, out: str) -> None:
    cases = torch.load(cases_file, weights_only=True)
    with join_ranks() as ranks:
        sent = watch()
        taken = [step(case, ranks, sent) for case in cases]
        if ranks.is_first:
            torch.save(taken, out)


def step(case: dict[str, Any], ranks: Ranks, sent: dict[str, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    tower = open_text_tower(case["text_tower"], width=case["zimg"].shape[1])
    if "lora" in case:
        tower.add_lora(3)
        tower.load_state_dict(case["lora"], strict=False)
    tower.eval()
    scale, bias = torch.tensor(case["scale"]).requires_grad_(), torch.tensor(case["bias"]).requires_grad_()
    tokens, ids = case["tokens"], case["ids"]
    own = case["own"][ranks.rank] if "own" in case else ranks.deal(torch.tensor([len(text) for text in tokens]))
    part = cut_texts(tower, [tokens[row] for row in own.tolist()], case["chunk_tokens"])
    images, image_parameters = case["zimg"], {}
    if "pixels" in case:
        images, image_parameters = image_part(case, ranks)

    def loss_of(zimg: torch.Tensor, ztxt: torch.Tensor) -> torch.Tensor:
        if case["loss"] == "softmax":
            return softmax_share(zimg, ztxt, own, scale, ranks.exchange, **ids)
        return sigmoid_share(zimg, ztxt, own, scale, bias, **ids)

    sent.clear()
    cpu = torch.device("cpu")
    loss = backward_in_chunks([images, part], loss_of, device=cpu, memory_budget=case["memory_budget"])
    trained = {name: value for name, value in tower.named_parameters() if value.requires_grad}
    parameters = {**trained, **image_parameters, "scale": scale, "bias": bias}
    loss = ranks.add_up(list(parameters.values()), loss)
    gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    numbers = sum(value.numel() for value in parameters.values())
    given, digests = dict(sent), [""] * ranks.size
    values = b"".join(value.numpy().tobytes() for value in gradients.values())
    dist.all_gather_object(digests, blake2b(values).hexdigest())
    assert len(set(digests)) == 1, "all processes take the same step, to the byte"
    return {"loss": loss, "gradients": gradients, "sent": given, "numbers": numbers, "parameters": len(parameters)}


def image_part(case: dict[str, Any], ranks: Ranks) -> tuple[Part, dict[str, torch.Tensor]]:
    """Encode this process's images, every W-th, two at a time; the others' vectors are gathered."""
    pixels, size = case["pixels"], case["zimg"].shape[1]
    tower = torch.nn.Sequential(torch.nn.Linear(pixels.shape[1], 16), torch.nn.GELU(), torch.nn.Linear(16, size))
    mine = pixels[ranks.rank :: ranks.size]
    owners = torch.arange(len(pixels)) % ranks.size
    gather = partial(ranks.gather, owners=owners)
    part = Part(tower, mine.split(2), torch.arange(len(mine)), gather=gather)
    return part, {f"images.{name}": value for name, value in tower.named_parameters()}


def watch() -> dict[str, int]:
    """Count the bytes that this process gives to each kind of collective."""
    sent: dict[str, int] = {}

    def watched(name: str, place: int) -> Callable[..., Any]:
        call = getattr(dist, name)

        def counting(*given: Any, **options: Any) -> Any:
            sent[name] = sent.get(name, 0) + given[place].nbytes
            return call(*given, **options)

        return counting

    for name, place in {"all_gather": 1, "all_reduce": 0, "broadcast": 0}.items():
        setattr(dist, name, watched(name, place))
    return sent


main(*sys.argv[1:])
