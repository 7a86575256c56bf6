"""Unit vectors as numpy arrays: search uses them, because it starts faster than torch can be imported."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def normalize(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Scale (N, D) vectors to length one and return a float32 copy. A vector of zeros stays as it is."""
    made = vectors.astype(np.float32)
    lengths = np.sqrt(np.vecdot(made, made))
    made /= np.maximum(lengths, np.float32(1e-12))[:, None]
    return made


def as_array(vectors: Any) -> NDArray[np.float32]:
    """Return vectors as a float32 array, from an array or from a tensor of any device."""
    held = vectors.detach().cpu() if hasattr(vectors, "detach") else vectors
    return np.asarray(held, np.float32)
