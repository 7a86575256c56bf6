from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from hashlib import blake2b
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lamplit.data.decoding import images as reading
from lamplit.data.decoding.images import (
    Batch,
    Skipped,
    content_key,
    decode_image,
    decoding_cost,
    open_bytes,
    read_batches,
)
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.pairs import Pair
from lamplit.data.sorted_keys import SortedKeys, keys_of
from lamplit.errors import ImageError

HEIGHT, WIDTH = 30, 44


def noise(channels: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that lossy formats keep them."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    planes = [Image.fromarray(small[..., c]).resize((WIDTH, HEIGHT)) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


RGB = Image.fromarray(noise(3))
RGBA = Image.fromarray(noise(4))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(data)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    return str(caught.value)


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_formats_keep_every_pixel(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(encode(RGB, format, **options)), np.asarray(RGB))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 50, "subsampling": 2}])
def test_jpeg_is_what_pillow_decodes(options):
    data = encode(RGB, "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(pixels(data).astype(int) - expected).mean() < 0.5


def test_grey_jpeg_and_two_images_in_one():
    data = encode(RGB.convert("L"), "JPEG")
    grey = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(pixels(data).astype(int) - grey[..., None]).max() <= 1
    data = encode(RGB, "MPO", save_all=True, append_images=[ImageOps.invert(RGB)])
    assert np.abs(pixels(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)))).mean() < 0.5


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95, "subsampling": 0}
    data = encode(RGB, format, exif=exif, **(options if format in ("WEBP", "JPEG") else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    found = pixels(data)
    assert found.shape == expected.shape == ((WIDTH, HEIGHT, 3) if orientation > 4 else (HEIGHT, WIDTH, 3))
    assert np.abs(found - expected).max() <= (2 if format == "JPEG" else 0)


def test_damaged_exif_does_not_cost_the_image():
    data = encode(RGB, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(pixels(data), np.asarray(RGB))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    assert np.abs(pixels(encode(RGBA, format, **options)) - on_white(np.asarray(RGBA))).max() <= 1


def test_grey_with_alpha_and_palettes_with_transparency():
    grey_alpha = RGBA.convert("LA")
    expected = on_white(np.asarray(grey_alpha.convert("RGBA")))
    assert np.abs(pixels(encode(grey_alpha, "PNG")) - expected).max() <= 1

    palette = RGB.quantize(8)
    indices, colors = np.asarray(palette), np.asarray(palette.convert("RGB")).copy()
    assert np.array_equal(pixels(encode(palette, "PNG")), colors)
    colors[indices == 3] = 255
    assert np.array_equal(pixels(encode(palette, "PNG", transparency=3)), colors)
    assert np.array_equal(pixels(encode(palette, "GIF", transparency=3)), colors)
    several = encode(palette, "PNG", transparency=bytes([255, 255, 255, 128, 0, 255, 255, 255]))
    half = np.asarray(palette.convert("RGB"))[indices == 3] * (128 / 255) + 255 * (1 - 128 / 255)
    assert np.abs(pixels(several)[indices == 3] - half).max() <= 1
    assert (pixels(several)[indices == 4] == 255).all()


def test_one_transparent_color_becomes_white():
    image = RGB.copy()
    image.paste((10, 20, 30), (0, 0, 7, 7))
    expected = np.asarray(image).copy()
    expected[:7, :7] = 255
    assert np.array_equal(pixels(encode(image, "PNG", transparency=(10, 20, 30))), expected)
    grey = Image.new("L", (6, 6), 40)
    grey.paste(90, (0, 0, 3, 6))
    assert pixels(encode(grey, "PNG", transparency=90))[0, :, 0].tolist() == [255, 255, 255, 40, 40, 40]


def png_16_bits(values: np.ndarray, transparent: int | None = None) -> bytes:
    """Write by hand: Pillow's own round trip would prove less."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 257, 32768, 65535], [100, 200, 255, 256, 40000]], dtype=np.uint16)
    expected = np.repeat((values / 257).round()[..., None], 3, axis=2)
    assert np.array_equal(pixels(png_16_bits(values)), expected)
    assert np.array_equal(pixels(encode(Image.fromarray(values), "TIFF")), expected)
    dark = png_16_bits(np.array([[0, 100, 200]], dtype=np.uint16))
    assert pixels(dark).max() == 1, "a dark image of 16 bits is no image of 8 bits"
    expected[0, 3] = 255
    assert np.array_equal(pixels(png_16_bits(values, transparent=32768)), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 0.25, 0.5], [0, 64, 128]),
        ([0.0, 20.0, 200.0], [0, 20, 200]),
        ([0.0, 257.0, 60000.0], [0, 1, 233]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 1e6, 2e6], [0, 128, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ([-3.0, -3.0, -3.0], [0, 0, 0]),
    ],
)
def test_float_grey_takes_its_white_from_the_pixels(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert pixels(encode(image, "TIFF"))[0, :, 0].tolist() == expected


def test_32_bit_grey():
    for values, expected in [
        ([0, 20, 255], [0, 20, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 1, 1 << 24], [0, 0, 255]),
    ]:
        image = Image.fromarray(np.array([values], dtype=np.int32))
        assert pixels(encode(image, "TIFF"))[0, :, 0].tolist() == expected


def test_cmyk_is_converted():
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan
    for data in (encode(ink, "JPEG", quality=100), encode(ink, "TIFF")):
        assert np.abs(pixels(data).reshape(-1, 3).mean(0) - (0, 255, 255)).max() <= 2
    assert b"Adobe" in encode(ink, "JPEG"), "the JPEG is not of Adobe's inverted kind"


def test_two_levels_and_the_first_frame():
    levels = Image.fromarray(np.asarray(RGB)[..., 0] > 128)
    assert np.array_equal(pixels(encode(levels, "PNG"))[..., 0] == 255, np.asarray(levels))
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == (255, 0, 0)).all()


def test_the_smallest_image():
    assert pixels(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_files_are_refused(format):
    data = encode(RGB, format)
    for length in (3, 20, len(data) // 3, len(data) // 2, len(data) - 40):
        assert reason(data[:length]) in ("truncated", "not an image")
    assert reason(data[: len(data) // 2]) == "truncated"


def test_what_is_no_image_says_so():
    assert reason(b"") == "empty file"
    assert reason(b"<html>not found</html>") == "not an image"
    assert reason(bytes(1000)) == "not an image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image", "Ghostscript beware"
    svg = b'<?xml version="1.0"?><!-- owl --><svg xmlns="http://www.w3.org/2000/svg"></svg>'
    with pytest.raises(ImageError, match="SVG is read from files only"):
        decoding_cost(svg)
    assert reason(b"8BPS\0\1") == "Photoshop's format is not read; convert it to JPEG"
    for start in (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"):
        assert reason(start + bytes(60)) == "JPEG XL is not read; convert it to JPEG"
    preview = encode(RGB, "TIFF")
    assert reason(preview, name="a.NEF") == "a camera's raw file (.nef) is not read; convert it to JPEG"
    broken = bytearray(encode(RGB, "PNG"))
    broken[60:90] = bytes(30)
    assert reason(bytes(broken)).startswith("damaged (")


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="HEIC is read here")
@pytest.mark.parametrize("brand", [b"heic", b"hevx", b"msf1", b"mif1"])
def test_heic_names_the_extra_that_reads_it(brand):
    expected = "HEIC is not read: pillow_heif is not installed; type: pip install 'lamplit[heic]'"
    assert reason(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic") == expected


def test_heic_is_read_by_its_extra():
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(RGB).save(file, quality=-1, chroma=444, matrix_coefficients=0)  # loses nothing
    assert (pixels(file.getvalue()) == np.asarray(RGB)).all()
    assert reason(file.getvalue()[:40]) == "damaged HEIC"


def tiff(num_bands: int, bits: int, kind: int, photometric: int = 1) -> bytes:
    """Write by hand what Pillow cannot: uncompressed, in one strip, of any bands."""
    extra = struct.pack(f"<{2 * num_bands}H", *[bits] * num_bands, *[kind] * num_bands)
    content = bytes(4 * 4 * num_bands * bits // 8)
    start = 8 + 2 + 10 * 12 + 4
    tags = [
        (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, num_bands, start), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, start + len(extra)), (277, 3, 1, num_bands), (278, 3, 1, 4), (279, 4, 1, len(content)),
        (339, 3, num_bands, start + 2 * num_bands),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + extra + content


@pytest.mark.parametrize(
    ("num_bands", "bits", "kind", "expected"),
    [
        (5, 8, 1, "5 bands of 8-bit whole numbers"),
        (3, 16, 1, "3 bands of 16-bit whole numbers"),
        (3, 32, 3, "3 bands of 32-bit floats"),
    ],
)
def test_tiffs_that_are_not_read_say_of_what_kind_they_are(num_bands, bits, kind, expected):
    assert reason(tiff(num_bands, bits, kind)) == f"a TIFF of {expected} is not read; convert it to 8-bit RGB"
    assert reason(tiff(num_bands, bits, kind)[:60]) == "truncated"


def test_floats_are_read_by_their_range():
    values = np.array([[0.0, 0.5, 1.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    assert pixels(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0, 255, 0]
    assert pixels(encode(Image.fromarray(values[:, :3]), "PPM"))[0, :, 0].tolist() == [0, 128, 255]  # a PFM


def many_scans(num_scans: int, width: int, height: int) -> bytes:
    """Make a progressive JPEG that claims a size and refines its last scan again and again."""
    data = encode(RGB, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    frame = data.index(b"\xff\xc2")
    data = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]
    return data[:last] + data[last:-2] * num_scans + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    start = time.monotonic()
    expected = "64.0 megapixels, which would take minutes to decode"
    assert reason(many_scans(2000, 8000, 8000)).endswith(expected)
    assert time.monotonic() - start < 1
    assert pixels(encode(RGB, "JPEG", progressive=True)).shape == (HEIGHT, WIDTH, 3)
    assert pixels(many_scans(40, WIDTH, HEIGHT)).shape == (HEIGHT, WIDTH, 3)


def test_files_are_bounded_before_they_are_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**31 + 1)
    with pytest.raises(ImageError, match="2,048 MiB, more than the bound of 2,048"):
        open_bytes(tmp_path / "a.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        open_bytes(tmp_path / "a.jpg")


PEAK = """
import resource, sys
from PIL import Image
from lamplit.data.decoding.images import decode_image
decode_image(open(sys.argv[1], "rb").read())
data = open(sys.argv[2], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode_image(data)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes are Linux's unit")
@pytest.mark.parametrize("kind", ["grey16", "float", "P5", "rgba16"])
def test_an_image_takes_about_twice_its_pixels(tmp_path, kind):
    side = 5000
    pixels_bytes = side * side * 3
    match kind:
        case "grey16":
            data = png_16_bits(np.full((side, side), 9, dtype=np.uint16))
        case "float":
            data = encode(Image.new("F", (side, side)), "TIFF")
        case "P5":
            data = b"P5\n%d %d\n65535\n" % (side, side) + bytes(side * side * 2)
        case _:
            data = encode(Image.new("RGBA", (side, side)), "PNG")
    (tmp_path / "small").write_bytes(encode(RGB, "PNG"))
    (tmp_path / "large").write_bytes(data)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert peak < 2.6 * pixels_bytes


def png_header(width: int, height: int) -> bytes:
    data = bytearray(png_16_bits(np.zeros((1, 1), dtype=np.uint16)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_bombs_are_refused_from_their_header():
    before = Image.MAX_IMAGE_PIXELS
    assert reason(png_header(20_000, 5_001)) == "100.0 megapixels, more than the bound of 100"
    assert reason(png_header(20_000, 10_000)) == "200.0 megapixels, more than the bound of 100"
    assert reason(png_header(60_000, 60_000)) == "3600.0 megapixels, more than the bound of 100"
    assert reason(encode(RGB, "JPEG"), max_pixels=1000) == "0.0 megapixels, more than the bound of 0.001"
    assert decode_image(encode(RGB, "JPEG"), max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    assert before == Image.MAX_IMAGE_PIXELS


def fuzz_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey_16 = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 163)
    second = [RGB.rotate(90)]
    return {
        "jpeg": encode(RGB, "JPEG", exif=exif),
        "jpeg, progressive grey": encode(RGB.convert("L"), "JPEG", progressive=True),
        "jpeg, cmyk": encode(RGB.convert("CMYK"), "JPEG"),
        "mpo": encode(RGB, "MPO", save_all=True, append_images=second),
        "png, alpha": encode(RGBA, "PNG", exif=exif),
        "png, 16 bits": encode(grey_16, "PNG"),
        "png, palette": encode(RGB.quantize(16), "PNG", transparency=3),
        "gif": encode(RGB, "GIF", save_all=True, append_images=second),
        "webp": encode(RGBA, "WEBP", exif=exif),
        "webp, animated": encode(RGB, "WEBP", save_all=True, append_images=second),
        "bmp": encode(RGB, "BMP"),
        "tiff": encode(RGB, "TIFF"),
        "tiff, deflate": encode(RGBA, "TIFF", compression="tiff_adobe_deflate"),
        "tiff, float": encode(RGB.convert("F"), "TIFF"),
        "ppm": encode(RGB, "PPM"),
        "jpeg 2000": encode(RGB, "JPEG2000"),
        "ico": encode(RGBA, "ICO", sizes=[(16, 16)]),
    }


FUZZ_FILES = fuzz_files()


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_damage_of_any_kind_decodes_or_is_an_image_error(seed):
    chance = random.Random(seed)
    for name, data in FUZZ_FILES.items():
        damaged = bytearray(data)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(data)) :]
        else:
            reach = len(damaged) if chance.random() < 0.5 else min(len(damaged), 120)
            for _ in range(chance.choice([1, 2, 30])):
                damaged[chance.randrange(reach)] = chance.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                image = decode_image(bytes(damaged), max_pixels=10_000_000)
            except ImageError as error:
                why = str(error)
            else:
                why = "good"
                assert image.dtype == torch.uint8, name
                assert image.dim() == 3, name
        assert why, name
        assert "\n" not in why, name


def test_files_that_cannot_be_read(tmp_path):
    def why(image: Path | bytes) -> str:
        with pytest.raises(ImageError) as caught:
            open_bytes(image)
        return str(caught.value)

    assert open_bytes(b"x") == b"x"
    (tmp_path / "a").write_bytes(b"content")
    assert open_bytes(tmp_path / "a") == b"content"
    assert why(tmp_path / "b") == why(tmp_path / "a" / "b") == why(Path("a\0b")) == "file not found"
    assert why(tmp_path) == "file cannot be read (Is a directory)"
    assert why(tmp_path / ("n" * 300)).startswith("file cannot be read (")


# ------------------------------------------------------------------------------------------------ batches

PREPROCESSING = Preprocessing((16, 24), (0.5,) * 3, (0.5,) * 3, fit="squash")


def make_pairs(tmp_path: Path) -> list[Pair]:
    good = encode(RGB, "JPEG")
    (tmp_path / "good.jpg").write_bytes(good)
    (tmp_path / "empty.jpg").write_bytes(b"")
    contents: list[tuple[str, Path | bytes]] = [
        ("a", tmp_path / "good.jpg"),
        ("b", tmp_path / "empty.jpg"),
        ("c", tmp_path / "missing.jpg"),
        ("d", encode(RGBA, "PNG")),
        ("e", good[:200]),
        ("f", b"words"),
        ("g", encode(RGB, "GIF")),
        ("h", png_header(50_000, 50_000)),
    ]
    return [Pair(name, image, (f"text of {name}",), {}) for name, image in contents]


def digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def contents_by_id(known):
    return lambda names: [known.get(name, -1) for name in names]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_order_and_list_what_is_skipped(tmp_path, workers):
    pairs = make_pairs(tmp_path)
    known = {"g": content_key(digest(open_bytes(pairs[6].image))), "d": content_key("another")}
    batches = list(read_batches(iter(pairs), PREPROCESSING, batch_size=3, workers=workers, known=contents_by_id(known)))
    assert [[pair.id for pair in batch.pairs] for batch in batches] == [["a"], ["d"], []]
    assert [batch.unchanged for batch in batches] == [[], [], [(pairs[6], digest(open_bytes(pairs[6].image)))]]
    assert [batch.images.shape for batch in batches] == [(1, 3, 16, 24), (1, 3, 16, 24), (0, 3, 16, 24)]
    assert [skipped for batch in batches for skipped in batch.skipped] == [
        Skipped("b", str(tmp_path / "empty.jpg"), "empty file"),
        Skipped("c", str(tmp_path / "missing.jpg"), "file not found"),
        Skipped("e", "e", "truncated"),
        Skipped("f", "f", "not an image"),
        Skipped("h", "h", "2500.0 megapixels, more than the bound of 100"),
    ]
    for batch, pair in ((batches[0], pairs[0]), (batches[1], pairs[3])):
        data = open_bytes(pair.image)
        assert batch.pairs == [pair]
        assert batch.hashes == [digest(data)]
        assert torch.equal(batch.images[0], PREPROCESSING.resize(decode_image(data)))


@pytest.mark.parametrize("workers", [0, 1])
def test_stored_content_is_not_decoded(tmp_path, workers):
    pairs = make_pairs(tmp_path)
    hashes = [digest(open_bytes(pairs[place].image)) for place in (0, 4)]  # the second is truncated
    batches = list(
        read_batches(
            pairs, PREPROCESSING, batch_size=3, workers=workers,
            known=contents_by_id({"a": content_key(hashes[0])}), stored=SortedKeys.of(keys_of(hashes)),
        )
    )  # fmt: skip
    assert [pair.id for batch in batches for pair, _ in batch.unchanged] == ["a"]
    assert [(pair.id, content) for batch in batches for pair, content in batch.stored] == [("e", hashes[1])]
    assert [batch.size for batch in batches] == [3, 3, 2]


@settings(max_examples=40)
@given(kinds=st.text("uuuncsm", max_size=40), batch_size=st.integers(1, 4), blocks=st.integers(1, 4))
def test_long_batches_of_known_files_hold_what_short_ones_do(
    tmp_path_factory: pytest.TempPathFactory, kinds: str, batch_size: int, blocks: int
) -> None:
    folder = tmp_path_factory.mktemp("known")
    pairs, known, stored = [], {}, [digest(b"")]
    expected: dict[str, list[tuple[str, str]]] = {"n": [], "u": [], "s": [], "m": []}
    for place, kind in enumerate(kinds):  # unchanged, new, changed, stored for another, missing
        data = encode(Image.new("RGB", (WIDTH, HEIGHT), (place, 0, 0)), "PNG")
        file = folder / f"{place}.png"
        if kind != "m":
            file.write_bytes(data)
        if kind == "s":
            stored.append(digest(data))
        if kind != "n":
            known[str(place)] = content_key(digest(data if kind == "u" else b"before"))
        pairs.append(Pair(str(place), file, (), {}))
        expected["n" if kind == "c" else kind].append((str(place), digest(data)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCKS_BEFORE", blocks)
        batches = list(
            read_batches(
                pairs, PREPROCESSING, batch_size=batch_size, workers=0,
                known=contents_by_id(known), stored=SortedKeys.of(keys_of(stored)),
            )
        )  # fmt: skip
    assert all(len(batch.images) == len(batch.pairs) <= batch_size for batch in batches)
    good = [(pair.id, name) for batch in batches for pair, name in zip(batch.pairs, batch.hashes, strict=True)]
    assert good == expected["n"]
    assert [(pair.id, name) for batch in batches for pair, name in batch.unchanged] == expected["u"]
    assert [(pair.id, name) for batch in batches for pair, name in batch.stored] == expected["s"]
    assert [item.id for batch in batches for item in batch.skipped] == [name for name, _ in expected["m"]]
    for pair, pixels in (
        (pair, pixels) for batch in batches for pair, pixels in zip(batch.pairs, batch.images, strict=True)
    ):
        assert torch.equal(pixels, PREPROCESSING.resize(decode_image(pair.image.read_bytes())))


def test_a_long_run_gives_a_worker_many_known_files_at_once(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(RGB, "PNG"))
    content = content_key(digest((tmp_path / "a.png").read_bytes()))
    pairs = [Pair(str(number), tmp_path / "a.png", (), {}) for number in range(400)]
    batches = list(
        read_batches(pairs, PREPROCESSING, batch_size=2, workers=1, known=lambda names: [content] * len(names))
    )
    sizes = [batch.size for batch in batches]
    assert sum(sizes) == sum(len(batch.unchanged) for batch in batches) == 400
    assert sizes[:32] == [2] * 32
    assert max(sizes) > 8
    batches = list(read_batches(pairs, PREPROCESSING, batch_size=2, workers=1))
    assert [batch.size for batch in batches] == [2] * 200


def test_memory_does_not_grow_with_the_known_files(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encode(RGB, "PNG"))
    content = content_key(digest(file.read_bytes()))

    def peak(size: int) -> int:
        pairs = (Pair(str(number), file, (), {}) for number in range(size))
        known = lambda names: [content] * len(names)  # noqa: E731
        tracemalloc.start()
        for batch in read_batches(pairs, PREPROCESSING, batch_size=2, workers=0, known=known):
            assert len(batch.unchanged) == batch.size
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(12_000) < peak(3_000) + 20_000


@pytest.mark.parametrize("workers", [0, 1])
def test_pairs_are_read_lazily(workers):
    data = encode(RGB, "PNG")
    asked = []

    def endless():
        for number in range(10**9):
            asked.append(number)
            yield Pair(str(number), data, (), {})

    batches = list(islice(read_batches(endless(), PREPROCESSING, batch_size=4, workers=workers), 3))
    assert [pair.id for batch in batches for pair in batch.pairs] == [str(number) for number in range(12)]
    assert len(asked) <= 4 * (3 + 2 * max(workers, 1))


def test_errors_of_the_source_arrive():
    def broken():
        yield Pair("0", encode(RGB, "PNG"), (), {})
        raise ImageError("the source broke")

    with pytest.raises(ImageError, match="the source broke"):
        list(read_batches(broken(), PREPROCESSING, batch_size=1, workers=1))


def test_nothing_gives_no_batches():
    assert list(read_batches([], PREPROCESSING, batch_size=4, workers=0)) == []


SCRIPT = """
if __name__ == "__main__":
    import lance, sys  # whose threads must not be forked
    from lamplit.data.decoding.images import read_batches
    from lamplit.data.pairs import Pair
    from lamplit.data.decoding.preprocessing import Preprocessing

    preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3)
    data = bytes.fromhex(sys.argv[1])
    pairs = [Pair(str(number), data, (), {}) for number in range(40)]
    print(sum(len(batch.pairs) for batch in read_batches(pairs, preprocessing, batch_size=4, workers=2)))
"""


@pytest.mark.slow
def test_a_script_with_lance_and_damaged_jpegs_stays_quiet(tmp_path):
    data = bytearray(encode(RGB, "JPEG"))
    data[-40:-30] = bytes(10)
    decode_image(bytes(data))  # libjpeg warns, on file descriptor 2
    (tmp_path / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "script.py"), bytes(data).hex()],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (result.stdout, result.stderr) == ("40\n", "")


def test_a_batch_can_be_built_by_hand():
    assert Batch(torch.empty(0, 3, 1, 1, dtype=torch.uint8), [], [], [], [], []).pairs == []


ENDLESS = """
if __name__ == "__main__":
    import itertools, sys
    from lamplit.data.decoding.images import read_batches
    from lamplit.data.pairs import Pair
    from lamplit.data.decoding.preprocessing import Preprocessing

    preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3)
    data = bytes.fromhex(sys.argv[1])
    pairs = (Pair(str(number), data, (), {}) for number in itertools.count())
    for batch in read_batches(pairs, preprocessing, batch_size=4, workers=2):
        print("ready", flush=True)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_main_process(tmp_path):
    (tmp_path / "script.py").write_text(ENDLESS)
    command = [sys.executable, str(tmp_path / "script.py"), encode(RGB, "PNG").hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3, "the fork server and two workers"
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
