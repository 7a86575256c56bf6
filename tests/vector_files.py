"""Vectors as other tools write them, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet


def some(rows: int, width: int = 4, seed: int = 0, kind: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(kind)


def write_part(folder: Path, number: str, vectors: np.ndarray, **columns: Any) -> None:
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors)
    parquet.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
