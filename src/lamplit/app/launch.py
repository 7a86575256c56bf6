"""Run the page and the API: open the model and the store, take a port, answer until interrupted."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from lamplit.app.choice import ClassChoice
from lamplit.errors import MissingExtraError, UsageError
from lamplit.model import load
from lamplit.store.lance_store import Store

logger = logging.getLogger(__name__)
KEEP_ALIVE = 75  # seconds. With the usual 5, one who asks again while 200 are served meets a closed connection.


def serve(
    model: str | Path,
    store: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    choice: ClassChoice | None = None,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve a model and a store to browsers and programs until interrupted.

    Args:
        model: folder of a model, or `lit:NAME`.
        store: embedded with the tower that the model reads.
        host: which address to listen at; only this machine can ask 127.0.0.1. There is no password: whoever reaches
            another address can search.
        port: 0 for any that is free.
        choice: the classes that the page begins with.
        started: called with the page's address once it can be asked.

    Raises:
        MissingExtraError: fastapi, uvicorn or python-multipart is not installed.
        UsageError: no model there, or the port cannot be had.
        StoreError: no store there, or one of another tower than the model reads.
    """
    try:
        import python_multipart  # noqa: F401 (fastapi asks for it when the first form comes)
        import uvicorn

        from lamplit.app.server import make_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lamplit"):
            raise
        raise MissingExtraError(str(error.name), "app") from error
    names = _names(host)
    if len(names) > 1:
        logger.warning("whoever can reach %s can search here: there is no password", host)
    app = make_app(load(model), Store(store), name=str(model), choice=choice, hosts=names)
    with _listen(host, port) as listener:
        if started is not None:
            started(address(host, listener.getsockname()[1]))
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run(sockets=[listener])


def address(host: str, port: int) -> str:
    """Where a browser on this machine finds the page."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 (not where to listen)
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{host}:{port} cannot be had ({error}); give another --port or --host") from error


def _names(host: str) -> Sequence[str]:
    """Names of this machine that a browser may ask by, where it listens to others."""
    try:
        is_alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_alone = host == "localhost"
    return [host] if is_alone else [host, socket.gethostname(), socket.getfqdn()]
