"""Images per second, from JPEG files on disk to vectors in a store.

Against the bare eager forward pass of the same timm tower on pixels that are in memory already (what peers
pay before any decoding); and decoding alone against open_clip's image transform, on one core.

    python benchmarks/embed.py [--quick]
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timing import arguments, compare, console, finish, in_turn
from torch import Tensor, nn

import lamplit
from lamplit.data.decoding.images import decode_image
from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.towers.images.image_tower import ImageTower, open_image_tower


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(Path(folder) / "images", 16 if options.quick else 512)
        figures = [decoding(options, files)]
        towers = (
            [("test_efficientnet", 16)]
            if options.quick
            else [("tf_efficientnet_lite0", 512), ("vit_base_patch16_224", 48)]
        )
        for name, count in towers:
            figures.append(end_to_end(options, name, files[:count], Path(folder)))
    finish(options, figures)


def photographs(folder: Path, count: int) -> list[Path]:
    """Write the stamps' images as JPEGs of 500 x 375, the usual size of ImageNet and COCO."""
    folder.mkdir()
    files = []
    sources = list(lamplit.read_pairs(lamplit.fetch("stamps")))
    for number in range(count):
        with Image.open(str(sources[number % len(sources)].image)) as image:
            file = folder / f"{number:04}.jpg"
            image.convert("RGB").resize((500, 500)).crop((0, 62, 500, 437)).save(file, quality=90)
        files.append(file)
    return files


def decoding(options: Any, files: list[Path]) -> dict[str, Any]:
    """Decode and resize to 224 on one core, and how far the result is from the slow reference."""
    from open_clip.transform import image_transform

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    files = files[:128]
    theirs = image_transform(224, is_train=False)
    preprocessing = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3)

    def open_clip() -> None:
        for file in files:
            theirs(Image.open(file))

    def ours() -> None:
        for file in files:
            preprocessing.resize(decode_image(file.read_bytes()))

    seconds = in_turn({"lamplit": ours, "open_clip transform": open_clip}, options.turns)
    figures = compare(f"decode and resize, one core, {len(files)} JPEGs", seconds, ours="lamplit", unit=len(files))
    differences = []
    for file in files[:32]:
        fast = preprocessing.normalize(preprocessing.resize(decode_image(file.read_bytes()))[None])[0]
        with Image.open(file) as image:
            slow = preprocessing.reference(image.convert("RGB"))
        differences.append(float((fast - slow).abs().mean()) * 127.5)  # in levels of 255: the deviation is 0.5
    figures["mean_difference"] = sum(differences) / len(differences)
    console.print(
        f"mean difference from the tower's reference preprocessing: {figures['mean_difference']:.3f} of 255\n"
    )
    torch.set_num_threads(threads)
    return figures


def end_to_end(options: Any, name: str, files: list[Path], folder: Path) -> dict[str, Any]:
    """`embed` from files to store, backend chosen by itself, against the bare eager forward.

    ONNX Runtime's file is there from an earlier run, as it is in every run of a tower but the first.
    """
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    weights = folder / f"{name}.pth"
    torch.save(model.state_dict(), weights)
    tower = open_image_tower(f"timm:{name}", weights=weights)
    source = folder / f"{name}.csv"
    source.write_text("image\n" + "".join(f"{file}\n" for file in files))
    run = _Embed(tower, source, folder)

    with ProcessPoolExecutor(1, get_context("spawn")) as other:  # where lamplit has not changed how memory is kept
        asked = (name, len(files), tower.preprocessing.image_size)
        sides = {
            "lamplit embed, files to store": run,
            "bare eager forward, pixels in memory": lambda: other.submit(forward, *asked).result(),
        }
        seconds = in_turn(sides, options.turns)
    title = f"{name}, {len(files)} images, backend {run.backend}; seconds an image"
    return compare(title, seconds, ours="lamplit embed, files to store", unit=len(files))


def forward(*asked: Any) -> None:
    """Run the bare tower on all images."""
    model, pixels = bare_tower(*asked)
    with torch.no_grad():
        for batch in pixels.split(16):
            model(batch)


@cache
def bare_tower(name: str, count: int, size: tuple[int, int]) -> tuple[nn.Module, Tensor]:
    """A timm tower and pixels for it, made at the first turn, which is the warm-up."""
    return timm.create_model(name, pretrained=False, num_classes=0).eval(), torch.randn(count, 3, *size)


class _Embed:
    """Embeds the same files into a new store each time."""

    def __init__(self, tower: ImageTower, source: Path, folder: Path) -> None:
        self.tower, self.source, self.folder = tower, source, folder
        self.turn, self.backend = 0, ""

    def __call__(self) -> None:
        self.turn += 1
        backend = "onnx" if self.turn == 1 else "auto"  # the warm-up leaves the ONNX file that later runs find
        out = self.folder / f"{self.tower.config['name']}-{self.turn}.lance"
        self.backend = lamplit.embed(self.source, out, image_tower=self.tower, batch_size=16, backend=backend).backend


if __name__ == "__main__":
    main()
