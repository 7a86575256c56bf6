"""What a model was tuned on and what was held out from it: hashes of captions and contents, kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lamplit.data.fields import FieldError, Fields
from lamplit.errors import UsageError

FILE = "split.safetensors"
FORMAT = 1
Part = Literal["train", "held_out", "test"]
PARTS: tuple[Part, ...] = ("train", "held_out", "test")
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class SplitRecord:
    """Which captions and images a model was tuned on, and which were held out; it knows them by content, not by path.

    Attributes:
        text_column: the column of the store with the captions.
        file: the file that it is read from when it is first needed; None if it is in memory.
        held: the arrays in memory, by the names that they have in the file; see `hashes`.
    """

    text_column: str
    file: Path | None = None
    held: Mapping[str, Hashes] | None = None

    @classmethod
    def make(cls, text_column: str, captions: Mapping[Part, Hashes], contents: Mapping[Part, Hashes]) -> Self:
        """Make the record of a run from the hashes of each part, in any order and with repeats."""
        kinds = {"captions": captions, "contents": contents}
        none = np.empty(0, np.uint64)
        held = {f"{part}.{kind}": _ascending(of.get(part, none)) for kind, of in kinds.items() for part in PARTS}
        return cls(text_column, held=held)

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """Open the record in a model's folder, without reading its hashes; None if there is none.

        Raises:
            UsageError: the file is damaged, or a newer lamplit wrote it.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="np") as opened:
                noted = opened.metadata() or {}
                first = {"format": 1, "text_column": noted.get("text_column", "texts")}  # as it was written at first
                described = Fields.parse(noted.get("lamplit", json.dumps(first)))
                names = set(opened.keys())
            found, text_column = described.integer("format", least=1), described.text("text_column")
        except (OSError, SafetensorError, FieldError) as error:
            raise UsageError(_damaged(file, error)) from error
        if found > FORMAT:
            raise UsageError(f"{file} has format {found}; this lamplit reads up to {FORMAT}: upgrade it")
        if not names >= {f"{part}.{kind}" for part in PARTS for kind in ("captions", "contents")}:
            raise UsageError(_damaged(file, "hashes are missing"))
        return cls(text_column, file.absolute())

    def after(self, base: Self) -> Self:
        """Return the record of a model that was tuned on these parts after it had been tuned on those of `base`."""
        captions, contents = ({part: of(part) for part in PARTS} for of in (self.captions, self.contents))
        captions["train"] = np.concatenate([captions["train"], base.captions("train")])
        contents["train"] = np.concatenate([contents["train"], base.contents("train")])
        return type(self).make(self.text_column, captions, contents)

    def write(self, file: Path) -> None:
        """Write the record to a file of safetensors, array by array: the library would hold two copies of all."""
        header: dict[str, Any] = {
            "__metadata__": {"lamplit": json.dumps({"format": FORMAT, "text_column": self.text_column})}
        }
        end = 0
        for name, array in sorted(self._arrays.items()):
            begin, end = end, end + array.nbytes
            header[name] = {"dtype": "U64", "shape": list(array.shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(file, "wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, array in sorted(self._arrays.items()):
                out.write(np.ascontiguousarray(array, "<u8").data)

    def captions(self, part: Part) -> Hashes:
        """Hashes of the distinct captions of a part, ascending: (M,)."""
        return self._arrays[f"{part}.captions"]

    def contents(self, part: Part) -> Hashes:
        """Hashes of the distinct images of a part, ascending: (C,)."""
        return self._arrays[f"{part}.contents"]

    @cached_property
    def _arrays(self) -> Mapping[str, Hashes]:
        if self.held is not None:
            return self.held
        assert self.file is not None
        try:
            with safe_open(self.file, framework="np") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise UsageError(_damaged(self.file, error)) from error


def is_in(values: Hashes, ascending: Hashes) -> NDArray[np.bool_]:
    """Tell of each value, (N,), whether it is among those of an ascending array."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[places] == values
    return found


def _ascending(values: Hashes) -> Hashes:
    """Return the distinct values, ascending: `numpy.unique` hashes them, which takes ten times as long."""
    ordered = np.sort(values)
    begins = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    distinct: Hashes = ordered[begins]
    return distinct


def _damaged(file: Path, reason: object) -> str:
    return f"{file} is damaged ({reason}); delete it, and the model no longer knows what it was tuned on"
