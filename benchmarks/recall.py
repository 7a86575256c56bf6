"""What tuning adds to its start, at the defaults and with the demo towers: no option but data, towers and the seed.

    python benchmarks/recall.py [ROW ...] [--folder runs/recall] [--turns SPLITS] [--quick]

Each row is one question; the default is all of them (hours on two cores; `--folder` keeps what is done, and the next
call goes on). Every split holds out a fifth of the distinct captions by another seed. "Start" is the model before the
first step, "last" the one after the last step, "kept" the checkpoint that `tune` saves; it is chosen by these same
captions, so it is a little too good where the captions are few. A row of its own test has other pictures there, and no
such choice: the sets of icons that were held out, another vendor's emoji, Fashion-MNIST. The gain is the mean over the
splits of last (or tuned) less start, with the deviation of that difference.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from pyarrow import parquet
from rich.table import Table
from timing import console, filled, finish, parser

import lamplit
from lamplit.towers.texts.kernel_head import KernelHead
from lamplit.tuning.head import closed_form
from lamplit.tuning.sides import token_features
from lamplit.tuning.split import held_out_recall, split_store

IMAGE_TOWER, TEXT_TOWER = "demo:efficientnet-lite0", "demo:minilm"
# Sets whose hands drew no other set that is tuned on, and the further sets of these hands, which are left out.
OTHER_HANDS = ("openmoji", "fluent-emoji-flat", "icon-park", "glyphs-poly", "flat-color-icons")
SAME_HANDS = ("fluent-color",)
COPY = 0.85  # cosine of two images that may be one drawing
START = {"steps": 0}  # what there is before the first step
RECALLS = (*(f"{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)), "mean_recall")
EVERYTHING_ALIKE = 1e9  # so much shrinkage leaves nothing of the covariance: image vectors stay as they are
Scores = dict[str, dict[str, float]]  # by model: start, last, kept or tuned; and chance


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("row", nargs="*", help=f"out of {', '.join(ROWS)}; all by default")
    options.add_argument("--folder", type=Path, default=Path("runs/recall"), help="stores, runs and figures")
    options = filled(options.parse_args())
    if unknown := set(options.row) - set(ROWS):
        raise SystemExit(f"error: there is no row {', '.join(sorted(unknown))}; there are: {', '.join(ROWS)}")
    bench = Bench(options.folder, options.quick)
    figures = []
    for name in options.row or (["stamps"] if options.quick else ROWS):
        splits = list(bench.splits(name, ROWS[name], options.turns))
        show(name, splits)
        figures.append({"title": name, "splits": splits})
    finish(options, figures)


def show(name: str, splits: Sequence[Scores]) -> None:
    """Print mean and deviation over the splits, of each model and measure."""
    measures = list(splits[0]["start"])
    table = Table("", *measures, title=f"{name}: mean and deviation over {len(splits)} splits")
    for model in splits[0]:
        table.add_row(model, *(spread([split[model].get(measure) for split in splits]) for measure in measures))
    after = "last" if "last" in splits[0] else "tuned"
    gains = [[split[after][measure] - split["start"][measure] for split in splits] for measure in measures]
    table.add_row("gain", *map(spread, gains))
    console.print(table)


def spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{mean(known):.3f}" + (f" ± {stdev(known):.3f}" if len(known) > 1 else "")


@dataclass(frozen=True)
class Bench:
    """A folder of stores and runs; `quick` takes one step instead of all."""

    folder: Path
    quick: bool

    def splits(self, name: str, row: Callable[[Bench, int], Scores], seeds: int) -> Iterator[Scores]:
        """Yield the figures of each split, from its file if it is done."""
        for seed in range(seeds):
            file = self.folder / f"{name}-{seed}.json"
            if not file.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                figures = row(self, seed)
                file.write_text(json.dumps(figures, indent=1) + "\n")
            yield json.loads(file.read_text())

    def store(self, *names: str) -> Path:
        """Embed data sets of the catalogue into one store."""
        store = self.folder / f"{'+'.join(names)}.lance"
        for name in names:
            pairs = lamplit.fetch(name, **({"workers": 2, "progress": True} if name == "icons" else {}))
            lamplit.embed(pairs, store, image_tower=IMAGE_TOWER, progress=True)
        return store

    def part(self, store: Path, name: str, keep: Callable[[dict[str, Any]], bool]) -> Path:
        """Copy a store, and delete the rows that are not to be kept."""
        out = self.folder / f"{name}.lance"
        if not out.exists():
            shutil.copytree(store, out)
        copy = lamplit.Store(out)
        copy.delete([row["id"] for row in copy.rows() if not keep(row)])
        return out

    def unclassified(self, store: Path) -> Path:
        """Make a store of the same vectors, without the tower that made them and so without its classifier."""
        out = self.folder / f"{store.stem}-vectors.lance"
        if not out.exists():
            vectors = self.folder / f"{store.stem}-vectors"
            if not vectors.exists():
                lamplit.export_vectors(store, vectors)
            lamplit.import_vectors(vectors, out, image_tower="vectors of EfficientNet-Lite0")
        return out

    def tune(self, store: Path, name: str, seed: int = 0, text_tower: str = TEXT_TOWER, **given: Any) -> Any:
        """Tune at the defaults, or go on where such a run was stopped; return its report."""
        given = {"steps": 1} | given if self.quick else given
        settings = lamplit.TuneSettings(text_tower, seed=seed, **given)
        return lamplit.tune(store, self.folder / f"{name}-{seed}", settings, progress=True)

    def held_out(self, store: Path, name: str, seed: int, text_tower: str = TEXT_TOWER) -> Scores:
        """Tune, and return recall on the captions that were held out."""
        report = self.tune(store, name, seed, text_tower)
        models = {"start": report.start, "last": report.last, "kept": report.best}
        scores = {model: {measure: found[measure] for measure in RECALLS} for model, found in models.items()}
        chance = {name: int(name[-1]) / report.held_out_captions for name in RECALLS[:-1]}
        return scores | {"chance": chance}

    def start_and_tuned(self, store: Path, name: str, seed: int, measure: Callable[[str], dict[str, float]]) -> Scores:
        """Tune, and measure the start and the tuned model elsewhere."""
        scores = {}
        for model, given in {"start": START, "tuned": {}}.items():
            run = f"{name}-{model}"
            self.tune(store, run, seed, **given)
            scores[model] = measure(str(self.folder / f"{run}-{seed}"))
        return scores


def retrieval(store: Path) -> Callable[[str], dict[str, float]]:
    """Measure a model's recall on all pairs of a store."""

    def measure(model: str) -> dict[str, float]:
        metrics = lamplit.evaluate(model, store, split="all")[0].metrics
        recalls = [measure.value for name, measure in metrics.items() if "recall@" in name]
        return {name: metrics[name].value for name in RECALLS[:-1]} | {RECALLS[-1]: mean(recalls)}

    return measure


def stamps(bench: Bench, seed: int) -> Scores:
    """The stamps, with closed forms that lack a part."""
    store = bench.store("stamps")
    return bench.held_out(store, "stamps", seed) | closed_forms(lamplit.Store(store), seed)


def clip_art(bench: Bench, seed: int) -> Scores:
    return bench.held_out(bench.store("openclipart"), "openclipart", seed)


def icons(bench: Bench, seed: int) -> Scores:
    return bench.held_out(bench.store("icons"), "icons", seed)


def carried(bench: Bench, seed: int) -> Scores:
    """The stamps, on a run on icons and clip art without what looks like a stamp: some drawings are both."""
    stamps, both = lamplit.Store(bench.store("stamps")), bench.store("icons", "openclipart")
    others = lamplit.Store(both)
    is_copy = (others.vectors() @ stamps.vectors().T).amax(1) > COPY
    copies = {name for name, found in zip(others.column("id"), is_copy.tolist(), strict=True) if found}
    bench.tune(bench.part(both, "base", lambda row: row["id"] not in copies), "base")
    return bench.held_out(Path(stamps.path), "stamps-carried", seed, f"model:{bench.folder / 'base-0'}")


def other_sets(bench: Bench, seed: int) -> Scores:
    """Icons of hands that drew none of those that are tuned on; a set for each seed."""
    held_out = OTHER_HANDS[seed]
    store = bench.store("icons")
    rest = bench.part(store, "icons-rest", lambda row: row["set"] not in (*OTHER_HANDS, *SAME_HANDS))
    test = bench.part(store, f"icons-{held_out}", lambda row: row["set"] == held_out)
    runs = {"start": START, "tuned": {}}  # of all five sets
    for model, given in runs.items():
        bench.tune(rest, f"icons-rest-{model}", **given)
    return {model: retrieval(test)(str(bench.folder / f"icons-rest-{model}-0")) for model in runs}


def other_vendor(bench: Bench, seed: int) -> Scores:
    """Emoji of one vendor, by the names of another's."""
    store = bench.store("emoji")
    mine = bench.part(store, "emoji-google", lambda row: row["vendor"] == "google")
    theirs = bench.part(store, "emoji-twitter", lambda row: row["vendor"] == "twitter")
    return bench.start_and_tuned(mine, "emoji-google", seed, retrieval(theirs))


def stamps_unclassified(bench: Bench, seed: int) -> Scores:
    return bench.held_out(bench.unclassified(bench.store("stamps")), "stamps-unclassified", seed)


def icons_unclassified(bench: Bench, seed: int) -> Scores:
    return bench.held_out(bench.unclassified(bench.store("icons")), "icons-unclassified", seed)


def fashion_mnist(bench: Bench, seed: int) -> Scores:
    """Ten class names, read by a model of stamps, clip art and icons; the test's images."""
    test, store = bench.folder / "fashion-mnist-test.parquet", bench.folder / "fashion-mnist-test.lance"
    parquet.write_table(parquet.read_table(lamplit.fetch("fashion-mnist"), filters=[("split", "=", "test")]), test)
    lamplit.embed(test, store, image_tower=IMAGE_TOWER, progress=True)

    def measure(model: str) -> dict[str, float]:
        found = lamplit.evaluate(model, store, label_column="label", templates="big_vision-8")
        return {"accuracy@1": found[-1].metrics["accuracy@1"].value}

    return bench.start_and_tuned(bench.store("stamps", "openclipart", "icons"), "all", seed, measure)


def closed_forms(store: lamplit.Store, seed: int) -> Scores:
    """Held-out recall of closed forms that lack a part."""
    tower = lamplit.open_image_tower(store.tower.spec)
    split = split_store(store, "texts", 0.2, seed)
    train, held_out, zimg = split.train, split.held_out, store.vectors()
    distinct = list(train.texts)
    texts = [distinct[i] for i in train.text_index.tolist()]
    text_tower = lamplit.open_text_tower(TEXT_TOWER, width=tower.width)
    linear = text_tower.head
    kernel = KernelHead(linear.in_features, tower.width, closed_form.count_anchors(distinct, tower.class_head))
    model = lamplit.LiT(text_tower, store.tower)
    parts: dict[str, tuple[Any, Any, dict[str, float]]] = {
        "linear head": (linear, tower.class_head, {}),
        "classifier alone": (kernel, tower.class_head, {"PAIR_WEIGHT": 1e-9}),
        "training pairs alone": (kernel, None, {}),
        "plain image vectors": (kernel, tower.class_head, {"SHRINKAGE": EVERYTHING_ALIKE}),
    }
    scores = {}
    known = cache(partial(token_features, text_tower))  # no head changes them
    for name, (text_tower.head, class_head, constants) in parts.items():
        readings = {"token_features": lambda _, tokens, progress=False: known(tuple(map(tuple, tokens)))}
        with changed(**readings, **constants):
            closed_form.fit_head(text_tower, zimg[train.image_index], texts, class_head)
        found = held_out_recall(zimg, model.encode_texts(list(held_out.texts)), held_out)
        scores[f"closed form: {name}"] = {measure: found[measure] for measure in RECALLS}
    return scores


@contextmanager
def changed(**constants: Any) -> Iterator[None]:
    """Run with other constants and functions of the closed form."""
    before = {name: getattr(closed_form, name) for name in constants}
    for name, value in constants.items():
        setattr(closed_form, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(closed_form, name, value)


ROWS = {
    "stamps": stamps,
    "stamps-carried": carried,
    "openclipart": clip_art,
    "icons": icons,
    "icons-other-sets": other_sets,
    "emoji-other-vendor": other_vendor,
    "stamps-unclassified": stamps_unclassified,
    "icons-unclassified": icons_unclassified,
    "fashion-mnist": fashion_mnist,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
