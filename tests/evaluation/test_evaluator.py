from __future__ import annotations

import base64
import csv
import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_store
from packed_images import drawings, pack
from PIL import Image

import lamplit
from lamplit.data.pairs import Pair
from lamplit.data.sources import read_pairs
from lamplit.errors import StoreError, TowerError, UsageError
from lamplit.evaluation.evaluator import evaluate
from lamplit.evaluation.result_building import thumbnail
from lamplit.metrics.results import Result, read_results
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.tuning.run_folder import claim
from lamplit.tuning.settings import TuneSettings
from lamplit.tuning.split import split_store
from lamplit.zeroshot.classifier import class_list, class_vectors


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


def recall_by_hand(store: Store, model: LiT, pairs: list[tuple[int, str]], k: int) -> float:
    """Image to caption."""
    texts = sorted({text for _, text in pairs})
    scores = store.vectors() @ model.encode_texts(texts).T
    rows = sorted({row for row, _ in pairs})
    found = [any((row, texts[i]) in pairs for i in scores[row].argsort(descending=True)[:k].tolist()) for row in rows]
    return sum(found) / len(found)


def values(result: Result) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def same(first: list[Result], second: list[Result]) -> bool:
    """Whether two runs measured the same; when they did and how long it took may differ."""
    return [replace(r, time="", seconds=0) for r in first] == [replace(r, time="", seconds=0) for r in second]


def test_retrieval_on_a_store(model: LiT, store: Store) -> None:
    [found] = evaluate(model, store)
    pairs = [(row, texts[0]) for row, texts in enumerate(store.texts())]
    for k in (1, 5, 10):
        assert found.metrics[f"image_to_text/recall@{k}"].value == pytest.approx(recall_by_hand(store, model, pairs, k))
    assert (found.images, found.captions, found.skipped) == (60, 60, 0)
    assert (found.task, found.dataset, found.language) == ("image-text retrieval", store.path, "own")
    assert (found.split, found.column) == ("all", "texts")
    assert found.protocol["split"] == "all captions, column texts"
    assert found.model["image_tower"] == model.identity.spec
    recalls = [value for name, value in values(found).items() if "/recall@" in name]
    assert found.metrics["mean_recall"].value == pytest.approx(sum(recalls) / 6)
    assert len(found.recall_curve["image_to_text"]) == 100
    assert found.recall_curve["image_to_text"][4] == pytest.approx(found.metrics["image_to_text/recall@5"].value)
    assert same([found], evaluate(model, store.path))
    assert same([found], evaluate(model, Path(store.path)))


def test_others_are_measured_on_the_same_pairs(
    store: Store, model_path: Path, image_folder: Path, tmp_path: Path
) -> None:
    """The first model's held-out captions are those of all, in its store and in pairs that another tower embeds."""
    tuned = tuned_on(store, model_path, tmp_path / "run", val_fraction=0.2)
    plain = lamplit.load(model_path)
    plain.name = "plain"
    [first, second] = evaluate(tuned, store, beside=[plain])
    assert same([first], evaluate(tuned, store))
    assert (first.captions, first.images, first.split) == (second.captions, second.images, second.split)
    assert first.captions == 12
    assert values(first) == values(second), "the same weights on the same pairs"
    assert second.model["name"] == "plain"
    torch.manual_seed(5)
    other = lamplit.open_image_tower("timm:test_vit2", weights="random")
    text = lamplit.open_text_tower("scratch:tiny", width=other.width, texts=["a small red circle"])
    another = LiT(text, other.identity(), other)
    [_, found] = evaluate(tuned, image_folder / "pairs.csv", beside=[another])
    assert (found.captions, found.images) == (12, first.images)
    with pytest.raises(StoreError, match="fingerprint"):
        evaluate(tuned, store, beside=[another])
    [_, again] = evaluate(plain, store, beside=[tuned], split="all")
    assert again.captions == 60
    assert "was tuned on 48 of the 60 captions" in " ".join(again.protocol["notes"])


def tuned_on(store: Store, model_path: Path, folder: Path, **settings: Any) -> LiT:
    """Open the model as one that a run with these settings left in `folder`."""
    asked = TuneSettings("demo:minilm", **settings)
    claim(folder, store, asked)
    shutil.copytree(model_path, folder, dirs_exist_ok=True)
    split = split_store(store, asked.text_column, asked.val_fraction, asked.seed, asked.test_fraction)
    split.record.write(folder / "split.safetensors")
    return lamplit.load(folder)


def test_held_out_only(model_path: Path, store: Store, tmp_path: Path) -> None:
    model = tuned_on(store, model_path, tmp_path / "run", val_fraction=0.3, seed=3)
    [found] = evaluate(model, store)
    links = split_store(store, "texts", 0.3, 3).held_out
    assert found.split == "held_out"
    expected = "captions held out of the run that made the model (18 of 60, 42 were tuned on), column texts"
    assert found.protocol["split"] == expected
    [note] = found.protocol["notes"]
    assert note == "the run chose its best checkpoint by these captions, so the figures are slightly optimistic"
    assert (found.images, found.captions) == (18, 18)
    pairs = [(row, store.texts()[row][0]) for row in links.image_index.tolist()]
    assert found.metrics["image_to_text/recall@1"].value == pytest.approx(recall_by_hand(store, model, pairs, 1))


def test_splits(model_path: Path, store: Store, image_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = tuned_on(store, model_path, run, val_fraction=0.2)
    captions = {split: evaluate(model, store, split=split)[0].captions for split in ("auto", "held_out", "all")}
    assert captions == {"auto": 12, "held_out": 12, "all": 60}
    assert evaluate(run, store.path)[0].captions == 12, "paths are taken too"
    assert evaluate(model, image_folder / "pairs.csv")[0].captions == 12, "and the pairs that the store was made of"
    unknown = lamplit.load(model_path)
    assert evaluate(unknown, store)[0].captions == 60
    with pytest.raises(UsageError, match=r"nothing is known of what .* was tuned on.*: --split all"):
        evaluate(unknown, store, split="held_out")
    with pytest.raises(UsageError, match=r"was tuned on pairs of .* none of the others were kept for 'test'"):
        evaluate(model, store, split="test")
    with pytest.raises(UsageError, match="there is no split 'train'; expected one of: auto, held_out, test, all"):
        evaluate(model, store, split="train")  # type: ignore[arg-type]


def test_test_captions_go_before_held_out_ones(model_path: Path, store: Store, tmp_path: Path) -> None:
    model = tuned_on(store, model_path, tmp_path / "run", val_fraction=0.2, test_fraction=0.1)
    [found] = evaluate(model, store)
    assert (found.split, found.captions, found.protocol["notes"]) == ("test", 6, [])
    assert [evaluate(model, store, split=split)[0].captions for split in ("test", "held_out")] == [6, 12]


def made(path: Path, store: Store, changes: dict[int, dict[str, Any]], rows: Sequence[int], new: int = 0) -> Store:
    """Write some rows of a store elsewhere, some changed, and new ones."""
    texts, vectors, names, hashes = store.texts(), store.vectors(), store.column("id"), store.column("hash")
    kept = [Row(names[i], f"{i}.png", hashes[i], texts[i], vectors[i], {}) for i in rows]
    kept = [replace(row, **changes.get(i, {})) for row, i in zip(kept, rows, strict=True)]
    kept += [Row(f"new {i}", "", f"new hash {i}", [f"new caption {i}"], vectors[i], {}) for i in range(new)]
    columns = sorted({name for row in kept for name in row.metadata})
    return Store.create(path, store.tower, kept, backend="torch", metadata_columns=columns)


def test_record_knows_pairs_wherever_they_are(model_path: Path, store: Store, tmp_path: Path) -> None:
    """A grown, pruned, copied store: no caption that was tuned on is measured, and the split line has the numbers."""
    model = tuned_on(store, model_path, tmp_path / "run", val_fraction=0.2)
    split = split_store(store, "texts", 0.2, 0)
    held_out, train = split.held_out.image_index.tolist(), split.train.image_index.tolist()
    grown = evaluate(model, made(tmp_path / "grown.lance", store, {}, range(60), new=30))[0]
    assert (grown.split, grown.captions) == ("held_out", 12)
    assert "(12 of 90, 48 were tuned on, 30 are in no part that is measured)" in grown.protocol["split"]
    assert values(grown) == values(evaluate(model, store)[0])
    pruned = evaluate(model, made(tmp_path / "pruned.lance", store, {}, [*held_out[:5], *train[:20]]))[0]
    assert (pruned.split, pruned.captions) == ("held_out", 5)
    shutil.copytree(store.path, tmp_path / "moved.lance")
    assert values(evaluate(model, tmp_path / "moved.lance")[0]) == values(grown)
    copy = lamplit.load(tmp_path / "run")
    copy.save(tmp_path / "copy")
    assert values(evaluate(tmp_path / "copy", store)[0]) == values(grown), "a saved model keeps what it was tuned on"
    # A held-out image with a second caption that was tuned on: that caption is not measured.
    texts = store.texts()
    both = {held_out[0]: {"texts": [*texts[held_out[0]], *texts[train[0]]]}}
    assert evaluate(model, made(tmp_path / "both.lance", store, both, range(60)))[0].captions == 12


def test_pairs_that_share_no_image_are_measured_whole(model_path: Path, store: Store, tmp_path: Path) -> None:
    model = tuned_on(store, model_path, tmp_path / "run", val_fraction=0.2)
    others = made(tmp_path / "others.lance", store, {}, [], new=20)
    [found] = evaluate(model, others)
    assert (found.split, found.captions, found.protocol["notes"]) == ("all", 20, [])
    with pytest.raises(UsageError, match=r"was not tuned on .*others.lance: it shares no image"):
        evaluate(model, others, split="held_out")
    again = {i: {"hash": f"encoded again {i}"} for i in range(60)}
    [found] = evaluate(model, made(tmp_path / "again.lance", store, again, range(60)))
    assert (found.split, found.captions) == ("all", 60)
    assert found.protocol["notes"] == ["48 of 60 captions were tuned on, with other images"]


def test_classes_are_told_apart_on_images_that_were_not_tuned_on(
    model_path: Path, store: Store, tmp_path: Path
) -> None:
    """Those of the captions that are measured, and images that the run never saw."""
    model = tuned_on(store, model_path, tmp_path / "run", val_fraction=0.2, test_fraction=0.1)
    parts = split_store(store, "texts", 0.2, 0, 0.1)

    def measured(split: str) -> Result:
        return evaluate(model, store, split=split, label_column="shape")[1]  # type: ignore[arg-type]

    for split, rows in (("test", parts.test), ("held_out", parts.held_out)):
        found = measured(split)
        assert (found.split, found.images) == (split, len(rows))
        kept = rows.image_index.tolist()
        classes = sorted(set(store.column("shape")))
        entries = class_vectors(model, classes)
        answers = (store.vectors()[kept] @ entries.T).argmax(1).tolist()
        right = [classes[answer] == store.column("shape")[row] for answer, row in zip(answers, kept, strict=True)]
        assert found.metrics["accuracy@1"].value == pytest.approx(sum(right) / len(right))
    assert measured("auto").images == measured("test").images
    everything = measured("all")
    assert (everything.images, everything.protocol["split"]) == (60, "all 60 images, column shape")
    assert everything.protocol["notes"] == ["42 of 60 images were tuned on"]


def test_pairs_that_were_all_tuned_on(
    model_path: Path, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tuned_on(store, model_path, tmp_path / "run", val_fraction=0.0)
    with pytest.raises(UsageError, match=r"was tuned on all captions of .* --split all"):
        evaluate(model, store)
    with pytest.raises(UsageError, match=r"was tuned on all captions of .* --split all"):
        evaluate(model, store, label_column="shape")
    labelled = {0: {"hash": "an image without a caption", "texts": [], "metadata": {"shape": "ring"}}}
    [found] = evaluate(model, made(tmp_path / "one.lance", store, labelled, range(60)), label_column="shape")
    assert (found.task, found.images) == ("zero-shot classification", 1)
    assert "was tuned on all captions of" in caplog.text
    [found] = evaluate(model, made(tmp_path / "grown.lance", store, {}, range(60), new=30))
    assert (found.split, found.captions) == ("unseen", 30)
    assert evaluate(model, store, split="all")[0].captions == 60


def test_run_without_a_record_says_so(
    model_path: Path, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned_on(store, model_path, tmp_path / "run", val_fraction=0.2)
    (tmp_path / "run" / "split.safetensors").unlink()
    [found] = evaluate(tmp_path / "run", store)
    assert (found.split, found.captions) == ("all", 60)
    assert "tuned by an earlier lamplit, which did not keep what it was tuned on" in found.protocol["notes"][0]
    assert found.protocol["notes"][0] in caplog.text


def test_copies_are_one_image_and_right(model: LiT, store: Store, tmp_path: Path) -> None:
    hashes = store.column("hash")
    copies = {i + 30: {"hash": hashes[i]} for i in range(30)}
    [found] = evaluate(model, made(tmp_path / "copies.lance", store, copies, range(60)))
    assert (found.images, found.captions) == (30, 60)


def test_equal_captions_are_told_with_the_figures_of_each_pair(model: LiT, store: Store, tmp_path: Path) -> None:
    texts = store.texts()
    equal = {i + 30: {"texts": [texts[i][0].upper()]} for i in range(30)}
    twice = made(tmp_path / "equal.lance", store, equal, range(60))
    [found] = evaluate(model, twice)
    assert (found.images, found.captions) == (60, 30)
    cosines = (store.vectors() @ model.encode_texts([texts[i % 30][0] for i in range(60)]).T).double()
    right = cosines.diagonal()
    to_text, to_image = ((cosines >= right[:, None]).sum(1), (cosines >= right[None]).sum(0))
    expected = [(ranks <= 1).double().mean() for ranks in (to_text, to_image)]
    assert found.protocol["notes"] == [
        "captions that are equal but for their case are one: 30 of 60 pairs; with a caption for each pair and only its "
        f"own image right, image_to_text/recall@1 {expected[0]:.3f} and text_to_image/recall@1 {expected[1]:.3f}"
    ]


def test_column_is_the_one_of_the_run_unless_asked_for_another(model_path: Path, store: Store, tmp_path: Path) -> None:
    english = tuned_on(store, model_path, tmp_path / "english", val_fraction=0.3)
    model = tuned_on(store, model_path, tmp_path / "german", val_fraction=0.3, text_column="german")
    asked = evaluate(model, store, text_column="german")
    assert same(evaluate(model, store), asked)
    held_out_rows = split_store(store, "texts", 0.3, 0).held_out.image_index.tolist()
    [found] = evaluate(english, store, text_column="german")
    pairs = [(row, store.texts("german")[row][0]) for row in held_out_rows]
    assert found.metrics["image_to_text/recall@5"].value == pytest.approx(recall_by_hand(store, model, pairs, 5))
    assert values(found) != values(evaluate(english, store)[0])


def check_zero_shot(found: Result, store: Store, model: LiT, names: list[str], templates: list[str]) -> None:
    scores = store.vectors() @ class_vectors(model, names, templates).T
    labels = [str(label) for label in store.column("shape")]
    best = [[names[i] for i in row.argsort(descending=True).tolist()] for row in scores]
    for k in (1, 5):
        right = [label in row[:k] for label, row in zip(labels, best, strict=True)]
        assert found.metrics[f"accuracy@{k}"].value == pytest.approx(sum(right) / len(right))
    by_hand = []
    for name in names:
        right = [row[0] == name for label, row in zip(labels, best, strict=True) if label == name]
        if right:
            by_hand.append({"name": name, "images": len(right), "accuracy": pytest.approx(sum(right) / len(right))})
    assert list(found.per_class) == by_hand
    mean = sum(row["accuracy"] for row in found.per_class) / len(by_hand)
    assert found.metrics["mean_class_accuracy"].value == pytest.approx(mean)
    assert (found.classes, found.protocol["templates"]) == (len(names), templates)
    assert sum(row["images"] for row in found.reliability["bins"]) == len(labels)


def test_labels_give_zero_shot_accuracy_and_each_classs_own(model: LiT, store: Store) -> None:
    retrieval, found = evaluate(model, store, label_column="shape", templates=["{}", "A {}."])
    check_zero_shot(found, store, model, ["circle", "cross", "ring", "square", "triangle"], ["{}", "A {}."])
    assert same([retrieval], evaluate(model, store))


def test_more_classes_to_choose_from(model: LiT, store: Store) -> None:
    names = ["ring", "dog", "circle", "cross", "triangle", "square", "cat"]
    [_, found] = evaluate(model, store, label_column="shape", class_names=names, templates=["{}"])
    check_zero_shot(found, store, model, names, ["{}"])


def test_class_list_brings_its_prompts_and_its_temperature(model: LiT, store: Store) -> None:
    names = ["ring", "circle", "cross", "triangle", "square"]
    classes = replace(class_list(model, names, ["{}"]), logit_multiplier=30.0)
    [_, found] = evaluate(model, store, label_column="shape", class_names=classes)
    check_zero_shot(found, store, model, names, ["{}"])
    [_, plain] = evaluate(model, store, label_column="shape", class_names=names, templates=["{}"])
    assert values(found) == values(plain)
    assert found.reliability != plain.reliability


def test_class_that_was_not_given_is_named(model: LiT, store: Store) -> None:
    with pytest.raises(StoreError, match="'shape' has classes that were not given: square, triangle"):
        evaluate(model, store, label_column="shape", class_names=["ring", "circle", "cross"])
    with pytest.raises(StoreError, match=r"has no column 'kind'; it has: .*shape"):
        evaluate(model, store, label_column="kind")
    with pytest.raises(UsageError, match="classes given twice: ring"):
        evaluate(
            model, store, label_column="shape", class_names=["ring", "circle", "cross", "ring", "square", "triangle"]
        )


def test_class_names_need_a_label_column(model: LiT, store: Store) -> None:
    with pytest.raises(UsageError, match="class_names needs label_column="):
        evaluate(model, store, class_names=["ring", "circle"])


def test_template_set_that_does_not_exist(model: LiT, store: Store) -> None:
    with pytest.raises(UsageError, match=r"there are no templates 'clip-81'; expected prompts with {}, or one of"):
        evaluate(model, store, label_column="shape", templates="clip-81")


def made_up_store(path: Path, model: LiT, texts: list[list[str]], labels: list[str | None]) -> Store:
    """Write a store under the model's own tower."""
    vectors = torch.randn(len(texts), model.identity.width, generator=torch.Generator().manual_seed(0))
    made = write_store(path, vectors, texts, [{"kind": label, "empty": None} for label in labels])
    rows = [
        Row(row["id"], row["path"], row["hash"], row["texts"], vector, {"kind": row["kind"]})
        for row, vector in zip(made.rows(range(len(texts))), made.vectors(), strict=True)
    ]
    own = path.with_name(f"own_{path.name}")
    return Store.create(own, model.identity, rows, backend="torch", metadata_columns=["kind", "empty"])


def test_equal_captions_are_said(model: LiT, tmp_path: Path) -> None:
    store = made_up_store(tmp_path / "a.lance", model, [["A ring"], ["a ring"], ["a cross"]], ["ring", "ring", "cross"])
    [found] = evaluate(model, store)
    assert (found.images, found.captions) == (3, 2)
    [note] = found.protocol["notes"]
    assert note.startswith("captions that are equal but for their case are one: 2 of 3 pairs; with a caption for each")


def test_images_without_a_label_do_not_count(model: LiT, tmp_path: Path) -> None:
    store = made_up_store(tmp_path / "a.lance", model, [[], ["a ring"], [], []], ["ring", None, "cross", "ring"])
    retrieval, found = evaluate(model, store, label_column="kind")
    assert {row["name"]: row["images"] for row in found.per_class} == {"ring": 2, "cross": 1}
    assert (retrieval.captions, retrieval.images) == (1, 1)


def test_labels_are_read_as_make_classes_reads_them(model: LiT, tmp_path: Path) -> None:
    """Without what stands around them; and `none` is an image of none of the classes."""
    labels = ["ring ", "none", " cross", "ring"]
    store = made_up_store(tmp_path / "a.lance", model, [[]] * 4, labels)
    [found] = evaluate(model, store, label_column="kind")
    assert {row["name"]: row["images"] for row in found.per_class} == {"ring": 2, "cross": 1}
    assert found.protocol["class_names"] == "cross, ring"
    assert found.protocol["notes"] == ["images that are labelled 'none' (1), of none of the classes, do not count"]
    [named] = evaluate(model, store, label_column="kind", class_names=["ring", "none", "cross"])
    assert named.images == 4
    with pytest.raises(UsageError, match="no classes"):
        evaluate(model, store, label_column="kind", class_names=[])


def test_class_list_that_does_not_fit_is_refused(model: LiT, store: Store) -> None:
    names = ["ring", "circle", "cross", "triangle", "square"]
    classes = class_list(model, names, ["{}"])
    with pytest.raises(UsageError, match="has templates of its own"):
        evaluate(model, store, label_column="shape", class_names=classes, templates="clip-80")
    with pytest.raises(UsageError, match="do not exclude each other"):
        evaluate(
            model, store, label_column="shape", class_names=replace(classes, logit_bias=-10.0, thresholds=[0.5] * 5)
        )


def test_results_of_other_class_names_have_files_of_their_own(model: LiT, store: Store) -> None:
    shapes = ["ring", "circle", "cross", "triangle", "square"]
    others = [shapes, [*shapes, "dog"], [*shapes, "cat"], ["cat", *shapes]]
    names = {evaluate(model, store, label_column="shape", class_names=given)[-1].file_name for given in others}
    assert len(names) == len(others)


def test_labels_that_are_numbers_are_places_in_the_list(model: LiT, tmp_path: Path) -> None:
    def measured(path: str, labels: list[str | None], **options: Any) -> Result:
        store = made_up_store(tmp_path / path, model, [[]] * 4, labels)
        return evaluate(model, store, label_column="kind", **options)[0]

    by_name = measured("a.lance", ["ring", "cross", None, "ring"], class_names=["cross", "star", "ring"])
    by_place = measured("b.lance", ["2", "0", None, "2"], class_names=["cross", "star", "ring"])
    assert (values(by_place), by_place.per_class) == (values(by_name), by_name.per_class)
    assert by_place.protocol["notes"] == ["labels are numbers, so they are places in the list of classes: 0 is cross"]
    with pytest.raises(StoreError, match="that were not given: 3"):
        measured("c.lance", ["3", "0", "1", "2"], class_names=["cross", "star", "ring"])
    [note] = measured("d.lance", ["2", "0", "1", "2"]).protocol["notes"]
    assert note == "the classes are called by numbers (0), which no model reads; give their names"


def test_errors_about_pairs_do_not_name_a_temporary_store(model: LiT, image_folder: Path) -> None:
    for options in ({"label_column": "none"}, {"text_column": "none"}):
        with pytest.raises(StoreError, match=r"pairs\.csv has no column 'none'") as caught:
            evaluate(model, image_folder / "pairs.csv", **options)
        assert "lance" not in str(caught.value)


def test_nothing_to_evaluate_with_is_an_error(model: LiT, tmp_path: Path) -> None:
    store = made_up_store(tmp_path / "a.lance", model, [[], []], ["ring", "cross"])
    with pytest.raises(UsageError, match=r"no texts in column 'texts' and no --label-column .*: kind, empty"):
        evaluate(model, store)
    with pytest.raises(StoreError, match=r"column 'empty' of .* is empty"):
        evaluate(model, store, label_column="empty")


def test_other_tower_is_refused(model: LiT, words_path: Path) -> None:
    with pytest.raises(StoreError, match=r"was embedded by module:made\.up"):
        evaluate(model, words_path)


def test_file_of_pairs_is_embedded_first(model: LiT, store: Store, image_folder: Path) -> None:
    found = evaluate(model, image_folder / "pairs.csv", label_column="shape")
    stored = evaluate(model, store, label_column="shape")
    for one, other in zip(found, stored, strict=True):
        assert (one.dataset, one.benchmark) == (str(image_folder / "pairs.csv"), "pairs")
        assert values(one) == pytest.approx(values(other))


def test_folder_is_embedded_first_and_what_cannot_be_is_listed(
    model: LiT, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (image_folder / "pairs.csv").open(encoding="utf-8") as file:
        for row in list(csv.DictReader(file))[:8]:
            shutil.copy(image_folder / row["path"], tmp_path)
            (tmp_path / row["path"]).with_suffix(".txt").write_text(row["caption"])
    (tmp_path / "bad.png").write_bytes(b"not an image")
    (tmp_path / "bad.txt").write_bytes("Käse".encode("latin-1"))
    caplog.set_level("INFO", "lamplit")
    [found] = evaluate(model, tmp_path)
    note = "texts that are not UTF-8 are read as Windows-1252 (Latin-1), such as bad.txt"
    assert found.protocol["notes"] == [note]
    assert caplog.messages.count(note) == 1
    assert (found.dataset, found.images, found.captions, found.skipped) == (str(tmp_path), 8, 8, 1)
    [told] = [message for message in caplog.messages if message.startswith("skipped")]
    assert told.startswith(f"skipped {tmp_path / 'bad.png'}: ")
    assert found.metrics["image_to_text/recall@10"].value == 1
    assert not list(tmp_path.glob("*.lance")), "nothing is kept"


def test_images_need_the_image_tower(model_path: Path, image_folder: Path) -> None:
    with pytest.raises(TowerError, match="is not a store, and the model is open without its image tower"):
        evaluate(lamplit.load(model_path, towers="text"), image_folder / "pairs.csv")


def test_written_results_are_read_again_with_images_of_what_was_confused(
    model: LiT, store: Store, tmp_path: Path
) -> None:
    found = evaluate(model, store, label_column="shape", out=tmp_path / "results")
    again = read_results(tmp_path / "results")
    assert sorted(r.task for r in again) == ["image-text retrieval", "zero-shot classification"]
    for result in found:
        [same_again] = [other for other in again if other.task == result.task]
        assert same_again.metrics == result.metrics
        assert same_again.protocol == result.protocol
    assert found[1].confusions, "a model of this size confuses something"
    for confusion in found[1].confusions:
        assert confusion["class"] != confusion["predicted"]
        for example in confusion["examples"]:
            head, data = example.split(",")
            assert head == "data:image/jpeg;base64"
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)
    assert all(not c["examples"] for c in evaluate(model, store, label_column="shape")[1].confusions)


def test_results_of_a_model_are_written_before_the_next_is_opened(
    model_path: Path, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no folder no-such-model"):
        evaluate(model_path, store, beside=["no-such-model"], label_column="shape", out=tmp_path / "out")
    written = read_results(tmp_path / "out")
    assert {result.task for result in written} == {"image-text retrieval", "zero-shot classification"}


def test_results_stay_beside_each_other(
    model: LiT, model_path: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two columns, two stores of one name, two models of one name, and one measurement made again."""
    other_store, other_model = tmp_path / "b" / Path(store.path).name, tmp_path / "b" / model_path.name
    shutil.copytree(store.path, other_store)
    shutil.copytree(model_path, other_model)
    tuned = lamplit.load(other_model)
    assert tuned.text_tower is not None
    with torch.no_grad():
        tuned.text_tower.head.bias += 0.1
    out = tmp_path / "results"
    for _ in range(2):
        evaluate(model, store, out=out)
        evaluate(model, store, text_column="german", out=out)
        evaluate(model, other_store, out=out)
        evaluate(tuned, store, out=out)
    found = read_results(out)
    assert len(found) == 4
    assert len({result.model["fingerprint"] for result in found}) == 2
    assert {result.model["name"] for result in found} == {model_path.name}
    for folder in (Path(store.path).parent, other_store.parent):  # seen from where they are, both have one name
        monkeypatch.chdir(folder)
        evaluate(model, other_store.name, out=tmp_path / "near")
    assert {result.source for result in read_results(tmp_path / "near")} == {store.path, str(other_store)}


@pytest.mark.parametrize("name", ["shard.tar", "cells.parquet"])
def test_thumbnail_of_an_image_inside_a_file(image_folder: Path, tmp_path: Path, name: str) -> None:
    pack(tmp_path, drawings(image_folder, 3))
    for pair in read_pairs(tmp_path / name):
        assert thumbnail(Path(pair.path)) == thumbnail(encoded(pair))


def encoded(pair: Pair) -> bytes:
    assert isinstance(pair.image, bytes)
    return pair.image


def test_thumbnail_of_a_image_that_is_gone(tmp_path: Path) -> None:
    assert thumbnail(tmp_path / "gone.png") == ""
