"""Where a source or a store is: a path of this machine, or an address in object storage such as `s3://bucket/key`.

`path_of` makes the one or the other of a string. An address has those methods of `pathlib.Path` that readers call, so a
reader opens both in the same way. Stores are opened by Lance itself, with `lance_options`.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import cast

from lamplit.errors import UsageError
from lamplit.files import write_text
from lamplit.locations.addresses import RemotePath, is_remote


def path_of(name: str | Path) -> Path:
    """Return the path that a string names, or what stands for one in object storage.

    That has the methods of a path that readers need: to take names apart and to read. The system's own functions
    (`os.stat`, `open`) do not take it.

    Example:
        >>> path_of("s3://bucket/shards/000.tar").name
        '000.tar'
    """
    if is_remote(name):
        return cast("Path", RemotePath(str(name)))
    return Path(name)


def find_files(name: str) -> list[Path]:
    """List the files that a name, a glob or a brace form such as `a-{000..003}.tar` stands for, with whole paths.

    Raises:
        FileNotFoundError: of a brace form, some files are there and some are not.
    """
    if (file := path_of(name)).is_file():
        return [file.absolute()]
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", name):
        start, stop = braces.groups()
        wanted = [f"{number:0{len(start)}}" for number in range(int(start), int(stop) + 1)]
        if is_remote(name) and "{" not in name[braces.end() :]:  # to ask for each file would take long
            there = {str(file): file for file in _glob(name.replace(braces.group(), "*", 1))}
            named = {number: name.replace(braces.group(), number, 1) for number in wanted}
            found = {number: [there[each]] if each in there else [] for number, each in named.items()}
        else:
            found = {number: find_files(name.replace(braces.group(), number, 1)) for number in wanted}
        missing = [number for number, files in found.items() if not files]
        if missing and len(missing) < len(wanted):
            raise FileNotFoundError(f"there is no file for {', '.join(missing[:10])}")
        return [file for files in found.values() for file in files]
    return _glob(name)


def _glob(name: str) -> list[Path]:
    if is_remote(name):
        return cast("list[Path]", RemotePath(name).parent.glob(RemotePath(name).name))
    return [Path(file).absolute() for file in sorted(glob.glob(name)) if os.path.isfile(file)]


def write_new(file: Path, content: bytes) -> bool:
    """Write a small file whole, unless there is one of its name; tell whether it was written.

    Raises:
        OSError: it cannot be written.
    """
    place: object = file
    if isinstance(place, RemotePath):
        return place.write_new(content)
    partial = file.with_name(f".{file.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with partial.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.link(partial, file)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def write_whole(file: Path, text: str) -> None:
    """Write a text file or an object whole, in the place of one that is there.

    Raises:
        OSError: it cannot be written.
    """
    if is_remote(file):
        file.write_bytes(text.encode())
    else:
        write_text(file, text)


def require_local(name: str | Path, what: str) -> None:
    """Refuse an address where files of this machine are needed.

    Args:
        name: a path or an address.
        what: what is read or written there, for the message.

    Raises:
        UsageError: it is an address.
    """
    address = re.sub(r"^(\w+):/+", r"\1://", str(name))  # of two slashes, a Path keeps one
    if is_remote(address):
        raise UsageError(f"{what} lies in a folder of this machine, not at {address}; give a path, and copy the folder")


def lance_options(name: str | Path) -> dict[str, str]:
    """Return what Lance needs to know to open an address, beside the environment; nothing for a path.

    Lance reads credentials, region and endpoint from the usual variables, as fsspec does, but takes an endpoint of
    plain HTTP only if it is told to.
    """
    if not is_remote(name):
        return {}
    options = {"client_max_retries": "6"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if not str(name).startswith("s3:"):
        return options
    if endpoint:
        options["aws_endpoint"] = endpoint
    if endpoint.startswith("http://"):
        options["allow_http"] = "true"
    return options
