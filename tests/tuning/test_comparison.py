from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from PIL import Image

from lamplit.errors import UsageError
from lamplit.store.lance_store import Store
from lamplit.tuning.comparison import METRICS, Cell, compare

SETTINGS = {"batch_size": 16, "epochs": 1.0, "num_evals": 1}


@pytest.mark.slow
def test_grid_over_towers_and_modes(image_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """Pairs in, one store for each tower; every run is a run like any other."""
    text = f"hf:{text_folder}"
    demos = ["demo:efficientnet-lite0"]
    result = compare(
        image_folder / "pairs.csv",
        tmp_path,
        image_towers=demos,
        text_towers=[text],
        modes=["LU", "LL"],
        seeds=2,
        settings=SETTINGS,
    )
    assert [(cell.image_tower, cell.text_tower, cell.mode) for cell in result.cells] == [
        (demos[0], text, "LU"), (demos[0], text, "LL"),
    ]  # fmt: skip
    assert result.impossible == []
    for cell in result.cells:
        for seed, found in enumerate(cell.metrics["image_to_text/recall@5"]):
            [folder] = (tmp_path / "runs").glob(f"demo_efficientnet-lite0-*-{cell.mode}-{seed}")
            assert found == json.loads((folder / "report.json").read_text())["last"]["image_to_text/recall@5"]
    with Image.open(tmp_path / "comparison.png") as image_file:
        assert min(image_file.size) > 200
    assert len(Store(tmp_path / "stores" / "demo_efficientnet-lite0.lance")) == 60


def test_interrupted_comparison_goes_on(store: Store, text_folder: Path, tmp_path: Path) -> None:
    choice = {"text_towers": [f"hf:{text_folder}"], "seeds": 1, "settings": SETTINGS}
    first = compare(store, tmp_path, modes=["LU"], **choice)  # type: ignore[arg-type]
    both = compare(store, tmp_path, modes=["LU", "Lu"], **choice)  # type: ignore[arg-type]
    assert both.cells[0] == first.cells[0], "not run again: its seconds are the same"
    assert len(both.cells) == 2


def test_mean_and_spread_by_hand() -> None:
    cell = Cell("timm:a", "hf:b/c", "LU", {METRICS[0]: [0.1, 0.2, 0.6], METRICS[1]: [0.5]})
    assert cell.mean(METRICS[0]) == pytest.approx(0.3)
    assert cell.spread(METRICS[0]) == pytest.approx(statistics.stdev([0.1, 0.2, 0.6]))
    assert cell.spread(METRICS[1]) == 0
    assert cell.name == "LU  a  c"


def test_impossible_comparisons_are_refused(
    store: Store, image_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    text = f"hf:{text_folder}"
    with pytest.raises(UsageError, match="has vectors of timm:test_vit alone; to compare other towers, give pairs"):
        compare(store, tmp_path, image_towers=["timm:test_vit"], text_towers=[text], modes=["LU"])
    with pytest.raises(UsageError, match="give the towers to embed them with, --image-towers A,B"):
        compare(image_folder / "pairs.csv", tmp_path, text_towers=[text], modes=["LU"])
    with pytest.raises(UsageError, match="unknown settings learning_rate; TuneSettings lists the known ones"):
        compare(store, tmp_path, text_towers=[text], modes=["LU"], settings={"learning_rate": 1.0})
    with pytest.raises(UsageError, match="nothing to compare: give at least one text tower"):
        compare(store, tmp_path, text_towers=[], modes=["LU"])
    with pytest.raises(UsageError, match="nothing could be compared: LU  test_vit  tiny: scratch:tiny has no pre-"):
        compare(store, tmp_path, text_towers=["scratch:tiny"], modes=["LU"])
    with pytest.raises(UsageError, match=r"nothing could be compared: .*mode is XX; expected one of auto, LL"):
        compare(store, tmp_path, text_towers=[text], modes=["XX"])
