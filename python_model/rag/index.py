"""Index: documents and their embeddings in a folder, searched by vectors, by words or by both.

    folder/index.sqlite  documents (key, title, text), their words, the places of their vectors; the index's settings
    folder/vectors/      the vectors (see store/vectors.py), unless they are in Qdrant; a FAISS index if one was built

What KVStore guarantees about kills, full disks and several writers holds here as well. Nothing is pickled. Scores are inner
products: cosines for a model that normalises.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from python_model.model.identity import fingerprint
from python_model.model.limits import max_positions
from python_model.model.modeling import GritLM
from python_model.rag.filters import Filter, checked, sql_condition
from python_model.rag.fingerprint import embedding_settings, former_fingerprint
from python_model.rag.modes import Document
from python_model.rag.store import approximate as faiss_index
from python_model.rag.store.documents import Documents
from python_model.rag.store.folder import set_meta
from python_model.rag.store.vectors import Selection, ShardVectors, VectorFormat, stable_top_k
from python_model.rag.store.words import search_words
from python_model.support.arguments import check_at_least, check_choice

ENGINES = ("auto", "exact", "approximate")
GROWTH = 0.1
"""A FAISS index is extended when new documents reach this share of its size."""
FUSION = 60
"""The constant of reciprocal rank fusion (Cormack et al., SIGIR 2009): a document scores the sum of 1 / (FUSION + rank)."""
FEW = 20_000
"""Up to this many documents that pass a filter are compared one by one even if there is a FAISS index."""


@dataclass(frozen=True)
class Hit:
    """A document found, and its inner product with the query; in a search by words as well, its sum of reciprocal ranks."""

    document: Document
    score: float


class Index(Documents):
    """:class:`~python_model.rag.store.documents.Documents` that are searched; its arguments are theirs.

    :func:`open_index` fills in fingerprint and settings from a model.
    """

    _approximate: tuple[str, Any] | None = None
    """The FAISS index that is open, with its file's name."""

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

    @property
    def approximate(self) -> faiss_index.Record | None:
        """The record of the FAISS index, None if there is none."""
        found = self._meta().get("approximate")
        return None if found is None else faiss_index.Record(**found)

    def build_approximate(self, kind: faiss_index.Kind = "ivf-sq8", *, recall: float = 0.98) -> faiss_index.Record:
        """Build a FAISS index of all vectors, measure it, and store it with them; :meth:`extend_approximate` updates it.

        Args:
            kind: ``"ivf-sq8"``: inverted lists of int8 vectors; ``"hnsw"``: a graph, larger and slower to build.
            recall: target share of the 10 nearest documents, reached with the least effort; if rounding the vectors puts it
                out of reach, it is the best share less .005. ``Record.recall`` is the measured one.

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
    return Index(
        path,
        fingerprint=fingerprint(model),
        former_fingerprint=former_fingerprint(model),
        settings=settings,
        format=format,
        vectors=vectors,
        create=create,
    )


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
    limit = max_length if max_length is not None else max_positions(model.model.config)
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


def _fused(rankings: Sequence[Sequence[Document]]) -> list[Hit]:
    """Reciprocal rank fusion; of equal sums, the one found first comes first."""
    sums: dict[Document, float] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, 1):
            sums[document] = sums.get(document, 0.0) + 1 / (FUSION + rank)
    return [Hit(document, score) for document, score in sorted(sums.items(), key=lambda item: -item[1])]
