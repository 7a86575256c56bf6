"""What a text tower's tokenizer does to captions: which it cannot write, which it cuts, and what helps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lamplit.towers.texts.more_tokens import unknown_share
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.caption_language import MULTILINGUAL, sample
from lamplit.tuning.tokens import Tokens

MOST_UNKNOWN = (
    0.1  # of all tokens; MiniLM has at most 0.06 of them in languages of its own script, 0.19 and more in others
)


def advise_pieces(captions: Sequence[str], tower: TextTower) -> str | None:
    """Say that a tower's tokenizer cannot write captions, and what helps.

    Returns:
        A plain sentence; None if it writes (nearly) all.
    """
    share = unknown_share(tower.tokenizer, sample(captions))
    if share <= MOST_UNKNOWN:
        return None
    return (
        f"{tower.spec} cannot write {share:.0%} of what it reads in the captions: its vocabulary lacks their "
        "characters, so different captions are the same to it. Add --train-tokenizer, which gives it the pieces "
        f"that it lacks, or take a text tower that has read such texts: --text-tower {MULTILINGUAL}"
    )


def advise_length(
    tokens: Tokens, captions: Sequence[str], tower: TextTower, column: str, *, may_be_longer: bool
) -> str | None:
    """Say how many captions are cut, how long they are, and what helps.

    Args:
        tokens: of the captions that are tuned on.
        captions: these captions.
        tower: the text tower.
        column: where they are.
        may_be_longer: whether the tower could read longer texts than it was asked to.

    Returns:
        A plain sentence; None if no caption is cut.
    """
    cut = tokens.count_cut()
    if not cut:
        return None
    limit = tower.context_length
    lengths = [len(ids) for ids in tower.tokenizer.encode(sample(captions), None)]
    most = max(limit + 1, int(np.percentile(lengths, 99)))
    found = (
        f"texts of more than {limit} tokens lose their end: {cut} of {len(tokens)} ({cut / len(tokens):.0%}); of a "
        f"sample, 99 in 100 have up to {most}"
    )
    if may_be_longer:
        return f"{found}: --context-length {most}"
    return (
        f"{found}, and {tower.spec} reads no more. A short caption of each image beside the long one helps "
        f"(--text-column {column},SHORT), or a text tower that reads longer texts"
    )
