"""Index: documents and their embeddings in a folder, searched by vectors, by words or by both.

    folder/index.sqlite  documents (key, title, text), their words, the places of their vectors; the index's settings
    folder/vectors/      the vectors (see store/vectors.py), unless they are in Qdrant; a FAISS index if one was built

What KVStore guarantees about kills, full disks and several writers holds here as well. Nothing is pickled. Scores are inner
products: cosines for a model that normalises.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from python_model.model.modeling import GritLM
from python_model.rag.filters import Filter, checked, sql_condition
from python_model.rag.fingerprint import embedding_settings, fingerprint
from python_model.rag.modes import Document
from python_model.rag.store import approximate as faiss_index
from python_model.rag.store.folder import StoreBusyError, StoreFolder, Writing, set_meta
from python_model.rag.store.vectors import FORMATS, SCHEMA, Selection, ShardVectors, VectorFormat, Vectors, stable_top_k
from python_model.rag.store.words import create_words, rebuild_words, search_words
from python_model.support.arguments import check_at_least, check_choice

ENGINES = ("auto", "exact", "approximate")
GROWTH = 0.1
"""A FAISS index is extended when new documents reach this share of its size."""
FUSION = 60
"""The constant of reciprocal rank fusion (Cormack et al., SIGIR 2009): a document scores the sum of 1 / (FUSION + rank)."""
FEW = 20_000
"""Up to this many documents that pass a filter are compared one by one even if there is a FAISS index."""
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
class Hit:
    """A document found, and its inner product with the query; in a search by words as well, its sum of reciprocal ranks."""

    document: Document
    score: float


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


class Index(StoreFolder):
    """Documents with vectors of one size, made by one model.

    Args:
        path: the index's folder; created if missing (unless ``create`` is False).
        fingerprint: of the model (see fingerprint.py); must equal the recorded one.
        settings: what else the vectors depend on (pooling, normalisation, prefix); must equal the recorded ones.
        format: how vectors are stored: ``"float32"``, ``"float16"`` or ``"int8"`` (a scale per vector). Default: the index's own,
            float32 for a new one.
        vectors: where they are kept: ``"folder"``, or ``"qdrant:PLACE"`` with a server's URL or a folder of Qdrant's local mode.
            Default: where the index has them, its folder for a new one.
        lock_timeout: seconds that a writer waits for another.

    :func:`open_index` fills in fingerprint and settings from a model.
    """

    kind = "index"
    schema = _SCHEMA
    files = "vectors"
    version = 3  # 1 did not record a document's file, 2 neither metadata nor words
    rebuild = "grit index NEW_INDEX --add FOLDER"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        settings: dict[str, Any] | None = None,
        format: VectorFormat | None = None,
        vectors: str | None = None,
        lock_timeout: float = 60.0,
        create: bool = True,
    ) -> None:
        if format is not None:
            check_choice("format", format, FORMATS)
        if vectors is not None and vectors != "folder" and not vectors.removeprefix("qdrant:") != vectors:
            raise ValueError(f"vectors: expected 'folder' or 'qdrant:PLACE', got {vectors!r}")
        given = {"fingerprint": fingerprint, "settings": settings, "format": format, "vectors": vectors}
        super().__init__(path, given, lock_timeout, create)
        self.format: str = self.recorded["format"]
        self._vectors = self._open_vectors()
        self._approximate: tuple[str, Any] | None = None

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
            KeyError: it matches nothing.
        """
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
        absolute = str(Path(path).resolve())
        with self._transaction() as db:
            known = self._meta(db).get("stores", [])
            if absolute not in known:
                set_meta(db, "stores", [*known, absolute])

    def delete(self, keys: Sequence[str]) -> None:
        """Remove documents. The space of their vectors is freed with the last one of their file.

        Raises:
            KeyError: one of them does not exist; then none is removed.
        """
        with self._writing() as writing:
            for key in keys:
                if key not in self:
                    raise KeyError(f"{key!r} is not in the index {self.path}")
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

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int = 10,
        *,
        engine: str = "auto",
        where: Filter | None = None,
        texts: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """The ``k`` documents with the largest inner products, best first, for each row of ``queries`` (Q, size).

        Changes by other processes are taken into account.

        Args:
            engine: ``"exact"`` compares with every vector (of equal scores the older document comes first), ``"approximate"``
                uses the FAISS index (see :meth:`build_approximate`), ``"auto"`` does so if there is one. Vectors in
                Qdrant are searched by Qdrant.
            where: which documents may be found (see :mod:`python_model.rag.filters`).
            texts: the queries as text (Q). With them the search is hybrid: the best by vectors and the best by BM25 are
                combined by reciprocal rank fusion.

        Raises:
            ValueError: wrong shapes, ``k`` < 1, an unknown engine, an invalid filter, or ``"approximate"`` without a FAISS
                index. ImportError: FAISS or the client of Qdrant is not installed.
        """
        matrix = torch.as_tensor(queries).detach().float().cpu()
        size = self._meta().get("size")
        check_at_least("k", k, 1)
        check_choice("engine", engine, ENGINES)
        condition, parameters = sql_condition(where or {})
        if engine == "approximate" and self.approximate is None:
            raise ValueError(f"engine: expected a FAISS index in {self.path} (grit index --approximate), got none")
        if texts is not None and len(texts) != len(matrix):
            raise ValueError(f"texts: expected one for each of {len(matrix)} queries, got {len(texts)}")
        if size is None:
            return [[] for _ in matrix]
        if matrix.ndim != 2 or matrix.shape[1] != size:
            raise ValueError(f"queries: expected (queries, {size}), got {tuple(matrix.shape)}")
        if texts is None:
            return self._nearest(matrix, k, engine, where)
        depth = max(5 * k, 50)
        by_vector = self._nearest(matrix, depth, engine, where)
        fused = []
        for text, hits in zip(texts, by_vector, strict=True):
            ids = search_words(self._db, text, depth, condition, parameters)
            by_words = [d for d in map(self._by_id, ids) if d is not None]
            fused.append(_fused([[hit.document for hit in hits], by_words])[:k])
        return fused

    def vectors(self) -> tuple[list[str], Tensor]:
        """All keys and vectors, float32 (documents, size)."""
        ids, matrix = self._vectors.all()
        keys = dict(self._db.execute("SELECT id, key FROM documents"))
        return [keys[identity] for identity in ids.tolist()], matrix

    @property
    def approximate(self) -> faiss_index.Record | None:
        """The record of the FAISS index, None if there is none."""
        found = self._meta().get("approximate")
        return None if found is None else faiss_index.Record(**found)

    def build_approximate(self, kind: faiss_index.Kind = "ivf-sq8", *, recall: float = 0.98) -> faiss_index.Record:
        """Build a FAISS index of all vectors, measure it, and store it with them; :meth:`extend_approximate` updates it.

        Args:
            kind: ``"ivf-sq8"``: inverted lists of int8 vectors; ``"hnsw"``: a graph, larger and slower to build.
            recall: target share of the 10 nearest documents, reached with the least effort; ``Record.recall`` is the measured
                one.

        Raises:
            ValueError: an unknown kind, fewer than 256 documents, or vectors in Qdrant, which has its own index.
            ImportError: FAISS is not installed.
        """
        check_choice("kind", kind, faiss_index.KINDS)
        if not isinstance(self._vectors, ShardVectors):
            raise ValueError("approximate: expected vectors in the index's folder, got Qdrant, which has its own index")
        count = len(self)
        wanted = faiss_index.ROWS_PER_LIST * faiss_index.lists_for(count)
        sample = self._sample(self._vectors, count, wanted, seed=0)[1] if count else torch.zeros(0, 1)
        built = faiss_index.trained(kind, count, sample)
        last = 0
        for ids, matrix in self._vectors.parts():
            faiss_index.extend(built, [(ids, matrix)])
            last = int(ids[-1]) if len(ids) else last
        return self._keep_approximate(built, kind, last, recall)

    def extend_approximate(self) -> bool:
        """Add new documents to the FAISS index, if there is one and there are many of them; returns whether that was done.

        If more has been added than it was built for, or most of it removed, it is rebuilt; with too few documents left for
        one, it is removed.
        """
        record = self.approximate
        if record is None:
            return False
        newer = self._count("id > ?", record.last)
        present = self._count("id <= ?", record.last)
        if newer <= GROWTH * record.documents and 2 * present >= record.documents:
            return False
        if 2 * present < record.documents or newer > record.documents:
            if present + newer < faiss_index.LEAST_DOCUMENTS:
                self._drop_approximate()
                return False
            self.build_approximate(record.kind, recall=record.target)
            return True
        assert isinstance(self._vectors, ShardVectors)
        built = self._open_approximate(record)
        last = record.last
        for ids, matrix in self._vectors.parts(newer_than=record.last):
            faiss_index.extend(built, [(ids, matrix)])
            last = int(ids[-1]) if len(ids) else last
        self._keep_approximate(built, record.kind, last, record.target)
        return True

    def _keep_approximate(self, built: Any, kind: faiss_index.Kind, last: int, target: float) -> faiss_index.Record:
        """Measure a FAISS index and replace the previous one."""
        assert isinstance(self._vectors, ShardVectors)
        itself, queries = self._sample(self._vectors, len(self), faiss_index.QUERIES, seed=1)
        _, found = self._vectors.search(queries, faiss_index.NEIGHBOURS + 1, Selection())
        others = (found != itself[:, None]).byte().argsort(dim=1, descending=True, stable=True)
        nearest = found.gather(1, others[:, : faiss_index.NEIGHBOURS])
        effort, recall = faiss_index.measure(built, kind, queries, itself, nearest, target)
        name = f"{uuid.uuid4().hex}.faiss"
        with self._writing() as writing:
            writing.undo.append(name)
            check = faiss_index.write(self._file_folder / name, built)
            record = faiss_index.Record(kind, name, check, built.ntotal, last, target, effort, recall, len(queries))
            if (before := self._meta(writing.db).get("approximate")) is not None:
                writing.after.append(before["file"])
            set_meta(writing.db, "approximate", asdict(record))
        self._approximate = (name, built)
        return record

    def _drop_approximate(self) -> None:
        with self._writing() as writing:
            if (found := self._meta(writing.db).get("approximate")) is not None:
                writing.after.append(found["file"])
                writing.db.execute("DELETE FROM meta WHERE name = 'approximate'")
        self._approximate = None

    @staticmethod
    def _sample(vectors: ShardVectors, count: int, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
        """Ids and vectors of ``wanted`` of ``count`` documents, or of all if there are no more."""
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted]] = True
        ids, rows, start = [], [], 0
        for part, matrix in vectors.parts():
            used = chosen[start : start + len(part)]
            ids.append(part[: len(used)][used])
            rows.append(matrix[: len(used)][used])
            start += len(part)
        return torch.cat(ids), torch.cat(rows)

    def _open_approximate(self, record: faiss_index.Record) -> Any:
        if self._approximate is None or self._approximate[0] != record.file:
            self._approximate = (record.file, faiss_index.read(self._file_folder / record.file, record.checksum))
        return self._approximate[1]

    def _known_files(self, db: sqlite3.Connection) -> set[str]:
        found = self._meta(db).get("approximate")
        return super()._known_files(db) | ({found["file"]} if found else set())

    def _count(self, condition: str, *parameters: Any) -> int:
        return int(self._db.execute(f"SELECT COUNT(*) FROM documents WHERE {condition}", parameters).fetchone()[0])

    def _nearest(self, queries: Tensor, k: int, engine: str, where: Filter | None) -> list[list[Hit]]:
        """The hits by vectors. A search that also finds removed documents is repeated with larger ``k`` until enough are left."""
        selection = self._selection(where)
        record = self.approximate if engine != "exact" else None
        few = engine == "auto" and selection.ids is not None and len(selection.ids) <= FEW
        if record is None or few:
            record = None
            exhaustive = self._vectors.exhaustive
            find: Callable[..., tuple[Tensor, Tensor]] = partial(self._vectors.search, queries, selection=selection)
        else:
            exhaustive, find = False, self._approximate_search(record, queries, selection)
        wanted = k
        while True:
            scores, ids = find(k=wanted)
            hits = [
                [Hit(d, score) for d, score in zip(map(self._by_id, row_ids), row, strict=True) if d is not None]
                for row_ids, row in zip(ids.tolist(), scores.tolist(), strict=True)
            ]
            if exhaustive or all(len(row) >= k for row in hits):
                return [row[:k] for row in hits]
            if ids.shape[1] < wanted or bool((ids < 0).any(dim=1).all()):  # it has no more results
                return [row[:k] for row in hits] if record is None else self._nearest(queries, k, "exact", where)
            wanted *= 2

    def _approximate_search(
        self, record: faiss_index.Record, queries: Tensor, selection: Selection
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """The FAISS index and, one by one, the documents that are newer than it."""
        assert isinstance(self._vectors, ShardVectors)
        exact, built = self._vectors, self._open_approximate(record)

        def find(k: int) -> tuple[Tensor, Tensor]:
            scores, ids = faiss_index.search(built, record.kind, record.effort, queries, k, selection.ids)
            newer_scores, newer = exact.search(queries, k, selection, newer_than=record.last)
            best, places = stable_top_k(torch.cat([scores.where(ids >= 0, -torch.inf), newer_scores], dim=1), k)
            return best, torch.cat([ids, newer], dim=1).gather(1, places)

        return find

    def _selection(self, where: Filter | None) -> Selection:
        if not where:
            return Selection()
        if self._vectors.exhaustive:
            condition, parameters = sql_condition(where)
            rows = self._db.execute(f"SELECT id FROM documents WHERE {condition} ORDER BY id", parameters)
            return Selection(torch.tensor([row[0] for row in rows], dtype=torch.int64))
        fields: dict[str, Any] = checked(where)
        if "source" in fields:
            condition, parameters = sql_condition({"source": fields["source"]})
            rows = self._db.execute(f"SELECT DISTINCT source FROM documents WHERE {condition}", parameters)
            fields["source"] = [row[0] for row in rows] or ["\0"]  # no file has this name
        return Selection(where=fields)

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


def open_index(
    path: str | os.PathLike[str],
    model: GritLM,
    *,
    prefix: str | None = None,
    format: VectorFormat | None = None,
    vectors: str | None = None,
    create: bool = True,
) -> Index:
    """The index at ``path`` for this model, created if missing; one made by another model, or with other settings, is refused.

    ``prefix``: the format before each document; default: the model's without an instruction, as in the paper.
    """
    prefix = model.formatter.embed_instruction("") if prefix is None else prefix
    settings = {**embedding_settings(model), "prefix": prefix}
    return Index(path, fingerprint=fingerprint(model), settings=settings, format=format, vectors=vectors, create=create)


def add_documents(
    index: Index,
    model: GritLM,
    documents: Sequence[Document],
    *,
    max_length: int | None = None,
    batch: int = 1024,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Embed documents and add them, ``batch`` at a time: after an interruption, finished batches are kept.

    Raises:
        ValueError: a document has more than ``max_length`` tokens (default: the model's positions); split it with
            :func:`python_model.rag.documents.chunk`. Nothing is truncated silently.
    """
    limit = max_length if max_length is not None else int(model.model.config.max_position_embeddings)
    for start in range(0, len(documents), batch):
        part = documents[start : start + batch]
        if (long := too_long(index, model, part, limit)) is not None:
            raise ValueError(f"documents: {long.key!r} has more than {limit} tokens; split it into chunks")
        index.add(part, embed(index, model, part, limit), overwrite=overwrite)
        if progress is not None:
            progress(start + len(part), len(documents))


def too_long(index: Index, model: GritLM, documents: Sequence[Document], limit: int) -> Document | None:
    """The first of ``documents`` that has more than ``limit`` tokens after the index's prefix."""
    prefix = index.recorded["settings"]["prefix"]
    return next((d for d in documents if model.formatter.text(prefix, d.content, limit).truncated), None)


def embed(index: Index, model: GritLM, documents: Sequence[Document], limit: int) -> Tensor:
    """The vectors of ``documents``, as this index keeps them."""
    return model.encode(
        [document.content for document in documents],
        instruction=index.recorded["settings"]["prefix"],
        max_length=limit,
        convert_to_tensor=True,
        show_progress_bar=False,
    )


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


def _fused(rankings: Sequence[Sequence[Document]]) -> list[Hit]:
    """Reciprocal rank fusion; of equal sums, the one found first comes first."""
    sums: dict[Document, float] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, 1):
            sums[document] = sums.get(document, 0.0) + 1 / (FUSION + rank)
    return [Hit(document, score) for document, score in sorted(sums.items(), key=lambda item: -item[1])]
