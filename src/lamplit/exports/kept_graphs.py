"""Graphs of text towers without their weights: where each weight lies, and a copy that is kept for the next tower.

A graph depends on how a tower is built and not on its weights, and torch takes seconds to write one. So it is kept in
lamplit's cache, with the names of the weights where `text_tower.onnx` has their places.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamplit._version import __version__
from lamplit.files import cache_folder
from lamplit.towers.texts.word_reader import StoredTensor, map_weights

_SMALL = 16  # bytes; numbers of the graph, not of the model
# What the description of a text tower says that its graph does not depend on. Known texts are rows of a product.
_ELSEWHERE = ("spec", "tokenizer", "anchors")
_ROWS_OF_KNOWN_TEXTS = {"text_tower.head.keys.weight": 0, "text_tower.head.values.weight": 1}


def kept_graph(described: dict[str, Any], weights: Path) -> Path:
    """Return the file in the cache for the graph of all text towers that are built alike.

    Args:
        described: the text tower in a model's `config.json`.
        weights: its safetensors file.

    Raises:
        TowerError: the weights are missing or damaged.
    """
    alike = {key: value for key, value in described.items() if key not in _ELSEWHERE}
    _, tensors = map_weights(weights)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name, axis in _ROWS_OF_KNOWN_TEXTS.items():
        if name in shapes:
            shapes[name][axis] = -1
    content = json.dumps([torch.__version__, __version__, alike, shapes], sort_keys=True)
    return cache_folder() / "graphs" / f"{blake2b(content.encode(), digest_size=16).hexdigest()}.onnx"


def name_weights(file: Path, weights: Path) -> tuple[bytes, bool]:
    """Replace an ONNX file's weights by their names in a safetensors file, and drop what only serves debugging.

    Returns the graph, and whether it is true of every tower that is built alike: no weight is left in it, and none has
    a name that was chosen among several of the same values.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    data, tensors = map_weights(weights)
    names: dict[bytes, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.kind == "F32":
            names.setdefault(_digest(data[tensor.begin : tensor.end]), []).append(name)
    transposed, is_general = [], True
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.nbytes < _SMALL:
            continue
        found = names.get(_digest(values), [])
        if not found and values.ndim == 2 and (found := names.get(_digest(values.T), [])):
            # The exporter has transposed it; ONNX Runtime does so again when it opens the file.
            name = tensor.name
            tensor.name = f"{name}.stored"
            transposed.append(helper.make_node("Transpose", [tensor.name], [name], perm=[1, 0]))
        own = f"text_{tensor.name}"  # if the exporter left it as it was
        is_general &= len(found) == 1 or own in found
        if found:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=own if own in found else found[0])
    nodes = [*transposed, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    model.graph.ClearField("value_info")
    model.ClearField("metadata_props")
    return model.SerializeToString(), is_general


def place_weights(graph: bytes, weights: Path, notes: dict[str, str], file: Path) -> None:
    """Write a graph whose weights have names as one whose weights have places in a safetensors file.

    Args:
        graph: what `name_weights` returned.
        weights: lies beside `file`, and has a tensor of each name.
        notes: the model's properties.
        file: what is written.

    Raises:
        LookupError: a name is not that of a tensor.
        OSError: it cannot be written.
        google.protobuf.message.DecodeError: the graph is damaged.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_model_from_string(graph)
    data, tensors = map_weights(weights)
    begin = weights.stat().st_size - len(data)
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        stored: StoredTensor = tensors[tensor.external_data[0].value]
        tensor.dims[:] = stored.shape
        del tensor.external_data[:]
        place = {"location": weights.name, "offset": begin + stored.begin, "length": stored.end - stored.begin}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    helper.set_model_props(model, notes)
    onnx.save(model, file)


def _digest(values: NDArray[Any]) -> bytes:
    return blake2b(np.ascontiguousarray(values).view(np.uint8).data, digest_size=16).digest()
