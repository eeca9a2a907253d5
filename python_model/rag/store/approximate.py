"""A FAISS index of an index's vectors, in a file next to them: searches that look at only a small part of them.

It covers the documents that existed when it was built; newer ones are compared one by one until it is extended, and removed ones
are ignored. Its recall was measured when it was built, and is recorded.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from python_model.rag.store.folder import StoreCorruptError
from python_model.support.files import new_file
from python_model.support.optional import require

Kind = Literal["ivf-sq8", "hnsw"]
KINDS: tuple[str, ...] = get_args(Kind)
LEAST_DOCUMENTS = 256
"""With fewer documents, all are compared one by one."""
NEIGHBOURS = 10
QUERIES = 256
ROWS_PER_LIST = 64
"""Number of vectors per inverted list used to train its centre."""
HNSW_LINKS = 32
MOST_EFFORT = 1024
NEAR_BEST = 0.005
"""A target that no effort reaches is replaced by the best recall less this: further effort would cost much and find little."""


@dataclass(frozen=True)
class Record:
    """What the index's database records about the file.

    Attributes:
        kind: ``"ivf-sq8"`` (inverted lists of int8 vectors) or ``"hnsw"`` (a graph over int8 vectors).
        file, checksum: its name, and the CRC-32 of its content.
        documents: how many it holds; ``last``: the largest of their ids.
        target: the recall that was requested.
        effort: lists visited per query (``nprobe``), or candidates kept (``efSearch``).
        recall: the share of the ``NEIGHBOURS`` nearest documents that it found, on average over ``queries`` documents of the
            index as queries, each without itself.
    """

    kind: Kind
    file: str
    checksum: int
    documents: int
    last: int
    target: float
    effort: int
    recall: float
    queries: int


def lists_for(count: int) -> int:
    """Number of inverted lists for this many documents; below 39 vectors per list FAISS warns about poor training."""
    return min(round(4 * math.sqrt(count)), count // 39)


def trained(kind: str, count: int, sample: Tensor) -> Any:
    """An empty FAISS index for ``count`` documents, trained with ``sample`` (vectors, size).

    Raises:
        ValueError: fewer than ``LEAST_DOCUMENTS``. ImportError: FAISS is not installed.
    """
    faiss = require("faiss", "rag")
    if count < LEAST_DOCUMENTS:
        raise ValueError(
            f"approximate: expected at least {LEAST_DOCUMENTS} documents, got {count}; so few are compared one by one"
        )
    name = f"HNSW{HNSW_LINKS},SQ8" if kind == "hnsw" else f"IVF{lists_for(count)},SQ8"
    index = faiss.index_factory(sample.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(sample.numpy()))
    return faiss.IndexIDMap2(index) if kind == "hnsw" else index


def extend(index: Any, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add (ids, vectors) in parts."""
    for ids, matrix in parts:
        index.add_with_ids(np.ascontiguousarray(matrix.numpy()), ids.numpy())


def search(index: Any, kind: str, effort: int, queries: Tensor, k: int, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inner products (Q, k) and ids, -1 where fewer were found; of ``ids`` (int64) if they are given."""
    faiss = require("faiss", "rag")
    options: dict[str, Any] = {}
    if ids is not None:
        chosen = np.ascontiguousarray(ids.numpy())  # the selector does not keep a reference to it
        options["sel"] = faiss.IDSelectorBatch(chosen)
    if kind == "hnsw":
        parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k), **options)
    else:
        parameters = faiss.SearchParametersIVF(nprobe=effort, **options)
    scores, found = index.search(np.ascontiguousarray(queries.numpy()), k, params=parameters)
    return torch.from_numpy(scores), torch.from_numpy(found)


def least_effort(recall_at: Callable[[int], float], least: int, most: int, target: float) -> tuple[int, float]:
    """The least effort, doubled from ``least`` up to ``most``, whose recall is at least ``target``, and its recall.

    Rounded vectors bound the recall whatever the effort: if even ``most`` misses the target, it is the least effort whose recall
    is within ``NEAR_BEST`` of that of ``most``.
    """
    best = recall_at(most)
    goal = target if best >= target else best - NEAR_BEST
    effort = least
    while effort < most:
        if (recall := recall_at(effort)) >= goal:
            return effort, recall
        effort *= 2
    return most, best


def measure(
    index: Any, kind: str, queries: Tensor, itself: Tensor, nearest: Tensor, target: float
) -> tuple[int, float]:
    """The effort that :func:`least_effort` chooses for a target recall (from 1, or from ``NEIGHBOURS`` in a graph), and its
    recall.

    Args:
        queries: float32 (Q, size), vectors of documents whose ids are ``itself`` (Q).
        nearest: the ids (Q, NEIGHBOURS) of the true neighbours, without itself.
    """

    def recall_at(effort: int) -> float:
        _, found = search(index, kind, effort, queries, NEIGHBOURS + 1, None)
        found = found.where(found != itself[:, None], -1)
        return float((nearest[:, :, None] == found[:, None, :]).any(dim=2).double().mean())

    least, most = (NEIGHBOURS, MOST_EFFORT) if kind == "hnsw" else (1, int(index.nlist))
    return least_effort(recall_at, least, most, target)


def write(path: Path, index: Any) -> int:
    """Write a FAISS index; returns the CRC-32 of the file."""
    content = require("faiss", "rag").serialize_index(index)
    with new_file(path) as file:
        file.write(content.data)
    return zlib.crc32(content.data)


def read(path: Path, checksum: int) -> Any:
    """The FAISS index of a file.

    Raises:
        FileNotFoundError: the file does not exist. StoreCorruptError: it is damaged.
    """
    content = np.fromfile(path, dtype=np.uint8)
    if zlib.crc32(content.data) != checksum:
        raise StoreCorruptError(
            f"{path}: the FAISS index does not have the checksum it was written with; build it again"
        )
    return require("faiss", "rag").deserialize_index(content)
