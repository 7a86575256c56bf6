"""The paper's benchmarks on a model: images embedded once per tower and way to show them, then only arithmetic."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lamplit.data.preprocessing import Preprocessing
from lamplit.errors import StoreError, UsageError
from lamplit.evaluation.evaluator import classification_result, retrieval_result, said_of, versions
from lamplit.evaluation.protocols.known import read_tasks
from lamplit.evaluation.protocols.tasks import Classification, ImageSet, Labelled, Retrieval, Task
from lamplit.evaluation.text_vectors import TextVectors
from lamplit.files import cache_folder
from lamplit.metrics import scoring
from lamplit.metrics.probe import SEEDS, draw, ridge_accuracy
from lamplit.metrics.results import Result, measure
from lamplit.model import LiT, load
from lamplit.store.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower
from lamplit.zeroshot.classifier import average_prompts
from lamplit.zeroshot.names import templates as template_set
from lamplit.zeroshot.prompts import canonicalize

logger = logging.getLogger(__name__)
ResizeMode = Literal["squash", "crop", "own"]


def run_benchmarks(
    model: str | Path | LiT,
    benchmarks: Mapping[str, str | Path],
    *,
    resize_mode: ResizeMode = "squash",
    templates: str | Sequence[str] | None = None,
    canonical: bool = False,
    few_shot: int | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
    progress: bool = False,
) -> list[Result]:
    """Evaluate a model by the paper's protocol (section 4 and appendix I) on data sets in their authors' layouts.

    Images are embedded into stores of the cache, one per data set, tower and preprocessing. A second model that reads
    the same tower reads no image, and needs no image tower.

    Args:
        model: a model, or what `lamplit.load` opens.
        benchmarks: name of each benchmark (see `protocols.catalog`) and the folder where it lies.
        resize_mode: how images are brought to the tower's size: `squash`, plainly resized whatever their aspect ratio
            (the paper's public models); `crop`, a short side of size / 0.875 and the centre (its private ones; / 0.75
            for ImageNet-A); `own`, as the tower's library does.
        templates: name of a set or prompts with `{}`, instead of each benchmark's own.
        canonical: lower-case prompts without punctuation, as big_vision's evaluator does; not for models of cased text.
        few_shot: a linear probe on so many training images of each class, too, where a data set has any: the mean of
            three draws (see `probe`).
        out: folder for one JSON file per result, written as each is measured, with small images of what was confused.
        cache: where stores and text vectors are kept; lamplit's cache by default.
        workers: processes that decode ahead of the tower.
        progress: show a bar on stderr while embedding.

    Raises:
        UsageError: no such benchmark or template set, or a data set that is not laid out as expected.
        StoreError: none of a data set's images can be used.
        TowerError: images must be embedded, and the image tower cannot be opened.
    """
    if resize_mode not in get_args(ResizeMode):
        raise UsageError(f"there is no resize mode {resize_mode!r}; type one of {', '.join(get_args(ResizeMode))}")
    run = _Run(
        model, resize_mode, templates, canonical, out is not None, Path(cache or cache_folder()), workers, progress
    )
    tasks = [
        task for name, root in benchmarks.items() for task in read_tasks(name, Path(root))
    ]  # all there, before a long run
    results = []
    for task in tasks:
        for result in run.measure(task, few_shot):
            results.append(result)
            if out is not None:
                result.write(out)
    return results


class _Run:
    """One model on one benchmark after another."""

    def __init__(
        self,
        model: str | Path | LiT,
        resize_mode: ResizeMode,
        templates: str | Sequence[str] | None,
        canonical: bool,
        thumbnails: bool,
        cache: Path,
        workers: int,
        progress: bool,
    ) -> None:
        self.source = model
        self.model = model if isinstance(model, LiT) else load(model, towers="text")
        self.resize_mode, self.templates, self.canonical, self.thumbnails = (
            resize_mode,
            templates,
            canonical,
            thumbnails,
        )
        self.cache, self.workers, self.progress = cache, workers, progress
        self.texts = TextVectors(self.model, cache / "texts")
        self._read: tuple[str, dict[str, int], Tensor] | None = None  # the store that was read last, with its ids

    def measure(self, task: Task, few_shot: int | None) -> Iterator[Result]:
        """Embed what is not embedded yet, and measure."""
        asked: list[Callable[[], Result]] = []
        if isinstance(task, Retrieval):
            asked.append(partial(self._retrieve, task))
        else:
            asked.append(partial(self._classify, task))
            if few_shot is not None and task.training is not None and task.entry_class is None:
                asked.append(partial(self._probe, task, task.training, few_shot))
        for ask in asked:
            started = time.monotonic()
            yield replace(ask(), seconds=time.monotonic() - started)

    def _classify(self, task: Classification) -> Result:
        places, zimg, protocol = self._vectors(task.test.images, task)
        prompts = self._prompts(task)
        clean = partial(canonicalize, keep=",") if self.canonical else str
        entries = average_prompts(self.texts.encode, [[clean(n) for n in names] for names in task.class_names], prompts)
        there = [id_ for id_ in task.test.labels if id_ in places]
        labels = [tuple(task.test.labels[id_]) for id_ in there]
        answers = scoring.answer(
            zimg[[places[id_] for id_ in there]],
            entries,
            labels,
            entry_class=task.entry_class,
            logit_multiplier=float(self.model.logit_multiplier.detach()),
        )
        named = self.templates if isinstance(self.templates, str) else task.templates
        own = self.templates is not None and not isinstance(self.templates, str)
        result = classification_result(
            self.model,
            answers,
            labels,
            _class_names(task),
            benchmark=task.benchmark,
            dataset=task.title,
            language=task.language,
            protocol={
                **protocol,
                "templates": "own" if own else named,
                "prompts_per_name": len(prompts),
                "canonicalized": self.canonical,
            },
            show=(lambda chosen: _images(task.test.images, [there[i] for i in chosen])) if self.thumbnails else None,
        )
        return replace(result, skipped=len(task.test.labels) - len(there))

    def _retrieve(self, task: Retrieval) -> Result:
        places, zimg, protocol = self._vectors(task.images, task)
        there = [id_ for id_ in task.captions if id_ in places]
        texts = [text for id_ in there for text in task.captions[id_]]
        counts = torch.tensor([len(task.captions[id_]) for id_ in there])
        links = torch.arange(len(there)).repeat_interleave(counts), torch.arange(len(texts))
        result = retrieval_result(
            self.model,
            zimg[[places[id_] for id_ in there]],
            texts,
            links,
            benchmark=task.benchmark,
            dataset=task.title,
            language=task.language,
            protocol=protocol,
            ztxt=self.texts.encode(texts),
        )
        return replace(result, skipped=len(task.captions) - len(there))

    def _probe(self, task: Classification, training: Callable[[], Labelled], shots: int) -> Result:
        """Mean accuracy of three linear probes, each on its own draw of training images."""
        labelled = training()
        ids = list(labelled.labels)
        truth = torch.tensor([labelled.labels[id_][0] for id_ in ids])
        drawn = [draw(truth, shots, seed) for seed in SEEDS]
        chosen = torch.unique(torch.cat(drawn)).tolist()
        places, zimg, _ = self._vectors(_some(labelled.images, [ids[row] for row in chosen]), task)
        rows = [[row for row in rows.tolist() if ids[row] in places] for rows in drawn]
        examples = [(zimg[[places[ids[row]] for row in some]], truth[some]) for some in rows]
        places, zimg, protocol = self._vectors(task.test.images, task)
        there = [id_ for id_ in task.test.labels if id_ in places]
        labels = torch.tensor([task.test.labels[id_][0] for id_ in there])
        vectors = zimg[[places[id_] for id_ in there]]
        right = torch.stack([ridge_accuracy(*some, vectors, labels) for some in examples]).mean(0)
        said = f"ridge regression on {shots} training images a class, mean of {len(SEEDS)} draws, unit vectors"
        return Result(
            "few-shot classification",
            task.benchmark,
            task.title,
            task.language,
            f"{shots}-shot_accuracy",
            {f"{shots}-shot_accuracy": measure(right)},
            model=said_of(self.model),
            protocol={**protocol, "probe": said},
            images=len(there),
            skipped=len(task.test.labels) - len(there),
            classes=len(_class_names(task)),
            versions=versions(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _prompts(self, task: Classification) -> list[str]:
        if self.templates is not None:
            prompts = template_set(self.templates) if isinstance(self.templates, str) else list(self.templates)
        else:
            prompts = list(task.template_texts or template_set(task.templates))
        return [canonicalize(prompt) for prompt in prompts] if self.canonical else prompts

    def _vectors(self, images: ImageSet, task: Task) -> tuple[dict[str, int], Tensor, dict[str, Any]]:
        """Where each image's vector is by its id, the vectors in the joint space (N, D), and how they were made."""
        crop = task.crop if isinstance(task, Classification) else 0.875
        preprocessing = resized(self.model.identity.preprocessing, self.resize_mode, crop, images.border)
        store, skipped = self._store(images, preprocessing)
        if self._read is None or self._read[0] != store.path:
            parts = torch.split(store.vectors(), 65536)
            zimg = torch.cat([self.model.project_all(part) for part in parts])
            self._read = store.path, {id_: row for row, id_ in enumerate(store.column("id"))}, zimg
        if skipped:
            logger.warning("%s: %d images could not be used; reasons in %s", task.title, len(skipped), _listed(store))
        said = {"resize_mode": self.resize_mode, "preprocessing": preprocessing.in_words(), "split": task.split}
        return self._read[1], self._read[2], {**said, "notes": list(task.notes)}

    def _store(self, images: ImageSet, preprocessing: Preprocessing) -> tuple[Store, set[str]]:
        """The store of these images, whole, and the ids of those that could not be used."""
        content = [str(images.root.resolve()), self.model.identity.fingerprint, preprocessing.to_dict()]
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
        path = self.cache / "stores" / f"{images.key}-{digest}.lance"
        if Store.exists(path):
            store = Store(path)
            skipped = _skipped_ids(store)
            if set(images.ids) <= skipped.union(store.column("id")):
                return store, skipped
        path.parent.mkdir(parents=True, exist_ok=True)
        tower = self._image_tower(preprocessing)
        embed(images.pairs, path, image_tower=tower, workers=self.workers, progress=self.progress)
        store = Store(path)
        return store, _skipped_ids(store)

    def _image_tower(self, preprocessing: Preprocessing) -> ImageTower:
        if self.model.image_tower is None and not isinstance(self.source, LiT):
            self.model.image_tower = load(self.source, towers="image").image_tower
        tower = self.model.unlocked_image_tower
        if not isinstance(tower, ImageTower):
            raise StoreError(
                f"images must be embedded, and the model has no image tower ({self.model.identity.spec}) to do it; "
                "load it with towers='both'"
            )
        return ImageTower(tower.spec, tower.backbone, preprocessing, tower.config, weights=tower.weights)


def resized(own: Preprocessing | None, resize_mode: ResizeMode, crop: float, border: int) -> Preprocessing:
    """How a tower's images are brought to its size.

    Raises:
        UsageError: the tower is known by its vectors alone.
    """
    if own is None:
        raise UsageError("this model was tuned on imported vectors; a benchmark's images need a tower to embed them")
    if resize_mode == "squash":
        own = replace(own, fit="squash", crop_fraction=1.0)
    elif resize_mode == "crop":
        own = replace(own, fit="crop", crop_fraction=crop)
    return replace(own, border=border)


def _some(images: ImageSet, ids: Sequence[str]) -> ImageSet:
    """Some of the images, with a store that grows from one draw to the next."""
    wanted = set(ids)
    pairs = replace(images.pairs, count=len(ids), _read=lambda: (p for p in images.pairs if p.id in wanted))
    return replace(images, key=f"{images.key}-drawn", pairs=pairs, ids=ids)


def _class_names(task: Classification) -> list[str]:
    """One name for each class: the first of its first entry."""
    owners = range(len(task.class_names)) if task.entry_class is None else task.entry_class
    first: dict[int, str] = {}
    for names, owner in zip(task.class_names, owners, strict=True):
        first.setdefault(owner, names[0])
    return [first[owner] for owner in sorted(first)]


def _listed(store: Store) -> Path:
    return Path(f"{store.path.removesuffix('.lance')}.skipped.jsonl")


def _skipped_ids(store: Store) -> set[str]:
    file = _listed(store)
    return (
        {json.loads(line)["id"] for line in file.read_text(encoding="utf-8").splitlines()} if file.is_file() else set()
    )


def _images(images: ImageSet, ids: Sequence[str]) -> list[Path | bytes]:
    """Files or bytes of some images; read no further than needed."""
    wanted, found = set(ids), dict[str, Path | bytes]()
    for pair in images.pairs:
        if pair.id in wanted:
            found[pair.id] = pair.image
            if len(found) == len(wanted):
                break
    return [found[id_] for id_ in ids]
