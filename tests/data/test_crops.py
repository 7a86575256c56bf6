from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lamplit.data.decoding.crops import AREA, ASPECT_RATIO, Crop, inception_crop, read_crops
from lamplit.data.decoding.images import decode_image
from lamplit.data.decoding.preprocessing import Preprocessing

SMALL = Preprocessing((24, 24), (0.5,) * 3, (0.5,) * 3, interpolation="bilinear")


@pytest.fixture(scope="module")
def ramp() -> torch.Tensor:
    """Make an image that says where each of its pixels is: red by the column, green by the row. (3, 200, 240)."""
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(240), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)


@given(st.integers(0, 2**62))
@settings(max_examples=60)
def test_crop_is_a_rectangle_within_the_papers_bounds(ramp: torch.Tensor, seed: int) -> None:
    crop = inception_crop(ramp, SMALL, seed).float()
    assert crop.shape == (3, 24, 24)
    steps = [float((crop[0, :, -1] - crop[0, :, 0]).mean()) / 23, float((crop[1, -1] - crop[1, 0]).mean()) / 23]
    width, height = (24 * step for step in steps)
    # Pixels are whole numbers, and the outermost of a scaled crop lie half a step inside.
    assert AREA[0] * 0.85 < width * height / (200 * 240) < AREA[1] * 1.05
    assert ASPECT_RATIO[0] * 0.93 < width / height < ASPECT_RATIO[1] * 1.07


def test_crop_depends_on_its_seed_alone(ramp: torch.Tensor) -> None:
    before = torch.get_rng_state()
    crops = [inception_crop(ramp, SMALL, seed) for seed in (1, 1, 2)]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    assert torch.equal(torch.get_rng_state(), before), "the run's own draws are its own"


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_in_order_without_what_is_broken(image_folder: Path, tmp_path: Path, workers: int) -> None:
    paths = sorted(str(path) for path in image_folder.glob("*.png"))[:5]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    batches = [
        [Crop(paths[0], None), Crop(str(broken), None), Crop(paths[1], 7)],
        [Crop(path, None) for path in paths],
        [Crop(str(tmp_path / "none.png"), 3)],
    ]
    first, second, third = read_crops(batches, SMALL, workers=workers)
    assert (first.good, first.reasons) == ([0, 2], {str(broken): "not an image"})
    whole = decode_image(Path(paths[0]).read_bytes())
    assert torch.equal(first.images[0], SMALL.resize(whole))
    assert torch.equal(first.images[1], inception_crop(decode_image(Path(paths[1]).read_bytes()), SMALL, 7))
    assert second.images.shape == (5, 3, 24, 24)
    assert third.images.shape == (0, 3, 24, 24)
    assert third.reasons == {str(tmp_path / "none.png"): "file not found"}


def test_reading_draws_nothing_from_the_runs_random_numbers(image_folder: Path) -> None:
    before = torch.get_rng_state()
    list(read_crops([[Crop(str(next(image_folder.glob("*.png"))), 5)]], SMALL, workers=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_transparent_and_grey_images_are_cropped_too(tmp_path: Path) -> None:
    for mode in ("RGBA", "L", "P"):
        Image.new(mode, (50, 40)).save(tmp_path / f"{mode}.png")
    [crops] = read_crops([[Crop(str(tmp_path / f"{mode}.png"), 1) for mode in ("RGBA", "L", "P")]], SMALL, workers=0)
    assert crops.images.shape == (3, 3, 24, 24)
