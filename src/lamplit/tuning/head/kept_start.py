"""The start of a run, kept beside the store: the next run that begins in the same way reads it.

Another rate, batch or number of epochs changes nothing of the closed form and of the recall before the first step,
which take minutes. A key of all that they depend on names the files. Like other derived files they may be deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamplit._version import __version__
from lamplit.store.arrays.derived import Arrays, Draft, derive, find_derived
from lamplit.store.lance_store import Store

_STATE, _METRICS, _DIGEST = "random_state", "metrics", "digest"


def start_key(*parts: str | Tensor) -> str:
    """Digest what a start depends on, with the state of torch's random numbers and the version of lamplit."""
    digest = blake2b(__version__.encode(), digest_size=16)
    for part in (*parts, torch.get_rng_state()):
        told = part if isinstance(part, str) else f"{part.dtype} {tuple(part.shape)}"
        digest.update(f"{len(told)} {told}\n".encode())
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def fit_or_read(
    store: Store, key: str, tensors: Sequence[Tensor], fit: Callable[[], dict[str, float]], *, keeps: bool = False
) -> dict[str, float]:
    """Give tensors the values that a fit gives them; where it was made before with this key, read these.

    The random numbers that are drawn next are the same in both cases.

    Args:
        store: what is fitted to.
        key: of `start_key`.
        tensors: what the fit changes, in place.
        fit: changes them, and returns metrics.
        keeps: keep the values beside a small store, too.

    Returns:
        The metrics.
    """
    names, kind = [*(f"tensor{number}" for number in range(len(tensors))), _STATE, _METRICS, _DIGEST], f"start-{key}"
    found = find_derived(store, kind, names, is_whole=_is_whole)
    if found is None:
        values = _fitted(names, tensors, fit)  # here, once, whichever folder can be written to

        def write(draft: Draft) -> None:
            for name, value in values.items():
                draft.create(name, value.shape, value.dtype)[:] = value

        found = derive(store, kind, names, write, instead_of="start-", keeps=keeps, is_whole=_is_whole)
    with torch.no_grad():
        for name, tensor in zip(names, tensors, strict=False):
            tensor.copy_(torch.from_numpy(found[name]).reshape(tensor.shape))
    torch.set_rng_state(torch.from_numpy(np.array(found[_STATE])))
    metrics: dict[str, float] = json.loads(found[_METRICS].tobytes())
    return metrics


def _fitted(names: Sequence[str], tensors: Sequence[Tensor], fit: Callable[[], dict[str, float]]) -> Arrays:
    """Fit, and return what is kept of it: the tensors, the random numbers, the metrics and a digest of these."""
    metrics = json.dumps(fit()).encode()
    values = {name: tensor.detach().cpu().reshape(-1).numpy() for name, tensor in zip(names, tensors, strict=False)}
    values |= {_STATE: torch.get_rng_state().numpy(), _METRICS: np.frombuffer(metrics, np.uint8)}
    return values | {_DIGEST: _digest(values)}


def _is_whole(found: Arrays) -> bool:
    """Tell whether the arrays are those that were written."""
    return bool(np.array_equal(found[_DIGEST], _digest(found)))


def _digest(values: Arrays) -> NDArray[Any]:
    digest = blake2b(digest_size=16)
    for name in sorted(values.keys() - {_DIGEST}):
        value = values[name]
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return np.frombuffer(digest.digest(), np.uint8)
