"""The backbone in a checkpoint, wherever its trainer put it.

A trainer wraps weights in dictionaries (`state_dict`, `model_ema`, `teacher`) and modules (`module.`, `backbone.`,
`visual.trunk.`). Both are prefixes of the same kind here: the backbone is what lies under the one prefix that all its
keys have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lamplit.errors import TowerError

_MAX_DEPTH = 5  # of dictionaries in dictionaries
# Where a checkpoint holds a backbone several times, the first of these: averaged weights, as timm takes them; of two
# that teach each other, the one that its authors evaluate.
_PREFERRED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher", "encoder_q", "base_encoder",
    "state_dict", "model",
)  # fmt: skip
_COMPILED = "_orig_mod."  # torch.compile puts it before a module's own name, at any depth


@dataclass(frozen=True)
class FoundBackbone:
    """A backbone that was found in a checkpoint.

    Attributes:
        state: its tensors and what else lies under the prefix, such as a classifier.
        prefix: where it was, such as `state_dict_ema.module.`; empty if the file holds nothing else.
        passed_over: the prefixes under which the same backbone lies again.
        num_others: tensors of the file under no such prefix.
    """

    state: dict[str, Tensor]
    prefix: str
    passed_over: list[str]
    num_others: int


def find_backbone(file: str, checkpoint: Any, own: Collection[str]) -> FoundBackbone:
    """Find the tensors under the prefix that has most of the keys `own`.

    Args:
        file: what to call it in errors.
        checkpoint: what was read: dictionaries in dictionaries, with tensors in them.
        own: keys of the backbone.

    Raises:
        TowerError: there are no tensors, or the backbone is there twice and neither is the better one.
    """
    tensors = dict(_flat(checkpoint, "", _MAX_DEPTH))
    if not tensors:
        raise TowerError(f"{file} is not a state dict: expected a dictionary of tensors")
    counts = Counter(prefix for key in tensors for prefix in _prefixes(key, own))
    most = max(counts.values(), default=0)
    prefixes = sorted((prefix for prefix, count in counts.items() if count == most), key=_rank) or [""]
    if len(prefixes) > 1 and _rank(prefixes[0]) == _rank(prefixes[1]):
        raise TowerError(
            f"{file} holds the tower {len(prefixes)} times, under {', '.join(sorted(prefixes))}; save the one that is "
            "meant as a file of its own"
        )
    chosen, *rest = prefixes
    state = {key.removeprefix(chosen): tensor for key, tensor in tensors.items() if key.startswith(chosen)}
    others = [key for key in tensors if not key.startswith(tuple(prefixes))]
    return FoundBackbone(state, chosen, rest, len(others))


def _flat(content: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor) and prefix:
        yield prefix[:-1].replace(_COMPILED, ""), content
    elif isinstance(content, dict) and depth:
        for key, value in content.items():
            yield from _flat(value, f"{prefix}{key}.", depth - 1)


def _prefixes(key: str, own: Collection[str]) -> Iterator[str]:
    """Yield what precedes each end of a key that is a key of the backbone."""
    start = 0
    while True:
        if key[start:] in own:
            yield key[:start]
        start = key.find(".", start) + 1
        if not start:
            return


def _rank(prefix: str) -> int:
    return min((_PREFERRED.index(part) for part in prefix.split(".") if part in _PREFERRED), default=len(_PREFERRED))
