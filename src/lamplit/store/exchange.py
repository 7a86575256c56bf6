"""Stores from vectors that other software made, and vectors of a store for other software.

Both use the layout of clip-retrieval, which autofaiss and embedding-reader read, too.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from lamplit.data.skipped import Skipped
from lamplit.data.sorted_keys import SortedKeys, keys_of
from lamplit.data.tables.text_columns import first_texts
from lamplit.data.vectors.foreign_tables import BLOCK_ROWS, Described, plain_cells
from lamplit.data.vectors.foreign_vectors import ForeignVectors, read_vectors
from lamplit.errors import StoreError, UsageError
from lamplit.files import replacing
from lamplit.locations.paths import require_local
from lamplit.progress import Advance, progress_bar
from lamplit.store.embed_report import list_skipped
from lamplit.store.foreign_batches import to_store_batch
from lamplit.store.lance_store import Store, as_store
from lamplit.store.published_stores import require_writable
from lamplit.store.table.column_types import ColumnType
from lamplit.store.table.rows import COLUMNS, metadata_name
from lamplit.store.table.store_lock import store_lock
from lamplit.store.table.store_metadata import OF_TEXTS, StoreMetadata, require_kind
from lamplit.store.table.table_writing import StoreExistsError
from lamplit.towers.identity import TowerIdentity

PART_ROWS = 1_000_000  # as many as clip-retrieval writes into one part
_LAYOUT = ("image_path", "caption", "texts")


@dataclass
class ImportReport:
    """What one run of `import_vectors` did; all counts are of images.

    Attributes:
        store: path of the store.
        image_tower: name of what made the vectors.
        width: of the vectors.
        imported: were added to the store.
        known: were left out, because the store had their vectors, to the bit, when the run began.
        texts: that the added ones have together.
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
    known: int = 0
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
    """Make the store `out` from vectors that other software made, or add them to it.

    All rows appear in one commit at the end: interrupted, there are none of them, and running again starts over. Ids
    are the numbers of the source's rows. Rows whose vectors are equal to the bit count as one image. Vectors that
    cannot be used are skipped and listed with their reasons in `OUT.skipped.jsonl`.

    Run again on a source that has grown, or on another one, it adds the rows whose vectors the store does not have
    yet. Their ids go on after the largest number that is an id. Texts and metadata of known vectors stay as they are.

    On the command line: `lamplit import`.

    Args:
        source: clip-retrieval's folder (`img_emb/img_emb_0.npy` and so on, with `metadata/metadata_0.parquet`), a
            `.npy` file of shape (N, D), a Parquet file or a folder of them with a column of vectors, or a table of
            Lance or LanceDB with one (the folder that has `_versions`).
        out: the store to make or to add to; one that is there has vectors of the same name and width.
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
        StoreError: the store is there and of another tower, another process writes to it, or no vector can be used.
        UsageError: a named column does not exist, the tower has no name, or the source is a store.

    Example:
        >>> lamplit.import_vectors("laion/", "laion.lance", image_tower="open_clip:ViT-B-32/laion2b_s34b_b79k")
    """
    started = time.monotonic()
    if not image_tower.strip():
        raise UsageError(
            "the tower that made the vectors needs a name, such as --image-tower timm:vit_base_patch16_224"
        )
    _refuse_store(source)
    out = os.path.expanduser(out)
    require_writable(out)
    vectors = read_vectors(
        source, pairs=pairs, vector_column=vector_column, image_column=image_column, text_column=text_column
    )
    metadata = StoreMetadata(TowerIdentity.of_imported(image_tower, vectors.width), "imported", False)
    types = {metadata_name(name): kind for name, kind in vectors.types.items()}
    if pairs is not None or None in types.values():
        types = find_types((described for *_, described in vectors), types)
    report = ImportReport(str(out), image_tower, vectors.width)
    write_vectors(vectors, out, metadata, types, report, name="import", progress=progress)
    report.seconds = time.monotonic() - started
    if not report.imported + report.known:
        listed = f" of {len(report.skipped)}; reasons in {report.skipped_file}" if report.skipped else ""
        raise StoreError(f"nothing to import: no vector of {source} can be used{listed}")
    return report


def write_vectors(
    vectors: ForeignVectors,
    out: str | Path,
    metadata: StoreMetadata,
    types: Mapping[str, pa.DataType],
    report: ImportReport,
    *,
    name: str,
    progress: bool = False,
) -> None:
    """Make a store of vectors, or add to it those that it does not have; count all in a report.

    Args:
        vectors: and what is known of each.
        out: the store.
        metadata: of a new store; one that is there must be of the same tower and kind.
        types: of the metadata columns.
        report: where notes and skipped vectors are put, too.
        name: of what is done, for the bar.
        progress: show a bar on stderr.

    Raises:
        PairsError: the source cannot be read.
        StoreError: the store is of another tower or kind, or another process writes to it.
    """
    is_done = False
    if not Store.exists(out):
        with progress_bar(name, vectors.count, shown=progress) as advance:
            is_done = _make(out, metadata.schema(types), vectors, report, advance)
    if not is_done:
        with progress_bar(name, vectors.count, shown=progress) as advance:
            _add(Store(out), metadata, vectors, types, report, advance)
    report.notes = list(vectors.notes)
    report.skipped_file = list_skipped(out, report.skipped)


def find_types(
    blocks: Iterable[Described], known: Mapping[str, pa.DataType | None] | None = None
) -> dict[str, pa.DataType]:
    """Find the types of metadata columns from all their values, unless they are known.

    The store appears in one commit, so no column can be widened on the way.
    """
    types = dict(known or {})
    found: dict[str, ColumnType] = {}
    for described in blocks:
        for name, cells in described.metadata.items():
            column = metadata_name(name)
            if types.get(column) is None:
                seen = found.setdefault(column, ColumnType())
                for value in plain_cells(cells) if isinstance(cells, pa.Array) else cells:
                    seen.add(value)
    return {name: types.get(name) or found.get(name, ColumnType()).settled() for name in [*types, *found]}


def export_vectors(
    store: str | Path | Store, out: str | Path, *, part_rows: int = PART_ROWS, progress: bool = False
) -> VectorsReport:
    """Write a store in clip-retrieval's layout: `img_emb/img_emb_0.npy`, `metadata/metadata_0.parquet` and so on.

    Vectors are (N, D) float16, as they are stored, in the order of the ids. The metadata has `image_path`, `caption`
    (the first text), `texts` (all of them) and every metadata column. `import_vectors` makes a store with the same
    vectors, texts and metadata from it. The folder appears whole or not at all.

    On the command line: `lamplit export --to clip-retrieval`.

    Args:
        store: a store or its path.
        out: folder to write; it must be empty, or not exist.
        part_rows: largest number of rows in one part.
        progress: show a bar on stderr.

    Returns:
        What was written: images, parts, and the name and width of the image tower.

    Raises:
        StoreError: the store cannot be read.
        UsageError: the folder is not empty.

    Example:
        >>> lamplit.export_vectors("photos.lance", "vectors/").images
        1200
    """
    require_local(out, "an export")
    store = as_store(store)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder; give another, so that parts of two stores do not mix")
    parts = [range(start, min(start + part_rows, len(store))) for start in range(0, len(store), part_rows)]
    with replacing(folder) as partial, progress_bar("export", len(store), shown=progress) as advance:
        for name in ("img_emb", "metadata"):
            (partial / name).mkdir(parents=True)
        for number, rows in enumerate(parts):
            # Readers sort the names as text, so the numbers are of one length.
            _write_part(store, rows, partial, f"{number:0{len(str(len(parts)))}}", advance)
    return VectorsReport(str(folder), store.tower.spec, store.tower.width, len(store), len(parts))


def _refuse_store(source: str | Path) -> None:
    try:
        Store(source)
    except StoreError:
        return
    raise UsageError(
        f"{source} is a store already, and every command takes it as it is. To add its vectors to another: "
        f"lamplit export {source} --to clip-retrieval --out FOLDER, and lamplit import FOLDER"
    )


def _make(out: str | Path, schema: pa.Schema, vectors: ForeignVectors, report: ImportReport, advance: Advance) -> bool:
    """Make the store; return False, with nothing counted, if another process has made it meanwhile."""
    before = replace(report, skipped=list(report.skipped))
    batches = _batches(vectors, schema, 0, None, report, advance)
    if (first := next(batches, None)) is not None:
        try:
            Store.write(out, schema, chain([first], batches))
        except StoreExistsError:
            vars(report).update(vars(before))
            return False
    return True


def _add(
    store: Store,
    metadata: StoreMetadata,
    vectors: ForeignVectors,
    types: Mapping[str, pa.DataType],
    report: ImportReport,
    advance: Advance,
) -> None:
    store.require_tower(metadata.tower)
    require_kind(store.backend, store.path, of_texts=metadata.backend == OF_TEXTS)
    with store_lock(store.path, "imports vectors"):
        vectors.notes.extend(store.prepare_to_write())
        schema = store.add_columns(types)
        known = SortedKeys.of(np.concatenate([keys_of(batch["hash"].to_pylist()) for batch in store.batches("hash")]))
        batches = _batches(vectors, schema, _next_number(store), known, report, advance)
        if (first := next(batches, None)) is not None:
            store.append_batches(chain([first], batches))


def _next_number(store: Store) -> int:
    """Return the number that follows the largest one among the ids."""
    largest = -1
    for batch in store.batches("id"):
        ids = batch["id"].filter(pc.match_substring_regex(batch["id"], r"^\d{1,18}$"))
        if len(ids):
            largest = max(largest, pc.max(ids.cast(pa.int64())).as_py())
    return largest + 1


def _batches(
    vectors: ForeignVectors,
    schema: pa.Schema,
    number: int,
    known: SortedKeys | None,
    report: ImportReport,
    advance: Advance,
) -> Iterator[pa.RecordBatch]:
    """Yield rows of the store in blocks, numbered from `number` on, without known contents; count all in the report."""
    lost: Counter[str] = Counter()
    for block in vectors:
        made = to_store_batch(block, number, schema, known)
        number += len(block[0]) - made.known
        lost += made.lost
        report.skipped += made.skipped
        report.not_kept = dict(lost)
        report.known += made.known
        report.imported += len(made.rows)
        report.texts += pc.sum(pc.list_value_length(made.rows["texts"])).as_py() or 0
        advance(len(block[0]), f"{len(report.skipped)} skipped" if report.skipped else "")
        if len(made.rows):
            yield made.rows


def _write_part(store: Store, rows: range, folder: Path, number: str, advance: Advance) -> None:
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
            advance(len(block), "")


def _described(block: pa.Table) -> pa.Table:
    """Make the columns of clip-retrieval's metadata."""
    columns = {
        "image_path": block["path"],
        "caption": first_texts(block["texts"].combine_chunks()),
        "texts": block["texts"],
    }
    for name in block.schema.names:
        if name not in COLUMNS:
            columns[f"{name}_" if name in _LAYOUT else name] = block[name]
    return pa.table(columns)
