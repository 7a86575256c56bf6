from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lamplit.data.caption_hash import hash_captions, hash_names
from lamplit.data.split_record import FILE, PARTS, SplitRecord, is_in
from lamplit.errors import UsageError

CAPTION, SEEDED, OTHER = 16009369502523375570, 13194895463546445656, 12461716638057218974


def test_hashes_never_change() -> None:
    """Models keep them, and every split depends on them."""
    assert hash_captions([" An Owl. ", "an owl."]).tolist() == [CAPTION, CAPTION]
    assert hash_captions(["an owl."], seed=0).tolist() == [SEEDED]
    assert hash_names(["An Owl.", "an owl."]).tolist() == [OTHER, CAPTION]
    assert hash_captions([]).shape == (0,)
    assert hash_captions(["\ud800"]).dtype == np.uint64


def test_a_record_is_the_same_when_it_is_read(tmp_path: Path) -> None:
    captions, contents = hash_captions(["c", "a", "b", "A"]), hash_names(["x", "y", "x"])
    record = SplitRecord.make("german", {"train": captions, "test": captions[:1]}, {"train": contents})
    record.write(tmp_path / FILE)
    found = SplitRecord.find(tmp_path)
    assert found is not None
    assert found.text_column == "german"
    assert found.captions("train").tolist() == sorted(set(captions.tolist()))
    for part in PARTS:
        assert np.array_equal(found.captions(part), record.captions(part))
        assert np.array_equal(found.contents(part), record.contents(part))
    assert len(found.captions("held_out")) == 0
    found.write(tmp_path / FILE)  # onto itself
    assert SplitRecord.find(tmp_path / "nowhere") is None


def test_a_record_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    record = SplitRecord.make("german", {"train": hash_captions(["a"])}, {})
    written = set()
    for number in range(20):
        record.write(tmp_path / f"{number}.safetensors")
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1


def test_a_record_of_the_first_form_is_read(tmp_path: Path) -> None:
    arrays = {f"{part}.{kind}": np.arange(2, dtype=np.uint64) for part in PARTS for kind in ("captions", "contents")}
    save_file(arrays, tmp_path / FILE, {"format": "1", "text_column": "german"})
    found = SplitRecord.find(tmp_path)
    assert found is not None
    assert (found.text_column, found.captions("test").tolist()) == ("german", [0, 1])


def test_damaged_records_are_explained(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_bytes(json.dumps({}).encode())
    with pytest.raises(UsageError, match=r"split.safetensors is damaged .*no longer knows what it was tuned on"):
        SplitRecord.find(tmp_path)
    save_file({"train.captions": np.zeros(1, np.uint64)}, file, {"lamplit": '{"format": 1, "text_column": "texts"}'})
    with pytest.raises(UsageError, match=r"is damaged \(hashes are missing\)"):
        SplitRecord.find(tmp_path)
    save_file({}, file, {"lamplit": '{"format": 2, "text_column": "texts"}'})
    with pytest.raises(UsageError, match=r"has format 2; this lamplit reads up to 1"):
        SplitRecord.find(tmp_path)


def test_is_in() -> None:
    ascending = np.array([2, 5, 9], np.uint64)
    assert is_in(np.array([0, 2, 3, 9, 10], np.uint64), ascending).tolist() == [False, True, False, True, False]
    assert not is_in(ascending, ascending[:0]).any()
