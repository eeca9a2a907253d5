"""Reads documents from files: text, source code and rows directly; .pdf, .html, .docx with libraries of the extra ``files``."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from python_model.data.files import read_objects
from python_model.rag.modes import Document
from python_model.support.optional import require

TEXT_SUFFIXES = (".txt", ".md", ".rst")
CODE_SUFFIXES = tuple(
    "." + name
    for name in "bash c cc cpp cs css cu cuh go h hpp java jl js kt lua php pl proto py pyi r rb rs scala sh sql swift ts".split()
)
MAX_BYTES = 64 << 20
"""Largest file that is read whole; rows (.jsonl) are read one by one, regardless of file size."""


class UnreadableFileError(ValueError):
    """Why a file yields no documents."""


FAULTS = (ImportError, OSError, ValueError)
"""What :func:`read_file` raises through a fault of the file, or for want of the library that reads it."""


def check_file(file: Path) -> None:
    """What can be told without reading it: UnreadableFileError if a file is of an unknown kind or too large, or is a folder."""
    if file.is_dir():
        raise UnreadableFileError("is a folder that cannot be listed")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UnreadableFileError(
            f"is of no known kind ({suffix or 'no suffix'}): see python_model.rag.formats.SUFFIXES"
        )
    size = file.stat().st_size
    if suffix != ".jsonl" and size > MAX_BYTES:
        raise UnreadableFileError(f"is too large: {size / 2**20:.0f} MiB, read are up to {MAX_BYTES >> 20}")


def read_file(file: Path, name: str) -> list[Document]:
    """The documents of a file with this ``name`` in the index.

    ``.jsonl``: a document per row ``{"text": str, "title"?: str, "id"?: str or int}`` (or ``_id``, ``key``; default: name and
    line); other fields that are a text, a number or a bool are its metadata. ``.pdf``: one per page. Others: one, whose title
    is the file's name without suffix.

    Raises:
        UnreadableFileError: an unknown kind, empty, too large, binary, not UTF-8, damaged, or a malformed row (with its line).
        ImportError: the library that reads this kind is not installed.
    """
    check_file(file)
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        documents = _rows(file, name)
    else:
        documents = [
            # of a text, the blank lines before it are kept: chunks tell the lines where they begin
            Document(name + part, text.strip() if place else text.rstrip(), title or file.stem, name, place)
            for part, place, title, text in _PARSERS[suffix](file.read_bytes())
            if text.strip()
        ]
    if not documents:
        raise UnreadableFileError("is empty" if suffix != ".pdf" else "holds no text (a scan needs OCR)")
    return documents


Parts = list[tuple[str, str, str, str]]  # suffix of the key; place, title, text


def _text(content: bytes) -> Parts:
    if b"\0" in content:
        raise UnreadableFileError("is not UTF-8 text but binary")
    try:
        return [("", "", "", content.decode("utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"is not UTF-8 ({error})") from error


def _html(content: bytes) -> Parts:
    page = require("bs4", "files").BeautifulSoup(content, "html.parser")
    title = page.title.get_text(" ", strip=True) if page.title else ""
    for hidden in page(["script", "style", "template", "noscript", "title"]):
        hidden.decompose()
    lines = (line.strip() for line in page.get_text("\n").splitlines())
    return [("", "", title, "\n".join(line for line in lines if line))]


def _docx(content: bytes) -> Parts:
    document = require("docx", "files").Document(io.BytesIO(content))
    blocks = []
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            blocks += [" | ".join(cell.text for cell in row.cells) for row in block.rows]
        else:
            blocks.append(block.text)
    return [("", "", document.core_properties.title or "", "\n\n".join(block for block in blocks if block.strip()))]


def _pdf(content: bytes) -> Parts:
    pages = require("pypdf", "files").PdfReader(io.BytesIO(content)).pages
    return [(f"#page{i}", f"page {i}", "", page.extract_text()) for i, page in enumerate(pages, 1)]


def _by_library(parse: Callable[[bytes], Parts]) -> Callable[[bytes], Parts]:
    def parsed(content: bytes) -> Parts:
        try:
            return parse(content)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # with damaged files, these libraries may raise almost anything
            raise UnreadableFileError(f"cannot be read ({type(error).__name__}: {error})") from error

    return parsed


_PARSERS: dict[str, Callable[[bytes], Parts]] = {
    **dict.fromkeys((*TEXT_SUFFIXES, *CODE_SUFFIXES), _text),
    **dict.fromkeys((".html", ".htm"), _by_library(_html)),
    ".docx": _by_library(_docx),
    ".pdf": _by_library(_pdf),
}
SUFFIXES = (".jsonl", *_PARSERS)
_OWN_FIELDS = ("text", "title", "id", "_id", "key", "source")


def document_of_row(row: Mapping[str, Any], origin: str, key: str, name: str, place: str) -> Document:
    """The document of a row ``{"text": str, "title"?: str, "id"?: str or int}`` (or ``_id``, ``key``; default: the given key).

    Other fields that are a text, a finite number or a bool are its metadata.

    Raises:
        UnreadableFileError: text or title is missing, empty or not a text; the message begins with ``origin``.
    """
    text, title = row.get("text"), row.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str) or not text.strip():
        raise UnreadableFileError(f"{origin}: not a document row: text or title is missing, empty or not a text")
    own = next((row[k] for k in ("id", "_id", "key") if row.get(k) is not None), key)
    facts = {k: v for k, v in row.items() if k not in _OWN_FIELDS and _is_fact(v)}
    return Document(str(own), text, title, name, place, facts)


def _is_fact(value: Any) -> bool:
    """Whether a value is a text, a bool or a finite number; a number that is missing in Parquet is a NaN."""
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, (str, int))


def _rows(file: Path, name: str) -> list[Document]:
    documents = []
    for origin, row in read_objects(file):
        number = origin.rpartition(":")[2]
        documents.append(document_of_row(row, origin, f"{name}:{number}", name, f"line {number}"))
    return documents
