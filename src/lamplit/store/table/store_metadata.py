"""What a store says about itself, kept as JSON in the metadata of its table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import pyarrow as pa

from lamplit.data.fields import FieldError, Fields
from lamplit.errors import StoreError
from lamplit.store.table.rows import COLUMNS, FIXED_COLUMNS
from lamplit.store.table.table_writing import PRIMARY_KEY
from lamplit.towers.identity import TowerIdentity

FORMAT = 1
KEY = "lamplit"
OF_TEXTS = "texts"  # the backend of a store whose vectors a text tower made


@dataclass(frozen=True)
class StoreMetadata:
    """Which tower made the vectors of a store, and how.

    Attributes:
        tower: the image tower.
        backend: what ran the tower; `imported` if the vectors were made elsewhere, `texts` if they are those of texts
            in the space of the tower, which the text tower of a model made.
        centered: whether the mean of the vectors is to be subtracted from each vector that is read.
        center: that mean, (D,); None until it is fixed.
    """

    tower: TowerIdentity
    backend: str
    centered: bool
    center: list[float] | None = None

    def to_json(self) -> str:
        """Return the text that is kept in the table."""
        # "engine" is the backend: a key of the format, older than the name.
        values = {
            "format": FORMAT,
            "tower": self.tower.to_dict(),
            "engine": self.backend,
            "centered": self.centered,
            "center": self.center,
        }
        return json.dumps(values)

    def schema(self, metadata_types: Mapping[str, pa.DataType]) -> pa.Schema:
        """Return the schema of a new table, with metadata columns of these types."""
        kinds = FIXED_COLUMNS | dict(metadata_types) | {"vector": pa.list_(pa.float16(), self.tower.width)}
        key = pa.field("id", pa.string(), nullable=False, metadata=PRIMARY_KEY)
        # Software that would write a row without a vector is refused by Lance.
        others = [pa.field(name, kind, nullable=name != "vector") for name, kind in kinds.items() if name != "id"]
        return pa.schema([key, *others], {KEY: self.to_json()})

    def require_tower(self, tower: TowerIdentity, path: str) -> None:
        """Raise if the vectors of the store at `path` are those of another tower.

        Raises:
            StoreError: naming both towers and the way out.
        """
        if tower.fingerprint == self.tower.fingerprint:
            return
        way_out = "Embed the images again with: lamplit embed SOURCE"
        if tower.imported:
            way_out = "Import vectors of that tower, by that name, with: lamplit import SOURCE"
        raise StoreError(
            f"{path} was {'imported, made' if self.tower.imported else 'embedded'} by {self.tower.spec} "
            f"(fingerprint {self.tower.fingerprint}), not by {tower.spec} (fingerprint {tower.fingerprint}): "
            f"their vectors cannot be compared. {way_out} --image-tower {tower.spec} --out ANOTHER.lance"
        )

    @classmethod
    def read(cls, schema: pa.Schema, path: str) -> Self:
        """Read and check the metadata of the table at `path`, and that its columns fit.

        Raises:
            StoreError: lamplit did not make the table, a newer one did, or something is damaged: the message names it.
        """
        text = (schema.metadata or {}).get(KEY.encode())
        if text is None:
            raise StoreError(
                f"{path} is a Lance table, but not one that lamplit made. If it has a column of vectors, make a store "
                f"of them: lamplit import {path} --image-tower NAME --out ANOTHER.lance"
            )
        try:
            fields = Fields.parse(text)
            if (found := fields.integer("format", least=1)) > FORMAT:
                raise StoreError(f"{path} has format {found}; this lamplit reads up to {FORMAT}: upgrade it")
            tower = TowerIdentity.from_fields(fields.inside("tower"))
            center = fields.numbers("center", tower.width) if fields.has("center") else None
            read = cls(tower, fields.text("engine"), fields.flag("centered"), center)
        except FieldError as error:
            raise StoreError(
                f"the metadata of {path} is damaged: {error}; embed its images into another store"
            ) from error
        if missing := [name for name in COLUMNS if name not in schema.names]:
            raise StoreError(f"{path} is damaged: it has no column {missing[0]}")
        if (kind := schema.field("vector").type) != pa.list_(pa.float16(), tower.width):
            raise StoreError(f"{path} is damaged: its vectors are {kind}, but tower.width is {tower.width}")
        return read


def require_kind(backend: str, path: str, *, of_texts: bool) -> None:
    """Raise if vectors of texts are to be added to a store of images, or the reverse.

    Args:
        backend: of the store.
        path: of the store, for the message.
        of_texts: whether the new vectors are those of texts.

    Raises:
        StoreError: naming the way out.
    """
    if (backend == OF_TEXTS) != of_texts:
        held, added = ("images", "texts") if of_texts else ("texts", "images")
        raise StoreError(f"{path} holds vectors of {held}, and these are of {added}; give another --out")
