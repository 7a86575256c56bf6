from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import TORCHRUN, finish, launch, start
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.errors import UsageError
from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
from lamplit.store.lance_store import Store
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.building import build_run
from lamplit.tuning.ranks import Ranks, join_ranks
from lamplit.tuning.settings import TuneSettings

STEP = Path(__file__).parents[1] / "rank_gradients.py"
D = 16


def test_one_process_sends_nothing() -> None:
    with join_ranks() as ranks:
        assert ranks == Ranks()
        assert ranks.first(lambda: 3) == ranks.in_turn(lambda: 3) == 3
        loss = torch.ones(())
        assert ranks.add_up([], loss) is loss
        assert ranks.deal(torch.tensor([5, 9, 2])).tolist() == [0, 1, 2]


def test_more_processes_than_pairs_in_a_batch(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    settings = TuneSettings(f"hf:{text_folder}", batch_size=3)
    with pytest.raises(UsageError, match="4 processes cannot share a batch of 3 pairs; start fewer"):
        build_run(Store(words_path), tmp_path, settings, torch.device("cpu"), ranks=Ranks(0, 4))


@given(lengths=st.lists(st.integers(1, 77), min_size=1, max_size=60), size=st.integers(1, 7))
def test_texts_are_dealt_once_and_evenly(lengths: list[int], size: int) -> None:
    size = min(size, len(lengths))
    dealt = [Ranks(rank, size).deal(torch.tensor(lengths)).tolist() for rank in range(size)]
    assert sorted(itertools.chain(*dealt)) == list(range(len(lengths)))
    counts = [len(rows) for rows in dealt]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(lengths[row] for row in rows) for rows in dealt]
    assert max(tokens) - min(tokens) <= 2 * max(lengths)


# Gradients


def make_case(text_folder: Path, loss: str, count: int, chunk_tokens: int, num_ids: int | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(3, 30, (count,), generator=generator).tolist()
    ids = {} if num_ids is None else {
        name: torch.randint(num_ids, (count,), generator=generator) for name in ("image_ids", "text_ids")
    }  # fmt: skip
    return {
        "text_tower": f"hf:{text_folder}", "loss": loss, "scale": 10.0, "bias": -3.0, "ids": ids,
        "tokens": [torch.randint(5, 90, (length,), generator=generator).tolist() for length in lengths],
        "zimg": F.normalize(torch.randn(count, D, generator=generator), dim=-1),
        "chunk_tokens": chunk_tokens, "memory_budget": 0 if count % 2 else 2**40,
    }  # fmt: skip


def make_cases(text_folder: Path, size: int) -> list[dict[str, Any]]:
    batches = [("softmax", 40), ("softmax", 37), ("sigmoid", 37)]
    cases = [
        make_case(text_folder, loss, count, 60, num_ids)
        for (loss, count), num_ids in itertools.product(batches, (None, 20))
    ]
    for loss in ("softmax", "sigmoid"):  # very uneven slices, in one chunk: one process has all texts but one for each
        case = make_case(text_folder, loss, 11, 10**6, 6)
        cases.append(case | {"own": [*torch.arange(size - 1)[:, None], torch.arange(size - 1, 11)]})
    cases.append(make_case(text_folder, "softmax", size, 60, None))  # the smallest batch there is
    for loss, count, num_ids in (("softmax", 37, 20), ("sigmoid", 36, None), ("softmax", size, None)):  # images, too
        pixels = torch.randn(count, 12, generator=torch.Generator().manual_seed(count))
        cases.append(make_case(text_folder, loss, count, 60, num_ids) | {"pixels": pixels})
    generator = torch.Generator().manual_seed(0)
    tower = open_text_tower(f"hf:{text_folder}", width=D)
    tower.add_lora(3)  # whose second matrices are not zero any more, so that the first ones get gradients
    lora = {
        name: 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in tower.named_parameters() if "lora" in name
    }  # fmt: skip
    cases += [make_case(text_folder, loss, 37, 60, 20) | {"lora": lora} for loss in ("softmax", "sigmoid")]
    return cases


def taken_alone(case: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """The same step as one graph in one process, in float64."""
    torch.manual_seed(0)
    tower = open_text_tower(case["text_tower"], width=D)
    if "lora" in case:
        tower.add_lora(3)
        tower.load_state_dict(case["lora"], strict=False)
    tower = tower.eval().double()
    scale, bias = (torch.tensor(case[name]).double().requires_grad_() for name in ("scale", "bias"))
    ztxt = F.normalize(tower(case["tokens"]), dim=-1)
    zimg, of_images = case["zimg"].double(), {}
    if "pixels" in case:
        images = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, D)).double()
        zimg = F.normalize(images(case["pixels"].double()), dim=-1)
        of_images = {f"images.{name}": value for name, value in images.named_parameters()}
    if case["loss"] == "softmax":
        loss = softmax_loss(zimg, ztxt, scale, **case["ids"])
    else:
        loss = sigmoid_loss(zimg, ztxt, scale, bias, **case["ids"])
    torch.autograd.backward(loss)
    named = {**dict(tower.named_parameters()), **of_images, "scale": scale, "bias": bias}
    return float(loss.detach()), {name: value.grad for name, value in named.items() if value.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradient_is_that_of_one_process(size: int, text_folder: Path, tmp_path: Path) -> None:
    cases = make_cases(text_folder, max(size, 2))
    if size == 1:
        cases = [{name: case[name] for name in case.keys() - {"own"}} for case in cases]
    torch.save(cases, tmp_path / "cases")
    finish(start(size, STEP, tmp_path / "cases", tmp_path / "taken"))
    for case, taken in zip(cases, torch.load(tmp_path / "taken", weights_only=True), strict=True):
        loss, expected = taken_alone(case)
        assert float(taken["loss"]) == pytest.approx(loss, rel=1e-6)
        found = taken["gradients"]
        assert found.keys() == expected.keys()
        far = [(found[name].double() - expected[name]).norm() for name in expected]
        assert torch.stack(far).norm() < 1e-6 * torch.stack([value.norm() for value in expected.values()]).norm()
        assert float(found["scale"]) == pytest.approx(float(expected["scale"]), rel=3e-6)
        assert_little_was_sent(case, taken, size)


def assert_little_was_sent(case: dict[str, Any], taken: dict[str, Any], size: int) -> None:
    """8 bytes a pair with the softmax, 8 more for an image with several positives; and the gradients, once.

    Vectors travel only of an image tower that trains.
    """
    if size == 1:
        assert taken["sent"] == {}
        return
    count = len(case["tokens"])
    same = torch.eye(count, dtype=torch.bool)
    for ids in case["ids"].values():
        same |= ids[:, None] == ids
    shared = int((same.sum(1) > 1).sum())
    sent = {"all_reduce": 4 * (taken["numbers"] + taken["parameters"] + 1)}
    if case["loss"] == "softmax":
        sent["all_gather"] = 8 * (count + shared)
    if "pixels" in case:  # the vectors, and the sum of their gradients
        sent["all_gather"] = sent.get("all_gather", 0) + 4 * D * -(-count // size)
        sent["all_reduce"] += 4 * D * count
    assert taken["sent"] == sent


TWICE = """
import sys
from pathlib import Path

import torch
from lamplit.errors import UsageError
from lamplit.tuning.ranks import join_ranks

both = Path(sys.argv[1])
for run in range(3):
    with join_ranks() as ranks:
        given = ranks.exchange(torch.full((2,), float(ranks.rank + run)))
        assert given.tolist() == [[float(1 - ranks.rank + run)] * 2]
        assert ranks.first(lambda: (run, ranks.rank)) == (run, 0)
        ranks.require_shared(both)
        own = both / str(ranks.rank)
        own.mkdir(exist_ok=True)
        (own / "ranks.txt").write_text("of another run")
        try:
            ranks.require_shared(own)
        except UsageError as error:
            assert "process 1 of 2 does not see what process 0 writes into" in str(error)
        else:
            raise AssertionError
"""


@pytest.mark.slow
def test_processes_of_torchrun_meet_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(TWICE)
    finish([launch(*TORCHRUN, tmp_path / "twice.py", tmp_path)])
