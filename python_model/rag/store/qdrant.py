"""Vectors in Qdrant: a server given by URL, or a folder of the client's local mode, for tests and experiments.

The index's folder remains authoritative: what a killed writer leaves on the server has ids unknown to the folder, and the next
writer reuses them. Documents' files and metadata are uploaded as well, so that the server can filter.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from python_model.rag.filters import Filter, checked
from python_model.rag.modes import Document
from python_model.rag.store.folder import StoreError, Writing
from python_model.rag.store.vectors import Selection
from python_model.support.optional import require

POINTS_AT_ONCE = 512


class QdrantVectors:
    """See the top of the file.

    Args:
        place: a URL (``http://localhost:6333``; the environment variable ``QDRANT_API_KEY`` is its key) or a folder.
        collection: its name there; created with the first vectors.
        format: ``"float16"`` is Qdrant's datatype, ``"int8"`` its scalar quantisation in addition to float32 vectors.
        connect: gives the calling thread's connection to the index's database.
    """

    exhaustive = False

    def __init__(self, place: str, collection: str, format: str, connect: Callable[[], sqlite3.Connection]) -> None:
        self._models: Any = require("qdrant_client.models", "qdrant")
        self.place, self.collection, self.format, self._connect = place, collection, format, connect

    @cached_property
    def _client(self) -> Any:
        """Opened at the first use, since local mode allows one client per folder at a time."""
        client: Any = require("qdrant_client", "qdrant").QdrantClient
        if "://" in self.place:
            return client(url=self.place, api_key=os.environ.get("QDRANT_API_KEY"))
        return client(path=self.place)

    def add(self, writing: Writing, ids: range, documents: Sequence[Document], matrix: Tensor) -> None:
        """See :class:`Vectors`. Points are stored when this returns; if the transaction fails, nothing refers to them."""
        with _told(self.place):
            if not self._exists():
                self._check_gone(writing.db, ids.start)
                self._create(matrix.shape[1])
            points = [
                self._models.PointStruct(
                    id=identity, vector=vector, payload={"source": d.source, "metadata": dict(d.metadata)}
                )
                for identity, vector, d in zip(ids, matrix.tolist(), documents, strict=True)
            ]
            for start in range(0, len(points), POINTS_AT_ONCE):
                self._client.upsert(self.collection, points[start : start + POINTS_AT_ONCE], wait=True)

    def removed(self, ids: Sequence[int]) -> None:
        """See :class:`Vectors`."""
        with _told(self.place):
            if ids and self._exists():
                self._client.delete(self.collection, self._models.PointIdsList(points=list(ids)), wait=True)

    def compact(self, writing: Writing) -> None:
        """Remove points without a document; the server merges its segments itself."""
        known = {row[0] for row in writing.db.execute("SELECT id FROM documents")}
        with _told(self.place):
            left = [point.id for point in self._points(with_vectors=False) if point.id not in known]
        self.removed(left)

    def search(self, queries: Tensor, k: int, selection: Selection) -> tuple[Tensor, Tensor]:
        """See :class:`Vectors`."""
        scores = torch.full((len(queries), k), -torch.inf)
        ids = torch.full((len(queries), k), -1)
        with _told(self.place):
            if not self._exists():
                self._check_gone(self._connect())
                return scores[:, :0], ids[:, :0]
            condition = None if selection.where is None else self._filter(selection.where)
            requests = [self._models.QueryRequest(query=query, limit=k, filter=condition) for query in queries.tolist()]
            for row, found in enumerate(self._client.query_batch_points(self.collection, requests)):
                for place, point in enumerate(found.points):
                    scores[row, place], ids[row, place] = point.score, point.id
        return scores, ids

    def all(self) -> tuple[Tensor, Tensor]:
        """See :class:`Vectors`."""
        known = {row[0] for row in self._connect().execute("SELECT id FROM documents")}
        with _told(self.place):
            points = [p for p in self._points(with_vectors=True) if p.id in known]
        found = {point.id for point in points}
        lost = known - found
        # what another process has removed meanwhile is not missing
        missing = [row[0] for row in self._connect().execute("SELECT id FROM documents") if row[0] in lost]
        if missing:
            raise StoreError(
                f"Qdrant at {self.place}: expected {len(known)} points in the collection {self.collection!r}, got "
                f"{len(found)}; rebuild the index"
            )
        vectors = torch.tensor([point.vector for point in points]) if points else torch.zeros(0, 0)
        return torch.tensor([point.id for point in points], dtype=torch.int64), vectors

    def _check_gone(self, db: sqlite3.Connection, before: int | None = None) -> None:
        """Check that a collection which is not there has no documents (with ids below ``before``): none would be found."""
        condition, values = ("", ()) if before is None else (" WHERE id < ?", (before,))
        if db.execute(f"SELECT EXISTS (SELECT 1 FROM documents{condition})", values).fetchone()[0]:
            raise StoreError(
                f"Qdrant at {self.place}: expected the collection {self.collection!r}, which holds the index's vectors, got none "
                "of that name; rebuild the index"
            )

    def _exists(self) -> bool:
        return bool(self._client.collection_exists(self.collection))

    def _create(self, size: int) -> None:
        models = self._models
        half = models.Datatype.FLOAT16 if self.format == "float16" else models.Datatype.FLOAT32
        small = models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8))
        self._client.create_collection(
            self.collection,
            vectors_config=models.VectorParams(size=size, distance=models.Distance.DOT, datatype=half),
            quantization_config=small if self.format == "int8" else None,
        )

    def _filter(self, where: Filter) -> Any:
        models, conditions = self._models, []
        for field, value in checked(where).items():
            key = "source" if field == "source" else f'metadata."{field}"'
            if isinstance(value, dict):
                bounds = models.Range(gte=value.get("min"), lte=value.get("max"))
                conditions.append(models.FieldCondition(key=key, range=bounds))
                continue
            # MatchValue accepts no float: equality is a range of one number
            either = [
                models.FieldCondition(key=key, range=models.Range(gte=entry, lte=entry))
                if isinstance(entry, (int, float)) and not isinstance(entry, bool)
                else models.FieldCondition(key=key, match=models.MatchValue(value=entry))
                for entry in value
            ]
            conditions.append(models.Filter(should=either))
        return models.Filter(must=conditions)

    def _points(self, with_vectors: bool) -> Iterator[Any]:
        offset, more = None, self._exists()
        while more:
            points, offset = self._client.scroll(
                self.collection, limit=POINTS_AT_ONCE, offset=offset, with_payload=False, with_vectors=with_vectors
            )
            yield from points
            more = offset is not None


@contextlib.contextmanager
def _told(place: str) -> Iterator[None]:
    """Reraise the client's errors with the name of the server."""
    errors: Any = require("qdrant_client.http.exceptions", "qdrant")
    try:
        yield
    except (errors.ApiException, OSError) as error:
        raise StoreError(f"Qdrant at {place}: {error}") from error
