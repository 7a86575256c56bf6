"""Rows of a data set on the Hugging Face hub, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lamplit.data.tables.columns import Cells
from lamplit.errors import MissingExtraError, PairsError, first_line, require


class HubRows:
    """The rows of one split of a data set; iterating again reads them again. Images stay encoded.

    Args:
        name: the data set's id, `owner/name`.
        split: such as `train`.

    Raises:
        PairsError: `datasets` is not installed.
        OSError: the hub does not have the data set, or cannot be reached.
    """

    def __init__(self, name: str, split: str) -> None:
        try:
            datasets: Any = require("datasets", "hub")
        except MissingExtraError as error:  # a path with a mistake looks like an id, so both are named
            raise PairsError(f"{name} is not a file or folder here; to read it from the hub: {error}") from error
        self._errors: type[Exception] = datasets.exceptions.DatasetsError
        download = datasets.DownloadConfig(max_retries=1)
        try:
            self._rows = datasets.load_dataset(name, split=split, streaming=True, download_config=download)
        except self._errors as error:
            raise OSError(first_line(error)) from error
        splits = self._rows.info.splits or {}
        self.count: int | None = splits[split].num_examples if split in splits else None

    def __iter__(self) -> Iterator[Cells]:
        try:
            yield from self._rows.decode(False)
        except self._errors as error:
            raise OSError(first_line(error)) from error
