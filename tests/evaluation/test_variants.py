from __future__ import annotations

from pathlib import Path
from typing import Any

from lamplit.evaluation.report.variants import distinguish
from lamplit.evaluation.report.writing import write_report
from lamplit.metrics.results import Measure, Result


def result(model: str = "run", digit: str = "1", **changes: Any) -> Result:
    values: dict[str, Any] = {
        "task": "image-text retrieval", "benchmark": "stamps", "dataset": "stamps.lance", "language": "own",
        "main_metric": "image_to_text/recall@1", "metrics": {"image_to_text/recall@1": Measure(0.5, 0.4, 0.6)},
        "model": {"name": model, "fingerprint": 32 * digit}, "protocol": {}, "images": 9, "column": "texts",
    }  # fmt: skip
    return Result(**(values | changes))


def labels(*results: Result) -> list[tuple[str, str]]:
    return [(found.model["name"], found.variant) for found in distinguish(results)]


def test_single_results_keep_their_names() -> None:
    assert labels(result(), result("other", "2", source="/elsewhere")) == [("run", ""), ("other", "")]
    assert labels(result(), result(task="zero-shot classification")) == [("run", ""), ("run", "")]


def test_models_of_one_name() -> None:
    assert labels(result(), result(digit="2")) == [("run (11111111)", ""), ("run (22222222)", "")]


def test_variants_say_what_differs() -> None:
    german = result(column="text_de")
    assert labels(result(), german) == [("run", "column texts"), ("run", "column text_de")]
    assert labels(result(), german, result("other", "2")) == [
        ("run", "column texts"), ("run", "column text_de"), ("other", "column texts"),
    ]  # fmt: skip
    both = labels(result(split="all"), result(split="held_out"), result(column="text_de", split="all"))
    assert [variant for _, variant in both] == ["column texts, all", "column texts, held out", "column text_de, all"]
    folders = labels(result(dataset="/a/x"), result(dataset="/b/x"))
    assert [variant for _, variant in folders] == ["/a/x", "/b/x"]
    crops = labels(*(result(protocol={"resize_mode": mode, "templates": "clip-7"}) for mode in ("crop", "squash")))
    assert [variant for _, variant in crops] == ["resize mode crop", "resize mode squash"]


def test_report_shows_all_of_them(tmp_path: Path) -> None:
    measured = [result(), result(column="text_de"), result(digit="2")]
    for i, each in enumerate(measured):
        value = 0.1 * (i + 1)
        Result(**{**vars(each), "metrics": {each.main_metric: Measure(value, 0.0, 1.0)}}).write(tmp_path)
    report = write_report(tmp_path, against=None)
    page, text = ((Path(report.folder) / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for value in ("10.0", "20.0", "30.0"):
        assert value in page
        assert value in text
    for name in ("run (11111111)", "run (22222222)", "column texts", "column text_de"):
        assert name in page
        assert name in text.replace("\\", "")
