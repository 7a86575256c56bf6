"""Prove every family of towers on real code paths, and write what was seen to `towers.json` and `towers.md`.

    python docs/towers.py                    every proof: an hour on one core, 10 GB of memory and of disk
    python docs/towers.py --only vit,swin    those rows anew whose family or name holds one of these
    python docs/towers.py --text-towers            the text towers anew, alone
    python docs/towers.py --render           the page alone, from what was seen before

A row is one model, built by its own library, saved as its users find it, and opened by lamplit. Its weights are random
(and shaken, so that none is zero) where no package carries trained ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub, which reads it once

import numpy as np
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

import lamplit
from lamplit.model import LiT
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.lock import weights_digest
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

FOLDER = Path(__file__).parent
NUM_IMAGES, NUM_STEPS = 12, 10
# Largest difference of any number of a unit vector (of a normalised pixel, for preprocessing) that a proof allows.
ALLOWED = {"own features": 1e-6, "batch of one": 1e-6, "saved and loaded": 0.0, "preprocessing": 1e-5}
PROOFS = {
    "own features": "the tower's vectors are those of the library's own forward pass",
    "preprocessing": "an image is prepared as by the library's own transform or processor",
    "batch of one": "an image's vector does not depend on what shares its batch",
    "lock": f"after {NUM_STEPS} steps of `lamplit tune`, weights, fingerprint and vectors are the same bits, "
    "though `.train()` was called on the whole model",
    "saved and loaded": "`LiT.save` and `lamplit.load` give the same vectors",
}

Features = Callable[[Any, Tensor], Tensor]  # a library's model and (B, 3, height, width) pixels in, (B, D) out
Prepare = Callable[[Image.Image], Tensor]  # an image in, (3, height, width) pixels out


@dataclass(frozen=True)
class Member:
    """One model of a family: how its own library builds it, runs it and prepares its images."""

    family: str
    name: str
    library: str
    make: Callable[[], Any]
    features: Features
    prepare: Callable[[Any], Prepare]
    save: Callable[[Any, Path], tuple[str, Path | None]]  # into a folder; the spec and weights that open it
    weights: str = "random"

    @property
    def row(self) -> str:
        """What tells it from the others."""
        return f"{self.library} {self.name}"


# timm


def timm_member(family: str, name: str, save: Callable[[Any, str, Path], Path] | None = None, **changes: Any) -> Member:
    """Make a member of timm's model `name`; `save` writes its weights as their authors do."""

    def write(model: Any, folder: Path) -> tuple[str, Path]:
        return f"timm:{name}", (save or save_whole)(model, name, folder)

    values = {"make": lambda: timm.create_model(name), "features": timm_features, "prepare": timm_prepare} | changes
    return Member(family, name, "timm", save=write, **values)


def timm_features(model: Any, pixels: Tensor) -> Tensor:
    """What timm puts before its classifier."""
    features: Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
    return features


def timm_prepare(model: Any) -> Prepare:
    """The transform timm has for evaluation."""
    prepare: Prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return prepare


def save_whole(model: Any, name: str, folder: Path) -> Path:
    """A safetensors file with everything, the classifier too."""
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_mae(model: Any, name: str, folder: Path) -> Path:
    """As MAE's authors do: the encoder in a training checkpoint."""
    torch.save({"model": model.state_dict()}, folder / "mae_pretrain.pth")
    return folder / "mae_pretrain.pth"


def save_moco(model: Any, name: str, folder: Path) -> Path:
    """As MoCo-v3's authors do: base and momentum encoder, each with a projector where the classifier was."""
    state = {"module.base_encoder.head.0.weight": torch.ones(4, 4), "module.predictor.0.weight": torch.ones(4, 4)}
    for key, value in model.state_dict().items():
        if not key.startswith("head."):
            state |= {f"module.base_encoder.{key}": value, f"module.momentum_encoder.{key}": value + 1}
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": state}, folder / "vit-b-300ep.pth.tar")
    return folder / "vit-b-300ep.pth.tar"


def moco_prepare(model: Any) -> Prepare:
    """The transform of MoCo-v3's own evaluation (main_lincls.py)."""
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
    prepare: Prepare = transforms.Compose(steps)
    return prepare


def demo_member(name: str, model_name: str) -> Member:
    """Make a member of a demo tower, whose real weights come from a Python package."""

    def make() -> Any:
        model = timm.create_model(model_name, num_classes=0)
        model.load_state_dict(open_image_tower(f"demo:{name}").backbone.state_dict())
        return model.eval()

    return Member(
        "EfficientNet", f"demo:{name}", "timm", make, timm_features, timm_prepare,
        lambda model, folder: (f"demo:{name}", None), weights="real",
    )  # fmt: skip


# transformers


def transformers_member(
    family: str, make: Callable[[], Any], processor: Any, features: Features, name: str | None = None
) -> Member:
    """Make a member of a model of transformers, saved with its processor into a folder."""

    def save(model: Any, folder: Path) -> tuple[str, None]:
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        return f"hf:{folder / 'model'}", None

    def prepare(model: Any) -> Prepare:
        return lambda image: torch.as_tensor(np.asarray(processor(images=image)["pixel_values"][0]))

    return Member(family, name or make.__name__, "transformers", make, features, prepare, save)


def pooler_output(model: Any, pixels: Tensor) -> Tensor:
    """What a vision model of transformers calls its pooled output."""
    return model(pixels).pooler_output.flatten(1)


def class_token(model: Any, pixels: Tensor) -> Tensor:
    """The class token, for models without a pooled output."""
    return model(pixels).last_hidden_state[:, 0]


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """What CLIP and SigLIP compare with texts."""
    return model.get_image_features(pixel_values=pixels).pooler_output


def image_embeds(model: Any, pixels: Tensor) -> Tensor:
    """The same, from the vision tower saved alone."""
    return model(pixels).image_embeds


def mae_features(model: Any, pixels: Tensor) -> Tensor:
    """The class token of MAE's encoder when no patch is hidden."""
    model.config.mask_ratio = 0.0
    return model.vit(pixels).last_hidden_state[:, 0]


def built(model_class: str, config_class: str, **config: Any) -> Callable[[], Any]:
    """Build a model of transformers from its configuration; the default one is the published base size."""

    def make() -> Any:
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
        return model.eval()

    make.__name__ = model_class
    return make


def processor(kind: str, **settings: Any) -> Any:
    """Make an image processor of transformers, by PIL; the default one is the family's own."""
    return getattr(transformers, f"{kind}ImageProcessorPil")(**settings)


IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
DINOV2_PROCESSOR = processor("Bit", size={"shortest_edge": 256}, **IMAGENET)
BEIT_PROCESSOR = processor("Beit", size={"height": 224, "width": 224}, resample=2, do_center_crop=False)
SWIN_PROCESSOR = processor("ViT", resample=3, **IMAGENET)
CONVNEXT_PROCESSOR = processor("ConvNext", size={"shortest_edge": 224}, crop_pct=0.875, **IMAGENET)

MEMBERS = [
    timm_member("ViT (AugReg)", "vit_base_patch32_224.augreg_in21k"),
    timm_member("ViT (AugReg)", "vit_base_patch16_224.augreg_in21k"),
    timm_member("ViT (AugReg)", "vit_large_patch16_224.augreg_in21k"),
    timm_member("ViT (AugReg)", "vit_giant_patch14_224"),
    timm_member("ResNet (BiT)", "resnetv2_50x1_bit.goog_in21k"),
    timm_member("ResNet", "resnet50"),
    timm_member("MLP-Mixer", "mixer_b32_224"),
    timm_member("DINO", "vit_base_patch16_224.dino"),
    timm_member("DINOv2 with registers", "vit_small_patch14_reg4_dinov2.lvd142m"),
    timm_member("MoCo-v3", "vit_base_patch16_224", save_moco, prepare=moco_prepare),
    timm_member("MAE", "vit_base_patch16_224.mae", save_mae),
    timm_member("SigLIP", "vit_base_patch16_siglip_224.webli"),
    timm_member("CLIP", "vit_base_patch32_clip_224.openai"),
    timm_member("ConvNeXt", "convnext_tiny.fb_in22k"),
    timm_member("Swin", "swin_tiny_patch4_window7_224"),
    timm_member("EfficientNet", "efficientnet_b0"),
    demo_member("efficientnet-lite0", "tf_efficientnet_lite0"),
    transformers_member("ViT", built("ViTModel", "ViTConfig"), processor("ViT"), pooler_output),
    transformers_member(
        "MAE", built("ViTMAEForPreTraining", "ViTMAEConfig"), processor("ViT", **IMAGENET), mae_features
    ),
    transformers_member(
        "DINOv2", built("Dinov2Model", "Dinov2Config", image_size=518, patch_size=14), DINOV2_PROCESSOR, pooler_output
    ),
    transformers_member(
        "DINOv2 with registers",
        built("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", image_size=518, patch_size=14),
        DINOV2_PROCESSOR,
        pooler_output,
    ),
    transformers_member("SigLIP", built("SiglipModel", "SiglipConfig"), processor("Siglip"), image_features),
    transformers_member("SigLIP", built("SiglipVisionModel", "SiglipVisionConfig"), processor("Siglip"), pooler_output),
    transformers_member("CLIP", built("CLIPModel", "CLIPConfig"), processor("CLIP"), image_features),
    transformers_member("CLIP", built("CLIPVisionModel", "CLIPVisionConfig"), processor("CLIP"), pooler_output),
    transformers_member(
        "CLIP", built("CLIPVisionModelWithProjection", "CLIPVisionConfig"), processor("CLIP"), image_embeds
    ),
    transformers_member("BEiT", built("BeitModel", "BeitConfig"), BEIT_PROCESSOR, pooler_output),
    transformers_member("ResNet", built("ResNetModel", "ResNetConfig"), CONVNEXT_PROCESSOR, pooler_output),
    transformers_member("Swin", built("SwinModel", "SwinConfig"), SWIN_PROCESSOR, pooler_output),
    transformers_member("ConvNeXt", built("ConvNextModel", "ConvNextConfig"), CONVNEXT_PROCESSOR, pooler_output),
]  # fmt: skip


# The proofs


@dataclass
class Record:
    """What was seen of one member: facts that lamplit discovered, and what each proof measured."""

    family: str
    library: str
    name: str
    weights: str
    parameters: int
    width: int
    preprocessing: dict[str, Any]
    pools: list[str]
    own_pool: str | None
    differences: dict[str, float]
    locked: bool
    steps: int
    seconds: float = field(default=0.0, compare=False)

    @property
    def row(self) -> str:
        """As `Member.row`."""
        return f"{self.library} {self.name}"

    def failures(self) -> list[str]:
        """Proofs that did not hold."""
        failed = [name for name, allowed in ALLOWED.items() if not self.differences[name] <= allowed]
        return failed + ([] if self.locked and self.steps == NUM_STEPS else ["lock"])


def draw_images(folder: Path) -> Path:
    """Draw images of smooth colours, no two of one shape, and write `pairs.csv` beside them."""
    generator = np.random.default_rng(0)
    lines = ["path,caption"]
    for number in range(NUM_IMAGES):
        small = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((240 + 10 * number, 200), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:02}.png", compress_level=1)
        lines.append(f"{number:02}.png,The colours of image {number}.")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def prove(member: Member, folder: Path, text: str = "scratch:tiny") -> Record:
    """Run every proof on one member, with files in the empty `folder`; `text` is the text tower that is tuned."""
    began = time.monotonic()
    pairs = draw_images(folder)
    torch.manual_seed(0)
    model = member.make()
    if member.weights == "random":
        shake(model)
    spec, weights = member.save(model, folder)
    tower = open_image_tower(spec, weights=weights)
    pixels = torch.stack([tower.preprocessing.resize(as_tensor(path)) for path in sorted(folder.glob("*.png"))])
    with torch.no_grad():
        vectors = F.normalize(tower(pixels[:4]), dim=-1)
        alone = torch.cat([F.normalize(tower(one[None]), dim=-1) for one in pixels[:4]])
        expected = F.normalize(member.features(model, tower.preprocessing.normalize(pixels[:4])), dim=-1)
    with Image.open(folder / "00.png") as image:
        prepared = member.prepare(model)(image), tower.preprocessing.reference(image)
    pools, own_pool = tower.find_pools()
    differences = {
        "own features": distance(vectors, expected),
        "batch of one": distance(vectors, alone),
        "preprocessing": distance(*prepared),
    }
    record = Record(
        member.family, member.library, member.name, member.weights, sum(p.numel() for p in tower.parameters()),
        tower.width, tower.preprocessing.to_dict(), pools, own_pool, differences, locked=False, steps=0,
    )  # fmt: skip
    del model  # the largest would not fit twice
    prove_lock(record, tower, pairs, text)
    record.seconds = round(time.monotonic() - began, 1)
    return record


def prove_lock(record: Record, tower: ImageTower, pairs: Path, text: str) -> None:
    """Tune on the tower's store, and see that nothing of the tower moved and all of it is saved."""
    folder = pairs.parent
    embed(pairs, folder / "before.lance", image_tower=tower, backend="torch")
    store = Store(folder / "before.lance")
    digest, stored, width = weights_digest(tower), store.vectors(), tower.width
    settings = TuneSettings(text_tower=text, batch_size=6, epochs=5, val_fraction=0.0, closed_form=False, num_evals=1)
    report = tune(store, folder / "run", settings, device="cpu")
    after = store.vectors()

    model = LiT(open_text_tower(text, width=width, texts=store.texts()[0]), tower.identity(), tower)
    model.train()  # reaches everything but the locked tower
    files = sorted(folder.glob("*.png"))[:3]
    encoded = model.encode_images(files)
    model.save(folder / "model")
    embed(pairs, folder / "after.lance", image_tower=tower, backend="torch")
    record.steps = report.steps
    record.locked = (
        report.fingerprint_before == report.fingerprint_after == store.tower.fingerprint
        and weights_digest(tower) == digest
        and torch.equal(stored, after)
        and torch.equal(stored, Store(folder / "after.lance").vectors())
        and not any(module.training for module in model.image_tower.modules())
        and not any(parameter.requires_grad for parameter in tower.parameters())
    )
    del model, tower
    record.differences["saved and loaded"] = max(
        distance(lamplit.load(folder / name, towers="image").encode_images(files), encoded) for name in ("model", "run")
    )


def shake(model: nn.Module) -> None:
    """Move every weight, and the statistics of batch norms, away from where they start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
    model.eval()


def as_tensor(path: Path) -> Tensor:
    """(3, height, width) uint8 of an image."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def distance(left: Tensor, right: Tensor) -> float:
    """Largest difference of any two numbers."""
    return (left - right).abs().max().item() if left.shape == right.shape else float("inf")


# The page


def render(seen: dict[str, Any]) -> str:
    """Write the page from what was seen."""
    records = [Record(**values) for values in seen["image_towers"]]
    lines = [
        "# Towers that were checked",
        "",
        "`python docs/towers.py` wrote this page from what it measured; `towers.json` beside it has all the numbers.",
        "Nothing here is written by hand; a test compares page and numbers. " + versions(seen["versions"]),
        "",
        "## Image towers",
        "",
        "Each was built by its own library, saved as its users find it, and opened with `lamplit.open_image_tower`.",
        "Weights are random if no Python package carries trained ones. Checked for every one:",
        "",
        *(f"- **{name}**: {what}{bound(name)}." for name, what in PROOFS.items()),
        "",
        "The numbers are the largest differences seen; 0 means the same bits. The pooling in bold is the library's",
        "own. If none is bold, the library's head does more than pool, and a tower without `--pool` gives what that",
        "head gives.",
        "",
        "| family | what was run | weights | parameters | width | images | pooling |",
        "| --- | --- | --- | ---: | ---: | --- | --- |",
        *(facts(record) for record in records),
        "",
        "| what was run | " + " | ".join(PROOFS) + " |",
        "| --- |" + " ---: |" * len(PROOFS),
        *(line(record) for record in records),
        "",
        "## Text towers",
        "",
        "Each was built from a tiny configuration with random weights and a tokenizer of its kind, saved as a folder,",
        "and opened as `hf:FOLDER`. Checked for every one, by `tests/text_families.py`: the token that is read is the",
        "one named; padding, its filling, the batch and its order change no vector by more than 1e-6; a cut text",
        "keeps its end token; gradients reach every weight; a saved model opens with the same vectors. `scratch:`",
        "(the paper's own) and `lit:` (the published ones) have separate tests.",
        "",
        "| " + " | ".join(seen["text_towers"][0]) + " |",
        "|" + " --- |" * len(seen["text_towers"][0]),
        *("| " + " | ".join(v.replace("|", "\\|") for v in values.values()) + " |" for values in seen["text_towers"]),
        "",
    ]
    return "\n".join(lines)


def versions(names: dict[str, str]) -> str:
    """Say what it ran with."""
    return "It ran with " + ", ".join(f"{name} {number}" for name, number in names.items()) + "."


def bound(proof: str) -> str:
    """Say what a proof allows."""
    if proof not in ALLOWED:
        return ""
    return f", to {ALLOWED[proof]:.0e}" if ALLOWED[proof] else ", to the bit"


def facts(record: Record) -> str:
    """Write one row of the table of what was run."""
    cells = [
        record.family,
        f"{record.library}: `{record.name}`",
        record.weights,
        f"{record.parameters / 1e6:,.1f} M",
        str(record.width),
        images(record.preprocessing),
        ", ".join(f"**{pool}**" if pool == record.own_pool else pool for pool in record.pools) or "its own alone",
    ]
    return f"| {' | '.join(cells)} |"


def line(record: Record) -> str:
    """Write one row of the table of differences."""
    failed = record.failures()
    cells = [f"{record.library}: `{record.name}`"]
    for proof in PROOFS:
        value = f"{record.differences[proof]:.1g}" if proof in record.differences else f"{record.steps} steps"
        cells.append(f"FAILED ({value})" if proof in failed else value)
    return f"| {' | '.join(cells)} |"


def images(values: dict[str, Any]) -> str:
    """Say how images are prepared."""
    size = "x".join(str(side) for side in values["image_size"])
    fit = "squashed" if values["fit"] == "squash" else "cropped"
    part = "" if values["crop_fraction"] == 1 else f" to {values['crop_fraction']:.3g}"
    mean, std = (" ".join(f"{value:.3g}" for value in values[name]) for name in ("mean", "std"))
    return f"{size}, {values['interpolation']}, {fit}{part}; mean {mean}, std {std}"


def record_of(record: Record) -> dict[str, Any]:
    """A record's values, for JSON."""
    return vars(record) | {"preprocessing": json.loads(json.dumps(record.preprocessing))}


def prove_text_towers() -> list[dict[str, str]]:
    """Run the tests' own proofs on every family of text towers; a family that fails one ends the script."""
    sys.path.insert(0, str(FOLDER.parent / "tests"))
    from text_families import FAMILIES, PROOFS, make, row

    rows = []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            member = make(name, Path(folder) / name)
            for proof in PROOFS.values():
                proof(member)
            rows.append(row(name, member))
            print(f"text: {name}", flush=True)
    return rows


def main() -> None:
    """Prove, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="families or names, or parts of them, by commas")
    parser.add_argument("--text-towers", action="store_true", help="the text towers alone")
    parser.add_argument("--render", action="store_true", help="write the page alone")
    options = parser.parse_args()
    data, page = FOLDER / "towers.json", FOLDER / "towers.md"
    seen = json.loads(data.read_text()) if data.is_file() else {"image_towers": []}
    known = {Record(**values).row: values for values in seen["image_towers"]}
    chosen = [
        m
        for m in MEMBERS
        if options.only is None or any(part in f"{m.family}: {m.row}" for part in options.only.split(","))
    ]
    if not options.render and options.only is None:
        seen["text_towers"] = prove_text_towers()
        data.write_text(json.dumps(seen, indent=1) + "\n")
    for member in [] if options.render or options.text_towers else chosen:
        with tempfile.TemporaryDirectory() as folder:
            record = prove(member, Path(folder))
        known[member.row] = record_of(record)
        print(f"{member.row}: {record.seconds:.0f} s {record.failures() or ''}", flush=True)
        seen["versions"] = {
            "Python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "timm": timm.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        seen["image_towers"] = [known[m.row] for m in MEMBERS if m.row in known]
        data.write_text(json.dumps(seen, indent=1) + "\n")
    page.write_text(render(seen))


if __name__ == "__main__":
    main()
