"""Why an image is not read, by what its bytes and its name say it is."""

from __future__ import annotations

import io
import os
import re
import struct

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from lamplit.errors import MissingExtraError, first_line

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_OTHERS = {
    b"\xff\x0a": "JPEG XL is not read; convert it to JPEG",
    b"\0\0\0\x0cJXL ": "JPEG XL is not read; convert it to JPEG",
    b"\x1f\x8b": "a compressed file (.svgz, .gz) is not read; decompress it",
    b"8BPS": "Photoshop's format is not read; convert it to JPEG",
    b"v/1\x01": "OpenEXR is not read; convert it to PNG",
    b"#?RADIANCE": "Radiance HDR is not read; convert it to PNG",
}
_RAW_SUFFIXES = frozenset((
    ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw",
))  # fmt: skip
_HEIF_BRANDS = frozenset((
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2",
))  # fmt: skip
_SAMPLE_KINDS = {1: "whole numbers", 2: "signed numbers", 3: "floats"}


def is_heif(data: bytes) -> bool:
    """Tell whether an encoded image is HEIF, of any brand but AVIF, which Pillow reads itself."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, end, 4))}
    return bool(brands & _HEIF_BRANDS) and brands.isdisjoint((b"avif", b"avis"))


def no_heif(error: MissingExtraError) -> str:
    """Return the reason of a HEIF image where the extra that reads it is missing."""
    return f"HEIC is not read: {error}"


def raw_reason(name: str) -> str:
    """Return the reason of a camera's raw file by its name; "" if it is not one.

    Most open as TIFF, but as the small preview that is in them.
    """
    suffix = os.path.splitext(name)[1].lower()
    return f"a camera's raw file ({suffix}) is not read; convert it to JPEG" if suffix in _RAW_SUFFIXES else ""


def decoding_reason(error: Exception, data: bytes, max_pixels: int) -> str:
    """Return the reason of an image on which Pillow or torchvision raised an error."""
    if isinstance(error, Image.DecompressionBombError):
        # Pillow's own bound, twice `PIL.Image.MAX_IMAGE_PIXELS`, comes before ours and tells the size so.
        size = re.search(r"\d+", str(error))
        bound = f"more than the bound of {max_pixels / 1e6:g}"
        return f"{int(size.group()) / 1e6:.1f} megapixels, {bound}" if size else f"megapixels: {bound}"
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data)
    text = first_line(error)
    # A WEBP says how long it is, and its reader does not say what is wrong with it.
    is_short = data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")
    if is_short or isinstance(error, EOFError) or re.search("truncated|end of file|not enough", text, re.I):
        return "truncated"
    text = re.sub(r"^decode_jpeg, \S+, ", "", text)  # torchvision's messages begin with a line of its source
    return f"damaged ({text[:120]})"


def _unidentified(data: bytes) -> str:
    if is_heif(data):  # its reader is installed, or another sentence would have said so
        return "damaged HEIC"
    if other := next((reason for start, reason in _OTHERS.items() if data.startswith(start)), None):
        return other
    if data[8:10] == b"CR" and data.startswith((b"II*\0", b"MM\0*")):
        return "a camera's raw file is not read; convert it to JPEG"
    if data.startswith((b"II*\0", b"MM\0*")) and (reason := _tiff_reason(data)):
        return reason
    return "truncated" if data.startswith(_SIGNATURES) else "not an image"


def _tiff_reason(data: bytes) -> str:
    """Say of what kind a TIFF is that Pillow does not read; "" if it does not tell, because it is cut."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        num_bands = int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, len(bits)))
        kind = int(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0])
        compression = int(tags.get(TiffImagePlugin.COMPRESSION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error):
        return ""
    if TiffImagePlugin.BITSPERSAMPLE not in tags or TiffImagePlugin.PHOTOMETRIC_INTERPRETATION not in tags:
        return ""
    if 50706 in tags:  # DNGVersion
        return "a camera's raw file (DNG) is not read; convert it to JPEG"
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return f"a TIFF with compression {compression} is not read; convert it to 8-bit RGB"
    bands = "a band" if num_bands == 1 else f"{num_bands} bands"
    values = _SAMPLE_KINDS.get(kind, "other values")
    return f"a TIFF of {bands} of {bits[0]}-bit {values} is not read; convert it to 8-bit RGB"
