"""The Free On-line Dictionary of Computing.

Source: the Debian package ``dict-foldoc``; the texts are under the GNU Free Documentation License: build with them, but do
not redistribute them.
"""

from __future__ import annotations

import gzip
import re
import string
from collections import defaultdict
from dataclasses import dataclass

from python_model.corpora.sources.packages import deb_files

PACKAGE = "dict-foldoc"
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


@dataclass(frozen=True)
class Term:
    """One entry."""

    key: str
    name: str
    definition: str


def read_foldoc(package: bytes) -> list[Term]:
    """The entries with a definition of at least 60 characters, without dates, links and markup."""
    files = deb_files(package, ("foldoc.dict.dz", "foldoc.index"))
    text = gzip.decompress(files["foldoc.dict.dz"])
    entries: dict[str, list[str]] = defaultdict(list)
    for line in files["foldoc.index"].decode("utf-8", "replace").splitlines():
        word, offset, size = line.split("\t")[:3]
        if not word.startswith("00"):  # notes about the database
            start = _number(offset)
            entries[text[start : start + _number(size)].decode("utf-8", "replace")].append(word)
    found = []
    for entry in entries:
        heads, _, body = entry.partition("\n\n")
        names = [name.strip() for name in heads.split("\n") if name.strip()]
        definition = _plain(body)
        if names and len(definition) >= 60 and not re.match(r"(See|Acronym for)\b", definition):
            found.append(Term(f"foldoc:{names[0]}", names[0], definition))
    return found


def _number(digits: str) -> int:
    """A number in dictd's index: base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value


def _plain(body: str) -> str:
    """An entry's paragraphs, one per line."""
    body = re.sub(r"^\s*(<[^>]*>\s*)+", "", body)  # subjects: <programming>
    body = re.sub(r"^\s*\(([A-Z]{2,}[^)]*)\)\s*", "", body)  # abbreviations of the head word
    body = re.sub(r"\n\s*\(\d{4}-\d\d-\d\d\)\s*", "\n", body)
    body = re.sub(r"\{\(?(?:https?|ftp|news):[^}]*\}", "", body)
    body = re.sub(r"\{([^{}]*?)\s*(\(https?[^}]*\))?\}", r"\1", body, flags=re.DOTALL)
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in re.split(r"\n\s*\n", body))
    return "\n".join(filter(None, paragraphs))
