from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from lamplit.errors import PairsError
from lamplit.evaluation.protocols.known import read_tasks
from lamplit.evaluation.protocols.tasks import Classification, Retrieval


def write(file: Path, members: dict[str, str]) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A data set as CLIP_benchmark 1.6.2 exports it: the numbers are places in classnames.txt."""
    write(
        tmp_path / "test/0.tar", {"s0000000.cls": "1", "s0000000.webp": "A", "s0000001.cls": "0", "s0000001.webp": "B"}
    )
    write(tmp_path / "test/1.tar", {"s0000002.cls": "1", "s0000002.webp": "C"})
    write(
        tmp_path / "train/0.tar", {"s0000000.cls": "0", "s0000000.webp": "D", "s0000001.cls": "1", "s0000001.webp": "E"}
    )
    (tmp_path / "test/nshards.txt").write_text("2\n")
    (tmp_path / "classnames.txt").write_text("tree frog\nold owl\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nart of {c}\n")
    return tmp_path


def test_classes_prompts_and_labels(exported: Path) -> None:
    [task] = read_tasks("folder", exported)
    assert isinstance(task, Classification)
    assert dict(task.test.labels) == {"s0000000": (1,), "s0000001": (0,), "s0000002": (1,)}
    assert task.class_names == [("tree frog",), ("old owl",)]
    assert task.template_texts == ["a photo of a {}.", "art of {}"]
    assert task.split == "test, 3 images"
    assert [pair.image for pair in task.test.images.pairs] == [b"A", b"B", b"C"]
    assert task.training is not None
    assert dict(task.training().labels) == {"s0000000": (0,), "s0000001": (1,)}


def test_other_names_of_splits(exported: Path) -> None:
    (exported / "test").rename(exported / "valid")
    (exported / "train").rename(exported / "training")
    [task] = read_tasks("folder", exported)
    assert isinstance(task, Classification)
    assert task.split == "valid, 3 images"
    assert task.training is not None
    assert len(task.training().labels) == 2


def test_captions(tmp_path: Path) -> None:
    write(tmp_path / "test/0.tar", {"s0000000.jpg": "A", "s0000000.txt": "one\ntwo"})
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    [task] = read_tasks("folder", tmp_path)
    assert isinstance(task, Retrieval)
    assert dict(task.captions) == {"s0000000": ("one", "two")}


def test_what_does_not_fit_is_refused(exported: Path) -> None:
    (exported / "classnames.txt").write_text("owl\nowl\n")
    assert read_tasks("folder", exported)[0].notes
    (exported / "classnames.txt").write_text("tree frog\n")
    with pytest.raises(PairsError, match=r"has '1' for the class of image s0000000; expected .* from 0 to 0"):
        read_tasks("folder", exported)
    for file in exported.glob("*/*.tar"):
        write(file, {"s0000000.cls": "0", "s0000000.webp": "A"})
    with pytest.raises(PairsError, match="has one class alone, and among one class every answer is right"):
        read_tasks("folder", exported)
    (exported / "classnames.txt").unlink()
    with pytest.raises(PairsError, match=r"has no classnames\.txt"):
        read_tasks("folder", exported)
    (exported / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(PairsError, match="several labels"):
        read_tasks("folder", exported)


def test_a_shard_that_was_cut_is_no_benchmark(exported: Path) -> None:
    whole = (exported / "test/0.tar").read_bytes()
    (exported / "test/0.tar").write_bytes(whole[:1024])
    with pytest.raises(PairsError, match=r"is not whole: 0\.tar"):
        read_tasks("folder", exported)
