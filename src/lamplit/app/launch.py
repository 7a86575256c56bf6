"""Run the page and the API: open the model and the store, listen on a port, answer until interrupted."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lamplit.errors import MissingExtraError, UsageError
from lamplit.exports.text_graph import write_words
from lamplit.model import LiT, as_model
from lamplit.store.lance_store import Store, as_store
from lamplit.towers.texts.word_reader import WordReader, open_words

if TYPE_CHECKING:
    from lamplit.zeroshot.class_list import ClassList

logger = logging.getLogger(__name__)


def serve(
    model: LiT | str | Path,
    store: Store | str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    classes: ClassList | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    allow_hosts: Sequence[str] = (),
    root_path: str = "",
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve a model and a store to browsers and programs until interrupted.

    On the command line: `lamplit app`.

    Args:
        model: an open model, the folder of a saved one, or a name that `load` takes.
        store: an open store or its path; it was embedded with the image tower that the model reads.
        host: address to listen on. Only this machine reaches 127.0.0.1. There is no password: everybody who reaches
            another address can search.
        port: port to listen on; 0 takes any free one.
        classes: the classes that the page begins with: names, or a class list, which keeps its calibration.
        device: torch device; by default the accelerator, if there is one.
        allow_hosts: names of a reverse proxy in front of this server, such as `photos.example.com`, with the port if it
            is not the usual one. Requests for these names, and from pages of these names, are answered.
        root_path: path of the page behind a reverse proxy, such as `/photos`.
        started: called with the address of the page as soon as it answers.

    Raises:
        MissingExtraError: fastapi, uvicorn or python-multipart is not installed.
        UsageError: there is no model, the port is taken, or the classes are a multi-label list.
        StoreError: there is no store, or another tower embedded it.
        TowerError: the class list is for images of another tower.

    Example:
        >>> lamplit.serve("runs/stamps", "stamps.lance", classes=["cat", "dog"])
    """
    try:
        import python_multipart  # noqa: F401 (fastapi asks for it when the first form comes)

        from lamplit.app.connections import BACKLOG, server_of
        from lamplit.app.server import make_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lamplit"):
            raise
        raise MissingExtraError(str(error.name), "app") from error
    hosts = _hosts(host)
    if len(hosts) > 1:
        logger.warning("everybody who can reach %s can search here: there is no password", host)
    opened, name = as_model(model, device=device), None if isinstance(model, LiT) else str(model)
    words = _open_words(name, device)
    with listen(host, port, BACKLOG) as listener, _one_thread():
        app = make_app(
            opened, as_store(store), name=name, words=words, classes=classes, hosts=hosts,
            allow_hosts=allow_hosts, root_path=root_path,
        )  # fmt: skip
        if started is not None:
            started(address(host, listener.getsockname()[1]))
        server_of(app).run(sockets=[listener])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread for each request; several requests, each with all cores, hold each other up.

    OMP_NUM_THREADS, which `lamplit app` sets, says so to all libraries, and is left as it is.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _open_words(name: str | None, device: object) -> WordReader | None:
    """Open the text tower for ONNX Runtime, as `lamplit search` does; made now if it is not there."""
    if name is None or device is not None or not write_words(name):
        return None
    return open_words(name)


def address(host: str, port: int) -> str:
    """Return the address of the page for a browser on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 (not where to listen)
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


def listen(host: str, port: int, backlog: int = 128) -> socket.socket:
    """Open a listening socket whose connections send what they have at once (TCP_NODELAY).

    Raises:
        UsageError: the port is taken, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}:{port} ({error}); give another --port or --host") from error
    # asyncio does so only for sockets that were made with the protocol number of TCP, and this one has 0: without it,
    # every answer on a connection that is kept open would come 40 ms late.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _hosts(host: str) -> Sequence[str]:
    """Return the names of this machine that a browser may ask for."""
    try:
        is_alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_alone = host == "localhost"
    return [host] if is_alone else [host, socket.gethostname(), socket.getfqdn()]
