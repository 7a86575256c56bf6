"""ONNX files: what they take, what they give, and what int8 costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from conftest import wordpiece_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model, T5Config, T5EncoderModel

from lamplit.data.decoding.images import decode_image
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError
from lamplit.exports.export_report import ExportReport
from lamplit.exports.exporting import export
from lamplit.exports.sample import SENTENCES, require_agreement, take_sample, text_tolerance
from lamplit.model import LiT, load
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.texts.text_tower import TextTower, open_text_tower

pytest.importorskip("onnxscript")

TEXTS = ["A small red circle.", "a", "A large green square, a small blue ring, and a large black cross." * 3, "rot"]
WORDS = wordpiece_tokenizer(20)
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256, "max_position_embeddings": 20}


class Square(nn.Module):
    """Convolutions, which int8 leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2))

    def forward(self, pixels: Tensor) -> Tensor:
        pooled: Tensor = self.layers(pixels).mean((2, 3))
        return pooled


def small_image_tower(module: nn.Module) -> ImageTower:
    return open_image_tower(module, preprocessing=Preprocessing((24, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))


def text_tower(model: Any, folder: Path, pooling: str, width: int) -> TextTower:
    WORDS.save_pretrained(folder)
    model.save_pretrained(folder)
    tower = open_text_tower(f"hf:{folder}", width=width)
    nn.init.normal_(tower.head.bias, std=0.5)
    tower.pooling = pooling  # type: ignore[assignment]
    return tower


class Exported:
    """A folder as someone without torch or lamplit would use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())

    def run(self, file: str, **inputs: Tensor) -> Tensor:
        session = onnxruntime.InferenceSession(self.folder / file, providers=["CPUExecutionProvider"])
        [vectors] = session.run(["vectors"], {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(vectors)

    def texts(self, texts: list[str], file: str = "text_tower.onnx") -> Tensor:
        text = self.config["text"]
        tokenizer = AutoTokenizer.from_pretrained(self.folder / text["tokenizer"])
        tokens = tokenizer(texts, truncation=True, max_length=text["context_length"], padding=True, return_tensors="pt")
        return self.run(file, **{name: tokens[name] for name in text["inputs"]})

    def rows(self, model: LiT) -> Tensor:
        """Vectors of `TEXTS` one by one, where the tokenizer is lamplit's own."""
        assert model.text_tower is not None
        rows = [torch.tensor([ids]) for ids in model.text_tower.tokenize(TEXTS)]
        return torch.cat(
            [self.run("text_tower.onnx", input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in rows]
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LiT:
    """Everything a model can have: a centre, an image head with a bias, a bias of the logits."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=96, **SMALL)
    text = text_tower(BertModel(config), tmp_path_factory.mktemp("text"), "mean", 24)
    image = small_image_tower(Square())
    return LiT(
        text, image.identity(), image, center=torch.randn(32) * 0.1, image_head=nn.Linear(32, 24), logit_multiplier=7.0,
        logit_bias=-3.0,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def report(model: LiT, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export(model, tmp_path_factory.mktemp("onnx") / "out", to="onnx", int8=True)


@pytest.fixture
def exported(report: ExportReport) -> Exported:
    return Exported(Path(report.folder))


@pytest.mark.parametrize("number", [1, 2, 5])
def test_images(exported: Exported, model: LiT, image_folder: Path, number: int) -> None:
    files = sorted(image_folder.glob("*.png"))[:number]
    resize = Preprocessing.from_dict(exported.config["image"]["preprocessing"]).resize
    pixels = torch.stack([resize(decode_image(file.read_bytes())) for file in files])
    assert pixels.dtype == torch.uint8
    assert list(pixels.shape[1:]) == exported.config["image"]["shape"][1:]
    vectors = exported.run("image_tower.onnx", pixels=pixels)
    assert (vectors - model.encode_images(files)).abs().max() < 1e-5
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[1:2], TEXTS[2:3], TEXTS[::-1] * 3])
def test_texts_whatever_the_padding(exported: Exported, model: LiT, texts: list[str]) -> None:
    vectors = exported.texts(texts)
    assert (vectors - model.encode_texts(texts)).abs().max() < 1e-5
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6


def test_one_token(exported: Exported, model: LiT) -> None:
    assert model.text_tower is not None
    ids = torch.tensor([[7]])
    expected = F.normalize(model.text_tower([[7]]), dim=-1).detach()
    found = exported.run("text_tower.onnx", input_ids=ids, attention_mask=torch.ones_like(ids))
    assert (found - expected).abs().max() < 1e-5


def test_padding_is_never_read(exported: Exported) -> None:
    ids, mask = torch.randint(5, len(WORDS), (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:] = 0
    other = ids.clone()
    other[0, 4:] = 11
    first, second = (exported.run("text_tower.onnx", input_ids=given, attention_mask=mask) for given in (ids, other))
    assert (first - second).abs().max() < 1e-6


def test_config_says_everything(exported: Exported, model: LiT, report: ExportReport) -> None:
    config = exported.config
    assert config["width"] == 24
    assert config["logit_scale"] == pytest.approx(7)
    assert config["logit_bias"] == -3
    assert config["image"]["dtype"] == "uint8"
    assert config["image"]["fingerprint"] == model.identity.fingerprint
    assert config["text"]["pooling"] == "mean"
    assert config["text"]["context_length"] == 20
    assert config["text"]["pad_id"] == 0
    assert config["checked"]["largest_difference"] == report.differences
    assert max(report.differences.values()) < 1e-5
    names = onnxruntime.InferenceSession(exported.folder / "text_tower.onnx")
    assert [(entry.name, entry.shape) for entry in names.get_inputs()] == [
        ("input_ids", ["batch", "tokens"]),
        ("attention_mask", ["batch", "tokens"]),
    ]


def test_int8_is_smaller_and_says_what_it_loses(exported: Exported, model: LiT, report: ExportReport) -> None:
    assert report.int8 == exported.config["int8"]
    assert report.int8 is not None
    assert report.int8["image"] == {
        "file": None,
        "reason": "matrix products are too small a part of it: int8 would save less than a quarter",
    }
    small = report.int8["text"]
    assert report.files[small["file"]] < 0.75 * report.files["text_tower.onnx"]
    assert "image_tower.int8.onnx" not in report.files
    for way in ("alone", "in_batch"):
        assert 0.9 < small[way]["lowest_cosine"] <= small[way]["mean_cosine"] < 1
    assert small["batch"] == len(SENTENCES)
    texts = list(SENTENCES)
    measured = {
        "alone": torch.cat([exported.texts([text], small["file"]) for text in texts]),
        "in_batch": exported.texts(texts, small["file"]),
    }
    assert not torch.allclose(measured["alone"], measured["in_batch"], atol=1e-4)  # dynamic quantisation
    for way, vectors in measured.items():
        cosines = (vectors * model.encode_texts(texts)).sum(1)
        assert float(cosines.min()) == pytest.approx(small[way]["lowest_cosine"], abs=1e-5)
        assert float(cosines.mean()) == pytest.approx(small[way]["mean_cosine"], abs=1e-5)
    assert "depends on what else is in its batch" in " ".join(report.notes)
    cosines = (exported.texts(TEXTS, small["file"]) * model.encode_texts(TEXTS)).sum(1)
    assert cosines.min() > 0.9
    assert cosines.max() < 1 - 1e-7  # it is another file
    for name in ("text_to_image_top1_agreement", "image_to_text_top1_agreement"):
        assert all(0 <= report.int8[name][way] <= 1 for way in ("alone", "in_batch"))


@pytest.mark.slow
def test_text_tower_alone(tmp_path: Path, model: LiT) -> None:
    bare = LiT(model.text_tower, model.identity, image_head=model.image_head)
    report = export(bare, tmp_path / "out", to="onnx")
    assert report.notes == ["the model has no image tower: only the text tower was written"]
    assert "image_tower.onnx" not in report.files
    assert "image" not in Exported(tmp_path / "out").config
    assert (Exported(tmp_path / "out").texts(TEXTS) - model.encode_texts(TEXTS)).abs().max() < 1e-5


@pytest.mark.slow
def test_sample_of_one_pair(tmp_path: Path, model: LiT, image_folder: Path) -> None:
    (tmp_path / "one.csv").write_text(f"path,caption\n{image_folder / 'large_red_cross.png'},red\n")
    report = export(model, tmp_path / "out", to="onnx", sample=tmp_path / "one.csv")
    assert report.sample == f"1 texts and 1 images of {tmp_path / 'one.csv'}"
    assert (Exported(tmp_path / "out").texts(TEXTS) - model.encode_texts(TEXTS)).abs().max() < 1e-5


class Moody(nn.Module):
    """No constant function: what it gives changes from run to run."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3)) + torch.rand_like(pixels)[:, :, 0, 0]


def test_file_that_disagrees_does_not_stay(tmp_path: Path) -> None:
    tower = small_image_tower(Moody())
    with pytest.raises(TowerError, match=r"exported image tower differs from lamplit's by .*nothing was written"):
        export(LiT(None, tower.identity(), tower), tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_agreement_is_on_every_coordinate() -> None:
    expected = F.normalize(torch.randn(5, 24), dim=-1)
    assert require_agreement("text tower", expected + 9e-6, expected, 1e-5) == pytest.approx(9e-6, rel=0.1)
    for wrong in (expected + 1.2e-5, expected * float("nan"), expected.flip(0), expected[:, :20]):
        with pytest.raises(TowerError, match="the exported text tower"):
            require_agreement("text tower", wrong, expected, 1e-5)


def test_tolerance_grows_only_with_rounding(model: LiT, tmp_path: Path) -> None:
    assert text_tolerance(model, take_sample(model, None)) == 1e-5
    config = BertConfig(vocab_size=len(WORDS), hidden_size=32, **SMALL)
    tower = text_tower(BertModel(config), tmp_path, "cls", 24)
    with torch.no_grad():  # sums that nearly cancel
        mean = tower.features(tower.tokenize(TEXTS)).mean(0)
        tower.head.weight.mul_(100)
        tower.head.bias.copy_(-tower.head.weight @ mean)
    cancelling = LiT(tower.eval(), model.identity, image_head=model.image_head)
    assert 1e-5 < text_tolerance(cancelling, take_sample(cancelling, None)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pooling"), [("t5", "mean"), ("gpt2", "mean"), ("scratch", "last")])
def test_kinds_of_text_tower(kind: str, pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = len(WORDS)
    if kind == "scratch":
        tower = open_text_tower("scratch:tiny", width=24, texts=TEXTS)
    else:
        kinds: dict[str, Any] = {
            "t5": lambda: T5EncoderModel(T5Config(vocab_size=size, d_model=32, d_ff=64, num_layers=2, num_heads=2)),
            "gpt2": lambda: GPT2Model(
                GPT2Config(
                    vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=20, bos_token_id=2, eos_token_id=3
                )
            ),
        }
        tower = text_tower(kinds[kind](), tmp_path / "text", pooling, 24)
    model = LiT(tower, small_image_tower(nn.Sequential(nn.Flatten(), nn.Linear(2304, 24))).identity()).eval()
    report = export(model, tmp_path / "out", to="onnx")
    assert max(report.differences.values()) < 1e-5
    exported = Exported(tmp_path / "out")
    found = exported.rows(model) if kind == "scratch" else exported.texts(TEXTS)
    assert (found - model.encode_texts(TEXTS)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_resnet", "test_convnext"])
def test_kinds_of_image_tower(name: str, tmp_path: Path, image_folder: Path) -> None:
    torch.manual_seed(0)
    tower = open_image_tower(f"timm:{name}", weights="random")
    report = export(LiT(None, tower.identity(), tower), tmp_path / "out", to="onnx", sample=image_folder / "pairs.csv")
    assert report.differences["image vectors"] < 1e-4
    assert report.notes == ["the model has no text tower: only the image tower was written"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-bert-head", "tiny-text"])
def test_published_models(name: str, tmp_path: Path, image_folder: Path) -> None:
    """The authors' models: no mask, rows of one length, a tokenizer of lamplit's own, and with `head` an image head."""
    shutil.copy(Path(__file__).parents[1] / "fixtures" / "parity" / f"{name}.npz", tmp_path)
    tokens = [
        "[PAD]",
        "[CLS]",
        "[UNK]",
        *"abcdefghijklmnopqrstuvwxyz.,",
        *(f"##{letter}" for letter in "abcdefghijklm"),
    ]
    tokens += [f"word{number}" for number in range(120 - len(tokens))]
    (tmp_path / f"{name}.txt").write_text("".join(f"{token}\n" for token in tokens))
    model = load(f"lit:{tmp_path / name}.npz")
    report = export(model, tmp_path / "out", to="onnx", sample=image_folder / "pairs.csv")
    assert max(report.differences.values()) < 1e-5
    assert set(report.differences) == {"image vectors", "text vectors, padded", "text vectors, one by one"}
    text = Exported(tmp_path / "out").config["text"]
    assert text["tokenizer_settings"]["kind"] == "wordpiece"
    assert (Exported(tmp_path / "out").rows(model) - model.encode_texts(TEXTS)).abs().max() < 1e-5
    for to in ("transformers", "open-clip", "sentence-transformers"):
        with pytest.raises(TowerError, match="--to onnx"):
            export(model, tmp_path / to, to=to)  # type: ignore[arg-type]
