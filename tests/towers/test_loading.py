from __future__ import annotations

import contextlib
import os
import pickle
import random
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from transformers import BertConfig

from lamplit.errors import TowerError
from lamplit.towers.loading import (
    key_difference,
    load_strictly,
    load_whole,
    map_parameters,
    plain_config,
    read_checkpoint,
    read_weights,
)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"weight": torch.randn(2, 3), "bias": torch.randn(2)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_safetensors(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "tower.safetensors")
    assert same(read_weights(tmp_path / "tower.safetensors"), state)


@pytest.mark.parametrize("name", ["tower.pth", "tower.pt", "tower.bin", "tower"])
def test_pickled_state_dict(state: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    torch.save(OrderedDict(state), tmp_path / name)
    assert same(read_weights(tmp_path / name), state)


def test_pickle_protocol_that_torch_does_not_read_safely(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "tower.pth", pickle_protocol=4)
    with pytest.raises(TowerError, match="save its state_dict"):
        read_weights(tmp_path / "tower.pth")


def test_old_pickle_format(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(str(tmp_path / "old.pth")), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_training_checkpoint_is_unwrapped(state: dict[str, Tensor], tmp_path: Path, wrapper: str) -> None:
    torch.save({"epoch": 3, "optimizer": {}, wrapper: state}, tmp_path / "checkpoint.pth")
    assert same(read_weights(tmp_path / "checkpoint.pth"), state)


class Bomb:
    """What a hostile pickle looks like: reading it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path(self.file),)  # type: ignore[return-value]


@pytest.mark.parametrize("writer", ["torch", "torch-legacy", "pickle"])
def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    trace, file = tmp_path / "executed", tmp_path / "hostile.pth"
    hostile = {"weight": torch.ones(2), "bomb": Bomb(trace)}
    if writer == "pickle":
        file.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    else:
        torch.save(hostile, file, _use_new_zipfile_serialization=writer == "torch")

    with pytest.raises(TowerError, match="running code") as caught:
        read_weights(file)

    assert not trace.exists()
    assert str(file) in str(caught.value)
    if writer == "pickle":  # the bomb is live: this test can fail
        pickle.loads(file.read_bytes())
        assert trace.exists()


def test_module_pickled_whole_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(TowerError, match="state_dict"):
        read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize("name", ["tower.safetensors", "tower.pth"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02K\x01J", b"PK\x03\x04" + bytes(50), bytes(200)])
def test_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TowerError, match=name):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_file(state: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"tower.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    whole = file.read_bytes()
    for length in (len(whole) // 3, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:length])
        with pytest.raises(TowerError):
            read_weights(file)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_file_damaged_anywhere(state: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"tower.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=False)
    whole, generator = file.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.randrange(min(len(whole), 600))] = generator.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(TowerError):  # a changed number reads well; nothing else may be raised
            read_weights(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TowerError, match=r"no weights at .*absent\.pth"):
        read_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, torch.ones(2), {"a": torch.ones(1), "b": {"c": 1}}])
def test_pickle_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(TowerError, match="not a state dict"):
        read_weights(tmp_path / "other.pth")


def test_load_strictly(state: dict[str, Tensor]) -> None:
    module = nn.Linear(3, 2)
    load_strictly(module, state, "tower")
    assert same(module.state_dict(), state)


def test_load_strictly_lists_every_problem_and_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {
        "0.weight": torch.ones(2, 3),
        "0.bias": torch.ones(5),
        "1.weight": torch.ones(2, 2),
        "2.bias": torch.ones(1),
    }

    with pytest.raises(TowerError) as caught:
        load_strictly(module, state, "my tower")

    message = str(caught.value)
    assert "my tower" in message
    assert "1 missing: 1.bias" in message
    assert "1 unexpected: 2.bias" in message
    assert "1 of another shape: 0.bias (5,) for (2,)" in message
    assert same(module.state_dict(), before)


def test_key_difference(state: dict[str, Tensor]) -> None:
    module = nn.Linear(3, 2)
    assert key_difference(module, state) == ([], [])
    assert key_difference(module, {"weight": state["weight"], "scale": state["bias"]}) == (["bias"], ["scale"])


def test_plain_config_forgets_the_folder() -> None:
    config = BertConfig(hidden_size=32, num_attention_heads=2)
    config._name_or_path = "/somewhere"
    values = plain_config(config)
    assert "_name_or_path" not in values
    assert values["hidden_size"] == 32
    assert plain_config(BertConfig.from_dict(values)) == values


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_file_that_may_not_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch(0)
    said = rf"{name} may not be read \(Permission denied\); its owner can allow it: chmod a\+r "
    for read in (read_checkpoint, lambda file: load_whole(nn.Linear(1, 1), file)):
        with pytest.raises(TowerError, match=said):
            read(tmp_path / name)


def lies_in(tensor: torch.Tensor, file: Path) -> bool:
    """Tell whether the numbers of a tensor lie in a file that is mapped into memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.endswith(str(file))
    raise AssertionError


class Tied(nn.Module):
    """Two names for one matrix, as in an encoder whose output reads its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output, self.small = nn.Embedding(300, 40), nn.Linear(40, 300), nn.Linear(8, 8)
        self.output.weight = self.embedding.weight


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are listed on Linux")
def test_mapped_parameters_are_those_of_the_file(tmp_path: Path) -> None:
    file, module = tmp_path / "a.safetensors", Tied()
    save_model(module, str(file))
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    loaded = Tied()
    load_whole(loaded, file)
    assert not lies_in(loaded.embedding.weight, file)
    loaded.small.to(torch.float16)
    map_parameters(loaded, file)
    assert lies_in(loaded.embedding.weight, file)
    assert lies_in(loaded.output.bias, file)
    assert loaded.output.weight is loaded.embedding.weight
    assert loaded.small.weight.dtype == torch.float16, "of another type than in the file"
    save_model(Tied(), str(tmp_path / "b.safetensors"))
    (tmp_path / "b.safetensors").replace(file)  # as a run does that saves a better model
    found = loaded.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected if "small" not in name)


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are listed on Linux")
def test_mapped_parameters_are_written_to_in_this_process_alone(tmp_path: Path) -> None:
    file, module = tmp_path / "a.safetensors", nn.Linear(400, 30)
    save_model(module, str(file))
    expected = load_file(file)["weight"].clone()
    map_parameters(module, file)
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(module.weight, expected + 1)
    assert torch.equal(load_file(file)["weight"], expected)
