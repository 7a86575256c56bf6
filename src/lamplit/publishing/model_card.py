"""The card of a model: what was locked, on what it was tuned, what was measured, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from scipy.stats import binomtest

from lamplit.data.split_record import SplitRecord
from lamplit.metrics.results import Measure, Result
from lamplit.model import IMAGE_TOWER
from lamplit.publishing.private_paths import last_part
from lamplit.towers.model_folder import read_config
from lamplit.tuning.run_folder import read_settings
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.tune_report import TuneReport

Json = Mapping[str, Any]
_TASK = "zero-shot-image-classification"  # the hub's word for what takes an image and texts
_PAPER = "[Zhai et al., CVPR 2022](https://arxiv.org/abs/2111.07991)"
_OPENED_BY = {
    "transformers": 'VisionTextDualEncoderModel.from_pretrained("FOLDER")',
    "open-clip": 'open_clip.create_model_and_transforms("local-dir:FOLDER")',
    "sentence-transformers": 'SentenceTransformer("FOLDER")',  # the text tower alone
    "onnx": 'onnxruntime.InferenceSession("FOLDER/text_tower.onnx")',
}
_MODES = {"L": "locked", "U": "pre-trained and tuned", "u": "trained from scratch"}


def model_card(folder: Path, repository: str, results: Sequence[Result] = (), license: str | None = None) -> str:
    """Write the card of a model as Markdown, with the hub's metadata before it.

    Args:
        folder: what is published, with the model's `config.json`, and its `settings.json` and `report.json` if they
            are there, without paths.
        repository: `OWNER/NAME` of its place on the hub.
        results: what `lamplit evaluate` measured of this model.
        license: the hub's word for it, such as `apache-2.0`; None leaves it out.
    """
    config, found = read_config(folder), _read(folder / "report.json")
    report = TuneReport(**found) if found else None
    settings = read_settings(folder / "settings.json") if report else {}
    counts = {} if report is None else _counts(folder, report)
    parts = [
        f"# {repository.rpartition('/')[2]}\n",
        f"A two-tower model for zero-shot classification and search by words, made with lamplit by LiT ({_PAPER}): a "
        "text tower that reads the vectors of an image tower.\n",
        _towers(config, report),
        _data(settings, report),
        _figures(report, counts, results),
        "## Curve\n\n![Loss, learning rate, logit scale and held-out recall over the steps](curves.png)\n"
        if (folder / "curves.png").is_file()
        else "",
        _settings(settings, report),
        _loading(repository, config, has_images=(folder / IMAGE_TOWER).is_file()),
    ]
    data = ModelCardData(
        library_name="lamplit", pipeline_tag=_TASK, license=license, base_model=_base_models(config) or None,
        tags=["lit", "locked-image-tuning", "image-text-retrieval", "safetensors"],
        model_name=repository.rpartition("/")[2], eval_results=_eval_results(settings, report, results) or None,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(filter(None, parts))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Make a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def interval(value: float, count: int) -> str:
    """Show a share of `count` cases with its 95 % interval (Wilson's)."""
    if not count:
        return f"{value:.3f}"
    found = binomtest(round(value * count), count).proportion_ci(0.95, "wilson")
    return f"{value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _towers(config: Json, report: TuneReport | None) -> str:
    image, text = config["image_tower"], config["text_tower"]
    rows = [
        ["image tower", f"`{image.spec}`"],
        ["text tower", f"`{text['spec']}`" if text else "none"],
        ["width of the vectors", config["image_head"] or image.width],
        ["centred", "yes" if config["center"] else "no"],
        ["longest text", f"{text['context_length']} tokens" if text else "none"],
        ["fingerprint of the image tower", f"`{image.fingerprint}`"],
    ]
    lines = ["## Towers\n", table(["", ""], rows)]
    if report is None:
        return "\n".join(lines)
    names = [_MODES[letter] for letter in report.mode]
    lines.append(f"Lock mode `{report.mode}`: the image tower was {names[0]}, the text tower {names[1]}.\n")
    trained = [[name, part["state"], f"{part['parameters']:,}"] for name, part in report.trains.items()]
    lines.append(table(["part", "", "parameters"], trained))
    if report.mode.startswith("L") and report.fingerprint_before == report.fingerprint_after:
        lines.append(
            "The image tower's fingerprint, computed from its weights, was the same before and after tuning.\n"
        )
    return "\n".join(lines)


def _data(settings: Json, report: TuneReport | None) -> str:
    if report is None:
        return ""
    rows: list[list[object]] = [
        ["store", f"`{settings['store']}`, {settings['images']:,} images, column `{settings['text_column']}`"],
        ["pairs to train on", f"{report.training_pairs:,}"],
        ["held out, and the best checkpoint chosen by", f"{report.held_out_captions:,} captions"],
        ["kept for a test", f"{report.test_captions:,} captions"],
        ["left out, as their images are held out", f"{report.dropped_pairs:,} pairs"],
        ["texts cut at the longest length", f"{report.truncated_texts:,}"],
    ]
    lines = ["## Data\n", table(["", ""], [row for row in rows if not str(row[1]).startswith("0")])]
    lines += [f"- {warning}" for warning in report.warnings]
    lines.append(
        "`split.safetensors` has hashes of the captions and images that the model was tuned on and that were held out, "
        "so that nobody measures it on what it has seen. Captions and images themselves are not in this repository.\n"
    )
    return "\n".join(lines)


def _counts(folder: Path, report: TuneReport) -> dict[tuple[str, str], int]:
    """Return how many cases a recall is a share of, by the part of the pairs and the direction."""
    record = SplitRecord.find(folder)
    images = {} if record is None else {p: len(record.contents(p)) for p in ("held_out", "test")}
    return {
        ("best", "image_to_text"): images.get("held_out", report.held_out_pairs),
        ("best", "text_to_image"): report.held_out_captions,
        ("test", "image_to_text"): images.get("test", report.test_pairs),
        ("test", "text_to_image"): report.test_captions,
    }


def _figures(report: TuneReport | None, counts: Mapping[tuple[str, str], int], results: Sequence[Result]) -> str:
    lines = ["## Figures\n"]
    measured = {} if report is None else {"best": report.best, "test": report.test}
    parts = {part: figures for part, figures in measured.items() if figures}
    if parts:
        header = {"best": "held out", "test": "test"}
        rows = []
        for name in next(iter(parts.values())):
            direction, _, kind = name.partition("/")
            row = [name]
            for part, figures in parts.items():
                is_share = kind.startswith("recall")
                row.append(interval(figures[name], counts[part, direction]) if is_share else f"{figures[name]:.3g}")
            rows.append(row)
        lines.append(table(["", *(header[part] for part in parts)], rows))
        lines.append(
            "In brackets: 95 % intervals (Wilson's). The best checkpoint was chosen by the held-out captions, so their "
            "figures are slightly optimistic" + ("; those of the test are not.\n" if "test" in parts else ".\n")
        )
    if results:
        rows = [
            [each.task, last_part(each.dataset), each.split or "-", name, _measure(measure), f"{each.images:,}"]
            for each in results
            for name, measure in each.metrics.items()
        ]
        lines.append("`lamplit evaluate`, with 95 % bootstrap intervals:\n")
        lines.append(table(["task", "data", "split", "figure", "value", "images"], rows))
    return "\n".join(lines) if len(lines) > 1 else ""


def _measure(measure: Measure) -> str:
    return f"{measure.value:.3f} ({measure.low:.3f} to {measure.high:.3f})"


def _settings(settings: Json, report: TuneReport | None) -> str:
    if report is None:
        return ""
    names = {field.name for field in fields(TuneSettings)}
    known = TuneSettings(**{name: value for name, value in settings.items() if name in names})
    head = report.trains.get("text head", {})
    chosen = known.for_pairs(report.training_pairs, leaves_out=head.get("state") == "fitted")
    rows = [[f"`{name}`", getattr(chosen, name)] for name in sorted(names) if getattr(chosen, name) is not None]
    took = f"{report.steps:,} steps in {report.seconds:,.0f} s; the model is that of step {report.best_step:,}.\n"
    return "\n".join(["## Settings\n", took, table(["setting of `lamplit tune`", ""], rows)])


def _loading(repository: str, config: Json, *, has_images: bool) -> str:
    text = config["text_tower"]
    targets = [to for to in _OPENED_BY if not (text and text.get("anchors") and to in ("transformers", "open-clip"))]
    rows = [[f"`lamplit export hf:{repository} --to {to} --out FOLDER`", f"`{_OPENED_BY[to]}`"] for to in targets]
    lacking = (
        " transformers and open_clip have a matrix as the last layer of a text tower, and this model's is a kernel "
        "head: neither can hold it."
        if text and text.get("anchors")
        else ""
    )
    python = ["import lamplit", "", f'model = lamplit.load("hf:{repository}")']
    python.append('ztxt = model.encode_texts(["an owl", "a hat"])')
    shell = [f'lamplit search hf:{repository} mine.lance "a hat"']
    if has_images:
        python += ['zimg = model.encode_images(["owl.png"])', "print(zimg @ ztxt.T)  # cosines"]
        shell[:0] = [
            f'lamplit classify hf:{repository} owl.png --classes "owl,hat"',
            f"lamplit embed IMAGES --image-tower model:hf:{repository} --out mine.lance",
        ]
    return "\n".join([
        "## How to load it\n", "\n".join(["```python", *python, "```\n"]), "\n".join(["```sh", *shell, "```\n"]),
        "Other libraries open what `lamplit export` writes; it compares the vectors before it ends, and says why if a "
        f"library cannot hold the model.{lacking}\n", table(["", "opens it"], rows),
    ])  # fmt: skip


def _base_models(config: Json) -> list[str]:
    """Return the names on the hub of the towers that the model was made of."""
    text = config["text_tower"] or {"spec": ""}
    specs = [config["image_tower"].spec, text["spec"]]
    names = [spec.removeprefix("hf:") for spec in specs if spec.startswith("hf:")]
    return list(dict.fromkeys(name for name in names if name.count("/") == 1))


def _eval_results(settings: Json, report: TuneReport | None, results: Sequence[Result]) -> list[EvalResult]:
    found: list[EvalResult] = []
    part = {} if report is None else report.test or report.best
    split = "test" if report is not None and report.test else "held_out"
    for name, value in part.items():
        if "/recall@" in name:
            data = str(settings["store"])
            found.append(
                EvalResult("image-text-retrieval", data, data, name, round(value, 4), dataset_split=split)
            )  # fmt: skip
    for each in results:
        data, measure = last_part(each.dataset), each.metrics[each.main_metric]
        task = each.task.replace(" ", "-")
        found.append(
            EvalResult(task, data, data, each.main_metric, round(measure.value, 4), dataset_split=each.split or None)
        )
    return found
