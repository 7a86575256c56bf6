from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lamplit.errors import UsageError
from lamplit.losses import tiles
from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
from lamplit.losses.shares import sigmoid_share, softmax_share

LOSSES = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])


class Meeting:
    """Ranks that are threads: each gives its values and gets those of the others."""

    def __init__(self, size: int) -> None:
        self.given: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.numbers: list[int] = []

    def exchange(self, rank: int) -> Callable[[Tensor], Tensor]:
        def swap(values: Tensor) -> Tensor:
            self.given[rank] = values.clone()
            self.numbers.append(values.nbytes)
            self.barrier.wait()
            others = [each for place, each in enumerate(self.given) if place != rank and each is not None]
            return torch.stack(others) if others else values.new_empty(0, len(values))

        return swap


def pairs(count: int, width: int, seed: int, similarity: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    zimg, noise = F.normalize(torch.randn(2, count, width, dtype=torch.float64, generator=generator), dim=-1)
    return zimg, F.normalize(noise + similarity * zimg, dim=1)


def whole(
    kind: str, zimg: Tensor, ztxt: Tensor, scale: float, bias: float, dtype: torch.dtype, **ids: Any
) -> list[Tensor]:
    """The loss of one process, and its gradients by images, texts, scale and bias."""
    given = [x.to(dtype).clone().requires_grad_() for x in (zimg, ztxt, torch.tensor(scale), torch.tensor(bias))]
    loss = softmax_loss(*given[:3], **ids) if kind == "softmax" else sigmoid_loss(*given, **ids)
    torch.autograd.backward(loss)
    return [loss.detach(), *(x.grad for x in given if x.grad is not None)]


def shared(
    kind: str,
    ranks: list[Tensor],
    zimg: Tensor,
    ztxt: Tensor,
    scale: float,
    bias: float,
    dtype: torch.dtype,
    **ids: Any,
) -> tuple[list[Tensor], Meeting]:
    """The same as the sum of the shares of ranks, each with the rows of its texts."""
    meeting = Meeting(len(ranks))

    def share(rank: int) -> list[Tensor]:
        rows = ranks[rank]
        given = [
            x.to(dtype).clone().requires_grad_() for x in (zimg, ztxt[rows], torch.tensor(scale), torch.tensor(bias))
        ]
        if kind == "softmax":
            loss = softmax_share(given[0], given[1], rows, given[2], meeting.exchange(rank), **ids)
        else:
            loss = sigmoid_share(given[0], given[1], rows, *given[2:], **ids)
        torch.autograd.backward(loss)
        return [loss.detach(), *(x.grad for x in given if x.grad is not None)]

    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(share, range(len(ranks))))
    texts = torch.empty_like(ztxt, dtype=dtype)
    for rows, (_, _, of_texts, *_) in zip(ranks, found, strict=True):
        texts[rows] = of_texts
    total = [torch.stack(parts).sum(0) for parts in zip(*(f[:2] + f[3:] for f in found), strict=True)]
    return [*total[:2], texts, *total[2:]], meeting


def error(found: Tensor, expected: Tensor) -> float:
    size = max(float(expected.norm()), 1e-3)
    return float((found.double() - expected.double()).norm()) / size


@st.composite
def dealt(draw: st.DrawFn, count: int) -> list[Tensor]:
    """Rows of a batch among 1 to 4 ranks, any number each and in any order, at least one."""
    order = draw(st.permutations(range(count)), label="order")
    size = draw(st.integers(1, min(4, count)), label="ranks")
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), min_size=size - 1, max_size=size - 1))) if size > 1 else []
    return [torch.tensor(order[a:b]) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


@LOSSES
@settings(max_examples=60)
@given(data=st.data())
def test_shares_add_up_to_the_loss(kind: str, data: st.DataObject) -> None:
    count, width = data.draw(st.integers(1, 23), label="B"), data.draw(st.integers(1, 9), label="D")
    scale = data.draw(st.sampled_from([0.0, 1.0, 10.0, 80.0, 300.0, 2000.0]), label="scale")
    bias = data.draw(st.sampled_from([-10.0, 0.0, 90.0]), label="bias")
    ids = st.none() | st.lists(st.integers(0, count), min_size=count, max_size=count).map(torch.tensor)
    given_ids = {name: data.draw(ids, label=name) for name in ("image_ids", "text_ids")}
    zimg, ztxt = pairs(count, width, data.draw(st.integers(0, 99), label="seed"))
    ranks = data.draw(dealt(count), label="ranks")
    side = data.draw(st.sampled_from([2, 6, 8, 512]), label="tile")
    before, tiles._CPU_SIDE = tiles._CPU_SIDE, side
    try:
        expected = whole(kind, zimg, ztxt, scale, bias, torch.float64, **given_ids)
        found, _ = shared(kind, ranks, zimg, ztxt, scale, bias, torch.float64, **given_ids)
    finally:
        tiles._CPU_SIDE = before
    for value, wanted in zip(found, expected, strict=True):
        assert error(value, wanted) < 1e-11


@LOSSES
@pytest.mark.parametrize("num_ids", [None, 150])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_float32_is_as_good_as_of_one_process(kind: str, num_ids: int | None, size: int, scale: float) -> None:
    count = 331
    zimg, ztxt = pairs(count, 32, 0)
    generator = torch.Generator().manual_seed(0)
    ids = {} if num_ids is None else {
        name: torch.randint(num_ids, (count,), generator=generator) for name in ("image_ids", "text_ids")
    }  # fmt: skip
    order = torch.randperm(count, generator=generator)
    cuts = {2: [100], 3: [10, 110], 4: [1, 10, 110]}[size]
    ranks = list(torch.tensor_split(order, cuts))
    narrow = [x.float() for x in (zimg, ztxt)]  # rounding the vectors is no error of the loss
    expected = whole(kind, *(x.double() for x in narrow), scale, -5.0, torch.float64, **ids)
    found, _ = shared(kind, ranks, *narrow, scale, -5.0, torch.float32, **ids)
    alone = whole(kind, *narrow, scale, -5.0, torch.float32, **ids)
    for value, wanted, of_one in zip(found, expected, alone, strict=True):
        assert error(value, wanted) < max(1e-6, 2 * error(of_one, wanted))


def test_small_losses_keep_their_digits() -> None:
    """A model that is nearly perfect: each image's own text is at one rank, all others are e^-90 of it."""
    zimg = torch.eye(6, dtype=torch.float64)
    expected = whole("softmax", zimg, zimg, 90.0, 0.0, torch.float64)
    assert 0 < float(expected[0]) < 1e-38
    found, _ = shared(
        "softmax", [torch.tensor([0, 3]), torch.tensor([5, 1, 2, 4])], zimg, zimg, 90.0, 0.0, torch.float64
    )
    for value, wanted in zip(found, expected, strict=True):
        assert torch.allclose(value, wanted, rtol=1e-12, atol=0)


def test_a_number_an_image_is_exchanged() -> None:
    zimg, ztxt = pairs(12, 4, 0)
    ranks = [torch.arange(5), torch.arange(5, 12)]
    _, meeting = shared("softmax", ranks, zimg, ztxt, 10.0, 0.0, torch.float32)
    assert meeting.numbers == [12 * 8] * 2
    image_ids = torch.tensor([0, 0, 0, *range(1, 10)])
    _, meeting = shared("softmax", ranks, zimg, ztxt, 10.0, 0.0, torch.float32, image_ids=image_ids)
    assert meeting.numbers == [15 * 8] * 2, "and one more for each image with several positives"
    _, meeting = shared("sigmoid", ranks, zimg, ztxt, 10.0, 0.0, torch.float32, image_ids=image_ids)
    assert meeting.numbers == []


@pytest.mark.parametrize(("images", "texts"), [((4, 3), (0, 3)), ((4, 3), (5, 3)), ((4, 3), (2, 2)), ((4,), (4,))])
def test_shapes_that_do_not_fit(images: tuple[int, ...], texts: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"some of the texts of all images: \(B, D\) and \(b, D\), 0 < b <= B"):
        sigmoid_share(torch.ones(images), torch.ones(texts), torch.arange(texts[0]), torch.ones(()), torch.ones(()))
