from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lamplit.towers.saving import save_weights

resource = pytest.importorskip("resource", reason="Windows has no limits of a process")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let this process write no file of more than `size` bytes."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_tensors_and_modules(tmp_path: Path) -> None:
    save_weights({"a": torch.arange(3)}, tmp_path / "tensors", {"made": "here"})
    assert load_file(tmp_path / "tensors")["a"].tolist() == [0, 1, 2]
    layer = nn.Linear(2, 3)
    save_weights(layer, tmp_path / "module")
    assert torch.equal(load_file(tmp_path / "module")["weight"], layer.weight)


@pytest.mark.parametrize("weights", [nn.Linear(1000, 100), {"a": torch.zeros(100_000)}], ids=["module", "tensors"])
def test_no_space_is_an_error_of_the_system(weights: nn.Module | dict[str, torch.Tensor], tmp_path: Path) -> None:
    with small_files(10_000), pytest.raises(OSError, match="weights") as caught:
        save_weights(weights, tmp_path / "weights")
    assert caught.value.errno == errno.EFBIG


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_weights({"a": torch.zeros(1)}, tmp_path / "nowhere" / "weights")
