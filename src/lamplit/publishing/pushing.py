"""A model or a store, put on the Hugging Face hub with its card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lamplit.data.named.repositories import Kind, hub_errors
from lamplit.data.split_record import FILE as SPLIT
from lamplit.errors import StoreError, TowerError, UsageError, first_line
from lamplit.evaluation.model_metadata import model_fingerprint
from lamplit.files import link_or_copy, write_text
from lamplit.metrics.results import Result, read_results
from lamplit.model import IMAGE_TOWER, load
from lamplit.publishing.model_card import model_card
from lamplit.publishing.private_paths import last_part, reduce_paths
from lamplit.publishing.store_card import store_card, write_public_store
from lamplit.store.lance_store import Store
from lamplit.store.published_stores import FOLDER
from lamplit.towers.model_folder import CONFIG, IMAGE_HEAD, TEXT_TOWER, TOKENIZER, names_model, read_config

_CARD = "README.md"
# What makes a model, and what tells of its run. Checkpoints of optimizers are for its owner alone, and
# text_tower.onnx is made again where it is needed: what is pushed cannot run code.
_FILES = (TEXT_TOWER, IMAGE_TOWER, IMAGE_HEAD, SPLIT, "curves.png", "log.jsonl")
_DESCRIPTIONS = (CONFIG, "settings.json", "report.json")
_OURS = {"model": [*_FILES, *_DESCRIPTIONS, f"{TOKENIZER}/*"], "dataset": [f"{FOLDER}/*"]}


@dataclass
class PushReport:
    """What was pushed.

    Attributes:
        repository: `OWNER/NAME` on the hub; `hf:OWNER/NAME` opens it.
        kind: model or dataset (a store).
        url: address of the commit; None if nothing was sent.
        folder: where the files were written instead; None if they were sent.
        files: size in bytes of each file, by name.
        notes: what to know, a sentence each.
    """

    repository: str
    kind: Kind
    url: str | None = None
    folder: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def push(
    source: str | Path,
    repository: str,
    *,
    out: str | Path | None = None,
    results: str | Path | None = None,
    license: str | None = None,
    private: bool = False,
) -> PushReport:
    """Put a saved model or a store on the Hugging Face hub, with a card that is made from what is known of it.

    A `README.md` of your own in the model's folder takes the place of the card. No path of this machine is in what is
    pushed; checkpoints of the optimizer are not pushed, and neither are images. `lamplit.load("hf:OWNER/NAME")` opens
    the model, `lamplit.Store("hf:OWNER/NAME")` the store.

    On the command line: `lamplit push`.

    Args:
        source: folder of a model that `lamplit tune` or `LiT.save` wrote; or a store.
        repository: `OWNER/NAME` on the hub; it is made if it is not there. $HF_ENDPOINT names another hub.
        out: folder to write instead, new or empty; nothing is sent.
        results: folder of results that `lamplit evaluate --out` wrote; those of this very model go into the card.
        license: the hub's word for the license, such as `apache-2.0`.
        private: make a repository that only its owner sees.

    Raises:
        UsageError: the repository's name cannot be one, there is neither a model nor a store, or `out` is not empty.
        TowerError: the hub refused the model, or cannot be reached.
        StoreError: the same of a store.

    Example:
        >>> lamplit.push("runs/stamps", "ann/stamps", license="apache-2.0").url
        'https://huggingface.co/ann/stamps/commit/...'
    """
    _require_name(repository)
    is_model = (Path(source) / CONFIG).is_file()
    if not is_model and (names_model(source) or not Store.exists(source)):
        raise UsageError(f"{source} is neither the folder of a model nor a store")
    report = PushReport(repository, "model" if is_model else "dataset", folder=None if out is None else str(out))
    with _staged(out) as folder:
        if is_model:
            _stage_model(Path(source), folder, repository, results, license, report.notes)
        else:
            _stage_store(Store(source), folder, repository, license, report.notes)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        report.files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        if out is None:
            report.url = _send(folder, report, private)
    return report


def _require_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
        problem = None if repository.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        problem = first_line(error)
    if problem:
        raise UsageError(f"{repository!r} is no name on the hub ({problem}); expected OWNER/NAME, such as ann/stamps")


@contextmanager
def _staged(out: str | Path | None) -> Iterator[Path]:
    """Yield an empty folder: `out`, which is removed if anything fails, or one that is removed at the end."""
    if out is None:
        with TemporaryDirectory(prefix="lamplit-push-") as folder:
            yield Path(folder)
        return
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is not an empty folder; give another, or remove it first")
    target.mkdir(parents=True, exist_ok=True)
    whole = False
    try:
        yield target
        whole = True
    finally:
        if not whole:
            shutil.rmtree(target, ignore_errors=True)


def _stage_model(
    source: Path, folder: Path, repository: str, results: str | Path | None, license: str | None, notes: list[str]
) -> None:
    read_config(source)  # which says what is wrong with it
    for name in _FILES:
        if (source / name).is_file():
            link_or_copy(source / name, folder / name)
    if (source / TOKENIZER).is_dir():
        shutil.copytree(source / TOKENIZER, folder / TOKENIZER)
    for name in (*_DESCRIPTIONS, f"{TOKENIZER}/tokenizer_config.json"):
        if (source / name).is_file():
            described = json.loads((source / name).read_text(encoding="utf-8"))
            write_text(folder / name, json.dumps(_public(name, described), indent=2, ensure_ascii=False) + "\n")
    if (source / _CARD).is_file():
        link_or_copy(source / _CARD, folder / _CARD)
        notes.append(f"the card is your own {source / _CARD}")
        return
    write_text(folder / _CARD, model_card(folder, repository, _results_of(source, results), license))
    if not (source / "report.json").is_file():
        notes.append("the folder has no report.json of a finished run, so the card has no figures of it")
    if license is None:
        notes.append("the card names no license; --license does")


def _public(name: str, described: dict[str, Any]) -> dict[str, Any]:
    """Return a description without paths; what the fingerprint of the image tower covers stays as it is."""
    public: dict[str, Any] = reduce_paths(described)
    if name == CONFIG:
        for part in described["image_tower"].keys() & {"config", "preprocessing"}:
            public["image_tower"][part] = described["image_tower"][part]
    elif name == "settings.json":
        public["store"] = last_part(described["store"])
    elif name == "report.json":
        public["out"] = last_part(described["out"])
        public["skipped"] = {}  # the paths of images
    return public


def _results_of(source: Path, results: str | Path | None) -> Sequence[Result]:
    if results is None:
        return ()
    own = model_fingerprint(load(source, device="cpu"))
    found = [each for each in read_results(results) if each.model.get("fingerprint") == own]
    if not found:
        raise UsageError(
            f"{results} has no result of this very model; make some with: lamplit evaluate {source} STORE --out FOLDER"
        )
    return found


def _stage_store(store: Store, folder: Path, repository: str, license: str | None, notes: list[str]) -> None:
    texts = write_public_store(store, folder)
    write_text(folder / _CARD, store_card(Store(folder / FOLDER), texts, repository, license))
    notes.append("ids, texts and all other columns of the store are pushed; its images are not")
    if license is None:
        notes.append("the card names no license; --license does")


def _send(folder: Path, report: PushReport, private: bool) -> str:
    api, kind = HfApi(library_name="lamplit"), report.kind
    try:
        made = api.create_repo(report.repository, repo_type=kind, private=private or None, exist_ok=True)
        sent = api.upload_folder(
            repo_id=made.repo_id, repo_type=kind, folder_path=folder, commit_message="Push with lamplit",
            delete_patterns=_OURS[kind],
        )  # fmt: skip
    except hub_errors() as error:
        failed = TowerError if kind == "model" else StoreError
        raise failed(
            f"{report.repository} cannot be pushed to {api.endpoint}: {first_line(error)}. Log in with: hf auth login; "
            "or write the files with --out FOLDER"
        ) from error
    return str(sent.commit_url)
