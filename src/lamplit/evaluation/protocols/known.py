"""The benchmarks by name: who reads each, and how its folder must look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lamplit.errors import PairsError, UsageError
from lamplit.evaluation.protocols import babel, captions, imagenet, vtab
from lamplit.evaluation.protocols.class_folders import read_folder
from lamplit.evaluation.protocols.objectnet import read_objectnet
from lamplit.evaluation.protocols.tasks import Task

Reader = Callable[[Path], list[Task]]

BENCHMARKS: dict[str, tuple[Reader, str]] = {
    "imagenet": (
        imagenet.read_imagenet,
        "val/n01440764/*.JPEG by synset; or ILSVRC2012_val_00000001.JPEG and so on with LOC_val_solution.csv, "
        "imagenet_2012_validation_synset_labels.txt, caffe's val.txt, or ILSVRC2012_validation_ground_truth.txt with "
        "meta.mat; or *val*.parquet or *val*.tar with a label or cls column; train/n01440764/* for the few-shot probe",
    ),
    "imagenet-real": (
        imagenet.read_imagenet_real,
        "as imagenet, with the archive's names of the images (ILSVRC2012_val_00000001)",
    ),
    "imagenet-v2": (
        imagenet.read_imagenet_v2,
        "imagenetv2-matched-frequency-format-val/0 to /999, or these folders themselves",
    ),
    "imagenet-v2-threshold0.7": (
        imagenet.read_imagenet_v2_threshold,
        "imagenetv2-threshold0.7-format-val/0 to /999, or these folders themselves",
    ),
    "imagenet-v2-top-images": (
        imagenet.read_imagenet_v2_top_images,
        "imagenetv2-top-images-format-val/0 to /999, or these folders themselves",
    ),
    "imagenet-a": (imagenet.read_imagenet_a, "imagenet-a/n01498041/* by synset, or these folders themselves"),
    "imagenet-r": (imagenet.read_imagenet_r, "imagenet-r/n01443537/* by synset, or these folders themselves"),
    "imagenet-sketch": (imagenet.read_imagenet_sketch, "sketch/n01440764/* by synset, or these folders themselves"),
    "objectnet": (read_objectnet, "objectnet-1.0/images/*/*.png and the four files of objectnet-1.0/mappings"),
    "caltech101": (vtab.read_caltech101, "caltech101/101_ObjectCategories/accordion/image_0001.jpg"),
    "cifar10": (vtab.read_cifar10, "cifar-10-batches-py/test_batch"),
    "cifar100": (vtab.read_cifar100, "cifar-100-python/test"),
    "dtd": (vtab.read_dtd, "dtd/dtd/images/banded/*.jpg and dtd/dtd/labels/test1.txt"),
    "flowers102": (vtab.read_flowers102, "flowers-102/jpg/image_00001.jpg, flowers-102/imagelabels.mat and setid.mat"),
    "pets": (vtab.read_pets, "oxford-iiit-pet/images/*.jpg and oxford-iiit-pet/annotations/test.txt"),
    "sun397": (
        vtab.read_sun397,
        "SUN397/a/abbey/sun_*.jpg and SUN397/ClassName.txt; Testing_01.txt and Training_01.txt for the official split",
    ),
    "svhn": (vtab.read_svhn, "test_32x32.mat, and train_32x32.mat for the few-shot probe"),
    "eurosat": (vtab.read_eurosat, "eurosat/2750/AnnualCrop/*.jpg"),
    "resisc45": (vtab.read_resisc45, "NWPU-RESISC45/airplane/airplane_001.jpg, or these folders themselves"),
    "fashion-mnist": (vtab.read_fashion_mnist, "FashionMNIST/raw/t10k-images-idx3-ubyte and its three companions"),
    "imagenet-translated": (
        lambda root: babel.translated_tasks(imagenet.validation(root), root),
        "as imagenet, with clip_benchmark's jp_classnames.json, jp_zeroshot_classification_templates.json and so on",
    ),
    "babel-imagenet": (
        lambda root: babel.babel_tasks(imagenet.validation(root), root),
        "as imagenet, with the authors' babel_imagenet.json and nllb_dist13b_prompts.json",
    ),
    "coco": (
        captions.read_coco,
        "val2014/*.jpg with dataset_coco.json (Karpathy's list); "
        "or val2017/*.jpg with annotations/captions_val2017.json",
    ),
    "flickr30k": (captions.read_flickr30k, "flickr30k-images/*.jpg and dataset_flickr30k.json (Karpathy's list)"),
    "xm3600": (captions.read_xm3600, "images/*.jpg and captions.jsonl"),
    "xtd": (captions.read_xtd, "the 1,000 images, test_image_names.txt and test_1kcaptions_en.txt and so on"),
    "folder": (
        read_folder,
        "a folder of images for each of two classes or more; or train/ and test/ (or val/, valid/, dev/) with such "
        "folders; or test/0.tar and so on with classnames.txt, as CLIP_benchmark exports them",
    ),
}


def list_benchmarks() -> list[str]:
    """Return the names of all benchmarks, as `run_benchmarks` and `--benchmark NAME=PATH` take them."""
    return sorted(BENCHMARKS)


def read_tasks(name: str, root: str | Path) -> list[Task]:
    """Read a benchmark from the folder of its data set.

    Raises:
        UsageError: there is no such benchmark.
        PairsError: the folder is not laid out as the data set's authors publish it.
        MissingExtraError: it takes a library that is not installed.
    """
    if name not in BENCHMARKS:
        raise UsageError(f"no benchmark is called {name!r}; there are {', '.join(sorted(BENCHMARKS))}")
    reader, layout = BENCHMARKS[name]
    try:
        return reader(Path(root).expanduser().absolute())
    except PairsError as error:
        raise PairsError(f"{error}; expected for {name}: {layout}") from error
