from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from lamplit.errors import UsageError
from lamplit.losses import contrastive as losses
from lamplit.losses import positives as shared
from lamplit.losses import tiles
from lamplit.losses.contrastive import sigmoid_loss, softmax_loss

LOSSES = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])


@pytest.fixture(params=[6, 512], ids=["tiny tiles", "default tiles"])
def tile_side(request, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_SIDE", request.param)


@pytest.fixture(autouse=True)
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def unit_rows(count, width, seed=0, dtype=torch.float64):
    rows = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1).to(dtype)


def pairs(count, width, seed=0, similarity=1.0):
    """Images and texts whose true pairs are more or less alike."""
    zimg = unit_rows(count, width, seed)
    return zimg, F.normalize(unit_rows(count, width, seed + 1) + similarity * zimg, dim=1)


def positives(count, image_ids, text_ids):
    mask = torch.eye(count, dtype=torch.bool)
    for ids in (image_ids, text_ids):
        if ids is not None:
            mask |= ids[:, None] == ids[None, :]
    return mask


def slow_softmax_loss(zimg, ztxt, scale, bias=None, image_ids=None, text_ids=None):
    logits = scale * zimg @ ztxt.T
    targets = positives(len(zimg), image_ids, text_ids).to(logits.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    rows = -(targets * logits.log_softmax(1)).sum(1)
    columns = -(targets * logits.T.log_softmax(1)).sum(1)
    return (0.5 * (rows + columns)).mean()


def exact_softmax_loss(zimg, ztxt, scale, bias=None):
    """The same without ids, without a loss of digits where the loss is less than float64 can add to 1."""
    logits = scale * zimg @ ztxt.T
    others = logits - logits.diagonal()[:, None], logits.T - logits.diagonal()[:, None]
    off_diagonal = 1 - torch.eye(len(zimg), dtype=logits.dtype)
    return sum((x.exp() * off_diagonal).sum(1).log1p().mean() for x in others) / 2


def exact_shared_loss(zimg, ztxt, scale, bias=None, image_ids=None, text_ids=None):
    """The softmax loss with ids, from differences to the pairs' own logits."""
    logits = scale * zimg @ ztxt.T
    targets = positives(len(zimg), image_ids, text_ids).to(logits.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    above_own = logits - logits.diagonal()[:, None], logits.T - logits.diagonal()[:, None]
    return sum((x.logsumexp(1) - (targets * x).sum(1)).mean() for x in above_own) / 2


def slow_sigmoid_loss(zimg, ztxt, scale, bias, image_ids=None, text_ids=None):
    logits = scale * zimg @ ztxt.T + bias
    signs = torch.where(positives(len(zimg), image_ids, text_ids), 1.0, -1.0)
    return -F.logsigmoid(signs * logits).sum(1).mean()


def fast_softmax_loss(zimg, ztxt, scale, bias=None, image_ids=None, text_ids=None):
    return softmax_loss(zimg, ztxt, scale, image_ids=image_ids, text_ids=text_ids)


def fast_sigmoid_loss(zimg, ztxt, scale, bias, image_ids=None, text_ids=None):
    return sigmoid_loss(zimg, ztxt, scale, bias, image_ids=image_ids, text_ids=text_ids)


FAST = {"softmax": fast_softmax_loss, "sigmoid": fast_sigmoid_loss}
SLOW = {"softmax": slow_softmax_loss, "sigmoid": slow_sigmoid_loss}


def run(function, zimg, ztxt, scale, bias=-3.0, train="zimg ztxt scale bias", dtype=torch.float64, **ids):
    """The loss and its gradients by name, as float64."""
    inputs = {"zimg": zimg.to(dtype), "ztxt": ztxt.to(dtype)}
    inputs |= {"scale": torch.tensor(scale, dtype=dtype), "bias": torch.tensor(bias, dtype=dtype)}
    inputs = {name: x.clone().requires_grad_(name in train.split()) for name, x in inputs.items()}
    loss = function(*inputs.values(), **ids)
    loss.backward()
    return loss.detach().double(), {k: x.grad.double() for k, x in inputs.items() if x.grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def assert_agree(actual, expected, tolerance):
    assert actual[1].keys() == expected[1].keys()
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    for name, gradient in expected[1].items():
        size = max(float(gradient.norm()), 1e-3)
        assert float((actual[1][name] - gradient).norm()) <= tolerance * size, name


@LOSSES
@settings(max_examples=60)
@given(data=st.data())
def test_as_the_slow_loss(kind, data):
    count = data.draw(st.integers(1, 23), label="B")
    width = data.draw(st.integers(1, 9), label="D")
    scale = data.draw(st.sampled_from([0.0, 1.0, 10.0, 80.0, 300.0]), label="scale")
    bias = data.draw(st.sampled_from([-10.0, 0.0, 90.0]), label="bias")
    train = data.draw(st.sampled_from(["ztxt scale", "zimg", "zimg ztxt", "scale", "zimg ztxt scale"]))
    train += " bias" if kind == "sigmoid" else ""
    ids = st.none() | st.lists(st.integers(0, count), min_size=count, max_size=count).map(torch.tensor)
    ids = {name: data.draw(ids, label=name) for name in ("image_ids", "text_ids")}
    zimg, ztxt = pairs(count, width, data.draw(st.integers(0, 99), label="seed"))
    side = data.draw(st.sampled_from([2, 6, 8, 16, 512]), label="tile")
    threads = data.draw(st.sampled_from([1, 2]), label="threads")
    before = tiles._CPU_SIDE, torch.get_num_threads()
    tiles._CPU_SIDE = side
    torch.set_num_threads(threads)
    try:
        fast = run(FAST[kind], zimg, ztxt, scale, bias, train, **ids)
    finally:
        tiles._CPU_SIDE = before[0]
        torch.set_num_threads(before[1])
    assert_agree(fast, run(SLOW[kind], zimg, ztxt, scale, bias, train, **ids), 1e-10)


def test_softmax_is_open_clips():
    zimg, ztxt = pairs(700, 32)

    def peer(zimg, ztxt, scale, bias):
        return ClipLoss()(zimg, ztxt, scale)

    for train in ("ztxt scale", "zimg ztxt scale"):
        expected = run(peer, zimg, ztxt, 50.0, train=train)
        assert_agree(run(fast_softmax_loss, zimg, ztxt, 50.0, train=train), expected, 1e-12)
        single = run(fast_softmax_loss, zimg, ztxt, 50.0, train=train, dtype=torch.float32)
        assert_agree(single, expected, 2e-6)


def test_sigmoid_is_open_clips():
    zimg, ztxt = pairs(700, 32)
    expected = run(SigLipLoss(), zimg, ztxt, 10.0, -10.0)
    assert_agree(run(fast_sigmoid_loss, zimg, ztxt, 10.0, -10.0), expected, 1e-12)
    assert_agree(run(fast_sigmoid_loss, zimg, ztxt, 10.0, -10.0, dtype=torch.float32), expected, 2e-6)


@LOSSES
@pytest.mark.usefixtures("tile_side")
def test_gradcheck(kind):
    zimg, ztxt = (rows.requires_grad_() for rows in pairs(7, 4))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, -2.0))
    ids = {"image_ids": torch.tensor([0, 1, 1, 2, 3, 4, 0]), "text_ids": torch.tensor([5, 6, 7, 7, 8, 9, 5])}
    for chosen in ({}, ids):
        assert torch.autograd.gradcheck(lambda *x: FAST[kind](*x, **chosen), (zimg, ztxt, scale, bias))  # noqa: B023


@pytest.mark.parametrize("scale", [10.0, 70.0, 100.0])
@pytest.mark.parametrize("similarity", [0.0, 1.0, 4.0], ids=["untrained", "trained", "nearly perfect"])
def test_float32_gradients_are_exact(scale, similarity):
    zimg, ztxt = (rows.float() for rows in pairs(1100, 256, similarity=similarity))
    train = "zimg ztxt scale"
    expected = run(exact_softmax_loss, zimg.double(), ztxt.double(), scale, train=train)
    actual = run(fast_softmax_loss, zimg, ztxt, scale, train=train, dtype=torch.float32)
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=1e-5, abs=0)
    for name in expected[1]:
        # A power of a float32 logit is known to about scale * 1e-7, its largest and most exact ones apart.
        assert relative_error(actual[1][name], expected[1][name]) <= max(2e-6, scale * 1e-7), name


@pytest.mark.parametrize("bias", [-10.0, 0.0, 30.0])
def test_float32_sigmoid_gradients_are_exact(bias):
    zimg, ztxt = (rows.float() for rows in pairs(1100, 256))
    expected = run(slow_sigmoid_loss, zimg.double(), ztxt.double(), 20.0, bias)
    actual = run(fast_sigmoid_loss, zimg, ztxt, 20.0, bias, dtype=torch.float32)
    assert_agree(actual, expected, 2e-6)


def test_small_losses_keep_their_digits():
    # Orthogonal pairs at scale 25: the true loss is log(1 + 63 * exp(-25)) = 8.7e-10, far below the
    # resolution of a log-sum of 25 in float32.
    rows = torch.eye(64)
    loss, gradients = run(fast_softmax_loss, rows, rows, 25.0, train="ztxt scale", dtype=torch.float32)
    assert float(loss) == pytest.approx(math.log1p(63 * math.exp(-25)), rel=1e-6)
    expected = run(slow_softmax_loss, rows, rows, 25.0, train="ztxt scale")[1]
    assert relative_error(gradients["ztxt"], expected["ztxt"]) < 1e-6
    assert relative_error(gradients["scale"], expected["scale"]) < 1e-5


SHARED = {
    "none": {},
    "image": {"image_ids": torch.arange(150) // 3},
    "text": {"text_ids": torch.arange(150) % 60},
    "both": {"image_ids": torch.arange(150) // 3, "text_ids": torch.arange(150) % 60},
}


@pytest.mark.parametrize("ids", SHARED.values(), ids=list(SHARED))
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0, 300.0])
@pytest.mark.parametrize("similarity", [0.0, 1.0, 8.0, 100.0])
def test_float32_is_exact_with_shared_images_and_texts(ids, scale, similarity):
    zimg = unit_rows(150, 32)[ids.get("image_ids", torch.arange(150))]
    zimg, ztxt = zimg.float(), F.normalize(unit_rows(150, 32, 1) + similarity * zimg, dim=1).float()
    train = "zimg ztxt"
    for function, exact in ((fast_softmax_loss, exact_shared_loss), (fast_sigmoid_loss, slow_sigmoid_loss)):
        if exact is exact_shared_loss and not ids:  # where the loss is less than float64 can add to 1
            exact = exact_softmax_loss
        expected = run(exact, zimg.double(), ztxt.double(), scale, -0.6 * scale, train, **ids)
        actual = run(function, zimg, ztxt, scale, -0.6 * scale, train, torch.float32, **ids)
        # A negative's float32 logit is known to about scale * 1e-7, and so is a loss that is nothing but negatives.
        tolerance = max(2e-6, scale * 2e-7)
        assert float(actual[0]) == pytest.approx(float(expected[0]), rel=tolerance, abs=1e-37)  # float32 ends there
        for name, gradient in expected[1].items():
            error = float((actual[1][name] - gradient).norm())
            assert error <= tolerance * float(gradient.norm()) + 1e-36, (function, name)


@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_a_loss_of_nothing_is_nothing_with_shared_ids(scale):
    rows = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    ids = torch.tensor([0, 0, 1, 1])
    for chosen in ({"image_ids": ids}, {"text_ids": ids}, {"image_ids": ids, "text_ids": ids}):
        loss, gradients = run(fast_sigmoid_loss, rows, rows, scale, dtype=torch.float32, **chosen)
        assert float(loss) < 1e-30
        assert float(gradients["ztxt"].abs().max()) < 1e-30
        loss, gradients = run(fast_softmax_loss, rows, rows, scale, dtype=torch.float32, **chosen)
        assert float(loss) == pytest.approx(math.log(2), rel=1e-7)  # two positives share the target
        assert float(gradients["ztxt"].abs().max()) < 1e-30


def test_a_few_shared_rows_among_many_keep_their_digits():
    # All but one pair are alone: the loss is that pair's log(2), over 500 rows.
    rows = torch.eye(500)
    rows[1] = rows[0]
    ids = torch.arange(500)
    ids[1] = 0
    loss, _ = run(fast_softmax_loss, rows, rows, 300.0, dtype=torch.float32, text_ids=ids)
    assert float(loss) == pytest.approx(2 * math.log(2) / 500, rel=1e-6)


@LOSSES
def test_how_positives_are_found_changes_nothing(kind, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_SIDE", 64)
    zimg, ztxt = pairs(300, 16)
    ids = {"image_ids": torch.arange(300) // 4, "text_ids": torch.arange(300) % 70}
    expected = run(SLOW[kind], zimg, ztxt, 30.0, **ids)
    results = []
    for dense, kept in ((0, 0), (2, 0), (2, 200), (2, 2**20)):
        monkeypatch.setattr(shared, "_DENSE", dense)
        monkeypatch.setattr(shared, "_KEPT", kept)
        results.append(run(FAST[kind], zimg, ztxt, 30.0, dtype=torch.float64, **ids))
        assert_agree(results[-1], expected, 1e-12)
    for result in results[2:]:  # what is kept is what would be found again
        assert torch.equal(result[0], results[1][0])
        assert all(torch.equal(result[1][name], results[1][1][name]) for name in result[1])


def adversarial():
    rows, other = unit_rows(40, 16), unit_rows(40, 16, 1)
    same = rows[:1].expand(40, -1)
    signs = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[:, None]
    return {
        "pairs opposed": (rows, -rows),
        "pairs opposed, all else alike": (same * signs, -same * signs),
        "all alike": (same, same),
        "all opposed": (same, -same),
        "one image": (same, other),
        "perfect": (rows, rows),
        "halves far apart": (torch.cat([same[:20], -same[:20]]), torch.cat([-same[:20], same[:20]])),
    }


@pytest.mark.parametrize("case", adversarial())
@pytest.mark.parametrize("scale", [100.0, 1000.0, -100.0])
@pytest.mark.usefixtures("tile_side")
@LOSSES
def test_adversarial_pairs(kind, scale, case):
    zimg, ztxt = (rows.float() for rows in adversarial()[case])
    ids = {"image_ids": torch.arange(40) // 3, "text_ids": torch.arange(40) % 9}
    for chosen in ({}, ids):
        expected = run(SLOW[kind], zimg.double(), ztxt.double(), scale, **chosen)
        actual = run(FAST[kind], zimg, ztxt, scale, dtype=torch.float32, **chosen)
        # A float32 logit of 1000 is known to 6e-5.
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5 + abs(scale) * 1e-7)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(actual[1][name], gradient, rtol=2e-4, atol=2e-4, msg=name)


def test_nan_is_not_hidden():
    zimg, ztxt = pairs(6, 4)
    ztxt[2, 1] = math.nan
    for kind in FAST:
        loss, gradients = run(FAST[kind], zimg, ztxt, 10.0)
        assert loss.isnan()
        assert gradients["ztxt"].isnan().any()


@LOSSES
def test_unique_ids_change_nothing(kind):
    zimg, ztxt = pairs(300, 16)
    ids = {"image_ids": torch.randperm(300), "text_ids": -torch.randperm(300) - 5}
    plain, with_ids = (run(FAST[kind], zimg, ztxt, 20.0, dtype=torch.float32, **x) for x in ({}, ids))
    assert torch.equal(plain[0], with_ids[0])
    assert all(torch.equal(plain[1][name], with_ids[1][name]) for name in plain[1])


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [64, 2048])
def test_the_same_bytes_whatever_the_threads(kind, dtype, side, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_SIDE", side)
    zimg, ztxt = pairs(1000, 48)
    ids = {"image_ids": torch.arange(1000) // 2, "text_ids": torch.arange(1000) % 900}
    for train in ("ztxt scale", "zimg ztxt scale"):
        for chosen in ({}, ids):
            results = []
            for threads in (1, 2, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(run(FAST[kind], zimg, ztxt, 20.0, train=train, dtype=dtype, **chosen))
            for loss, gradients in results[1:]:
                assert torch.equal(loss, results[0][0])
                for name, gradient in gradients.items():
                    assert torch.equal(gradient, results[0][1][name]), name


def test_kept_tiles_change_nothing(monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_SIDE", 64)
    zimg, ztxt = pairs(300, 16)
    results = []
    for kept_bytes in (0, 20 * 32 * 32 * 4, 2**30):
        monkeypatch.setattr(losses, "_KEPT_BYTES", kept_bytes)
        results.append(run(fast_softmax_loss, zimg, ztxt, 100.0, dtype=torch.float32)[1])
    assert all(torch.equal(r[name], results[0][name]) for r in results[1:] for name in r)


@LOSSES
def test_a_second_backward_pass_is_the_first(kind):
    zimg, ztxt = pairs(50, 8)
    ztxt.requires_grad_()
    loss = FAST[kind](zimg, ztxt, torch.tensor(10.0), torch.tensor(0.0))
    first, second = (torch.autograd.grad(loss, ztxt, retain_graph=True)[0] for _ in range(2))
    tripled = torch.autograd.grad(loss, ztxt, torch.tensor(3.0, dtype=torch.float64))[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(tripled, 3 * first)


@LOSSES
def test_the_callers_threads_and_modes_are_its_own(kind, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_SIDE", 8)
    seen = set()
    logits = tiles.Tiles.logits

    def watched(self, *arguments, **named):
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return logits(self, *arguments, **named)

    monkeypatch.setattr(tiles.Tiles, "logits", watched)
    zimg, ztxt = pairs(40, 8)
    torch.set_num_threads(3)
    run(FAST[kind], zimg, ztxt, 10.0)
    assert seen == {(False, 1)}
    assert torch.get_num_threads() == 3
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]

    seen.clear()
    torch.set_num_threads(1)
    run(FAST[kind], zimg, ztxt, 10.0)
    assert seen == {(True, 1)}


def test_losses_in_several_threads_leave_the_numbers_of_threads_alone(monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_SIDE", 8)
    monkeypatch.setattr(tiles, "_pool", tiles._Pool())
    torch.set_num_threads(2)
    zimg, ztxt = pairs(200, 8)
    expected = run(fast_softmax_loss, zimg, ztxt, 10.0, dtype=torch.float32)
    start, seen, lock = threading.Barrier(3), [], threading.Lock()

    def train(number):
        torch.get_num_threads()  # torch gives a thread the common number at its first use, even over one that was set
        torch.set_num_threads(number)
        start.wait()
        for _ in range(5):
            loss, gradients = run(fast_softmax_loss, zimg, ztxt, 10.0, dtype=torch.float32)
            with lock:
                same = torch.equal(loss, expected[0]) and torch.equal(gradients["ztxt"], expected[1]["ztxt"])
                seen.append((number, torch.get_num_threads(), same))

    threads = [threading.Thread(target=train, args=(number,)) for number in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(seen)) == [(2, 2, True), (3, 3, True), (4, 4, True)]
    assert torch.get_num_threads() == 2


@LOSSES
@pytest.mark.parametrize("threads", [1, 2])
def test_without_gradients(kind, threads):
    torch.set_num_threads(threads)
    zimg, ztxt = pairs(600, 8)
    scale, bias = torch.tensor(10.0), torch.tensor(-1.0)
    expected = SLOW[kind](zimg, ztxt, scale, bias)
    ztxt.requires_grad_()
    with torch.no_grad():
        loss = FAST[kind](zimg, ztxt, scale, bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    with torch.inference_mode():
        torch.testing.assert_close(FAST[kind](zimg, ztxt, scale, bias), expected)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    zimg, ztxt = (rows.to(dtype) for rows in pairs(30, 8))
    expected = run(FAST[kind], zimg, ztxt, 10.0, dtype=torch.float32)
    ztxt.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = FAST[kind](zimg, ztxt, torch.tensor([10.0]), torch.tensor([-3.0]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert torch.equal(loss.double(), expected[0])
    assert torch.equal(ztxt.grad, expected[1]["ztxt"].to(dtype))


@LOSSES
def test_rows_need_not_be_contiguous_or_of_unit_length(kind):
    zimg, ztxt = pairs(12, 20)
    zimg, ztxt = 30 * zimg.T[:12], 40 * ztxt.T[:12]
    assert_agree(run(FAST[kind], zimg, ztxt, 9.0), run(SLOW[kind], zimg, ztxt, 9.0), 1e-10)
    single = run(FAST[kind], zimg, ztxt, 9.0, dtype=torch.float32)
    assert_agree(single, run(SLOW[kind], zimg, ztxt, 9.0), 1e-3)


@LOSSES
def test_no_large_temporaries(kind):
    # Counted by torch itself: every allocation while the loss runs, none near the 64 MB of B × B floats.
    zimg, ztxt = pairs(4096, 16)
    zimg, ztxt = zimg.float(), ztxt.float().requires_grad_()
    ids = {"image_ids": torch.arange(4096) // 2, "text_ids": torch.arange(4096) % 4000}
    torch.set_num_threads(1)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        FAST[kind](zimg, ztxt, torch.tensor(20.0), torch.tensor(-5.0), **ids).backward()
    allocations = [e.self_cpu_memory_usage for e in profile.events()]
    assert 0 < max(allocations) <= 4 * 2**20


def test_arrays_are_refused():
    zimg, scale = torch.eye(3), torch.tensor(10.0)
    with pytest.raises(UsageError, match="the loss takes torch tensors; ztxt is an ndarray"):
        softmax_loss(zimg, zimg.numpy(), scale)
    with pytest.raises(UsageError, match="the loss takes torch tensors; logit_scale is a float"):
        softmax_loss(zimg, zimg, 10.0)
    with pytest.raises(UsageError, match="the loss takes torch tensors; logit_bias is a float"):
        sigmoid_loss(zimg, zimg, scale, -10.0)
    with pytest.raises(UsageError, match="the loss takes torch tensors; text_ids is a list"):
        softmax_loss(zimg, zimg, scale, text_ids=[0, 1, 2])


def test_shapes_are_checked():
    rows, scale = torch.eye(3), torch.tensor(1.0)
    with pytest.raises(UsageError, match=r"\(3, 3\) and \(2, 3\)"):
        softmax_loss(rows, rows[:2], scale)
    with pytest.raises(UsageError, match="B > 0"):
        sigmoid_loss(rows[:0], rows[:0], scale, scale)
    with pytest.raises(UsageError, match=r"text_ids has the shape \(2,\)"):
        softmax_loss(rows, rows, scale, text_ids=torch.arange(2))


@LOSSES
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it itself
def test_a_compiled_step_gives_the_same(kind):
    zimg, features = pairs(12, 5)
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(10.0, dtype=torch.float64)
    bias = torch.tensor(-2.0, dtype=torch.float64)

    def step():
        ztxt = F.normalize(features @ weight * 2, dim=1)
        return softmax_loss(zimg, ztxt, scale) if kind == "softmax" else sigmoid_loss(zimg, ztxt, scale, bias)

    outcomes = []
    for run in (step, torch.compile(step, backend="aot_eager")):  # where the tiles' writes in place once failed
        value = run()
        outcomes.append((value.item(), *torch.autograd.grad(value, weight)))
    torch._dynamo.reset()
    (value, gradient), (compiled_value, compiled_gradient) = outcomes
    assert compiled_value == pytest.approx(value, abs=1e-12)
    assert torch.allclose(compiled_gradient, gradient, atol=1e-12)
