from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image
from torch import nn
from torch.nn import functional as F

import lamplit
from lamplit.data.inputs import decode_input
from lamplit.errors import ImageError, TowerError, UsageError
from lamplit.model import LiT
from lamplit.retrieval.heat_picture import spread
from lamplit.retrieval.locating import can_locate, heat_map
from lamplit.towers.images.image_tower import ImageTower, open_image_tower


@pytest.fixture(scope="module")
def model(places_path: Path) -> LiT:
    return lamplit.load(places_path / "model")


def two(left: str = "red", right: str = "blue", size: tuple[int, int] = (320, 320)) -> Image.Image:
    """Make an image of two colours side by side."""
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def red(model: LiT) -> np.ndarray:
    """Return a unit vector that red is nearer to than blue."""
    zred, zblue = model.encode_images([two("red", "red"), two("blue", "blue")])
    return F.normalize(zred - zblue, dim=0).numpy()


# --- What the values are


@pytest.mark.parametrize("has_center", [False, True])
@pytest.mark.parametrize("has_head", [False, True])
def test_values_are_cosines_of_places_and_the_places_make_the_image(
    model: LiT, has_center: bool, has_head: bool
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 24) if has_head else None
    center = 0.3 * F.normalize(torch.randn(64), dim=0) if has_center else None
    other = LiT(None, model.identity, model.unlocked_image_tower, center=center, image_head=head).eval()
    vector = F.normalize(torch.randn(24 if has_head else 64), dim=0)
    found = heat_map(other, decode_input(two()), vector.numpy())
    assert found.values.shape == (10, 10)
    assert found.values.dtype == np.float32
    assert found.values.std() > 0.01

    tower = other.unlocked_image_tower
    assert isinstance(tower, ImageTower)
    with torch.no_grad():
        pixels = other.image_preprocessing().resize(decode_input(two()))[None]
        tokens = tower.backbone.forward_features(tower.preprocessing.normalize(pixels))[0, 1:]  # type: ignore[operator]
        for row, column in ((0, 0), (3, 7), (9, 9)):
            place = tokens[10 * row + column]
            cosine = other.project(F.normalize(place[None], dim=-1))[0] @ vector
            assert found.values[row, column] == pytest.approx(float(cosine), abs=1e-5)
        mean = other.project(F.normalize(tokens.mean(0, keepdim=True), dim=-1))[0]
    zimg = other.encode_images(two())
    assert torch.allclose(mean, zimg, atol=1e-5)
    assert found.score == pytest.approx(float(zimg @ vector), abs=1e-5)


def test_words_of_a_file(model: LiT, image_folder: Path) -> None:
    file = next(image_folder.glob("large_red_cross.*"))
    found = lamplit.locate(model, file, "A large red cross.")
    ztxt = model.encode_texts("A large red cross.")
    assert found.score == pytest.approx(float(model.encode_images(file) @ ztxt), abs=1e-5)
    expected = heat_map(model, decode_input(file), ztxt.numpy())
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)


def test_sum_of_words(model: LiT) -> None:
    parts = [lamplit.locate(model, two(), words).values for words in ("ring", "cross")]
    length = float((model.encode_texts("ring") - 0.5 * model.encode_texts("cross")).norm())
    found = lamplit.locate(model, two(), '"ring" - 0.5 * "cross"')
    np.testing.assert_allclose(found.values, (parts[0] - 0.5 * parts[1]) / length, atol=1e-4)


# --- Where they are


def test_the_half_that_has_it(model: LiT) -> None:
    vector = red(model)
    for image, is_right in ((two("red", "blue"), False), (two("blue", "red"), True)):
        found = heat_map(model, decode_input(image), vector)
        halves = found.values[:, :5].mean(), found.values[:, 5:].mean()
        assert (halves[1] > halves[0]) == is_right
        assert (found.peak[0] > 160) == is_right


def test_stacked_halves_are_not_mistaken_for_others(model: LiT) -> None:
    found = heat_map(model, decode_input(two("red", "blue").rotate(-90)), red(model))  # red above
    assert found.values[:5].mean() > found.values[5:].mean()
    assert found.peak[1] < 160


@pytest.mark.parametrize("size", [(400, 200), (200, 400), (333, 251)])
def test_places_of_an_image_that_is_not_square(model: LiT, size: tuple[int, int]) -> None:
    """Two colours that meet away from the middle: the map turns where they meet."""
    across, down = size
    image = Image.new("RGB", size, "blue")
    meets = across // 2 - 20
    image.paste("red", (0, 0, meets, down))
    found = heat_map(model, decode_input(image), red(model))
    assert found.size == size
    left, top, right, bottom = found.window
    assert right - left == pytest.approx(bottom - top, rel=0.01), "this tower sees a square"
    assert (left + right) / 2 == pytest.approx(across / 2, abs=1)
    assert (top + bottom) / 2 == pytest.approx(down / 2, abs=1)
    heat = spread(found.values.mean(0, keepdims=True), found.window, size)[down // 2]
    [turn] = np.flatnonzero(np.diff((heat > (np.nanmax(heat) + np.nanmin(heat)) / 2).astype(int)) == -1)
    assert abs(turn - meets) < (right - left) / 8
    assert left <= found.peak[0] <= meets


def test_orientation_of_a_camera(model: LiT) -> None:
    """A file whose pixels lie on their side is located as it is seen."""
    upright = two("blue", "red", (400, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: viewers turn the pixels by 90 degrees clockwise
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    found, expected = (heat_map(model, decode_input(i), red(model)) for i in (file.getvalue(), upright))
    assert found.size == (400, 300)
    assert found.picture.size == (400, 300)
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.peak == expected.peak
    assert found.peak[0] > 200


def test_what_is_transparent_is_white(model: LiT) -> None:
    clear = Image.new("RGBA", (200, 200), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (100, 0, 200, 200))
    found, expected = (heat_map(model, decode_input(i), red(model)) for i in (clear, two("white", "blue", (200, 200))))
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.picture.getpixel((20, 20)) == (255, 255, 255)


# --- What is drawn and written


def test_picture_of_a_large_image_is_small_and_the_map_lies_right(model: LiT, tmp_path: Path) -> None:
    found = heat_map(model, decode_input(two("blue", "red", (3000, 1500))), red(model))
    assert found.picture.size == (1024, 512)
    assert found.window[0] > 700
    drawn = np.asarray(found.draw().convert("HSV"))
    assert drawn.shape[:2] == (512, 1024)
    x, y = (int(value * 1024 / 3000) for value in found.peak)
    assert drawn[y, x, 1] > 200, "coloured at the peak"
    assert drawn[256, 10, 1] == 0, "no colour where the tower did not see"
    found.save(tmp_path / "where.png")
    with Image.open(tmp_path / "where.png") as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(found.draw()))
    assert repr(found).startswith("<HeatMap 10 × 10: ")


def test_unknown_ending(model: LiT, tmp_path: Path) -> None:
    found = lamplit.locate(model, two(), "ring")
    for name in ("where.txt", "where"):
        with pytest.raises(UsageError, match=r"ends in \.png, \.jpg or \.webp"):
            found.save(tmp_path / name)
    for name in ("a.JPG", "a.webp"):
        found.save(tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.JPG", "a.webp"]


# --- What cannot be located


def test_bad_input_is_a_sentence(model: LiT, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"a\.png.*not an image"):
        lamplit.locate(model, tmp_path / "a.png", "ring")
    with pytest.raises(ImageError, match="not found"):
        lamplit.locate(model, tmp_path / "b.png", "ring")
    with pytest.raises(UsageError, match="takes one image; this is a list"):
        lamplit.locate(model, [two()], "ring")
    with pytest.raises(UsageError, match="blank"):
        lamplit.locate(model, two(), " ")
    with pytest.raises(UsageError, match="words as a str; these are a list"):
        lamplit.locate(model, two(), ["ring"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cancel each other"):
        lamplit.locate(model, two(), '"ring" - "ring"')
    with pytest.raises(UsageError, match="open on cpu"):
        lamplit.locate(model, two(), "ring", device="meta")


def test_models_that_cannot(model: LiT, model_path: Path, places_path: Path) -> None:
    assert can_locate(model)
    of_class_tokens = lamplit.load(model_path)
    assert not can_locate(of_class_tokens)
    with pytest.raises(TowerError, match=r"cannot show where .* embed with --pool mean"):
        lamplit.locate(of_class_tokens, two(), "ring")
    words_alone = lamplit.load(places_path / "model", towers="text")
    assert not can_locate(words_alone)
    with pytest.raises(TowerError, match="open without its image tower"):
        lamplit.locate(words_alone, two(), "ring")
    images_alone = lamplit.load(places_path / "model", towers="image")
    assert not can_locate(images_alone)
    with pytest.raises(TowerError, match="open without its text tower"):
        lamplit.locate(images_alone, two(), "ring")


def test_attention_pooling_is_no_mean(model: LiT) -> None:
    torch.manual_seed(0)
    tower = open_image_tower("timm:vit_base_patch16_siglip_224", weights="random")
    other = LiT(None, tower.identity(), tower)
    vector = F.normalize(torch.randn(tower.width), dim=0)
    found = heat_map(other, decode_input(draw("ring", "red", 25)), vector.numpy())
    assert found.values.shape == (14, 14)
    assert found.score == pytest.approx(float(other.encode_images(draw("ring", "red", 25)) @ vector), abs=1e-5)
    assert np.isfinite(found.values).all()
