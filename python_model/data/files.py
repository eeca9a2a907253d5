"""Files of rows in any container: ``.jsonl``, ``.json`` (an array, or lines), either gzipped (``.gz``), and ``.parquet``; in
UTF-8 or, with a byte order mark, UTF-16; on disk or at any URL that fsspec understands (``s3://bucket/rows.jsonl``).

Rows are located by byte offset, which requires lines of UTF-8. Any other file is converted once to such lines in the cache folder
(:func:`as_lines`) and read from there.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from filelock import FileLock

from python_model.data.rows import DataError, json_type
from python_model.support.arguments import check_path
from python_model.support.files import cache_folder, new_file
from python_model.support.optional import require
from python_model.support.processes import mapped

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
Location = str | os.PathLike[str]
NAMED = 5
"""Number of files in a folder that a note names."""
SHARED_BYTES = 64 << 20
"""Several files of at least this size together are converted by several processes."""


def dataset_name(file: Location) -> str:
    """The name of a file's data set: the file's name up to its first dot."""
    return os.fspath(file).replace(os.sep, "/").rsplit("/", 1)[-1].split(".")[0]


def data_files(path: Location) -> list[Path | str]:
    """The file itself, or the files directly in a folder whose names end in one of :data:`SUFFIXES`, sorted by name.

    Raises:
        FileNotFoundError: there is no such file or folder.
        DataError: the folder has no such file.
    """
    if is_remote(path):
        return _remote_files(os.fspath(path))
    check_path("path", path)
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path}: the folder has no {', '.join('*' + suffix for suffix in SUFFIXES)} file")
        return list(files)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return [path]


def unread_note(path: Location) -> list[str]:
    """A note that names what :func:`data_files` does not read in a folder; empty where that is nothing."""
    if is_remote(path) or not Path(path).is_dir():
        return []
    read = set(data_files(path))
    names = [f.name + "/" * f.is_dir() for f in sorted(Path(path).iterdir()) if f not in read and f.name[0] != "."]
    names = [name for name in names if not name.endswith(".md")]
    if not names:
        return []
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return [
        f"{path}: not read: {shown}; only {', '.join('*' + suffix for suffix in SUFFIXES)} in the folder itself are"
    ]


def is_remote(path: Location) -> bool:
    """Whether fsspec has to read it."""
    return "://" in os.fspath(path)


def _remote_files(address: str) -> list[Path | str]:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(address)
    if filesystem.isfile(root):
        return [address]
    names = sorted(
        filesystem.glob(root) if "*" in root else filesystem.ls(root, detail=False) if filesystem.isdir(root) else []
    )
    found = [filesystem.unstrip_protocol(name) for name in names if name.endswith(SUFFIXES)]
    if not found:
        raise FileNotFoundError(f"there is no file or folder of rows at {address}")
    return list(found)


def as_lines(file: Location) -> Path:
    """A file on disk with one UTF-8 JSON object per line: ``file`` itself, or the copy in the cache folder.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be read.
    """
    target, _ = _lines_of(file)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # one rank per machine converts
        if not target.exists():
            with new_file(target) as out:
                try:
                    for line in _lines(os.fspath(file)):
                        out.write(line.rstrip(b"\r\n") + b"\n")
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    raise DataError(f"{os.fspath(file)}: cannot be read as gzip ({error})") from error
    return target


def files_as_lines(files: Sequence[Location]) -> list[Path]:
    """As :func:`as_lines` of each; all cores share the work if much is to be converted."""
    if len(_pending(files)) > 1:
        folder = cache_folder() / "lines"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "several.lock"):  # one rank per machine starts processes
            pending = _pending(files)
            with mapped(len(pending)) as work:
                for _ in work(_converted, pending):
                    pass
    return [as_lines(file) for file in files]


def _pending(files: Sequence[Location]) -> list[str]:
    """The files that have to be converted, if they are large enough to share the work."""
    found = [(os.fspath(file), *_lines_of(file)) for file in files]
    pending = [(name, size) for name, lines, size in found if not lines.exists()]
    return [name for name, _ in pending] if sum(size for _, size in pending) >= SHARED_BYTES else []


def _converted(name: str) -> None:
    """Convert a file ahead of :func:`as_lines`, which says what is wrong with it, or reads what only the caller's process can."""
    with contextlib.suppress(Exception):
        as_lines(name)


def _lines_of(file: Location) -> tuple[Path, int]:
    """Where a file's rows are, or will be, as lines, and the size of the file in bytes."""
    name = os.fspath(file)
    if not is_remote(name):
        check_path("file", file)
        if not Path(name).exists():
            raise FileNotFoundError(f"there is no file {name}")
        if Path(name).is_dir():
            raise IsADirectoryError(f"{name}: expected a file, got a folder")
        status = os.stat(name)
        if _is_lines(Path(name)):
            return Path(name), status.st_size
        identity, size = [os.path.realpath(name), status.st_size, status.st_mtime_ns], status.st_size
    else:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(name)
        info = filesystem.info(root)
        size = info.get("size") or 0
        identity = [name, info.get("size"), str(info.get("ETag") or info.get("LastModified") or info.get("created"))]
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    return cache_folder() / "lines" / f"{key}.jsonl", size


def read_objects(file: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, row) of each line that is not empty; errors as :func:`parse_line`."""
    for origin, row in read_lines(file):
        if isinstance(row, DataError):
            raise row
        yield origin, row


def read_lines(file: Location) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """As :func:`read_objects`, with an error in place of a malformed line."""
    with open(as_lines(file), "rb") as lines:
        for number, line in enumerate(lines, start=1):
            origin = f"{os.fspath(file)}:{number}"
            try:
                row = parse_line(line, origin, first=number == 1)
            except DataError as error:
                yield origin, error
                continue
            if row is not None:
                yield origin, row


def parse_line(line: bytes, origin: str, *, first: bool = False) -> dict[str, Any] | None:
    """The object on a line, None for an empty line; ``first``: the line may begin with a byte order mark.

    Raises:
        DataError: not UTF-8, not JSON, not an object.
    """
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
        row = json.loads(text) if text else None
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"{origin}: nested too deeply") from error
    except ValueError as error:  # a number with more digits than Python accepts
        raise DataError(f"{origin}: not valid JSON ({error})") from error
    if text and not isinstance(row, dict):
        raise DataError(f"{origin}: expected an object, got {json_type(row)}")
    return row


def _is_lines(path: Path) -> bool:
    """Whether the file can be read line by line as it is."""
    if path.name.endswith((".gz", ".parquet")):
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return False
    return not _is_array(head)


def _is_array(head: bytes) -> bool:
    """Whether an array of objects begins here; a line that holds a whole array is a malformed row instead."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return text.startswith(b"[") and text[1:].lstrip()[:1] in (b"{", b"")


def _lines(name: str) -> Iterator[bytes]:
    """The rows as lines; a malformed one is copied as it is, so that it is left out like any other."""
    if name.endswith(".parquet"):
        yield from _parquet(name)
        return
    with _open(name) as file:
        head = file.read(4096)
    with _open(name) as file:
        wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
        if not wide and not _is_array(head):
            yield from file
            return
        try:
            text = file.read().decode("utf-16" if wide else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not {'UTF-16' if wide else 'UTF-8'} ({error})") from error
    if not _is_array(text[:4096].encode("utf-8", "surrogatepass")):
        yield from (line.encode("utf-8", "surrogatepass") for line in text.split("\n"))
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not a valid JSON array ({error})") from error
    yield from map(_line, rows)


def _parquet(name: str) -> Iterator[bytes]:
    parquet = require("pyarrow.parquet", "parquet")
    with _open(name) as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(1024):
                yield from map(_line, batch.to_pylist())
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: cannot be read as Parquet ({error})") from error


def _line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> str | None:
    """What JSON cannot hold: bytes are a text in UTF-8, as old writers of Parquet store strings, or else count as missing."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _open(name: str) -> IO[bytes]:
    if is_remote(name):
        import fsspec

        return fsspec.open(name, "rb", compression="gzip" if name.endswith(".gz") else None).open()
    return cast(IO[bytes], gzip.open(name, "rb")) if name.endswith(".gz") else open(name, "rb")
