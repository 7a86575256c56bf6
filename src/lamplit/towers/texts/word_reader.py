"""Texts encoded without torch: by ONNX Runtime, from `text_tower.onnx` in the folder of a saved model.

That file holds no weights but points into `text_tower.safetensors`; `exports.text_graph` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from lamplit.errors import LamplitError, TowerError
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.model_folder import IMAGE_HEAD, TEXT_GRAPH, TEXT_TOWER, TOKENIZER, read_config
from lamplit.towers.onnx_files import open_onnx
from lamplit.towers.tokens.saved_tokenizers import load_tokenizer
from lamplit.towers.tokens.tokenizers import Side, TruncationLog, fill_rows
from lamplit.unit_vectors import normalize

TOKENIZER_FILE = "tokenizer.json"
_TOGETHER = 64  # texts in one pass
_SAMPLED = 64  # bytes of each tensor in the digest


class WordReader:
    """Encodes texts, and projects the vectors of a store, as `LiT` does (to 1e-4).

    `identity` is the image tower that the model reads, `space` the fingerprint of the joint space, as in `LiT`.

    Args:
        folder: of a saved model.
        graph: name of the ONNX file in it.
        threads: of one pass; by default OMP_NUM_THREADS, or 1, so that a search uses no more than it needs.

    Raises:
        UsageError: there is no model.
        TowerError: the ONNX file is missing or another model's, or the model is not complete.
    """

    def __init__(self, folder: str | Path, graph: str = TEXT_GRAPH, threads: int | None = None) -> None:
        folder = Path(folder)
        config = read_config(folder)
        session = open_onnx(folder / graph, threads or _threads(), spinning=False) if config["text_tower"] else None
        noted = {} if session is None else session.get_modelmeta().custom_metadata_map
        if session is None or noted.get("seal") != seal(folder, config):
            raise TowerError(f"{folder / graph} is not there, is damaged, or was made of another text tower")
        self.identity: TowerIdentity = config["image_tower"]
        self.width: int = config["image_head"] or self.identity.width
        self._session = session
        self._context_length: int = config["text_tower"]["context_length"]
        self._tokenizer = _open_tokenizer(config["text_tower"], folder / TOKENIZER, int(noted["pad_id"]))
        self._truncated = TruncationLog()
        self._center = None if config["center"] is None else np.asarray(config["center"], np.float32)
        self._head = None if config["image_head"] is None else _read_head(folder / IMAGE_HEAD)

    @cached_property
    def space(self) -> str:
        """Fingerprint of the joint space, as `LiT.space`."""
        center = () if self._center is None else (self._center,)
        return self.identity.space((*center, *(self._head or ())))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, as `TextTower.tokenize` does."""
        return [ids or [self._tokenizer.pad_id] for ids in self._tokenizer.encode(texts, self._context_length)]

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (N, E) unit vectors of N texts. The log says how many were cut, if any."""
        tokens = self.tokenize(texts)
        self._truncated.count(self._tokenizer, texts, tokens, self._context_length)
        ztxt = np.empty((len(tokens), self.width), np.float32)
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(tokens):
            by_length.setdefault(len(row), []).append(number)
        for numbers in by_length.values():  # nothing is padded
            for start in range(0, len(numbers), _TOGETHER):
                chosen = numbers[start : start + _TOGETHER]
                ids = np.array([tokens[number] for number in chosen], np.int64)
                [ztxt[chosen]] = self._session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        return ztxt

    def encode_images(self, _: Any) -> NoReturn:
        """Refuse images.

        Raises:
            TowerError: always.
        """
        raise TowerError("this model is open for words alone; open it with lamplit.load to embed images")

    def project_rows(self, zimg: NDArray[np.float32]) -> NDArray[np.float32]:
        """Project (N, D) unit vectors of the image tower into the joint space; return (N, E) unit vectors."""
        if self._center is not None:
            zimg = normalize(zimg - self._center)
        if self._head is None:
            return zimg
        weight, bias = self._head
        return normalize(zimg @ weight.T + bias)


def open_words(folder: str | Path, threads: int | None = None) -> WordReader | None:
    """Open a saved model for texts; return None if only `lamplit.load` can open it, or say what is wrong.

    Args:
        folder: of a saved model.
        threads: of one pass, as in `WordReader`.
    """
    if not (Path(folder) / TEXT_GRAPH).is_file():
        return None
    try:
        return WordReader(folder, threads=threads)
    except LamplitError:
        return None


def seal(folder: Path, config: dict[str, Any]) -> str:
    """Return the digest of what an ONNX file was made from: the text tower's description, and samples of its weights.

    Raises:
        TowerError: the weights are missing or damaged.
    """
    data, tensors = map_weights(folder / TEXT_TOWER)
    places = {name: tensor[:3] for name, tensor in tensors.items()}
    digest = blake2b(json.dumps([config["text_tower"], places], sort_keys=True).encode(), digest_size=16)
    for tensor in tensors.values():  # to read all of them would take longer than the search
        digest.update(data[(tensor.begin + tensor.end) // 2 :][:_SAMPLED].tobytes())
    return digest.hexdigest()


class StoredTensor(NamedTuple):
    """Where a tensor lies: its bytes begin and end so far behind the header of its safetensors file."""

    kind: str
    begin: int
    end: int
    shape: list[int]


def map_weights(file: Path) -> tuple[NDArray[np.uint8], dict[str, StoredTensor]]:
    """Map a safetensors file; return the bytes after its header, and what lies in them by name.

    Raises:
        TowerError: it is missing or damaged.
    """
    try:
        data = np.memmap(file, np.uint8, "r")
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header: dict[str, Any] = json.loads(data[8:begin].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = StoredTensor(entry["dtype"], first, last, entry["shape"])
        return data[begin:], tensors
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TowerError(f"{file} is missing or damaged: the model is not whole") from error


class FastTokenizer:
    """A tokenizer of transformers, from its `tokenizer.json`; `fill` as `PretrainedTokenizer` has it."""

    def __init__(self, file: Path, pad_id: int, *, fill: Side | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            text = file.read_text(encoding="utf-8")
            json.loads(text)  # the library's own error is a bare Exception
        except (OSError, ValueError) as error:
            raise TowerError(f"{file} is missing or damaged: the model is not whole") from error
        self._backend: Any = Backend.from_str(text)
        self._backend.no_padding()
        self._lock = Lock()  # its truncation is set for each call, and no thread may encode meanwhile
        self.pad_id, self.fill = pad_id, fill

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._backend.get_vocab_size())

    def encode(self, texts: Sequence[str], context_length: int | None) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, cut at `context_length` if it is given."""
        with self._lock:
            if context_length is None:
                self._backend.no_truncation()
            else:
                self._backend.enable_truncation(context_length)
            rows = [self._backend.encode(text).ids for text in texts]
        return fill_rows(rows, context_length, self.pad_id, self.fill)


def _open_tokenizer(described: dict[str, Any], folder: Path, pad_id: int) -> Any:
    kind: dict[str, Any] = described.get("tokenizer", {"kind": "transformers"})
    if kind["kind"] == "transformers":
        return FastTokenizer(folder / TOKENIZER_FILE, pad_id, fill=kind.get("fill"))
    return load_tokenizer(kind, folder)


def _read_head(file: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        state = load_file(file)
        return state["weight"], state["bias"]
    except (OSError, SafetensorError, LookupError) as error:
        raise TowerError(f"{file} is missing or damaged: the model is not whole") from error


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else 1
