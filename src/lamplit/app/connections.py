"""Connections that no slow or silent client can use up, in uvicorn's server.

A client has some seconds for the head of a request, and must send a body, and take its answer, at a least rate. If
there are as many connections as this process may have, the one that has been idle longest makes room for a new one. So
good requests are answered however many half ones are open.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # until the head of a request is there
LEAST_RATE = 16_384  # bytes a second of a body, on the whole, after the seconds of the head
ANSWER_SECONDS = 60.0  # without taking a byte of the answer
KEEP_ALIVE = 75  # seconds; with uvicorn's 5, a client that waits behind 200 others meets a closed connection
BACKLOG = 2048  # connections that wait to be accepted
_TOGETHER = 64  # that asyncio accepts at once, before any of them can be refused
_MOST = 4096  # connections, however many the system allows
_UNSEEN = 0.5  # part of a process's descriptors that are left for files: uploads, images, the store


class Connection(H11Protocol):
    """A connection that ends when its client is too slow, or when it is idle and another needs its place."""

    most = _MOST

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection; if there are too many, end the one that has been idle longest, or this one."""
        super().connection_made(transport)
        self._sent = 0  # bytes that the client has sent of this request
        self._buffered = 0  # bytes of the answer that it has not taken
        self._since = self.loop.time()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._watch)
        if len(self.connections) > self.most:
            idle = (other for other in self.connections if isinstance(other, Connection) and not other._is_answering())
            min(idle, key=lambda other: other._since, default=self).end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what has come."""
        if self._is_answered() and not self._sent:
            self._since = self.loop.time()  # the next request begins
        self._sent += len(data)
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._since, self._sent = self.loop.time(), 0
        super().on_response_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Answer as if no web socket were asked for; uvicorn would advise on how to install them."""

    def end(self) -> None:
        """End the connection now, without an answer."""
        self.connections.discard(self)  # at once: those that come in the same turn must not choose it again
        self.transport.abort()

    def _is_answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _is_answering(self) -> bool:
        """Tell whether a whole request has come, whose answer has not gone."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _watch(self) -> None:
        """Look at the client every few seconds; end what is too slow."""
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            return
        now = self.loop.time()
        waiting = self.transport.get_write_buffer_size()
        if waiting and waiting != self._buffered:
            self._since = now  # it takes the answer, in its time
        self._buffered = waiting
        elapsed = now - self._since
        is_idle = self._is_answered() and not self._sent
        if waiting:
            is_slow = elapsed > ANSWER_SECONDS
        elif self._is_answering() or is_idle or self.flow.read_paused:
            is_slow = False  # the client waits for us; or is idle, which uvicorn bounds
        else:
            is_slow = elapsed > HEAD_SECONDS + (self._sent / LEAST_RATE if self._has_head() else 0)
        if is_slow:
            self.end()
        else:
            self._timer = self.loop.call_later(HEAD_SECONDS / 4, self._watch)

    def _has_head(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.DONE, h11.MUST_CLOSE)


class Server(uvicorn.Server):
    """uvicorn's server, for sockets whose waiting line is longer than what is accepted at once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)


def server_of(app: Any) -> Server:
    """Make the server of an application, for as many connections as this process may have."""
    protocol = type("BoundedConnection", (Connection,), {"most": most_connections()})
    return Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            backlog=_TOGETHER,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=5,
        )
    )


def most_connections() -> int:
    """Return how many connections leave room for files, of what the system allows this process."""
    try:
        import resource  # not on Windows
    except ModuleNotFoundError:
        return 400
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if allowed == resource.RLIM_INFINITY else max(16, min(_MOST, int(allowed * (1 - _UNSEEN)) - _TOGETHER))
