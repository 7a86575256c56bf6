"""The wheel holds every file, and works from another folder without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SOURCE = PROJECT / "src" / "lamplit"

pytest.importorskip("hatchling")
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=PROJECT)
    return next(folder.glob("lamplit-*.whl"))


def test_wheel_holds_every_file(wheel: Path) -> None:
    files = [file.relative_to(SOURCE.parent) for file in SOURCE.rglob("*") if file.is_file()]
    expected = {file.as_posix() for file in files if "__pycache__" not in file.parts}
    for pattern in (
        "py.typed", "zeroshot/facts/*.json", "tuning/paper/*.toml", "evaluation/report/figures.csv",
        "evaluation/report/page.html", "evaluation/report/page.css", "app/static/*.html", "app/static/*.css",
        "app/static/*.js", "app/static/embedding-atlas/*.js", "app/static/embedding-atlas/LICENSE.txt",
    ):  # fmt: skip
        assert any(SOURCE.glob(pattern)), f"{pattern} matches no file of the source"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.partition("/")[0].endswith(".dist-info")}
    assert held == expected


def test_wheel_embeds_tunes_and_searches(wheel: Path, image_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", scripts / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    paths = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", "nt_venv" if os.name == "nt" else "posix_venv", paths))
    # Folders that a .pth adds are not searched for other .pth files, such as that of an editable install.
    ours = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(ours) + "\n")
    where = run(scripts / "python", "-c", "import lamplit; print(lamplit.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(home)
    lamplit = scripts / "lamplit"
    tower = ("--image-tower", "timm:test_vit", "--image-tower-weights", "random", "--workers", 1)
    run(lamplit, "embed", image_folder / "pairs.csv", *tower, "--out", "a.lance", cwd=tmp_path)
    run(lamplit, "tune", "a.lance", "--text-tower", f"hf:{text_folder}", "--epochs", 1, "--out", "run", cwd=tmp_path)
    assert len(run(lamplit, "search", "run", "a.lance", "ring", "-k", 3, "--paths", cwd=tmp_path).splitlines()) == 3
