"""Whether two stores hold the same, for tests of those that several processes made."""

from __future__ import annotations

from pathlib import Path

import torch

from lamplit.store.lance_store import Store


def require_equal_stores(out: str | Path, expected: Path) -> None:
    """Compare ids, paths, texts, metadata with its types, and vectors, in the order of the ids."""
    made, true = Store(out), Store(expected)
    assert made.column("id") == true.column("id")
    assert sorted(made.column_types.items(), key=str) == sorted(true.column_types.items(), key=str)
    assert made.rows() == true.rows()
    # Another batch may round otherwise: a unit in the last place of a half is 0.0005.
    torch.testing.assert_close(made.vectors(), true.vectors(), atol=1e-3, rtol=0)
