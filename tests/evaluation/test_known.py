from __future__ import annotations

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


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_splits_of_a_folder_are_not_classes(held_out: str, tmp_path: Path) -> None:
    write(tmp_path, f"{held_out}/cat/1.png", f"{held_out}/dog/2.png", "train/cat/3.png", "train/dog/4.png")
    task = only(tmp_path)
    assert task.class_names == [("cat",), ("dog",)]
    assert task.split == f"{held_out}, 2 images"
    assert task.training is not None
    assert dict(task.training().labels) == {"cat/3.png": (0,), "dog/4.png": (1,)}
    assert task.training().images.root == tmp_path / "train"


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


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "own", "cat/1.png")
    write(tmp_path / "elsewhere", "more/2.png")
    (tmp_path / "own/cat/linked").symlink_to(tmp_path / "elsewhere")
    assert list(only(tmp_path / "own").test.labels) == ["cat/1.png", "cat/linked/more/2.png"]


def test_a_folder_without_classes_or_with_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=r"has no folders; expected for folder: a folder of images for each class"):
        read_tasks("folder", tmp_path)
    write(tmp_path, "cat/1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(PairsError, match=r"dog holds no images; expected for folder"):
        read_tasks("folder", tmp_path)
