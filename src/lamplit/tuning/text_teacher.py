"""A store of texts, read by a model's own text tower: what another text tower is taught by, without images.

A locked text tower is a constant function, as a locked image tower is. So each text is embedded once, and `tune` reads
its vector in place of an image's. The new tower learns to give a translation the vector of the original, in the space
that the model's images have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lamplit.data.pairs import Pair, Pairs
from lamplit.data.skipped import Skipped
from lamplit.data.sources import read_pairs
from lamplit.data.vectors.foreign_tables import BLOCK_ROWS, Described
from lamplit.data.vectors.foreign_vectors import Block, ForeignVectors, describe_pairs
from lamplit.errors import StoreError, TowerError, UsageError
from lamplit.model import LiT, as_model
from lamplit.store.exchange import ImportReport, find_types, write_vectors
from lamplit.store.published_stores import require_writable
from lamplit.store.table.store_metadata import OF_TEXTS, StoreMetadata


@dataclass
class TextsReport:
    """What one run of `embed_texts` did; all counts are of rows.

    Attributes:
        store: path of the store.
        model: whose text tower read the texts.
        image_tower: the image tower whose space it is.
        text_columns: the columns that were read.
        embedded: were added to the store.
        known: were left out, because the store had their vectors, to the bit, when the run began.
        not_kept: values of metadata that could not be kept, by column.
        notes: what to know about the source, in plain sentences.
        skipped: rows that could not be used, with the reasons.
        skipped_file: where these are listed, one JSON object a line; None if there are none.
        seconds: wall-clock time of the run.
    """

    store: str
    model: str
    image_tower: str
    text_columns: tuple[str, ...]
    embedded: int
    known: int
    not_kept: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    skipped_file: str | None = None
    seconds: float = 0.0


def embed_texts(
    model: str | Path | LiT,
    source: str | Path,
    out: str | Path,
    *,
    text_column: str | None = None,
    split: str | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> TextsReport:
    """Embed the texts of `source` with a model's own text tower into the store `out`; no image is needed.

    Tune another text tower on a column of translations in that store. The result reads the same space as the model, so
    it finds the images of every store that the model searches.

    All rows appear in one commit at the end: interrupted, there are none of them, and running again starts over. Run
    again on a source that has grown, it adds the rows whose vectors the store does not have yet.

    On the command line: `lamplit embed-texts`.

    Args:
        model: what `lamplit.load` opens, or an open model: the teacher.
        source: a table of texts with their translations, or anything else that `read_pairs` reads. Images are not
            opened.
        out: the store to make or to add to.
        text_column: column (or columns, with commas between) with the texts that the model reads; by default found by
            its name. All other columns are kept, for `TuneSettings.text_column` to name. Of several texts in a row, the
            vector is the mean.
        split: which split of the source to read, or `all`; by default `train`, if it has several.
        device: torch device of a model that is not open yet; by default the accelerator, if there is one.
        progress: show a bar on stderr.

    Returns:
        Counts of what was embedded and skipped.

    Raises:
        PairsError: the source cannot be read.
        TowerError: the model has no text tower, or an image head of its own.
        StoreError: the store is there and of another tower or of images, or no row has a text to read.
        UsageError: there is no such model or column.

    Example:
        >>> lamplit.embed_texts("runs/english", "translations.csv", "taught.lance", text_column="english").embedded
        1200
    """
    started = time.monotonic()
    out = os.path.expanduser(out)
    require_writable(out)
    teacher = as_model(model, device=device, towers="text")
    _require_teacher(teacher)
    pairs = read_pairs(source, text_column=text_column, split=split, need_images=False)
    if not pairs.text_columns:
        raise UsageError(f"{source} has no column with texts that is known by its name; give --text-column NAME")
    texts = _Texts(pairs, teacher)
    center = None if teacher.center is None else teacher.center.tolist()
    metadata = StoreMetadata(teacher.identity, OF_TEXTS, center is not None, center)
    counts = ImportReport(str(out), teacher.identity.spec, teacher.width)
    vectors = ForeignVectors(str(source), pairs.count, teacher.width, {}, texts.blocks, pairs.notes)
    write_vectors(vectors, out, metadata, find_types(texts.described()), counts, name="embed texts", progress=progress)
    report = TextsReport(
        str(out), teacher.name if isinstance(model, LiT) else str(model), counts.image_tower, pairs.text_columns,
        counts.imported, counts.known, counts.not_kept, counts.notes, [*counts.skipped, *pairs.problems],
        counts.skipped_file, time.monotonic() - started,
    )  # fmt: skip
    if not report.embedded + report.known:
        raise StoreError(f"nothing to embed: no row of {source} has a text in {' or '.join(pairs.text_columns)}")
    return report


def _require_teacher(teacher: LiT) -> None:
    if teacher.text_tower is None:
        raise TowerError(f"{teacher.name} has no text tower to read texts with")
    if teacher.image_head is not None:
        raise TowerError(
            f"{teacher.name} has an image head, so its texts are not in the space of {teacher.identity.spec}, which is "
            "a store's; give a model that was tuned without --image-head"
        )


@dataclass(frozen=True)
class _Texts:
    """The rows of a source in blocks, with or without their vectors."""

    pairs: Pairs
    teacher: LiT

    def described(self) -> Iterator[Described]:
        for block in self._read():
            yield describe_pairs(block)

    def blocks(self) -> Iterator[Block]:
        for block in self._read():
            vectors, empty = self._vectors([pair.texts for pair in block])
            yield vectors, dict.fromkeys(empty, self._reason), describe_pairs(block)

    @property
    def _reason(self) -> str:
        return f"there is no text in {' or '.join(self.pairs.text_columns)}"

    def _read(self) -> Iterator[list[Pair]]:
        pairs = iter(self.pairs)
        while block := list(islice(pairs, BLOCK_ROWS)):
            yield block

    def _vectors(self, texts: Sequence[Sequence[str]]) -> tuple[NDArray[np.float64], list[int]]:
        """Return the (B, D) vectors of B rows as a store keeps them, and which rows have no text."""
        counts = torch.tensor([len(row) for row in texts])
        distinct = list(dict.fromkeys(text for row in texts for text in row))
        place = {text: number for number, text in enumerate(distinct)}
        ztxt = self.teacher.encode_texts(distinct).double().cpu()[[place[text] for row in texts for text in row]]
        sums = ztxt.new_zeros(len(texts), self.teacher.width)
        sums.index_add_(0, torch.repeat_interleave(torch.arange(len(texts)), counts), ztxt)
        vectors = F.normalize(sums, dim=-1)
        if self.teacher.center is not None:
            vectors = before_centring(vectors, self.teacher.center.double().cpu())
        return vectors.numpy(), torch.nonzero(counts == 0).flatten().tolist()


def before_centring(vectors: Tensor, center: Tensor) -> Tensor:
    """Return the (N, D) unit vectors that become these when the (D,) centre is subtracted and they are made unit."""
    along = vectors @ center
    length = -along + (along.square() + 1 - center.square().sum()).clamp(min=0).sqrt()
    return center + length[:, None] * vectors
