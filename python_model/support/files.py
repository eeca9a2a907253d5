"""Atomic writing (a file or folder exists completely or not at all), and the cache folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from python_model.support.arguments import check_path

ABANDONED = 3600.0
"""Seconds after its last change from which a temporary file or folder that no process holds is that of one which was killed."""
_REASONS = {
    errno.ENOENT: "there is no such file or folder",
    errno.EEXIST: "expected a new name, got one that exists",
    errno.ENOTDIR: "expected a folder, got a file",
    errno.EISDIR: "expected a file, got a folder",
    errno.EACCES: "this user has no permission for it",
    errno.EPERM: "this user has no permission for it",
    errno.EROFS: "it can only be read",
    errno.ENOSPC: "there is no space left",
    errno.EDQUOT: "there is no space left for this user",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What writing to an open file raises, without its name, if the disk is full."""


def reason_of(error: Exception, *, with_path: bool = False) -> str:
    """What is wrong with a file or folder by an error of the system, without its number; any other error as it is."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    if not isinstance(error.filename, str | os.PathLike):
        return _REASONS[error.errno] if error.errno in FULL else str(error)
    path, reason = Path(error.filename), _REASONS.get(error.errno, str(error.strerror))
    if error.errno == errno.ENOTDIR:
        path = next((part for part in [*reversed(path.parents), path] if part.is_file()), path)
    return f"{path}: {reason}" if with_path else reason


def cache_folder() -> Path:
    """``$GRIT_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/grit_kernels``, else ``~/.cache/grit_kernels``."""
    if own := os.environ.get("GRIT_KERNELS_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "grit_kernels"
    return Path.home() / ".cache" / "grit_kernels"


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; None if it is empty.

    Raises:
        ValueError: it is not YAML; the message names the file and the line.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error


def make_folder(path: Path) -> None:
    """Make the folder and those above it, where they are missing.

    Raises:
        NotADirectoryError: there is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path}: expected a folder or a new name, got a file") from None


def check_writable(path: Path) -> None:
    """Make the folder if it is missing.

    Raises:
        OSError: no file can be made in it.
    """
    make_folder(path)
    with named(path), tempfile.TemporaryFile(dir=path):
        pass


def place_for_file(path: str | os.PathLike[str]) -> Path:
    """``path`` for a file to write or replace; the folder that it is in is made.

    Raises:
        IsADirectoryError: it is a folder.
        NotADirectoryError: what should be its folder is a file.
    """
    check_path("path", path)
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target}: expected a file to write, got a folder")
    make_folder(target.parent)
    return target


@contextlib.contextmanager
def named(target: Path, *numbers: int) -> Iterator[None]:
    """An error (with one of these numbers) about a temporary name, or an open file, is one about the name that was asked for."""
    try:
        yield
    except OSError as error:
        if not numbers or error.errno in numbers:
            error.filename = str(target)
        raise


@contextlib.contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """Within the block, other processes see that this one is writing the temporary file or folder; where the system has such
    locks."""
    descriptor = _locked(temporary)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    """A descriptor that holds a lock on the file or folder until it is closed, or its process ends; None if there is no such
    lock."""
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes had written of ``target``: it may be as large, and each attempt would leave another."""
    name = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{32}")
    with contextlib.suppress(OSError):  # others' files, or a folder that cannot be listed
        for path in filter(lambda path: name.fullmatch(path.name), target.parent.iterdir()):
            if time.time() - path.stat().st_mtime < ABANDONED or (descriptor := _locked(path)) is None:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
            os.close(descriptor)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file to fill; it becomes ``path`` (replacing what is there) when the block ends without an error."""
    target = place_for_file(path)
    _remove_abandoned(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with named(target):
        file = open(temporary, "wb")  # noqa: SIM115  (closed below)
    try:
        with _held(temporary), named(target, *FULL):
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path``, atomically."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to fill; it becomes ``path`` (replacing a folder that is there) when the block ends without an error."""
    check_path("path", path)
    target = Path(path)
    if target.is_file():
        raise NotADirectoryError(f"{target}: expected a folder or a new name, got a file")
    make_folder(target.parent)
    _remove_abandoned(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with named(target):
        temporary.mkdir()
    try:
        with _held(temporary), named(target, *FULL):
            yield temporary
            # the content must be on disk before the new name points to it
            for item in [*temporary.rglob("*"), temporary]:
                sync(item)
            old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
            if target.exists():
                os.replace(target, old)
            os.replace(temporary, target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk; folders where the system supports it."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
