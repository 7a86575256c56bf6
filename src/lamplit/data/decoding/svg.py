"""SVG drawings, drawn by resvg (the extra `svg`).

A drawing is a program: it can name other files, and a short one can take hours or all memory. So a foreign one is
written anew with nothing in it that leads out of it, and drawn in a process that has bounds of time and memory.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import io
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from PIL import Image

from lamplit.data.decoding import svg_drawer
from lamplit.errors import ImageError, MissingExtraError, first_line, require

SIDE = 512  # pixels of the longer side; towers read 224 to 384
MAX_BYTES = 16 * 2**20
MAX_ELEMENTS = 100_000
MAX_DEPTH = 200
MAX_SECONDS = 10.0
_DEFAULT_SIZE = (300.0, 150.0)  # of a drawing that says less, as in browsers
_UNITS = {"": 1, "px": 1, "pt": 96 / 72, "pc": 16, "in": 96, "cm": 96 / 2.54, "mm": 9.6 / 2.54, "em": 16, "ex": 8}
_LENGTH = re.compile(r"\s*(\d*\.?\d+(?:e[+-]?\d+)?|\d+\.)\s*([a-z]*)\s*", re.IGNORECASE)
# A byte order mark, declarations and comments, the first element. What was passed over is not tried in another way.
_START = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?>(?:<\?.*?\?>|<!--.*?-->|<!DOCTYPE[^\[>]*+(?:\[.*?\])?\s*>)\s*)*+<(?:\w+:)?svg[\s/>]",
    re.DOTALL,
)
_IMAGE_URI = re.compile(r"\s*data:image/(?:png|jpeg|jpg|gif|webp)(?:;[^,;]*)*;base64,", re.IGNORECASE)
# What is drawn nowhere, or leads elsewhere.
_DROPPED = frozenset(("script", "foreignObject", "metadata", "namedview", "iframe", "audio", "video"))
_TOO_MUCH = f"SVG cannot be drawn in {MAX_SECONDS:g} s and {svg_drawer.MAX_MEMORY / 2**30:g} GiB of memory"
_SHORT = 20_000  # bytes of a PNG of at most SIDE pixels; one that is longer is not blank


def is_svg(data: bytes) -> bool:
    """Tell whether an encoded image is an SVG, in UTF-8 or another encoding that has ASCII's bytes."""
    return _START.match(data, 0, 2**16) is not None


def svg_to_png(data: bytes, max_pixels: int) -> bytes:
    """Draw an SVG that may be anybody's, on white, 512 pixels wide or high; return a PNG.

    Text is left out: it would look as the fonts of the machine do. So are scripts and references to other files.

    Raises:
        ImageError: with the reason in a few words.
    """
    try:
        require("resvg_py", "svg")
    except MissingExtraError as error:
        raise ImageError(f"SVG is not read: {error}") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"SVG of {len(data) / 2**20:.0f} MiB, more than the bound of {MAX_BYTES / 2**20:.0f}")
    png = _drawer.draw(rewrite_svg(data, max_pixels))
    if is_blank(png):
        raise ImageError("nothing of the SVG can be seen on white (text and references to other files are not drawn)")
    return png


def draw_svg(svg: str) -> bytes:
    """Draw an SVG of a source that is trusted, on white, in this process; return a PNG.

    Raises:
        MissingExtraError: the renderer is not installed.
        ImageError: the SVG cannot be drawn.
    """
    require("resvg_py", "svg")
    try:
        return svg_drawer.draw(svg)
    except ValueError as error:
        raise ImageError(f"damaged SVG ({first_line(error)[:120]})") from error


def is_blank(png: bytes) -> bool:
    """Tell whether a small PNG is white everywhere."""
    if len(png) > _SHORT:
        return False
    with Image.open(io.BytesIO(png)) as opened:
        return bool(np.asarray(opened.convert("RGB")).min() == 255)


def rewrite_svg(data: bytes, max_pixels: int) -> str:
    """Write an SVG anew with a size in pixels, without what leads out of it.

    Raises:
        ImageError: it is damaged, declares entities, or is too large.
    """
    writer = _Writer(max_pixels)
    parser = expat.ParserCreate()
    parser.ordered_attributes = True
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = writer.start, writer.end
    parser.CharacterDataHandler = writer.text
    parser.EntityDeclHandler = writer.refuse_entity
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # or an encoding that Python does not know
        raise ImageError(f"damaged SVG ({first_line(error)})") from error
    return "".join(writer.parts)


class _Writer:
    """Writes what expat reads."""

    def __init__(self, max_pixels: int) -> None:
        self.parts: list[str] = []
        self.depth = self.num_elements = 0
        self.dropped = 0  # depth of the outermost element that is dropped; 0 if none is
        self.pixels_left = max_pixels  # of images in the drawing

    def start(self, name: str, attributes: list[str]) -> None:
        self.depth += 1
        self.num_elements += 1
        if self.num_elements > MAX_ELEMENTS:
            raise ImageError(f"SVG of more than {MAX_ELEMENTS:,} elements")
        if self.depth > MAX_DEPTH:
            raise ImageError(f"SVG of elements in each other, more than {MAX_DEPTH} deep")
        kind = name.rpartition(":")[2]
        if self.depth == 1 and kind != "svg":
            raise ImageError("not an image")
        if self.dropped or kind in _DROPPED:
            self.dropped = self.dropped or self.depth
            return
        found = dict(zip(attributes[::2], attributes[1::2], strict=True))
        if self.depth == 1:
            found |= _size(found)
        kept = [(key, value) for key, value in found.items() if self._is_kept(kind, key, value)]
        self.parts.append(f"<{name}" + "".join(f" {key}={quoteattr(value)}" for key, value in kept) + ">")

    def end(self, name: str) -> None:
        if not self.dropped:
            self.parts.append(f"</{name}>")
        elif self.dropped == self.depth:
            self.dropped = 0
        self.depth -= 1

    def text(self, text: str) -> None:
        if not self.dropped and self.depth:
            self.parts.append(escape(text))

    def refuse_entity(self, *_declaration: Any) -> None:
        raise ImageError("SVG that declares entities is not read; save it as plain SVG")

    def _is_kept(self, kind: str, key: str, value: str) -> bool:
        key = key.rpartition(":")[2].lower()
        if key not in ("href", "src", "base"):
            return not key.startswith("on")  # handlers of events
        if match := _IMAGE_URI.match(value):
            return kind in ("image", "feImage") and self._is_small_image(value[match.end() :])
        return value.startswith("#")

    def _is_small_image(self, encoded: str) -> bool:
        try:
            with Image.open(io.BytesIO(base64.b64decode(encoded)), formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
                self.pixels_left -= image.width * image.height
        except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return False
        if self.pixels_left < 0:
            raise ImageError("SVG with images of more pixels than the bound")
        return True


def _size(attributes: dict[str, str]) -> dict[str, str]:
    """Return the size of a drawing in pixels, its longer side `SIDE`, and what part of the plane it shows.

    It is empty if the drawing says neither.
    """
    try:
        _, _, *box = map(float, attributes.get("viewBox", "").replace(",", " ").split())
    except ValueError:
        box = []
    has_box = len(box) == 2 and min(box) > 0
    width, height = _length(attributes.get("width")), _length(attributes.get("height"))
    if width is None and height is None and not has_box:
        return {}  # resvg then shows all of it
    across, down = box if has_box else _DEFAULT_SIZE
    if width is None:
        width = across if height is None else height * across / down
    if height is None:
        height = width * down / across
    if not (min(width, height) > 0 and math.isfinite(max(width, height))):
        raise ImageError("SVG without a size")
    scale = SIDE / max(width, height)
    size = {"width": f"{max(1, round(width * scale))}", "height": f"{max(1, round(height * scale))}"}
    return size if has_box else size | {"viewBox": f"0 0 {width!r} {height!r}"}


def _length(text: str | None) -> float | None:
    """Read a length in pixels; None if there is none, or a share of what surrounds the drawing."""
    match = _LENGTH.fullmatch(text or "")
    if match is None or match[2].lower() not in _UNITS:
        return None
    return float(match[1]) * _UNITS[match[2].lower()]


class _Drawer:
    """A process that draws SVGs one after another, and is ended when one takes too much."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def draw(self, svg: str) -> bytes:
        with self.lock:
            process = self.process = self._running()
            timer = threading.Timer(MAX_SECONDS, self._kill, [process])
            timer.start()
            state = b""
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                svg_drawer.write(process.stdin, b"+", svg.encode("utf-8", "replace"))
                state, content = svg_drawer.read(process.stdout)
            except (OSError, EOFError) as error:
                raise ImageError(_TOO_MUCH) from error
            finally:
                timer.cancel()
                timer.join()
                if not state:  # an answer that comes later must not be taken for that of another drawing
                    self._end()
        if state != b"+":
            raise ImageError(f"damaged SVG ({content.decode('utf-8', 'replace')[:120]})")
        return content

    def close(self) -> None:
        with self.lock:
            self._end()

    def forget(self) -> None:
        """Leave the process to the one that was forked from."""
        self.__dict__ |= _Drawer().__dict__

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self._end()
        # Run as a file, and not from the current folder: nothing of lamplit's or the user's is imported there.
        return subprocess.Popen(
            [sys.executable, "-P", str(Path(svg_drawer.__file__))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_drawer = _Drawer()
atexit.register(_drawer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drawer.forget)
