"""What stands before the API: whose requests are answered, how long they may be, what browsers may do with answers."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
_NOT_KEPT = [(b"cache-control", b"no-cache")]  # so that a newer lamplit does not meet an older one's page


class Guard:
    """An ASGI application around another.

    Args:
        app: what answers.
        hosts: names that this server may be asked by, besides localhost and addresses in digits. Any other is a page of
            elsewhere whose name was made to point here (DNS rebinding).
        max_body: bytes that a request may have.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], max_body: int) -> None:
        self.app = app
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                kept = [] if any(name == b"cache-control" for name, _ in headers) else _NOT_KEPT
                message["headers"] = [*headers, *kept, *_HEADERS]
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(headers):
            await _refuse(send_with_headers, *refusal)
            return
        await self.app(scope, self._counted(receive), send_with_headers)

    def _refusal(self, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        if not self._is_known(host):
            return 400, f"this server is not {host[:100]}; ask it by the address that lamplit app printed"
        origin = headers.get(b"origin")
        if origin is not None and urlsplit_host(origin) != host.lower():
            return 403, "pages of elsewhere may not ask this server"
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body:
            return 413, self._too_long()
        return None

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.hosts or _is_address(name)

    def _counted(self, receive: Receive) -> Receive:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:  # a body in chunks does not say its length
                raise HTTPException(413, self._too_long())
            return message

        return counted

    def _too_long(self) -> str:
        return f"a request may have {self.max_body // 2**20} MB; send fewer or smaller images"


def urlsplit_host(origin: str) -> str:
    """Host and port of an origin; empty where there is none, as in `null`."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
