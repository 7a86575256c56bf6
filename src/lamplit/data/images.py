"""From encoded images to batches of pixels, in worker processes that run ahead of the tower.

An image among a million that cannot be used never ends a run: it is an `ImageError` here, and a `Skipped`
with its reason in the batch it would have been in.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import to_pil_image

from lamplit.data.image_files import MAX_IMAGE_BYTES
from lamplit.data.image_reasons import decoding_reason, is_heif, no_heif, raw_reason
from lamplit.data.pixels import rgb_pixels
from lamplit.data.preprocessing import Preprocessing
from lamplit.data.skipped import Skipped
from lamplit.data.sorted_keys import SortedKeys, keys_of
from lamplit.data.svg import is_svg, svg_to_png
from lamplit.data.workers import identity_collate, worker_context, worker_start
from lamplit.errors import ImageError, MissingExtraError, require

if TYPE_CHECKING:  # the workers need no readers of tables
    from lamplit.data.pairs import Pair

MAX_PIXELS = 100_000_000  # checked from the header, before anything is decoded

# What Pillow may open. Others can do more than hold pixels: it runs Ghostscript for an EPS file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_MANY_SCANS = 30  # a JPEG of a camera has 1, a progressive one about 10
_MAX_SCANNED_PIXELS = 4e9  # of all scans; some seconds
# What Pillow and torchvision raise on damaged files: 140,000 that were damaged at random gave these, and MemoryError
# comes from sizes that only the header claims.
_DECODE_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, RuntimeError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Images ready for a tower, beside those that will not reach it."""

    images: Tensor  # (B, 3, height, width) uint8; B may be 0
    pairs: list[Pair]  # of the images, in their order
    hashes: list[str]  # of the images' encoded bytes
    skipped: list[Skipped]
    unchanged: list[tuple[Pair, str]]  # whose bytes have the known content, and their hash; not decoded
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
    known: Callable[[Sequence[str]], Sequence[int]] | None = None,
    stored: SortedKeys | None = None,
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
        known: gives for the ids of some pairs the `content_key` of what is stored for each, -1 for none.
        stored: keys of the content hashes whose vectors the caller has, of any pair.
        max_pixels: larger images are skipped without decoding them.

    Raises:
        PairsError: while iterating, if the rest of the pairs cannot be read.
    """
    waiting: deque[list[Pair]] = deque()

    def jobs() -> Iterator[list[_Job]]:
        rest = iter(pairs)
        while chunk := list(islice(rest, batch_size)):
            waiting.append(chunk)  # the pairs stay here; only what the workers need travels
            contents = known([pair.id for pair in chunk]) if known else repeat(-1)
            yield [_Job(pair.image, content) for pair, content in zip(chunk, contents, strict=False)]

    loader = DataLoader(
        _Images(preprocessing, max_pixels, stored),
        batch_sampler=jobs(),  # any iterable of lists serves, and indices may be anything
        num_workers=workers,
        collate_fn=identity_collate,
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=worker_start() if workers else None,
    )
    return _collect(iter(loader), waiting)


def decode_image(data: bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image to (3, H, W) uint8 RGB, upright, its transparent parts on white.

    An animation gives its first frame; 16-bit grey is scaled, not clipped. The name of its file, if it has one, tells
    a camera's raw file from the small preview in it. An SVG is drawn, 512 pixels wide or high.

    Raises:
        ImageError: with the reason in a few words.
    """
    if not data:
        raise ImageError("empty file")
    if reason := raw_reason(name):
        raise ImageError(reason)
    with warnings.catch_warnings():  # Pillow warns about a bound of its own, and about every odd tag
        warnings.simplefilter("ignore")
        if is_svg(data):
            data = svg_to_png(data, max_pixels)
        formats = _formats(data)
        with _decoding(data, max_pixels):
            opened = Image.open(io.BytesIO(data), formats=formats)
        with opened as image:
            _check_size(image.width * image.height, max_pixels)
            if image.format in ("JPEG", "MPO"):
                _require_few_scans(data, image.width * image.height)
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
        ImageError: it is no image, or an SVG.
    """
    if is_svg(data):  # what it costs to draw is not in its size
        raise ImageError("SVG is read from files only; convert it to PNG")
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
    small: Image.Image = to_pil_image(decode_image(open_bytes(image), name=name_of(image)))
    small.thumbnail((side, side))
    return small


def open_bytes(image: Path | bytes) -> bytes:
    """Return the encoded image.

    Raises:
        ImageError: the file cannot be read, or is larger than any image.
    """
    if isinstance(image, bytes):
        return image
    try:
        status = os.stat(image)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ImageError("not a regular file")  # a pipe would be waited for
        if status.st_size > MAX_IMAGE_BYTES:
            size, most = status.st_size / 2**20, MAX_IMAGE_BYTES / 2**20
            raise ImageError(f"{size:,.0f} MiB, more than the bound of {most:,.0f}")
        return image.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("file not found") from error
    except OSError as error:
        raise ImageError(f"file cannot be read ({error.strerror})") from error
    except ValueError as error:  # a path that no system call takes
        raise ImageError("file not found") from error


def name_of(image: Path | bytes) -> str:
    """Return the name of an image's file; "" if it has none."""
    return "" if isinstance(image, bytes) else image.name


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
        raise ImageError(decoding_reason(error, data, max_pixels)) from error


def _pixels(image: Image.Image, data: bytes, max_pixels: int) -> Tensor:
    with _decoding(data, max_pixels):
        image.load()
        return torch.from_numpy(rgb_pixels(image)).permute(2, 0, 1)


def _require_few_scans(data: bytes, num_pixels: int) -> None:
    """Refuse a JPEG that refines its pixels so often that it takes minutes.

    Inside the scans every 0xFF is followed by a zero, so the marker of a scan is found wherever it stands; in other
    segments it is rare.
    """
    scans = data.count(b"\xff\xda")
    if scans > _MANY_SCANS and scans * num_pixels > _MAX_SCANNED_PIXELS:
        raise ImageError(f"{scans:,} scans of {num_pixels / 1e6:.1f} megapixels, which would take minutes to decode")


def _formats(data: bytes) -> tuple[str, ...]:
    """Return what Pillow may open; HEIF only by the extra that reads it."""
    if not is_heif(data):
        return _FORMATS
    try:
        require("pillow_heif", "heic").register_heif_opener()
    except MissingExtraError as error:
        raise ImageError(no_heif(error)) from error
    return ("HEIF",)


def _check_size(num_pixels: int, max_pixels: int) -> None:
    if num_pixels > max_pixels:
        raise ImageError(f"{num_pixels / 1e6:.1f} megapixels, more than the bound of {max_pixels / 1e6:g}")


def content_key(content_hash: str) -> int:
    """Return the first half of the key of a content hash: if two are equal, so are the contents."""
    return int(keys_of([content_hash])[0, 0])


class _Job(NamedTuple):
    image: Path | bytes
    known: int


class _Outcome(NamedTuple):
    hash: str
    reason: str  # empty if the image is good
    is_unchanged: bool = False
    is_stored: bool = False


class _Images(Dataset[tuple[Tensor, list[_Outcome]]]):
    """Images by their jobs, a batch at a time: what runs in the workers."""

    def __init__(self, preprocessing: Preprocessing, max_pixels: int, stored: SortedKeys | None) -> None:
        self.preprocessing = preprocessing
        self.max_pixels = max_pixels
        self.stored = stored  # every worker gets a copy, and a million take 24 MB

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
            key = keys_of([content_hash])
            if int(key[0, 0]) == job.known:
                return _Outcome(content_hash, "", is_unchanged=True)
            if self.stored is not None and self.stored.find(key)[0] >= 0:
                return _Outcome(content_hash, "", is_stored=True)
            image = decode_image(data, name=name_of(job.image), max_pixels=self.max_pixels)
            images.append(self.preprocessing.resize(image))
        except ImageError as error:
            return _Outcome("", str(error))
        return _Outcome(content_hash, "")


def _collect(results: Iterator[tuple[Tensor, list[_Outcome]]], waiting: deque[list[Pair]]) -> Iterator[Batch]:
    for images, outcomes in results:
        batch = Batch(images, [], [], [], [], [])
        for pair, outcome in zip(waiting.popleft(), outcomes, strict=True):
            if outcome.reason:
                path = str(pair.image) if isinstance(pair.image, Path) else pair.id
                batch.skipped.append(Skipped(pair.id, path, outcome.reason))
            elif outcome.is_unchanged:
                batch.unchanged.append((pair, outcome.hash))
            elif outcome.is_stored:
                batch.stored.append((pair, outcome.hash))
            else:
                batch.pairs.append(pair)
                batch.hashes.append(outcome.hash)
        yield batch
