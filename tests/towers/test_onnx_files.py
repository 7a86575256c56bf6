from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lamplit.errors import TowerError
from lamplit.towers.onnx_files import onnx_errors, open_onnx, write_onnx

pytest.importorskip("onnxscript")
ROWS = {"rows": torch.ones(2, 3)}
AXES = [{0: torch.export.Dim("batch")}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "linear.onnx"
    write_onnx(torch.nn.Linear(3, 2).eval(), ROWS, file, name="linear", axes=AXES)
    return file


@pytest.mark.parametrize("spinning", [False, True])
def test_what_was_written_runs(file: Path, spinning: bool) -> None:
    session = open_onnx(file, 2, spinning=spinning)
    [vectors] = session.run(["vectors"], {"rows": np.ones((5, 3), np.float32)})
    assert vectors.shape == (5, 2)


@pytest.mark.parametrize("content", [b"", b"no model" * 50, None])
def test_what_cannot_be_read_is_nothing(
    file: Path, content: bytes | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(file.read_bytes()[:200] if content is None else content)
    assert open_onnx(other, 1) is None
    assert open_onnx(tmp_path / "none.onnx", 1) is None
    assert capfd.readouterr().err == ""


def test_wrong_input_is_one_of_its_errors(file: Path) -> None:
    with pytest.raises(onnx_errors()):
        open_onnx(file, 1).run(None, {"rows": np.ones((5, 4), np.float32)})


class Odd(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if rows.sum().item() > 0 else -rows


def test_what_onnx_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TowerError, match="odd cannot be exported to ONNX"):
        write_onnx(Odd(), ROWS, tmp_path / "odd.onnx", name="odd", axes=AXES)
    assert list(tmp_path.iterdir()) == []


def test_every_error_of_onnx_runtime_is_known() -> None:
    # The last is what it raises of weights that may not be read.
    assert {"InvalidProtobuf", "Fail", "ModelRequiresCompilation"} <= {kind.__name__ for kind in onnx_errors()}


def test_nothing_is_told_to_others(file: Path, tmp_path: Path) -> None:
    """ONNX Runtime would leave an id of the machine in the cache, to send it with what it knows of the model."""
    code = "import sys; from lamplit.towers.onnx_files import open_onnx; open_onnx(sys.argv[1], 1)"
    unset = ("CI", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")  # with the first of them it tells nothing anyway
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(
        command, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert list(tmp_path.rglob("*")) == []
