"""One tiny random member of each family of two-tower models, built and saved by its own library.

For `tests/towers/test_two_tower_models.py` and for the table of `docs/two_tower_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from sentence_transformers import SentenceTransformer
from text_families import clip_pairs, unigram, wordpiece, xlm_unigram
from torch import Tensor

VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 20,
}  # fmt: skip
WIDTH = 16
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
ALIGN_VISION = {
    "image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.2, "hidden_dim": 64,
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
}  # fmt: skip
ALIGN_IMAGES: dict[str, Any] = {
    "size": {"height": 38, "width": 38}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
    "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False, "do_normalize": False, "resample": 2,
}  # fmt: skip
SQUARE = {"size": {"height": 32, "width": 32}}


@dataclass(frozen=True)
class Family:
    """A family of two-tower models: how its library builds a model, its processor, and how it pads texts."""

    name: str
    make: Callable[[], Any]
    image_processor: Callable[[], Any]
    tokenizer: Callable[[], Any]
    padding: str | bool = True  # "max_length" for models that read padding

    def save(self, folder: Path) -> Any:
        """Save a model with its processor, as its library does; return the model."""
        torch.manual_seed(0)
        model = self.make().eval()
        shake(model)
        if self.name == "ALIGN":
            wake(model)
        model.save_pretrained(folder)
        self.image_processor().save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)
        return model

    def save_sentences(self, folder: Path) -> Any:
        """Save a model by sentence-transformers; return what it opens."""
        clip = self.save(folder / "clip")
        tokenizer = self.tokenizer()
        tokenizer.model_max_length = clip.config.text_config.max_position_embeddings
        hf.CLIPProcessor(self.image_processor(), tokenizer).save_pretrained(folder / "clip")
        SentenceTransformer(str(folder / "clip"), device="cpu").save(str(folder), create_model_card=False)
        return SentenceTransformer(str(folder), device="cpu")

    def texts(self, model: Any, folder: Path, texts: list[str]) -> Tensor:
        """What the library gives for texts, all in one batch."""
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        longest = model.config.text_config.max_position_embeddings
        longest -= 2 if type(tokenizer).__name__.startswith("XLMRoberta") and self.name != "MetaCLIP 2" else 0
        ids = tokenizer(texts, padding=self.padding, truncation=True, max_length=longest, return_tensors="pt")
        if self.padding == "max_length":
            ids.pop("attention_mask", None)
        return model.get_text_features(**ids).pooler_output

    def multiplier(self, model: Any) -> float:
        """What the library multiplies cosines by; ALIGN divides by a temperature."""
        return 1 / float(model.temperature) if self.name == "ALIGN" else float(model.logit_scale.exp())

    def images(self, model: Any, folder: Path, images: list[Any]) -> Tensor:
        """What the library gives for images, which its own processor prepares."""
        processor = hf.AutoImageProcessor.from_pretrained(folder, use_fast=False)
        return model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output.flatten(1)


def shake(model: torch.nn.Module) -> None:
    """Move every weight a little, so that none is zero or one and none may be left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
            else:
                parameter.add_(0.25)


@torch.no_grad()
def wake(model: Any) -> None:
    """Make a random EfficientNet tell images apart: larger weights, and norms that have seen some images."""
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
    for _ in range(4):
        model.train().get_image_features(torch.rand(16, 3, 32, 32))
    model.eval()


def built(kind: str, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, **config: Any) -> Callable[[], Any]:
    """Build a model of `kind` from configurations of its two sides."""

    def make() -> Any:
        whole = getattr(hf, f"{kind}Config")(vision_config=vision, text_config=text, **config)
        return getattr(hf, f"{kind}Model")(whole)

    return make


def dual(vision: Any, text: Any) -> Callable[[], Any]:
    """Build a VisionTextDualEncoder of two configurations."""

    def make() -> Any:
        whole = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=WIDTH)
        return hf.VisionTextDualEncoderModel(whole)

    return make


def siglip_pieces() -> Any:
    """A tokenizer that ends texts and begins none, with the padding of SigLIP's."""
    return unigram("T5Tokenizer", ["<pad>", "</s>", "<unk>"], extra_ids=0, pad_token="</s>")


def image_processor(kind: str, **settings: Any) -> Callable[[], Any]:
    """Make an image processor of transformers, by PIL."""
    return lambda: getattr(hf, f"{kind}ImageProcessorPil")(**settings)


def sized(tokenizer: Callable[[], Any], **more: Any) -> dict[str, Any]:
    """The text configuration for a tokenizer."""
    made = tokenizer()
    special = {f"{name}_token_id": getattr(made, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return TEXT | {"vocab_size": len(made)} | {k: v for k, v in special.items() if v is not None} | more


def families() -> list[Family]:
    """All families of transformers."""
    clip = image_processor("CLIP", **CROPPED)
    vit = image_processor("ViT", **SQUARE)
    siglip = image_processor("Siglip", **SQUARE)
    bert = hf.BertConfig(**sized(wordpiece))
    return [
        Family("CLIP", built("CLIP", text=sized(clip_pairs), projection_dim=WIDTH), clip, clip_pairs),
        Family("SigLIP", built("Siglip", text=sized(siglip_pieces, projection_size=32)), siglip, siglip_pieces,
               "max_length"),
        Family("MetaCLIP 2", built("MetaClip2", text=sized(xlm_unigram), projection_dim=WIDTH), clip, xlm_unigram),
        Family("Chinese-CLIP", built("ChineseCLIP", text=sized(wordpiece), projection_dim=WIDTH), clip, wordpiece),
        Family("AltCLIP", built("AltCLIP", text=sized(xlm_unigram, project_dim=20), projection_dim=WIDTH), clip,
               xlm_unigram),
        Family("BLIP", built("Blip", text=sized(wordpiece), projection_dim=WIDTH), image_processor("Blip", **SQUARE),
               wordpiece),
        Family("ALIGN", built("Align", ALIGN_VISION, text=sized(wordpiece), projection_dim=32),
               image_processor("EfficientNet", **ALIGN_IMAGES), wordpiece),
        Family("Dual encoder, ViT and BERT", dual(hf.ViTConfig(**VISION), bert), vit, wordpiece),
        Family("Dual encoder, CLIP and RoBERTa",
               dual(hf.CLIPVisionConfig(**VISION), hf.XLMRobertaConfig(**sized(xlm_unigram))), clip, xlm_unigram),
    ]  # fmt: skip
