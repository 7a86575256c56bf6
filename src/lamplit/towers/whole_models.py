"""Two-tower models of transformers as a whole: one side is taken out of them, and compared with what they give.

Every family that has `get_image_features` and `get_text_features` is read by the same few names: `vision_model`,
`visual_projection`, `text_model`, `text_projection`, `logit_scale`. Nothing is taken on trust: a side whose features
are not those of the whole model is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel

from lamplit.errors import TowerError
from lamplit.towers.loading import opening, quiet_transformers, read_model_json, require_whole

_OTHER_TASKS = ("clipseg", "groupvit", "owlvit", "owlv2")  # two towers of transformers, for segmentation or detection
MAX_DIFFERENCE = 1e-5  # of a side's features from the whole model's, relative to the largest of them


def read_whole_config(spec: str, name: str) -> Any:
    """Read the configuration of a folder or hub id.

    Raises:
        TowerError: it is not there, or is no two-tower model.
    """
    with opening(spec):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if not hasattr(config, "vision_config"):
        raise TowerError(
            f"{spec} ({config.model_type}) is a tower, not a model of two. Embed with an image tower: lamplit embed "
            f"SOURCE --image-tower {spec} --out STORE; tune a text tower: lamplit tune STORE --text-tower {spec} "
            "--out FOLDER"
        )
    return config


def open_whole(spec: str, name: str) -> Any:
    """Open a two-tower model of transformers, in eval mode, with every weight read.

    Raises:
        TowerError: it cannot be opened, lacks weights, or is no two-tower model.
    """
    config = read_whole_config(spec, name)
    if config.model_type in _OTHER_TASKS:
        raise TowerError(
            f"{spec} ({config.model_type}) finds things inside an image; lamplit opens models that compare whole "
            "images with texts, such as clip and siglip"
        )
    kind = MODEL_MAPPING.get(type(config), None)
    if not (hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")):
        raise TowerError(
            f"{spec} is a whole {config.model_type} model; of those lamplit opens the ones whose two towers can be run "
            "one at a time, such as clip and siglip"
        )
    with quiet_transformers(), opening(spec):
        model, report = AutoModel.from_pretrained(
            name, config=config, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )  # fmt: skip
    require_whole(spec, report["missing_keys"], report["mismatched_keys"])
    if missing := [part for part in ("vision_model", "text_model") if not hasattr(model, part)]:
        raise TowerError(f"{spec} ({config.model_type}) has no {' and no '.join(missing)}, as clip and siglip have")
    return model.eval()


def name_in_sentence_transformers(spec: str) -> str:
    """Return the name by which transformers opens the CLIP in a folder or hub id of sentence-transformers.

    Args:
        spec: `st:NAME_OR_FOLDER`.

    Raises:
        TowerError: it is no such folder, or layers follow the model.
    """
    name = spec.removeprefix("st:")
    with opening(spec):
        modules = read_model_json(name, "modules.json")
        if not modules:
            raise TowerError(f"{spec} is no model of sentence-transformers: it has no modules.json; try hf:{name}")
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        path = modules[0]["path"]
        if any(kind != "Normalize" for kind in kinds[1:]):
            raise TowerError(f"{spec} has {', '.join(kinds[1:])} behind its model; lamplit opens a CLIP alone")
        if kinds[0] not in ("Transformer", "CLIPModel"):
            raise TowerError(
                f"{spec} begins with {kinds[0]}; lamplit opens folders that begin with one model for texts and images, "
                "as sentence-transformers saves a CLIP (Transformer or CLIPModel)"
            )
        if not path:
            return name
        return str(Path(name if Path(name).is_dir() else snapshot_download(name)) / path)


def build_part(config: Any) -> Any:
    """Build the model of a transformers configuration, with random weights; a side of a two-tower model as well."""
    if type(config) in MODEL_MAPPING:
        return AutoModel.from_config(config, dtype=torch.float32)
    name = type(config).__name__.removesuffix("Config") + "Model"  # most sides have no entry of their own there
    return getattr(transformers, name)._from_config(config, dtype=torch.float32)


@torch.no_grad()
def features_of(output: Any) -> Tensor:
    """Return the features in what `get_image_features` or `get_text_features` gave: (B, D)."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.flatten(1)


def is_near(found: Tensor, expected: Tensor) -> bool:
    """Tell whether features are the same but for rounding."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= MAX_DIFFERENCE * expected.abs().max())


class ProjectedVision(nn.Module):
    """The image side of a two-tower model: what its vision model pools, through its projection.

    (B, 3, height, width) normalised images in, (B, D) out.
    """

    def __init__(self, vision: nn.Module, projection: nn.Linear) -> None:
        super().__init__()
        self.vision, self.projection = vision, projection

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of images."""
        features: Tensor = self.projection(self.vision(pixel_values=pixels).pooler_output)
        return features


def build_projected_vision(config: Any, projection: tuple[int, int]) -> ProjectedVision:
    """Build an image side from its vision model's configuration and its projection's widths, with random weights."""
    return ProjectedVision(build_part(config), nn.Linear(*projection, bias=False))
