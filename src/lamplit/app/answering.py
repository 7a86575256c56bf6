"""Serve in this process: open the model and the store, and answer on a socket that listens."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import torch

from lamplit.app.connections import server_of
from lamplit.app.server import make_app
from lamplit.garbage import frozen
from lamplit.model import LiT, as_model, map_text_tower
from lamplit.store.lance_store import Store, as_store
from lamplit.towers.model_folder import TEXT_GRAPH, read_config, saved_folder
from lamplit.towers.texts.word_reader import WordReader, open_words

if TYPE_CHECKING:
    from lamplit.zeroshot.class_list import ClassList

logger = logging.getLogger(__name__)
# A pass of the text tower for one query waits for its weights to come from memory, more than one core can ask for.
_WORD_THREADS = 2


def serve_on(
    listener: socket.socket,
    model: LiT | str | Path,
    store: Store | str | Path,
    *,
    hosts: Collection[str],
    classes: ClassList | Sequence[str] | None,
    device: str | torch.device | None,
    allow_hosts: Sequence[str],
    root_path: str,
    ready: Callable[[], None],
) -> None:
    """Do what `serve` does in this process, on a socket that listens; `ready` is called as soon as it answers."""
    opened, name = as_model(model, device=device), None if isinstance(model, LiT) else str(model)
    words = _open_words(name, device)
    if words is not None and name is not None and opened.device.type == "cpu":
        folder = saved_folder(name)
        assert folder is not None, "the words are read from it"
        map_text_tower(opened, folder)  # only names of classes go through torch
    with _one_thread():
        app = make_app(
            opened, as_store(store), name=name, words=words, classes=classes, hosts=hosts,
            allow_hosts=allow_hosts, root_path=root_path, relevance=True,
        )  # fmt: skip
        ready()
        _give_back_memory()
        with frozen():
            server_of(app).run(sockets=[listener])


def _give_back_memory() -> None:
    """Give the system back what was needed to open the model and the store; later it would hold up a request."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


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
    folder = None if name is None or device is not None else saved_folder(name)
    if folder is None:
        return None
    words, file = open_words(folder, threads=_WORD_THREADS), folder / TEXT_GRAPH
    text = read_config(folder)["text_tower"]
    is_refused = file.is_file() and file.stat().st_size == 0  # the mark of a tower that cannot be exported
    can_be_made = text is not None and not text.get("lora") and not is_refused
    if words is None and can_be_made:  # it is not there, or of other weights
        # In a process of its own: what exports a model would take 300 MB for as long as the page runs.
        write = "import sys; from lamplit.exports.text_graph import write_words; write_words(sys.argv[1])"
        logger.info("preparing %s to be searched without torch, once", name)
        subprocess.run([sys.executable, "-c", write, folder], check=False)
        words = open_words(folder, threads=_WORD_THREADS)
    return words
