from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError
from lamplit.files import cache_folder
from lamplit.store.embed import backends
from lamplit.store.embed.backends import TOLERANCE, choose_backend
from lamplit.store.embed.backends import _onnx_file as onnx_file
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.lock import weights_digest

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)


class Convolutions(nn.Module):
    """A small tower with what ONNX folds: batch-norm, and dropout that must stay off."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(16, 24, 3, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.layers(images).mean((2, 3))
        return output


def make_tower(seed: int) -> ImageTower:
    torch.manual_seed(seed)
    return open_image_tower(Convolutions(), preprocessing=Preprocessing((48, 48), HALF, HALF))


def random_images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8, generator=generator)


def reference(tower: ImageTower, images: Tensor) -> Tensor:
    with torch.no_grad():
        return F.normalize(tower.eval()(images), dim=-1)


def start(tower: ImageTower, name: backends.BackendName, num_images: int | None = 10) -> tuple[str, backends.Backend]:
    chosen, backend, vectors = choose_backend(tower, name, random_images(4), num_images=num_images, device=CPU)
    assert torch.allclose(vectors, reference(tower, random_images(4)), atol=1e-5)
    return chosen, backend


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMPLIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        start(make_tower(0), "onnx")
        return onnx_file(make_tower(0))


@pytest.fixture
def exported(made_once: Path) -> ImageTower:
    """A tower whose ONNX file is in the cache."""
    tower = make_tower(0)
    onnx_file(tower).parent.mkdir(parents=True)
    shutil.copy(made_once, onnx_file(tower))
    return tower


def test_batch_of_any_size_is_taken_in_parts() -> None:
    tower = make_tower(0)
    _, backend = start(tower, "torch")
    for count in (1, backends.CPU_IMAGES, 2 * backends.CPU_IMAGES + 3):
        vectors = backend(random_images(count, seed=1))
        assert torch.allclose(vectors, reference(tower, random_images(count, seed=1)), atol=1e-6)


def test_torch_gives_unit_vectors() -> None:
    tower = make_tower(0)
    name, backend = start(tower, "torch")
    assert name == "torch"
    vectors = backend(random_images(7))
    assert vectors.shape == (7, 24)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    assert (vectors - reference(tower, random_images(7))).abs().max() < 1e-6


def test_backend_leaves_the_tower_as_it_was() -> None:
    tower = make_tower(0)
    before = weights_digest(tower)
    _, backend = start(tower, "torch")
    tower.train()
    assert torch.equal(backend(random_images(7)), backend(random_images(7)))  # no dropout
    assert weights_digest(tower) == before


def test_onnx_agrees_on_batches_of_any_size(exported: ImageTower) -> None:
    name, backend = start(exported, "onnx")
    assert name == "onnx"
    for count in (1, 2, 4, 7):
        vectors = backend(random_images(count, seed=count))
        assert vectors.shape == (count, 24)
        assert (vectors - reference(exported, random_images(count, seed=count))).abs().max() < 1e-5


def test_onnx_file_is_made_once(exported: ImageTower) -> None:
    [file] = (cache_folder() / "onnx").iterdir()
    made = file.stat().st_mtime_ns
    start(exported, "onnx")
    assert file.stat().st_mtime_ns == made
    assert file.suffix == ".onnx"


def test_towers_that_take_their_images_another_way_share_a_file(exported: ImageTower) -> None:
    squashed, larger = make_tower(0), make_tower(0)
    squashed.preprocessing = replace(exported.preprocessing, fit="squash", mean=(0.4,) * 3)
    larger.preprocessing = replace(exported.preprocessing, image_size=(64, 64))
    assert squashed.identity().fingerprint != exported.identity().fingerprint
    assert onnx_file(squashed) == onnx_file(exported)
    assert onnx_file(larger) != onnx_file(exported) != onnx_file(make_tower(1))
    name, backend = start(squashed, "onnx")
    assert name == "onnx"
    assert (backend(random_images(5)) - reference(squashed, random_images(5))).abs().max() < 1e-5
    assert len(list((cache_folder() / "onnx").iterdir())) == 1


def test_onnx_of_another_tower_is_refused(exported: ImageTower, caplog: pytest.LogCaptureFixture) -> None:
    """As if the cache had been tampered with: the vectors give it away."""
    tower = make_tower(1)
    onnx_file(tower).write_bytes(onnx_file(exported).read_bytes())
    with pytest.raises(TowerError, match="backend onnx differs from torch by"):
        start(tower, "onnx")

    with caplog.at_level(logging.WARNING, logger="lamplit"):
        name, backend = start(tower, "auto", num_images=400)
    assert name == "torch"
    assert "differs from torch" in caplog.text
    assert (backend(random_images(3)) - reference(tower, random_images(3))).abs().max() < 1e-6


def test_tolerance_is_on_unit_vectors() -> None:
    expected = F.normalize(torch.randn(5, 24), dim=-1)
    backends._require_agreement("other", expected + 0.9 * TOLERANCE, expected)
    for wrong in (expected + 1.1 * TOLERANCE, expected * float("nan"), expected.flip(0)):
        with pytest.raises(TowerError, match="backend other differs"):
            backends._require_agreement("other", wrong, expected)


@pytest.mark.parametrize("content", [b"", b"no model" * 50, None])
def test_damaged_onnx_file_is_made_again(exported: ImageTower, content: bytes | None) -> None:
    file = onnx_file(exported)
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    name, backend = start(exported, "onnx")
    assert name == "onnx"
    assert (backend(random_images(3)) - reference(exported, random_images(3))).abs().max() < 1e-5


def test_tower_that_onnx_cannot_hold(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:

    class Odd(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if images.sum().item() > 1e9:  # depends on the pixels
                return images.mean((2, 3))
            return images.amax((2, 3))

    tower = open_image_tower(Odd(), preprocessing=Preprocessing((48, 48), HALF, HALF))
    with pytest.raises(TowerError, match="cannot be exported to ONNX"):
        start(tower, "onnx")
    monkeypatch.setitem(backends._START_PAYS, "onnx", 0.0)
    with caplog.at_level(logging.WARNING, logger="lamplit"):
        name, _ = start(tower, "auto")
    assert name == "torch"
    assert list((cache_folder() / "onnx").iterdir()) == []  # nothing half made stays


def test_auto_takes_torch_for_a_few_images() -> None:
    tower = make_tower(0)
    name, _ = start(tower, "auto", num_images=10)
    assert name == "torch"
    assert not (cache_folder() / "onnx").exists()


class Slow(Convolutions):
    """What torch runs slowly and ONNX does not."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.05)
        return super().forward(images)


def test_auto_takes_what_is_faster() -> None:
    tower = open_image_tower(Slow(), preprocessing=Preprocessing((48, 48), HALF, HALF))
    assert start(tower, "auto", num_images=40)[0] == "torch"  # half a second: no export pays
    assert not onnx_file(tower).exists()
    name, backend = start(tower, "auto", num_images=40_000)
    assert name == "onnx"
    assert (backend(random_images(3)) - reference(tower, random_images(3))).abs().max() < 1e-5
    assert start(tower, "auto", num_images=400)[0] == "onnx"  # now that its file is there
    assert start(tower, "auto", num_images=40)[0] == "torch"  # too few for even a comparison to pay


@pytest.mark.slow
def test_compile_agrees() -> None:
    tower = make_tower(0)
    name, backend = start(tower, "compile")
    assert name == "compile"
    for count in (1, 4, 7):
        assert (backend(random_images(count)) - reference(tower, random_images(count))).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_resnet", "test_convnext"])
def test_onnx_agrees_for_timm_towers(name: str) -> None:
    tower = open_image_tower(f"timm:{name}", weights="random")
    sample = torch.randint(0, 256, (4, 3, *tower.preprocessing.image_size), dtype=torch.uint8)
    _, backend, _ = choose_backend(tower, "onnx", sample, num_images=4, device=CPU)
    assert (backend(sample[:3]) - reference(tower, sample[:3])).abs().max() < TOLERANCE
