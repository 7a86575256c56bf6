"""The published models: the official code's numbers, every way a file may be written, and what is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FolderHandler, draw, serve
from PIL import Image
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from torch.nn import functional as F

import lamplit
from lamplit.cli import main as cli
from lamplit.errors import StoreError, TowerError, UsageError
from lamplit.evaluation.evaluator import evaluate
from lamplit.files import cache_folder
from lamplit.inspection import describe
from lamplit.model import LiT, load
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.lock import Locked
from lamplit.towers.published import big_vision as published_module
from lamplit.towers.published.big_vision import NAMES
from lamplit.towers.texts.text_tower import TextTower, open_text_tower
from lamplit.towers.tokens.tokenizers import SentencePiece
from lamplit.towers.tokens.wordpiece import WordPiece

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
MODELS = ["tiny-bert", "tiny-bert-head", "tiny-text"]
LETTERS = "abcdefghijklmnopqrstuvwxyz.,"
TOKENS = ["[PAD]", "[CLS]", "[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
TOKENS += [f"word{i}" for i in range(120 - len(TOKENS))]
TEXTS = ["A red circle.", "a", "", "zebra, " * 9]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Put the three models beside a vocabulary each. To be read only."""
    folder = tmp_path_factory.mktemp("published")
    for name in MODELS:
        shutil.copy(PARITY / f"{name}.npz", folder)
        (folder / f"{name}.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    return folder


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(folder: Path, name: str) -> LiT:
    """Load one of the models; a test may spoil it."""
    return load(f"lit:{folder / name}.npz")


def arrays_of(name: str) -> Arrays:
    with np.load(PARITY / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def expected_of(name: str) -> Arrays:
    with np.load(PARITY / f"{name}.expected.npz", allow_pickle=False) as file:
        return dict(file)


def backbone_of(model: LiT) -> nn.Module:
    assert isinstance(model.image_tower, Locked)
    return model.image_tower.tower.backbone


def rows_of(name: str) -> list[list[int]]:
    """Token ids as our tokenizers give them: BERT's without the padding."""
    rows = expected_of(name)["tokens"]
    return rows.tolist() if name == "tiny-text" else [np.trim_zeros(row, "b").tolist() for row in rows]


@torch.no_grad()
def image_difference(model: LiT, name: str) -> float:
    expected = expected_of(name)
    image_folder = torch.from_numpy(expected["images"]).permute(0, 3, 1, 2)
    return largest(F.normalize(backbone_of(model)(image_folder), dim=-1), expected["zimg"])


@torch.no_grad()
def text_difference(model: LiT, name: str) -> float:
    assert model.text_tower is not None
    return largest(F.normalize(model.text_tower(rows_of(name)), dim=-1), expected_of(name)["ztxt"])


def largest(found: Tensor, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float((found - torch.from_numpy(expected)).abs().max())


# The official code's numbers


def test_vectors_are_the_official_code_s(model: LiT, name: str) -> None:
    assert image_difference(model, name) <= 1e-6
    assert text_difference(model, name) <= 1e-6
    assert model.logit_multiplier.item() == pytest.approx(expected_of(name)["logit_scale"].item(), rel=1e-6)


def test_texts_of_one_batch_do_not_touch(model: LiT, name: str) -> None:
    assert model.text_tower is not None
    expected = torch.from_numpy(expected_of(name)["ztxt"])
    with torch.no_grad():
        for row, vector in zip(rows_of(name), expected, strict=True):
            assert (F.normalize(model.text_tower([row]), dim=-1)[0] - vector).abs().max() <= 1e-6


def swap_gelu(module: nn.Module) -> None:
    """The exact GELU, transformers' own for BERT, instead of the tanh one of flax."""
    for part in list(module.modules()):
        for attribute in ("act", "intermediate_act_fn"):
            if hasattr(part, attribute):
                setattr(part, attribute, nn.GELU())


def set_epsilon(epsilon: float) -> Callable[[nn.Module], None]:
    def set_all(module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                assert part.eps != epsilon
                part.eps = epsilon

    return set_all


@pytest.mark.parametrize("mistake", [swap_gelu, set_epsilon(1e-5)], ids=["erf GELU", "epsilon 1e-5"])
def test_a_mistake_in_the_image_tower_fails(model: LiT, name: str, mistake: Callable[[nn.Module], None]) -> None:
    mistake(backbone_of(model))
    assert image_difference(model, name) > 1e-6


def test_a_mistake_in_the_text_tower_fails(model: LiT, name: str) -> None:
    assert model.text_tower is not None
    swap_gelu(model.text_tower.encoder)
    assert text_difference(model, name) > 1e-6


def test_another_epsilon_in_the_text_tower_fails(model: LiT, name: str) -> None:
    assert model.text_tower is not None
    for epsilon in (1e-5,) if name == "tiny-text" else (1e-5, 1e-6):
        set_epsilon(epsilon)(model.text_tower.encoder)
        assert text_difference(model, name) > 1e-6


def test_no_mask_of_the_padding_fails(folder: Path) -> None:
    for name in MODELS[:2]:
        tower = load(f"lit:{folder / name}.npz", towers="text").text_tower
        assert tower is not None
        with torch.no_grad():  # as rows of one length they bring no mask
            found = F.normalize(tower(expected_of(name)["tokens"].tolist()), dim=-1)
        assert largest(found, expected_of(name)["ztxt"]) > 1e-3


def test_another_pooling_fails(model: LiT, name: str) -> None:
    assert model.text_tower is not None
    model.text_tower.pooling = "cls" if name == "tiny-text" else "last"
    assert text_difference(model, name) > 1e-3


def test_images_go_the_authors_way(model: LiT, name: str) -> None:
    """From bytes to a vector: squashed, sampled at points, cut to whole numbers, -1 to 1."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    preprocessing = model.identity.preprocessing
    assert (preprocessing.image_size, preprocessing.fit, preprocessing.antialias) == ((64, 64), "squash", False)
    resized = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), (64, 64), mode="bilinear")
    with torch.no_grad():
        expected = F.normalize(backbone_of(model)(resized.to(torch.uint8) / 255 * 2 - 1), dim=-1)
    assert (
        model.encode_images([Image.fromarray(pixels)]) - expected
    ).abs().max() < 1e-3  # a few pixels round otherwise


# Every way a file may be written


def written(tmp_path: Path, arrays: Arrays) -> LiT:
    """Load `arrays` from a file of their own."""
    np.savez(tmp_path / "a.npz", **arrays)
    (tmp_path / "a.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    return load(f"lit:{tmp_path / 'a.npz'}")


def renamed(arrays: Arrays, *pairs: tuple[str, str]) -> Arrays:
    for pattern, new in pairs:
        changed = {re.sub(pattern, new, key): value for key, value in arrays.items()}
        assert changed.keys() != arrays.keys()
        arrays = changed
    return arrays


OLD_NUMBERS = (
    ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
    ("LayerNorm_1", "LayerNorm_2"),
    ("MlpBlock_0", "MlpBlock_3"),
)
POSITIONS = "img/Transformer/posembed_input/pos_embedding"


def same(arrays: Arrays) -> Arrays:
    return arrays


def class_position_in_the_token(arrays: Arrays) -> Arrays:
    positions = arrays.pop(POSITIONS)
    return arrays | {"img/cls": arrays["img/cls"] + positions[:, :1], "img/pos_embedding": positions[:, 1:]}


def second_table_of_positions(arrays: Arrays) -> Arrays:
    if "txt/pos_embedding" not in arrays:
        return arrays
    whole = arrays["txt/pos_embedding"]
    part = np.float32(0.25) * whole
    return arrays | {"txt/pos_embedding": whole - part, "txt/Encoder_0/pos_embedding": part}


def training_checkpoint(arrays: Arrays) -> Arrays:
    return {f"opt/target/{key}": value for key, value in arrays.items()} | {"opt/state/step": np.zeros(1, np.float32)}


@pytest.mark.parametrize(
    "change",
    [
        same,
        lambda arrays: renamed(arrays, *OLD_NUMBERS),
        lambda arrays: renamed(arrays, ("^", "params/")),
        lambda arrays: renamed(arrays, ("posembed_input/", "")),
        lambda arrays: renamed(arrays, ("Transformer/posembed_input/", "")),
        class_position_in_the_token,
        lambda arrays: renamed(class_position_in_the_token(arrays), ("img/pos_", "img/Transformer/pos_"), *OLD_NUMBERS),
        second_table_of_positions,
        training_checkpoint,
        lambda arrays: {key: np.asfortranarray(value) for key, value in arrays.items()},
        lambda arrays: {key: value.astype(np.float64) for key, value in arrays.items()},
    ],
    ids=["as it is", "old numbers", "params/", "Transformer/pos", "pos", "no class row", "that and old", "two tables",
         "opt/target/", "Fortran", "float64"],
)  # fmt: skip
def test_every_way_of_writing_gives_the_same(name: str, change: Callable[[Arrays], Arrays], tmp_path: Path) -> None:
    """The files of tests/fixtures/parity are compressed, these are not."""
    model = written(tmp_path, change(arrays_of(name)))
    assert image_difference(model, name) <= 1e-6
    assert text_difference(model, name) <= 1e-6


def test_bfloat16(name: str, tmp_path: Path) -> None:
    """numpy writes bfloat16, which it does not know, as two bytes of anything."""
    arrays = arrays_of(name)
    short = {key: torch.from_numpy(value).to(torch.bfloat16) for key, value in arrays.items()}
    (tmp_path / "rounded").mkdir()
    rounded = written(tmp_path / "rounded", {key: value.float().numpy() for key, value in short.items()})
    model = written(tmp_path, {k: v.view(torch.int16).numpy().view("V2") for k, v in short.items()})
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in rounded.state_dict().items())
    assert 1e-6 < image_difference(model, name) < 0.1


@pytest.mark.parametrize("with_head", [False, True])
def test_pre_logits(with_head: bool, tmp_path: Path) -> None:
    """A layer and a tanh before the head, where a file has weights for it."""
    name = "tiny-bert-head" if with_head else "tiny-bert"
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(48, 48)).astype(np.float32)
    bias = generator.normal(size=48).astype(np.float32)
    model = written(tmp_path, arrays_of(name) | {"img/pre_logits/kernel": kernel, "img/pre_logits/bias": bias})
    plain = {key: value for key, value in arrays_of("tiny-bert-head").items() if not key.startswith("img/head")}
    plain |= {key: value for key, value in arrays_of("tiny-bert").items() if key.startswith("txt/head")}
    (tmp_path / "plain").mkdir()
    features = written(tmp_path / "plain", (arrays_of("tiny-bert") if not with_head else plain))
    image_folder = torch.from_numpy(expected_of(name)["images"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = (backbone_of(features)(image_folder) @ torch.from_numpy(kernel) + torch.from_numpy(bias)).tanh()
        if with_head:
            head = [torch.from_numpy(arrays_of(name)[f"img/head/{part}"]) for part in ("kernel", "bias")]
            expected = expected @ head[0] + head[1]
        assert (backbone_of(model)(image_folder) - expected).abs().max() < 1e-5


# What is refused (tests/test_npz.py has hostile files, tests/test_layout.py every kind of misfit)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"img/cls": None}, "1 missing: img/cls"),
        ({"img/extra": np.zeros(3, np.float32)}, "1 unexpected: img/extra"),
        ({"txt/head/bias": np.zeros(41, np.float32)}, r"1 of another shape: txt/head/bias \(41,\) for \(48,\)"),
        ({"t": np.array([4])}, "its array t.npy is of int64"),
        ({"t": np.array([1e9])}, "its t, the logarithm of a multiplier of cosines, is 1000000000.0"),
        ({"t": np.array([np.nan])}, "its t, the logarithm of a multiplier of cosines, is nan"),
        ({"t": np.array([None])}, "its array t.npy holds Python objects"),
        ({key: None for key in arrays_of("tiny-text") if key.startswith("txt/")}, "it lacks txt/Embed_0/embedding"),
    ],
)
def test_misfits(change: dict[str, np.ndarray | None], reason: str, tmp_path: Path) -> None:
    arrays = {key: value for key, value in (arrays_of("tiny-text") | change).items() if value is not None}
    with pytest.raises(TowerError, match=rf"a.npz cannot be read as a published model: {reason}"):
        written(tmp_path, arrays)


def test_a_damaged_array(folder: Path, tmp_path: Path) -> None:
    arrays = arrays_of("tiny-text")
    np.savez(tmp_path / "a.npz", **arrays)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(arrays["txt/Embed_0/embedding"].tobytes()) + 100] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    shutil.copy(folder / "tiny-text.txt", tmp_path / "a.txt")
    load(f"lit:{tmp_path / 'a.npz'}", towers="image")  # that tower is whole
    with pytest.raises(TowerError, match="txt/Embed_0/embedding: Bad CRC-32"):
        load(f"lit:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
    ("model", "given", "reason"),
    [
        ("tiny-bert", None, "a.npz has no vocabulary; put it at .*a.txt$"),
        ("tiny-text", None, "a.npz has no vocabulary; put it at .*a.model or .*a.txt$"),
        ("tiny-bert", TOKENS[:-1], "a.txt has 119 tokens, but .*a.npz has vectors for 120"),
        ("tiny-text", [*TOKENS, "more"], "a.txt has 121 tokens, but .*a.npz has vectors for 120"),
        ("tiny-bert", ["[PAD]"], "a.txt cannot be read as a vocabulary"),
    ],
)
def test_vocabularies(model: str, given: list[str] | None, reason: str, tmp_path: Path) -> None:
    shutil.copy(PARITY / f"{model}.npz", tmp_path / "a.npz")
    if given is not None:
        (tmp_path / "a.txt").write_text("\n".join(given))
    with pytest.raises(TowerError, match=reason):
        load(f"lit:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize("spec", ["lit:", "lit:B32B", "lit:LiT-B16B", "lit:model.pt"])
def test_unknown_names(spec: str) -> None:
    with pytest.raises(UsageError, match=r"expected lit:B16B, lit:B16B_2, .* or lit:FILE.npz"):
        load(spec)


def test_no_weights_of_your_own(folder: Path) -> None:
    with pytest.raises(UsageError, match="brings its own weights"):
        open_image_tower(f"lit:{folder / 'tiny-bert'}.npz", weights="random")


# From the authors' bucket


def test_without_a_network_it_says_where_to_put_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(published_module, "BUCKET", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(TowerError, match=r"http://127.0.0.1:9/LiT-L16S.npz could not be fetched \(.*refused.*; put it"):
        load("lit:L16S")
    assert list((tmp_path / "lit").iterdir()) == []


@pytest.mark.parametrize(
    ("fetched", "stands_for", "ending"), [("B16B_2", "tiny-bert", ".txt"), ("L16S", "tiny-text", ".model")]
)
def test_fetched_once(
    fetched: str, stands_for: str, ending: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket, cache = tmp_path / "bucket", tmp_path / "cache"
    bucket.mkdir()
    shutil.copy(folder / f"{stands_for}.npz", bucket / f"LiT-{fetched}.npz")
    vocabulary = sentencepiece_model() if ending == ".model" else (folder / f"{stands_for}.txt").read_bytes()
    (bucket / f"LiT-{fetched}{ending}").write_bytes(vocabulary)
    assert NAMES[fetched] == ending
    monkeypatch.setenv("LAMPLIT_CACHE", str(cache))
    with serve(partial(FolderHandler, directory=bucket)) as address:
        monkeypatch.setattr(published_module, "BUCKET", address)
        model = load(f"lit:{fetched}")
    assert image_difference(model, stands_for) <= 1e-6
    assert {file.name for file in (cache_folder() / "lit").iterdir()} == {file.name for file in bucket.iterdir()}
    again = load(f"lit:{fetched}")
    assert torch.equal(again.encode_texts(TEXTS), model.encode_texts(TEXTS))


def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a small red circle.", "zebra, a large green square"] * 3), model_writer=model,
        model_type="bpe", vocab_size=100, hard_vocab_limit=False, unk_id=0, eos_id=1, bos_id=-1, pad_id=-1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("prefix", ["LiT-", ""])
def test_a_file_of_the_authors_brings_its_vocabulary(
    prefix: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its name says which."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    shutil.copy(folder / "tiny-bert.txt", bucket / "LiT-B16B.txt")
    shutil.copy(folder / "tiny-bert.npz", tmp_path / f"{prefix}B16B.npz")
    monkeypatch.setenv("LAMPLIT_CACHE", str(tmp_path / "cache"))
    with serve(partial(FolderHandler, directory=bucket)) as address:
        monkeypatch.setattr(published_module, "BUCKET", address)
        assert load(f"lit:{tmp_path}/{prefix}B16B.npz", towers="text").encode_texts(TEXTS).shape == (4, 48)


# A model like any other


def test_tokenizers_and_lengths(model: LiT, name: str) -> None:
    tower = model.text_tower
    assert tower is not None
    assert isinstance(tower.tokenizer, WordPiece)
    assert tower.context_length == 16
    rows = tower.tokenize(TEXTS)
    assert max(map(len, rows)) == 16
    assert min(map(len, rows)) == (16 if name == "tiny-text" else 1)
    assert tower.count_truncated(TEXTS) == 1


def test_sentencepiece_beside_the_file(tmp_path: Path) -> None:
    shutil.copy(PARITY / "tiny-text.npz", tmp_path / "a.npz")
    (tmp_path / "a.model").write_bytes(sentencepiece_model())
    model = load(f"lit:{tmp_path / 'a.npz'}")
    assert model.text_tower is not None
    assert isinstance(model.text_tower.tokenizer, SentencePiece)
    assert {row[-1] for row in model.text_tower.tokenize(TEXTS)} == {1}  # </s>
    model.save(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").encode_texts(TEXTS), model.encode_texts(TEXTS))


def test_saved_it_needs_its_file_no_more(name: str, image_folder: Path, tmp_path: Path) -> None:
    shutil.copy(PARITY / f"{name}.npz", tmp_path / "a.npz")
    (tmp_path / "a.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    model = load(f"lit:{tmp_path / 'a.npz'}")
    model.save(tmp_path / "model")
    for file in ("a.npz", "a.txt"):
        (tmp_path / file).unlink()
    again = load(tmp_path / "model")
    files = sorted(image_folder.glob("*.png"))[:3]
    assert torch.equal(again.encode_images(files), model.encode_images(files))
    assert torch.equal(again.encode_texts(TEXTS), model.encode_texts(TEXTS))
    assert again.logit_multiplier.item() == model.logit_multiplier.item()
    assert again.identity == model.identity
    with pytest.raises(TowerError, match="No such file"):
        load(f"lit:{tmp_path / 'a.npz'}")


def test_one_tower_alone(folder: Path, image_folder: Path) -> None:
    spec = f"lit:{folder / 'tiny-bert-head'}.npz"
    both, text, image = load(spec), load(spec, towers="text"), load(spec, towers="image")
    assert text.image_tower is None
    assert image.text_tower is None
    assert text.identity == image.identity == both.identity
    assert torch.equal(text.encode_texts(TEXTS), both.encode_texts(TEXTS))
    file = next(image_folder.glob("*.png"))
    assert torch.equal(image.encode_images([file]), both.encode_images([file]))
    assert image.logit_multiplier.item() == both.logit_multiplier.item()


@pytest.fixture(scope="module")
def published_store(folder: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embed the drawings with a published tower that has a head."""
    path = tmp_path_factory.mktemp("published") / "drawings.lance"
    lamplit.embed(image_folder / "pairs.csv", path, image_tower=f"lit:{folder / 'tiny-bert-head'}.npz", backend="torch")
    return path


def test_its_store_is_its_own(published_store: Path, folder: Path, image_folder: Path) -> None:
    model = load(f"lit:{folder / 'tiny-bert-head'}.npz")
    store = Store(published_store)
    assert store.tower == model.identity
    assert store.tower.width == 40
    files = [str(image_folder / path) for path in store.column("path")]
    assert (model.encode_images(files) - store.vectors()).abs().max() < 1e-3  # halves
    [hit] = lamplit.search(model, store, image=files[3], k=1)
    assert hit.path == store.column("path")[3]
    with pytest.raises(StoreError, match="was embedded by"):
        lamplit.search(load(f"lit:{folder / 'tiny-bert'}.npz"), store, "a circle")


def test_it_evaluates_and_classifies(published_store: Path, folder: Path, image_folder: Path) -> None:
    model = load(f"lit:{folder / 'tiny-bert-head'}.npz")
    [found] = evaluate(model, published_store)
    assert set(found.metrics) >= {"text_to_image/recall@1", "image_to_text/recall@1"}
    [found] = evaluate(model, image_folder / "pairs.csv")
    assert found.images == 60
    [prediction] = lamplit.classify(model, [next(image_folder.glob("*.png"))], ["circle", "square", "ring"])
    assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-5)


def tuned(store: Path, out: Path, text: str, **values: object) -> tuple[dict[str, object], LiT]:
    settings = lamplit.TuneSettings(text_tower=text, epochs=1.0, batch_size=16, num_evals=1, **values)
    lamplit.tune(store, out, settings)
    return json.loads((out / "log.jsonl").read_text().splitlines()[0]), load(out)


def test_it_is_tuned_further_from_its_own_head_and_scale(published_store: Path, folder: Path, tmp_path: Path) -> None:
    spec = f"lit:{folder / 'tiny-bert-head'}.npz"
    start, model = tuned(published_store, tmp_path / "run", spec, lr=1e-9)
    assert start["closed_form"] is False
    assert torch.allclose(model.encode_texts(TEXTS), load(spec).encode_texts(TEXTS), atol=1e-5)
    assert model.logit_multiplier.item() == pytest.approx(80.64, rel=1e-3)
    image_file = draw("ring", "green", 20)
    assert torch.equal(model.encode_images([image_file]), load(spec).encode_images([image_file]))


def test_for_another_tower_it_gets_a_new_head(store_path: Path, folder: Path, tmp_path: Path) -> None:
    start, model = tuned(store_path, tmp_path / "run", f"lit:{folder / 'tiny-text'}.npz", lr=1e-9)
    assert start["closed_form"] is True
    assert model.logit_multiplier.item() == pytest.approx(10, rel=1e-3)


def test_which_text_tower_keeps_its_head(folder: Path) -> None:
    spec = f"lit:{folder / 'tiny-text'}.npz"
    own = load(spec)
    assert own.text_tower is not None

    def head_is_kept(tower: TextTower) -> bool:
        assert own.text_tower is not None
        kept = torch.equal(tower.head.weight, own.text_tower.head.weight)
        assert kept == (tower.trained_scale is not None)
        return kept

    fingerprint = own.identity.fingerprint
    assert head_is_kept(open_text_tower(spec, width=48, reads=fingerprint))
    assert not head_is_kept(open_text_tower(spec, width=48))
    assert not head_is_kept(open_text_tower(spec, width=48, reads="0" * 32))
    assert not head_is_kept(open_text_tower(spec, width=48, reads=fingerprint, pretrained=False))
    other = open_text_tower(spec, width=8, context_length=5)
    assert (other.width, other.context_length) == (8, 5)
    assert torch.equal(other.encoder.norm.weight, own.text_tower.encoder.norm.weight)
    assert open_text_tower(spec, width=8, context_length=99).context_length == 16


def test_info(name: str, folder: Path) -> None:
    told = describe(f"lit:{folder / name}.npz")
    assert told["parameters"] == sum(array.size for array in arrays_of(name).values())
    assert (told["width"], told["image size"]) == (expected_of(name)["zimg"].shape[1], "64x64")
    assert told["text tower"] == ("the paper's own, width 32" if name == "tiny-text" else "BERT, width 32")
    assert told["logit scale"] == pytest.approx(80.6404, abs=1e-4)


@pytest.mark.parametrize("command", ["info", "classify", "search", "evaluate", "embed"])
def test_every_command_takes_it(
    command: str,
    published_store: Path,
    folder: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = f"lit:{folder / 'tiny-bert-head'}.npz"
    image_file = next(image_folder.glob("*.png"))
    arguments = {
        "info": [spec],
        "classify": [spec, image_file, "--classes", "circle,square"],
        "search": [spec, published_store, "a circle"],
        "evaluate": [spec, published_store],
        "embed": [image_folder / "pairs.csv", "--image-tower", spec, "--out", tmp_path / "a.lance", "--workers", "0"],
    }
    monkeypatch.setattr(sys, "argv", ["lamplit", command, *map(str, arguments[command]), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)


def test_open_image_tower(folder: Path) -> None:
    tower = open_image_tower(f"lit:{folder / 'tiny-bert-head'}.npz")
    assert isinstance(tower, ImageTower)
    assert (tower.width, tower.class_head) == (40, None)
    assert tower.config["library"] == "lit"
