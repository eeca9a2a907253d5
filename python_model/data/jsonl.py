"""Rows of training data: reading ``.jsonl`` files and checking every row before anything is trained on it.

    embedding    {"query": TEXT, "pos": [TEXT, ...], "neg": [TEXT, ...]}     TEXT = "text" or ["instruction", "text"]
    generative   {"text": ["user", "assistant", "user", "assistant", ...]}   for training also {"text": "a text without roles"}
    passage      {"key": "...", "text": "..."}                               only in a corpus file

The kind of a file shows in its column ``query`` or ``text``; one file holds one kind. The optional column ``key`` names the
entity a row is about and ``dataset`` the data set it belongs to (default: the file's name up to its first dot); further
columns are ignored. Lines end in a newline and hold UTF-8; empty lines are skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class DataError(ValueError):
    """A data file cannot be used; the message names the file and the line. ``reason``: ``"broken"`` or ``"empty"``."""

    def __init__(self, message: str, reason: str = "broken") -> None:
        super().__init__(message)
        self.reason = reason


class InstructedText(NamedTuple):
    """A text with the instruction it is embedded under, ``""`` for none. Unpacks as ``instruction, text``."""

    instruction: str
    text: str


class PlainText(InstructedText):
    """A text that its row holds as a bare string, not as ``[instruction, text]``."""

    __slots__ = ()


@dataclass(frozen=True)
class EmbeddingRow:
    """One query with at least one passage that answers it and any number that do not. ``origin`` is ``file:line``."""

    query: InstructedText
    pos: tuple[InstructedText, ...]
    neg: tuple[InstructedText, ...] = ()
    key: str | None = None
    dataset: str = ""
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class GenerativeRow:
    """One conversation: user, assistant, user, assistant, ...; a single turn is a text without roles. ``origin`` is
    ``file:line``."""

    turns: tuple[str, ...]
    key: str | None = None
    dataset: str = ""
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Passage:
    """One text of a corpus to search. ``origin`` is ``file:line``."""

    key: str
    text: str
    origin: str = field(default="", compare=False)


def read_rows(path: str | os.PathLike[str]) -> tuple[list[EmbeddingRow], list[GenerativeRow]]:
    """All rows of a file, or of the ``*.jsonl`` files directly in a folder (in the order of their names).

    Raises:
        FileNotFoundError: there is no such file or folder.
        DataError: broken JSON or UTF-8, a missing column, a wrong type, an empty text, both kinds in one file, no rows.
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


def read_embedding(path: str | os.PathLike[str]) -> list[EmbeddingRow]:
    """The embedding rows of a file or folder; errors as :func:`read_rows`, and DataError if there are none."""
    rows = read_rows(path)[0]
    if not rows:
        raise DataError(f"{os.fspath(path)}: only generative rows (column 'text'), accepted are rows with 'query'")
    return rows


def read_generative(path: str | os.PathLike[str]) -> list[GenerativeRow]:
    """The generative rows of a file or folder; errors as :func:`read_rows`, and DataError if there are none."""
    rows = read_rows(path)[1]
    if not rows:
        raise DataError(f"{os.fspath(path)}: only embedding rows (column 'query'), accepted are rows with 'text'")
    return rows


def read_corpus(path: str | os.PathLike[str]) -> list[Passage]:
    """The passages of one corpus file; a key may occur only once. Errors as :func:`read_rows`."""
    file = Path(path)
    passages: dict[str, Passage] = {}
    for origin, row in read_objects(file):
        _require(row, ("key", "text"), origin)
        passage = Passage(_string(row["key"], "key", origin), _string(row["text"], "text", origin), origin)
        if passage.key in passages:
            raise DataError(f"{origin}: the key {passage.key!r} stands already at {passages[passage.key].origin}")
        passages[passage.key] = passage
    if not passages:
        raise DataError(f"{file}: no rows")
    return list(passages.values())


def dataset_name(file: Path) -> str:
    """The name of a file's data set: the file's name up to its first dot."""
    return file.name.split(".")[0]


def data_files(path: str | os.PathLike[str]) -> list[Path]:
    """A file itself, or the ``*.jsonl`` files directly in a folder, by name; errors as :func:`read_rows`."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.glob("*.jsonl") if file.is_file())
        if not files:
            raise DataError(f"{path}: the folder has no *.jsonl file")
        return files
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return [path]


def _read_file(file: Path) -> list[EmbeddingRow | GenerativeRow]:
    rows: list[EmbeddingRow | GenerativeRow] = []
    for origin, row in read_objects(file):
        parsed = parse_row(row, origin, dataset_name(file))
        if rows and type(parsed) is not type(rows[0]):
            raise DataError(f"{origin}: another kind of row than at {rows[0].origin}; a file holds one kind")
        rows.append(parsed)
    return rows


def read_objects(file: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, row) of each line that is not empty; errors as :func:`parse_line`."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            origin = f"{file}:{number}"
            row = parse_line(line, origin, first=number == 1)
            if row is not None:
                yield origin, row


def parse_line(line: bytes, origin: str, *, first: bool = False) -> dict[str, Any] | None:
    """The object on a line, None for an empty line; ``first``: a byte order mark may lead it.

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
    except ValueError as error:  # a number with more digits than Python converts
        raise DataError(f"{origin}: not valid JSON ({error})") from error
    if text and not isinstance(row, dict):
        raise DataError(f"{origin}: expected an object, got {_name(row)}")
    return row


def parse_row(
    row: dict[str, Any], origin: str, dataset: str, *, bare_text: bool = False
) -> EmbeddingRow | GenerativeRow:
    """The checked row of a line's object; ``dataset`` is its name unless it has one. ``bare_text``: accept text without roles.

    Raises:
        DataError: see :func:`read_rows`.
    """
    if ("query" in row) == ("text" in row):
        has = "both 'query' and 'text'" if "query" in row else f"the columns {sorted(row)}"
        raise DataError(f"{origin}: expected either 'query', 'pos', 'neg' or 'text', got {has}")
    key = _string(row["key"], "key", origin) if row.get("key") is not None else None
    dataset = _string(row["dataset"], "dataset", origin) if row.get("dataset") is not None else dataset
    if "text" in row:
        if bare_text and isinstance(row["text"], str):
            return GenerativeRow((_string(row["text"], "text", origin),), key, dataset, origin)
        return GenerativeRow(_turns(row["text"], origin), key, dataset, origin)
    _require(row, ("query", "pos", "neg"), origin)
    query = _instructed(row["query"], "query", origin)
    pos, neg = (_texts(row[name], name, origin) for name in ("pos", "neg"))
    if not pos:
        raise DataError(f"{origin}: pos: expected at least one passage, got an empty list")
    return EmbeddingRow(query, pos, neg, key, dataset, origin)


def _require(row: dict[str, Any], names: tuple[str, ...], origin: str) -> None:
    if missing := [name for name in names if name not in row]:
        raise DataError(f"{origin}: the column {missing[0]!r} is missing, the row has {sorted(row)}")


def _turns(value: Any, origin: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{origin}: text: expected a list [user, assistant, ...], got {_name(value)}")
    if len(value) < 2 or len(value) % 2:
        raise DataError(f"{origin}: text: expected an even number [user, assistant, ...], got {len(value)} turns")
    return tuple(_string(turn, f"text[{index}]", origin) for index, turn in enumerate(value))


def _texts(value: Any, name: str, origin: str) -> tuple[InstructedText, ...]:
    if not isinstance(value, list):
        raise DataError(f"{origin}: {name}: expected a list of passages, got {_name(value)}")
    return tuple(_instructed(item, f"{name}[{index}]", origin) for index, item in enumerate(value))


def _instructed(value: Any, name: str, origin: str) -> InstructedText:
    if not isinstance(value, list):
        return PlainText("", _string(value, name, origin))
    if len(value) != 2:
        raise DataError(f"{origin}: {name}: expected a text or [instruction, text], got a list of {len(value)}")
    return InstructedText(
        _string(value[0], f"{name}[0]", origin, may_be_empty=True), _string(value[1], f"{name}[1]", origin)
    )


def _string(value: Any, name: str, origin: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin}: {name}: expected a string, got {_name(value)}")
    if not may_be_empty and not value.strip():
        raise DataError(f"{origin}: {name}: got an empty text", "empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair; no tokenizer takes it
        raise DataError(f"{origin}: {name}: a lone surrogate (\\u{ord(value[error.start]):04x})") from error
    return value


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
