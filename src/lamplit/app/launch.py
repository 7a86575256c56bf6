"""Run the page and the API: listen on a port, in this process or in several, answer until interrupted."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamplit.app.many_processes import serve_in_processes
from lamplit.errors import UsageError, kind_of, require

if TYPE_CHECKING:
    import torch

    from lamplit.model import LiT
    from lamplit.store.lance_store import Store
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
    processes: int = 1,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve a model and a store to browsers and programs until interrupted.

    A store that `embed` changes meanwhile is opened again, within seconds, and no request fails. `/health` and
    `/metrics` (in Prometheus' text format) tell how the server is.

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
        processes: how many answer, on one port. They map the same files, so each takes the memory of the libraries and
            of the towers alone. With more than one, give a folder or a name, not an open model; a script needs
            `if __name__ == "__main__":`.
        started: called with the address of the page as soon as it answers.

    Raises:
        MissingExtraError: fastapi, prometheus-client, python-multipart or uvicorn is not installed.
        UsageError: there is no model, the port is taken, or the classes are a multi-label list.
        StoreError: there is no store, or another tower embedded it.
        TowerError: the class list is for images of another tower.

    Example:
        >>> lamplit.serve("runs/stamps", "stamps.lance", classes=["cat", "dog"])
    """
    require("python_multipart", "app")  # fastapi asks for it when the first form comes
    require("fastapi", "app")
    require("prometheus_client", "app")
    require("uvicorn", "app")
    if len(_hosts(host)) > 1:
        logger.warning("everybody who can reach %s can search here: there is no password", host)
    given: dict[str, Any] = {
        "model": model, "store": store, "hosts": _hosts(host), "classes": classes, "device": device,
        "allow_hosts": tuple(allow_hosts), "root_path": root_path,
    }  # fmt: skip
    if processes > 1:
        _require_names(model, store)
    from lamplit.app.connections import BACKLOG

    with listen(host, port, BACKLOG) as listener:

        def ready() -> None:
            if started is not None:
                started(address(host, listener.getsockname()[1]))

        if processes == 1:
            from lamplit.app.answering import serve_on  # torch, which the process that watches others does without

            serve_on(listener, ready=ready, **given)
        else:
            serve_in_processes(processes, listener, ready, given)


def _require_names(model: object, store: object) -> None:
    """Raise if a model or a store is open: other processes open their own."""
    for what, given in (("model", model), ("store", store)):
        if not isinstance(given, str | Path):
            raise UsageError(
                f"the {what} is {kind_of(given)}; several processes open their own: give its folder, or processes=1"
            )


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
