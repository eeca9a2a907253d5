"""Reads whole files of rows, checking each: for evaluation, indexes and tests. Training reads through datasets.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from python_model.data.files import Location, data_files, dataset_name, read_lines, read_objects, unread_note
from python_model.data.forms import Reader
from python_model.data.report import DataReport
from python_model.data.rows import DataError, EmbeddingRow, GenerativeRow, Passage, Row, check_text, titled_text

PROBED = 1000
"""Number of rows that decide what a file's lists of two strings mean."""


def file_reader(file: Location, *, positive_score: float | None = None) -> Reader:
    """A :class:`Reader` for the file, set up from its first rows."""
    reader = Reader(dataset_name(file), positive_score=positive_score)

    def good() -> Iterator[dict[str, object]]:
        rows = read_objects(file)
        while True:
            try:
                yield next(rows)[1]
            except (DataError, StopIteration):  # malformed rows are reported when all rows are read
                return

    reader.decide(islice(good(), PROBED))
    return reader


def tolerant_rows(path: Location, report: DataReport, *, positive_score: float | None = None) -> Iterator[Row]:
    """The rows of a file or folder, of either kind, that training can read; ``report`` is filled during iteration."""
    report.notes += unread_note(path)
    for file in data_files(path):
        reader = file_reader(file, positive_score=positive_score)
        for origin, columns in read_lines(file):
            try:
                if isinstance(columns, DataError):
                    raise columns
                row = reader.row(columns, origin)
            except DataError as error:
                report.leave_out(error.reason, str(error))
                continue
            report.used[row.dataset] = report.used.get(row.dataset, 0) + 1
            yield row
        forms = ", ".join(f"{count} as {form}" for form, count in reader.forms.items()) or "none"
        report.notes += [f"{file}: rows read: {forms}", *(f"{file}: {note}" for note in reader.notes)]


def read_rows(path: Location) -> tuple[list[EmbeddingRow], list[GenerativeRow]]:
    """All rows of a file, or of the files directly in a folder (sorted by name).

    Raises:
        FileNotFoundError: there is no such file or folder.
        DataError: invalid JSON or UTF-8, a missing column, a wrong type, an empty text, both kinds in one file, no rows.
    """
    embedding: list[EmbeddingRow] = []
    generative: list[GenerativeRow] = []
    for file in data_files(path):
        rows = _read_file(file)
        if not rows:
            raise DataError(f"{file}: no rows")
        for row in rows:
            if isinstance(row, EmbeddingRow):
                embedding.append(row)
            else:
                generative.append(row)
    return embedding, generative


def read_embedding(path: Location) -> list[EmbeddingRow]:
    """The embedding rows of a file or folder; errors as :func:`read_rows`, and DataError if there are none."""
    rows = read_rows(path)[0]
    if not rows:
        raise DataError(f"{path}: expected rows with 'query', got only generative rows (column 'text')")
    return rows


def read_generative(path: Location) -> list[GenerativeRow]:
    """The generative rows of a file or folder; errors as :func:`read_rows`, and DataError if there are none."""
    rows = read_rows(path)[1]
    if not rows:
        raise DataError(f"{path}: expected rows with 'text', got only embedding rows (column 'query')")
    return rows


def read_corpus(path: Location) -> list[Passage]:
    """The passages of a corpus file; keys must be unique, and a title precedes its text. Errors as :func:`read_rows`."""
    file = Path(path)
    passages: dict[str, Passage] = {}
    for origin, row in read_objects(file):
        if missing := [name for name in ("key", "text") if name not in row]:
            raise DataError(f"{origin}: the column {missing[0]!r} is missing, the row has {sorted(row)}")
        passage = Passage(check_text(row["key"], "key", origin), titled_text(row, origin), origin)
        if passage.key in passages:
            raise DataError(f"{origin}: duplicate key {passage.key!r}, also at {passages[passage.key].origin}")
        passages[passage.key] = passage
    if not passages:
        raise DataError(f"{file}: no rows")
    return list(passages.values())


def _read_file(file: Location) -> list[Row]:
    rows: list[Row] = []
    reader = file_reader(file)
    for origin, columns in read_objects(file):
        row = reader.row(columns, origin)
        if rows and type(row) is not type(rows[0]):
            raise DataError(
                f"{origin}: expected a row of the same kind as {rows[0].origin}, got another; a file holds one kind"
            )
        rows.append(row)
    return rows
