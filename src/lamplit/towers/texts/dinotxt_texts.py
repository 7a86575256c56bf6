"""The text tower of a dino.txt: CLIP's byte pairs, a causal encoder, the end token through a projection."""

from __future__ import annotations

from lamplit.towers.dinotxt_models import DinoTxt
from lamplit.towers.texts.layered_head import copy_linear
from lamplit.towers.texts.text_tower import TextTower
from lamplit.towers.tokens.open_clip_tokenizers import OpenClipPairs


def take_dinotxt_text(spec: str, opened: DinoTxt) -> TextTower:
    """Take the text tower out of an open dino.txt, with its trained head.

    Raises:
        MissingExtraError: open_clip is not installed, whose vocabulary this is.
    """
    head = copy_linear(opened.projection)
    tower = TextTower(
        spec,
        opened.text,
        OpenClipPairs(),
        pooling="last",
        context_length=opened.text_config["context_length"],
        feature_width=head.in_features,
        width=head.out_features,
        config=opened.text_config,
    )
    tower.head = head
    tower.trained_scale = opened.logit_multiplier
    return tower.eval()
