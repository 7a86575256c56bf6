from __future__ import annotations

from pathlib import Path, PurePath

import datasets
import pytest

from lamplit.data.sources import read_pairs
from lamplit.data.tables.folders import choose_files
from lamplit.data.tables.splits import split_of
from lamplit.errors import PairsError, UsageError


def rows_of(split: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"image": f"{split}-{number}.jpg", "text": split} for number in range(2)])


def ids(source: Path, split: str | None = None) -> list[str]:
    return [pair.id for pair in read_pairs(source, split=split)]


def test_what_datasets_saved_to_disk(tmp_path: Path) -> None:
    whole = datasets.DatasetDict({split: rows_of(split) for split in ("train", "test")})
    whole.save_to_disk(tmp_path / "saved")
    assert ids(tmp_path / "saved") == ["train/train-0.jpg", "train/train-1.jpg"]
    assert ids(tmp_path / "saved", "test") == ["test/test-0.jpg", "test/test-1.jpg"]
    assert ids(tmp_path / "saved/test") == ["test-0.jpg", "test-1.jpg"]
    [said] = read_pairs(tmp_path / "saved").notes
    assert said.endswith("read is train, and not test (1); --split NAME or --split all reads others")


def test_parquet_of_several_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows_of(split).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    pairs = read_pairs(tmp_path)
    assert (pairs.count, [pair.id for pair in pairs]) == (2, ["train-0.jpg", "train-1.jpg"])
    assert "test (1), validation (1)" in pairs.notes[0]
    assert ids(tmp_path, "val") == ["validation-0.jpg", "validation-1.jpg"]
    assert len(ids(tmp_path, "all")) == 6
    with pytest.raises(UsageError, match="has no split 'extra'"):
        read_pairs(tmp_path, split="extra")
    with pytest.raises(UsageError, match="has no splits; leave out --split"):
        read_pairs(tmp_path / "test-00000-of-00001.parquet", split="train")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"), ("data/test/a.parquet", "test"), ("dev.parquet", "validation"),
        ("captions_val2017.json", "validation"), ("testimony.parquet", None), ("a.parquet", None),
        ("restval.parquet", None), ("Training.parquet", "train"),
    ],
)  # fmt: skip
def test_splits_in_names(path: str, split: str | None) -> None:
    assert split_of(PurePath(path)) == split


def test_files_of_no_split_are_read_with_every_split() -> None:
    files = [PurePath(name) for name in ("a.parquet", "test.parquet", "train.parquet")]
    assert choose_files("x", files, None)[0] == [files[0], files[2]]
    assert choose_files("x", files[:2], None) == (files[:2], "")


def test_tables_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("image,text\na.jpg,x\n")
    with pytest.raises(PairsError, match=r"holds no images.*it has captions\.csv: give such a file itself"):
        read_pairs(tmp_path)
    for name in ("a.jpg", "a.json", "00000_stats.json"):
        (tmp_path / name).write_bytes(b"{}")
    [said] = read_pairs(tmp_path).notes
    assert said.endswith("is read as a folder of images; captions.csv is left out")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,x\n")
    (tmp_path / "a.tar").touch()
    [said] = read_pairs(tmp_path).notes
    assert said.endswith("is read by metadata.csv; 2 files such as a.tar are left out")
