"""Files of the page, from memory."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from starlette.responses import Response

_KINDS = {".js": "text/javascript", ".svg": "image/svg+xml"}  # what a system says of them may be wrong


class StaticFile:
    """A file that was read once; a browser that has it gets an empty answer."""

    def __init__(self, file: Path) -> None:
        self.content = file.read_bytes()
        self.kind = _KINDS.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        self.tag = f'"{blake2b(self.content, digest_size=8).hexdigest()}"'

    def answer(self, headers: Mapping[str, str]) -> Response:
        """Answer a request with these headers."""
        if self.tag in headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"etag": self.tag})
        return Response(self.content, media_type=self.kind, headers={"etag": self.tag})
