"""Data sets on the disk: rows are found by byte offset and parsed when they are asked for; nothing is loaded whole.

The first look at a file reads all of it, checks every row, and leaves out what cannot be trained on; a :class:`DataReport`
counts that by reason, with file and line. What it found (offsets, not texts) is kept for larger files in the cache folder, so the
next run and the other ranks of a machine start at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from python_model.corpora.small_model import cache_folder
from python_model.data.jsonl import DataError, EmbeddingRow, GenerativeRow, dataset_name, parse_line, parse_row
from python_model.data.order import permutation
from python_model.support.files import new_file

Row = EmbeddingRow | GenerativeRow
Problem = tuple[str, str]
"""Why a row is left out: a reason to count by, and what exactly is wrong."""

SHOWN = 5
"""Origins that a report keeps per reason."""
CACHED_BYTES = 8 << 20
"""An index of a file of at least this size is kept (indexing reads about 50 MB/s)."""
_VERSION = 1


@dataclass
class DataReport:
    """Rows that are used, by data set, and rows that are left out, by reason with the first few ``file:line: what``."""

    used: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, what: str) -> None:
        """Count a row."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN:
            shown.append(what)

    def add(self, other: DataReport) -> None:
        """Count what another report counted."""
        for name, count in other.used.items():
            self.used[name] = self.used.get(name, 0) + count
        for reason, count in other.left_out.items():
            self.left_out[reason] = self.left_out.get(reason, 0) + count
            self.examples[reason] = [*self.examples.get(reason, []), *other.examples[reason]][:SHOWN]

    def lines(self) -> list[str]:
        """For people: one line of what is used, then each reason with its examples."""
        names = ", ".join(f"{name} {count}" for name, count in self.used.items())
        found = [f"data: {sum(self.used.values())} rows ({names})"]
        for reason, count in self.left_out.items():
            found.append(f"left out, {reason}: {count} row(s)")
            found += [f"  {what}" for what in self.examples[reason]]
            if count > len(self.examples[reason]):
                found.append(f"  and {count - len(self.examples[reason])} more")
        return found


@dataclass(frozen=True)
class _Place:
    """A file as it was indexed."""

    path: str
    size: int
    modified: int


class DataSet(Sequence[Any]):
    """The usable rows of one data set of a file: ``len(d)``, ``d[i]`` (an EmbeddingRow or GenerativeRow).

    Attributes:
        name: of the data set.
        generative: which kind of rows it holds.
    """

    def __init__(
        self, place: _Place, name: str, generative: bool, offsets: np.ndarray, sizes: np.ndarray, lines: np.ndarray
    ) -> None:
        self.name, self.generative = name, generative
        self._place, self._offsets, self._sizes, self._lines = place, offsets, sizes, lines
        self._file: Any = None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        line = int(self._lines[index])
        origin = f"{self._place.path}:{line}"
        row = parse_line(self._read(int(self._offsets[index]), int(self._sizes[index])), origin, first=line == 1)
        if row is None:
            raise DataError(f"{origin}: the line is empty; the file has changed since it was indexed")
        return parse_row(row, origin, self.name, bare_text=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def choice(self, count: int, seed: int) -> DataSet:
        """``count`` of the rows, picked at random, in the order of the file; all of them if there are no more."""
        if count >= len(self):
            return self
        kept = np.sort(permutation(len(self), seed, 0)[:count])
        return DataSet(
            self._place, self.name, self.generative, self._offsets[kept], self._sizes[kept], self._lines[kept]
        )

    def _read(self, offset: int, size: int) -> bytes:
        if self._file is None:
            if _place(Path(self._place.path)) != self._place:
                raise DataError(f"{self._place.path}: the file has changed since it was indexed")
            self._file = open(self._place.path, "rb", buffering=0)
        if hasattr(os, "pread"):  # has no position that forked processes would share
            return os.pread(self._file.fileno(), size, offset)
        self._file.seek(offset)
        return bytes(self._file.read(size))


def open_file(
    path: str | os.PathLike[str],
    check: Callable[[Row], Problem | None] | None = None,
    *,
    check_key: str = "",
    wanted: Callable[[bool], bool] = lambda generative: True,
) -> tuple[list[DataSet], DataReport]:
    """The data sets of a file (one, unless rows have a column ``dataset``), and what was left out.

    Args:
        check: why a well-formed row cannot be used, or None.
        check_key: names ``check`` and all it depends on; an index is kept under it. Empty: not kept.
        wanted: told whether the file is generative (by its first good row), says whether to read on.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file has no rows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    place = _place(path)
    if not check_key or place.size < CACHED_BYTES:
        return _index(path, place, check, wanted)
    identity = [_VERSION, str(path.resolve()), place.size, place.modified, check_key, wanted(False), wanted(True)]
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "index"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{key}.npz"
    with FileLock(f"{kept}.lock"):  # of the ranks on a machine one reads the file
        if not kept.exists():
            _save(kept, *_index(path, place, check, wanted))
        return _load(kept, place)


def _place(path: Path) -> _Place:
    status = path.stat()
    return _Place(str(path), status.st_size, status.st_mtime_ns)


def _index(
    path: Path, place: _Place, check: Callable[[Row], Problem | None] | None, wanted: Callable[[bool], bool]
) -> tuple[list[DataSet], DataReport]:
    report = DataReport()
    found: dict[str, array[int]] = {}  # per data set: offset, size, line, offset, ...
    generative: bool | None = None
    default, empty = dataset_name(path), True
    for number, offset, line in _lines(path):
        origin = f"{path}:{number}"
        try:
            columns = parse_line(line, origin, first=number == 1)
            if columns is None:
                continue
            empty = False
            row = parse_row(columns, origin, default, bare_text=True)
        except DataError as error:
            empty = False
            report.leave_out(error.reason, str(error))
            continue
        kind = isinstance(row, GenerativeRow)
        if generative is None:
            generative = kind
            if not wanted(kind):
                return [], DataReport()
        problem = check(row) if check is not None else None
        if kind != generative:
            report.leave_out("another kind", f"{origin}: another kind of row than the first; a file holds one kind")
        elif problem is not None:
            report.leave_out(problem[0], f"{origin}: {problem[1]}")
        else:
            found.setdefault(row.dataset, array("q")).extend((offset, len(line), number))
    if empty:
        raise DataError(f"{path}: no rows")
    datasets = []
    for name, numbers in found.items():
        offsets, sizes, lines = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3).T
        datasets.append(
            DataSet(place, name, bool(generative), offsets.copy(), sizes.astype(np.uint32), lines.astype(np.uint32))
        )
    report.used = {dataset.name: len(dataset) for dataset in datasets}
    return datasets, report


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, byte offset, line)."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, offset, line
            offset += len(line)


def _save(target: Path, datasets: list[DataSet], report: DataReport) -> None:
    head = {"names": [d.name for d in datasets], "generative": [d.generative for d in datasets], **asdict(report)}
    arrays = {"head": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)}
    for index, d in enumerate(datasets):
        arrays |= {f"offsets{index}": d._offsets, f"sizes{index}": d._sizes, f"lines{index}": d._lines}
    with new_file(target) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _load(kept: Path, place: _Place) -> tuple[list[DataSet], DataReport]:
    with np.load(kept, allow_pickle=False) as arrays:
        head = json.loads(arrays["head"].tobytes())
        datasets = [
            DataSet(place, name, kind, arrays[f"offsets{i}"], arrays[f"sizes{i}"], arrays[f"lines{i}"])
            for i, (name, kind) in enumerate(zip(head["names"], head["generative"], strict=True))
        ]
    return datasets, DataReport(head["used"], head["left_out"], head["examples"])
