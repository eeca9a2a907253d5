"""The index of a file of rows: where each row is, and the facts that decide whether it can be used, under any settings.

One pass reads the whole of all files, in parallel if they are large. Their indexes are then kept in the cache folder and mapped
into memory, so that later runs and the other ranks and workers on a machine share one copy and start at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from python_model.data.files import Location, dataset_name, files_as_lines, parse_line
from python_model.data.forms import Reader
from python_model.data.reading import file_reader
from python_model.data.report import SHOWN, DataReport
from python_model.data.rows import DataError, GenerativeRow, Row
from python_model.support.files import cache_folder, new_folder, write_json
from python_model.support.processes import mapped

CACHED_BYTES = 8 << 20
"""The indexes of files of at least this size together are kept (indexing reads about 50 MB/s per process)."""
FORMAT_TOKENS = 48
"""Upper bound of the tokens of markers and special tokens, and of what a merge across a boundary may add, of one text."""
PART_BYTES = 64 << 20
"""Bytes that one process reads at a time."""
LOCKED = 64
"""Files whose indexes are built at a time, each behind an open lock file."""
_VERSION = 4

FACTS = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<u4"),
        ("line", "<u4"),
        ("query", "<u8"),  # hash of the query and its instruction, to find identical ones without reading them
        ("first", "<u4"),  # bytes of a query's instruction, or of a conversation's documents and first turn
        ("passage", "<u4"),  # bytes of the longest instruction of a passage
        ("positives", "<u2"),
        ("negatives", "<u2"),
        ("scored", "<u2"),  # 1: the row has a teacher's scores
        ("dataset", "<u2"),
    ]
)


@dataclass
class FileIndex:
    """The contents of a file.

    Attributes:
        file: as it was given; used in origins.
        lines: path of its rows as lines, with size and modification time.
        kind: whether the rows are generative; None if there is no valid row.
        names: data sets, indexed by ``facts["dataset"]``.
        facts: FACTS of the valid rows of that kind, by data set and line.
        report: rows that can never be used; ``used`` counts the others.
        digest: digest of the file's bytes.
        kept: folder of the index, if it is kept.
    """

    file: str
    lines: tuple[str, int, int]
    kind: bool | None
    names: list[str]
    facts: np.ndarray
    report: DataReport
    digest: str
    instructed: bool
    kept: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "facts": None if self.kept else self.facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.facts is None:
            self.facts = np.load(Path(self.kept) / "facts.npy", mmap_mode="r", allow_pickle=False)


def index_file(file: Location) -> FileIndex:
    """As :func:`index_files`, of one file."""
    return index_files([file])[0]


def index_files(files: Sequence[Location]) -> list[FileIndex]:
    """The indexes of files in any supported format and container; all cores share the work, however it is split into files.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a container is broken.
    """
    places = [placed(lines) for lines in files_as_lines(files)]
    if sum(size for _, size, _ in places) < CACHED_BYTES:
        return [plan.index(map(_read_part, plan.parts())) for plan in map(_Plan, files, places)]
    folders = [_folder(file, place) for file, place in zip(files, places, strict=True)]
    folders[0].parent.mkdir(parents=True, exist_ok=True)
    missing = [number for number, folder in enumerate(folders) if not folder.exists()]
    with mapped(sum(places[number][1] for number in missing) // (2 * PART_BYTES)) as work:
        for start in range(0, len(missing), LOCKED):
            some = missing[start : start + LOCKED]
            with contextlib.ExitStack() as locks:  # one rank per machine reads the files
                for folder in sorted({folders[number] for number in some}):
                    locks.enter_context(FileLock(f"{folder}.lock"))
                plans = {folders[n]: _Plan(files[n], places[n]) for n in some if not folders[n].exists()}
                read = work(_read_part, [part for plan in plans.values() for part in plan.parts()])
                for folder, plan in plans.items():
                    _save(plan.index(islice(read, len(plan.parts()))), folder)
    return [_load(os.fspath(file), place, folder) for file, place, folder in zip(files, places, folders, strict=True)]


def _folder(file: Location, place: tuple[str, int, int]) -> Path:
    """Where the index of a file is kept; links of other names to one file are other data sets."""
    path, *status = place
    identity = json.dumps([_VERSION, dataset_name(file), os.path.realpath(path), *status])
    return cache_folder() / "index" / hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def placed(path: Path) -> tuple[str, int, int]:
    """(path, size, modification time), to notice that a file has changed."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


@dataclass
class _Part:
    facts: np.ndarray
    names: list[tuple[str, bool]]
    left_out: list[tuple[int, str, str]]
    counts: dict[str, int]
    notes: dict[str, None]
    lines: int
    rows: int
    digest: bytes


@dataclass
class _Task:
    """What a process reads: the rows whose lines begin within the ``size`` bytes at ``start``."""

    path: str
    dataset: str
    instructed: bool
    start: int
    size: int


class _Plan:
    """How the index of a file is made from its parts."""

    def __init__(self, file: Location, place: tuple[str, int, int]) -> None:
        self.file, self.place, self.reader = os.fspath(file), place, file_reader(file)

    def parts(self) -> list[_Task]:
        """What has to be read."""
        path, size, _ = self.place
        starts = range(0, max(size, 1), PART_BYTES)
        return [_Task(path, self.reader.dataset, self.reader.instructed, start, PART_BYTES) for start in starts]

    def index(self, read: Iterable[_Part]) -> FileIndex:
        """The index, from what was read."""
        parts = list(read)
        names: dict[tuple[str, bool], int] = {}
        report = DataReport(notes=[f"{self.file}: {note}" for note in self.reader.notes])
        tables, line, rows = [], 0, 0
        for part in parts:
            numbers = np.array([names.setdefault(name, len(names)) for name in part.names], dtype=np.uint16)
            part.facts["dataset"] = numbers[part.facts["dataset"]] if len(numbers) else 0
            part.facts["line"] += line
            tables.append(part.facts)
            for reason, count in part.counts.items():
                report.left_out[reason] = report.left_out.get(reason, 0) + count
                report.examples.setdefault(reason, [])
            for number, reason, what in part.left_out:
                if len(report.examples[reason]) < SHOWN:
                    report.examples[reason].append(f"{self.file}:{number + line}{what}")
            report.notes += [n for note in part.notes if (n := f"{self.file}: {note}") not in report.notes]
            line, rows = line + part.lines, rows + part.rows
        if rows == 0:
            report.notes.append(f"{self.file}: no rows, the file is empty")
        facts = np.concatenate(tables)
        kinds = [generative for _, generative in names]
        kind = kinds[int(facts["dataset"][0])] if len(facts) else None
        others = np.array([k != kind for k in kinds], dtype=bool)
        if len(facts) and (wrong := others[facts["dataset"]]).any():
            for number in facts["line"][wrong][:SHOWN]:
                report.leave_out(
                    "another kind",
                    f"{self.file}:{number}: expected a row of the same kind as the first, got another; a file holds one kind",
                    0,
                )
            report.left_out["another kind"] = int(wrong.sum())
            facts = facts[~wrong]
        facts = facts[np.argsort(facts["dataset"], kind="stable")]
        labels = [name for name, _ in names]
        counts = np.bincount(facts["dataset"], minlength=len(labels))
        report.used = {name: int(count) for name, count in zip(labels, counts, strict=True) if count}
        digest = hashlib.blake2b(b"".join(part.digest for part in parts), digest_size=16).hexdigest()
        return FileIndex(self.file, self.place, kind, labels, facts, report, digest, self.reader.instructed)


def _read_part(task: _Task) -> _Part:
    """The rows of a part; line numbers count from the first of them."""
    reader, start, size = Reader(task.dataset, instructed=task.instructed), task.start, task.size
    found: list[tuple[int, ...]] = []
    names: dict[tuple[str, bool], int] = {}
    counts: dict[str, int] = {}
    shown: list[tuple[int, str, str]] = []
    digest = hashlib.blake2b(digest_size=16)
    number = rows = 0
    with open(task.path, "rb") as file:
        offset = start
        if start:
            file.seek(start - 1)
            offset += len(file.readline()) - 1  # a line that began earlier belongs to the previous part
        while offset < start + size and (line := file.readline()):
            number += 1
            digest.update(line)
            try:
                columns = parse_line(line, "", first=offset == 0)
                if columns is not None:
                    rows += 1
                    row = reader.row(columns, "")
                    name = names.setdefault((row.dataset, isinstance(row, GenerativeRow)), len(names))
                    found.append((offset, len(line), number, *_facts(row), name))
            except DataError as error:
                rows += 1
                counts[error.reason] = counts.get(error.reason, 0) + 1
                if counts[error.reason] <= SHOWN:
                    shown.append((number, error.reason, str(error)))
            offset += len(line)
    facts = np.array(found, dtype=FACTS) if found else np.empty(0, dtype=FACTS)
    return _Part(facts, list(names), shown, counts, reader.notes, number, rows, digest.digest())


def _facts(row: Row) -> tuple[int, ...]:
    if isinstance(row, GenerativeRow):
        first = len(row.turns[0].encode()) if len(row.turns) > 1 else 0
        before = sum(len(text.encode()) + FORMAT_TOKENS for text in row.documents)
        return 0, before + first, 0, 0, 0, 0
    passages = {text.instruction for text in (*row.pos, *row.neg)}
    longest = max(len(instruction.encode()) for instruction in passages)
    digest = hashlib.blake2b("\0".join(row.query).encode(), digest_size=8).digest()
    query = int.from_bytes(digest, "little")
    counts = (min(len(texts), 65535) for texts in (row.pos, row.neg))
    return query, len(row.query.instruction.encode()), longest, *counts, bool(row.pos_scores)


def _save(index: FileIndex, folder: Path) -> None:
    with new_folder(folder) as kept:
        np.save(kept / "facts.npy", index.facts, allow_pickle=False)
        head = {name: getattr(index, name) for name in ("kind", "names", "digest", "instructed", "file")}
        write_json(kept / "head.json", head | {"report": vars(index.report)})


def _load(file: str, place: tuple[str, int, int], folder: Path) -> FileIndex:
    head = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    facts = np.load(folder / "facts.npy", mmap_mode="r", allow_pickle=False)
    report = DataReport(**head["report"])
    return FileIndex(
        file, place, head["kind"], head["names"], facts, report, head["digest"], head["instructed"], str(folder)
    )
