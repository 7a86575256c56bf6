"""Tiny files of dino.txt as Meta publishes them, and what Meta's own code gives for them.

`fixtures/dinotxt/NAME.json` lists the names and shapes of that code's tensors, `NAME.npz` what it gave, once. The
weights are made anew from the bit generator of numpy, which never changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from lamplit.exports.sample import _pattern

FIXTURES = Path(__file__).parent / "fixtures" / "dinotxt"
NAMES = ("dinov2", "dinov3")
FILES = {  # of each, by the part of its tensors' names that the file leaves out
    "dinov2": {
        "visual_model.backbone.model.": "dinov2_vitl14_reg4_pretrain.pth",
        "visual_model.head.": "dinov2_vitl14_reg4_dinotxt_tet1280d20h24l_vision_head.pth",
        "text_model.": "dinov2_vitl14_reg4_dinotxt_tet1280d20h24l_text_encoder.pth",
    },
    "dinov3": {
        "visual_model.backbone.": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
        "": "dinov3_vitl16_dinotxt_vision_head_and_text_encoder-a442d8f5.pth",
    },
}
IMAGES = [_pattern(number) for number in range(6)]


def weight(number: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Make the tensor of a name, the `number`th; no two are alike, and none is zero or one."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(number).random_raw(count)
    values = torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53 * 2 - 1).float().reshape(shape)
    if name.endswith("logit_scale"):
        return values * 0 + 3.0
    if name.endswith(".bias_mask"):  # the bias of the keys is left out
        return torch.cat([torch.ones(count // 3), torch.zeros(count // 3), torch.ones(count // 3)])
    if name.endswith("periods"):  # as their files hold them
        return (100.0 ** (torch.arange(count) / count)).bfloat16()
    if len(shape) == 1 and not name.endswith("bias"):
        return 1 + 0.3 * values  # of norms and scales
    return values * (0.3 if len(shape) == 1 else 1.7 * float(np.prod(shape[1:])) ** -0.5)


def states(name: str) -> dict[str, Tensor]:
    """Make all tensors of a model, under the names that they have in Meta's code."""
    shapes = json.loads((FIXTURES / f"{name}.json").read_text())
    return {key: weight(number, key, tuple(shape)) for number, (key, shape) in enumerate(shapes.items())}


def write_files(name: str, folder: Path) -> None:
    """Write the published files of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    left = states(name)
    for prefix, file in FILES[name].items():
        taken = {key: left.pop(key) for key in list(left) if key.startswith(prefix)}
        torch.save({key.removeprefix(prefix): tensor for key, tensor in taken.items()}, folder / file)


def expected(name: str) -> dict[str, Any]:
    """What Meta's code gave: `texts`, `zimg` and `ztxt` (unit vectors), `pixels` (every 16th), `multiplier`."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def prepare(name: str, image: Image.Image) -> Tensor:
    """Prepare an image as Meta's code does, by the same transforms of torchvision: (3, 224, 224)."""
    norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if name == "dinov3":  # it resizes the tensor
        size = v2.Resize(256, v2.InterpolationMode.BICUBIC)
        steps = [v2.ToImage(), size, v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*norm)]
        return torch.as_tensor(v2.Compose(steps)(image))
    size = transforms.Resize(256, transforms.InterpolationMode.BICUBIC)
    steps = [size, transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(*norm)]
    return torch.as_tensor(transforms.Compose(steps)(image))
