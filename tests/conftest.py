"""What the tests share: images with captions, a tiny random tower of each kind, and a store."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
import s3fs
import torch
from hypothesis import settings
from object_server import ObjectServer, object_server
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.garbage import collect_rarely
from lamplit.model import LiT
from lamplit.store.embed.embedding import embed
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.images.image_tower import ImageTower, open_image_tower
from lamplit.towers.texts.text_tower import open_text_tower
from lamplit.tuning.head.closed_form import fit_head

collect_rarely()  # as the command line does
# The same examples in every run, so that a red suite speaks of the change; `--hypothesis-profile explore` seeks others.
settings.register_profile("suite", derandomize=True, deadline=None)  # a busy machine breaks no test
settings.register_profile("explore", print_blob=True, deadline=None)
settings.load_profile("suite")
# Whole files that need what Windows does not have: pseudo-terminals.
collect_ignore = ["cli/test_thumbnails.py"] if os.name == "nt" else []
COLORS = {"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "purple": "violett", "black": "schwarz"}
SHAPES = {"circle": "Kreis", "square": "Quadrat", "triangle": "Dreieck", "cross": "Kreuz", "ring": "Ring"}
SIZES = {"small": 12, "large": 28}
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what lamplit caches (ONNX files, data sets) out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMPLIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    """Two processes of tests, of which one has more threads than its share, are many times slower from then on."""
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="session")
def object_storage() -> Iterator[ObjectServer]:
    """Run object storage for as long as tests need it; it takes seconds to start."""
    with object_server() as server:
        yield server


@pytest.fixture
def objects(object_storage: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """Give a test a bucket of its own, and the variables that name the server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    said = {"ENDPOINT_URL": object_storage.endpoint, "ACCESS_KEY_ID": "ann", "SECRET_ACCESS_KEY": "secret"}
    for name, value in {**said, "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()  # which have read other variables
    object_storage.begin()
    yield object_storage
    object_storage.fault = lambda method, path: None


class FolderHandler(SimpleHTTPRequestHandler):
    """Serve a folder without a word."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serve(handler: Callable[..., Any]) -> Iterator[str]:
    """Run a web server on this machine; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def draw(shape: str, color: str, radius: int, size: int = 64) -> Image.Image:
    """Draw one shape in the middle of a white square."""
    image_file = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image_file)
    low, high, middle = size // 2 - radius, size // 2 + radius, size // 2
    box = (low, low, high, high)
    match shape:
        case "circle":
            pen.ellipse(box, fill=color)
        case "square":
            pen.rectangle(box, fill=color)
        case "triangle":
            pen.polygon([(low, high), (high, high), (middle, low)], fill=color)
        case "cross":
            pen.line((low, low, high, high), fill=color, width=6)
            pen.line((low, high, high, low), fill=color, width=6)
        case _:
            pen.ellipse(box, outline=color, width=5)
    return image_file


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of 60 drawings, PNG and JPEG, and `pairs.csv` with path, caption, german and shape."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number, (shape, color, size) in enumerate((s, c, z) for s in SHAPES for c in COLORS for z in SIZES):
        path = f"{size}_{color}_{shape}.{'jpg' if number % 3 == 0 else 'png'}"
        draw(shape, color, SIZES[size]).save(folder / path)
        german = f"{COLORS[color]}, {'klein' if size == 'small' else 'groß'}: {SHAPES[shape]}"
        rows.append({"path": path, "caption": f"A {size} {color} {shape}.", "german": german, "shape": shape})
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="session")
def image_tower() -> ImageTower:
    """Open an untrained ViT, 64 wide, on images of 160 x 160; the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_image_tower("timm:test_vit", weights="random")


@pytest.fixture(scope="session")
def store_path(image_folder: Path, image_tower: ImageTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embed the 60 drawings. To be read only; copy the folder to change it."""
    path = tmp_path_factory.mktemp("store") / "drawings.lance"
    embed(image_folder / "pairs.csv", path, image_tower=image_tower, backend="torch")
    return path


@pytest.fixture
def store(store_path: Path) -> Store:
    """Open the store of the 60 drawings."""
    return Store(store_path)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an untrained BERT, 2 layers and 32 wide, that knows the words of the captions, for `hf:FOLDER`."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = wordpiece_tokenizer()
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def wordpiece_tokenizer(model_max_length: int = 32) -> PreTrainedTokenizerFast:
    """Make a lower-casing WordPiece tokenizer of the captions' words and of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyzäöüß0123456789.,:"
    words = [*COLORS, *SHAPES, *SIZES, *COLORS.values(), *SHAPES.values(), "klein", "groß"]
    vocabulary = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *(w.lower() for w in words)]
    ids = {word: number for number, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def write_store(
    path: Path,
    vectors: Tensor,
    texts: Sequence[Sequence[str]],
    metadata: Sequence[dict[str, object]] = (),
    *,
    hashes: Sequence[str] = (),
    centered: bool = False,
) -> Store:
    """Write a store of (N, D) made-up vectors, from a tower that nobody can open. The ids sort as the rows do."""
    gray = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3)
    tower = TowerIdentity("module:made.up", "0" * 32, vectors.shape[1], gray, {"library": "module", "name": "made.up"})
    columns = list(metadata[0]) if metadata else []
    rows = [
        Row(
            f"{i:05}",
            f"{i}.png",
            hashes[i] if hashes else f"hash{i}",
            row_texts,
            vector,
            metadata[i] if metadata else {},
        )
        for i, (vector, row_texts) in enumerate(zip(F.normalize(vectors, dim=-1), texts, strict=True))
    ]
    store = Store.create(path, tower, rows, backend="torch", centered=centered, metadata_columns=columns)
    store.finish()
    return store


@pytest.fixture(scope="session")
def words_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store of 360 captions; an image's vector is the sum of its words' random vectors, 32 wide, and noise.

    Column `german` has each caption in other words. To be read only.
    """
    generator = torch.Generator().manual_seed(0)
    captions = [
        (f"{size} {color} {shape} on {ground}", f"{COLORS[color]} {SHAPES[shape]} {size} {COLORS[ground]}")
        for size, color, shape, ground in itertools.product(SIZES, COLORS, SHAPES, COLORS)
    ]
    meanings: dict[str, Tensor] = {}
    vectors = torch.randn(32, generator=generator) + 0.1 * torch.randn(len(captions), 32, generator=generator)
    for row, (caption, _) in enumerate(captions):
        *words, ground = re.sub(" on ", " ", caption).split()
        for word in (*words, f"on {ground}"):
            vectors[row] += meanings.setdefault(word, torch.randn(32, generator=generator))
    path = tmp_path_factory.mktemp("words") / "words.lance"
    metadata = [{"german": german, "shape": caption.split()[2]} for caption, german in captions]
    write_store(path, vectors, [[caption] for caption, _ in captions], metadata)
    return path


@pytest.fixture(scope="session")
def model_path(
    image_tower: ImageTower, text_folder: Path, store_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Save a model of both towers that reads the drawings after a fashion: its head is fitted, its encoder random."""
    store = Store(store_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_tower = open_text_tower(f"hf:{text_folder}", width=store.tower.width)
    fit_head(text_tower, store.vectors(), [texts[0] for texts in store.texts()], None)
    path = tmp_path_factory.mktemp("model") / "model"
    LiT(text_tower, store.tower, image_tower).save(path)
    return path


@pytest.fixture(scope="session")
def places_path(image_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with `model` and `drawings.lance`, as `model_path`, of a ViT that takes the mean of its patches."""
    folder = tmp_path_factory.mktemp("places")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = open_image_tower("timm:test_vit", weights="random", pool="mean")
        text_tower = open_text_tower(f"hf:{text_folder}", width=tower.width)
    embed(image_folder / "pairs.csv", folder / "drawings.lance", image_tower=tower, backend="torch")
    store = Store(folder / "drawings.lance")
    fit_head(text_tower, store.vectors(), [texts[0] for texts in store.texts()], None)
    LiT(text_tower, store.tower, tower).save(folder / "model")
    return folder


@contextmanager
def interrupted_at(log: Path, lines: int) -> Iterator[None]:
    """Press Ctrl-C as soon as `log` has so many lines, unless what is done is done before.

    It is pressed once, wherever the program is: a second one, by an alarm that was on its way, could end the tests.
    """
    pressed: list[bool] = []

    def interrupt(_: int, frame: FrameType | None) -> None:
        # Where the garbage collector calls back, an exception would be swallowed, and where this block is left, it
        # would go past it; the next alarm is soon.
        is_lost = frame is not None and (
            frame.f_code.co_name == "gc_callback" or frame.f_code.co_filename in (__file__, contextlib.__file__)
        )
        if not (pressed or is_lost) and log.is_file() and log.read_bytes().count(b"\n") >= lines:
            pressed.append(True)
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    if not hasattr(signal, "setitimer"):  # Windows
        pytest.skip("this system has no timers")
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    # Between `open` and the `with` that would close it, an interruption leaves a file to the garbage collector.
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        try:
            yield
        except KeyboardInterrupt:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
