"""A tuning step from the store against open_clip's --lock-image step.

Same towers on both sides: a ViT-B/16 (timm) and a text tower of BERT-base's size (transformers), with random
weights, for which the time is the same. open_clip's step is its own model, lock, loss and training loop.

    python benchmarks/tune.py [--quick]
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CustomTextCLIP
from open_clip_train.train import train_one_epoch
from timing import arguments, compare, console, finish, in_turn, product_rate
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, BertTokenizerFast

from lamplit.losses.contrastive import softmax_loss
from lamplit.towers.devices import keep_freed_memory
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.texts.text_tower import TextTower, open_text_tower
from lamplit.tuning.large_batch import SparseEmbeddings, _Saved, backward_in_chunks, cut_texts
from lamplit.tuning.optimizers import build_optimizer, gradient_norm, step_clipped

CPU = torch.device("cpu")


def main() -> None:
    options = arguments(__doc__ or "")
    logging.getLogger().setLevel(logging.WARNING)
    torch.manual_seed(0)
    keep_freed_memory()  # as `lamplit tune` does; both sides gain
    with tempfile.TemporaryDirectory() as folder:
        figures = [*locked_steps(options, Path(folder)), *padding(options, Path(folder))]
        figures += [large_batch(options, Path(folder)), accumulation(options, Path(folder))]
    finish(options, figures)


def bert_folder(folder: Path, name: str, width: int, num_layers: int, dropout: float = 0.0) -> Path:
    """Write a BERT with random weights as both libraries read it."""
    path = folder / name
    if path.exists():
        return path
    config = BertConfig(
        vocab_size=30522, hidden_size=width, num_hidden_layers=num_layers, num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    BertTokenizerFast(str(vocabulary)).save_pretrained(path)
    return path


def captions(lengths: np.ndarray) -> list[list[int]]:
    """Random token ids between [CLS] and [SEP]."""
    generator = np.random.default_rng(0)
    return [[101, *generator.integers(1000, 30000, length - 2).tolist(), 102] for length in lengths]


def open_clip_model(image_tower: str, image_size: int, text: Path, width: int) -> CustomTextCLIP:
    """open_clip's two towers, the image tower locked as --lock-image does it."""
    vision = {"timm_model_name": image_tower, "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "none",
              "image_size": image_size}  # fmt: skip
    read = {"hf_model_name": str(text), "hf_model_pretrained": False, "hf_pooler_type": "cls_pooler",
            "hf_proj_type": "linear"}  # fmt: skip
    model = CustomTextCLIP(width, vision, read, output_dict=True)
    model.lock_image_tower()
    return model


class OpenClipStep:
    """open_clip's own training loop over one (accumulated) step."""

    def __init__(self, model: nn.Module, images: torch.Tensor, texts: torch.Tensor, accum_freq: int = 1) -> None:
        self.model, self.accum_freq = model, accum_freq
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
        batches = list(zip(images.chunk(accum_freq), texts.chunk(accum_freq), strict=True))
        loader = _Loader(batches, len(images))
        self.data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        self.options = SimpleNamespace(
            device="cpu", precision="fp32", distill=False, accum_freq=accum_freq, skip_scheduler=True, horovod=False,
            grad_clip_norm=1.0, rank=0, local_rank=0, log_every_n_steps=10**9, world_size=1, wandb=False,
            batch_size=len(images) // accum_freq, distributed=False, log_local=False,
        )  # fmt: skip

    def __call__(self) -> None:
        train_one_epoch(self.model, self.data, open_clip.ClipLoss(), 0, self.optimizer, None, None, None, self.options)


class _Loader(list[Any]):
    """What open_clip's loop asks of a data loader."""

    def __init__(self, batches: list[Any], num_samples: int) -> None:
        super().__init__(batches)
        self.num_batches, self.num_samples = len(batches), num_samples


class LamplitStep:
    """One step of `lamplit tune`: texts, loss, clipping, optimizer; images come as vectors."""

    def __init__(
        self, tower: TextTower, zimg: torch.Tensor, tokens: list[list[int]], chunk_tokens: int = 8192,
        memory_budget: int | None = None,
    ) -> None:  # fmt: skip
        self.tower, self.zimg, self.tokens = tower.train(), zimg, tokens
        self.chunk_tokens, self.memory_budget = chunk_tokens, memory_budget
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        named = [*tower.named_parameters(), ("log_scale", self.log_scale)]
        self.parameters = [parameter for _, parameter in named]
        self.optimizer = build_optimizer("adamw", named, lr=1e-4, weight_decay=0.1)
        self.embeddings = SparseEmbeddings(tower)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        texts = cut_texts(self.tower, self.tokens, self.chunk_tokens)
        with self.embeddings:
            backward_in_chunks(
                [self.zimg, texts], lambda zimg, ztxt: softmax_loss(zimg, ztxt, self.log_scale.exp()), device=CPU,
                memory_budget=self.memory_budget,
            )  # fmt: skip
        step_clipped(self.optimizer, float(gradient_norm(self.parameters)), 1.0)


def text_tower(folder: Path, width: int) -> TextTower:
    return open_text_tower(f"hf:{folder}", width=width)


def bert_size(options: Any) -> str:
    return "2 x 64" if options.quick else "12 x 768 (BERT-base)"


def vectors(count: int, width: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width), dim=-1)


def locked_steps(options: Any, folder: Path) -> list[dict[str, Any]]:
    """Per pair: our step at 16 tokens, open_clip's at 16 and at its default 77, and the one-time embedding."""
    image_tower, image_size = ("test_vit", 160) if options.quick else ("vit_base_patch16_224", 224)
    bert = bert_folder(folder, "step", 64 if options.quick else 768, 2 if options.quick else 12, dropout=0.1)
    tower = open_image_tower(f"timm:{image_tower}", weights="random")
    first, *others = (
        locked_step(options, tower, image_tower, image_size, bert, batch)
        for batch in ((4, 8) if options.quick else (16, 64, 256))
    )
    return [first, *others, whole_run(first)]


def locked_step(
    options: Any, tower: ImageTower, image_tower: str, image_size: int, bert: Path, batch: int
) -> dict[str, Any]:
    width = tower.width
    images = torch.randn(batch, 3, image_size, image_size)
    pixels = torch.randint(0, 256, (batch, 3, image_size, image_size), dtype=torch.uint8)
    full, real = captions(np.full(batch, 16)), captions(coco_lengths(batch).clip(max=16))
    at_16 = torch.tensor([[*row, *[0] * (16 - len(row))] for row in real])
    at_77 = F.pad(at_16, (0, 61))
    theirs = open_clip_model(image_tower, image_size, bert, width)
    ours, zimg = text_tower(bert, width), vectors(batch, width)

    def embed() -> None:
        with torch.no_grad():
            tower(pixels)

    first = "lamplit, from the store, captions as long as they are"
    seconds = in_turn(
        {
            first: LamplitStep(ours, zimg, real),
            "lamplit, from the store, every caption 16 tokens": LamplitStep(ours, zimg, full),
            "open_clip --lock-image, padded to 16 tokens": OpenClipStep(theirs, images, at_16),
            "open_clip --lock-image, padded to 77 (its default)": OpenClipStep(theirs, images, at_77),
            "lamplit, embedding an image (once)": embed,
        },
        options.turns if batch <= 64 else min(options.turns, 3),
    )
    mean = sum(map(len, real)) / batch
    towers = f"{image_tower} locked, text tower {bert_size(options)}"
    name = f"a pair's step in a batch of {batch}, {towers}, {mean:.1f} tokens on average"
    figures = compare(name, seconds, ours=first, unit=batch)
    least = least_seconds(LamplitStep(ours, zimg, real), real) / batch
    figures["limits"] = {
        tokens: figures["sides"][side]["median"] / least
        for tokens, side in zip((16, 77), list(seconds)[2:4], strict=True)
    }
    limits = ", ".join(f"{limit:.2f}x at {tokens}" for tokens, limit in figures["limits"].items())
    console.print(f"limit, if our step were matrix products at this machine's speed and AdamW alone: {limits}")
    return figures


def least_seconds(step: LamplitStep, tokens: list[list[int]]) -> float:
    """Time of the products of a step, forward and twice backward, at the speed of a large product, and of AdamW."""
    weights = sum(part.weight.numel() for part in step.tower.encoder.modules() if isinstance(part, nn.Linear))
    step()  # fills the gradients
    adamw = statistics.median(in_turn({"adamw": step.optimizer.step}, 5)["adamw"])
    return 6 * sum(map(len, tokens)) * weights / product_rate() + adamw


def whole_run(figures: dict[str, Any]) -> dict[str, Any]:
    """Reckon a whole run, with the one-time embedding, from the figures of a step."""
    step, _, same, default, once = (side["median"] for side in figures["sides"].values())
    whole: dict[str, Any] = {"title": "whole run with the one-time embedding, open_clip's time over ours", "epochs": {}}
    console.print(whole["title"])
    for epochs in (1, 3, 10, 50):
        mine = once + epochs * step
        whole["epochs"][epochs] = {"16 tokens": epochs * same / mine, "77 tokens": epochs * default / mine}
        console.print(f"  {epochs:3} epochs: {epochs * same / mine:5.2f}x at 16, {epochs * default / mine:5.2f}x at 77")
    return whole


def coco_lengths(count: int) -> np.ndarray:
    """Lengths as COCO's captions have in WordPiece: mean 13, 95th percentile 17 to 18, few beyond 25."""
    drawn = np.random.default_rng(0).gamma(28.0, 13.0 / 28.0, count)
    return np.clip(np.round(drawn), 7, 50).astype(int)


def padding(options: Any, folder: Path) -> list[dict[str, Any]]:
    """Forward and backward of one text tower on captions of COCO-like lengths, grouped by length and padded."""
    bert = bert_folder(folder, "light", 64 if options.quick else 384, 2 if options.quick else 6)
    tower = text_tower(bert, 64).train()
    return [padded(options, tower, batch) for batch in ([8, 32] if options.quick else [16, 64, 256, 1024])]


def padded(options: Any, tower: TextTower, batch: int) -> dict[str, Any]:
    lengths = coco_lengths(batch)
    tokens = captions(lengths)
    embeddings = SparseEmbeddings(tower)

    def grouped() -> None:
        tower.zero_grad()
        with embeddings:
            torch.autograd.backward(tower(tokens).sum())

    def padded_to(length: int) -> Callable[[], None]:
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in tokens])

        def run() -> None:
            tower.zero_grad()
            hidden = tower.encoder(input_ids=ids, attention_mask=ids != 0).last_hidden_state
            torch.autograd.backward(tower.head(hidden[:, 0]).sum())

        return run

    title = f"text tower forward and backward, {len(tokens)} captions, mean {lengths.mean():.1f} tokens"
    longest = padded_to(int(lengths.max()))
    sides = {"lamplit": grouped, "padded to the longest of the batch": longest, "padded to 77": padded_to(77)}
    turns = options.turns if batch > 64 else 4 * options.turns  # short ones spread more
    return compare(title, in_turn(sides, turns), ours="lamplit", unit=len(tokens))


def large_batch(options: Any, folder: Path) -> dict[str, Any]:
    """A big batch in chunks of which none, half or all keep their graph, against one plain step."""
    bert = bert_folder(folder, "light", 64 if options.quick else 384, 2 if options.quick else 6)
    batch = 64 if options.quick else 512
    zimg, tokens = vectors(batch, 512), captions(np.full(batch, 13))
    tower = text_tower(bert, 512)
    saved = _Saved()
    with saved:
        tower(tokens[:64])
    half = saved.num_bytes * (batch // 64) // 2
    chunk = 13 * 64
    seconds = in_turn(
        {
            "lamplit, chunks of 64, no graph kept": LamplitStep(tower, zimg, tokens, chunk, 0),
            "lamplit, chunks of 64, half of the graphs kept": LamplitStep(tower, zimg, tokens, chunk, half),
            "lamplit, chunks of 64, every graph kept": LamplitStep(tower, zimg, tokens, chunk, 10**15),
            "plain step, one graph": LamplitStep(tower, zimg, tokens, 10**9, 10**15),
        },
        options.turns,
    )
    return compare(f"a batch of {batch} in chunks", seconds, ours="plain step, one graph")


def accumulation(options: Any, folder: Path) -> dict[str, Any]:
    """open_clip's --accum-freq against our chunks, on towers so small that the loss shows.

    `tune` itself keeps the graphs of chunks as long as half of the free memory holds them, here of all.
    """
    bert = bert_folder(folder, "small", 128, 2)
    batch, frequency = (64, 4) if options.quick else (4096, 32)
    tokens, zimg = captions(np.full(batch, 13)), vectors(batch, 512)
    theirs = open_clip_model("test_vit", 160, bert, 512)
    theirs.visual = nn.Identity()  # images come as vectors here, too: only the texts and the loss are compared
    seconds = in_turn(
        {
            "lamplit": LamplitStep(text_tower(bert, 512), zimg, tokens, 13 * batch // frequency),
            "lamplit, no graph kept": LamplitStep(text_tower(bert, 512), zimg, tokens, 13 * batch // frequency, 0),
            f"open_clip --accum-freq {frequency}": OpenClipStep(theirs, zimg, torch.tensor(tokens), frequency),
        },
        options.turns,
    )  # fmt: skip
    return compare(f"a batch of {batch} from {frequency} micro-batches, small towers", seconds, ours="lamplit")


if __name__ == "__main__":
    main()
