"""Zero-shot evaluation against clip-benchmark's own code, and its text part against open_clip's.

The same two towers on both sides, EfficientNet-Lite0 and MiniLM: lamplit exports the model, and open_clip opens it.
What the model has learnt does not matter for time. The images are real ones (the stamps), dealt out to folders of
classes.

- text: class vectors of ImageNet's names in CLIP's 80 templates; open_clip's `build_zero_shot_classifier` pads each
  prompt to the context length, here its own default of 77 tokens and the paper's 16.
- whole: from images and names to accuracy, the two parts of clip-benchmark's `evaluate` on a torch data loader
  against `run_benchmarks`, the first time (neither images nor prompts are known, but the tower's file for ONNX Runtime
  is there, as a minute of embedding leaves it) and again (both known, as every further model with the same tower
  finds the images).
- 50,000 cached vectors and 1,000 classes of 80 known prompts: what is left of a whole ImageNet evaluation.

    python benchmarks/evaluate.py [--quick]
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import open_clip
import torch
from clip_benchmark.metrics import zeroshot_classification
from open_clip import build_zero_shot_classifier
from timing import arguments, compare, console, finish, in_turn, product_rate
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder

import lamplit
from lamplit.evaluation.result_building import Subject, classification_result
from lamplit.evaluation.text_vectors import TextVectors
from lamplit.metrics import scoring
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.zeroshot.classifier import average_prompts
from lamplit.zeroshot.names import class_names, templates

TOWER, TEXT = "demo:efficientnet-lite0", "demo:minilm"
PROMPTS = templates("clip-80")
Models = tuple[LiT, Any, Any, Any]  # ours, theirs, their transform, their tokenizer


def main() -> None:
    options = arguments(__doc__ or "")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    names = list(dict.fromkeys(first for first, *_ in class_names("imagenet")))
    some = names[:: 250 if options.quick else 40]
    prompts = PROMPTS[:: 10 if options.quick else 1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {tokens: make_model(folder / f"{tokens}", tokens) for tokens in (77, 16)}
        figures = [text_part(options, models[tokens], tokens, some, prompts) for tokens in models]
        figures.append(whole(options, folder, models[77], some, prompts, 20 if options.quick else 300))
        figures.append(
            cached(options, folder, names[:20] if options.quick else names, prompts, 500 if options.quick else 50_000)
        )
    finish(options, figures)


def make_model(folder: Path, context_length: int) -> Models:
    """Our model, and the same one as open_clip opens it, with its transform and its tokenizer."""
    image = lamplit.open_image_tower(TOWER)
    text = lamplit.open_text_tower(TEXT, width=image.width, context_length=context_length)
    LiT(text, image.identity(), image).save(folder / "model")
    lamplit.export(folder / "model", folder / "open_clip", to="open-clip")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder / 'open_clip'}")
    return (
        lamplit.load(folder / "model"),
        theirs.eval(),
        transform,
        open_clip.get_tokenizer(f"local-dir:{folder / 'open_clip'}"),
    )


def text_part(
    options: Any, made_model: Models, context_length: int, names: list[str], prompts: list[str]
) -> dict[str, Any]:
    model, theirs, _, tokenizer = made_model
    named = [[name] for name in names]
    made: dict[str, torch.Tensor] = {}

    def ours() -> None:
        made["ours"] = average_prompts(model.encode_texts, named, prompts)

    def open_clips() -> None:
        made["theirs"] = build_zero_shot_classifier(theirs, tokenizer, names, prompts).T

    sides = {"lamplit": ours, "open_clip build_zero_shot_classifier": open_clips}
    title = f"class vectors of {len(names)} names in {len(prompts)} templates, at most {context_length} tokens"
    figures = compare(title, in_turn(sides, min(options.turns, 3), warm_up=False), ours="lamplit")
    figures["largest_difference"] = float((made["ours"] - made["theirs"]).abs().max())
    console.print(f"largest difference of the class vectors: {figures['largest_difference']:.1e}")
    texts = [prompt.format(name) for name in names for prompt in prompts]
    figures["limit"] = open_clip_median(figures) / least_seconds(model, texts)
    console.print(f"limit, if all of our time were products at this machine's speed: {figures['limit']:.2f}x")
    return figures


def open_clip_median(figures: dict[str, Any]) -> float:
    return next(side["median"] for name, side in figures["sides"].items() if name.startswith("open_clip"))


def least_seconds(model: LiT, prompts: list[str]) -> float:
    """Time that the products of the text tower's matrices take at the speed of a large product."""
    assert model.text_tower is not None
    tokens = sum(map(len, model.text_tower.tokenize(prompts)))
    layers = [part for part in model.text_tower.encoder.modules() if isinstance(part, torch.nn.Linear)]
    return 2 * tokens * sum(layer.weight.numel() for layer in layers) / product_rate()


def whole(
    options: Any, folder: Path, made_model: Models, names: list[str], prompts: list[str], num_images: int
) -> dict[str, Any]:
    model, theirs, transform, tokenizer = made_model
    root = deal_out(folder / "images", names, num_images)
    for_them = [prompt.replace("{}", "{c}") for prompt in prompts]
    numbers = count()

    def clip_benchmark() -> None:
        loader = DataLoader(ImageFolder(str(root), transform=transform), batch_size=64)
        # The two parts of its `evaluate`; its last line, the accuracy, fails on NumPy 2.4 and later.
        classifier = zeroshot_classification.zero_shot_classifier(theirs, tokenizer, names, for_them, "cpu", amp=False)
        logits, target = zeroshot_classification.run_classification(theirs, classifier, loader, "cpu", amp=False)
        (logits.argmax(1) == target).float().mean()

    def first() -> None:
        again(str(next(numbers)))

    def again(cache: str = "again") -> None:
        lamplit.run_benchmarks(model, {"folder": root}, templates=prompts, cache=folder / cache)

    lamplit.embed(root, folder / "made.lance", image_tower=TOWER, backend="onnx")
    sides = {"lamplit, the first time": first, "lamplit, again": again, "clip-benchmark": clip_benchmark}
    again()
    title = f"{num_images} images, {len(names)} classes, {len(prompts)} templates: whole evaluation"
    figures = compare(title, in_turn(sides, min(options.turns, 3), warm_up=False), ours="lamplit, again")
    least = least_seconds(model, [prompt.replace("{}", name) for name in names for prompt in prompts])
    least += num_images * image_operations(model) / product_rate()
    figures["limit"] = figures["sides"]["clip-benchmark"]["median"] / least
    console.print(f"limit of the first time, if all of it were products at this speed: {figures['limit']:.2f}x")
    return figures


def image_operations(model: LiT) -> int:
    """Count the operations of an image's forward pass."""
    assert model.image_tower is not None
    height, width = model.image_preprocessing().image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.image_tower(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    return counter.get_total_flops()


def deal_out(root: Path, names: list[str], num_images: int) -> Path:
    """Copy images into one folder per class, in the order of the classes' names that both sides sort by."""
    names.sort()
    files = [pair.image for pair in lamplit.read_pairs(lamplit.fetch("stamps")) if isinstance(pair.image, Path)]
    for number in range(num_images):
        file = files[number % len(files)]
        target = root / names[number % len(names)].replace("/", " ") / f"{number}{file.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return root


def cached(options: Any, folder: Path, names: list[str], prompts: list[str], num_images: int) -> dict[str, Any]:
    model = lamplit.load(folder / "77" / "model", towers="text")
    known = TextVectors(model, folder / "texts")
    began = time.perf_counter()
    known.encode([prompt.replace("{}", name) for name in names for prompt in prompts])
    encoding = time.perf_counter() - began
    vectors = F.normalize(torch.randn(num_images, model.width), dim=-1)
    rows = [Row(f"{i:06}", "", "", [], vector) for i, vector in enumerate(vectors)]
    store = Store.create(folder / "cached.lance", model.identity, rows, backend="torch")
    labels = [(i % len(names),) for i in range(num_images)]

    def evaluate() -> None:
        entries = average_prompts(known.encode, [[name] for name in names], prompts)
        answers = scoring.answer(model.read_store(store), entries, labels, logit_multiplier=10.0)
        classification_result(Subject({"name": "b"}, "b", "b", "en", {}), answers, labels, names)

    title = f"{num_images:,} cached vectors, {len(names):,} classes, {len(prompts) * len(names):,} known prompts"
    figures = compare(title, in_turn({"lamplit": evaluate}, options.turns), ours="lamplit")
    figures["encoding_the_prompts_once"] = encoding
    console.print(f"encoding those prompts, once: {encoding:.1f} s")
    return figures


if __name__ == "__main__":
    main()
