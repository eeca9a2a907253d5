"""Documents in a folder: their texts, the files they come from, their words and their vectors.

What KVStore guarantees about kills, full disks and several writers holds here as well. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from python_model.rag.modes import Document
from python_model.rag.store.folder import StoreBusyError, StoreFolder, Writing, set_meta
from python_model.rag.store.vectors import FORMATS, SCHEMA, ShardVectors, VectorFormat, Vectors
from python_model.rag.store.words import create_words, rebuild_words
from python_model.support.arguments import check_choice, check_path

_DOCUMENT = "key, text, title, source, place, metadata"  # a Document's fields

_SCHEMA = f"""{SCHEMA}
CREATE TABLE IF NOT EXISTS documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    shard INTEGER NOT NULL, row INTEGER NOT NULL,
    source TEXT NOT NULL DEFAULT '', place TEXT NOT NULL DEFAULT '', metadata TEXT NOT NULL DEFAULT '{{}}');
CREATE INDEX IF NOT EXISTS documents_of_shard ON documents (shard, row);
CREATE INDEX IF NOT EXISTS documents_of_source ON documents (source);
CREATE TABLE IF NOT EXISTS sources (
    name TEXT PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, recipe TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Source:
    """A file whose documents are in the index.

    ``path``: where it was read, absolute. ``digest``: of its content, empty while only part of its documents is in the index.
    ``recipe``: how it was chunked.
    """

    name: str
    path: str
    digest: str
    recipe: str


class Documents(StoreFolder):
    """Documents with vectors of one size, made by one model, and the files they come from.

    Args:
        path: the index's folder; created if missing (unless ``create`` is False).
        fingerprint: of the model (see fingerprint.py); must equal the recorded one.
        former_fingerprint: what an earlier version called the same model; a folder that records it is brought up to date.
        settings: what else the vectors depend on (pooling, normalisation, prefix); must equal the recorded ones.
        format: how vectors are stored: ``"float32"``, ``"float16"`` or ``"int8"`` (a scale per vector). Default: the index's own,
            float32 for a new one.
        vectors: where they are kept: ``"folder"``, or ``"qdrant:PLACE"`` with a server's URL or a folder of Qdrant's local mode.
            Default: where the index has them, its folder for a new one.
        lock_timeout: seconds that a writer waits for another.
    """

    kind = "index"
    schema = _SCHEMA
    files = "vectors"
    own_column = "row"
    version = 3  # 1 did not record a document's file, 2 neither metadata nor words
    rebuild = "grit index NEW_INDEX --add FOLDER"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        former_fingerprint: str | None = None,
        settings: dict[str, Any] | None = None,
        format: VectorFormat | None = None,
        vectors: str | None = None,
        lock_timeout: float = 60.0,
        create: bool = True,
    ) -> None:
        if format is not None:
            check_choice("format", format, FORMATS)
        if vectors is not None and vectors != "folder" and not re.match("qdrant:.", vectors):
            raise ValueError(f"vectors: expected 'folder' or 'qdrant:PLACE', got {vectors!r}")
        given = {"fingerprint": fingerprint, "settings": settings, "format": format, "vectors": vectors}
        super().__init__(path, given, lock_timeout, create, former_fingerprint)
        self.format: str = self.recorded["format"]
        self._vectors = self._open_vectors()

    def __len__(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM documents").fetchone()[0])

    def __contains__(self, key: str) -> bool:
        return self._db.execute("SELECT 1 FROM documents WHERE key = ?", (key,)).fetchone() is not None

    def keys(self) -> list[str]:
        """All keys, oldest first."""
        return [row[0] for row in self._db.execute("SELECT key FROM documents ORDER BY id")]

    def document(self, key: str) -> Document:
        """The document of a key."""
        row = self._db.execute(f"SELECT {_DOCUMENT} FROM documents WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(f"{key!r} is not in the index {self.path}")
        return _document(row)

    def add(self, documents: Sequence[Document], vectors: Tensor | np.ndarray, *, overwrite: bool = False) -> None:
        """Add documents with their vectors (documents, size): all of them or, on an error, none.

        Raises:
            ValueError: a key exists already (and ``overwrite`` is False) or occurs twice, the vectors have a wrong size, a wrong
                number, or values that are not finite, or metadata have such a number.
        """
        matrix = _checked(documents, vectors)
        with self._writing() as writing:
            keys = [document.key for document in documents]
            present = [key for key in keys if key in self]
            if present and not overwrite:
                raise ValueError(f"key: {present[0]!r} is in the index already; pass overwrite=True to replace it")
            gone = self._remove(writing, present)
            self._insert(writing, documents, matrix)
        self._vectors.removed(gone)

    def replace(
        self,
        stale: Sequence[str],
        documents: Sequence[Document],
        vectors: Tensor | np.ndarray | None,
        sources: Sequence[Source] = (),
    ) -> None:
        """In one transaction: remove the keys ``stale``, insert or replace ``documents``, record their ``sources``."""
        matrix = _checked(documents, vectors) if documents else None
        with self._writing() as writing:
            gone = self._remove(writing, [*stale, *(document.key for document in documents)])
            if matrix is not None:
                self._insert(writing, documents, matrix)
            writing.db.executemany(
                "INSERT OR REPLACE INTO sources (name, path, digest, recipe) VALUES (?, ?, ?, ?)",
                [(s.name, s.path, s.digest, s.recipe) for s in sources],
            )
        self._vectors.removed(gone)

    def _insert(self, writing: Writing, documents: Sequence[Document], matrix: Tensor) -> None:
        db = writing.db
        size = self._meta(db).get("size")
        if size is None:
            set_meta(db, "size", matrix.shape[1])
        elif size != matrix.shape[1]:
            raise ValueError(f"vectors: expected size {size} as this index has, got {matrix.shape[1]}")
        last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'documents'").fetchone()
        first = 1 + (last[0] if last else 0)
        ids = range(first, first + len(documents))
        db.executemany(
            f"INSERT INTO documents (id, {_DOCUMENT}, shard, row) VALUES (?, ?, ?, ?, ?, ?, ?, 0, 0)",
            [
                (identity, d.key, d.text, d.title, d.source, d.place, json.dumps(dict(d.metadata), ensure_ascii=False))
                for identity, d in zip(ids, documents, strict=True)
            ],
        )
        self._vectors.add(writing, ids, documents, matrix)

    def _remove(self, writing: Writing, keys: Sequence[str]) -> list[int]:
        """Remove those of ``keys`` that are there; returns their ids."""
        db, query = writing.db, "SELECT id, shard FROM documents WHERE key = ?"
        found = [row for key in keys if (row := db.execute(query, (key,)).fetchone()) is not None]
        self._delete(db, list(keys), writing.after)
        db.executemany("UPDATE shards SET changed = changed + 1 WHERE id = ?", [(s,) for s in {s for _, s in found}])
        return [identity for identity, _ in found]

    def sources(self) -> dict[str, Source]:
        """The files whose documents are in the index, by name."""
        return {row[0]: Source(*row) for row in self._db.execute("SELECT name, path, digest, recipe FROM sources")}

    def documents_of(self, source: str) -> dict[str, Document]:
        """The documents of a file, by key."""
        rows = self._db.execute(f"SELECT {_DOCUMENT} FROM documents WHERE source = ? ORDER BY id", (source,))
        return {row[0]: _document(row) for row in rows}

    def owner(self, key: str) -> str | None:
        """The file of a document, or None if there is no such document."""
        row = self._db.execute("SELECT source FROM documents WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def owners(self) -> list[tuple[str, str]]:
        """(key, file) of all documents."""
        return self._db.execute("SELECT key, source FROM documents ORDER BY id").fetchall()

    def matching(self, name: str) -> list[str]:
        """The keys that ``name`` stands for: a document's key, a file's name, or a pattern (``*``, ``?``, ``[..]``) of either.

        Raises:
            KeyError: it matches nothing. ValueError: it is empty, as is the file of every document that came from none.
        """
        if not name:
            raise ValueError("name: expected a key, a file or a pattern, got ''")
        rows = self.owners()
        found = [key for key, source in rows if name in (key, source)]
        found = found or [key for key, source in rows if fnmatchcase(key, name) or fnmatchcase(source, name)]
        if not found:
            raise KeyError(f"{name!r} matches no document or file in the index {self.path}")
        return found

    @property
    def stores(self) -> list[str]:
        """Folders of the key-value stores that keep states of these documents."""
        return list(self._meta().get("stores", []))

    def note_store(self, path: str | os.PathLike[str]) -> None:
        """Record that the store at ``path`` keeps states of these documents."""
        check_path("path", path)
        absolute = str(Path(path).resolve())
        with self._transaction() as db:
            known = self._meta(db).get("stores", [])
            if absolute not in known:
                set_meta(db, "stores", [*known, absolute])

    def made_otherwise(self, sources: Iterable[str], how: Any) -> set[str]:
        """Those of these files whose vectors were made in another way than ``how``, or before that was recorded."""
        known = self._meta().get("made", {})
        return {s for s in sources if known.get(s) != how and (s in known or self._count("source = ?", s))}

    def note_made(self, sources: Iterable[str], how: Any) -> None:
        """Record on what the vectors of these files depend besides the index's settings, as plain values."""
        with self._transaction() as db:
            set_meta(db, "made", {**self._meta(db).get("made", {}), **dict.fromkeys(sources, how)})

    def delete(self, keys: Sequence[str]) -> None:
        """Remove documents; their files are read again when they are added again. The space of their vectors is freed with the
        last one of their file.

        Raises:
            KeyError: one of them does not exist; then none is removed.
        """
        with self._writing() as writing:
            for key in keys:
                if key not in self:
                    raise KeyError(f"{key!r} is not in the index {self.path}")
            part = "UPDATE sources SET digest = '' WHERE name = (SELECT source FROM documents WHERE key = ?)"
            writing.db.executemany(part, [(key,) for key in keys])  # see Source
            gone = self._remove(writing, keys)
            writing.db.execute("DELETE FROM sources WHERE name NOT IN (SELECT source FROM documents)")
        self._vectors.removed(gone)

    def compact(self) -> None:
        """Free the space of removed documents and merge files. Needs room for a copy of the vectors; readers are not blocked."""
        with self._writing() as writing:
            self._vectors.compact(writing)
            writing.db.execute("INSERT INTO words (words) VALUES ('optimize')")
        try:
            self._db.execute("VACUUM")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            raise StoreBusyError(
                f"{self.path}: another process kept reading or writing; texts were not compacted"
            ) from error

    def vectors(self) -> tuple[list[str], Tensor]:
        """All keys and vectors, float32 (documents, size)."""
        ids, matrix = self._vectors.all()
        keys = dict(self._db.execute("SELECT id, key FROM documents"))
        return [keys[identity] for identity in ids.tolist()], matrix

    def _count(self, condition: str, *parameters: Any) -> int:
        return int(self._db.execute(f"SELECT COUNT(*) FROM documents WHERE {condition}", parameters).fetchone()[0])

    def _by_id(self, identity: int) -> Document | None:
        row = self._db.execute(f"SELECT {_DOCUMENT} FROM documents WHERE id = ?", (identity,)).fetchone()
        return None if row is None else _document(row)

    def _open_vectors(self) -> Vectors:
        place = self.recorded["vectors"]
        if place == "folder":
            return ShardVectors(self._file_folder, self.format, lambda: self._db)
        from python_model.rag.store.qdrant import QdrantVectors

        return QdrantVectors(place.removeprefix("qdrant:"), self.recorded["collection"], self.format, lambda: self._db)

    def _create(self, db: sqlite3.Connection) -> None:
        super()._create(db)
        create_words(db)

    def _upgrade(self, db: sqlite3.Connection, known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Version 1: a file's name is the part of a key before ``#chunk`` and ``:line``; without a digest it is read again.
        Version 2: rows of files are counted, words are read from the texts."""
        columns = {
            table: [row[1] for row in db.execute(f"PRAGMA table_info({table})")] for table in ("documents", "shards")
        }
        for name, default in (("source", "''"), ("place", "''"), ("metadata", "'{}'")):
            if name not in columns["documents"]:
                db.execute(f"ALTER TABLE documents ADD COLUMN {name} TEXT NOT NULL DEFAULT {default}")
        for name in ("rows", "changed"):
            if name not in columns["shards"]:
                db.execute(f"ALTER TABLE shards ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0")
        self._create(db)
        db.execute("UPDATE shards SET rows = 1 + (SELECT MAX(row) FROM documents WHERE shard = shards.id)")
        rebuild_words(db)
        if known["version"] < 2:
            rows = db.execute("SELECT id, key FROM documents").fetchall()
            named = [(re.sub(r"(?<=\.jsonl):\d+$", "", re.sub(r"#\d+$", "", key)), identity) for identity, key in rows]
            db.executemany("UPDATE documents SET source = ? WHERE id = ?", named)
        return {**known, "vectors": "folder"}

    def _new_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        chosen = {"format": given["format"] or "float32", "vectors": given["vectors"] or "folder"}
        return {**given, **chosen, "collection": f"grit-{uuid.uuid4().hex}"}


def _checked(documents: Sequence[Document], vectors: Tensor | np.ndarray | None) -> Tensor:
    matrix = torch.as_tensor(vectors).detach().float().cpu()
    if matrix.ndim != 2 or matrix.shape[0] != len(documents) or not len(documents):
        raise ValueError(f"vectors: expected ({len(documents)}, size), at least one row, got {tuple(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise ValueError("vectors: expected finite values, got others")
    if len({document.key for document in documents}) < len(documents):
        raise ValueError("documents: expected different keys, got a duplicate key")
    for document in documents:
        for name, value in document.metadata.items():
            if isinstance(value, float) and not math.isfinite(value):  # JSON has none, so SQLite could read no field
                raise ValueError(f"metadata: expected finite numbers, got {value} as {name!r} of {document.key!r}")
    return matrix


def _document(row: Sequence[Any]) -> Document:
    key, text, title, source, place, metadata = row
    return Document(key, text, title, source, place, metadata=json.loads(metadata))
