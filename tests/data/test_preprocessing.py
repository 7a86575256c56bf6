from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from transformers import CLIPImageProcessorPil

from lamplit.data.decoding.preprocessing import Preprocessing, _sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [
    (375, 500),
    (500, 375),
    (300, 300),
    (224, 224),
    (224, 400),
    (1200, 90),
    (90, 1200),
    (100, 81),
    (63, 64),
]


def natural(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image with the spectrum of natural ones: noise at every scale, the coarser the stronger."""
    generator = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for octave in range(7):
        coarse = generator.normal(0, 60 / 2**octave, (2 ** (octave + 1), 2 ** (octave + 1), 3))
        layers = [Image.fromarray(coarse[..., c].astype(np.float32)).resize((width, height), 3) for c in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    pixels[:, width // 3 : width // 2] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (640, 480), (120, 100), (900, 90)])
def test_the_fast_way_is_near_the_reference(interpolation, fit, shape):
    preprocessing = Preprocessing((224, 224), MEAN, STD, interpolation, 0.875 if fit == "crop" else 1.0, fit)
    image = natural(*shape)
    fast = preprocessing.normalize(preprocessing.resize(to_tensor(image))[None])[0]
    reference = preprocessing.reference(image)
    assert fast.shape == reference.shape == (3, 224, 224)
    difference = ((fast - reference) * torch.tensor(STD).view(3, 1, 1)).abs()
    assert difference.mean() <= 1.5 / 255
    assert difference.std() > 0 or interpolation == "nearest" or shape == (224, 224), "nothing was compared"


def test_lanczos_is_stood_in_for_by_bicubic():
    preprocessing = Preprocessing((224, 224), MEAN, STD, "lanczos", 0.9)
    image = natural(375, 500)
    fast = preprocessing.normalize(preprocessing.resize(to_tensor(image))[None])[0]
    difference = (fast - preprocessing.reference(image)) * torch.tensor(STD).view(3, 1, 1)
    assert difference.abs().mean() <= 1.5 / 255


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(224, 224), (160, 224)])
@pytest.mark.parametrize(
    ("fit", "mode", "crop_fraction"),
    [("crop", "center", 1.0), ("crop", "center", 0.95), ("crop", "center", 0.875), ("squash", "squash", 1.0)],
)
def test_the_reference_is_timm_s_transform(shape, size, fit, mode, crop_fraction):
    preprocessing = Preprocessing(size, MEAN, STD, "bicubic", crop_fraction, fit)
    timms = create_transform(
        (3, *size), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=crop_fraction, crop_mode=mode
    )
    image = natural(*shape)
    assert torch.allclose(preprocessing.reference(image), timms(image), atol=1e-5)
    assert preprocessing.resize(to_tensor(image)).shape == (3, *size)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_torchvision_s_transform(shape):
    preprocessing = Preprocessing((224, 224), MEAN, STD, "bilinear", 224 / 256)
    torchvisions = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    image = natural(*shape)
    assert torch.allclose(preprocessing.reference(image), torchvisions(image), atol=1e-5)


@settings(max_examples=50)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(2, 40), st.integers(1, 40)),  # torch 2.14 cannot scale to 1 x 1
    st.floats(0.3, 1),
    st.sampled_from(["crop", "squash"]),
)
def test_every_image_fills_the_tower_s_input(shape, size, crop_fraction, fit):
    preprocessing = Preprocessing(size, (0.0,) * 3, (1.0,) * 3, "bilinear", crop_fraction, fit)
    image = preprocessing.resize(torch.full((3, *shape), 255, dtype=torch.uint8))
    assert image.shape == (3, *size)
    assert image.min() == 255, "the crop is padded"


UNITS_PER_KIB = 1024 if sys.platform == "darwin" else 1  # of ru_maxrss


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1)])
def test_a_long_line_of_pixels_does_not_fill_the_memory(shape):
    preprocessing = Preprocessing((224, 224), MEAN, STD, "bilinear")
    line = (torch.arange(30_000) % 251).to(torch.uint8).expand(3, 1, -1).reshape(3, *shape)
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = preprocessing.resize(line)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 * UNITS_PER_KIB  # 4.5 GB scaled whole
    middle = int(line.flatten(1)[0, 15_000])
    assert abs(int(image[0, 112, 112]) - middle) <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("shape", [(5000, 30), (30, 4999), (41, 1000), (1001, 40), (17, 2321)])
def test_the_middle_of_a_long_image_is_timms(shape, crop_fraction, interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    preprocessing = Preprocessing((64, 64), MEAN, STD, interpolation, crop_fraction)
    transform = create_transform(
        (3, 64, 64), interpolation=interpolation, crop_pct=crop_fraction, mean=MEAN, std=STD, is_training=False
    )
    difference = preprocessing.normalize(preprocessing.resize(to_tensor(noise))[None])[0] - transform(
        Image.fromarray(noise)
    )
    levels = difference.abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert levels.mean() < 0.01
    assert levels.max() < 2.5


@pytest.mark.parametrize("center", ["round", "floor"])
@pytest.mark.parametrize("shape", [(40, 421), (421, 41)])
def test_the_middle_of_a_long_image_at_single_points(shape, center):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8))
    preprocessing = Preprocessing((32, 32), MEAN, STD, "bilinear", 0.9, antialias=False, center=center)
    height, width = preprocessing._target_size(*shape)
    whole = _sample(noise, height, width)
    assert torch.equal(preprocessing.resize(noise), preprocessing._crop(whole, height, width))


@pytest.mark.parametrize("shape", [(224, 301), (301, 224), (240, 303), (400, 225)])
def test_the_reference_crops_as_transformers_does(shape):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 229}, crop_size={"height": 224, "width": 224})
    image_file = natural(*shape)
    expected = torch.as_tensor(np.asarray(processor(images=image_file)["pixel_values"][0]))
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    preprocessing = Preprocessing((224, 224), mean, std, "bicubic", 224 / 229, center="floor")
    assert (preprocessing.reference(image_file) - expected).abs().max() < 1e-5
    fast = preprocessing.normalize(preprocessing.resize(to_tensor(image_file))[None])[0]
    assert (fast - expected).abs().mean() < 0.02


def test_what_came_later_is_left_out_at_its_default():
    plain = Preprocessing((8, 8), MEAN, STD)
    assert set(plain.to_dict()) == {"image_size", "mean", "std", "interpolation", "crop_fraction", "fit"}
    later = Preprocessing((8, 8), MEAN, STD, antialias=False, center="floor").to_dict()
    assert (later["antialias"], later["center"]) == (False, "floor")


def test_normalize():
    preprocessing = Preprocessing((2, 1), (0.5, 0.0, 0.25), (0.5, 1.0, 0.25))
    images = torch.tensor([[[[0], [255]], [[51], [102]], [[255], [0]]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-1.0], [1.0]], [[0.2], [0.4]], [[3.0], [-1.0]]]])
    assert torch.allclose(preprocessing.normalize(images), expected)
    assert preprocessing.normalize(images).dtype == torch.float32


def test_a_trip_through_json_changes_nothing():
    preprocessing = Preprocessing((160, 224), MEAN, STD, "bilinear", 0.875, "squash")
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def tensorflows_pixel(image: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """One pixel of (H, W, 3) as `tf.image.resize` and a cast to uint8 make it; single precision all along."""
    ways = []
    for place, new_length, length in ((row, height, image.shape[0]), (column, width, image.shape[1])):
        at = (np.float32(place) + np.float32(0.5)) * (np.float32(length) / np.float32(new_length)) - np.float32(0.5)
        low = np.floor(at)
        ways.append((max(int(low), 0), min(int(np.ceil(at)), length - 1), at - low))
    (top, bottom, down), (left, right, across) = ways
    values = image.astype(np.float32)
    above = values[top, left] + (values[top, right] - values[top, left]) * across
    below = values[bottom, left] + (values[bottom, right] - values[bottom, left]) * across
    return (above + (below - above) * down).astype(np.uint8)


@pytest.mark.parametrize("shape", [(30, 40), (41, 17), (7, 5), (1, 9), (24, 20), (24, 33), (90, 20), (61, 100)])
def test_without_antialias_it_is_tensorflow_s_to_the_bit(shape):
    preprocessing = Preprocessing((24, 20), (0.5,) * 3, (0.5,) * 3, "bilinear", fit="squash", antialias=False)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = np.stack([[tensorflows_pixel(image, y, x, 24, 20) for x in range(20)] for y in range(24)])
    found = preprocessing.resize(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)
    smooth = Preprocessing((24, 20), (0.5,) * 3, (0.5,) * 3, "bilinear", fit="squash")
    if shape[0] > 24:  # the usual way would not do
        other = smooth.resize(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        assert np.abs(other.astype(int) - expected).mean() > 4


def test_without_antialias_fractions_are_cut_off():
    preprocessing = Preprocessing((1, 4), (0.5,) * 3, (0.5,) * 3, "bilinear", fit="squash", antialias=False)
    image = torch.tensor([[0, 255]], dtype=torch.uint8).expand(3, 1, 2)
    assert preprocessing.resize(image)[0].tolist() == [[0, 63, 191, 255]]  # not 64: 63.75 and 191.25


@settings(max_examples=50)
@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_without_antialias_every_image_fills_the_tower_s_input(shape, size):
    preprocessing = Preprocessing(size, (0.5,) * 3, (0.5,) * 3, "bilinear", fit="squash", antialias=False)
    image = preprocessing.resize(torch.full((3, *shape), 255, dtype=torch.uint8))
    assert image.shape == (3, *size)
    assert image.min() == 255


def test_antialias_is_in_a_fingerprint_where_it_is_off_alone():
    smooth = Preprocessing((24, 20), MEAN, STD)
    sharp = Preprocessing((24, 20), MEAN, STD, antialias=False)
    assert "antialias" not in smooth.to_dict()
    assert sharp.to_dict()["antialias"] is False
    assert Preprocessing.from_dict(json.loads(json.dumps(sharp.to_dict()))) == sharp


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_border_is_cut_off_before_anything_else(fit):
    preprocessing = Preprocessing((32, 32), MEAN, STD, "bilinear", 1.0, fit)
    framed = Preprocessing((32, 32), MEAN, STD, "bilinear", 1.0, fit, border=2)
    inside = to_tensor(natural(64, 80))
    image = torch.nn.functional.pad(inside, (2, 2, 2, 2), value=255)
    assert torch.equal(framed.resize(image), preprocessing.resize(inside))
    assert torch.equal(
        framed.reference(Image.fromarray(image.permute(1, 2, 0).numpy())), preprocessing.reference(natural(64, 80))
    )
    assert framed.resize(torch.zeros(3, 4, 9, dtype=torch.uint8)).shape == (3, 32, 32), "smaller than its border"
    assert "border" not in preprocessing.to_dict()
    assert Preprocessing.from_dict(json.loads(json.dumps(framed.to_dict()))) == framed


def test_in_words():
    timm = Preprocessing((224, 224), MEAN, STD, "bicubic", 0.875)
    assert timm.in_words() == "resized to a short side of 256 (bicubic), centre of 224 x 224"
    paper = Preprocessing((224, 192), MEAN, STD, "bilinear", 1.0, "squash", antialias=False, border=2)
    words = (
        "2 pixels cut off every side, then resized to 192 x 224, whatever the aspect ratio (bilinear at single points)"
    )
    assert paper.in_words() == words


def window_by_pixels(preprocessing, height, width):
    """Read off a prepared image of ramps which part of the image it shows: left, top, right, bottom."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    ramps = torch.stack([(columns + 0 * rows), (rows + 0 * columns), 0 * rows * columns]).to(torch.uint8)
    across, down = preprocessing.resize(ramps)[:2].double()
    found = []
    for line in (across.mean(0), down.mean(1)):
        inner = slice(len(line) // 4, -(len(line) // 4))  # the ends are smeared
        places = np.arange(len(line))[inner] + 0.5
        cut_off = 0 if preprocessing.antialias else 0.5  # of the fractions, in the mean
        slope, first = np.polyfit(places, line[inner].numpy() + 0.5 + cut_off, 1)
        found.append((first, first + slope * len(line)))
    (left, right), (top, bottom) = found
    return left, top, right, bottom


@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
@pytest.mark.parametrize(
    ("options"),
    [
        {}, {"crop_fraction": 0.875}, {"crop_fraction": 0.9, "center": "floor"}, {"fit": "squash"},
        {"fit": "squash", "crop_fraction": 0.8}, {"border": 9}, {"antialias": False},
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(200, 250), (250, 131), (64, 64), (97, 97), (20, 250), (17, 40)])
def test_the_window_is_what_the_tower_sees(shape, options, size):
    preprocessing = Preprocessing(size, MEAN, STD, "bilinear", **options)
    found = preprocessing.window(*shape)
    step = max((found[2] - found[0]) / size[1], (found[3] - found[1]) / size[0], 1)
    assert found == pytest.approx(window_by_pixels(preprocessing, *shape), abs=0.6 * step)
    assert -1e-9 <= found[0] < found[2] <= shape[1] + 1e-9
    assert -1e-9 <= found[1] < found[3] <= shape[0] + 1e-9


def test_windows_by_hand():
    whole = Preprocessing((224, 224), MEAN, STD, fit="squash")
    assert whole.window(30, 40) == (0, 0, 40, 30)
    middle = Preprocessing((224, 224), MEAN, STD)
    assert middle.window(100, 300) == (100, 0, 200, 100)
    assert middle.window(300, 100) == (0, 100, 100, 200)
    cropped = Preprocessing((224, 224), MEAN, STD, crop_fraction=0.875)
    assert cropped.window(256, 256) == (16, 16, 240, 240)
    framed = Preprocessing((100, 100), MEAN, STD, border=10)
    assert framed.window(120, 220) == (60, 10, 160, 110)
