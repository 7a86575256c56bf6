from __future__ import annotations

import re

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
    # torch's own text is a list of 20 back ends, a screen of dispatch keys, or an address
    for name in ("gpu", "xla", 3.5):
        with pytest.raises(UsageError, match=f"^device '{name}' cannot be used here ") as raised:
            pick_device(name)  # type: ignore[arg-type]
        assert re.search(r"here \([^\n]{1,80}\); type cpu, or leave it out$", str(raised.value))


def test_same_device() -> None:
    assert is_same_device("cpu", torch.device("cpu"))
    assert is_same_device("cuda", torch.device("cuda:1"))
    assert not is_same_device("cuda:0", torch.device("cuda:1"))
    assert not is_same_device("cpu", torch.device("cuda:0"))
