"""Repositories of the Hugging Face hub, fetched whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from lamplit.errors import StoreError, TowerError, first_line
from lamplit.files import cache_folder, link_or_copy, replacing

Kind = Literal["model", "dataset"]


def fetch_repository(name: str, kind: Kind) -> Path:
    """Fetch all files of a repository that are not here yet; return the folder with the newest ones.

    Without a network it is the folder that was fetched last.

    Args:
        name: `OWNER/NAME` on the hub; $HF_ENDPOINT says where the hub is.
        kind: what it holds.

    Raises:
        TowerError: a model's cannot be fetched.
        StoreError: a data set's cannot be fetched.
    """
    from huggingface_hub import snapshot_download  # a search by words does without

    try:
        return _with_real_files(Path(snapshot_download(name, repo_type=kind)))
    except hub_errors() as error:
        failed = TowerError if kind == "model" else StoreError
        raise failed(f"hf:{name} cannot be fetched from the hub: {first_line(error)}") from error


def read_repository_json(name: str, file: str) -> dict[str, Any] | None:
    """Read a JSON object of a model's repository, or of a folder; return None if it has no such file.

    Raises:
        TowerError: the hub cannot be reached, and the file was not fetched before.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        path = Path(name) / file if Path(name).is_dir() else Path(hf_hub_download(name, file))
        found = json.loads(path.read_text(encoding="utf-8"))
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, error) from error
    except (EntryNotFoundError, RepositoryNotFoundError, FileNotFoundError, ValueError):  # no JSON, or no name
        return None
    except hub_errors() as error:
        raise _unreachable(name, error) from error
    return found if isinstance(found, dict) else None


def _unreachable(name: str, error: Exception) -> TowerError:
    return TowerError(f"hf:{name} could not be opened: {first_line(error)}")


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what `huggingface_hub` raises if a hub refuses or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    # A connection that fails raises what its HTTP library has for it: no OSError in every version, but a base of this.
    http_errors = [kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)]
    return (*http_errors, OSError, ValueError, RuntimeError)


def _with_real_files(snapshot: Path) -> Path:
    """Link the files of the hub's cache, which are symbolic links there, into a folder of real files.

    ONNX Runtime reads no weights through a symbolic link that leads out of the model's folder.
    """
    folder = cache_folder() / "hub" / snapshot.parents[1].name / snapshot.name
    if not folder.is_dir():
        with replacing(folder) as partial:
            for file in sorted(snapshot.rglob("*")):
                if file.is_file():
                    target = partial / file.relative_to(snapshot)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    link_or_copy(file.resolve(), target)
    return folder
