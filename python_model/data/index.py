"""The index of a file of rows: where each row is, and the facts that decide whether it can be used, under any settings.

One pass reads the whole file, in parallel if it is large. The index of a larger file is kept in the cache folder and mapped into
memory, so that later runs and the other ranks and workers on a machine share one copy and start at once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from python_model.data.files import Location, as_lines, parse_line
from python_model.data.forms import Reader
from python_model.data.reading import file_reader
from python_model.data.report import SHOWN, DataReport
from python_model.data.rows import DataError, GenerativeRow, Row
from python_model.support.files import cache_folder, new_folder, write_json

CACHED_BYTES = 8 << 20
"""The index of a file of at least this size is kept (indexing reads about 50 MB/s per process)."""
PART_BYTES = 64 << 20
"""Bytes that one process reads at a time."""
_VERSION = 3

FACTS = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<u4"),
        ("line", "<u4"),
        ("query", "<u8"),  # hash of the query and its instruction, to find identical ones without reading them
        ("first", "<u4"),  # bytes of a query's instruction, or of a conversation's first turn
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
    instructed: bool = False
    kept: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "facts": None if self.kept else self.facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.facts is None:
            self.facts = np.load(Path(self.kept) / "facts.npy", mmap_mode="r", allow_pickle=False)


def index_file(file: Location) -> FileIndex:
    """The index of a file in any supported format and container.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the container is broken.
    """
    lines = as_lines(file)
    place = placed(lines)
    if place[1] < CACHED_BYTES:
        return _build(file, place)
    identity = json.dumps([_VERSION, os.path.realpath(lines), *place[1:]])
    folder = cache_folder() / "index" / hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one rank per machine reads the file
        if not folder.exists():
            _save(_build(file, place), folder)
    return _load(os.fspath(file), place, folder)


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


def _build(file: Location, place: tuple[str, int, int]) -> FileIndex:
    reader = file_reader(file)
    starts = range(0, max(place[1], 1), PART_BYTES)
    read = partial(_read_part, place[0], reader.dataset, reader.instructed, PART_BYTES)
    parts = list(_mapped(read, starts))
    names: dict[tuple[str, bool], int] = {}
    report = DataReport(notes=[f"{os.fspath(file)}: {note}" for note in reader.notes])
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
                report.examples[reason].append(f"{os.fspath(file)}:{number + line}{what}")
        report.notes += [n for note in part.notes if (n := f"{os.fspath(file)}: {note}") not in report.notes]
        line, rows = line + part.lines, rows + part.rows
    if rows == 0:
        report.notes.append(f"{os.fspath(file)}: no rows, the file is empty")
    facts = np.concatenate(tables)
    kinds = [generative for _, generative in names]
    kind = kinds[int(facts["dataset"][0])] if len(facts) else None
    others = np.array([k != kind for k in kinds], dtype=bool)
    if len(facts) and (wrong := others[facts["dataset"]]).any():
        for number in facts["line"][wrong][:SHOWN]:
            report.leave_out(
                "another kind",
                f"{os.fspath(file)}:{number}: expected a row of the same kind as the first, got another; a file holds one kind",
                0,
            )
        report.left_out["another kind"] = int(wrong.sum())
        facts = facts[~wrong]
    facts = facts[np.argsort(facts["dataset"], kind="stable")]
    labels = [name for name, _ in names]
    counts = np.bincount(facts["dataset"], minlength=len(labels))
    report.used = {name: int(count) for name, count in zip(labels, counts, strict=True) if count}
    digest = hashlib.blake2b(b"".join(part.digest for part in parts), digest_size=16).hexdigest()
    return FileIndex(os.fspath(file), place, kind, labels, facts, report, digest, reader.instructed)


def _mapped(read: Any, starts: range) -> Iterator[_Part]:
    processes = min(len(starts) // 2, os.cpu_count() or 1)
    if processes < 2:
        yield from map(read, starts)
        return
    # spawn: forking a process that has threads (torch, tokenizers) may deadlock
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(read, starts)


def _read_part(path: str, dataset: str, instructed: bool, size: int, start: int) -> _Part:
    """The rows whose lines begin within the ``size`` bytes at ``start``; line numbers count from the first of them."""
    reader = Reader(dataset, instructed=instructed)
    found: list[tuple[int, ...]] = []
    names: dict[tuple[str, bool], int] = {}
    counts: dict[str, int] = {}
    shown: list[tuple[int, str, str]] = []
    digest = hashlib.blake2b(digest_size=16)
    number = rows = 0
    with open(path, "rb") as file:
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
        return 0, len(row.turns[0].encode()) if len(row.turns) > 1 else 0, 0, 0, 0, 0
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
