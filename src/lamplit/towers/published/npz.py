"""Arrays from an .npz file that is not trusted: shapes first, nothing executed, nothing larger than it says."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from lamplit.errors import TowerError, first_line

MAX_ARRAYS = 10_000
MAX_BYTES = 2**33  # of all arrays, unpacked; the largest published model has 2.6 GB
_BFLOAT16 = np.dtype("V2")  # what numpy makes of it when it does not know the type
# What they raise on damaged files. NotImplementedError: a compression that zipfile does not know.
_ZIP_ERRORS = (OSError, ValueError, NotImplementedError, zipfile.BadZipFile)
_MEMBER_ERRORS = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype
    end: int  # where the values begin


class ArrayFile:
    """An .npz file whose headers were read; `shapes` says what is in it, by name.

    Raises:
        TowerError: it is not such a file, or holds anything but floating-point arrays of a sensible size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            opened = zipfile.ZipFile(path)
        except _ZIP_ERRORS as error:
            raise self.refuse(first_line(error)) from error
        with opened as file:
            members = file.infolist()
            if len(members) > MAX_ARRAYS:
                raise self.refuse(f"it has {len(members)} members")
            self._headers = {
                member.filename.removesuffix(".npy"): self._read_header(file, member) for member in members
            }
        self.shapes = {name: header.shape for name, header in self._headers.items()}
        if len(self.shapes) < len(members):
            raise self.refuse("it has two members of the same name")
        size = sum(math.prod(header.shape) * header.dtype.itemsize for header in self._headers.values())
        if size > MAX_BYTES:
            raise self.refuse(f"it unpacks to {size:,} bytes; at most {MAX_BYTES:,} are read")

    def read(self, name: str) -> Tensor:
        """Read one array, as float32.

        Raises:
            TowerError: it is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as file, file.open(f"{name}.npy") as stream:
                array = npy.read_array(stream, allow_pickle=False)
        except _MEMBER_ERRORS as error:
            raise self.refuse(f"{name}: {first_line(error)}") from error
        if array.dtype == _BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
        return torch.from_numpy(array.astype(np.float32, copy=False))

    def _read_header(self, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Header:
        name = member.filename
        if not name.endswith(".npy"):
            raise self.refuse(f"its member {name} is no array")
        try:
            with file.open(member) as stream:
                version = npy.read_magic(stream)
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
                if read is None:
                    raise self.refuse(f"its member {name} is of an unknown version")
                shape, _, dtype = read(stream)
                header = _Header(shape, dtype, stream.tell())
        except _MEMBER_ERRORS as error:
            raise self.refuse(first_line(error)) from error
        if dtype.kind != "f" and dtype != _BFLOAT16:
            kind = "holds Python objects, which only running code could read" if dtype.hasobject else f"is of {dtype}"
            raise self.refuse(f"its array {name} {kind}; expected floating-point numbers")
        if min(shape, default=0) < 0 or header.end + math.prod(shape) * dtype.itemsize != member.file_size:
            raise self.refuse(f"its array {name} is not of the size it says")
        return header

    def refuse(self, reason: str) -> TowerError:
        """Make the error that says why this file is not read."""
        return TowerError(f"{self.path} cannot be read as a published model: {reason}")
