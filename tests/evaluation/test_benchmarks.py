from __future__ import annotations

import copy
import csv
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import pytest
import torch
from torch.nn import functional as F

import lamplit
from lamplit.data.decoding.images import decode_image, open_bytes
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import StoreError, TowerError, UsageError
from lamplit.evaluation import benchmark_images, benchmarks
from lamplit.evaluation.benchmark_images import with_preprocessing
from lamplit.evaluation.benchmarks import resized, run_benchmarks
from lamplit.evaluation.protocols.known import list_benchmarks, read_tasks
from lamplit.evaluation.protocols.tasks import Classification
from lamplit.metrics.bootstrap import measure
from lamplit.metrics.probe import draw, ridge_accuracy
from lamplit.metrics.results import read_results
from lamplit.model import LiT
from lamplit.store.embed import embedding
from lamplit.store.embed.embedding import EmbedReport
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.lock import Locked
from lamplit.zeroshot.names import templates
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES, canonicalize


@pytest.fixture
def by_class(image_folder: Path, tmp_path: Path) -> Path:
    """The shapes in a folder each."""
    root = tmp_path / "shapes"
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            (root / row["shape"]).mkdir(parents=True, exist_ok=True)
            shutil.copy(image_folder / row["path"], root / row["shape"])
    return root


@pytest.fixture
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


def accuracy_by_hand(model: LiT, root: Path, preprocessing: Preprocessing, prompts: list[str]) -> float:
    names = sorted(folder.name for folder in root.iterdir())
    classes = []
    for name in names:
        ztxt = model.encode_texts([prompt.replace("{}", name) for prompt in prompts])
        classes.append(ztxt.mean(0) / ztxt.mean(0).norm())
    assert isinstance(model.image_tower, Locked)
    right = []
    for name in names:
        for file in sorted((root / name).iterdir()):
            image = preprocessing.resize(decode_image(open_bytes(file)))[None]
            with torch.no_grad():
                vector = F.normalize(model.image_tower.tower.backbone(preprocessing.normalize(image)), dim=-1)[0]
            right.append(names[int(torch.stack([vector @ other for other in classes]).argmax())] == name)
    return sum(right) / len(right)


def test_folder_of_classes_by_hand(model: LiT, by_class: Path, tmp_path: Path) -> None:
    [found] = run_benchmarks(model, {"folder": by_class}, cache=tmp_path)
    own = model.identity.preprocessing
    assert own is not None
    squash = resized(own, "squash", 0.875, 0)
    expected = accuracy_by_hand(model, by_class, squash, templates("big_vision-8"))
    assert expected > 0.2
    assert found.metrics["accuracy@1"].value == pytest.approx(expected)
    assert (found.images, found.classes, found.skipped) == (60, 5, 0)
    assert (found.benchmark, found.dataset, found.language) == ("folder", "shapes", "en")
    assert found.protocol["templates"] == "big_vision-8"
    assert found.protocol["preprocessing"] == squash.in_words()
    assert "whatever the aspect ratio" in squash.in_words()
    assert [row["name"] for row in found.per_class] == ["circle", "cross", "ring", "square", "triangle"]


def test_second_model_of_the_same_tower_reads_no_image(
    model: LiT, model_path: Path, by_class: Path, tmp_path: Path
) -> None:
    [first] = run_benchmarks(model, {"folder": by_class}, cache=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(model_path, other)
    (other / "image_tower.safetensors").unlink()
    for file in by_class.glob("*/*"):
        file.write_bytes(b"")
    [again] = run_benchmarks(other, {"folder": by_class}, cache=tmp_path)
    assert (again.metrics, again.model["name"]) == (first.metrics, "other")
    assert len(list((tmp_path / "stores").iterdir())) == 1
    (by_class / "ring" / "new.png").write_bytes(b"")
    with pytest.raises(TowerError, match=r"image_tower\.safetensors"):
        run_benchmarks(other, {"folder": by_class}, cache=tmp_path)


def test_stopped_embedding_goes_on(model: LiT, by_class: Path, tmp_path: Path) -> None:
    whole = run_benchmarks(model, {"folder": by_class}, cache=tmp_path / "whole")[0]
    aside = tmp_path / "aside"
    shutil.move(by_class / "ring", aside)
    run_benchmarks(model, {"folder": by_class}, cache=tmp_path)  # another question, of the same images
    shutil.move(aside, by_class / "ring")
    assert run_benchmarks(model, {"folder": by_class}, cache=tmp_path)[0].metrics == whole.metrics


def test_image_that_cannot_be_used_is_counted_and_told(
    model: LiT, by_class: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (by_class / "ring" / "bad.png").write_bytes(b"no image")
    for _ in range(2):  # embedded, and from the cache
        caplog.clear()
        [found] = run_benchmarks(model, {"folder": by_class}, cache=tmp_path)
        assert (found.images, found.skipped) == (60, 1)
        told = [message for message in caplog.messages if "could not be used" in message]
        assert len(told) == 1
        assert told[0].startswith("shapes: 1 images could not be used; reasons in ")
        assert "ring/bad.png" in Path(told[0].rpartition(" ")[2]).read_text()


def test_none_of_the_images_can_be_used(model: LiT, by_class: Path, image_folder: Path, tmp_path: Path) -> None:
    """The store still has those that were there before."""
    root = coco(tmp_path / "coco", image_folder)
    run_benchmarks(model, [("folder", by_class), ("coco", root)], cache=tmp_path)
    for file in list(by_class.glob("*/*")):
        file.unlink()
        file.with_name(f"new-{file.name}").write_bytes(b"no image")
    said = "shapes: none of its 60 images could be used; reasons in (.*)"
    with pytest.raises(StoreError, match=said) as caught:
        run_benchmarks(model, {"folder": by_class}, cache=tmp_path)
    found = re.search(said, str(caught.value))
    assert found is not None
    assert len(Path(found[1]).read_text().splitlines()) == 60
    listed = (root / "dataset_coco.json").read_text()
    for file in list((root / "val2014").iterdir()):
        file.with_name(f"new-{file.name}").write_bytes(b"no image")
        listed = listed.replace(file.name, f"new-{file.name}")
    (root / "dataset_coco.json").write_text(listed)
    with pytest.raises(StoreError, match="MS-COCO: none of its 6 images could be used; reasons in "):
        run_benchmarks(model, {"coco": root}, cache=tmp_path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_image_that_cannot_be_used_may_have_a_line_separator_in_its_name(
    model: LiT, by_class: Path, separator: str, tmp_path: Path
) -> None:
    (by_class / "ring" / f"bad{separator}one.png").write_bytes(b"no image")
    for _ in range(2):  # embedded, and from the cache
        [found] = run_benchmarks(model, {"folder": by_class}, cache=tmp_path)
        assert (found.images, found.skipped) == (60, 1)


def test_names_that_are_not_utf8(model: LiT, by_class: Path, tmp_path: Path) -> None:
    [expected] = run_benchmarks(model, {"folder": by_class}, cache=tmp_path / "before")
    root = by_class.rename(os.fsdecode(os.fsencode(by_class.parent) + b"/form\xe9"))
    for number, file in enumerate(sorted((root / "ring").iterdir())):
        file.rename(os.fsdecode(os.fsencode(file.parent) + b"/caf\xe9%d.png" % number))
    (root / "square").rename(os.fsdecode(os.fsencode(root) + b"/squar\xe9"))
    for _ in range(2):  # embedded, and from the cache
        [found] = run_benchmarks(model, {"folder": root}, cache=tmp_path, out=tmp_path / "out")
        assert (found.images, found.skipped) == (60, 0)
    assert found.dataset == "form\\xe9"
    assert [row["name"] for row in found.per_class] == ["circle", "cross", "ring", "squar\\xe9", "triangle"]
    assert found.per_class[2]["images"] == expected.per_class[2]["images"]
    assert read_results(tmp_path / "out")[0].metrics == found.metrics


def test_templates_and_canonical_prompts(model: LiT, by_class: Path, tmp_path: Path) -> None:
    own = ["A Photo of a {}!"]
    [found] = run_benchmarks(
        model, {"folder": by_class}, templates=own, canonical=True, resize_mode="own", cache=tmp_path
    )
    preprocessing = model.identity.preprocessing
    assert preprocessing is not None
    clean = [canonicalize(prompt) for prompt in own]
    assert clean == ["a photo of a {}"]
    expected = accuracy_by_hand(model, by_class, preprocessing, clean)
    assert found.metrics["accuracy@1"].value == pytest.approx(expected)
    assert (found.protocol["templates"], found.protocol["canonicalized"]) == ("own", True)
    assert encoded_texts(tmp_path) == {
        f"a photo of a {name}" for name in ("circle", "cross", "ring", "square", "triangle")
    }
    [named] = run_benchmarks(model, {"folder": by_class}, templates="clip-7", resize_mode="own", cache=tmp_path)
    assert (named.protocol["templates"], named.protocol["prompts_per_name"]) == ("clip-7", 7)
    assert "prompts" not in named.protocol
    [default] = run_benchmarks(model, {"folder": by_class}, templates="lamplit", resize_mode="own", cache=tmp_path)
    assert (default.protocol["templates"], default.protocol["prompts_per_name"]) == ("lamplit", len(DEFAULT_TEMPLATES))
    [one] = run_benchmarks(
        model, {"folder": by_class}, templates=own[0], canonical=True, resize_mode="own", cache=tmp_path
    )
    assert (one.protocol, one.metrics) == (found.protocol, found.metrics)
    assert len(list((tmp_path / "stores").iterdir())) == 1


def encoded_texts(cache: Path) -> set[str]:
    """All prompts that were encoded."""
    tables = [lance.dataset(str(path)).to_table() for path in (cache / "texts").iterdir()]
    return {text for table in tables for text in table["text"].to_pylist()}


@pytest.mark.parametrize(("canonical", "expected"), [(True, "a photo of a bigring"), (False, "A Photo of a Big-Ring!")])
def test_canonical_names(model: LiT, by_class: Path, tmp_path: Path, canonical: bool, expected: str) -> None:
    (by_class / "circle").rename(by_class / "Big-Ring")
    run_benchmarks(model, {"folder": by_class}, templates=["A Photo of a {}!"], canonical=canonical, cache=tmp_path)
    assert expected in encoded_texts(tmp_path)


def test_crop_of_a_task(model: LiT, by_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet-A is cropped more than the others."""
    [task] = read_tasks("folder", by_class)
    assert isinstance(task, Classification)
    monkeypatch.setattr(benchmarks, "read_tasks", lambda name, _: [replace(task, crop=float(name))])
    found = run_benchmarks(
        model, {"0.75": by_class, "0.875": by_class, "0.5": by_class}, resize_mode="crop", cache=tmp_path
    )
    own = model.identity.preprocessing
    assert own is not None
    crops = [replace(own, fit="crop", crop_fraction=crop) for crop in (0.75, 0.875, 0.5)]
    assert [result.protocol["preprocessing"] for result in found] == [crop.in_words() for crop in crops]
    by_hand = [accuracy_by_hand(model, by_class, crop, templates("big_vision-8")) for crop in crops]
    assert [result.metrics["accuracy@1"].value for result in found] == pytest.approx(by_hand)
    assert by_hand[0] != by_hand[2], "the crop shows"


@pytest.mark.parametrize("part", ["center", "image_head"])
def test_centre_and_image_head(model: LiT, image_folder: Path, part: str, tmp_path: Path) -> None:
    """What the model does behind its image tower is done to a benchmark's images, too."""
    generator = torch.Generator().manual_seed(0)
    changed = lamplit.LiT(model.text_tower, model.identity, model.unlocked_image_tower)
    if part == "center":
        changed.center = F.normalize(torch.randn(model.width, generator=generator), dim=0)
    else:
        changed.image_head = torch.nn.Linear(model.width, model.width)
        torch.nn.init.orthogonal_(changed.image_head.weight, generator=generator)
    root = coco(tmp_path / "coco", image_folder)
    [found] = run_benchmarks(changed, {"coco": root}, resize_mode="own", cache=tmp_path)
    [plain] = run_benchmarks(model, {"coco": root}, resize_mode="own", cache=tmp_path)
    assert recalls_by_hand(changed, root) == pytest.approx({name: found.metrics[name].value for name in RECALLS})
    assert recalls_by_hand(model, root) == pytest.approx({name: plain.metrics[name].value for name in RECALLS})
    assert recalls_by_hand(changed, root) != recalls_by_hand(model, root)
    assert len(list((tmp_path / "stores").iterdir())) == 1, "the images are embedded once for both"


def test_tower_elsewhere_is_not_moved(image_tower: ImageTower) -> None:
    """Its weights are used where they are, and no image runs through it."""
    away = copy.deepcopy(image_tower).to("meta").train()
    squash = resized(away.preprocessing, "squash", 0.875, 0)
    other = with_preprocessing(away, squash)
    assert (other.preprocessing, other.width, other.spec) == (squash, away.width, away.spec)
    assert away.preprocessing == image_tower.preprocessing
    assert all(a is b for a, b in zip(other.parameters(), away.parameters(), strict=True))
    assert {parameter.device.type for parameter in other.parameters()} == {"meta"}
    assert away.training


def test_each_benchmark_is_embedded_where_the_model_is(
    model: LiT, by_class: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def embed(*given: Any, device: str, **options: Any) -> EmbedReport:
        devices.append(device)
        return embedding.embed(*given, device=device, **options)

    monkeypatch.setattr(benchmark_images, "embed", embed)
    monkeypatch.setattr("lamplit.store.embed.embedding.pick_device", lambda device: torch.device(device or "meta"))
    two = {"folder": by_class, "coco": coco(tmp_path / "coco", image_folder)}
    assert len(run_benchmarks(model, two, cache=tmp_path)) == 2
    assert devices == ["cpu", "cpu"]


def test_open_model_stays_where_it_is(model: LiT, by_class: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the model is open on cpu; move it with model\.to\('meta'\)"):
        run_benchmarks(model, {"folder": by_class}, device="meta", cache=tmp_path)


def test_each_result_is_written(model: LiT, by_class: Path, tmp_path: Path) -> None:
    found = run_benchmarks(model, {"folder": by_class}, out=tmp_path / "results", cache=tmp_path)
    [again] = read_results(tmp_path / "results")
    assert again.metrics == found[0].metrics
    assert all(e.startswith("data:image/jpeg;base64,") for c in again.confusions for e in c["examples"])


def test_one_benchmark_twice(model: LiT, by_class: Path, tmp_path: Path) -> None:
    """Two data sets of one name, each with a result of its own."""
    second = tmp_path / "elsewhere" / by_class.name
    shutil.copytree(by_class, second)
    shutil.rmtree(second / "ring")
    pairs = [("folder", by_class), ("folder", second)]
    found = run_benchmarks(model, pairs, out=tmp_path / "results", cache=tmp_path)
    assert [result.images for result in found] == [60, 48]
    assert sorted(result.images for result in read_results(tmp_path / "results")) == [48, 60]
    run_benchmarks(model, pairs, out=tmp_path / "results", resize_mode="own", cache=tmp_path)
    run_benchmarks(model, pairs, out=tmp_path / "results", templates=["{}"], cache=tmp_path)
    run_benchmarks(model, pairs, out=tmp_path / "results", templates=["A {}."], cache=tmp_path)
    assert len(read_results(tmp_path / "results")) == 8


def test_list_benchmarks() -> None:
    assert {"imagenet", "coco", "folder"} < set(list_benchmarks())


def test_what_cannot_be(model: LiT, model_path: Path, by_class: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no resize mode 'stretch'; type one of squash, crop, own"):
        run_benchmarks(model, {"folder": by_class}, resize_mode="stretch", cache=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no benchmark is called 'imagnet'"):
        run_benchmarks(model, {"imagnet": by_class}, cache=tmp_path)
    for given, said in (
        ("clip-81", r"there are no templates 'clip-81'; expected prompts with {}, or one of: lamplit, "),
        ([], "no templates to put the classes into"),
        (["a photo"], "template 'a photo' has no place for the class name"),
        ([3], "text 0 is 3, an int; expected a str"),
    ):
        with pytest.raises(UsageError, match=said):
            run_benchmarks(model, {"folder": by_class}, templates=given, cache=tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "stores").exists(), "refused before anything is embedded"
    text_only = lamplit.load(model_path, towers="text")
    with pytest.raises(StoreError, match="the model has no image tower"):
        run_benchmarks(text_only, {"folder": by_class}, cache=tmp_path)


def test_ways_to_show() -> None:
    own = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.95)
    assert resized(own, "own", 0.75, 0) == own
    assert resized(own, "crop", 0.75, 2) == Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.75, border=2)
    assert resized(own, "squash", 0.75, 0) == Preprocessing(
        (224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "squash"
    )
    with pytest.raises(UsageError, match="imported vectors"):
        resized(None, "own", 0.875, 0)


def coco(root: Path, image_folder: Path) -> Path:
    """Six of the drawings as MS-COCO's test split, by Karpathy's list; two of them have two captions."""
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:54:9]
    (root / "val2014").mkdir(parents=True)
    images = []
    for number, row in enumerate(rows):
        shutil.copy(image_folder / row["path"], root / "val2014" / row["path"])
        texts = [row["caption"], f"It is {row['caption']}"][: 2 if number < 2 else 1]
        image = {"filename": row["path"], "filepath": "val2014", "split": "test", "cocoid": number}
        images.append(image | {"sentences": [{"raw": text} for text in texts]})
    (root / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return root


RECALLS = ("image_to_text/recall@1", "text_to_image/recall@1")


def recalls_by_hand(model: LiT, root: Path) -> dict[str, float]:
    images = json.loads((root / "dataset_coco.json").read_text())["images"]
    texts = [(number, s["raw"]) for number, image in enumerate(images) for s in image["sentences"]]
    zimg = model.encode_images([root / "val2014" / image["filename"] for image in images])
    scores = zimg @ model.encode_texts([text for _, text in texts]).T
    owners = torch.tensor([number for number, _ in texts])
    hits = [bool((owners[scores[i].argsort(descending=True)[:1]] == i).any()) for i in range(6)]
    back = [int(scores[:, j].argmax()) == owner for j, owner in enumerate(owners.tolist())]
    return dict(zip(RECALLS, (sum(hits) / 6, sum(back) / 8), strict=True))


def test_retrieval_by_hand(model: LiT, image_folder: Path, tmp_path: Path) -> None:
    root = coco(tmp_path / "coco", image_folder)
    [found] = run_benchmarks(model, {"coco": root}, resize_mode="own", cache=tmp_path)
    assert (found.images, found.captions, found.task) == (6, 8, "image-text retrieval")
    assert recalls_by_hand(model, root) == pytest.approx({name: found.metrics[name].value for name in RECALLS})


def in_splits(by_class: Path, root: Path) -> Path:
    """A third of the images of each class in `test`, the others in `train`."""
    for folder in by_class.iterdir():
        for number, file in enumerate(sorted(folder.iterdir())):
            target = root / ("test" if number % 3 == 0 else "train") / folder.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return root


def test_few_shot_probe_embeds_what_is_drawn_and_no_more(model: LiT, by_class: Path, tmp_path: Path) -> None:
    root = in_splits(by_class, tmp_path / "split")
    zero_shot, probe = run_benchmarks(model, {"folder": root}, few_shot=2, resize_mode="own", cache=tmp_path)
    assert (zero_shot.task, probe.task) == ("zero-shot classification", "few-shot classification")
    assert (zero_shot.images, probe.images, probe.main_metric) == (20, 20, "2-shot_accuracy")
    names = sorted(folder.name for folder in by_class.iterdir())
    train, test = (sorted((root / part).glob("*/*")) for part in ("train", "test"))
    labels, truth = (torch.tensor([names.index(file.parent.name) for file in files]) for files in (train, test))
    zimg, asked = model.encode_images(train), model.encode_images(test)
    drawn_rows = [draw(labels, 2, seed) for seed in range(3)]
    by_hand = torch.stack([ridge_accuracy(zimg[rows], labels[rows], asked, truth) for rows in drawn_rows])
    assert probe.metrics["2-shot_accuracy"] == measure(by_hand.mean(0))
    assert measure(by_hand[0]) != measure(by_hand.mean(0)), "one draw alone would be seen"
    [drawn] = [Store(path) for path in (tmp_path / "stores").glob("folder-train-drawn*.lance")]
    assert len(drawn) == len(torch.unique(torch.cat(drawn_rows))) > 10, "three draws, not one"
    again = run_benchmarks(model, {"folder": root}, few_shot=2, resize_mode="own", cache=tmp_path)
    assert again[1].metrics == probe.metrics
    with pytest.raises(UsageError, match=r"class 0 has 8 examples and 9 are to be drawn"):
        run_benchmarks(model, {"folder": root}, few_shot=9, cache=tmp_path)


def test_training_images_that_cannot_be_used_are_told(model: LiT, by_class: Path, tmp_path: Path) -> None:
    root = in_splits(by_class, tmp_path / "split")
    rings = sorted((root / "train/ring").iterdir())
    for file in rings[:2]:
        file.write_bytes(b"no image")
    _, probe = run_benchmarks(model, {"folder": root}, few_shot=8, resize_mode="own", cache=tmp_path)
    assert (probe.images, probe.skipped) == (20, 0)
    assert probe.protocol["probe"].startswith("ridge regression on 6 to 8 training images a class, ")
    assert probe.protocol["notes"] == [
        "2 of the 40 training images that were drawn could not be used, and were left out"
    ]
    for file in rings:
        file.write_bytes(b"no image")
    said = r"split: none of the 8 training images that were drawn of class 'ring' could be used; reasons in "
    with pytest.raises(StoreError, match=said):
        run_benchmarks(model, {"folder": root}, few_shot=8, resize_mode="own", cache=tmp_path / "afresh")
