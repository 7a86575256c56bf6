"""From encoded images to batches of pixels, in worker processes that run ahead of the tower.

An image among a million that cannot be used never ends a run: it is an `ImageError` here, and a `Skipped`
with its reason in the batch it would have been in.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import to_pil_image

from lamplit.data.decoding.image_reasons import decoding_reason, is_heif, no_heif, raw_reason
from lamplit.data.decoding.pixels import rgb_pixels
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.decoding.svg import is_svg, svg_to_png
from lamplit.data.decoding.workers import identity_collate, worker_context, worker_start
from lamplit.data.places.image_files import MAX_IMAGE_BYTES, read_image
from lamplit.data.places.image_places import parse_place
from lamplit.data.skipped import Skipped
from lamplit.data.sorted_keys import SortedKeys, keys_of
from lamplit.errors import ImageError, MissingExtraError, require

if TYPE_CHECKING:  # the workers need no readers of tables
    from lamplit.data.pairs import Pair

_MOST_BLOCKS = 16  # of `batch_size` known pairs that a worker gets at once, after so many times the next number of them
_BLOCKS_BEFORE = 32
_DIGEST_BYTES = 16  # of the hash of an encoded image
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
        batch_size: images in a batch, at most, and pairs, as long as not all of them are known; of pairs that are
            known a batch may have many more.
        workers: processes that decode, one thread each.
        known: gives for the ids of some pairs the `content_key` of what is stored for each, -1 for none.
        stored: keys of the content hashes whose vectors the caller has, of any pair.
        max_pixels: larger images are skipped without decoding them.

    Raises:
        PairsError: while iterating, if the rest of the pairs cannot be read.
    """
    images = _Images(preprocessing, max_pixels, stored, batch_size)
    waiting: deque[tuple[list[Pair], _Job]] = deque()  # the pairs stay here; only what the workers need travels

    def jobs() -> Iterator[_Job]:
        for chunk in _chunks(pairs, batch_size, known):
            waiting.append(chunk)
            yield chunk[1]

    loader = DataLoader(
        images,
        batch_sampler=jobs(),  # type: ignore[arg-type]  # any iterable serves, and indices may be anything
        num_workers=workers,
        collate_fn=identity_collate,
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=worker_start() if workers else None,
    )
    return _collect(iter(loader), waiting, images)


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


def read_thumbnail(image: Path | bytes, side: int, most: int = MAX_IMAGE_BYTES) -> Image.Image:
    """Read an image and make it small: at most `side` x `side` pixels, RGB, its transparent parts on white.

    Args:
        image: what `open_bytes` takes.
        side: in pixels.
        most: bytes of the largest encoded image that is read.

    Raises:
        ImageError: with the reason in a few words.
    """
    small: Image.Image = to_pil_image(decode_image(open_bytes(image, most), name=name_of(image)))
    small.thumbnail((side, side))
    return small


def open_bytes(image: Path | bytes, most: int = MAX_IMAGE_BYTES) -> bytes:
    """Return the encoded image, which may lie in a tar or a table, as the path of a store says.

    Raises:
        ImageError: it cannot be read, or is larger than `most` bytes.
    """
    return image if isinstance(image, bytes) else read_image(str(image), most)


def name_of(image: Path | bytes) -> str:
    """Return the name of an image's file; "" if it has none of its own."""
    return "" if isinstance(image, bytes) or parse_place(str(image)) else image.name


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


_GOOD, _BAD, _UNCHANGED, _STORED = range(4)


class _Job(NamedTuple):
    """Images that one worker reads."""

    images: list[str | bytes]  # names of files, or encoded images
    known: list[int]  # as `read_batches` got them


class _Result(NamedTuple):
    """What a worker made of the first B images of a job, often all; few objects, for they go through a pipe."""

    pixels: Tensor | None  # of the good ones; None if there are none, because a tensor takes long to send
    kinds: bytes  # (B,) one of the above each
    digests: bytes  # of 16 bytes each, zeros for a bad one
    reasons: list[str]  # of the bad ones, in their order


def _chunks(
    pairs: Iterable[Pair], batch_size: int, known: Callable[[Sequence[str]], Sequence[int]] | None
) -> Iterator[tuple[list[Pair], _Job]]:
    """Yield `batch_size` pairs with their job; more and more in a long run, if they are files and known.

    To send a job takes longer than to read some small files, and those that are known need not be decoded. In a short
    run every worker gets some.
    """
    rest, num_blocks = iter(pairs), 0
    chunk: list[Pair] = []
    job = _Job([], [])
    while block := list(islice(rest, batch_size)):
        contents = known([pair.id for pair in block]) if known else [-1] * len(block)
        chunk += block
        job.images.extend(pair.image if isinstance(pair.image, bytes) else str(pair.image) for pair in block)
        job.known.extend(contents)
        num_blocks += 1
        is_long = len(chunk) >= batch_size * min(_MOST_BLOCKS, num_blocks // _BLOCKS_BEFORE)
        if is_long or -1 in contents or any(isinstance(pair.image, bytes) for pair in block):
            yield chunk, job
            chunk, job = [], _Job([], [])
    if chunk:
        yield chunk, job


class _Images(Dataset[_Result]):
    """Images by their jobs: what runs in the workers."""

    def __init__(
        self, preprocessing: Preprocessing, max_pixels: int, stored: SortedKeys | None, batch_size: int
    ) -> None:
        self.preprocessing = preprocessing
        self.max_pixels = max_pixels
        self.stored = stored  # every worker gets a copy, and a million take 24 MB
        self.batch_size = batch_size

    def __getitems__(self, job: _Job) -> _Result:
        """Read a job's images until `batch_size` of them are good."""
        kinds, digests = bytearray(), bytearray()
        pixels: list[Tensor] = []
        reasons: list[str] = []
        for image, known in zip(*job, strict=True):
            digest = bytes(_DIGEST_BYTES)
            try:
                data = image if isinstance(image, bytes) else read_image(image)
                content = blake2b(data, digest_size=_DIGEST_BYTES)
                kind = self._kind(content.hexdigest(), known)
                if kind == _GOOD:
                    pixels.append(self._decode(data, name_of(image if isinstance(image, bytes) else Path(image))))
                digest = content.digest()
            except ImageError as error:
                kind = _BAD
                reasons.append(str(error))
            kinds.append(kind)
            digests += digest
            if len(pixels) == self.batch_size:
                break
        return _Result(torch.stack(pixels) if pixels else None, bytes(kinds), bytes(digests), reasons)

    def _kind(self, content_hash: str, known: int) -> int:
        if content_key(content_hash) == known:
            return _UNCHANGED
        is_stored = self.stored is not None and self.stored.find(keys_of([content_hash]))[0] >= 0
        return _STORED if is_stored else _GOOD

    def _decode(self, data: bytes, name: str) -> Tensor:
        return self.preprocessing.resize(decode_image(data, name=name, max_pixels=self.max_pixels))


def _collect(results: Iterator[_Result], waiting: deque[tuple[list[Pair], _Job]], images: _Images) -> Iterator[Batch]:
    no_pixels = torch.empty(0, 3, *images.preprocessing.image_size, dtype=torch.uint8)
    for result in results:
        pairs, job = waiting.popleft()
        done = len(result.kinds)
        yield _batch(pairs[:done], result, no_pixels)
        while done < len(pairs):  # many known files have changed: what does not fit into a batch is read here
            result = images.__getitems__(_Job(job.images[done:], job.known[done:]))
            yield _batch(pairs[done : done + len(result.kinds)], result, no_pixels)
            done += len(result.kinds)


def _batch(pairs: list[Pair], result: _Result, no_pixels: Tensor) -> Batch:
    batch = Batch(no_pixels if result.pixels is None else result.pixels, [], [], [], [], [])
    written, bad, width = result.digests.hex(), iter(result.reasons), 2 * _DIGEST_BYTES
    for place, (pair, kind) in enumerate(zip(pairs, result.kinds, strict=True)):
        content_hash = written[place * width : (place + 1) * width]
        if kind == _UNCHANGED:
            batch.unchanged.append((pair, content_hash))
        elif kind == _STORED:
            batch.stored.append((pair, content_hash))
        elif kind == _GOOD:
            batch.pairs.append(pair)
            batch.hashes.append(content_hash)
        else:
            batch.skipped.append(Skipped(pair.id, pair.path, next(bad)))
    return batch
