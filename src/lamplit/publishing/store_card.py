"""A store for others: its table without paths, and its card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import DatasetCardData

from lamplit.data.places.image_places import INSIDE
from lamplit.data.tables.text_columns import count_texts
from lamplit.publishing.model_card import table
from lamplit.publishing.private_paths import reduce_paths
from lamplit.store.lance_store import Store
from lamplit.store.published_stores import FOLDER
from lamplit.store.table.store_metadata import StoreMetadata

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_public_store(store: Store, folder: Path) -> int:
    """Write the table of a store into `folder`, as others may see it; return its number of texts.

    In the place of an image's path is its id, which loses the folder that all images lie in; so does all other text of
    the table, and the user's own folder. Vectors, ids and texts stay to the bit, and so does the fingerprint of the
    tower: a model that reads the store reads this one.
    """
    tower = replace(store.tower, spec=reduce_paths(store.tower.spec), weights=reduce_paths(store.tower.weights))
    center = None if store.center is None else store.center.tolist()
    schema = StoreMetadata(tower, store.backend, store.centered, center).schema(store.column_types)
    private, texts = _private_prefixes(store), [0]

    def public() -> Iterator[pa.RecordBatch]:
        for batch in store.batches(*schema.names):
            columns = {
                name: batch[name] if name == "texts" else _without(batch[name], private) for name in schema.names
            }
            columns["path"] = columns["id"]
            texts[0] += count_texts(batch["texts"])
            yield pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)

    Store.write(folder / FOLDER, schema, public())
    return texts[0]


def store_card(store: Store, texts: int, repository: str, license: str | None = None) -> str:
    """Write the card of a published store as Markdown, with the hub's metadata before it.

    Args:
        store: what is published, as it was written.
        texts: their number.
        repository: `OWNER/NAME` of its place on the hub.
        license: the hub's word for it; None leaves it out.
    """
    name, tower = repository.rpartition("/")[2], store.tower
    size = next((word for most, word in _SIZES if len(store) < most), "n>1M")
    data = DatasetCardData(
        license=license, size_categories=[size], pretty_name=name, task_categories=["zero-shot-image-classification"],
        tags=["lamplit", "lance", "embeddings", "image-text-retrieval"],
    )  # fmt: skip
    rows: list[list[object]] = [
        ["images", f"{len(store):,}"], ["texts", f"{texts:,}"], ["image tower", f"`{tower.spec}`"],
        ["fingerprint of the image tower", f"`{tower.fingerprint}`"], ["width of the vectors", tower.width],
        ["other columns", ", ".join(f"`{each}`" for each in store.metadata_columns) or "none"],
    ]  # fmt: skip
    return "\n".join([
        f"---\n{data.to_yaml()}\n---\n", f"# {name}\n",
        "A store of lamplit: the vectors of images under one locked image tower, with their texts. A text tower is "
        "tuned on it, and models that read this image tower are measured on it and search it.\n",
        "**The images are not here**, only their vectors, ids, content hashes and texts; an image cannot be opened or "
        "shown from it.\n",
        table(["", ""], rows), "## How to load it\n",
        f'```python\nimport lamplit\n\nstore = lamplit.Store("hf:{repository}")\nstore.vectors()  # (N, D)\n```\n',
        f"```sh\nlamplit tune hf:{repository} --text-tower hf:NAME --out FOLDER\n"
        f'lamplit search MODEL hf:{repository} "a hat"\n```\n',
        f"`{FOLDER}` is a table of [Lance](https://lancedb.github.io/lance/), which LanceDB, DuckDB and Polars read, "
        "too.\n",
    ])  # fmt: skip


def _private_prefixes(store: Store) -> list[str]:
    """Return the folder that the images with a path of their own lie in, and the user's own."""
    first = last = None
    for batch in store.batches("path"):
        files = pc.replace_substring_regex(batch["path"], f"{INSIDE}$", "")  # of the tars and tables, too
        absolute = files.filter(pc.match_substring_regex(files, r"^(/|[A-Za-z]:[\\/])"))
        if len(absolute):
            found = pc.min_max(absolute).as_py()
            first = found["min"] if first is None else min(first, found["min"])
            last = found["max"] if last is None else max(last, found["max"])
    # Letter by letter, and back to the last slash of either kind: another system may have written the store.
    common = "" if first is None or last is None else re.sub(r"[^/\\]*$", "", os.path.commonprefix([first, last]))  # noqa: RUF071
    home = str(Path.home()) + os.sep
    return [prefix for prefix in (common, home) if len(prefix) > 1]


def _without(column: pa.Array, prefixes: list[str]) -> pa.Array:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        for prefix in prefixes:
            column = pc.replace_substring(column, prefix, "")
        return column
    if not re.search(r"\bstring|large_string", str(column.type)):
        return column
    return pa.array([_cell_without(cell, prefixes) for cell in column.to_pylist()], column.type)


def _cell_without(cell: Any, prefixes: list[str]) -> Any:
    """Do the same in a list or a struct, at any depth."""
    if isinstance(cell, str):
        for prefix in prefixes:
            cell = cell.replace(prefix, "")
    elif isinstance(cell, (list, tuple)):
        return type(cell)(_cell_without(each, prefixes) for each in cell)
    elif isinstance(cell, dict):
        return {name: _cell_without(each, prefixes) for name, each in cell.items()}
    return cell
