from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
from lamplit.towers.texts.text_tower import TextTower, open_text_tower
from lamplit.tuning.large_batch import Part, SparseEmbeddings, backward_in_chunks, cut_texts

CPU = torch.device("cpu")
HUGE = 2**50
B, D = 40, 16


class Step:
    """A batch of texts of many lengths, with the tower, scale and bias that its loss depends on."""

    def __init__(self, folder: Path, loss: str = "softmax") -> None:
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.tower: TextTower = open_text_tower(f"hf:{folder}", width=D)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        lengths = torch.randint(3, 30, (B,), generator=generator).tolist()
        self.tokens = [torch.randint(5, 90, (length,), generator=generator).tolist() for length in lengths]
        self.zimg = F.normalize(torch.randn(B, D, generator=generator), dim=-1)
        self.calls: list[list[list[int]]] = []
        self.loss_of: Callable[[Tensor], Tensor] = self._softmax if loss == "softmax" else self._sigmoid

    def _softmax(self, ztxt: Tensor) -> Tensor:
        return softmax_loss(self.zimg, ztxt, self.log_scale.exp())

    def _sigmoid(self, ztxt: Tensor) -> Tensor:
        return sigmoid_loss(self.zimg, ztxt, self.log_scale.exp(), self.bias)

    def encode(self, tokens: list[list[int]]) -> Tensor:
        self.calls.append(tokens)
        vectors: Tensor = self.tower(tokens)
        return vectors

    def plain(self) -> tuple[float, dict[str, Tensor]]:
        """Take the step in one graph."""
        self.clear()
        loss = self.loss_of(F.normalize(self.tower(self.tokens), dim=-1))
        torch.autograd.backward(loss)
        return float(loss.detach()), self.gradients()

    def chunked(self, chunk_tokens: int, memory_budget: int | None) -> tuple[float, dict[str, Tensor]]:
        self.clear()
        part = cut_texts(self.encode, self.tokens, chunk_tokens)
        loss = backward_in_chunks([part], self.loss_of, device=CPU, memory_budget=memory_budget)
        assert not loss.requires_grad
        return float(loss), self.gradients()

    def clear(self) -> None:
        self.calls.clear()
        for parameter in [*self.tower.parameters(), self.log_scale, self.bias]:
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        named = {**dict(self.tower.named_parameters()), "log_scale": self.log_scale, "bias": self.bias}
        return {name: value.grad.clone() for name, value in named.items() if value.grad is not None}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative distance of two gradients over all parameters."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([part[name].double().flatten() for name in expected]) for part in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def steps(text_folder: Path) -> dict[str, Step]:
    return {loss: Step(text_folder, loss) for loss in ("softmax", "sigmoid")}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@given(chunk_tokens=st.integers(1, 900), memory_budget=st.sampled_from([0, 1, 200_000, 1_000_000, HUGE, None]))
@settings(max_examples=15)
def test_gradient_is_the_plain_steps(
    steps: dict[str, Step], loss: str, chunk_tokens: int, memory_budget: int | None
) -> None:
    step = steps[loss]
    step.tower.eval()
    expected_loss, expected = step.plain()
    found_loss, found = step.chunked(chunk_tokens, memory_budget)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert difference(found, expected) < 1e-6
    for scalar in ("log_scale", "bias") if loss == "sigmoid" else ("log_scale",):
        assert float(found[scalar]) == pytest.approx(float(expected[scalar]), rel=2e-6)
    assert ("bias" in found) == (loss == "sigmoid")


@given(
    chunk_tokens=st.integers(20, 400),
    chunk_rows=st.integers(1, B),
    memory_budget=st.sampled_from([0, 1, 200_000, HUGE, None]),
)
@settings(max_examples=15)
def test_gradient_of_two_sides_is_the_plain_steps(
    steps: dict[str, Step], chunk_tokens: int, chunk_rows: int, memory_budget: int | None
) -> None:
    """Where both sides train, each in chunks of its own; the other side may come in any order."""
    step = steps["softmax"]
    step.tower.eval()
    torch.manual_seed(3)
    other, inputs = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, D)), torch.randn(B, 8)
    named = [*other.named_parameters(), ("log_scale", step.log_scale)]

    def loss_of(zimg: Tensor, ztxt: Tensor) -> Tensor:
        return softmax_loss(zimg, ztxt, step.log_scale.exp())

    def taken(part: bool) -> dict[str, Tensor]:
        step.clear()
        other.zero_grad()
        if part:
            order = torch.randperm(B)
            side = Part(other, inputs[order].split(chunk_rows), order)
            texts = cut_texts(step.encode, step.tokens, chunk_tokens)
            backward_in_chunks([side, texts], loss_of, device=CPU, memory_budget=memory_budget)
        else:
            zimg, ztxt = F.normalize(other(inputs), dim=-1), F.normalize(step.tower(step.tokens), dim=-1)
            torch.autograd.backward(loss_of(zimg, ztxt))
        return step.gradients() | {f"other.{name}": p.grad.clone() for name, p in named if p.grad is not None}

    assert difference(taken(True), taken(False)) < 1e-6


def test_side_that_does_not_train_gets_no_gradient(steps: dict[str, Step]) -> None:
    step = steps["softmax"]
    step.clear()
    zimg = step.zimg.clone()
    part = cut_texts(step.encode, step.tokens)
    backward_in_chunks([zimg, part], lambda a, b: softmax_loss(a, b, step.log_scale.exp()), device=CPU)
    assert zimg.grad is None
    assert difference(step.gradients(), step.plain()[1]) < 1e-6


def test_dropout_gradient_of_one_chunk_is_plain(steps: dict[str, Step]) -> None:
    step = steps["softmax"]
    step.tower.train()
    for memory_budget in (0, HUGE):
        torch.manual_seed(5)
        expected = step.plain()[1]
        torch.manual_seed(5)
        assert difference(step.chunked(10**6, memory_budget)[1], expected) < 1e-6
    assert difference(step.plain()[1], expected) > 1e-2, "another draw drops others"


@pytest.mark.parametrize("chunk_tokens", [50, 200])
def test_random_state_with_any_budget(steps: dict[str, Step], chunk_tokens: int) -> None:
    step = steps["softmax"]
    step.tower.train()
    softmax = step.loss_of
    results = []
    for memory_budget in (HUGE, 1, 300_000, 0):
        torch.manual_seed(5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "loss_of", lambda ztxt: softmax(ztxt) + 0 * torch.rand(()))  # a loss may draw, too
            results.append((*step.chunked(chunk_tokens, memory_budget), torch.get_rng_state()))
    for loss, gradients, state in results[1:]:
        assert loss == results[0][0]
        assert difference(gradients, results[0][1]) < 1e-6
        assert torch.equal(state, results[0][2])
    torch.manual_seed(5)
    assert not torch.equal(torch.get_rng_state(), results[0][2]), "dropout drew nothing"


def test_only_what_does_not_fit_is_encoded_twice(steps: dict[str, Step]) -> None:
    step = steps["softmax"]
    step.tower.eval()
    step.chunked(60, HUGE)
    once = list(step.calls)
    assert sorted(text for chunk in once for text in chunk) == sorted(step.tokens)
    assert all(sum(map(len, chunk)) <= 60 for chunk in once)
    lengths = [len(text) for chunk in once for text in chunk]
    assert lengths == sorted(lengths)
    step.chunked(60, 0)
    assert step.calls == once + once
    step.chunked(60, 1)  # it is asked before a chunk whether anything is left, so the first is kept
    assert step.calls == once + once[1:]


def test_text_longer_than_a_chunk_has_one_to_itself(steps: dict[str, Step]) -> None:
    step = steps["softmax"]
    step.tower.eval()
    step.chunked(1, HUGE)
    assert [len(chunk) for chunk in step.calls] == [1] * B


def test_gradient_is_added_to_what_is_there(steps: dict[str, Step]) -> None:
    step = steps["softmax"]
    step.tower.eval()
    once = step.plain()[1]
    part = cut_texts(step.encode, step.tokens, 100)
    backward_in_chunks([part], step.loss_of, device=CPU, memory_budget=0)
    assert difference(step.gradients(), {name: 2 * value for name, value in once.items()}) < 1e-6


class Bag(nn.Module):
    """Texts as the sums of two large tables and a small one."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.letters = nn.Embedding(5000, D, **options), nn.Embedding(90, D)
        self.unused = nn.Embedding(5000, D)
        self.projection = nn.Linear(D, D)

    def forward(self, tokens: list[list[int]]) -> Tensor:
        sums = [self.words(torch.tensor(ids)).sum(0) + self.letters(torch.tensor(ids) % 90).sum(0) for ids in tokens]
        return torch.stack([self.projection(total) for total in sums])


@pytest.mark.parametrize("chunk_tokens", [1, 20, HUGE])
@pytest.mark.parametrize("memory_budget", [0, HUGE])
@pytest.mark.parametrize("counts", [False, True])
def test_sparse_embeddings_leaves_dense_gradients_that_are_the_same(
    chunk_tokens: int, memory_budget: int, counts: bool
) -> None:
    bag = Bag(scale_grad_by_freq=counts)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 5000, (1 + i % 9,), generator=generator).tolist() for i in range(B)]
    zimg = F.normalize(torch.randn(B, D, generator=generator), dim=-1)
    kinds: list[bool] = []
    bag.words.weight.register_post_accumulate_grad_hook(lambda weight: kinds.append(weight.grad.is_sparse))

    def gradients() -> dict[str, Tensor]:
        bag.zero_grad()
        part = cut_texts(bag, tokens, chunk_tokens)
        backward_in_chunks(
            [part], lambda ztxt: softmax_loss(zimg, ztxt, torch.tensor(10.0)), device=CPU, memory_budget=memory_budget
        )
        return {name: weight.grad for name, weight in bag.named_parameters() if weight.grad is not None}

    dense = gradients()
    kinds.clear()
    with SparseEmbeddings(bag):
        gradients()
        assert all(kind != counts for kind in kinds)
    found = {name: weight.grad for name, weight in bag.named_parameters() if weight.grad is not None}
    assert "unused.weight" not in found
    assert not any(gradient.is_sparse for gradient in found.values())
    assert difference(found, dense) < 1e-6
    assert not any(table.sparse for table in (bag.words, bag.letters, bag.unused))


def test_sparse_embeddings_are_those_of_the_last_step_alone() -> None:
    bag = Bag()
    embeddings = SparseEmbeddings(bag)
    for tokens in ([1, 2, 3], [3, 4]):
        bag.zero_grad()
        with embeddings:
            bag([tokens]).sum().backward()
        bag.words.weight.grad.mul_(0.5)  # as clipping does, in place
    found = 2 * bag.words.weight.grad
    bag.zero_grad()
    bag([[3, 4]]).sum().backward()
    torch.testing.assert_close(found, bag.words.weight.grad)


def test_sparse_embeddings_of_a_tower_go_on_from_gradients_that_are_there() -> None:
    bag = Bag()
    for scale in (1.0, 2.0):
        (bag([[1, 2, 3]]).sum() * scale).backward()
    expected = bag.words.weight.grad
    bag.zero_grad()
    bag([[1, 2, 3]]).sum().backward()
    with SparseEmbeddings(bag):
        (bag([[1, 2, 3]]).sum() * 2).backward()
    torch.testing.assert_close(bag.words.weight.grad, expected)
