"""Stores from vectors that other software made, and vectors of a store for other software.

Both use the layout of clip-retrieval, which autofaiss and embedding-reader read, too.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from lamplit.data.foreign_vectors import ForeignVectors, read_vectors
from lamplit.data.parquet import BLOCK_ROWS
from lamplit.data.skipped import Skipped
from lamplit.errors import StoreError, UsageError
from lamplit.files import replacing
from lamplit.progress import Advance, progress_bar
from lamplit.store.column_types import ColumnType
from lamplit.store.embedding import list_skipped
from lamplit.store.lance_store import Store, as_store
from lamplit.store.rows import COLUMNS, Row, metadata_name
from lamplit.towers.identity import TowerIdentity

PART_ROWS = 1_000_000  # as many as clip-retrieval writes into one part
_UNIT_TOLERANCE = 1e-3  # how much rounding to float16 changes the length of a unit vector, at most
_LAYOUT = ("image_path", "caption", "texts")


@dataclass
class ImportReport:
    """What one run of `import_vectors` did; all counts are of images.

    Attributes:
        store: path of the store.
        image_tower: name of what made the vectors.
        width: of the vectors.
        imported: are in the store.
        texts: that they have together.
        not_kept: values of metadata that could not be kept, by column.
        notes: what to know about the source, in plain sentences.
        skipped: vectors that could not be used, with the reasons.
        skipped_file: where these are listed, one JSON object a line; None if there are none.
        seconds: wall-clock time of the run.
    """

    store: str
    image_tower: str
    width: int
    imported: int = 0
    texts: int = 0
    not_kept: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    skipped_file: str | None = None
    seconds: float = 0.0


@dataclass
class VectorsReport:
    """What `export_vectors` wrote, and the tower that made the vectors.

    Attributes:
        folder: what was written.
        image_tower: name of the tower.
        width: D, the width of the vectors.
        images: number of images, and of vectors.
        parts: number of `.npy` files.
    """

    folder: str
    image_tower: str
    width: int
    images: int
    parts: int


def import_vectors(
    source: str | Path,
    out: str | Path,
    *,
    image_tower: str,
    pairs: str | Path | None = None,
    vector_column: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    progress: bool = False,
) -> ImportReport:
    """Make the store `out` from vectors that other software made.

    The store appears in one commit at the end: interrupted, there is none, and running again starts over. Ids are
    the numbers of the source's rows. Rows whose vectors are equal to the bit count as one image. Vectors that
    cannot be used are skipped and listed with their reasons in `OUT.skipped.jsonl`.

    On the command line: `lamplit import`.

    Args:
        source: clip-retrieval's folder (`img_emb/img_emb_0.npy` and so on, with `metadata/metadata_0.parquet`), a
            `.npy` file of shape (N, D), or a Parquet file or a folder of them with a column of vectors.
        out: the store to make; it must not exist yet.
        image_tower: name of what made the vectors, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`. It is not
            opened. Stores of one name and width fit each other, and a model tuned on one reads all of them.
        pairs: texts and images for a `.npy`, in its order.
        vector_column: column with the vectors; by default found by its name, or as the only one.
        image_column: column with the images' paths; by default found by its name.
        text_column: column (or columns, by commas) with the texts.
        progress: show a bar on stderr.

    Returns:
        Counts of what was imported and skipped.

    Raises:
        PairsError: the source cannot be read, or its vectors and rows do not match.
        StoreError: there is a store already, or no vector can be used.
        UsageError: a named column does not exist, or the tower has no name.

    Example:
        >>> lamplit.import_vectors("laion/", "laion.lance", image_tower="open_clip:ViT-B-32/laion2b_s34b_b79k")
    """
    started = time.monotonic()
    if not image_tower.strip():
        raise UsageError(
            "the tower that made the vectors needs a name, such as --image-tower timm:vit_base_patch16_224"
        )
    if Store.exists(out):
        raise StoreError(f"there is a store at {out} already; give another --out, or remove it")
    vectors = read_vectors(
        source, pairs=pairs, vector_column=vector_column, image_column=image_column, text_column=text_column
    )
    report = ImportReport(str(out), image_tower, vectors.width)
    with progress_bar("import", vectors.count, shown=progress) as advance:
        blocks = _rows(vectors, report, advance)
        first = next(blocks, None)
        if first is not None:
            types = _metadata_types(vectors, has_table=pairs is not None)
            lost: Counter[str] = Counter()
            Store.create(
                out,
                TowerIdentity.of_imported(image_tower, vectors.width),
                first,
                backend="imported",
                metadata_columns=list(types),
                metadata_types=types,
                more=blocks,
                lost=lost,
            )
            report.not_kept = dict(lost)
    report.notes = list(vectors.notes)
    report.skipped_file = list_skipped(out, report.skipped)
    report.seconds = time.monotonic() - started
    if first is None:
        listed = f" of {len(report.skipped)}; reasons in {report.skipped_file}" if report.skipped else ""
        raise StoreError(f"nothing to import: no vector of {source} can be used{listed}")
    return report


def export_vectors(store: str | Path | Store, out: str | Path, *, part_rows: int = PART_ROWS) -> VectorsReport:
    """Write a store in clip-retrieval's layout: `img_emb/img_emb_0.npy`, `metadata/metadata_0.parquet` and so on.

    Vectors are (N, D) float16, as they are stored, in the order of the ids. The metadata has `image_path`, `caption`
    (the first text), `texts` (all of them) and every metadata column. `import_vectors` makes a store with the same
    vectors, texts and metadata from it. The folder appears whole or not at all.

    On the command line: `lamplit export --to clip-retrieval`.

    Args:
        store: a store or its path.
        out: folder to write; it must be empty, or not exist.
        part_rows: largest number of rows in one part.

    Returns:
        What was written: images, parts, and the name and width of the image tower.

    Raises:
        StoreError: the store cannot be read.
        UsageError: the folder is not empty.

    Example:
        >>> lamplit.export_vectors("photos.lance", "vectors/").images
        1200
    """
    store = as_store(store)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder; give another, so that parts of two stores do not mix")
    parts = [range(start, min(start + part_rows, len(store))) for start in range(0, len(store), part_rows)]
    with replacing(folder) as partial:
        for name in ("img_emb", "metadata"):
            (partial / name).mkdir(parents=True)
        for number, rows in enumerate(parts):
            # Readers sort the names as text, so the numbers are of one length.
            _write_part(store, rows, partial, f"{number:0{len(str(len(parts)))}}")
    return VectorsReport(str(folder), store.tower.spec, store.tower.width, len(store), len(parts))


def _metadata_types(vectors: ForeignVectors, *, has_table: bool) -> dict[str, pa.DataType]:
    """Find the types of the metadata columns: from the source if it knows them, else from all its values.

    The store appears in one commit, so no column can be widened on the way.
    """
    types = {metadata_name(name): kind for name, kind in vectors.types.items()}
    if not has_table and None not in types.values():
        return types
    found: dict[str, ColumnType] = {}
    for _, _, entries in vectors:
        for entry in entries:
            for column, value in entry.metadata.items():
                found.setdefault(metadata_name(column), ColumnType()).add(value)
    return {name: types.get(name) or found.get(name, ColumnType()).settled() for name in [*types, *found]}


def _rows(vectors: ForeignVectors, report: ImportReport, advance: Advance) -> Iterator[list[Row]]:
    """Yield rows of the store in blocks; vectors that cannot be used go into the report."""
    number = 0
    for values, without, entries in vectors:
        units, reasons = _to_unit(values)
        for place, reason in without.items():
            reasons[place] = reason
        rows = []
        for unit, reason, entry in zip(units, reasons, entries, strict=True):
            name = f"{number:09}"
            number += 1
            if reason:
                report.skipped.append(Skipped(name, entry.path or name, reason))
                continue
            content = blake2b(unit.tobytes(), digest_size=16).hexdigest()
            metadata = {metadata_name(column): value for column, value in entry.metadata.items()}
            rows.append(Row(name, entry.path or name, content, entry.texts, torch.from_numpy(unit), metadata))
        report.imported += len(rows)
        report.texts += sum(len(row.texts) for row in rows)
        advance(len(entries), f"{len(report.skipped)} skipped" if report.skipped else "")
        if rows:
            yield rows


def _to_unit(values: NDArray[Any]) -> tuple[NDArray[np.float16], list[str]]:
    """Scale (B, D) floats to unit length; return them, and for each the reason why it cannot be used, or "".

    Vectors that are float16 and of unit length already keep their bytes.
    """
    wide = values.astype(np.float64 if values.dtype.itemsize == 8 else np.float32)
    largest = np.abs(wide).max(1, keepdims=True)
    finite, zero = np.isfinite(largest), largest == 0
    usable = finite & ~zero
    wide, largest = np.where(usable, wide, 1), np.where(usable, largest, 1)
    wide = wide / largest  # so that no square overflows or becomes zero
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    units = (wide / norms).astype(np.float16)
    if values.dtype.itemsize == 2:
        units = np.where(np.abs(norms * largest - 1) < _UNIT_TOLERANCE, values.astype(np.float16), units)
    reasons = [
        "the vector is all zeros" if is_zero else "" if is_finite else "the vector has NaN, infinite or missing values"
        for is_finite, is_zero in zip(finite[:, 0], zero[:, 0], strict=True)
    ]
    return units, reasons


def _write_part(store: Store, rows: range, folder: Path, number: str) -> None:
    array = folder / "img_emb" / f"img_emb_{number}.npy"
    table = folder / "metadata" / f"metadata_{number}.parquet"
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(rows), store.tower.width)}
    made_by = {"lamplit": json.dumps({"tower": store.tower.spec, "fingerprint": store.tower.fingerprint})}
    starts = range(rows.start, rows.stop, BLOCK_ROWS)
    blocks = (store.take(range(start, min(start + BLOCK_ROWS, rows.stop))) for start in starts)
    first = next(blocks)
    schema = _described(first).schema.with_metadata(made_by)
    with array.open("wb") as file, parquet.ParquetWriter(table, schema) as writer:
        np.lib.format.write_array_header_1_0(file, header)
        for block in chain([first], blocks):
            file.write(block["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes())
            writer.write_table(_described(block).cast(schema))


def _described(block: pa.Table) -> pa.Table:
    """Make the columns of clip-retrieval's metadata."""
    texts = block["texts"].to_pylist()
    columns = {
        "image_path": block["path"],
        "caption": pa.array([row[0] if row else None for row in texts], pa.string()),
        "texts": block["texts"],
    }
    for name in block.schema.names:
        if name not in COLUMNS:
            columns[f"{name}_" if name in _LAYOUT else name] = block[name]
    return pa.table(columns)
