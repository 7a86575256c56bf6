"""From encoded images to batches of pixels, in worker processes that run ahead of the tower.

An image among a million that cannot be used never ends a run: it is an `ImageError` here, and a `Skipped`
with its reason in the batch it would have been in.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import to_pil_image

from lamplit.data.preprocessing import Preprocessing
from lamplit.data.workers import identity_collate, start_worker, worker_context
from lamplit.errors import ImageError, first_line

if TYPE_CHECKING:  # the workers need no readers of tables
    from lamplit.data.pairs import Pair

MAX_PIXELS = 100_000_000  # checked from the header, before anything is decoded

# What Pillow may open. Others can do more than hold pixels: it runs Ghostscript for an EPS file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# What Pillow and torchvision raise on damaged files: 140,000 that were damaged at random gave these, and MemoryError
# comes from sizes that only the header claims.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, RuntimeError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Skipped:
    """An image that cannot be used, as listed in `skipped.jsonl`.

    Attributes:
        id: of the image in its source.
        path: of the image's file; the id again if the image has no file of its own.
        reason: why it cannot be used, as one sentence.
    """

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Images ready for a tower, beside those that will not reach it."""

    images: Tensor  # (B, 3, height, width) uint8; B may be 0
    pairs: list[Pair]  # of the images, in their order
    hashes: list[str]  # of the images' encoded bytes
    skipped: list[Skipped]
    unchanged: list[Pair]  # whose bytes have the known hash; not decoded
    stored: list[tuple[Pair, str]]  # whose bytes are stored for another pair, and their hash; not decoded

    @property
    def size(self) -> int:
        """Number of pairs that went into this batch, usable or not."""
        return len(self.images) + len(self.skipped) + len(self.unchanged) + len(self.stored)


def read_batches(
    pairs: Iterable[Pair],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    known: Mapping[str, str] | None = None,
    stored: Collection[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Batch]:
    """Decode and resize images in batches, in the order of the pairs.

    Worker processes start at once and run two batches each ahead of the caller; pairs are read lazily. With
    `workers=0` everything happens in this process when a batch is asked for. Workers are never forked from
    this process (threads of Lance and ONNX Runtime do not survive that), so a script needs the usual
    `if __name__ == "__main__":`.

    Args:
        pairs: what to read.
        preprocessing: how the tower wants its images.
        batch_size: pairs in a batch; it has fewer images if some are skipped, unchanged or stored.
        workers: processes that decode, one thread each.
        known: pair id to the content hash that is stored already.
        stored: content hashes whose vectors the caller has, of any pair.
        max_pixels: larger images are skipped without decoding them.

    Raises:
        PairsError: while iterating, if the rest of the pairs cannot be read.
    """
    known = known or {}
    waiting: deque[list[Pair]] = deque()

    def jobs() -> Iterator[list[_Job]]:
        rest = iter(pairs)
        while chunk := list(islice(rest, batch_size)):
            waiting.append(chunk)  # the pairs stay here; only what the workers need travels
            yield [_Job(pair.image, known.get(pair.id)) for pair in chunk]

    loader = DataLoader(
        _Images(preprocessing, max_pixels, stored),
        batch_sampler=jobs(),  # any iterable of lists serves, and indices may be anything
        num_workers=workers,
        collate_fn=identity_collate,
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=start_worker,
    )
    return _collect(iter(loader), waiting)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image to (3, H, W) uint8 RGB, upright, its transparent parts on white.

    An animation gives its first frame; 16-bit grey is scaled, not clipped.

    Raises:
        ImageError: with the reason in a few words.
    """
    if not data:
        raise ImageError("empty file")
    with warnings.catch_warnings():  # Pillow warns about a bound of its own, and about every odd tag
        warnings.simplefilter("ignore")
        with _decoding(data, max_pixels):
            opened = Image.open(io.BytesIO(data), formats=_FORMATS)
        with opened as image:
            _check_size(image.width * image.height, max_pixels)
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                with _decoding(data, max_pixels):
                    return _decode_jpeg(data)
            return _pixels(image, data, max_pixels)


def convert_image(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Do what `decode_image` does with an image that Pillow has opened or made.

    Raises:
        ImageError: with the reason in a few words.
    """
    _check_size(image.width * image.height, max_pixels)
    return _pixels(image, b"", max_pixels)


def decoding_cost(data: bytes) -> tuple[int, int]:
    """Return how many pixels an encoded image says it has, and how many scans a JPEG has; nothing is decoded.

    Each scan of a progressive JPEG passes over all pixels again: 2,000 scans of 64 megapixels take over a minute.

    Raises:
        ImageError: it is no image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _decoding(data, MAX_PIXELS), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            is_jpeg = image.format in ("JPEG", "MPO")
            return image.width * image.height, max(1, data.count(b"\xff\xda")) if is_jpeg else 1


def read_thumbnail(image: Path | bytes, side: int) -> Image.Image:
    """Read an image and make it small: at most `side` x `side` pixels, RGB, its transparent parts on white.

    Raises:
        ImageError: with the reason in a few words.
    """
    small: Image.Image = to_pil_image(decode_image(open_bytes(image)))
    small.thumbnail((side, side))
    return small


def open_bytes(image: Path | bytes) -> bytes:
    """Return the encoded image.

    Raises:
        ImageError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("file not found") from error
    except OSError as error:
        raise ImageError(f"file cannot be read ({error.strerror})") from error
    except ValueError as error:  # a path that no system call takes
        raise ImageError("file not found") from error


def _decode_jpeg(data: bytes) -> Tensor:
    # 1.7 times as fast as Pillow; simplejpeg was no faster, resizing included.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    return pixels


@contextmanager
def _decoding(data: bytes, max_pixels: int) -> Iterator[None]:
    """Turn what Pillow and torchvision raise on a damaged image into an `ImageError`; only for their calls."""
    try:
        yield
    except _DECODE_ERRORS as error:
        raise ImageError(_reason(error, data, max_pixels)) from error


def _pixels(image: Image.Image, data: bytes, max_pixels: int) -> Tensor:
    with _decoding(data, max_pixels):
        image.load()
        image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_to_8_bits(image)
    with _decoding(data, max_pixels):
        image = _on_white(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        method = _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except SyntaxError:  # damaged EXIF; the pixels are good, and viewers ignore it too
        return image
    return image if method is None else image.transpose(method)


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16") and image.format not in ("PNG", "PPM"):
        # 32-bit and float greys do not say what white is: the least usual white that no pixel exceeds, or
        # else the range of the pixels.
        low, high = min(float(values.min()), 0.0), float(values.max())
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        if low == 0:
            high = next((white for white in whites if high <= white), high)
    grey = (values - low) * (255 / ((high - low) or 1))
    if "transparency" in image.info and image.mode.startswith("I;16"):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def _check_size(num_pixels: int, max_pixels: int) -> None:
    if num_pixels > max_pixels:
        raise ImageError(f"{num_pixels / 1e6:.1f} megapixels, more than the bound of {max_pixels / 1e6:g}")


def _reason(error: Exception, data: bytes, max_pixels: int) -> str:
    if isinstance(error, Image.DecompressionBombError):
        # Pillow's own bound, twice `PIL.Image.MAX_IMAGE_PIXELS`, comes before ours and tells the size so.
        size = re.search(r"\d+", str(error))
        bound = f"more than the bound of {max_pixels / 1e6:g}"
        return f"{int(size.group()) / 1e6:.1f} megapixels, {bound}" if size else f"megapixels: {bound}"
    if isinstance(error, UnidentifiedImageError):
        if b"<svg" in data[:4096].lower():
            return "SVG is not a raster image"
        if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1"):
            return "HEIC is not read; convert it to JPEG"
        return "truncated" if data.startswith(_SIGNATURES) else "not an image"
    text = first_line(error)
    # A WEBP says how long it is, and its reader does not say what is wrong with it.
    is_short = data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")
    if is_short or isinstance(error, EOFError) or re.search("truncated|end of file|not enough", text, re.I):
        return "truncated"
    text = re.sub(r"^decode_jpeg, \S+, ", "", text)  # torchvision's messages begin with a line of its source
    return f"damaged ({text[:120]})"


class _Job(NamedTuple):
    image: Path | bytes
    known_hash: str | None


class _Outcome(NamedTuple):
    hash: str
    reason: str  # empty if the image is good
    is_unchanged: bool = False
    is_stored: bool = False


class _Images(Dataset[tuple[Tensor, list[_Outcome]]]):
    """Images by their jobs, a batch at a time: what runs in the workers."""

    def __init__(self, preprocessing: Preprocessing, max_pixels: int, stored: Collection[str]) -> None:
        self.preprocessing = preprocessing
        self.max_pixels = max_pixels
        # Sorted, as an array: every worker gets a copy, and a million take 32 MB.
        self.stored = np.sort(np.array(list(stored), dtype="S32"))

    def __getitems__(self, jobs: list[_Job]) -> tuple[Tensor, list[_Outcome]]:
        images: list[Tensor] = []
        outcomes = [self._decode(job, images) for job in jobs]
        if not images:
            images_of_none = torch.empty(0, 3, *self.preprocessing.image_size, dtype=torch.uint8)
            return images_of_none, outcomes
        return torch.stack(images), outcomes

    def _decode(self, job: _Job, images: list[Tensor]) -> _Outcome:
        try:
            data = open_bytes(job.image)
            content_hash = blake2b(data, digest_size=16).hexdigest()
            if content_hash == job.known_hash:
                return _Outcome(content_hash, "", is_unchanged=True)
            if self._is_stored(content_hash):
                return _Outcome(content_hash, "", is_stored=True)
            images.append(self.preprocessing.resize(decode_image(data, max_pixels=self.max_pixels)))
        except ImageError as error:
            return _Outcome("", str(error))
        return _Outcome(content_hash, "")

    def _is_stored(self, content_hash: str) -> bool:
        index = np.searchsorted(self.stored, content_hash.encode())
        return bool(index < len(self.stored) and self.stored[index] == content_hash.encode())


def _collect(results: Iterator[tuple[Tensor, list[_Outcome]]], waiting: deque[list[Pair]]) -> Iterator[Batch]:
    for images, outcomes in results:
        batch = Batch(images, [], [], [], [], [])
        for pair, outcome in zip(waiting.popleft(), outcomes, strict=True):
            if outcome.reason:
                path = str(pair.image) if isinstance(pair.image, Path) else pair.id
                batch.skipped.append(Skipped(pair.id, path, outcome.reason))
            elif outcome.is_unchanged:
                batch.unchanged.append(pair)
            elif outcome.is_stored:
                batch.stored.append((pair, outcome.hash))
            else:
                batch.pairs.append(pair)
                batch.hashes.append(outcome.hash)
        yield batch
