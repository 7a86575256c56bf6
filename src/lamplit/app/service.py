"""A model and a store, open for many who ask at once. Knows nothing of HTTP."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from lamplit.app.choice import ClassChoice
from lamplit.app.image_bytes import as_jpeg
from lamplit.app.map import Projection, project, sample
from lamplit.errors import ImageError
from lamplit.model import LiT
from lamplit.retrieval.searcher import Hit, Searcher
from lamplit.store.lance_store import Store
from lamplit.store.rows import COLUMNS
from lamplit.zeroshot.classifier import class_vectors, predict_proba
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES

ON_MAP = 2000  # images
FEW_VALUES = 30
_KEPT_CLASSES = 16  # lists of classes whose vectors are kept


@dataclass(frozen=True)
class Guess:
    """One class of one image."""

    name: str
    probability: float
    cosine: float


class Service:
    """What the page and the API ask. The model answers one at a time, so memory does not grow with the askers.

    Raises:
        StoreError: the store was embedded by another tower than the model reads.
    """

    def __init__(self, model: LiT, store: Store, choice: ClassChoice | None = None) -> None:
        self.model = model
        self.store = store
        self.choice = choice
        self._searcher = Searcher(model, store)
        self._ids = pa.array(store.column("id"), pa.string())  # sorted
        self._model_lock = Lock()
        self._map_lock = Lock()
        self._projection: Projection | None = None
        self._decoders = BoundedSemaphore(2)
        self._class_vectors: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = OrderedDict()
        self._jpegs = lru_cache(maxsize=4096)(self._jpeg)  # of thumbnails: some 15 kB each

    def place(self, name: str) -> int | None:
        """Where an image of this id is, in the order of the ids; nothing where there is none."""
        place = bisect_left(range(len(self._ids)), name, key=lambda i: str(self._ids[i]))
        return place if place < len(self._ids) and str(self._ids[place]) == name else None

    def row(self, place: int) -> Hit:
        """Return an image of the store with all that is known of it."""
        [row] = self.store.rows([place])
        metadata = {name: row[name] for name in self.store.metadata_columns}
        return Hit(1.0, row["id"], row["path"], row["texts"], metadata)

    def by_words(self, query: str, k: int, offset: int, where: str | None) -> list[Hit]:
        """Find images by words."""
        return self._searcher.nearest(self.embed_texts([query])[0], k, offset=offset, where=where)

    def by_image(self, image: bytes, k: int, offset: int, where: str | None) -> list[Hit]:
        """Find images by another."""
        return self._searcher.nearest(self.embed_images([image])[0], k, offset=offset, where=where)

    def neighbours(self, place: int, k: int, offset: int, where: str | None) -> list[Hit]:
        """Find images by one of the store, which is left out itself."""
        [vector] = self.vectors([place])
        hits = self._searcher.nearest(vector, offset + k + 1, where=where)
        return [hit for hit in hits if hit.id != str(self._ids[place])][offset : offset + k]

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) unit vectors of texts."""
        with self._model_lock:
            return self.model.encode_texts(texts)

    def embed_images(self, images: Sequence[bytes]) -> Tensor:
        """(N, D) unit vectors of encoded images."""
        with self._model_lock:
            return self.model.encode_images(images, batch_size=1)  # decoded one by one: each may be 100 megapixels

    @torch.no_grad()
    def vectors(self, places: Sequence[int]) -> Tensor:
        """(N, D) unit vectors of images of the store."""
        column = self.store.take(places, ["vector"])["vector"].combine_chunks()
        vectors = torch.tensor(column.flatten().to_numpy(zero_copy_only=False)).float().view(len(places), -1)
        return self.model.project(F.normalize(vectors, dim=-1).to(self.model.device))

    def classify(
        self, zimg: Tensor, names: Sequence[str], templates: Sequence[str] | None
    ) -> tuple[list[list[Guess]], list[bool | None]]:
        """Classes of each of (N, D) images, best first; and whether it is none of these, where that is calibrated."""
        templates = tuple(templates or DEFAULT_TEMPLATES)
        classes = self._classes(tuple(names), templates)
        cosines = zimg @ classes.T
        probabilities = predict_proba(self.model, zimg, classes)
        order = cosines.argsort(dim=-1, descending=True)
        guesses = [
            [Guess(names[i], float(probabilities[row, i]), float(cosines[row, i])) for i in best]
            for row, best in enumerate(order.tolist())
        ]
        threshold = self._threshold(names, templates)
        nearest = cosines.amax(-1).tolist()
        return guesses, [None if threshold is None else cosine < threshold for cosine in nearest]

    def jpeg(self, place: int, side: int, *, keep: bool) -> bytes:
        """Return an image of the store as a JPEG of at most `side` x `side`.

        Raises:
            ImageError: it cannot be read any more.
        """
        return self._jpegs(place, side) if keep else self._jpeg(place, side)

    @cached_property
    def sampled(self) -> pa.Table:
        """All but the vectors of the images on the map."""
        return self.store.take(self._on_map, [*COLUMNS[:-1], *self.store.metadata_columns])

    @property
    def projection(self) -> Projection:
        """Where the images of the sample are on the map."""
        with self._map_lock:  # it draws random numbers, whose generator all threads share
            if self._projection is None:
                self._projection = project(self._sampled_vectors)
            return self._projection

    def values(self, column: str | None, query: str | None) -> list[Any]:
        """What to colour the map by: cells of a column, or cosines to words, or nothing."""
        if query is not None:
            cosines: list[Any] = (self._sampled_vectors @ self.embed_texts([query])[0]).tolist()
            return cosines
        if column is not None:
            return [plain(value, 80) for value in self.sampled[column].to_pylist()]
        return [None] * len(self.sampled)

    @cached_property
    def columns(self) -> list[tuple[str, str, list[Any]]]:
        """Name, kind and, where they are few, values of each column of metadata in the sample."""
        described = []
        for name in self.store.metadata_columns:
            kind = self.sampled.schema.field(name).type
            is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            word = "number" if is_number else "text" if pa.types.is_string(kind) else "other"
            cells = [plain(value) for value in self.sampled[name].to_pylist()] if word != "other" else []
            values = sorted({value for value in cells if value is not None})
            described.append((name, word, values if len(values) <= FEW_VALUES else []))
        return described

    @cached_property
    def _on_map(self) -> list[int]:
        return sample(len(self._ids), ON_MAP)

    @cached_property
    def _sampled_vectors(self) -> Tensor:
        return self.vectors(self._on_map)

    def _classes(self, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        with self._model_lock:
            if (names, templates) not in self._class_vectors:
                self._class_vectors[names, templates] = class_vectors(self.model, names, templates)
                if len(self._class_vectors) > _KEPT_CLASSES:
                    self._class_vectors.popitem(last=False)
            return self._class_vectors[names, templates]

    def _threshold(self, names: Sequence[str], templates: Sequence[str]) -> float | None:
        """Return the calibrated threshold if these are the classes that were calibrated."""
        choice = self.choice
        if choice is None or (list(choice.names), list(choice.templates)) != (list(names), list(templates)):
            return None
        return choice.threshold

    def _jpeg(self, place: int, side: int) -> bytes:
        [path] = self.store.take([place], ["path"])["path"].to_pylist()
        if not path:
            raise ImageError("the store knows no file of it")
        with self._decoders:
            return as_jpeg(Path(path), side)


def plain(value: Any, max_length: int = 2000) -> Any:
    """Bring a cell of a store into what JSON has; long texts lose their end."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)  # more digits than a browser's numbers have
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(item, max_length) for item in value[:100]]
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
