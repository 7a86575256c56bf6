from __future__ import annotations

import pytest
import torch

from lamplit.errors import UsageError
from lamplit.towers.devices import is_same_device, pick_device


def test_default_is_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert pick_device() == torch.device("mps")


def test_no_such_device() -> None:
    with pytest.raises(UsageError, match="there is no device 'gpu' here"):
        pick_device("gpu")


def test_same_device() -> None:
    assert is_same_device("cpu", torch.device("cpu"))
    assert is_same_device("cuda", torch.device("cuda:1"))
    assert not is_same_device("cuda:0", torch.device("cuda:1"))
    assert not is_same_device("cpu", torch.device("cuda:0"))
