from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import serve
from hub_server import Hub
from huggingface_hub import DatasetCard, ModelCard

import lamplit
from lamplit import LiT, Store, TuneSettings, UsageError
from lamplit.evaluation.evaluator import evaluate
from lamplit.model import save_image_tower
from lamplit.publishing.model_card import interval
from lamplit.publishing.pushing import push
from lamplit.towers.images.image_tower import ImageTower
from lamplit.tuning.run import tune

MODEL_FILES = {
    "README.md", "config.json", "curves.png", "image_tower.safetensors", "log.jsonl", "report.json", "settings.json",
    "split.safetensors", "text_tower.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def run_path(
    store_path: Path, text_folder: Path, image_tower: ImageTower, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run on the drawings with a text tower from a folder, whose checkpoint and settings have paths."""
    out = tmp_path_factory.mktemp("runs") / "drawings"
    tune(store_path, out, TuneSettings(f"hf:{text_folder}", epochs=1, test_fraction=0.2, head="linear"))
    save_image_tower(image_tower, out)  # random weights have no name, so the run could not open it
    return out


def text_of(folder: Path) -> str:
    return "\n".join(f.read_text(encoding="utf-8") for f in folder.rglob("*") if f.suffix in (".json", ".md", ".jsonl"))


def test_a_run_is_written_without_paths_and_checkpoints(run_path: Path, text_folder: Path, tmp_path: Path) -> None:
    report = push(run_path, "ann/drawings", out=tmp_path / "out", license="apache-2.0")
    assert set(report.files) == MODEL_FILES
    assert report.url is None
    assert report.notes == []
    text = text_of(tmp_path)
    for private in (run_path.parent, text_folder.parent, tmp_path, Path.home()):
        assert str(private) not in text
    assert (run_path / "checkpoints").is_dir()  # the run itself is as it was
    before, after = lamplit.load(run_path, device="cpu"), lamplit.load(f"hf:{tmp_path / 'out'}", device="cpu")
    assert torch.equal(before.encode_texts(["A red ring."]), after.encode_texts(["A red ring."]))
    assert after.name == "out"
    assert after.tuned_on is not None
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["store"] == "drawings.lance"


def test_card_tells_what_was_locked_and_measured(run_path: Path, text_folder: Path, tmp_path: Path) -> None:
    push(run_path, "ann/drawings", out=tmp_path / "out", license="apache-2.0")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "lamplit"
    assert card.data.model_name == "drawings"
    report = json.loads((run_path / "report.json").read_text())
    figures = {each.metric_type: each.metric_value for each in card.data.eval_results or []}
    assert figures["image_to_text/recall@5"] == pytest.approx(report["test"]["image_to_text/recall@5"], abs=1e-4)
    text = card.text
    assert "the image tower was locked, the text tower pre-trained and tuned" in text
    assert "was the same before and after tuning" in text
    assert f"`hf:{text_folder.name}`" in text
    for name in ("held out", "test"):
        assert name in text
    assert "curves.png" in text
    assert 'lamplit.load("hf:ann/drawings")' in text
    assert "lamplit export hf:ann/drawings --to open-clip" in text
    assert "| `epochs` | 1 |" in text


def test_card_has_results_of_this_model_alone(
    run_path: Path, model_path: Path, store_path: Path, tmp_path: Path
) -> None:
    results, others = tmp_path / "results", tmp_path / "others"
    evaluate(run_path, store_path, out=results)
    evaluate(model_path, store_path, out=others)
    push(run_path, "ann/drawings", out=tmp_path / "out", results=results)
    assert "bootstrap" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert str(store_path.parent) not in text_of(tmp_path / "out")
    with pytest.raises(UsageError, match="no result of this very model"):
        push(run_path, "ann/drawings", out=tmp_path / "none", results=others)
    assert not (tmp_path / "none").exists()


def test_own_card_and_a_model_without_a_run(model_path: Path, tmp_path: Path) -> None:
    shutil.copytree(model_path, tmp_path / "model")
    report = push(model_path, "ann/drawings", out=tmp_path / "out")
    assert any("no report.json" in note for note in report.notes)
    assert "## Figures" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "model" / "README.md").write_text("my own")
    report = push(tmp_path / "model", "ann/drawings", out=tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == "my own"
    assert any("your own" in note for note in report.notes)


def test_a_model_whose_config_has_what_is_needed_alone(model_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for key in ("center", "image_head", "logit_bias"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    push(folder, "ann/drawings", out=tmp_path / "out")
    push(model_path, "ann/drawings", out=tmp_path / "second")
    cards = [(tmp_path / out / "README.md").read_text(encoding="utf-8") for out in ("out", "second")]
    assert cards[0] == cards[1]
    assert "| centred | no |" in cards[0]


def test_a_store_is_written_without_paths_and_keeps_its_vectors(
    store_path: Path, image_folder: Path, model_path: Path, tmp_path: Path
) -> None:
    report = push(store_path, "ann/drawings", out=tmp_path / "out")
    assert report.kind == "dataset"
    opened, before = Store(f"hf:{tmp_path / 'out'}"), Store(store_path)
    assert torch.equal(opened.vectors(), before.vectors())
    assert opened.column("id") == before.column("id")
    assert opened.texts() == before.texts()
    assert opened.column("shape") == before.column("shape")
    assert opened.column("path") == opened.column("id")
    assert opened.tower.fingerprint == before.tower.fingerprint
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or str(image_folder).encode() not in file.read_bytes(), file
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.size_categories == ["n<1K"]
    assert "The images are not here" in card.text
    assert "| images | 60 |" in card.text
    model = LiT.load(model_path, device="cpu", towers="text")
    [hit] = lamplit.search(model, f"hf:{tmp_path / 'out'}", "A red ring.", k=1)
    assert hit.id == hit.path


def test_paths_in_lists_and_structs_lose_their_folder_too(
    image_folder: Path, image_tower: ImageTower, tmp_path: Path
) -> None:
    lines = [
        {
            "image": str(image_folder / file.name), "text": f"A drawing in {image_folder}/.",
            "also": [str(image_folder / "other.png"), None], "info": {"src": str(image_folder / "source.svg")},
        }
        for file in sorted(image_folder.glob("*.png"))[:3]
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lamplit.embed(tmp_path / "pairs.jsonl", tmp_path / "a.lance", image_tower=image_tower, backend="torch")
    push(tmp_path / "a.lance", "ann/drawings", out=tmp_path / "out")
    pushed = Store(f"hf:{tmp_path / 'out'}")
    assert pushed.column("also") == [["other.png", None]] * 3
    assert pushed.column("info") == [{"src": "source.svg"}] * 3
    assert pushed.texts() == [[line["text"]] for line in lines], "captions are the user's own words"


def test_ids_that_are_paths_lose_their_common_folder(
    image_folder: Path, image_tower: ImageTower, tmp_path: Path
) -> None:
    rows = [f"{image_folder / file.name},A drawing." for file in sorted(image_folder.glob("*.png"))[:4]]
    (tmp_path / "pairs.csv").write_text("\n".join(["path,caption", *rows]))
    lamplit.embed(tmp_path / "pairs.csv", tmp_path / "a.lance", image_tower=image_tower, backend="torch")
    push(tmp_path / "a.lance", "ann/drawings", out=tmp_path / "out")
    ids = Store(f"hf:{tmp_path / 'out'}").column("id")
    assert ids == [row.partition(",")[0].rpartition("/")[2] for row in rows]


def test_nothing_is_written_into_a_store_on_the_hub(image_folder: Path, image_tower: ImageTower) -> None:
    with pytest.raises(UsageError, match="hf:ann/drawings is a store on the hub; give a path as --out"):
        lamplit.embed(image_folder / "pairs.csv", "hf:ann/drawings", image_tower=image_tower)


@pytest.mark.parametrize("name", ["drawings", "ann/draw/ings", "ann/draw ings", ""])
def test_names_that_no_hub_takes(model_path: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected OWNER/NAME"):
        push(model_path, name, out=tmp_path / "out")


def test_what_cannot_be_pushed(tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        push(model_path, "ann/drawings", out=tmp_path / "full")
    with pytest.raises(UsageError, match="neither the folder of a model nor a store"):
        push(tmp_path / "full", "ann/drawings", out=tmp_path / "out")


def test_interval_is_wilsons() -> None:
    assert interval(0.5, 100) == "0.500 (0.404 to 0.596)"
    assert interval(1.0, 10) == "1.000 (0.722 to 1.000)"
    assert interval(0.5, 0) == "0.500"


CLIENT = """
import sys
import lamplit
run, store = sys.argv[1:3]
print(lamplit.push(store, "ann/drawings").url)
first = lamplit.push(run, "ann/drawings", private=True).url
assert lamplit.push(run, "ann/drawings", license="mit").url != first
model, own = lamplit.load("hf:ann/drawings", device="cpu"), lamplit.load(run, device="cpu")
assert model.name == "drawings"
texts, image = ["A red ring."], sys.argv[3]
assert (model.encode_texts(texts) == own.encode_texts(texts)).all()
assert (model.encode_images([image]) == own.encode_images([image])).all()
tower = lamplit.open_image_tower("model:hf:ann/drawings")
assert tower.identity().fingerprint == own.identity.fingerprint
print(lamplit.describe("hf:ann/drawings")["text tower"])
results = [lamplit.evaluate("hf:ann/drawings", source, split="all")[0].metrics for source in ("hf:ann/drawings", store)]
assert results[0] == results[1]
print(lamplit.search("hf:ann/drawings", "hf:ann/drawings", texts[0])[0].id)
"""


def client(address: str, folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {
        "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": "hf_ann", "LAMPLIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(lamplit.__file__).parents[1]),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *map(str, command)], env=os.environ | given | environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_pushed_to_a_hub_and_fetched_from_it(
    run_path: Path, store_path: Path, image_folder: Path, tmp_path: Path
) -> None:
    class Own(Hub):
        repositories, objects = {}, {}

    image = next(image_folder.glob("*.png"))
    words = ("-m", "lamplit", "search", "hf:ann/drawings", "hf:ann/drawings", "A red ring.", "--paths")
    with serve(Own) as address:
        done = client(address, tmp_path, "-c", CLIENT, run_path, store_path, image)
        assert done.returncode == 0, done.stderr
        assert f"{address}/datasets/ann/drawings/commit/" in done.stdout
        refused = client(address, tmp_path, "-m", "lamplit", "push", run_path, "ann/drawings", HF_TOKEN="hf_eve")
        assert refused.returncode == 1
        [error] = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
        assert "hf auth login" in error
    pushed = Own.repositories["models/ann/drawings"]
    assert pushed.private
    assert set(pushed.files) == MODEL_FILES
    assert b"license: mit" in pushed.files["README.md"]
    offline = client(address, tmp_path, *words, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout.splitlines()
    nowhere = client(address, tmp_path / "empty", *words, HF_HUB_OFFLINE="1")
    assert nowhere.returncode == 1
    assert "error: hf:ann/drawings could not be opened: " in nowhere.stderr
    assert "Traceback" not in nowhere.stderr
