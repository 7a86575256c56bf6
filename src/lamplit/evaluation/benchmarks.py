"""The paper's benchmarks on a model: images embedded once per tower and resize mode, then only arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.valid_text import valid_id
from lamplit.errors import StoreError, UsageError
from lamplit.evaluation.benchmark_images import BenchmarkImages, ImageVectors, find_images, some_images
from lamplit.evaluation.model_metadata import model_metadata
from lamplit.evaluation.protocols.known import read_tasks
from lamplit.evaluation.protocols.tasks import Classification, ImageSet, Labelled, Retrieval, Task
from lamplit.evaluation.result_building import Subject, classification_result, probe_result, retrieval_result
from lamplit.evaluation.text_vectors import TextVectors
from lamplit.files import cache_folder
from lamplit.metrics import scoring
from lamplit.metrics.probe import SEEDS, draw, ridge_accuracy
from lamplit.metrics.results import Result
from lamplit.model import LiT, as_model
from lamplit.zeroshot.classifier import average_prompts
from lamplit.zeroshot.names import as_templates
from lamplit.zeroshot.names import templates as template_set
from lamplit.zeroshot.prompts import canonicalize, fill

ResizeMode = Literal["squash", "crop", "own"]
_CROP = 0.875  # big_vision's central crop; a task of classification may have another


def run_benchmarks(
    model: str | Path | LiT,
    benchmarks: Mapping[str, str | Path] | Sequence[tuple[str, str | Path]],
    *,
    resize_mode: ResizeMode = "squash",
    templates: str | Sequence[str] | None = None,
    canonical: bool = False,
    few_shot: int | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
    device: str | None = None,
    progress: bool = False,
) -> list[Result]:
    """Evaluate a model by the paper's protocol (section 4 and appendix I) on data sets in their authors' layouts.

    Images are embedded into stores of the cache, one per data set, tower and preprocessing. A second model that reads
    the same tower reads no image, and needs no image tower.

    On the command line: `lamplit evaluate --benchmark`.

    Args:
        model: an open model, its folder, or a name that `load` takes.
        benchmarks: name of each benchmark (see `list_benchmarks`) and the folder of its data set; a list of pairs may
            name a benchmark more than once.
        resize_mode: how images are brought to the tower's size: `squash`, plainly resized whatever their aspect ratio
            (the paper's public models); `crop`, a short side of size / 0.875 and the centre (its private ones; / 0.75
            for ImageNet-A); `own`, as the tower's library does.
        templates: prompts with `{}` for the class name, or one of them, or the name of a set such as `clip-80`, instead
            of each benchmark's own.
        canonical: lower-case prompts without punctuation, as big_vision's evaluator does; not for models of cased text.
        few_shot: also fit a linear probe on so many training images of each class, if a data set has any: the mean of
            three draws. The probe is fitted in closed form to whitened vectors (table 3 of the paper).
        out: folder for one JSON file per result, written as each is measured, with small images of what was confused.
        cache: folder of the stores and text vectors; by default lamplit's cache.
        workers: processes that decode ahead of the tower.
        device: torch device of a model that is not open yet; by default the accelerator, if there is one.
        progress: show a bar on stderr while embedding.

    Returns:
        The results of every benchmark, in order: of each task zero-shot classification or retrieval, then the probe.

    Raises:
        UsageError: no such benchmark or template set, or a template without `{}`.
        PairsError: a data set is not laid out as expected.
        StoreError: none of a data set's images can be used, or none of a class's training images.
        TowerError: images must be embedded, and the image tower cannot be opened.

    Example:
        >>> [result] = lamplit.run_benchmarks("runs/stamps", [("folder", "my-classes/")])
    """
    if resize_mode not in get_args(ResizeMode):
        raise UsageError(f"there is no resize mode {resize_mode!r}; type one of {', '.join(get_args(ResizeMode))}")
    prompts = None if templates is None else as_templates(templates)
    fill("", prompts or ())  # refused before a long run
    named = list(benchmarks.items()) if isinstance(benchmarks, Mapping) else list(benchmarks)
    opened = as_model(model, device=device, towers="text")
    folder = Path(cache or cache_folder())
    images = BenchmarkImages(opened, None if isinstance(model, LiT) else model, folder / "stores", workers, progress)
    texts = TextVectors(opened, folder / "texts")
    run = _Run(
        model=opened,
        images=images,
        texts=texts,
        metadata=model_metadata(opened, texts.fingerprint),
        resize_mode=resize_mode,
        template_set=templates if isinstance(templates, str) and templates not in (prompts or ()) else None,
        prompts=prompts,
        canonical=canonical,
        few_shot=few_shot,
        thumbnails=out is not None,
    )
    tasks = [task for name, root in named for task in read_tasks(name, Path(root))]  # all there, before a long run
    results = []
    for result in (result for task in tasks for result in run.measure(task)):
        results.append(result)
        if out is not None:
            result.write(out)
    return results


@dataclass(frozen=True)
class _Examples:
    """Training images of a few-shot probe."""

    draws: Sequence[tuple[Tensor, Tensor]]  # vectors and labels of each
    fewest: int  # images of the class that has the fewest in a draw
    notes: Sequence[str]  # what could not be used


@dataclass
class _Run:
    """One model on one benchmark after another."""

    model: LiT
    images: BenchmarkImages
    texts: TextVectors
    metadata: Mapping[str, str]
    resize_mode: ResizeMode
    template_set: str | None  # its name; None if prompts of one's own are given, or none
    prompts: Sequence[str] | None  # instead of each benchmark's own
    canonical: bool
    few_shot: int | None
    thumbnails: bool

    def measure(self, task: Task) -> Iterator[Result]:
        """Embed what is not embedded yet, and measure."""
        if isinstance(task, Retrieval):
            yield self._retrieve(task)
            return
        yield self._classify(task)
        if self.few_shot is not None and task.training is not None and task.entry_class is None:
            yield self._probe(task, task.training, self.few_shot)

    def _classify(self, task: Classification) -> Result:
        started = time.monotonic()
        vectors = self._vectors(task, task.test.images)
        usable = vectors.usable(task.test.labels, task.title)
        labels = [tuple(task.test.labels[id_]) for id_ in usable]
        prompts = self._prompts(task)
        answers = scoring.answer(
            vectors.of(usable),
            self._class_entries(task, prompts),
            labels,
            entry_class=task.entry_class,
            logit_multiplier=float(self.model.logit_multiplier.detach()),
        )
        named = task.templates if self.prompts is None else self.template_set
        protocol = {
            "templates": named or "own",
            "prompts_per_name": len(prompts),
            "canonicalized": self.canonical,
        }
        if named is None:
            protocol["prompts"] = prompts
        subject = self._subject(task, task.test.images, len(task.test.labels) - len(usable), started, protocol)

        def read_images(rows: Sequence[int]) -> list[Path | bytes]:
            return find_images(task.test.images, [usable[row] for row in rows])

        return classification_result(
            subject, answers, labels, _class_names(task), read_images=read_images if self.thumbnails else None
        )

    def _retrieve(self, task: Retrieval) -> Result:
        started = time.monotonic()
        vectors = self._vectors(task, task.images)
        usable = vectors.usable(task.captions, task.title)
        texts = [text for id_ in usable for text in task.captions[id_]]
        counts = torch.tensor([len(task.captions[id_]) for id_ in usable])
        links = torch.arange(len(usable)).repeat_interleave(counts), torch.arange(len(texts))
        subject = self._subject(task, task.images, len(task.captions) - len(usable), started)
        return retrieval_result(subject, vectors.of(usable), self.texts.encode(texts), links)

    def _probe(self, task: Classification, training: Callable[[], Labelled], shots: int) -> Result:
        """Measure the mean accuracy of three linear probes, each on its own draw of training images."""
        started = time.monotonic()
        examples = self._draw_examples(task, training(), shots)
        vectors = self._vectors(task, task.test.images)
        usable = vectors.usable(task.test.labels, task.title)
        zimg, labels = vectors.of(usable), torch.tensor([task.test.labels[id_][0] for id_ in usable])
        right = torch.stack([ridge_accuracy(*drawn, zimg, labels) for drawn in examples.draws]).mean(0)
        of_class = f"{shots}" if examples.fewest == shots else f"{examples.fewest} to {shots}"
        words = f"ridge regression on {of_class} training images a class, mean of {len(SEEDS)} draws, unit vectors"
        skipped = len(task.test.labels) - len(usable)
        protocol = {"probe": words, "notes": [*task.notes, *examples.notes]}
        subject = self._subject(task, task.test.images, skipped, started, protocol)
        return probe_result(subject, right, shots, len(_class_names(task)))

    def _draw_examples(self, task: Classification, training: Labelled, shots: int) -> _Examples:
        """Draw training images, and embed no others; those that cannot be used are missing in their draws.

        Raises:
            StoreError: a class has none in a draw.
        """
        ids = list(training.labels)
        truth = torch.tensor([training.labels[id_][0] for id_ in ids])
        draws = [draw(truth, shots, seed) for seed in SEEDS]
        chosen = torch.unique(torch.cat(draws)).tolist()
        vectors = self._vectors(task, some_images(training.images, [ids[row] for row in chosen]))
        rows = [[row for row in drawn.tolist() if ids[row] in vectors.rows] for drawn in draws]
        counts = torch.stack([torch.bincount(truth[some], minlength=int(truth.max()) + 1) for some in rows])
        if (fewest := int(counts.min())) == 0:
            name = _class_names(task)[int(counts.amin(0).argmin())]
            raise StoreError(
                f"{task.title}: none of the {shots} training images that were drawn of class {name!r} could be used; "
                f"reasons in {vectors.reasons}; take these images away, or ask for more shots"
            )
        missing = sum(ids[row] not in vectors.rows for row in chosen)
        note = (
            f"{missing:,} of the {len(chosen):,} training images that were drawn could not be used, and were left out"
        )
        examples = [(vectors.of([ids[row] for row in some]), truth[some]) for some in rows]
        return _Examples(examples, fewest, [note] if missing else [])

    def _class_entries(self, task: Classification, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors of the task's entries, (E, D)."""
        clean = partial(canonicalize, keep=",") if self.canonical else str
        names = [[clean(name) for name in names] for names in task.class_names]
        return average_prompts(self.texts.encode, names, prompts)

    def _prompts(self, task: Classification) -> list[str]:
        prompts = list(self.prompts or task.template_texts or template_set(task.templates))
        return [canonicalize(prompt) for prompt in prompts] if self.canonical else prompts

    def _preprocessing(self, task: Task, images: ImageSet) -> Preprocessing:
        crop = task.crop if isinstance(task, Classification) else _CROP
        return resized(self.model.identity.preprocessing, self.resize_mode, crop, images.border)

    def _vectors(self, task: Task, images: ImageSet) -> ImageVectors:
        return self.images.read(images, self._preprocessing(task, images), task.title)

    def _subject(
        self,
        task: Task,
        images: ImageSet,
        skipped: int,
        started: float,
        protocol: Mapping[str, Any] | None = None,
    ) -> Subject:
        words = {
            "resize_mode": self.resize_mode,
            "preprocessing": self._preprocessing(task, images).in_words(),
            "split": task.split,
            "notes": list(task.notes),
        }
        return Subject(
            self.metadata, task.benchmark, task.title, task.language, {**words, **(protocol or {})},
            source=valid_id(str(images.root)), skipped=skipped, started=started,
        )  # fmt: skip


def resized(own: Preprocessing | None, resize_mode: ResizeMode, crop: float, border: int) -> Preprocessing:
    """Return the preprocessing that brings images to a tower's size by a resize mode.

    Args:
        own: the tower's own; None if the tower is known by its vectors alone.
        resize_mode: see `run_benchmarks`.
        crop: fraction of the resized image that a central crop keeps.
        border: pixels to cut off on every side first.

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


def _class_names(task: Classification) -> list[str]:
    """Return one name for each class: the first of its first entry."""
    owners = range(len(task.class_names)) if task.entry_class is None else task.entry_class
    first: dict[int, str] = {}
    for names, owner in zip(task.class_names, owners, strict=True):
        first.setdefault(owner, names[0])
    return [first[owner] for owner in sorted(first)]
