from __future__ import annotations

import io
import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.data.decoding.images import decode_image
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.split_record import SplitRecord
from lamplit.errors import ImageError, TowerError, UsageError
from lamplit.model import FORMAT, LiT, as_model, load, merge_lora
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.lock import Locked, weights_digest
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.towers.texts.text_tower import open_text_tower

TEXTS = ["A small red circle.", "a cross", "A large green square, and a small blue ring.", "red"]


def make_model(image_tower: ImageTower, text_folder: Path, **options: Any) -> LiT:
    torch.manual_seed(0)
    text_tower = open_text_tower(f"hf:{text_folder}", width=image_tower.width)
    return LiT(text_tower, image_tower.identity(), image_tower, **options).eval()


@pytest.fixture
def model(image_tower: ImageTower, text_folder: Path) -> LiT:
    return make_model(image_tower, text_folder)


@pytest.fixture(scope="module")
def saved(image_tower: ImageTower, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, to be read only."""
    folder = tmp_path_factory.mktemp("model")
    make_model(image_tower, text_folder, logit_multiplier=7.0).save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def image_file(image_folder: Path) -> Path:
    return image_folder / "large_red_cross.png"


# encoding


def test_unit_vectors(model: LiT, image_folder: Path) -> None:
    zimg = model.encode_images(sorted(image_folder.glob("*.png"))[:5], batch_size=2)
    ztxt = model.encode_texts(TEXTS, batch_size=2)
    assert zimg.shape == (5, 64)
    assert ztxt.shape == (4, 64)
    for vectors in (zimg, ztxt):
        assert (vectors.norm(dim=-1) - 1).abs().max() < 1e-6
        assert vectors.dtype == torch.float32
        assert not vectors.requires_grad


def test_images_by_hand(model: LiT, image_tower: ImageTower, image_file: Path) -> None:
    pixels = image_tower.preprocessing.resize(decode_image(image_file.read_bytes()))
    with torch.no_grad():
        expected = F.normalize(image_tower(pixels[None]), dim=-1)
    assert torch.equal(model.encode_images([image_file]), expected)


def test_images_in_every_form(model: LiT, image_file: Path) -> None:
    with Image.open(image_file) as opened:
        pixels = np.array(opened.convert("RGB"))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        given = [image_file, str(image_file), image_file.read_bytes(), opened, pixels, tensor]
        vectors = model.encode_images(given)
    assert (vectors - vectors[0]).abs().max() < 1e-6
    for image in given:
        assert torch.equal(model.encode_images(image), model.encode_images([image])[0])
    batches = (
        np.stack([pixels, pixels]),
        torch.stack([tensor, tensor]),
        np.array([str(image_file)] * 2),
        iter(given[:2]),
    )
    for batch in batches:
        assert (model.encode_images(batch) - vectors[:2]).abs().max() < 1e-6


def test_alpha_is_composited_on_white(model: LiT) -> None:
    drawn = draw("circle", "red", 20).convert("RGBA")
    pixels = np.array(drawn)
    pixels[(pixels[..., :3] == 255).all(-1)] = 0
    clear = Image.fromarray(pixels)
    encoded = io.BytesIO()
    clear.save(encoded, "PNG")
    vectors = model.encode_images([drawn, clear, encoded.getvalue()])
    assert (vectors - vectors[0]).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16", "YCbCr", "HSV", "F", "I", "PA", "RGBX", "RGBa"])
def test_pil_images_of_every_mode(model: LiT, mode: str) -> None:
    drawn = draw("circle", "black", 20)
    if mode == "I;16":
        image = Image.fromarray(np.array(drawn.convert("L")).astype(np.uint16) * 257)
    else:
        steps = {"PA": "P", "F": "L", "I": "L", "LA": "L", "RGBa": "RGBA"}
        image = drawn.convert(steps.get(mode, "RGB")).convert(mode)
    assert image.mode == mode
    expected = model.encode_images([drawn])
    assert (model.encode_images([image]) - expected).abs().max() < 0.02


def test_pil_image_that_cannot_be_used(model: LiT, image_file: Path) -> None:
    with (
        Image.open(io.BytesIO(image_file.read_bytes()[:150])) as truncated,
        pytest.raises(ImageError, match="truncated"),
    ):
        model.encode_images([truncated])


def test_pil_image_is_turned_upright(model: LiT) -> None:
    drawn = draw("triangle", "red", 20)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    encoded = io.BytesIO()
    drawn.rotate(180).save(encoded, "PNG", exif=exif)
    with Image.open(encoded) as opened:
        turned = model.encode_images([opened, encoded.getvalue(), drawn, drawn.rotate(180)])
    assert (turned[:3] - turned[0]).abs().max() < 1e-6
    assert (turned[3] - turned[0]).abs().max() > 1e-3


def test_nothing_to_encode(model: LiT) -> None:
    assert model.encode_images([]).shape == (0, 64)
    assert model.encode_texts([]).shape == (0, 64)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "images are an int; expected a path, encoded bytes, a PIL image, a uint8 array"),
        (None, "images are None; expected"),
        ({"a.png": 1}, "images are a dict"),
        ([3], "image 0 is an int; expected a path"),
        (["a.png", None], "image 1 is None; expected a path"),
        (np.zeros((4, 4, 3)), "an image is an array of float64; expected uint8"),
        (torch.zeros(3, 4, 4), "an image is a tensor of float32; expected uint8"),
        (np.zeros((4, 4), np.uint8), r"an image is an array of shape \(4, 4\); expected \(H, W, 3\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"an image is a tensor of shape \(4, 4, 3\); expected \(3, H, W\)"),
        ([np.zeros((2, 4, 4, 3), np.uint8)], r"shape \(2, 4, 4, 3\)"),
    ],
)
def test_images_of_wrong_type(model: LiT, image: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.encode_images(image)


@pytest.mark.slow
def test_array_without_pixels_or_too_many(model: LiT) -> None:
    with pytest.raises(ImageError, match="no pixels"):
        model.encode_images(np.zeros((0, 4, 3), np.uint8))
    vast = np.broadcast_to(np.zeros(3, np.uint8), (20_000, 20_000, 3))
    with pytest.raises(ImageError, match=r"400\.0 megapixels"):
        model.encode_images(vast)


def test_one_text_is_not_a_list_of_letters(model: LiT) -> None:
    one = model.encode_texts("a red ring")
    assert one.shape == (64,)
    assert torch.equal(one, model.encode_texts(["a red ring"])[0])
    assert torch.equal(model.encode_texts(("a red ring",)), one[None])
    assert model.text_tower is not None
    with pytest.raises(UsageError, match="takes a list of texts"):
        model.text_tower.tokenize("a red ring")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (3, "texts are an int; expected a str, or a list of str"),
        (b"ring", "texts are a bytes"),
        ({"ring"}, "texts are a set"),
        (["ring", 3.5], "text 1 is 3.5, a float; expected a str"),
        (["ring", None], "text 1 is None; expected a str"),
        ([["ring"]], r"text 0 is \['ring'\], a list"),
    ],
)
def test_texts_of_wrong_type(model: LiT, texts: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.encode_texts(texts)


def test_as_numpy(model: LiT, image_file: Path) -> None:
    for vectors, expected in [
        (model.encode_images(image_file, as_numpy=True), model.encode_images(image_file)),
        (model.encode_texts(TEXTS, as_numpy=True), model.encode_texts(TEXTS)),
    ]:
        assert isinstance(vectors, np.ndarray)
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors, expected.numpy())


def test_progress_goes_to_stderr(
    model: LiT, image_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamplit.progress._MOMENT", 0)  # bars of short stages stay
    model.encode_images([image_file, image_file], progress=True)
    model.encode_texts(TEXTS, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "images" in captured.err
    assert "4/4" in captured.err


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(model: LiT, image_file: Path, batch_size: int) -> None:
    with pytest.raises(UsageError, match=f"batch_size is {batch_size}; expected at least 1"):
        model.encode_images([image_file], batch_size=batch_size)
    with pytest.raises(UsageError, match="batch_size"):
        model.encode_texts(TEXTS, batch_size=batch_size)


@pytest.mark.parametrize("parts", ["plain", "center and head"])
@pytest.mark.parametrize("precision", ["autocast", "bfloat16", "double"])
def test_encode_in_other_precision(
    image_tower: ImageTower, text_folder: Path, image_file: Path, precision: str, parts: str
) -> None:
    options: dict[str, Any] = {}
    if parts != "plain":
        torch.manual_seed(1)
        options = {"center": torch.full((64,), 0.01), "image_head": nn.Linear(64, 64)}
    model = make_model(deepcopy(image_tower), text_folder, **options)
    expected = model.encode_images(image_file), model.encode_texts(TEXTS)
    if precision == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = model.encode_images(image_file), model.encode_texts(TEXTS)
    else:
        model.to(getattr(torch, precision))
        found = model.encode_images(image_file), model.encode_texts(TEXTS)
    for vectors, exact in zip(found, expected, strict=True):
        assert vectors.dtype == torch.float32
        assert (vectors.norm(dim=-1) - 1).abs().max() < 1e-6
        assert (vectors * exact).sum(-1).min() > (1 - 1e-6 if precision == "double" else 0.999)


def test_forward_has_gradients(image_tower: ImageTower, text_folder: Path, image_folder: Path) -> None:
    files = sorted(image_folder.glob("*.png"))[:4]
    model = make_model(image_tower, text_folder, image_head=nn.Linear(64, 64))
    zimg, ztxt, logit_multiplier = model(files, TEXTS)
    assert torch.allclose(zimg, model.encode_images(files), atol=1e-6)
    assert torch.allclose(ztxt, model.encode_texts(TEXTS), atol=1e-6)
    loss = F.cross_entropy(logit_multiplier * zimg @ ztxt.T, torch.arange(4))
    loss.backward()
    assert model.text_tower is not None
    assert model.image_head is not None
    for parameter in (model.log_scale, model.text_tower.head.weight, model.image_head.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in image_tower.parameters())
    output = model(files[0], "red")
    assert (output.zimg.shape, output.ztxt.shape, output.logit_multiplier.shape) == ((64,), (64,), ())
    with pytest.raises(UsageError, match="at least one image and one text"):
        model([], TEXTS)


def test_preprocess(model: LiT, image_tower: ImageTower, image_file: Path) -> None:
    pixels = model.preprocess(image_file)
    assert pixels.shape == (3, 160, 160)
    assert pixels.dtype == torch.float32
    zimg = F.normalize(image_tower.backbone(pixels[None]), dim=-1)
    assert torch.allclose(zimg[0], model.encode_images(image_file), atol=1e-6)
    with pytest.raises(UsageError, match="an image is an int"):
        model.preprocess(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image_file", "reason"), [(b"", "empty file"), (b"no image", "not an image"), ("/no/such.png", "file not found")]
)
def test_image_that_cannot_be_used(model: LiT, image_file: Any, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        model.encode_images([image_file])


def test_batches_do_not_matter(model: LiT, image_folder: Path) -> None:
    files = sorted(image_folder.glob("*.jpg"))[:5]
    expected = model.encode_images(files)
    assert (model.encode_images(files, batch_size=2) - expected).abs().max() < 1e-6
    expected = model.encode_texts(TEXTS)
    assert (model.encode_texts(TEXTS, batch_size=1) - expected).abs().max() < 1e-6
    assert (model.encode_texts(TEXTS[::-1]).flip(0) - expected).abs().max() < 1e-6


def test_encode_in_eval_mode_and_train_mode_comes_back(model: LiT, image_file: Path) -> None:
    expected = model.encode_texts(TEXTS)
    model.train()
    assert model.text_tower is not None
    model.text_tower.head.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.encode_texts(TEXTS), expected)
    model.encode_images(image_file)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(UsageError, match="batch_size"):
        model.encode_texts(TEXTS, batch_size=0)
    assert [module.training for module in model.modules()] == modes


def test_truncated_texts_are_logged(model: LiT, caplog: pytest.LogCaptureFixture) -> None:
    model.encode_texts(TEXTS)
    assert caplog.messages == []
    model.encode_texts(["red " * 40, "red"])
    assert caplog.messages == ["texts of more than 32 tokens lose their end: 1 of 2"]


def test_image_tower_is_locked(model: LiT, image_file: Path) -> None:
    assert isinstance(model.image_tower, Locked)
    before = weights_digest(model.image_tower)
    model.train()
    model.encode_images([image_file])
    assert not model.image_tower.tower.training
    assert weights_digest(model.image_tower) == before
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(name.startswith(("text_tower.", "log_scale")) for name in trainable)


def test_any_module_is_locked(image_tower: ImageTower) -> None:
    tower = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 64)).train()
    model = LiT(None, image_tower.identity(), tower).train()
    assert isinstance(model.image_tower, Locked)
    assert model.unlocked_image_tower is tower
    assert not any(module.training for module in tower.modules())
    assert LiT(None, image_tower.identity(), Locked(tower)).unlocked_image_tower is tower


def test_trainable_image_tower(image_tower: ImageTower) -> None:
    for model in (
        LiT(None, image_tower.identity(), deepcopy(image_tower), trainable_image_tower=True),
        LiT(None, image_tower.identity()),
    ):
        model.attach_trainable_image_tower(deepcopy(image_tower))
        assert isinstance(model.image_tower, ImageTower)
        assert all(parameter.requires_grad for parameter in model.image_tower.parameters())
        model.train()
        assert model.image_tower.training


def test_repr(model: LiT, saved: Path) -> None:
    assert re.fullmatch(r"<LiT unnamed: hf:\S+ reads timm:test_vit, 64 wide, on cpu>", repr(model))
    image = load(saved, towers="image", device="cpu")
    assert repr(image) == f"<LiT {saved.name}: no text tower reads timm:test_vit, 64 wide, on cpu>"
    assert repr(LiT(None, image.identity)).endswith("reads timm:test_vit (not opened), 64 wide, on cpu>")


def test_center_is_subtracted_from_images_only(image_tower: ImageTower, text_folder: Path, image_file: Path) -> None:
    plain = make_model(image_tower, text_folder)
    center = torch.linspace(-0.1, 0.1, 64)
    centered = make_model(image_tower, text_folder, center=center)
    expected = F.normalize(plain.encode_images([image_file]) - center, dim=-1)
    assert torch.allclose(centered.encode_images([image_file]), expected, atol=1e-6)
    assert torch.equal(centered.encode_texts(TEXTS), plain.encode_texts(TEXTS))


def test_scale_and_bias(image_tower: ImageTower, text_folder: Path) -> None:
    assert make_model(image_tower, text_folder).logit_multiplier.item() == pytest.approx(10)
    assert make_model(image_tower, text_folder).logit_bias is None
    sigmoid = make_model(image_tower, text_folder, logit_multiplier=12.0, logit_bias=-9.5)
    assert sigmoid.logit_multiplier.item() == pytest.approx(12)
    assert sigmoid.logit_bias is not None
    assert sigmoid.logit_bias.item() == -9.5


# on disk


def test_round_trip_is_exact(model: LiT, image_file: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "deep" / "model")
    again = load(str(tmp_path / "deep" / "model"))
    assert torch.equal(again.encode_images([image_file]), model.encode_images([image_file]))
    assert torch.equal(again.encode_texts(TEXTS), model.encode_texts(TEXTS))
    assert again.identity == model.identity
    assert not again.training
    again.save(tmp_path / "again")
    for name in ("config.json", "text_tower.safetensors", "image_tower.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "model" / name).read_bytes()


def test_scalars_and_center_are_kept(
    image_tower: ImageTower, text_folder: Path, image_file: Path, tmp_path: Path
) -> None:
    center = torch.randn(64, generator=torch.Generator().manual_seed(0)) / 30
    model = make_model(image_tower, text_folder, center=center, logit_multiplier=13.7, logit_bias=-8.25)
    model.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.log_scale, model.log_scale)
    assert again.logit_bias is not None
    assert again.logit_bias.item() == -8.25
    assert again.center is not None
    assert torch.equal(again.center, center)
    assert torch.equal(again.encode_images([image_file]), model.encode_images([image_file]))


def test_loaded_model_has_no_gradients(saved: Path) -> None:
    model = load(saved)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.logit_multiplier * model.encode_texts(TEXTS)).numpy().shape == (4, 64)
    assert LiT.load(saved, towers="text").image_tower is None


def test_run_folder(copy: Path) -> None:
    assert load(copy).run_folder is None
    (copy / "settings.json").write_text("{}")
    assert load(copy).run_folder == copy


def test_load_refuses(saved: Path) -> None:
    with pytest.raises(UsageError, match="towers is 'txt'; expected one of both, text, image"):
        load(saved, towers="txt")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="device 'gpu' cannot be used here"):
        load(saved, device="gpu")
    with pytest.raises(UsageError, match="the model is an int; expected a folder"):
        as_model(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="brings its own image tower"):
        load("lit:B16B", image_tower=nn.Identity())


def test_save_keeps_model(image_tower: ImageTower, text_folder: Path, tmp_path: Path) -> None:
    model = make_model(image_tower, text_folder)
    tuned = deepcopy(image_tower)
    model.attach_trainable_image_tower(tuned)
    with torch.no_grad():
        next(tuned.parameters()).add_(1)
    before = model.identity
    model.save(tmp_path / "model")
    assert model.identity is before
    again = load(tmp_path / "model")
    assert again.identity.spec == f"model:{tmp_path / 'model'}"
    assert again.identity.fingerprint == tuned.identity().fingerprint != before.fingerprint


def test_save_whole_or_not_at_all(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(copy)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}

    def fail(weights: nn.Module, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("lamplit.model.save_weights", fail)
    with pytest.raises(OSError, match="no space"):
        model.save(copy)
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("renames", range(5))
def test_a_model_that_is_saved_over_another_is_never_a_mixture(
    renames: int, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(copy, towers="text")
    assert model.text_tower is not None
    with torch.no_grad():
        for parameter in model.text_tower.parameters():
            parameter += 1
    left, rename = renames, Path.replace

    def until_killed(self: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise OSError("killed")
        left -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", until_killed)
    try:
        model.save(copy)
    except OSError:
        with pytest.raises(UsageError, match=r"no config\.json"):
            load(copy)
    else:
        assert torch.equal(load(copy, towers="text").encode_texts("a ring"), model.encode_texts("a ring"))


@pytest.mark.parametrize("has_text", [True, False])
def test_a_model_over_one_of_another_tower_leaves_nothing_of_it(
    has_text: bool, image_tower: ImageTower, text_folder: Path, tmp_path: Path
) -> None:
    whole = make_model(image_tower, text_folder, image_head=nn.Linear(64, 64))
    whole.tuned_on = SplitRecord.make("texts", {}, {})
    whole.save(tmp_path / "over")
    other = replace(image_tower.identity(), fingerprint="f" * 32)
    model = LiT(make_model(image_tower, text_folder).text_tower if has_text else None, other)
    for folder in ("over", "new"):
        model.save(tmp_path / folder)
    over, new = ({file.name for file in (tmp_path / folder).iterdir()} for folder in ("over", "new"))
    assert over == new
    assert load(tmp_path / "over", towers="text").tuned_on is None
    if has_text:
        assert load(tmp_path / "over").image_tower is None


def test_a_text_tower_over_a_whole_model_of_its_image_tower_leaves_that(copy: Path, image_file: Path) -> None:
    load(copy, towers="text").save(copy)
    assert load(copy).encode_images([image_file]).shape == (1, 64)


@pytest.mark.parametrize("renames", range(3))
def test_a_model_over_one_of_another_tower_is_never_a_mixture(
    renames: int, copy: Path, image_tower: ImageTower, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(image_tower.identity(), fingerprint="f" * 32)
    left, rename = renames, Path.replace

    def until_killed(self: Path, target: Path) -> Path:
        nonlocal left
        assert not (copy / "config.json").exists()
        assert not (copy / "image_tower.safetensors").exists()
        if left == 0:
            raise OSError("killed")
        left -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", until_killed)
    with pytest.raises(OSError, match="killed"):
        LiT(make_model(image_tower, text_folder).text_tower, other).save(copy)
    with pytest.raises(UsageError, match=r"no config\.json"):
        load(copy)


def test_save_refuses_what_could_not_be_loaded(image_tower: ImageTower, text_folder: Path, tmp_path: Path) -> None:
    model = make_model(deepcopy(image_tower), text_folder).bfloat16()
    with pytest.raises(TowerError, match="its weights or their precision were changed"):
        model.save(tmp_path / "model")
    plain = LiT(None, image_tower.identity(), nn.Flatten())
    with pytest.raises(TowerError, match=r"a Flatten says nothing .* lamplit\.open_image_tower"):
        plain.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_merge_lora_needs_lora(model: LiT, saved: Path, tmp_path: Path) -> None:
    for given in (saved, model):
        with pytest.raises(UsageError, match="has no LoRA to merge"):
            merge_lora(given, tmp_path / "merged")
    with pytest.raises(UsageError, match="holds a model"):
        merge_lora(model, saved)


# devices


class Recorder(nn.Module):
    """An image tower that knows where its images were."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.devices: list[torch.device] = []

    def forward(self, images: Tensor) -> Tensor:
        self.devices.append(images.device)
        output: Tensor = self.linear(images.mean((2, 3)))
        return output


def test_second_device(text_folder: Path, image_file: Path, tmp_path: Path) -> None:
    """`meta` has no numbers, but tensors of another device cannot be mixed with its own."""
    half = (0.5, 0.5, 0.5)
    own = Recorder()
    tower = open_image_tower(own, preprocessing=Preprocessing((32, 32), half, half))
    make_model(tower, text_folder, center=torch.zeros(8), image_head=nn.Linear(8, 6), logit_bias=1.0).save(tmp_path)
    own.devices.clear()
    own.train().requires_grad_(True)
    weight = own.linear.weight

    model = load(tmp_path, device="meta", image_tower=own)

    assert model.device.type == "meta"
    assert {part.device.type for part in [*model.parameters(), *model.buffers()]} == {"meta"}
    tokens: list[torch.device] = []
    assert model.text_tower is not None
    model.text_tower.encoder.register_forward_pre_hook(
        lambda module, args, options: tokens.append(options["input_ids"].device), with_kwargs=True
    )
    assert model.encode_texts(["red", "ring"]).device.type == "meta"  # of one length: BERT looks into masks
    assert model.encode_images([image_file] * 2).device.type == "meta"
    zimg, _, logit_multiplier = model(image_file, "red")
    assert (zimg.device.type, logit_multiplier.device.type) == ("meta", "meta")
    assert {device.type for device in tokens} == {"meta"}
    tower = model.unlocked_image_tower
    assert isinstance(tower, ImageTower)
    assert isinstance(tower.backbone, Recorder)
    assert {device.type for device in tower.backbone.devices[-2:]} == {"meta"}
    # The caller's own tower is where and what it was.
    assert own.linear.weight is weight
    assert (weight.device.type, weight.requires_grad, own.training, own.devices) == ("cpu", True, True, [])


def test_open_model_stays_where_it_is(saved: Path) -> None:
    model = load(saved, device="cpu")
    assert as_model(model) is as_model(model, device="cpu") is model
    with pytest.raises(UsageError, match=r"the model is open on cpu; move it with model\.to\('meta'\)"):
        as_model(model, device="meta")
    assert as_model(saved, "cpu", "text").image_tower is None


def test_scratch_text_tower(image_tower: ImageTower, tmp_path: Path) -> None:
    text_tower = open_text_tower("scratch:tiny", width=64, texts=TEXTS)
    model = LiT(text_tower, image_tower.identity())
    model.save(tmp_path)
    assert torch.equal(load(tmp_path).encode_texts(TEXTS), model.encode_texts(TEXTS))
    assert not (tmp_path / "image_tower.safetensors").exists()


def test_no_pickle_is_written(saved: Path) -> None:
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".txt", ".jinja"}


def test_one_tower_alone(saved: Path, image_file: Path) -> None:
    both = load(saved)
    text, image = load(saved, towers="text"), load(saved, towers="image")
    assert text.image_tower is None
    assert image.text_tower is None
    assert torch.equal(text.encode_texts(TEXTS), both.encode_texts(TEXTS))
    assert torch.equal(image.encode_images([image_file]), both.encode_images([image_file]))
    with pytest.raises(TowerError, match="without its image tower"):
        text.encode_images([image_file])
    with pytest.raises(TowerError, match="without its text tower"):
        image.encode_texts(TEXTS)
    assert text.logit_multiplier.item() == both.logit_multiplier.item() == pytest.approx(7)


def test_one_tower_alone_needs_no_other_file(copy: Path, image_file: Path) -> None:
    (copy / "image_tower.safetensors").unlink()
    assert load(copy, towers="text").encode_texts(TEXTS).shape == (4, 64)
    assert load(copy).image_tower is None  # tuned from a store, without the tower beside it
    with pytest.raises(TowerError, match=r"image_tower\.safetensors is missing"):
        load(copy, towers="image")


def test_image_tower_alone_needs_no_text(copy: Path, image_file: Path) -> None:
    (copy / "text_tower.safetensors").unlink()
    shutil.rmtree(copy / "tokenizer")
    assert load(copy, towers="image").encode_images([image_file]).shape == (1, 64)
    with pytest.raises(TowerError, match="tokenizer is missing or damaged: the model is not whole"):
        load(copy)


def test_text_tower_file_missing(copy: Path) -> None:
    (copy / "text_tower.safetensors").unlink()
    with pytest.raises(TowerError, match=r"text_tower\.safetensors is missing: the model is not whole"):
        load(copy, towers="text")


def test_model_saved_without_its_text_tower(image_tower: ImageTower, image_file: Path, tmp_path: Path) -> None:
    LiT(None, image_tower.identity(), image_tower).save(tmp_path)
    assert load(tmp_path, towers="image").encode_images([image_file]).shape == (1, 64)
    with pytest.raises(TowerError, match="without its text tower"):
        load(tmp_path).encode_texts(TEXTS)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model at .*config.json"):  # noqa: RUF043
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "^load takes a folder, or a name such as hf:NAME_OR_FOLDER; this is None$"),
        (
            "runs/y",
            "^there is no folder runs/y; expected a folder that lamplit tune wrote, or a name: hf:",
        ),
        (
            "scratch:tiny",
            "^scratch:tiny is a tower, not a model; tune it first: .* --text-tower scratch:tiny --out",
        ),
        ("demo:minilm", "^demo:minilm is a tower, not a model; tune it first: .* --text-tower demo:minilm"),
        ("timm:x", "^timm:x is a tower, not a model; embed with it, then tune: .* --image-tower timm:x --out STORE"),
        ("demo:efficientnet-lite0", "^demo:efficientnet-lite0 is a tower, .* --image-tower demo:efficientnet-lite0"),
        ("model:runs/y", "^model:runs/y names the image tower of a model; .* type runs/y$"),
    ],
)
def test_what_is_no_model(name: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        load(name)


def test_open_model_and_store_are_not_loaded(model: LiT, store_path: Path) -> None:
    with pytest.raises(UsageError, match=r"load takes a folder, .*; this is an open model: use it as it is"):
        load(model)  # type: ignore[arg-type]
    for opens in (load, as_model):
        with pytest.raises(UsageError, match=r"drawings\.lance is a store, not a model; the model comes first"):
            opens(store_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("encode", 'type model.encode_texts("a dog") or model.encode_images("dog.png")'),
        ("encode_image", 'type model.encode_images("dog.png")'),
        ("encode_text", 'type model.encode_texts("a dog")'),
        ("logit_scale", "model.logit_multiplier is open_clip's logit_scale.exp()"),
        ("similarity", "encode_texts"),
        ("tokenize", "encode_texts"),
        ("from_pretrained", "lamplit.load"),
    ],
)
def test_names_of_other_libraries_get_a_hint(model: LiT, name: str, hint: str) -> None:
    for owner in (model, LiT):
        with pytest.raises(AttributeError, match=re.escape(f"LiT has no {name}; ") + ".*" + re.escape(hint)):
            getattr(owner, name)
        assert not hasattr(owner, "nonsense")
        assert not hasattr(owner, name)


def test_format_of_the_future(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["format"] = FORMAT + 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"up to {FORMAT}"):
        load(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}'])
def test_damaged_config(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        load(copy)


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, True, 10**30])
@pytest.mark.parametrize("key", ["context_length", "width", "feature_width", "anchors", "lora", "config"])
def test_damaged_description_of_the_text_tower(copy: Path, key: str, value: Any) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_tower"][key] = value
    (copy / "config.json").write_text(json.dumps(config))
    if value is None and key in ("anchors", "lora"):
        load(copy, towers="text")
        return
    with pytest.raises((UsageError, TowerError), match=r"config\.json"):
        load(copy, towers="text")


@pytest.mark.parametrize(
    "damage", [{"num_hidden_layers": 10**30}, {"hidden_size": 10**30}, {"use_cache": []}, {"vocab_size": "x"}]
)
def test_damaged_settings_of_an_encoder_of_transformers(text_folder: Path, copy: Path, damage: dict[str, Any]) -> None:
    config = json.loads((copy / "config.json").read_text())
    settings = json.loads((text_folder / "config.json").read_text()) | damage
    config["text_tower"]["config"] = {"library": "transformers", "config": settings}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises((UsageError, TowerError), match=r"config\.json"):
        load(copy, towers="text")


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 10**30])
def test_damaged_settings_of_the_encoder(copy: Path, value: Any) -> None:
    whole = json.loads((copy / "config.json").read_text())
    encoder = whole["text_tower"]["config"]
    for key in encoder:
        if key == "mlp_width" and value is None:
            continue
        config = {**whole, "text_tower": {**whole["text_tower"], "config": {**encoder, key: value}}}
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises((UsageError, TowerError), match=r"config\.json"):
            load(copy, towers="text")


def test_tampered_image_tower_is_refused(copy: Path) -> None:
    file = copy / "image_tower.safetensors"
    state = load_file(file)
    name = next(key for key in state if key.endswith("weight"))
    state[name].view(-1)[0] += 1e-3
    save_file(state, file)
    with pytest.raises(TowerError, match="fingerprint"):
        load(copy)
    assert load(copy, towers="text").encode_texts(TEXTS).shape == (4, 64)


def test_config_tampered_with_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["image_tower"]["preprocessing"]["crop_fraction"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(TowerError, match="fingerprint"):
        load(copy)


@pytest.mark.parametrize("file", ["image_tower.safetensors", "text_tower.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "lacking", "shape"])
def test_weights_that_do_not_fit(copy: Path, file: str, damage: str) -> None:
    path = copy / file
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        state = load_file(path)
        name = max(state, key=lambda key: state[key].numel())
        state[name] = torch.zeros(3)
        if damage == "lacking":
            del state[name]
        save_file(state, path)
    with pytest.raises(TowerError, match=f"{file} does not fit"):
        load(copy)


# towers of one's own


class Mean(nn.Module):
    """A tower that no library knows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 8)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.linear(images.mean((2, 3)))
        return output


def test_module_of_ones_own(text_folder: Path, image_file: Path, tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    tower = open_image_tower(Mean(), preprocessing=Preprocessing((32, 32), half, half))
    model = make_model(tower, text_folder)
    model.save(tmp_path)

    again = load(tmp_path, image_tower=Mean(seed=1))  # its weights are read from the folder

    assert torch.equal(again.encode_images([image_file]), model.encode_images([image_file]))
    with pytest.raises(TowerError, match="image_tower="):
        load(tmp_path)
    assert load(tmp_path, towers="text").encode_texts(TEXTS).shape == (4, 8)
    with pytest.raises(TowerError, match="does not fit"):
        load(tmp_path, image_tower=nn.Sequential(Mean()))
    # A run that was given a store alone saves the model without the module, which then brings its own weights.
    (tmp_path / "image_tower.safetensors").unlink()
    alone = load(tmp_path, image_tower=Mean())
    assert torch.equal(alone.encode_images([image_file]), again.encode_images([image_file]))
    with pytest.raises(TowerError, match="the module has fingerprint"):
        load(tmp_path, image_tower=Mean(seed=1))


def test_hf_classifier_with_many_classes(text_folder: Path, image_file: Path, tmp_path: Path) -> None:
    """Its configuration has numbers as keys, which JSON writes as text, in another order."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    names = {c: f"class {c}" for c in range(12)}
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label=names, label2id={name: c for c, name in names.items()},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    model = make_model(open_image_tower(f"hf:{tmp_path / 'vit'}"), text_folder)
    model.save(tmp_path / "model")
    shutil.rmtree(tmp_path / "vit")
    assert torch.equal(load(tmp_path / "model").encode_images([image_file]), model.encode_images([image_file]))


def test_error_names_the_image(model: LiT, image_file: Path) -> None:
    with pytest.raises(ImageError, match=r"^image 1 \(/no/such\.png\): file not found$"):
        model.encode_images([image_file, "/no/such.png"])
    with pytest.raises(ImageError, match=r"^the image \(/no/such\.png\): file not found$"):
        model.encode_images("/no/such.png")


def test_pixels_that_are_normalised_are_refused(model: LiT, image_file: Path) -> None:
    with pytest.raises(UsageError, match=r"pixels are a float32 tensor of shape \(1, 3, 160, 160\); expected uint8"):
        model.encode_pixels(model.preprocess(image_file)[None])
    with pytest.raises(UsageError, match=r"expected uint8, \(B, 3, 160, 160\)"):
        model.encode_pixels(torch.zeros(3, 160, 160, dtype=torch.uint8))


def test_text_tower_of_a_saved_model_is_opened_with_a_new_head(tmp_path: Path) -> None:
    identity = TowerIdentity(
        "made:up", "f" * 32, 8, Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3), {"library": "timm"}
    )
    tower = open_text_tower("scratch:tiny", width=8, texts=["an owl", "a hat"])
    for name, options in (("softmax", {}), ("sigmoid", {"logit_bias": -3.0})):
        LiT(tower, identity, **options).save(tmp_path / name)  # type: ignore[arg-type]
        again = open_text_tower(f"model:{tmp_path / name}", width=5, context_length=9)
        assert again(again.tokenize(["an owl"])).shape == (1, 5)
        assert again.spec == f"model:{tmp_path / name}"
        assert (again.context_length, tower.context_length) == (9, 16)
        for key, tensor in tower.encoder.state_dict().items():
            assert torch.equal(tensor, again.encoder.state_dict()[key])
    tower.head = KernelHead(tower.head.in_features, 8, 7)
    for name, center in (("kernel", None), ("centred", torch.ones(8))):
        LiT(tower, identity, center=center).save(tmp_path / name)
    carried = [
        open_text_tower(f"model:{tmp_path / name}", width=8, reads=reads).carried
        for name, reads in (("kernel", "f" * 32), ("kernel", "e" * 32), ("centred", "f" * 32), ("softmax", "f" * 32))
    ]
    assert [known is None for known in carried] == [False, True, True, True], "only of the same image vectors"
    assert carried[0] is not None
    assert carried[0].vectors.shape == (7, 8)
    bare = open_text_tower(f"model:{tmp_path / 'softmax'}", width=5, pretrained=False)
    assert not torch.equal(next(bare.encoder.parameters()), next(tower.encoder.parameters()))
    LiT(None, identity).save(tmp_path / "none")
    with pytest.raises(TowerError, match="none was saved without a text tower; give one that lamplit tune wrote"):
        open_text_tower(f"model:{tmp_path / 'none'}", width=5)
    with pytest.raises(TowerError, match=r"there is no folder .*nowhere; expected a folder that lamplit tune wrote"):
        open_text_tower(f"model:{tmp_path / 'nowhere'}", width=5)
    (tmp_path / "softmax" / "text_tower.safetensors").unlink()
    with pytest.raises(TowerError, match="is missing: the model is not whole"):
        open_text_tower(f"model:{tmp_path / 'softmax'}", width=5)
