"""Documents from files, and their division into chunks of a number of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from python_model.data.files import read_objects
from python_model.rag.modes import Document

TEXT_SUFFIXES = (".txt", ".md", ".rst")


def read_documents(path: str | os.PathLike[str]) -> Iterator[Document]:
    """The documents of a file, or of all files below a folder in the order of their names.

    ``.jsonl``: rows ``{"text": str, "title"?: str, "id"?: str or int}`` (or ``_id``, ``key``; default: file name and
    line). ``.txt``, ``.md``, ``.rst``: one document, its title the file's name.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: a row is broken (the message has file and line), a file is empty, no UTF-8, or of another kind.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"documents: there is no file or folder {root}")
    if root.is_file():
        yield from _read_file(root, root.name)
        return
    files = [f for f in sorted(root.rglob("*")) if f.is_file() and f.suffix in (".jsonl", *TEXT_SUFFIXES)]
    if not files:
        raise ValueError(f"documents: {root} holds no .jsonl, {', '.join(TEXT_SUFFIXES)} file")
    for file in files:
        yield from _read_file(file, file.relative_to(root).as_posix())


def _read_file(file: Path, name: str) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        yield from _read_rows(file, name)
        return
    if file.suffix not in TEXT_SUFFIXES:
        raise ValueError(f"documents: {file} is of no known kind, accepted are .jsonl, {', '.join(TEXT_SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"documents: {file} is not UTF-8 ({error})") from error
    if not text:
        raise ValueError(f"documents: {file} is empty")
    yield Document(name, text, file.stem)


def _read_rows(file: Path, name: str) -> Iterator[Document]:
    empty = True
    for origin, row in read_objects(file):
        empty = False
        text, title = row.get("text"), row.get("title") or ""
        if not isinstance(text, str) or not isinstance(title, str) or not text.strip():
            raise ValueError(f"{origin}: not a document row: text or title is missing, empty or not a text")
        number = origin.rpartition(":")[2]
        key = next((row[k] for k in ("id", "_id", "key") if row.get(k) is not None), f"{name}:{number}")
        yield Document(str(key), text, title)
    if empty:
        raise ValueError(f"documents: {file} is empty")


def chunk(document: Document, tokenizer: Any, max_tokens: int, overlap: int = 0) -> list[Document]:
    """``document`` in pieces whose text has at most ``max_tokens`` tokens, cut at white space where there is some.

    Consecutive pieces share about ``overlap`` tokens; with 0 they are the text, piece by piece, less the white space between
    them. A document that fits keeps its key; pieces are called ``key#0``, ``key#1``, ..; all keep the title.

    Raises:
        ValueError: ``max_tokens`` < 1, or ``overlap`` is not below half of it.
    """
    if max_tokens < 1 or not 0 <= 2 * overlap < max(max_tokens, 1):
        raise ValueError(
            f"max_tokens, overlap: expected max_tokens >= 1 and overlap below half of it, got {max_tokens}, {overlap}"
        )
    text = document.text
    pieces: list[str] = []
    start = 0
    while start < len(text):
        # a token is seldom longer than 16 characters; looking at a bounded part keeps long documents linear
        window = text[start : start + 16 * max_tokens]
        ends = _ends(tokenizer, window)
        if len(ends) <= max_tokens:
            end = start + len(window)
            if end == len(text):
                pieces.append(text[start:])
                break
        else:
            end = start + max(_cut(window, ends[max_tokens - 1]), 1)
        # a piece tokenised alone may take more tokens than inside its text
        while end - start > 1 and len(_ends(tokenizer, text[start:end].strip())) > max_tokens:
            end = start + max(_cut(text[start:end], (end - start) * 9 // 10), 1)
        pieces.append(text[start:end])
        start = max(end - _tail(tokenizer, text[start:end], overlap), start + 1)
    pieces = [piece.strip() for piece in pieces]
    pieces = [piece for piece in pieces if piece]
    if len(pieces) == 1:
        return [Document(document.key, pieces[0], document.title)]
    return [Document(f"{document.key}#{i}", piece, document.title) for i, piece in enumerate(pieces)]


def _ends(tokenizer: Any, text: str) -> list[int]:
    """Where each token of ``text`` ends."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return [end for _, end in offsets["offset_mapping"]]


def _cut(text: str, end: int) -> int:
    """The last white space in the second half of ``text[:end]``, else ``end``."""
    for position in range(end, end // 2, -1):
        if position == len(text) or text[position].isspace():
            return position
    return end


def _tail(tokenizer: Any, piece: str, overlap: int) -> int:
    """Characters of the last ``overlap`` tokens of a piece."""
    if overlap == 0:
        return 0
    ends = _ends(tokenizer, piece)
    return len(piece) - ends[-overlap - 1] if len(ends) > overlap else 0
