"""`text_tower.onnx` beside the weights of a saved model, by which `towers.words.WordReader` reads words without torch.

It holds the graph alone. The weights are ONNX's external data: offsets into `text_tower.safetensors`, whose tensors lie
there as plain numbers, so that nothing is stored twice. Its seal identifies those weights.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from lamplit.errors import TowerError
from lamplit.exports.kept_graphs import kept_graph, name_weights, place_weights
from lamplit.exports.onnx import write_text_graph
from lamplit.exports.sample import SENTENCES
from lamplit.files import replacing
from lamplit.model import LiT, load
from lamplit.store.embed.backends import TOLERANCE
from lamplit.towers.loading import quiet_logging
from lamplit.towers.model_folder import TEXT_GRAPH, TEXT_TOWER, read_config, saved_folder
from lamplit.towers.texts.word_reader import WordReader, open_words, seal
from lamplit.unit_vectors import as_array

logger = logging.getLogger(__name__)
MAX_BYTES = 1_900_000_000  # an ONNX file that still has its weights inside ends at 2 GiB
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
    tower, weights, config = model.text_tower, folder / TEXT_TOWER, read_config(folder)
    assert tower is not None
    if weights.stat().st_size > MAX_BYTES:
        raise TowerError(f"{tower.spec} is too large for one ONNX file")
    notes = {"seal": seal(folder, config), "pad_id": str(tower.tokenizer.pad_id)}
    kept = kept_graph(config["text_tower"], weights)
    if kept.is_file():
        try:
            place_weights(kept.read_bytes(), weights, notes, file)
            return _compare(model, WordReader(folder, file.name))
        except (TowerError, DecodeError, LookupError):  # it is damaged, or not as general as was thought
            kept.unlink(missing_ok=True)
    write_text_graph(tower, file)
    graph, is_general = name_weights(file, weights)
    place_weights(graph, weights, notes, file)
    _compare(model, WordReader(folder, file.name))
    if is_general:
        with suppress(OSError):  # a full disk, a cache that belongs to somebody else: the next one is written anew
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as partial:
                partial.write_bytes(graph)


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
