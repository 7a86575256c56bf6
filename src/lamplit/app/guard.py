"""What stands before the API: which requests are answered, how long they may be, what browsers may do with answers.

starlette's TrustedHostMiddleware would not do: it knows hosts by name alone, but every address in digits is answered
here, because no foreign page can point one elsewhere; and its refusal is not a sentence in JSON.
"""

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
_NO_CACHE = [(b"cache-control", b"no-cache")]  # so that the API of a newer lamplit never meets an older page


class Guard:
    """An ASGI application around another.

    Args:
        app: the application that answers.
        hosts: names of this server, besides localhost and addresses in digits. Any other name belongs to a foreign page
            and was made to point here (DNS rebinding).
        allow_hosts: names of a reverse proxy, with the port if it is not the usual one; pages of these names may ask.
        root_path: path of the page behind that proxy, which may pass it on or take it away.
        max_body: largest request, in bytes.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        max_body: int,
        allow_hosts: Collection[str] = (),
        root_path: str = "",
    ) -> None:
        self.app = app
        self.origins = {host.lower() for host in allow_hosts}
        self.hosts = {"localhost", *(host.lower() for host in hosts), *(_name(host) for host in allow_hosts)}
        self.root_path = f"/{root_path.strip('/')}" if root_path.strip("/") else ""
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                caching = [] if any(name == b"cache-control" for name, _ in headers) else _NO_CACHE
                message["headers"] = [*headers, *caching, *_HEADERS]
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(headers):
            await _refuse(send_with_headers, *refusal)
            return
        if scope["method"] == "HEAD":  # as GET; the server, which knows better, leaves out the body
            scope = {**scope, "method": "GET"}
        await self.app(self._below_root(scope), self._counted(receive), send_with_headers)

    def _refusal(self, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        if not host:
            return 400, "this request has no Host header; ask by the address that lamplit app printed"
        if not self._is_known(host):
            return 400, (
                f"this server is not {host[:100]}; ask it by the address that lamplit app printed, or give the name of "
                "your reverse proxy with --allow-host"
            )
        origin = headers.get(b"origin")
        if origin is not None and origin_host(origin) not in {host.lower(), *self.origins}:
            return 403, "a page of another site may not ask this server; give your own with --allow-host"
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body:
            return 413, self._too_long()
        return None

    def _is_known(self, host: str) -> bool:
        name = _name(host)
        return name in self.hosts or _is_address(name)

    def _below_root(self, scope: Scope) -> Scope:
        """Tell the application the path that stands before its own, whether the proxy left it there or not."""
        path = scope["path"]
        if not self.root_path:
            return scope
        if path != self.root_path and not path.startswith(f"{self.root_path}/"):
            path = self.root_path + path
        return {**scope, "path": path, "root_path": self.root_path}

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


def origin_host(origin: str) -> str:
    """Return host and port of an origin; an empty text if it has none, as `null`."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name(host: str) -> str:
    """Return the host without its port; an empty text if it is not a host."""
    try:
        return urlsplit(f"//{host}").hostname or ""
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
