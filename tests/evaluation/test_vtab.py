from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from lamplit.errors import PairsError
from lamplit.evaluation.protocols.known import read_tasks
from lamplit.evaluation.protocols.tasks import Classification, Labelled
from lamplit.zeroshot.names import class_keys, class_names

PIXELS = np.random.default_rng(0).integers(0, 256, (110, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "one.jpg"
    Image.new("RGB", (8, 6), "red").save(file)
    return file


def link(image_file: Path, root: Path, names: Iterable[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(image_file, root / name)


def only(name: str, root: Path) -> Classification:
    [task] = read_tasks(name, root)
    assert isinstance(task, Classification)
    assert task.benchmark == name
    return task


def right(labelled: Labelled) -> dict[str, int]:
    """The label of each image by its id, where ids, pairs and files agree."""
    for name, pair in zip(labelled.images.ids, labelled.images.pairs, strict=True):
        assert pair.id == name
        assert isinstance(pair.image, bytes) or pair.image.is_file()
    return {name: label for name, (label,) in labelled.labels.items()}


def training(task: Classification) -> dict[str, int]:
    assert task.training is not None
    assert task.training().images.key != task.test.images.key
    return right(task.training())


def decoded(labelled: Labelled, number: int) -> np.ndarray:
    [image] = [pair.image for place, pair in enumerate(labelled.images.pairs) if place == number]
    assert isinstance(image, bytes)
    assert image.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(image)))


def message(name: str, root: Path) -> str:
    with pytest.raises(PairsError) as caught:
        read_tasks(name, root)
    return str(caught.value)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def caltech(image_file: Path, root: Path) -> Path:
    folders = [key.replace(" ", "_") for key in class_keys("caltech101")]
    folders[:4] = ["Faces", "Faces_easy", "Leopards", "Motorbikes"]
    base = "caltech101/101_ObjectCategories"
    link(image_file, root, [f"{base}/{folder}/image_0001.jpg" for folder in ["BACKGROUND_Google", *folders]])
    link(image_file, root, [f"{base}/yin_yang/image_0002.jpg"])
    return root


def test_caltech101(image_file: Path, tmp_path: Path) -> None:
    task = only("caltech101", caltech(image_file, tmp_path))
    labels = right(task.test)
    base = "caltech101/101_ObjectCategories"
    assert len(labels) == 102
    assert f"{base}/BACKGROUND_Google/image_0001.jpg" not in labels
    assert labels[f"{base}/yin_yang/image_0002.jpg"] == 100
    for folder, name in {"Faces_easy": "centered face", "car_side": "side of a car", "ibis": "ibis"}.items():
        assert task.class_names[labels[f"{base}/{folder}/image_0001.jpg"]] == (name,)
    assert task.templates == "clip-caltech101"
    assert task.notes[0].startswith("all images, because the data set has no official test split")
    (tmp_path / base / "garfield/image_0001.jpg").unlink()
    assert f"{tmp_path} has no images of class 43 (garfield)" in message("caltech101", tmp_path)
    (tmp_path / base / "garfield").rename(tmp_path / base / "odie")
    assert "lacks 1 of its classes (garfield) and has classes that are not the data set's (odie)" in message(
        "caltech101", tmp_path
    )


def write_cifar(root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, field: str, names: list[str]) -> None:
    """Both splits in CIFAR's pickles: image n has label n in the test split, and n from the end in training."""
    folder = root / kind.base_folder
    folder.mkdir()
    num = len(names)
    planes = PIXELS[:num].transpose(0, 3, 1, 2).reshape(num, -1)
    sums = {}
    for file, labels in {
        **{name: list(range(num)) for name, _ in kind.test_list},
        **{name: list(range(num))[::-1] for name, _ in kind.train_list},
        kind.meta["filename"]: None,
    }.items():
        content = {kind.meta["key"]: names} if labels is None else {"data": planes, field: labels}
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = md5(folder / file)
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch, "labels", names)
    task = only("cifar10", tmp_path)
    assert right(task.test) == {f"{number:05d}": number for number in range(10)}
    assert task.class_names[9] == ("truck",)
    assert (decoded(task.test, 7) == PIXELS[7]).all()
    assert len(training(task)) == 50
    assert training(task)["00040"] == 9
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    assert f"torchvision cannot read CIFAR10 in {tmp_path}: Dataset not found or corrupted; expected for cifar10" in (
        message("cifar10", tmp_path)
    )


def test_cifar100_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name.replace(" ", "_") for (name,) in class_names("cifar100")]
    write_cifar(tmp_path, datasets.CIFAR100, monkeypatch, "fine_labels", names[::-1])
    task = only("cifar100", tmp_path)
    # Label 0 of the file is its first name, worm, which is 99 in ours.
    assert right(task.test)["00000"] == 99
    assert task.class_names[99] == ("worm",)
    assert task.templates == "clip-cifar"
    assert training(task)["00000"] == 0


def dtd(image_file: Path, root: Path, classes: list[str]) -> Path:
    (root / "dtd/dtd/labels").mkdir(parents=True)
    for split in ("train", "test"):
        names = [f"{name}/{name}_{split}.jpg" for name in classes]
        (root / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(names) + "\n")
        link(image_file, root / "dtd/dtd/images", names)
    return root


def test_dtd(image_file: Path, tmp_path: Path) -> None:
    task = only("dtd", dtd(image_file, tmp_path, class_keys("dtd")))
    assert right(task.test)["dtd/dtd/images/polka-dotted/polka-dotted_test.jpg"] == 30
    assert task.class_names[30] == ("polka-dotted",)
    assert training(task)["dtd/dtd/images/zigzagged/zigzagged_train.jpg"] == 46
    assert task.split == "test, 47 images"
    assert task.notes == ("47 images of the 1,880 that the data set has",)


def test_dtd_lacking_a_class_would_move_the_labels(image_file: Path, tmp_path: Path) -> None:
    dtd(image_file, tmp_path, class_keys("dtd")[1:])
    assert f"{tmp_path} lacks 1 of its classes (banded); expected for dtd: dtd/dtd/images/banded/*.jpg" in message(
        "dtd", tmp_path
    )


def flowers(image_file: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Image n is of class n // 2: odd numbers (from 1) train, even ones test."""
    link(image_file, root / "flowers-102/jpg", [f"image_{number:05d}.jpg" for number in range(1, 205)])
    ids = np.arange(1, 205)
    savemat(root / "flowers-102/imagelabels.mat", {"labels": (ids + 1) // 2})
    savemat(root / "flowers-102/setid.mat", {"trnid": ids[::2], "valid": ids[::2], "tstid": ids[1::2]})
    files = {
        key: (name, md5(root / "flowers-102" / name) if key != "image" else "")
        for key, (name, _) in datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    return root


def test_flowers102(image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = only("flowers102", flowers(image_file, tmp_path, monkeypatch))
    labels = right(task.test)
    assert (labels["flowers-102/jpg/image_00002.jpg"], labels["flowers-102/jpg/image_00204.jpg"]) == (0, 101)
    assert task.class_names[0] == ("pink primrose",)
    assert training(task)["flowers-102/jpg/image_00003.jpg"] == 1
    (tmp_path / "flowers-102/imagelabels.mat").write_bytes(b"changed")
    assert "torchvision cannot read Flowers102" in message("flowers102", tmp_path)


def test_flower_names_are_in_torchvision_s_order() -> None:
    theirs = getattr(datasets.Flowers102, "classes", None)
    assert theirs is not None
    ours = [name for (name,) in class_names("flowers102")]
    assert {(a, b) for a, b in zip(theirs, ours, strict=True) if a != b} == {
        ("globe-flower", "globe flower"), ("pink-yellow dahlia?", "pink and yellow dahlia"), ("ball moss", "air plant"),
    }  # fmt: skip


def pets(image_file: Path, root: Path) -> Path:
    """Annotations as the data set has them: breed_number, class from 1, kind, number within the kind."""
    (root / "oxford-iiit-pet/annotations").mkdir(parents=True)
    for split, number in (("trainval", 1), ("test", 2)):
        ids = [f"{name.replace(' ', '_')}_{number}" for (name,) in class_names("pets")]
        rows = [f"{name} {label} {1 if name[0].isupper() else 2} 1\n" for label, name in enumerate(ids, start=1)]
        (root / f"oxford-iiit-pet/annotations/{split}.txt").write_text("".join(rows))
        link(image_file, root / "oxford-iiit-pet/images", [f"{name}.jpg" for name in ids])
    return root


def test_pets(image_file: Path, tmp_path: Path) -> None:
    task = only("pets", pets(image_file, tmp_path))
    labels = right(task.test)
    assert labels["oxford-iiit-pet/images/Abyssinian_2.jpg"] == 0
    assert task.class_names[labels["oxford-iiit-pet/images/yorkshire_terrier_2.jpg"]] == ("yorkshire terrier",)
    assert training(task)["oxford-iiit-pet/images/american_bulldog_1.jpg"] == 1
    annotations = tmp_path / "oxford-iiit-pet/annotations/test.txt"
    annotations.write_text(annotations.read_text() + "../../Abyssinian_9 1 1 1\n")
    assert "has classes that are not the data set's (.. .. abyssinian)" in message("pets", tmp_path)
    annotations.unlink()
    assert f"{tmp_path} has no oxford-iiit-pet/annotations/test.txt; expected for pets: " in message("pets", tmp_path)


def sun_paths() -> list[str]:
    """Paths of SUN397's classes in its own order, where `jail/indoor` comes before `jail_cell`."""
    nested = {"apse indoor": "apse/indoor", "jail indoor": "jail/indoor", "field wild": "field/wild"}
    paths = [nested.get(key, key.replace(" ", "_")) for key in class_keys("sun397")]
    return sorted(f"/{path[0]}/{path}" for path in paths)


def test_sun397(image_file: Path, tmp_path: Path) -> None:
    paths = sun_paths()
    assert paths.index("/j/jail/indoor") < paths.index("/j/jail_cell")
    link(image_file, tmp_path, [f"SUN397{path}/sun_{letter}.jpg" for path in paths for letter in "ab"])
    (tmp_path / "SUN397/ClassName.txt").write_text("\n".join(paths) + "\n")
    task = only("sun397", tmp_path)
    labels = right(task.test)
    assert len(labels) == 794
    for path, name in {
        "j/jail/indoor": "jail indoor",
        "j/jail_cell": "jail cell",
        "a/apse/indoor": "apse indoor",
    }.items():
        assert task.class_names[labels[f"SUN397/{path}/sun_b.jpg"]] == (name,)
    assert task.training is None
    assert task.notes[0].startswith("all images")

    (tmp_path / "Testing_01.txt").write_text("".join(f"{path}/sun_b.jpg\n" for path in paths))
    (tmp_path / "SUN397/Training_01.txt").write_text("".join(f"{path}/sun_a.jpg\n" for path in paths[:5]))
    task = only("sun397", tmp_path)
    assert right(task.test) == {name: label for name, label in labels.items() if name.endswith("b.jpg")}
    assert list(training(task).values()) == [0, 1, 2, 3, 4]
    assert task.notes[0].startswith("the first of the data set's ten official partitions")
    (tmp_path / "Testing_01.txt").write_text("/a/abbey/sun_c.jpg\n")
    assert "lists 1 images that are not there: SUN397/a/abbey/sun_c.jpg" in message("sun397", tmp_path)


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {}
    for split, labels in (("train", [3] * 5 + list(range(10, 0, -1))), ("test", list(range(1, 11)))):
        file = tmp_path / f"{split}_32x32.mat"
        pixels = PIXELS[: len(labels)].transpose(1, 2, 3, 0)
        savemat(file, {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})
        sums[split] = [*datasets.SVHN.split_list[split][:2], md5(file)]
    monkeypatch.setattr(datasets.SVHN, "split_list", sums)
    task = only("svhn", tmp_path)
    assert right(task.test) == {f"{n:05d}": (n + 1) % 10 for n in range(10)}  # SVHN writes 10 for 0
    assert task.class_names[0] == ("0", "zero")
    assert task.templates == "paper-svhn"
    assert (decoded(task.test, 4) == PIXELS[4]).all()
    assert list(training(task).values())[4:7] == [3, 0, 9]
    (tmp_path / "test_32x32.mat").unlink()
    assert f"{tmp_path} has no test_32x32.mat; expected for svhn: test_32x32.mat" in message("svhn", tmp_path)


def test_eurosat(image_file: Path, tmp_path: Path) -> None:
    folders = [
        "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
        "Residential", "River", "SeaLake",
    ]  # fmt: skip
    link(image_file, tmp_path / "eurosat/2750", [f"{name}/{name}_1.jpg" for name in folders])
    task = only("eurosat", tmp_path)
    assert list(right(task.test).values()) == list(range(10))
    assert task.class_names[6] == ("permanent crop", "arable land", "an orchard")
    assert task.templates == "paper-eurosat"
    link(image_file, tmp_path / "eurosat/2750", ["City/City_1.jpg"])
    assert "has classes that are not the data set's (city)" in message("eurosat", tmp_path)
    (tmp_path / "eurosat/2750/City/City_1.jpg").unlink()
    assert "Found no valid file for the classes City" in message("eurosat", tmp_path)


def test_resisc45(image_file: Path, tmp_path: Path) -> None:
    folders = [name.replace(" ", "_") for (name,) in class_names("resisc45")]
    link(image_file, tmp_path / "NWPU-RESISC45", [f"{name}/{name}_001.jpg" for name in folders])
    task = only("resisc45", tmp_path)
    labels = right(task.test)
    assert labels["thermal_power_station/thermal_power_station_001.jpg"] == 43
    assert task.class_names[43] == ("a power station", "a thermal power station")
    assert right(only("resisc45", tmp_path / "NWPU-RESISC45").test) == labels
    assert "lacks 45 of its class folders (airplane, airport, " in message("resisc45", tmp_path.parent)


def write_idx(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sides = b"".join(side.to_bytes(4, "big") for side in array.shape)
    file.write_bytes(b"\0\0\x08" + bytes([array.ndim]) + sides + array.astype(np.uint8).tobytes())


def test_fashion_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    for prefix, labels in (("train", np.arange(20) % 10), ("t10k", np.arange(10)[::-1])):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", PIXELS[: len(labels), :28, :28, 0])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
    task = only("fashion-mnist", tmp_path)
    assert right(task.test)["00000"] == 9
    assert task.class_names[9] == ("Ankle boot",)
    assert (decoded(task.test, 3) == PIXELS[3, :28, :28, 0]).all()
    assert len(training(task)) == 20
    (raw / "train-labels-idx1-ubyte").unlink()
    assert "torchvision cannot read FashionMNIST" in message("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    "name",
    ["caltech101", "cifar10", "cifar100", "dtd", "eurosat", "fashion-mnist", "flowers102", "pets", "sun397", "svhn"],
)
def test_nothing_is_written_into_a_wrong_folder(name: str, tmp_path: Path) -> None:
    assert message(name, tmp_path).startswith(f"{tmp_path} has no ")
    assert list(tmp_path.iterdir()) == []
