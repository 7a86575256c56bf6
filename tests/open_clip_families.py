"""One tiny random member of each kind of model of open_clip, built and saved as its users find it: a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers as hf
from safetensors.torch import save_file
from text_families import LONGEST, SMALL, clip_pairs, t5_unigram, wordpiece, xlm_unigram
from torch import Tensor
from two_tower_families import WIDTH, shake, siglip_pieces

from lamplit.towers.loading import quiet_logging

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2}
POOLED = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
SQUASHED = {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


@dataclass(frozen=True)
class OpenClipFamily:
    """A kind of model of open_clip: its configuration, and what of its text side comes from transformers."""

    name: str
    vision: dict[str, Any]
    text: dict[str, Any]
    encoder: Callable[[], Any] | None = None  # a configuration of transformers
    tokenizer: Callable[[], Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Any] = field(default_factory=dict)
    pickled: bool = False  # saved as open_clip_pytorch_model.bin

    def save(self, folder: Path) -> tuple[Any, Any, Any]:
        """Save a model; return what open_clip opens from the folder: model, preprocessing and tokenizer."""
        text = dict(self.text)
        if self.encoder is not None:
            self.encoder().save_pretrained(folder / "text_encoder")
            text["hf_model_name"] = str(folder / "text_encoder")
        if self.tokenizer is not None:
            self.tokenizer().save_pretrained(folder)
            text["hf_tokenizer_name"] = "the files beside this one"
        config = {"embed_dim": WIDTH, "vision_cfg": self.vision, "text_cfg": text} | self.more
        file = folder / "open_clip_config.json"
        file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": self.preprocess}))
        with quiet_logging():  # it warns that there are no weights yet
            torch.manual_seed(0)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
            shake(model)
            state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
            if self.pickled:
                torch.save(state, folder / "open_clip_pytorch_model.bin")
            else:
                save_file(state, folder / "open_clip_model.safetensors")
            model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def owners_texts(opened: tuple[Any, Any, Any], texts: list[str]) -> Tensor:
    """Unit vectors of texts by open_clip."""
    model, _, tokenizer = opened
    return model.encode_text(tokenizer(texts), normalize=True)


@torch.no_grad()
def owners_images(opened: tuple[Any, Any, Any], images: list[Any]) -> Tensor:
    """Unit vectors of images by open_clip, which prepares them itself."""
    model, preprocess, _ = opened
    return model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)


def m2m_config() -> Any:
    """NLLB's encoder, tiny; its tokenizer here is XLM-R's, which numbers its tokens alike."""
    return hf.M2M100Config(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=LONGEST, vocab_size=len(xlm_unigram()),
        pad_token_id=1,
    )  # fmt: skip


def xlm_config() -> Any:
    """XLM-R, tiny."""
    return hf.XLMRobertaConfig(**SMALL, max_position_embeddings=LONGEST, vocab_size=len(xlm_unigram()), pad_token_id=1)


def bert_config() -> Any:
    """BERT, tiny."""
    return hf.BertConfig(**SMALL, max_position_embeddings=LONGEST, vocab_size=len(wordpiece()), pad_token_id=0)


def mt5_config() -> Any:
    """mT5, tiny."""
    return hf.MT5Config(d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, vocab_size=len(t5_unigram()))


def open_clip_families() -> list[OpenClipFamily]:
    """All kinds."""
    frozen = {"context_length": 30, "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    siglip = TEXT | {
        "vocab_size": len(siglip_pieces()), "no_causal_mask": True, "pool_type": "last", "proj_bias": True,
        "pad_id": 1, "tokenizer_kwargs": {"clean": "canonicalize"},
    }  # fmt: skip
    decoder = {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    coca = {"custom_text": True, "multimodal_cfg": decoder}
    return [
        OpenClipFamily("ViT, OpenAI's GELU", VISION, TEXT, more={"quick_gelu": True}, pickled=True),
        OpenClipFamily("ResNet", RESNET, TEXT),
        OpenClipFamily("ViT with CLIP's tokenizer of transformers", VISION, TEXT | {"vocab_size": len(clip_pairs())},
                       tokenizer=clip_pairs),
        OpenClipFamily("SigLIP", TIMM | {"timm_proj": "linear"}, siglip, tokenizer=siglip_pieces,
                       more={"custom_text": True, "init_logit_bias": -3.0}, preprocess=SQUASHED),
        OpenClipFamily("XLM-R frozen, mlp and mean", VISION, frozen, xlm_config, xlm_unigram),
        OpenClipFamily("NLLB, linear and class token", TIMM,
                       frozen | {"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}, m2m_config, xlm_unigram),
        OpenClipFamily("RoBERTa, linear and mean", VISION, frozen | {"hf_proj_type": "linear"}, xlm_config,
                       xlm_unigram),
        OpenClipFamily("BERT, pooler", VISION, frozen | {"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"},
                       bert_config, wordpiece),
        OpenClipFamily("mT5, mean", VISION, frozen | {"hf_proj_type": "mlp"}, mt5_config, t5_unigram),
        OpenClipFamily("CLIPA", VISION | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
                       TEXT | {"vocab_size": len(wordpiece()), "no_causal_mask": True, "pool_type": "last",
                               "tokenizer_kwargs": {"strip_sep_token": True}}, tokenizer=wordpiece),
        OpenClipFamily("CoCa", VISION | POOLED, TEXT | {"embed_cls": True, "output_tokens": True}, more=coca),
        OpenClipFamily("CoCa, RoBERTa", VISION | {"output_tokens": True},
                       frozen | {"hf_proj_type": "linear", "output_tokens": True}, xlm_config, xlm_unigram, more=coca),
    ]  # fmt: skip
