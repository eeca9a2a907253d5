"""Index: documents and their embeddings in a folder, searched exactly.

    folder/index.sqlite           documents (key, title, text), where their vectors stand; the index's settings
    folder/vectors/*.safetensors  matrices (documents, size) in float32, float16 or int8 with a float32 scale per row

Vectors are added as a new file and never changed; what KVStore says about kills, full disks and several writers holds here,
too. Nothing is pickled. Scores are inner products: cosines for a model that normalises.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from python_model.model.modeling import GritLM
from python_model.rag.fingerprint import embedding_settings, fingerprint
from python_model.rag.modes import Document
from python_model.rag.store import shards
from python_model.rag.store.folder import StoreCorruptError, StoreFolder, set_meta
from python_model.support.arguments import check_at_least, check_choice
from python_model.support.optional import require

VectorFormat = Literal["float32", "float16", "int8"]
FORMATS: tuple[str, ...] = get_args(VectorFormat)
ROWS_AT_ONCE = 1 << 16
_DOCUMENT = "key, text, title, source, place"  # a Document's fields

_SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT UNIQUE NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    shard INTEGER NOT NULL REFERENCES shards (id), row INTEGER NOT NULL,
    source TEXT NOT NULL DEFAULT '', place TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS documents_of_shard ON documents (shard, row);
CREATE INDEX IF NOT EXISTS documents_of_source ON documents (source);
CREATE TABLE IF NOT EXISTS sources (
    name TEXT PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, recipe TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Hit:
    """A document found, and its inner product with the query."""

    document: Document
    score: float


@dataclass(frozen=True)
class Source:
    """A file whose documents are in the index.

    ``path``: where it was read, absolute. ``digest``: of its content, empty while only a part of its documents is there.
    ``recipe``: how it was divided.
    """

    name: str
    path: str
    digest: str
    recipe: str


@dataclass(frozen=True)
class _Block:
    """The vectors of one file that are still in use: rows of a matrix and the documents' ids."""

    data: Tensor  # (rows, size)
    scales: Tensor | None  # (rows, 1) float32, of int8
    ids: Tensor  # int64 (rows)


def stable_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row of ``scores`` (rows, n), largest first, and their columns; equal scores keep their order.

    ``torch.topk`` is several times faster than a sort of everything, but may take any of equal scores. So its choice is put in
    order, and only rows in which an equal of the k-th score was left out are sorted whole.
    """
    k = min(k, scores.shape[1])
    best = scores.topk(min(k + 1, scores.shape[1]), dim=1)  # one more, to see whether the k-th has an equal outside
    columns = best.indices[:, :k].sort(dim=1).values
    values = scores.gather(1, columns)
    order = values.argsort(dim=1, descending=True, stable=True)
    values, columns = values.gather(1, order), columns.gather(1, order)
    if 0 < k < scores.shape[1]:
        tied = best.values[:, k - 1] == best.values[:, k]
        if bool(tied.any()):
            sorted_scores, sorted_columns = scores[tied].sort(dim=1, descending=True, stable=True)
            values[tied], columns[tied] = sorted_scores[:, :k], sorted_columns[:, :k]
    return values, columns


class Index(StoreFolder):
    """Documents with vectors of one size, made by one model.

    Args:
        path: the index's folder; created when missing (unless ``create`` is False).
        fingerprint: of the model (see fingerprint.py); must equal the recorded one.
        settings: what else the vectors depend on (pooling, normalisation, prefix); must equal the recorded ones.
        format: how vectors are stored: ``"float32"``, ``"float16"`` or ``"int8"`` (a scale per vector). Default: the index's own,
            float32 for a new one.
        lock_timeout: seconds that a writer waits for another one.

    :func:`open_index` fills in fingerprint and settings from a model.
    """

    kind = "index"
    schema = _SCHEMA
    files = "vectors"
    version = 2  # 1 did not know which file a document is from
    rebuild = "grit index NEW_INDEX --add FOLDER"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        settings: dict[str, Any] | None = None,
        format: VectorFormat | None = None,
        lock_timeout: float = 60.0,
        create: bool = True,
    ) -> None:
        if format is not None:
            check_choice("format", format, FORMATS)
        given = {"fingerprint": fingerprint, "settings": settings, "format": format}
        super().__init__(path, given, lock_timeout, create)
        self.format: str = self.recorded["format"]
        self._blocks: list[_Block] = []
        self._state: int | None = None
        self._faiss: dict[str, tuple[int, Any, Tensor]] = {}

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
        return Document(*row)

    def add(self, documents: Sequence[Document], vectors: Tensor | np.ndarray, *, overwrite: bool = False) -> None:
        """Add documents with their vectors (documents, size): all of them, or on an error none.

        Raises:
            ValueError: a key is there already (and ``overwrite`` is False) or comes twice, or the vectors have another size,
                another number, or values that are not finite.
        """
        matrix = _checked(documents, vectors)
        with self._writing() as (db, undo, after):
            keys = [document.key for document in documents]
            present = [key for key in keys if db.execute("SELECT 1 FROM documents WHERE key = ?", (key,)).fetchone()]
            if present and not overwrite:
                raise ValueError(f"key: {present[0]!r} is in the index already; pass overwrite=True to replace it")
            self._delete(db, present, after)
            self._insert(db, documents, matrix, undo)
            _count_change(db)

    def replace(
        self,
        stale: Sequence[str],
        documents: Sequence[Document],
        vectors: Tensor | np.ndarray | None,
        sources: Sequence[Source] = (),
    ) -> None:
        """In one step: remove the keys ``stale``, put ``documents`` in (also for their keys), record their ``sources``."""
        matrix = _checked(documents, vectors) if documents else None
        with self._writing() as (db, undo, after):
            self._delete(db, [*stale, *(document.key for document in documents)], after)
            if matrix is not None:
                self._insert(db, documents, matrix, undo)
            db.executemany(
                "INSERT OR REPLACE INTO sources (name, path, digest, recipe) VALUES (?, ?, ?, ?)",
                [(s.name, s.path, s.digest, s.recipe) for s in sources],
            )
            _count_change(db)

    def _insert(self, db: sqlite3.Connection, documents: Sequence[Document], matrix: Tensor, undo: list[str]) -> None:
        size = self._meta(db).get("size")
        if size is None:
            set_meta(db, "size", matrix.shape[1])
        elif size != matrix.shape[1]:
            raise ValueError(f"vectors: expected size {size} as this index has, got {matrix.shape[1]}")
        name = shards.new_name()
        undo.append(name)
        tensors = _pack(matrix, self.format)
        shards.write_shard(self._file_folder / name, tensors)
        shard = db.execute(
            "INSERT INTO shards (file, checksum) VALUES (?, ?)", (name, shards.checksum(tensors.values()))
        ).lastrowid
        db.executemany(
            f"INSERT INTO documents ({_DOCUMENT}, shard, row) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(d.key, d.text, d.title, d.source, d.place, shard, row) for row, d in enumerate(documents)],
        )

    def sources(self) -> dict[str, Source]:
        """The files whose documents are here, by name."""
        return {row[0]: Source(*row) for row in self._db.execute("SELECT name, path, digest, recipe FROM sources")}

    def documents_of(self, source: str) -> dict[str, Document]:
        """The documents of a file, by key."""
        rows = self._db.execute(f"SELECT {_DOCUMENT} FROM documents WHERE source = ? ORDER BY id", (source,))
        return {row[0]: Document(*row) for row in rows}

    def owners(self) -> list[tuple[str, str]]:
        """(key, file) of all documents."""
        return self._db.execute("SELECT key, source FROM documents ORDER BY id").fetchall()

    def matching(self, name: str) -> list[str]:
        """The keys that ``name`` stands for: a document's key, a file's name, or a pattern (``*``, ``?``, ``[..]``) of either.

        Raises:
            KeyError: it stands for none.
        """
        rows = self.owners()
        found = [key for key, source in rows if name in (key, source)]
        found = found or [key for key, source in rows if fnmatchcase(key, name) or fnmatchcase(source, name)]
        if not found:
            raise KeyError(f"{name!r} is no document, file or pattern of one in the index {self.path}")
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
            KeyError: one of them is not there; then none is removed.
        """
        with self._writing() as (db, _, after):
            for key in keys:
                if db.execute("SELECT 1 FROM documents WHERE key = ?", (key,)).fetchone() is None:
                    raise KeyError(f"{key!r} is not in the index {self.path}")
            self._delete(db, list(keys), after)
            db.execute("DELETE FROM sources WHERE name NOT IN (SELECT source FROM documents)")
            _count_change(db)

    def search(self, queries: Tensor | np.ndarray, k: int = 10, *, engine: str = "exact") -> list[list[Hit]]:
        """The ``k`` documents with the largest inner products, best first, for each row of ``queries`` (Q, size).

        ``engine``: ``"exact"`` compares with every vector in FP32 (ties: the older document first); ``"faiss"`` or
        ``"faiss:FACTORY"`` (e.g. ``"faiss:HNSW32"``) builds a FAISS index in memory on first use. What another process has
        added or deleted since is seen.

        Raises:
            ValueError: wrong shape, ``k`` < 1, an unknown engine. ImportError: FAISS is not installed.
        """
        matrix = torch.as_tensor(queries).detach().float().cpu()
        size = self._meta().get("size")
        check_at_least("k", k, 1)
        if size is None:
            return [[] for _ in matrix]
        if matrix.ndim != 2 or matrix.shape[1] != size:
            raise ValueError(f"queries: expected (queries, {size}), got {tuple(matrix.shape)}")
        self._refresh()
        if not self._blocks:
            return [[] for _ in matrix]
        if engine == "exact":
            scores, ids = self._search_exactly(matrix, k)
        elif engine == "faiss" or engine.startswith("faiss:"):
            scores, ids = self._search_faiss(matrix, k, engine.partition(":")[2] or "Flat")
        else:
            raise ValueError(f"engine: expected 'exact', 'faiss', 'faiss:FACTORY', got {engine!r}")
        return [
            [Hit(self._by_id(identity), score) for identity, score in zip(row_ids, row, strict=True) if identity >= 0]
            for row_ids, row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def vectors(self) -> tuple[list[str], Tensor]:
        """All keys and vectors, float32 (documents, size)."""
        self._refresh()
        keys = dict(self._db.execute("SELECT id, key FROM documents"))
        ids = [identity for block in self._blocks for identity in block.ids.tolist()]
        rows = [_unpack(block, slice(None)) for block in self._blocks]
        return [keys[identity] for identity in ids], torch.cat(rows) if rows else torch.zeros(0, 0)

    def _search_exactly(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = torch.full((len(queries), 0), 0.0)
        found = torch.full((len(queries), 0), -1)
        for block in self._blocks:
            for start in range(0, len(block.ids), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                scores, places = stable_top_k(queries @ _unpack(block, part).T, k)
                best = torch.cat([best, scores], dim=1)
                found = torch.cat([found, block.ids[part][places]], dim=1)
                best, order = stable_top_k(best, k)
                found = found.gather(1, order)
        return best, found

    def _search_faiss(self, queries: Tensor, k: int, factory: str) -> tuple[Tensor, Tensor]:
        faiss = require("faiss", "rag")
        assert self._state is not None
        built = self._faiss.get(factory)
        if built is None or built[0] != self._state:
            matrix = torch.cat([_unpack(block, slice(None)) for block in self._blocks]).numpy()
            index = faiss.index_factory(matrix.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            index.train(matrix)
            index.add(matrix)
            built = (self._state, index, torch.cat([block.ids for block in self._blocks]))
            self._faiss[factory] = built
        scores, rows = built[1].search(queries.numpy(), k)
        rows = torch.from_numpy(rows)  # -1 where fewer than k were found
        return torch.from_numpy(scores), torch.where(rows >= 0, built[2][rows.clamp(min=0)], -1)

    def _by_id(self, identity: int) -> Document:
        row = self._db.execute(f"SELECT {_DOCUMENT} FROM documents WHERE id = ?", (identity,)).fetchone()
        return Document(*row)

    def _refresh(self) -> None:
        """Map the vectors again if documents were added or deleted since, by this process or another."""
        db = self._db
        if self._state == self._meta(db).get("changes", 0):
            return
        db.execute("BEGIN")  # one state of the index, whatever others write meanwhile
        try:
            state = self._meta(db).get("changes", 0)
            blocks = []
            for shard, file, check in db.execute("SELECT id, file, checksum FROM shards ORDER BY id").fetchall():
                rows = db.execute("SELECT id, row FROM documents WHERE shard = ? ORDER BY row", (shard,)).fetchall()
                data, scales = self._read(file, check)
                if len(rows) < data.shape[0]:
                    used = torch.tensor([row for _, row in rows])
                    data, scales = data[used], None if scales is None else scales[used]
                blocks.append(_Block(data, scales, torch.tensor([identity for identity, _ in rows])))
        finally:
            db.execute("ROLLBACK")
        self._blocks, self._state = blocks, state

    def _read(self, file: str, check: int) -> tuple[Tensor, Tensor | None]:
        path = self._file_folder / file
        try:
            with safe_open(str(path), framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise StoreCorruptError(f"{path}: the vectors cannot be read ({error})") from error
        if shards.checksum(tensors.values()) != check:
            raise StoreCorruptError(f"{path}: the vectors do not have the checksum they were written with")
        return tensors["data"], tensors.get("scales")

    def _upgrade(self, db: sqlite3.Connection, known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Version 1: a file is what stands before ``#chunk`` and ``:line`` in a key; without a digest it is read again."""
        columns = [row[1] for row in db.execute("PRAGMA table_info(documents)")]
        for name in ("source", "place"):
            if name not in columns:
                db.execute(f"ALTER TABLE documents ADD COLUMN {name} TEXT NOT NULL DEFAULT ''")
        for statement in self.schema.split(";"):
            db.execute(statement)
        rows = db.execute("SELECT id, key FROM documents").fetchall()
        named = [(re.sub(r"(?<=\.jsonl):\d+$", "", re.sub(r"#\d+$", "", key)), identity) for identity, key in rows]
        db.executemany("UPDATE documents SET source = ? WHERE id = ?", named)
        return known

    def _new_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "format": given["format"] or "float32"}


def open_index(
    path: str | os.PathLike[str],
    model: GritLM,
    *,
    prefix: str | None = None,
    format: VectorFormat | None = None,
    create: bool = True,
) -> Index:
    """The index at ``path`` for this model, made when missing; one made by another model, or with other settings, is refused.

    ``prefix``: the format before each document; default: the model's without an instruction, as in the paper.
    """
    prefix = model.formatter.embed_instruction("") if prefix is None else prefix
    settings = {**embedding_settings(model), "prefix": prefix}
    return Index(path, fingerprint=fingerprint(model), settings=settings, format=format, create=create)


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
    """Embed documents and add them, ``batch`` at a time: an interruption keeps the batches that are done.

    Raises:
        ValueError: a document has more than ``max_length`` tokens (default: the model's positions); divide it with
            :func:`python_model.rag.documents.chunk`. Nothing is cut silently.
    """
    limit = max_length if max_length is not None else int(model.model.config.max_position_embeddings)
    for start in range(0, len(documents), batch):
        part = documents[start : start + batch]
        if (long := too_long(index, model, part, limit)) is not None:
            raise ValueError(f"documents: {long.key!r} has more than {limit} tokens; divide it into chunks")
        index.add(part, embed(index, model, part, limit), overwrite=overwrite)
        if progress is not None:
            progress(start + len(part), len(documents))


def too_long(index: Index, model: GritLM, documents: Sequence[Document], limit: int) -> Document | None:
    """The first of ``documents`` that has more than ``limit`` tokens behind the index's prefix."""
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
        raise ValueError("vectors: some values are not finite")
    if len({document.key for document in documents}) < len(documents):
        raise ValueError("documents: a key comes twice")
    return matrix


def _pack(matrix: Tensor, format: str) -> dict[str, Tensor]:
    if format != "int8":
        return {"data": matrix.to(getattr(torch, format))}
    scales = matrix.abs().amax(dim=1, keepdim=True) / 127
    data = (matrix / torch.where(scales > 0, scales, 1.0)).round().clamp(-127, 127).to(torch.int8)
    return {"data": data, "scales": scales}


def _unpack(block: _Block, rows: slice) -> Tensor:
    data = block.data[rows].float()
    return data if block.scales is None else data * block.scales[rows]


def _count_change(db: sqlite3.Connection) -> None:
    """Other processes, and this one, see by the count that what they have mapped is old."""
    row = db.execute("SELECT value FROM meta WHERE name = 'changes'").fetchone()
    set_meta(db, "changes", int(row[0]) + 1 if row else 1)
