from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lamplit.data.groups import Groups, ImageRow

rows_given = st.lists(
    st.builds(
        lambda name, texts, metadata: ImageRow(
            name, Path(name) if name else b"", tuple(dict.fromkeys(texts)), metadata
        ),
        st.sampled_from(["", "a", "b", "c", "d"]),
        st.lists(st.sampled_from("xyz"), max_size=2),
        st.dictionaries(st.sampled_from("mn"), st.sampled_from([None, "", 1, 2])),
    ),
    max_size=12,
)


def reference(rows: Sequence[ImageRow]) -> list[ImageRow]:
    """Hold everything: one row an image, where its last row is."""
    found: list[ImageRow] = []
    for place, row in enumerate(rows):
        same = [other for other in rows if other.image == row.image]
        if row.image == b"":
            found.append(row)
        elif not any(other.image == row.image for other in rows[place + 1 :]):
            metadata: dict[str, object] = {}
            lost = []
            for other in same:
                for name, value in other.metadata.items():
                    if metadata.get(name) in (None, "") and (value not in (None, "") or other is same[0]):
                        metadata[name] = value
                    elif value not in (None, "", metadata.get(name)):
                        lost.append(name)
            texts = dict.fromkeys(text for other in same for text in other.texts)
            found.append(ImageRow(row.id, row.image, tuple(texts), metadata, tuple(lost)))
    return found


@given(rows_given, st.integers(1, 4))
def test_rows_of_one_image_become_one(rows: list[ImageRow], num_hashes: int) -> None:
    # Few hashes, so that images share them.
    keys = [1 + ord(row.id) % num_hashes if row.id else 1000 + place for place, row in enumerate(rows)]
    groups = Groups(keys)
    merged = list(groups.merge(rows, lambda row: 1 + ord(row.id) % num_hashes if row.id else 0))
    assert sorted(merged, key=repr) == sorted(reference(rows), key=repr)
    if num_hashes == 4:  # a hash for each image
        assert merged == reference(rows)
        assert groups.count == len(merged)


def test_rows_that_came_since_are_read() -> None:
    rows = [ImageRow(name, Path(name), (str(place),), {}) for place, name in enumerate("abacb")]
    keys = [ord(row.id) for row in rows]
    groups = Groups(keys[:3])
    assert [(row.id, row.texts) for row in groups.merge(rows, lambda row: ord(row.id))] == [
        ("b", ("1",)),
        ("a", ("0", "2")),
        ("c", ("3",)),
        ("b", ("4",)),
    ]
    assert [row.id for row in Groups(keys).merge(rows[:2], lambda row: ord(row.id))] == ["a", "b"]
    assert groups.named([ord("a"), ord("c")]).tolist() == [True, False]
