from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from lamplit.cli import main as cli
from lamplit.cli import tables
from lamplit.cli.terminal import show
from lamplit.errors import UsageError
from lamplit.evaluation.report.writing import Report, write_report
from lamplit.evaluation.result_building import thumbnail
from lamplit.metrics.results import Measure, Result, read_results

EVIL = "<script>alert(1)</script>"
PIPES = "a | b *c* [d](e) $x^2$ 鯊"
CURVE = [0.5, 0.6, 0.7]
BINS = [{"confidence": 0.1, "accuracy": 0.2, "images": 3}, {"confidence": 0.9, "accuracy": 0.8, "images": 7}]
VOID = {"meta", "img", "br", "link"}
LEADERBOARD = 12


def write(folder: Path, benchmark: str, dataset: str, model: str, value: float, **changes: Any) -> None:
    measure = Measure(value, value - 0.01, value + 0.01)
    values: dict[str, Any] = {
        "task": "zero-shot classification", "benchmark": benchmark, "dataset": dataset, "language": "en",
        "main_metric": "accuracy@1", "metrics": {"accuracy@1": measure, "accuracy@5": Measure(0.9, 0.89, 0.91)},
        "model": {"name": model, "image_tower": "timm:vit"}, "images": 10, "skipped": 2, "classes": 3,
        "protocol": {"templates": "clip-80", "canonicalized": True, "notes": ["no crop", EVIL]},
        "versions": {"torch": "2.4"}, "time": "2026-01-02T03:04:05Z", "seconds": 7.0,
    }  # fmt: skip
    Result(**(values | changes)).write(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models; a released one that does as published on ImageNet, and one with hostile names on a set of its own."""
    folder = tmp_path_factory.mktemp("results")
    red = folder.with_name("red.png")
    Image.new("RGB", (300, 200), "red").save(red)
    examples = [thumbnail(red), "", "../outside.jpg", "data:image/svg+xml,<svg onload='x()'/>"]
    names = [EVIL, PIPES, *(f"class {place}" for place in range(20))]
    write(folder, "imagenet", "ImageNet", "lit:L16L", 0.76)
    write(
        folder, "stamps", f"Stamps {PIPES}", "my_model", 0.5,
        per_class=[{"name": name, "images": 5, "accuracy": place / 40} for place, name in enumerate(names)],
        confusions=[{"class": EVIL, "predicted": PIPES, "images": 4, "examples": examples}],
        reliability={"error": 0.043, "bins": BINS}, classes=len(names),
    )  # fmt: skip
    write(folder, "imagenet", "ImageNet", "my_model", 0.3)
    retrieval = {f"{way}/recall@1": Measure(0.5, 0.4, 0.6) for way in ("image_to_text", "text_to_image")}
    write(
        folder, "coco", "MS-COCO", "my_model", 0.5, task="image-text retrieval", main_metric="image_to_text/recall@1",
        metrics=retrieval, classes=0, captions=50, recall_curve={"image_to_text": CURVE, "text_to_image": CURVE},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return write_report(folder)


def text(report: Report, name: str) -> str:
    return (Path(report.folder) / name).read_text(encoding="utf-8")


def test_files_are_where_results_are_not_read(folder: Path, report: Report) -> None:
    assert report.files == [str(folder / "report" / f"report.{kind}") for kind in ("md", "csv", "json", "html")]
    assert len(read_results(folder)) == 4


def test_rows(report: Report) -> None:
    [own] = [row for row in report.rows if row.model == "lit:L16L" and row.metric == "accuracy@1"]
    assert own.reference is not None
    assert (own.reference.value, own.reference.source) == (0.757, "arXiv 2111.07991v3, Tables 1 and 13")
    assert (own.same_model, own.verdict, own.distance) == (True, "inside", "+0.3")
    assert [row.verdict for row in report.rows if row.benchmark == "stamps"] == ["", ""]


def cells(line: str) -> list[str]:
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown(report: Report) -> None:
    lines = text(report, "report.md").splitlines()
    table = [cells(line) for line in lines if line.startswith("|")]
    assert {len(row) for row in table} == {9, 7}
    assert ["ImageNet", "accuracy@1", "lit:L16L", "76.0", "75.0 to 77.0", "75.7", "LiT L/16", "+0.3", "inside"] in table
    assert [f"Stamps {PIPES}", "accuracy@1", "my_model", "50.0", "49.0 to 51.0", "", "", "", ""] in table
    listed = [row for row in table if row[0].endswith("Image Classification")]
    assert len(listed) == LEADERBOARD
    assert listed[6] == [
        "Zero-Shot Transfer Image Classification", "ImageNet", "Accuracy (Public)", "75.7", "LiT-tuning",
        "76.0", "30.0",
    ]  # fmt: skip
    protocol = [line for line in lines if line.startswith("- ")]
    assert len(protocol) == 4
    assert (
        "templates: clip-80; canonicalized: yes; notes: no crop; &lt;script&gt;alert(1)&lt;/script&gt;" in protocol[1]
    )
    assert "images: 10, 2 skipped" in protocol[1]
    assert "versions: torch 2.4; measured: 2026-01-02T03:04:05Z in 7 s" in protocol[1]


def test_csv(report: Report) -> None:
    rows = list(csv.DictReader(text(report, "report.csv").splitlines()))
    assert list(rows[0])[:5] == ["task", "dataset", "metric", "value", "model"]
    measured = [row for row in rows if row["low"]]
    assert len(measured) == 3 * 2 + 2
    own = next(row for row in measured if row["model"] == "lit:L16L" and row["metric"] == "Accuracy")
    assert (own["value"], own["low"], own["high"], own["published"]) == ("76.0", "75.0", "77.0", "75.7")
    assert (own["difference"], own["interval"], own["published_model"]) == ("0.3", "inside", "LiT L/16")
    assert f"Stamps {PIPES}" in {row["dataset"] for row in measured}
    listed = [row for row in rows if row["source"].startswith("Papers with Code")]
    assert len(listed) == LEADERBOARD
    assert {(row["dataset"], row["metric"], row["value"], row["revision"]) for row in listed} >= {
        ("ObjectNet", "Top-1 Accuracy", "82.5", "v3"), ("ImageNet ReaL", "Accuracy (Private)", "88.0", "v1"),
    }  # fmt: skip
    assert sum(row["benchmark"] == "imagenet" and row["model"] == "ResNet50" for row in rows) == 1


def test_json_has_the_shape_of_papers_with_code(report: Report) -> None:
    tasks = {task["task"]: task for task in json.loads(text(report, "report.json"))}
    assert set(tasks) == {
        "Zero-Shot Transfer Image Classification", "Zero-Shot Cross-Modal Retrieval", "Image Classification",
    }  # fmt: skip
    for task in tasks.values():
        assert set(task) == {"task", "description", "subtasks", "datasets", "source_link"}
        for dataset in task["datasets"]:
            assert {"dataset", "description", "subdatasets", "dataset_links", "dataset_citations", "sota"} < set(
                dataset
            )
            for row in dataset["sota"]["rows"]:
                assert {"model_name", "paper_title", "paper_url", "paper_date", "code_links", "model_links"} < set(row)
                assert set(row["metrics"]) <= set(dataset["sota"]["metrics"])
    [imagenet] = [d for d in tasks["Zero-Shot Transfer Image Classification"]["datasets"] if d["dataset"] == "ImageNet"]
    rows = {row["model_name"]: row for row in imagenet["sota"]["rows"]}
    assert rows["LiT-tuning"]["metrics"] == {"Accuracy (Private)": "84.5", "Accuracy (Public)": "75.7"}
    assert rows["LiT-tuning"]["paper_title"] == "LiT: Zero-Shot Transfer with Locked-image text Tuning"
    assert rows["lit:L16L"]["metrics"] == {"Accuracy": "76", "Top 5 Accuracy": "90"}
    assert rows["lit:L16L"]["paper_title"] == ""
    assert imagenet["results"][0] == {
        "task": "Zero-Shot Transfer Image Classification", "dataset": "ImageNet", "metric": "Accuracy", "value": 76.0,
        "model": "lit:L16L",
    }  # fmt: skip


class Page(HTMLParser):
    """Reads a page, and fails where a tag is not closed in its place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_markdown_holds_no_tag(tmp_path: Path) -> None:
    """Names of models, data sets, notes and columns come from files that anybody can have written."""
    image = "<img src=x onerror=alert(1)>"
    write(tmp_path, "a", EVIL, image, 0.5, language=EVIL, column=image)
    write(tmp_path, "a", EVIL, image, 0.5, language=EVIL, column=EVIL)
    written = text(write_report(tmp_path, against=None), "report.md")
    assert not re.search(r"<\s*/?[a-z]", written)
    assert "&lt;img src=x onerror=alert(1)&gt;" in written


def test_results_themselves(folder: Path, report: Report, tmp_path: Path) -> None:
    again = write_report(read_results(folder), out=tmp_path / "report")
    assert text(again, "report.csv") == text(report, "report.csv")
    with pytest.raises(UsageError, match="give the folder for the report"):
        write_report(read_results(folder))
    with pytest.raises(UsageError, match="there are no results to report"):
        write_report([], out=tmp_path)


def test_page_is_well_formed_alone_and_without_script(report: Report) -> None:
    source = text(report, "report.html")
    page = Page(source)
    assert not {"script", "link", "iframe", "object", "b-c"} & {tag for tag, _ in page.seen}
    for _, attributes in page.seen:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if value and value.startswith("data:image/jpeg;base64,"):
                assert re.fullmatch(r"[\w+/=]+", value.partition(",")[2])
            elif name in ("src", "href", "srcset", "data", "style", "clip-path"):
                assert not re.search(r"https?:|//|@import", value or "")
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids of several plots meet on one page"
    for _, attributes in page.seen:
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in ids
    assert len(source) < 300_000


def test_page_shows_names_as_they_are(report: Report) -> None:
    page = Page(text(report, "report.html"))
    assert EVIL in page.words
    assert PIPES in page.words
    assert f"Stamps {PIPES}" in page.words
    assert "$x^2$" in page.words, "no formula for matplotlib"


def test_page_has_every_part(report: Report) -> None:
    page = Page(text(report, "report.html"))
    plots = [attributes["aria-label"] for tag, attributes in page.seen if tag == "svg"]
    assert plots == [
        "Every value with its 95 % interval beside the published figures",
        "Difference of every value from its published figure, with its 95 % interval",
        "Accuracy of every class, sorted from worst to best",
        "Accuracy against confidence",
        "Recall in both directions against the number of answers looked at",
    ]
    image_folder = [attributes["src"] or "" for tag, attributes in page.seen if tag == "img"]
    assert len(image_folder) == 1
    assert image_folder[0].startswith("data:image/jpeg;base64,")
    assert sum(attributes.get("class") == "missing" for _, attributes in page.seen) == 3
    for words in ("+0.3, inside", "lit:L16L", "my_model", "worst classes", "Papers with Code", "4.3", "clip-80"):
        assert words in page.words


def test_plots_follow_light_and_dark(report: Report) -> None:
    source = text(report, "report.html")
    assert "prefers-color-scheme: dark" in source
    svgs = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    assert not re.search(r"(fill|stroke): *(#|black|white)|fill=|stroke=", "".join(svgs))
    variables = set(re.findall(r"var\(--(\w+)\)", source))
    style = source[source.index("<style>") : source.index("</style>")]
    light, dark = style.split("prefers-color-scheme")[:2]
    for variable in variables - {"model"}:
        assert f"--{variable}:" in light
        assert f"--{variable}:" in dark


def test_same_results_make_the_same_bytes(folder: Path, report: Report, tmp_path: Path) -> None:
    again = write_report(folder, out=tmp_path / "again")
    for name in ("report.md", "report.csv", "report.json", "report.html"):
        assert text(again, name) == text(report, name)


def test_against_another_folder_a_file_and_nothing(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    write(old, "stamps", f"Stamps {PIPES}", "my_model", 0.4)
    report = write_report(folder, against=old, out=tmp_path / "a")
    [row] = [row for row in report.rows if row.benchmark == "stamps" and row.metric == "accuracy@1"]
    assert (row.distance, row.verdict, row.same_model) == ("+10.0", "above", True)
    assert "Papers with Code" not in text(report, "report.md")
    file = tmp_path / "own.csv"
    file.write_text("benchmark,task,metric,value,model\nimagenet,zero-shot classification,accuracy@1,0.7,theirs\n")
    report = write_report(folder, against=file, out=tmp_path / "b")
    assert {row.reference.model for row in report.rows if row.reference} == {"theirs"}
    report = write_report(folder, against=None, out=tmp_path / "c")
    assert not any(row.reference for row in report.rows)
    assert "published" not in Page(text(report, "report.html")).words


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results in"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="there is no nowhere; expected 'paper', a folder of results or a CSV file"):
        write_report(folder, against="nowhere")
    with pytest.raises(UsageError, match="holds results, and"):
        write_report(folder, out=folder)
    assert not (folder / "report.json").exists()


def test_command(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        cli.app, ["report", str(folder), "--against", "none", "--out", str(tmp_path / "x"), "--json"]
    )
    assert run.exit_code == 0, run.output
    printed = json.loads(run.stdout)
    assert printed["against"] is None
    assert [row["reference"] for row in printed["rows"]] == [None] * 8
    assert all(Path(file).is_file() for file in printed["files"])


def test_table(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    show(report, tables.results_report, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "ImageNet\taccuracy@1\tlit:L16L\t76.0\t75.0 to 77.0\t75.7\tLiT L/16\t+0.3\tinside" in lines
    assert lines[0].startswith("beside the figures of the paper")
    assert lines[-1] == f"html\t{report.files[-1]}"
