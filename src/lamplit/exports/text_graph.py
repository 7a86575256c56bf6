"""`text_tower.onnx` beside the weights of a saved model, by which `towers.words.WordReader` reads words without torch.

It holds the graph alone. The weights are ONNX's external data: offsets into `text_tower.safetensors`, whose tensors lie
there as plain numbers, so that nothing is stored twice. Its seal identifies those weights.
"""

from __future__ import annotations

import logging
import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamplit.errors import TowerError
from lamplit.exports.onnx import write_text_graph
from lamplit.exports.sample import SENTENCES
from lamplit.files import replacing
from lamplit.model import LiT, load
from lamplit.store.backends import TOLERANCE
from lamplit.towers.loading import quiet_logging
from lamplit.towers.model_folder import TEXT_GRAPH, TEXT_TOWER, read_config, saved_folder
from lamplit.towers.texts.word_reader import WordReader, map_weights, open_words, seal
from lamplit.unit_vectors import as_array

logger = logging.getLogger(__name__)
MAX_BYTES = 1_900_000_000  # an ONNX file that still has its weights inside ends at 2 GiB
_SMALL = 16  # bytes; numbers of the graph, not of the model
# Texts that tokenizers treat differently; without transformers they must give the same tokens.
SCRIPTS = (
    "", "   ", "a\tb\nc\r\n d", "قطة على الأريكة", "कुत्ता घास पर", "แมวบนโซฟา", "개와 고양이", "תמונה של בית",
    "東京タワーの夜景", "Straße, ½ ﬁ ①", "e\u0301te\u0301", "zero\u200bwidth", "\x07bell", "👩\u200d🚀🏳\ufe0f\u200d🌈",
    "[CLS] [SEP] <s> </s> <pad> [MASK]", "don't — “quoted” …", "UPPER lower MiXeD", "x" * 300, "tree house " * 400,
)  # fmt: skip


def write_words(folder: str | Path) -> bool:
    """Write `text_tower.onnx` into the folder of a saved model if possible; return whether it is there.

    Its vectors are compared with torch's (1e-4), and its tokens with those of transformers. If they differ, or the
    tower cannot be exported, an empty file marks that, and the model is searched with torch. It is also searched with
    torch, without a message, if the folder cannot be written to or the tower has LoRA.

    Raises:
        UsageError, TowerError: as `load`.
    """
    saved = saved_folder(folder)
    if saved is None:
        return False
    folder, file = saved, saved / TEXT_GRAPH
    if not (folder / TEXT_TOWER).is_file() or not os.access(folder, os.W_OK):
        return False
    if file.is_file() and (file.stat().st_size == 0 or open_words(folder) is not None):
        return file.stat().st_size > 0
    model = load(folder, towers="text")
    if model.text_tower is None or model.text_tower.lora is not None:
        return False
    logger.info("preparing %s to be searched without torch, once", folder)
    try:
        with replacing(file) as partial:
            _write(model.eval().requires_grad_(False), folder, partial)
    except OSError as error:  # a full disk
        logger.info("%s was not written: %s", file, error)
        return False
    except TowerError as error:
        logger.info("%s; %s goes on to be searched with torch", error, folder)
        file.touch()
        return False
    return True


def _write(model: LiT, folder: Path, file: Path) -> None:
    assert model.text_tower is not None
    if (folder / TEXT_TOWER).stat().st_size > MAX_BYTES:
        raise TowerError(f"{model.text_tower.spec} is too large for one ONNX file")
    write_text_graph(model.text_tower, file)
    notes = {"seal": seal(folder, read_config(folder)), "pad_id": str(model.text_tower.tokenizer.pad_id)}
    _refer_to_weights(file, folder / TEXT_TOWER, notes)
    _compare(model, WordReader(folder, file.name))


def _compare(model: LiT, reader: WordReader) -> None:
    """Compare vectors and tokens with the model's own.

    Raises:
        TowerError: they differ.
    """
    assert model.text_tower is not None
    spec, texts = model.text_tower.spec, [*SENTENCES, *SCRIPTS]
    for text, ours, theirs in zip(texts, model.text_tower.tokenize(texts), reader.tokenize(texts), strict=True):
        if ours != theirs:
            raise TowerError(f"the tokenizer of {spec} reads {text[:40]!r} in another way without transformers")
    with quiet_logging("lamplit"):  # the log need not say that some texts are cut
        difference = float(np.abs(as_array(model.encode_texts(texts)) - reader.encode_texts(texts)).max())
    if not difference <= TOLERANCE or model.space != reader.space:
        raise TowerError(f"ONNX Runtime's vectors of {spec} differ from torch's by {difference:.1e}")


def _refer_to_weights(file: Path, weights: Path, notes: dict[str, str]) -> None:
    """Replace an ONNX file's weights by offsets into a safetensors file, and remove what only serves debugging."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    stored = _stored(weights)
    transposed = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.nbytes < _SMALL:
            continue
        stored_at = stored.get(_digest(values))
        if stored_at is None and values.ndim == 2 and (stored_at := stored.get(_digest(values.T))) is not None:
            # The exporter has transposed it; ONNX Runtime does so again when it opens the file.
            name = tensor.name
            tensor.name = f"{name}.stored"
            tensor.dims[:] = values.T.shape
            transposed.append(helper.make_node("Transpose", [tensor.name], [name], perm=[1, 0]))
        if stored_at is not None:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": weights.name, "offset": stored_at[0], "length": stored_at[1]}.items():
                tensor.external_data.add(key=key, value=str(value))
    nodes = [*transposed, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    model.graph.ClearField("value_info")
    model.ClearField("metadata_props")
    helper.set_model_props(model, notes)
    onnx.save(model, file)


def _stored(weights: Path) -> dict[bytes, tuple[int, int]]:
    """Return offset and length in bytes of every float32 tensor of a safetensors file, by a digest of its values."""
    data, tensors = map_weights(weights)
    begin = weights.stat().st_size - len(data)
    found = {}
    for kind, first, last in tensors.values():
        if kind == "F32":
            found[_digest(data[first:last])] = (begin + first, last - first)
    return found


def _digest(values: NDArray[Any]) -> bytes:
    return blake2b(np.ascontiguousarray(values).view(np.uint8).data, digest_size=16).digest()
