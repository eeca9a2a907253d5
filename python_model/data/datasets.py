"""Data sets on disk: rows are located by byte offset and parsed on access; nothing is loaded whole.

The index (index.py) leaves out rows that can never be trained on; rows that the settings of a run exclude are left out here. A
:class:`DataReport` counts both by reason, with file and line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock

from python_model.data.files import Location, parse_line
from python_model.data.forms import Reader
from python_model.data.index import FileIndex, index_file, placed
from python_model.data.order import Permutation
from python_model.data.report import DataReport
from python_model.data.rows import DataError, Row
from python_model.support.files import write_json
from python_model.support.processes import mapped

CHECKED = 20_000
"""Rows that one process checks at a time."""
Problem = tuple[str, str]
"""Why a row is left out: the reason it is counted under, and what exactly is wrong."""


class RowCheck(Protocol):
    """What the settings of a run require of rows.

    ``check_key`` identifies everything that :meth:`problem` depends on.
    """

    check_key: str

    def refused(self, facts: np.ndarray, generative: bool) -> tuple[np.ndarray, Problem]:
        """bool (rows): rows that cannot be used, and why."""

    def doubtful(self, facts: np.ndarray, generative: bool) -> np.ndarray:
        """bool (rows): rows that only :meth:`problem` can decide."""

    def problem(self, row: Row) -> Problem | None:
        """Why a well-formed row cannot be used, or None."""


class DataSet(Sequence[Any]):
    """The usable rows of one data set of a file: ``len(d)``, ``d[i]`` (an EmbeddingRow or GenerativeRow).

    Attributes:
        name: name of the data set.
        generative: the kind of its rows.
    """

    def __init__(self, index: FileIndex, name: str, start: int, stop: int, skipped: np.ndarray) -> None:
        self.name, self.generative = name, bool(index.kind)
        self._index, self._start, self._stop = index, start, stop
        self._skipped = (
            skipped - start - np.arange(len(skipped))
        )  # a row's number is its index plus how many of these are <=
        self._chosen: np.ndarray | None = None
        self._file: Any = None

    def __len__(self) -> int:
        return self._stop - self._start - len(self._skipped) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        facts = self._index.facts[self._number(index)]
        origin = f"{self._index.file}:{facts['line']}"
        columns = parse_line(self._read(int(facts["offset"]), int(facts["size"])), origin, first=facts["offset"] == 0)
        if columns is None:
            raise DataError(f"{origin}: the line is empty; the file has changed since it was indexed")
        return Reader(self.name, instructed=self._index.instructed).row(columns, origin)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def query_hash(self, index: int) -> int:
        """A hash of the row's query and instruction, without reading the row."""
        return int(self._index.facts[self._number(index)]["query"])

    def choice(self, count: int, seed: int) -> DataSet:
        """A random subset of ``count`` rows, in file order; all rows if there are no more."""
        if count >= len(self):
            return self
        chosen = DataSet(self._index, self.name, self._start, self._stop, np.empty(0, dtype=np.int64))
        kept = np.sort(Permutation(len(self), seed, 0)(np.arange(count)))
        chosen._chosen = self._numbers(kept)
        return chosen

    def facts(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(rows): what the index holds of the rows from ``start`` to ``stop`` under this name."""
        column = self._index.facts[name]
        stop = len(self) if stop is None else stop
        if self._chosen is None and not len(self._skipped):
            return np.asarray(column[self._start + start : self._start + stop])  # where the index lies, without a copy
        return np.asarray(column[self._numbers(np.arange(start, stop))])

    def _numbers(self, indices: np.ndarray) -> np.ndarray:
        """The rows' places in the index."""
        if self._chosen is not None:
            return self._chosen[indices]
        return self._start + indices + np.searchsorted(self._skipped, indices, side="right")

    def _number(self, index: int) -> int:
        """The row's place in the index."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return int(self._numbers(np.array(place)))

    def _read(self, offset: int, size: int) -> bytes:
        if self._file is None:
            if placed(Path(self._index.lines[0])) != self._index.lines:
                raise DataError(f"{self._index.file}: the file has changed since it was indexed")
            self._file = open(self._index.lines[0], "rb", buffering=0)
        if hasattr(os, "pread"):  # has no file position that forked processes would share
            return os.pread(self._file.fileno(), size, offset)
        self._file.seek(offset)
        return bytes(self._file.read(size))


class EachPositive(Sequence[Any]):
    """The embedding rows of a data set, each once per positive, with that positive alone.

    Only the number of positives before each ``BLOCK`` rows is held; those within it are counted on access.
    """

    BLOCK = 256

    def __init__(self, rows: DataSet) -> None:
        self.name, self.generative, self.rows = rows.name, rows.generative, rows
        sums = [np.zeros(1, dtype=np.int64)]
        for start in range(0, len(rows), step := 4096 * self.BLOCK):
            counts = rows.facts("positives", start, min(start + step, len(rows)))
            sums.append(np.add.reduceat(counts, np.arange(0, len(counts), self.BLOCK), dtype=np.int64))
        self._starts = np.concatenate(sums).cumsum()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        row, positive = self._place(index)
        whole = self.rows[row]
        chosen = slice(positive, positive + 1)
        return replace(whole, pos=whole.pos[chosen], pos_scores=whole.pos_scores[chosen])

    def query_hash(self, index: int) -> int:
        """As :meth:`DataSet.query_hash`."""
        return self.rows.query_hash(self._place(index)[0])

    def _place(self, index: int) -> tuple[int, int]:
        """The row of a positive, and the positive's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        first = block * self.BLOCK
        counts = self.rows.facts("positives", first, min(first + self.BLOCK, len(self.rows)))
        ends = counts.cumsum(dtype=np.int64) + self._starts[block]
        row = int(np.searchsorted(ends, index, side="right"))
        return first + row, index - int(ends[row - 1] if row else self._starts[block])


def open_file(file: Location, check: RowCheck | None = None) -> tuple[list[DataSet], DataReport]:
    """The data sets of a file (one, unless rows have a column ``dataset``), and a report of those left out.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file cannot be read at all; a file without rows is only noted in the report.
    """
    return select(index_file(file), check)


def select(index: FileIndex, check: RowCheck | None = None) -> tuple[list[DataSet], DataReport]:
    """The data sets of an indexed file with the rows that pass ``check``, and a report of those that do not."""
    report = DataReport()
    report.add(index.report)
    facts, kind = index.facts, bool(index.kind)
    bounds = np.searchsorted(facts["dataset"], np.arange(len(index.names) + 1))
    datasets = [
        DataSet(index, name, int(bounds[i]), int(bounds[i + 1]), np.empty(0, dtype=np.int64))
        for i, name in enumerate(index.names)
        if bounds[i + 1] > bounds[i]
    ]
    if check is not None:
        refused, (reason, what) = check.refused(facts, kind)
        for number in np.flatnonzero(refused)[:5]:
            report.leave_out(reason, f"{index.file}:{facts[number]['line']}: {what}", 0)
        if refused.any():
            report.left_out[reason] += int(refused.sum())
        problems = _problems(index, datasets, check, np.flatnonzero(check.doubtful(facts, kind) & ~refused))
        for number, why, text in problems:
            report.leave_out(why, f"{index.file}:{facts[number]['line']}: {text}")
            refused[number] = True
        skipped = np.flatnonzero(refused)
        kept = []
        for rows in datasets:
            own = skipped[np.searchsorted(skipped, rows._start) : np.searchsorted(skipped, rows._stop)]
            kept.append(DataSet(index, rows.name, rows._start, rows._stop, own))
        datasets = [rows for rows in kept if len(rows)]
    report.used = {rows.name: len(rows) for rows in datasets}
    return datasets, report


def _problems(
    index: FileIndex, datasets: Sequence[DataSet], check: RowCheck, doubtful: np.ndarray
) -> list[tuple[int, str, str]]:
    """(row's number, reason, what is wrong) of the doubtful rows that cannot be used; cached with a cached index."""
    if not index.kept or len(doubtful) == 0:
        return _found_problems(datasets, check, doubtful)
    key = hashlib.blake2b(check.check_key.encode(), digest_size=16).hexdigest()
    kept = Path(index.kept).with_name(f"{Path(index.kept).name}.{key}.json")
    with FileLock(f"{kept}.lock"):  # one rank per machine reads the rows
        if not kept.exists():
            write_json(kept, _found_problems(datasets, check, doubtful))
        return [(int(number), str(reason), str(what)) for number, reason, what in json.loads(kept.read_text("utf-8"))]


def _found_problems(datasets: Sequence[DataSet], check: RowCheck, doubtful: np.ndarray) -> list[tuple[int, str, str]]:
    parts = np.array_split(doubtful, max(1, len(doubtful) // CHECKED))
    with mapped(len(parts) // 2) as work:
        return [problem for found in work(partial(_problems_among, datasets, check), parts) for problem in found]


def _problems_among(datasets: Sequence[DataSet], check: RowCheck, numbers: np.ndarray) -> list[tuple[int, str, str]]:
    found = []
    for rows in datasets:
        for number in numbers[(numbers >= rows._start) & (numbers < rows._stop)].tolist():
            if (problem := check.problem(rows[number - rows._start])) is not None:
                found.append((number, *problem))
    return found
