from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from lamplit.errors import PairsError, UsageError
from lamplit.evaluation.protocols.known import BENCHMARKS, read_tasks
from lamplit.evaluation.protocols.tasks import Classification


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(root / name)
    return root


def only(root: Path) -> Classification:
    [task] = read_tasks("folder", root)
    assert isinstance(task, Classification)
    return task


def test_unknown_benchmarks_are_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^no benchmark is called 'imagenet2'; there are babel-imagenet, caltech101, "
    ):
        read_tasks("imagenet2", tmp_path)


def test_every_benchmark_says_what_it_expects(tmp_path: Path) -> None:
    for name, (_, layout) in BENCHMARKS.items():
        with pytest.raises(PairsError) as caught:
            read_tasks(name, tmp_path / "nowhere")
        assert str(caught.value).endswith(f"; expected for {name}: {layout}")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "own/a/1.png", "own/b/1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert only(Path("~/own")).test.images.root == tmp_path / "own"


def test_classes_of_a_folder_come_in_natural_order(tmp_path: Path) -> None:
    root = write(tmp_path / "toys", "Class_10/1.png", "class_2/a/2.png", "class_2/1.png", "fire_truck/1.png")
    write(root, ".hidden/1.png", "class_2/.thumbs/1.png", "class_2/.1.png")
    (root / "class_2/notes.txt").touch()
    task = only(root)
    assert task.class_names == [("class 2",), ("Class 10",), ("fire truck",)]
    assert dict(task.test.labels) == {
        "Class_10/1.png": (1,), "class_2/1.png": (0,), "class_2/a/2.png": (0,), "fire_truck/1.png": (2,),
    }  # fmt: skip
    assert [pair.image for pair in task.test.images.pairs] == [root / name for name in task.test.images.ids]
    assert (task.title, task.split, task.notes) == ("toys", "all, 4 images", ())
    assert task.training is None


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train", "test"), ("train", "val"), ("train", "valid"), ("training_set", "test_set"), ("Train", "Validation"),
     ("train", "dev"), ("train2017", "val2017")],
)  # fmt: skip
def test_splits_of_a_folder_are_not_classes(train: str, held_out: str, tmp_path: Path) -> None:
    write(tmp_path, f"{held_out}/cat/1.png", f"{held_out}/dog/2.png", f"{train}/cat/3.png", f"{train}/dog/4.png")
    (tmp_path / "labels").mkdir()
    task = only(tmp_path)
    assert task.class_names == [("cat",), ("dog",)]
    assert task.split == f"{held_out}, 2 images"
    assert task.training is not None
    assert dict(task.training().labels) == {"cat/3.png": (0,), "dog/4.png": (1,)}
    assert task.training().images.root == tmp_path / train


def test_test_is_measured_where_several_splits_are_held_out(tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}/{name}/1.png" for split in ("dev", "test", "valid") for name in ("cat", "dog")))
    assert only(tmp_path).split == "test, 2 images"
    shutil.rmtree(tmp_path / "test")
    write(tmp_path, "test/without-classes.png")
    assert only(tmp_path).split == "dev, 2 images"


def test_images_to_train_on_alone_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/1.png")
    with pytest.raises(PairsError, match=r"has images to train on alone \(train\); put those to measure on into test"):
        only(tmp_path)
    assert only(tmp_path / "train").class_names == [("cat",), ("dog",)]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    task = only(write(tmp_path, "bus/1.png", "train/1.png", "train/steam/2.png"))
    assert (task.class_names, task.training) == ([("bus",), ("train",)], None)


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "images/cat/1.png", "images/dog/1.png")
    with pytest.raises(PairsError, match=r"one folder alone \(images\), .* every answer is right; type"):
        only(tmp_path)
    shutil.rmtree(tmp_path / "images/dog")
    with pytest.raises(PairsError, match=r"one folder alone \(cat\), .* every answer is right; expect"):
        only(tmp_path / "images")


def test_wordnet_ids_are_called_by_their_names(tmp_path: Path) -> None:
    write(tmp_path, *(f"val/{name}/1.png" for name in ("n03388043", "n11939491", "n00007846", "n99999999")))
    task = only(tmp_path)
    assert task.class_names == [("person",), ("fountain",), ("daisy",), ("n99999999",)]
    assert task.notes == ("n99999999 is a WordNet id whose name is not known",)
    (tmp_path / "val/n99999999/1.png").unlink()
    (tmp_path / "val/n99999999").rmdir()
    (tmp_path / "val/n00007846/1.png").unlink()
    (tmp_path / "val/n00007846").rmdir()
    assert only(tmp_path).notes == ()
    with pytest.raises(PairsError, match=r"has 2 of the 1,000 classes.*type folder="):
        read_tasks("imagenet", tmp_path)


def test_numbers_are_named_by_a_list_or_noted(tmp_path: Path) -> None:
    write(tmp_path, "0/1.png", "2/1.png", "10/1.png")
    assert "called by numbers (0)" in only(tmp_path).notes[0]
    (tmp_path / "classnames.txt").write_text("\n".join(f"thing {n}" for n in range(11)))
    task = only(tmp_path)
    assert (task.class_names, task.notes) == ([("thing 0",), ("thing 2",), ("thing 10",)], ())
    (tmp_path / "classnames.txt").write_text("one\ntwo")
    with pytest.raises(PairsError, match="has 2 names, and a folder is called 10"):
        only(tmp_path)


def test_folders_of_one_name_are_noted(tmp_path: Path) -> None:
    write(tmp_path, "fire_truck/1.png", "fire truck/1.png", "owl/1.png")
    note = "1 of the 3 names is another class's too (fire truck), and does not tell the two apart"
    assert only(tmp_path).notes == (note,)
    write(tmp_path, "n11939491/1.png", "daisy/1.png")
    note = "2 of the 5 names are another class's too (daisy, fire truck), and do not tell the two apart"
    assert only(tmp_path).notes == (note,)


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "own", "cat/1.png", "dog/1.png")
    write(tmp_path / "elsewhere", "more/2.png")
    (tmp_path / "own/cat/linked").symlink_to(tmp_path / "elsewhere")
    assert list(only(tmp_path / "own").test.labels) == ["cat/1.png", "cat/linked/more/2.png", "dog/1.png"]


def test_a_folder_without_classes_or_with_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=r"has no folders; expected for folder: a folder of images for each of two"):
        read_tasks("folder", tmp_path)
    write(tmp_path, "cat/1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(PairsError, match=r"dog holds no images; expected for folder"):
        read_tasks("folder", tmp_path)
