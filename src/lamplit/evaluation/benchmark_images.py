"""Images of benchmarks, embedded into stores of the cache, once per data set, tower and preprocessing."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.errors import StoreError
from lamplit.evaluation.protocols.tasks import ImageSet
from lamplit.model import LiT, load
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower

logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 65536  # brought into the joint space together


@dataclass(frozen=True)
class ImageVectors:
    """Vectors of images in the joint space, and the row of each image."""

    rows: Mapping[str, int]  # by id; an image that cannot be used has none
    zimg: Tensor  # (N, D) unit vectors
    reasons: Path  # the file that says why images cannot be used; there is none if all can

    def usable(self, ids: Collection[str], title: str) -> list[str]:
        """Keep the ids of images that have a vector.

        Raises:
            StoreError: none has; the message says of which `title`.
        """
        found = [id_ for id_ in ids if id_ in self.rows]
        if not found:
            raise StoreError(f"{title}: none of its {len(ids):,} images could be used; reasons in {self.reasons}")
        return found

    def of(self, ids: Sequence[str]) -> Tensor:
        """Return the vectors of some images, (number of ids, D)."""
        return self.zimg[[self.rows[id_] for id_ in ids]]


class BenchmarkImages:
    """Embeds the images of benchmarks for one model, or reads the store of images that are embedded already.

    Args:
        model: the model; it may be open without its image tower.
        folder: what the model was loaded from, to open the image tower if it is needed; None if the model is the
            caller's own, which is used as it is.
        stores: where the stores are kept.
        workers: processes that decode ahead of the tower.
        progress: show a bar on stderr while embedding.
    """

    def __init__(self, model: LiT, folder: str | Path | None, stores: Path, workers: int, progress: bool) -> None:
        self.model, self.folder, self.stores = model, folder, stores
        self.workers, self.progress = workers, progress
        self._last: tuple[str, ImageVectors] | None = None  # path of the store that was read last, and its vectors

    def read(self, images: ImageSet, preprocessing: Preprocessing, title: str) -> ImageVectors:
        """Return the vectors of a set of images; embed those that are not in its store.

        Raises:
            StoreError: images must be embedded and the model has no image tower, or no image can be used.
        """
        store, skipped = self._store(images, preprocessing)
        if self._last is None or self._last[0] != store.path:
            rows = {id_: row for row, id_ in enumerate(store.column("id"))}
            self._last = store.path, ImageVectors(rows, self._project(store), _skipped_file(store))
        if skipped:
            logger.warning("%s: %d images could not be used; reasons in %s", title, len(skipped), _skipped_file(store))
        return self._last[1]

    def _project(self, store: Store) -> Tensor:
        # Not `read_store`: the store's tower has the benchmark's preprocessing, and so another fingerprint.
        return torch.cat([self.model.project_all(part) for part in torch.split(store.vectors(), _ROWS_AT_ONCE)])

    def _store(self, images: ImageSet, preprocessing: Preprocessing) -> tuple[Store, set[str]]:
        """Return the whole store of these images, and the ids of those that could not be used."""
        content = [str(images.root.resolve()), self.model.identity.fingerprint, preprocessing.to_dict()]
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
        path = self.stores / f"{images.key}-{digest}.lance"
        if Store.exists(path):
            store = Store(path)
            skipped = _skipped_ids(store)
            if set(images.ids) <= skipped.union(store.column("id")):
                return store, skipped
        path.parent.mkdir(parents=True, exist_ok=True)
        tower = with_preprocessing(self._image_tower(), preprocessing)
        embed(
            images.pairs, path, image_tower=tower, workers=self.workers, device=str(self.model.device),
            progress=self.progress,
        )  # fmt: skip
        store = Store(path)
        return store, _skipped_ids(store)

    def _image_tower(self) -> ImageTower:
        if self.model.image_tower is None and self.folder is not None:
            self.model.image_tower = load(self.folder, towers="image", device=self.model.device).image_tower
        tower = self.model.unlocked_image_tower
        if not isinstance(tower, ImageTower):
            raise StoreError(
                f"images must be embedded, and the model has no image tower ({self.model.identity.spec}) to do it; "
                "load it with towers='both'"
            )
        return tower


def with_preprocessing(tower: ImageTower, preprocessing: Preprocessing) -> ImageTower:
    """Return a tower of the same weights, not copied and where they are, that takes its images another way."""
    other = copy.copy(tower)  # not built anew: that would run an image through it
    other.preprocessing = preprocessing
    return other


def some_images(images: ImageSet, ids: Sequence[str]) -> ImageSet:
    """Take some of the images, with a store that grows from one draw to the next."""
    wanted = set(ids)
    pairs = replace(images.pairs, count=len(ids), read=lambda: (p for p in images.pairs if p.id in wanted))
    return replace(images, key=f"{images.key}-drawn", pairs=pairs, ids=ids)


def find_images(images: ImageSet, ids: Sequence[str]) -> list[Path | bytes]:
    """Return files or bytes of some images; read no further than needed."""
    wanted, found = set(ids), dict[str, Path | bytes]()
    for pair in images.pairs:
        if pair.id in wanted:
            found[pair.id] = pair.image
            if len(found) == len(wanted):
                break
    return [found[id_] for id_ in ids]


def _skipped_file(store: Store) -> Path:
    return Path(f"{store.path.removesuffix('.lance')}.skipped.jsonl")


def _skipped_ids(store: Store) -> set[str]:
    file = _skipped_file(store)
    if not file.is_file():
        return set()
    with file.open(encoding="utf-8") as lines:  # not splitlines: a name may hold a rarer separator
        return {json.loads(line)["id"] for line in lines}
