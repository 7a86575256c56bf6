"""dino.txt of DINOv2 and DINOv3: what Meta's own code gives, from files in the layout that it publishes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dinotxt_files import FILES, IMAGES, NAMES, expected, prepare, states, write_files
from torch.nn import functional as F

from lamplit.errors import TowerError, UsageError
from lamplit.exports.text_graph import write_words
from lamplit.model import load
from lamplit.towers.dinotxt_models import open_dinotxt
from lamplit.towers.images.image_tower import open_image_tower
from lamplit.towers.images.pooling import pool_features
from lamplit.towers.texts.word_reader import WordReader

ALLOWED = 1e-5  # largest difference of any number of a unit vector from Meta's code


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the files of both models."""
    made = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in made.items():
        write_files(name, folder)
    return made


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copy the files of both models, to be damaged."""
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in folders.items()}


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into a file; None takes one out."""
    state = torch.load(file, weights_only=True)
    for key, tensor in tensors.items():
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    torch.save(state, file)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_and_multiplier_are_metas(name: str, folders: dict[str, Path]) -> None:
    model, seen = load(f"dinotxt:{folders[name]}", device="cpu"), expected(name)
    pixels = torch.stack([prepare(name, image) for image in IMAGES])
    assert (pixels[:, :, ::16, ::16] - torch.as_tensor(seen["pixels"])).abs().max() <= ALLOWED
    zimg = F.normalize(pool_features(model.unlocked_image_tower.backbone, pixels), dim=-1)
    assert (zimg - torch.as_tensor(seen["zimg"])).abs().max() <= ALLOWED
    ztxt = model.encode_texts([str(text) for text in seen["texts"]])
    assert (ztxt - torch.as_tensor(seen["ztxt"])).abs().max() <= ALLOWED
    assert float(model.logit_multiplier) == pytest.approx(float(seen["multiplier"]), rel=1e-6)
    assert model.logit_bias is None


@pytest.mark.parametrize("name", NAMES)
def test_images_are_prepared_as_meta_does(name: str, folders: dict[str, Path]) -> None:
    model = load(f"dinotxt:{folders[name]}", device="cpu", towers="image")
    ours: Any = model.preprocess if name == "dinov3" else model.image_preprocessing().reference  # PIL for DINOv2
    for image in IMAGES:
        assert (ours(image) - prepare(name, image)).abs().max() <= ALLOWED


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_is_the_same(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(f"dinotxt:{folders[name]}", device="cpu")
    model.save(tmp_path)
    again = load(tmp_path, device="cpu")
    texts = ["a dog", "red green " * 60, ""]
    assert torch.equal(again.encode_texts(texts), model.encode_texts(texts))
    assert torch.equal(again.encode_images(IMAGES), model.encode_images(IMAGES))
    assert again.space == open_image_tower(f"dinotxt:{folders[name]}").identity().fingerprint


def test_words_are_read_by_onnx_runtime(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(f"dinotxt:{folders['dinov2']}", device="cpu")
    model.save(tmp_path)
    assert write_words(tmp_path)
    texts = ["a dog", "red green " * 60, ""]
    found = torch.as_tensor(WordReader(tmp_path).encode_texts(texts))
    assert (found - model.encode_texts(texts)).abs().max() <= 1e-4


def test_positions_are_those_of_the_file(folders: dict[str, Path]) -> None:
    opened = open_dinotxt(f"dinotxt:{folders['dinov3']}")
    assert opened.vision.periods is not None
    assert torch.equal(opened.vision.periods, states("dinov3")["visual_model.backbone.rope_embed.periods"].float())
    finer = opened.vision.backbone.rope._compute_periods()
    assert (opened.vision.periods - finer).abs().max() > 1e-3, "else the test says nothing"


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_its_place(name: str, copied: dict[str, Path]) -> None:
    head = copied[name] / list(FILES[name].values())[1]
    prefix = {"dinov2": "block_list.", "dinov3": "visual_model.head.blocks."}[name]
    key = f"{prefix}1.mlp.w2.bias"
    whole = torch.load(head, weights_only=True)[key]
    change(head, **{key: None})
    with pytest.raises(TowerError, match=r"missing: block(s|_list)\.1\.mlp\.w2\.bias"):
        load(f"dinotxt:{copied[name]}", device="cpu")
    change(head, **{key: whole[:-1]})
    with pytest.raises(TowerError, match=r"of another shape: blocks\.1\.mlp\.fc1_x\.bias"):
        load(f"dinotxt:{copied[name]}", device="cpu")
    change(head, **{key: whole, f"{prefix}1.mlp.w4.bias": whole})
    with pytest.raises(TowerError, match=r"unexpected: block(s|_list)\.1\.mlp\.w4\.bias"):
        load(f"dinotxt:{copied[name]}", device="cpu")


def test_a_misnamed_part_is_refused(copied: dict[str, Path]) -> None:
    joint = copied["dinov3"] / FILES["dinov3"][""]
    change(joint, **{"model.text.weight": torch.zeros(2)})
    with pytest.raises(TowerError, match=r"has no place for: model\.text\.weight"):
        load(f"dinotxt:{copied['dinov3']}", device="cpu")


def test_a_backbone_without_registers_is_refused(copied: dict[str, Path]) -> None:
    change(copied["dinov2"] / "dinov2_vitl14_reg4_pretrain.pth", register_tokens=None)
    with pytest.raises(TowerError, match="backbones with registers"):
        load(f"dinotxt:{copied['dinov2']}", device="cpu")


def test_multiplier_is_the_first_one_if_the_file_has_none(copied: dict[str, Path]) -> None:
    change(copied["dinov3"] / FILES["dinov3"][""], logit_scale=None)
    model = load(f"dinotxt:{copied['dinov3']}", device="cpu")
    assert float(model.logit_multiplier) == pytest.approx(1 / 0.07, rel=1e-6)


def test_files_that_are_not_there(copied: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        load(f"dinotxt:{copied['dinov2']}/nowhere", device="cpu")
    head = next(copied["dinov2"].glob("*vision_head.pth"))
    shutil.copy(head, head.with_name("other_vision_head.pth"))
    with pytest.raises(TowerError, match="two files of its vision head"):
        load(f"dinotxt:{copied['dinov2']}", device="cpu")
    head.with_name("other_vision_head.pth").unlink()
    head.unlink()
    with pytest.raises(TowerError, match="no file of its vision head; expected the files as they were published"):
        load(f"dinotxt:{copied['dinov2']}", device="cpu")
