from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat

from lamplit.errors import LamplitError, PairsError
from lamplit.evaluation.protocols.imagenet_labels import subset, synsets
from lamplit.evaluation.protocols.known import BENCHMARKS, read_tasks
from lamplit.evaluation.protocols.tasks import Classification, Labelled
from lamplit.zeroshot.names import class_names

SYNSETS = synsets()
CLIP_NAMES = class_names("imagenet")


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "one.png"
    Image.new("RGB", (8, 6), "red").save(file)
    return file


def by_class(image_file: Path, root: Path, folders: Iterable[str], name: str = "1.JPEG") -> Path:
    """One image in each folder, all of them the same file."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        os.link(image_file, root / folder / name)
    return root


@pytest.fixture(scope="module")
def copy(image_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet as torchvision lays it out, with an image a class; tests must not change it."""
    root = tmp_path_factory.mktemp("imagenet")
    for label, synset in enumerate(SYNSETS):
        by_class(image_file, root / "val", [synset], f"ILSVRC2012_val_{label + 1:08d}.JPEG")
    return root


def only(name: str, root: Path) -> Classification:
    [task] = read_tasks(name, root)
    assert isinstance(task, Classification)
    assert task.benchmark == name
    return task


def right(labelled: Labelled) -> dict[str, tuple[int, ...]]:
    """The labels by id, where ids, pairs and files agree."""
    pairs = list(labelled.images.pairs)
    assert [pair.id for pair in pairs] == list(labelled.images.ids)
    assert labelled.images.pairs.count in (None, len(pairs))
    for pair in pairs:
        assert pair.texts == ()
        if isinstance(pair.image, Path):
            assert pair.image.is_file()
    return dict(labelled.labels)


def message(name: str, root: Path, kind: type[LamplitError] = PairsError) -> str:
    with pytest.raises(kind) as caught:
        read_tasks(name, root)
    return str(caught.value)


def test_imagenet_by_synset(copy: Path) -> None:
    task = only("imagenet", copy)
    labels = right(task.test)
    assert labels["n01440764/ILSVRC2012_val_00000001.JPEG"] == (0,)  # tench
    assert labels["n15075141/ILSVRC2012_val_00001000.JPEG"] == (999,)  # toilet paper
    assert len(labels) == 1000
    assert task.class_names == CLIP_NAMES
    assert task.templates == "clip-80"
    assert (task.split, task.crop, task.training, task.entry_class) == ("validation, 1,000 images", 0.875, None, None)
    assert task.notes == ("1,000 images of the 50,000 that the data set has",)
    assert task.test.images.key == "imagenet-val"


def test_folders_of_synsets_may_be_the_root(copy: Path) -> None:
    assert right(only("imagenet", copy / "val").test) == right(only("imagenet", copy).test)


def test_training_images_are_listed_when_asked_for(copy: Path, image_file: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(copy / "val")
    by_class(image_file, tmp_path / "train", SYNSETS[:999])
    training = only("imagenet", tmp_path).training
    assert training is not None
    with pytest.raises(PairsError, match=r"train lacks 1 of its class folders \(n15075141\)"):
        training()
    by_class(image_file, tmp_path / "train", SYNSETS[999:])
    assert right(training())["n15075141/1.JPEG"] == (999,)


def test_real_has_any_of_several_labels_and_leaves_out_images_without(copy: Path) -> None:
    task, plain = only("imagenet-real", copy), only("imagenet", copy)
    assert task.test.images.key == plain.test.images.key
    assert list(task.test.images.ids) == list(plain.test.images.ids)
    # The list begins [], [970, 795], [230, 231], [809].
    labels = task.test.labels
    assert "n01440764/ILSVRC2012_val_00000001.JPEG" not in labels
    assert labels[f"{SYNSETS[1]}/ILSVRC2012_val_00000002.JPEG"] == (970, 795)
    assert labels[f"{SYNSETS[3]}/ILSVRC2012_val_00000004.JPEG"] == (809,)


@pytest.fixture
def flat(image_file: Path, tmp_path: Path) -> Path:
    """The archive of the validation images, unpacked: an image a class, in the reverse order of the classes."""
    (tmp_path / "val").mkdir()
    for number in range(1, 1001):
        os.link(image_file, tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return tmp_path


def write_kaggle(root: Path) -> None:
    rows = [f"ILSVRC2012_val_{n:08d},{SYNSETS[1000 - n]} 1 2 3 4 " for n in range(1000, 0, -1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))


def write_synsets(root: Path) -> None:
    (root / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(reversed(SYNSETS)) + "\n")


def write_caffe(root: Path) -> None:
    rows = [f"ILSVRC2012_val_{n:08d}.JPEG {1000 - n}\n" for n in range(1, 1001)]
    (root / "val.txt").write_text("".join(rows))


def write_devkit(root: Path) -> None:
    """Own numbers in an order of their own: 1 is class 7, 2 is class 14 ... as 7 has no factor in common with 1,000."""
    data = root / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    own = {7 * number % 1000: number for number in range(1, 1001)}
    nodes = [(own[label], synset, 0) for label, synset in enumerate(SYNSETS)] + [(1001, "n00001740", 2)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(data / "meta.mat", {"synsets": np.array(nodes, dtype=fields)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{own[1000 - n]}\n" for n in range(1, 1001)))


@pytest.mark.parametrize("write", [write_kaggle, write_synsets, write_caffe, write_devkit])
def test_flat_images_with_a_list_of_labels(write: Callable[[Path], None], flat: Path) -> None:
    write(flat)
    assert right(only("imagenet", flat).test) == {f"ILSVRC2012_val_{n:08d}.JPEG": (1000 - n,) for n in range(1, 1001)}
    assert only("imagenet-real", flat).test.labels["ILSVRC2012_val_00000003.JPEG"] == (230, 231)


def test_flat_images_without_labels(flat: Path) -> None:
    assert "there is no list of their labels: LOC_val_solution.csv, imagenet_2012" in message("imagenet", flat)
    write_devkit(flat)
    (flat / "ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    assert "numbers the classes in an order of its own, and " in message("imagenet", flat)
    (flat / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 1000\n")
    assert "val.txt is not a list of ImageNet's labels (ValueError: label 1000" in message("imagenet", flat)
    (flat / "val.txt").write_text("ILSVRC2012_val_00000002.JPEG 3\n")
    assert "images without a label: ILSVRC2012_val_00000001.JPEG, ILSVRC2012_val_00000003" in message("imagenet", flat)
    write_synsets(flat)
    (flat / "val/ILSVRC2012_val_00000999.JPEG").unlink()
    assert f"{flat / 'val'} has no images of class 1 (goldfish); expected" in message("imagenet", flat)


def test_imagenet_in_parquet_files(image_file: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"image": {"bytes": image_file.read_bytes(), "path": "a.JPEG"}, "label": n * 3 % 1000} for n in range(1001)]
    for shard, part in enumerate((rows[:600], rows[600:])):
        parquet.write_table(pa.Table.from_pylist(part), tmp_path / f"data/validation-0000{shard}-of-00002.parquet")
    hidden = [{"image": rows[0]["image"], "label": -1}]
    parquet.write_table(pa.Table.from_pylist(hidden), tmp_path / "data/test-00000-of-00001.parquet")
    labels = right(only("imagenet", tmp_path).test)
    assert (len(labels), labels["0"], labels["999"], labels["1000"]) == (1001, (0,), (997,), (0,))
    shards = tmp_path / "data" / "validation-*.parquet"
    assert right(only("imagenet", shards).test) == labels
    assert "has -1 for the label of image 0; expected a column called label or cls" in message(
        "imagenet", tmp_path / "data" / "test-00000-of-00001.parquet"
    )
    assert "0 in " in message("imagenet-real", tmp_path)
    assert "is not named as ImageNet's archive names it" in message("imagenet-real", tmp_path)


def test_imagenet_in_a_webdataset(image_file: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "imagenet1k-val-00.tar", "w") as archive:
        for label in range(1000):
            for ending, content in (("jpg", image_file.read_bytes()), ("cls", str(999 - label).encode())):
                member = tarfile.TarInfo(f"ILSVRC2012_val_{label + 1:08d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert right(only("imagenet", tmp_path).test)["ILSVRC2012_val_00000001"] == (999,)
    assert only("imagenet-real", tmp_path).test.labels["ILSVRC2012_val_00000004"] == (809,)


def test_folders_of_v2_are_numbers(image_file: Path, tmp_path: Path) -> None:
    folder = "imagenetv2-matched-frequency-format-val"
    by_class(image_file, tmp_path / folder, map(str, range(1000)))
    task = only("imagenet-v2", tmp_path)
    labels = right(task.test)
    assert [labels[f"{n}/1.JPEG"] for n in (2, 10, 100, 999)] == [(2,), (10,), (100,), (999,)]
    assert task.title == "ImageNet V2"
    assert right(only("imagenet-v2", tmp_path / folder).test) == labels
    (tmp_path / folder).rename(tmp_path / "imagenetv2-top-images-format-val")
    assert len(right(only("imagenet-v2-top-images", tmp_path).test)) == 1000
    wrong = message("imagenet-v2-threshold0.7", tmp_path / "imagenetv2-top-images-format-val")
    assert "is another variant of ImageNet V2; imagenet-v2-threshold0.7 is imagenetv2-threshold0.7-format" in wrong
    (tmp_path / "imagenetv2-top-images-format-val").rename(tmp_path / "imagenetv2-threshold0.7-format-val")
    assert only("imagenet-v2-threshold0.7", tmp_path).test.images.key == "imagenet-v2-threshold0.7"


@pytest.mark.parametrize(
    ("letter", "first", "last", "crop"),
    [("a", ("n01498041", 6, "stingray"), ("n12267677", 988, "acorn"), 0.75),
     ("r", ("n01443537", 1, "goldfish"), ("n12267677", 988, "acorn"), 0.875)],
)  # fmt: skip
def test_subsets_have_labels_and_names_of_their_own(
    letter: str, first: tuple[str, int, str], last: tuple[str, int, str], crop: float, image_file: Path, tmp_path: Path
) -> None:
    numbers, own = subset(letter)
    assert [SYNSETS[number] for number in numbers] == own
    by_class(image_file, tmp_path / f"imagenet-{letter}", own)
    (tmp_path / f"imagenet-{letter}/README.txt").touch()
    task = only(f"imagenet-{letter}", tmp_path)
    labels = right(task.test)
    assert len(task.class_names) == len(labels) == 200
    assert task.crop == crop
    for synset, number, name in (first, last):
        [label] = labels[f"{synset}/1.JPEG"]
        assert numbers[label] == number
        assert task.class_names[label] == (name,)
    (tmp_path / f"imagenet-{letter}/n01440764").mkdir()  # tench is in neither
    assert "has folders that are no class (n01440764)" in message(f"imagenet-{letter}", tmp_path)


def test_imagenet_sketch(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "sketch").symlink_to(copy / "val")
    task = only("imagenet-sketch", tmp_path)
    assert right(task.test)[f"{SYNSETS[30]}/ILSVRC2012_val_00000031.JPEG"] == (30,)
    assert task.test.images.key == "imagenet-sketch"


def test_wrong_folders_are_refused_with_the_layout(image_file: Path, tmp_path: Path) -> None:
    wrong = message("imagenet", tmp_path / "nowhere")
    assert wrong.startswith(f"{tmp_path / 'nowhere'} holds no validation images of ImageNet; expected for imagenet: ")
    assert BENCHMARKS["imagenet"][1] in wrong
    by_class(image_file, tmp_path / "val", [*SYNSETS[2:], "cats", "dogs"])
    assert (
        f"{tmp_path / 'val'} lacks 2 of its class folders (n01440764, n01443537) and has folders that are no class "
        "(cats, dogs); expected"
    ) in message("imagenet", tmp_path)


def test_an_empty_class_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for synset in SYNSETS[1:]:
        (tmp_path / "val" / synset).symlink_to(copy / "val" / synset)
    (tmp_path / "val/n01440764").mkdir()
    (tmp_path / "val/n01440764/notes.txt").touch()
    assert f"{tmp_path / 'val/n01440764'} holds no images" in message("imagenet", tmp_path)


def test_real_labels_of_your_own(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(copy / "val")
    (tmp_path / "real.json").write_text(json.dumps([[number, 5] for number in range(1000)]))
    assert only("imagenet-real", tmp_path).test.labels["n01440764/ILSVRC2012_val_00000001.JPEG"] == (0, 5)
    (tmp_path / "real.json").write_text("[")
    assert "real.json is not JSON" in message("imagenet-real", tmp_path)


OBJECTNET = {  # folder: (ObjectNet's name, ImageNet's long names and labels)
    "alarm_clock": ("Alarm clock", {"analog clock": 409, "digital clock": 530}),
    "banana": ("Banana", {"banana": 954}),
    "chair": (
        "Chair", {"barber chair": 423, "folding chair": 559, "rocking chair, rocker": 765},
    ),
    "air_freshener": ("Air freshener", {}),
}  # fmt: skip


def objectnet(image_file: Path, root: Path, folders: Sequence[str] = tuple(OBJECTNET)) -> Path:
    """ObjectNet as its archive unpacks; ImageNet's own order is the reverse of PyTorch's here."""
    by_class(image_file, root / "objectnet-1.0/images", folders, "0a1b.png")
    mappings = root / "objectnet-1.0/mappings"
    mappings.mkdir()
    long_names = {label: name for _, names in OBJECTNET.values() for name, label in names.items()}
    lines = [long_names.get(999 - own, f"other {own}") for own in range(1000)]
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    for name, content in {
        "folder_to_objectnet_label": {folder: name for folder, (name, _) in OBJECTNET.items()},
        "objectnet_to_imagenet_1k": {name: "; ".join(names) for name, names in OBJECTNET.values() if names},
        "pytorch_to_imagenet_2012_id": {str(label): 999 - label for label in range(1000)},
    }.items():
        (mappings / f"{name}.json").write_text(json.dumps(content))
    return root


def test_objectnet_has_the_classes_that_overlap(image_file: Path, tmp_path: Path) -> None:
    task = only("objectnet", objectnet(image_file, tmp_path))
    # By folder: alarm_clock 0, banana 1, chair 2; air_freshener is not ImageNet's.
    assert right(task.test) == {"alarm_clock/0a1b.png": (0,), "banana/0a1b.png": (1,), "chair/0a1b.png": (2,)}
    assert task.class_names == [
        ("analog clock",), ("digital clock",), ("banana",), ("barber chair",), ("folding chair",), ("rocking chair",),
    ]  # fmt: skip
    assert task.entry_class == [0, 0, 1, 2, 2, 2]
    assert task.test.images.border == 2
    assert task.notes[1] == "3 images of the 18,574 that the data set has"
    assert right(only("objectnet", tmp_path / "objectnet-1.0").test) == right(task.test)


def test_objectnet_with_its_mappings_in_the_root(image_file: Path, tmp_path: Path) -> None:
    objectnet(image_file, tmp_path)
    for file in (tmp_path / "objectnet-1.0/mappings").iterdir():
        file.rename(tmp_path / file.name)
    assert len(only("objectnet", tmp_path).test.labels) == 3
    (tmp_path / "objectnet_to_imagenet_1k.json").write_text('{"Chair": "throne"}')
    assert "mapping files of" in (wrong := message("objectnet", tmp_path))
    assert "KeyError: 'throne'" in wrong
    (tmp_path / "objectnet_to_imagenet_1k.json").unlink()
    assert "objectnet_to_imagenet_1k.json is missing; looked in" in message("objectnet", tmp_path)


def test_objectnet_lacking_a_class_or_with_another(image_file: Path, tmp_path: Path) -> None:
    objectnet(image_file, tmp_path, ["alarm_clock", "chair", "hovercraft"])
    wrong = message("objectnet", tmp_path)
    assert "lacks 1 of its class folders (banana) and has folders that are no class (hovercraft)" in wrong
