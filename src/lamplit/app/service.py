"""A model and a store, open for many clients at once. Knows nothing of HTTP."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lamplit.app.collection_map import CollectionMap, Corners, can_colour
from lamplit.app.encoding import AT_ONCE, LATER, ImageEncoder, PageReader, pool_of
from lamplit.app.image_bytes import as_jpeg, as_pixels
from lamplit.app.kept_rows import KeptRows, plain
from lamplit.errors import ImageError, UsageError
from lamplit.locations.paths import path_of
from lamplit.model import LiT
from lamplit.retrieval.locating import can_locate, heat_map
from lamplit.retrieval.nearest import Found as Rows
from lamplit.retrieval.projection import sample_rows
from lamplit.retrieval.searcher import Searcher
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import COLUMNS, FIXED_COLUMNS
from lamplit.store.where.conditions import parse_condition
from lamplit.towers.texts.word_reader import WordReader
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.classifier import class_list
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES

SAMPLED = 2000  # images, which tell what the columns hold
MAX_LISTED_VALUES = 30  # of a column; one with more is typed, not chosen from
Shown = dict[str, Any]  # id, name, texts and metadata of an image
Found = tuple[float, Shown]  # and its cosine
_CACHED_CLASS_LISTS = 16
_CACHED_QUERIES = 1024  # of some 5 kB each


@dataclass(frozen=True)
class Among:
    """Which images of the store are searched; by default all.

    Attributes:
        where: a condition on what the page shows.
        area: the tag of a map, and the corners of a polygon on it.
    """

    where: str | None = None
    area: tuple[str, Corners] | None = None


@dataclass(frozen=True)
class Guess:
    """One class of one image."""

    name: str
    probability: float
    cosine: float


class Service:
    """What the page and the API ask for.

    Each kind of question has a few threads of its own, so that none waits for another kind, and memory does not grow
    with the clients.

    Args:
        model: an open model.
        store: embedded with the image tower that the model reads.
        classes: what the page begins with: names of classes, or a class list, which keeps its calibration.
        words: the model's text tower for ONNX Runtime, if it has one.
        text_column: column with the texts that the model was tuned on, if known.

    Raises:
        StoreError: another tower embedded the store than the model reads.
        TowerError: the class list is for images of another tower.
        UsageError: the class list is a multi-label one, or a name is given twice.
    """

    def __init__(
        self,
        model: LiT,
        store: Store,
        classes: ClassList | Sequence[str] | None = None,
        words: WordReader | None = None,
        text_column: str | None = None,
    ) -> None:
        self.model = model
        self._text_column = text_column
        self.classes = _given_classes(model, classes)
        self._reader = PageReader(model, words)
        self._images = ImageEncoder(model)
        self._class_lock = Lock()
        self._class_lists = lru_cache(_CACHED_CLASS_LISTS)(self._make_class_list)
        self.showing, self.mapping = pool_of(2, "image", AT_ONCE), pool_of(1, "map", AT_ONCE)
        self.searching = pool_of(2, "search", LATER)
        self.locating = pool_of(1, "where", LATER)
        self.classifying, self.embedding = pool_of(1, "classify", LATER), pool_of(1, "embed", LATER)
        self._open(store)

    def of(self, store: Store) -> Service:
        """Return the service of another version of the store; the model, the threads and what was read stay.

        Raises:
            StoreError: another tower embedded it than the model reads.
        """
        other = copy(self)
        for name in ("sampled", "columns"):  # of the store as it was
            vars(other).pop(name, None)
        other._open(store)
        if self._is_measured:
            other.measure_relevance()
        return other

    def _open(self, store: Store) -> None:
        self.store = store
        self._searcher = Searcher(self._reader, store)
        self._words = lru_cache(_CACHED_QUERIES)(self._searcher.encode)
        self._rows = KeptRows(store)
        self._ids = store.arrow_column("id")  # sorted
        # A condition on `path` would tell, letter by letter, where the images are on this machine.
        self._shown = pa.schema({name: FIXED_COLUMNS[name] for name in ("id", "texts")} | store.column_types)
        self._is_measured = False
        self.map = CollectionMap(store, self._searcher, self._captions)

    def row_of(self, name: str) -> int | None:
        """Return the row of the image with this id, in the order of the ids; None if there is none."""
        row = bisect_left(self._ids, name, key=lambda found: found.as_py())
        return row if row < len(self._ids) and self._ids[row].as_py() == name else None

    def item(self, row: int) -> Shown:
        """Return what the page shows of an image of the store."""
        return self._rows.take([row])[0]

    def items(self, rows: Sequence[int]) -> list[Shown]:
        """Return what the page shows of some images of the store."""
        return self._rows.take(rows)

    def by_words(self, query: str, k: int, offset: int, among: Among) -> list[Found]:
        """Find images by words, or by a sum of words; return their cosines and what is shown of them."""
        return self.by_vector(self._words(query), k, offset, among)

    def measure_relevance(self) -> None:
        """Measure what score is an answer to words, or read what was measured before; until then `least` knows none."""
        if self.model.text_tower is not None and len(self.store):
            # Any vector will do; there is no word that every text tower knows.
            self._searcher.min_score(np.eye(1, self.model.width, dtype=np.float32)[0])
            self._is_measured = True

    def least(self, query: str) -> float | None:
        """Return the cosine below which an image is probably no answer to words; None if that was not measured."""
        return self._searcher.min_score(self._words(query)) if self._is_measured else None

    def by_vector(self, vector: NDArray[np.float32] | Tensor, k: int, offset: int, among: Among) -> list[Found]:
        """Find images by a (D,) unit vector."""
        found = self._find(vector, k, offset, among)
        return list(zip(found.scores.tolist(), self._rows.take(found.rows.tolist()), strict=True))

    def neighbours(self, row: int, k: int, offset: int, among: Among) -> list[Found]:
        """Find images by one of the store, which is left out itself."""
        [vector] = self.vectors([row])
        others = {row, *self._searcher.collection.copies.of_rows(np.array([row]))[0].tolist()}
        found = self._find(vector, offset + k + 1, 0, among)
        kept = np.flatnonzero(~np.isin(found.rows, list(others)))[offset : offset + k]
        return list(zip(found.scores[kept].tolist(), self._rows.take(found.rows[kept].tolist()), strict=True))

    def _find(self, vector: NDArray[np.float32] | Tensor, k: int, offset: int, among: Among) -> Rows:
        if among.where is not None:  # or it may name what the page does not show
            parse_condition(among.where, self._shown)
        inside = None if among.area is None else self.map.inside(*among.area)
        return self._searcher.find(vector, k, offset=offset, where=among.where, among=inside)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, D) unit vectors of texts."""
        return self._searcher.reader.encode_texts(texts)

    async def embed_image(self, image: BinaryIO) -> Tensor:
        """(D,) unit vector of an encoded image, together with those that others have sent.

        Raises:
            ImageError: it cannot be used, or is too large.
            TowerError: the model is open without its image tower.
        """
        return await self._images.encode(image)

    def vectors(self, rows: Sequence[int]) -> Tensor:
        """(N, D) unit vectors of images of the store, in the joint space."""
        chosen = np.asarray(self._searcher.collection.vectors[list(rows)], np.float32)
        return F.normalize(torch.from_numpy(chosen), dim=-1)

    def classify(
        self, zimg: Tensor, names: Sequence[str], templates: Sequence[str] | None
    ) -> tuple[list[list[Guess]], list[bool | None]]:
        """Classify (N, D) images.

        Args:
            zimg: unit vectors in the joint space.
            names: the classes. If they are those of the list that was given at the start, that list answers, with its
                calibration.
            templates: prompts with `{}`; by default those of that list, or lamplit's own for other classes.

        Returns:
            The classes of each image, best first; and whether it is none of these, or None if nobody calibrated that.
        """
        classes = self._classes_for(list(names), None if templates is None else list(templates))
        cosines = classes.cosines(zimg)
        probabilities, given = classes.classify(zimg)
        order = cosines.argsort(dim=-1, descending=True, stable=True)
        guesses = [
            [Guess(classes.names[i], float(probabilities[image, i]), float(cosines[image, i])) for i in best]
            for image, best in enumerate(order.tolist())
        ]
        is_calibrated = classes.thresholds is not None
        return guesses, [not reached if is_calibrated else None for reached in given.any(1).tolist()]

    def jpeg(self, row: int, side: int) -> bytes:
        """Return an image of the store as a JPEG of at most `side` x `side`.

        Raises:
            ImageError: its file cannot be read any more.
        """
        return as_jpeg(self._file_of(row), side)

    def where(self, row: int, query: str, side: int) -> bytes:
        """Draw where in an image of the store words, or a sum of them, are read: a PNG of at most `side` x `side`.

        Raises:
            ImageError: its file cannot be read any more.
            TowerError: the image tower cannot show places.
            UsageError: the words cannot be read.
        """
        found = heat_map(self.model, as_pixels(self._file_of(row)), self._words(query), side)
        encoded = io.BytesIO()
        found.draw().save(encoded, "PNG")
        return encoded.getvalue()

    @cached_property
    def locates(self) -> bool:
        """Whether `where` can be drawn."""
        return can_locate(self.model)

    def _file_of(self, row: int) -> Path:
        [path] = self.store.take([row], ["path"])["path"].to_pylist()
        if not path:
            raise ImageError("the store knows no file of it")
        return path_of(path)

    @cached_property
    def sampled(self) -> pa.Table:
        """All columns but the vectors of some images, always the same ones."""
        rows = sample_rows(len(self._ids), SAMPLED)
        return self.store.take(rows, [*COLUMNS[:-1], *self.store.metadata_columns])

    def _captions(self, rows: NDArray[np.int64]) -> list[list[str]]:
        """Return the texts of some images in the language of the model; none if it reads no words."""
        if self.model.text_tower is None:
            return [[] for _ in rows]
        column = self._text_column if self._text_column in self.store.metadata_columns else "texts"
        cells = self.store.take(rows, [column])[column].to_pylist()
        return [[cell] if isinstance(cell, str) else [str(text) for text in cell or ()] for cell in cells]

    @cached_property
    def columns(self) -> list[tuple[str, str, list[Any], bool]]:
        """Name, kind and values of each metadata column in the sample, and whether the map is coloured by it.

        There are no values if they are too many to list.
        """
        described = []
        for name in self.store.metadata_columns:
            kind = self.sampled.schema.field(name).type
            is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            word = "number" if is_number else "text" if pa.types.is_string(kind) else "other"
            cells = [plain(value) for value in self.sampled[name].to_pylist()] if word != "other" else []
            values = sorted({value for value in cells if value is not None})
            tells = can_colour(kind) and (is_number or 1 < len(values) <= len(self.sampled) / 2)
            described.append((name, word, values if len(values) <= MAX_LISTED_VALUES else [], tells))
        return described

    def _classes_for(self, names: list[str], templates: list[str] | None) -> ClassList:
        classes = self.classes
        if classes is not None and names == classes.names and templates in (None, classes.templates):
            return classes
        return self._class_lists(tuple(names), tuple(templates or DEFAULT_TEMPLATES))

    def _make_class_list(self, names: tuple[str, ...], templates: tuple[str, ...]) -> ClassList:
        with self._class_lock:  # the tokenizers of transformers take one thread
            return class_list(self.model, names, templates)


def _given_classes(model: LiT, classes: ClassList | Sequence[str] | None) -> ClassList | None:
    if isinstance(classes, ClassList):
        if classes.multi_label:
            raise UsageError("the page shows no multi-label classes; lamplit classify does")
        classes.require_model(model)
        return classes
    return class_list(model, list(classes)) if classes else None
