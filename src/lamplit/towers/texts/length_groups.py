"""Which texts of a batch share a forward pass: those of (nearly) equal length, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence

# What one more forward pass costs, in tokens of a pass that is already running: the weights are read again.
PASS_COST = {"cpu": 64, "cuda": 2048}
OTHER_PASS_COST = 1024  # of every other accelerator, such as MPS


def length_groups(lengths: Sequence[int], pass_cost: int) -> list[int]:
    """Cut sorted lengths into runs that are padded to their longest and encoded together.

    Minimises padded tokens + `pass_cost` per run, exactly, over all ways to cut. Returns the runs' sizes.
    """
    distinct = sorted(set(lengths))
    counts = [0] * len(distinct)
    index = {length: i for i, length in enumerate(distinct)}
    for length in lengths:
        counts[index[length]] += 1
    best, cut = [0.0] + [float("inf")] * len(distinct), [0] * (len(distinct) + 1)
    for end in range(1, len(distinct) + 1):
        texts = 0
        for start in range(end - 1, -1, -1):
            texts += counts[start]
            cost = best[start] + texts * distinct[end - 1] + pass_cost
            if cost < best[end]:
                best[end], cut[end] = cost, start
    sizes, end = [], len(distinct)
    while end:
        sizes.append(sum(counts[cut[end] : end]))
        end = cut[end]
    return sizes[::-1]


def padded_tokens(lengths: Sequence[int], sizes: Sequence[int]) -> int:
    """Count the tokens of texts, padding with them, if their sorted lengths are cut into runs of these sizes."""
    ordered, total, end = sorted(lengths), 0, 0
    for size in sizes:
        end += size
        total += size * ordered[end - 1]
    return total
