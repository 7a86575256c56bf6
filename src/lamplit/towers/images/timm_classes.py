"""What the classes of a timm classifier are called: what timm or a config.json says, no guess by their number.

A file of weights does not say. A thousand classes in it may be ImageNet's, or its owner's.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from lamplit.towers.images.backbone import ClassHead, class_texts
from lamplit.towers.timm_sources import TimmSource

logger = logging.getLogger(__name__)
_NO_WORDS = re.compile(r"(n\d{8}|LABEL_\d+|[\d\W_]*)")  # WordNet's ids, placeholders, numbers
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")  # of what timm has downloaded: the start of its SHA-256


def find_class_head(model: Any, source: TimmSource, file: Path | None) -> ClassHead | None:
    """Return the trained classifier of a timm model with its names; None if nobody says what these are.

    Args:
        model: with its classifier.
        source: where it comes from.
        file: its weights; None if the library or the hub brought them.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return None
    cfg = source.pretrained_cfg if file is None or file.parent == source.folder else None  # of these very weights
    texts = _own_names(source.name, cfg or {}, classifier.out_features)
    subset = infer_imagenet_subset(model)
    if texts is None and subset is not None:
        if not _is_timms(source.name.partition(".")[0], cfg, file):
            logger.info(
                "nobody says what the %d classes of %s are, so its classifier is left out; to use it, give "
                "timm:local-dir:FOLDER with label_names in the config.json",
                classifier.out_features,
                source.name if file is None else file.name,
            )
            return None
        info = ImageNetInfo(subset)
        described = (info.index_to_description(c, detailed=True) for c in range(classifier.out_features))
        texts = [class_texts(*_split(description)) for description in described]
    return None if texts is None else ClassHead(texts, classifier.weight.detach().clone())


def _own_names(name: str, cfg: dict[str, Any], count: int) -> list[list[str]] | None:
    """Return texts for the classes that a config.json names; None if it names none, or not in words."""
    if not cfg.get("label_names"):
        return None
    try:
        info = CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
    except (TypeError, ValueError) as error:
        logger.info("%s: its config.json names its classes in a way that timm does not read (%s)", name, error)
        return None
    if not all(info.has_label(c) for c in range(count)):
        return None
    names = [info.index_to_description(c) for c in range(count)]
    if any(not isinstance(name, str) or _NO_WORDS.fullmatch(name) for name in names):
        return None
    return [class_texts(name.split(", ")) for name in names]


def _is_timms(architecture: str, cfg: dict[str, Any] | None, file: Path | None) -> bool:
    """Tell whether weights are timm's own, by the tag in a config.json or the hash that timm publishes."""
    published = get_arch_pretrained_cfgs(architecture)
    if cfg is not None:
        named = published.get(f"{architecture}.{cfg.get('tag')}")
        return not cfg.get("label_names") and named is not None and named.num_classes == cfg.get("num_classes")
    if file is None:
        return True
    hashes = {found[1] for one in published.values() if one.url and (found := _HASH_IN_NAME.search(str(one.url)))}
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest() if hashes else ""
    return any(digest.startswith(one) for one in hashes)


def _split(description: str) -> tuple[list[str], str]:
    """WordNet's 'tench, Tinca tinca: a game fish of ...' as names and definition."""
    names, _, definition = description.partition(": ")
    return names.split(", "), definition
