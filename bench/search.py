"""Searching 100,000 vectors of size 576: this package's index beside FAISS, usearch and LanceDB.

    python -m bench.search --record search_cpu.json          # pip install faiss-cpu usearch lancedb; what is missing is named
    python -m bench.search --vectors vectors.npy             # of grit embed, instead of clustered random ones

Per variant: seconds to build, MiB on disk, seconds until a new process's first search is answered (open and search once), the
median milliseconds of a search for one query, the share of the 10 true neighbours found, and seconds to add 16 vectors and
search. Queries take turns over the variants, so that the machine's drift cancels in ``times_exact``, their time over that of this
index's exact float32 search. The process is bound to one core (LanceDB and FAISS would otherwise use as many as there are).

The effort of an approximate variant (lists visited, candidates kept) is doubled until the queries reach a recall of 0.98, or one
within 0.005 of the best where that is lower; this index settles on it when it is built, with documents as queries.

The vectors are normalised points around 1,000 random centres; queries are other points around the same centres.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bench.common import table, write_records
from python_model.rag.index import Index
from python_model.rag.modes import Document
from python_model.rag.store import approximate
from python_model.support.optional import find
from python_model.support.quiet import quiet

NEIGHBOURS = 10
ADDED = 16
BATCH = 10_000
CENTRES = 1000
RECALL = 0.98
"""What variants with an adjustable effort are set to, where they reach it."""


class Searcher(Protocol):
    """A variant, open in its folder."""

    def search(self, query: np.ndarray) -> list[int]:
        """Numbers of the NEIGHBOURS best for one query (size)."""

    def add(self, vectors: np.ndarray, first: int) -> None:
        """Add vectors numbered from ``first``, so that another process would find them."""

    def close(self) -> None:
        """Release its files."""


class Ours:
    """This package's index; ``format``: of the vectors; ``kind``: of the FAISS index beside them, None for an exact search."""

    def __init__(self, folder: Path, vectors: np.ndarray | None, format: str, kind: str | None) -> None:
        self.index = Index(folder, fingerprint="search", settings={}, format=format)  # type: ignore[arg-type]
        if vectors is not None:
            for start in range(0, len(vectors), BATCH):
                self.add(vectors[start : start + BATCH], start)
            if kind is not None:
                self.index.build_approximate(kind, recall=RECALL)  # type: ignore[arg-type]

    def search(self, query: np.ndarray) -> list[int]:
        return [int(hit.document.key) for hit in self.index.search(query[None], NEIGHBOURS)[0]]

    def add(self, vectors: np.ndarray, first: int) -> None:
        numbers = range(first, first + len(vectors))
        self.index.add([Document(str(number), f"text {number}") for number in numbers], vectors)

    def close(self) -> None:
        self.index.close()


class Adjustable(ABC):
    """A variant that finds more of the neighbours with more effort, which is kept in its folder; ``most`` is the largest."""

    def __init__(self, folder: Path, least: int, most: int) -> None:
        self.kept, self.most = folder / "effort", most
        self.effort = int(self.kept.read_text()) if self.kept.exists() else least

    @abstractmethod
    def search(self, query: np.ndarray) -> list[int]:
        """See :class:`Searcher`."""

    def tune(self, queries: np.ndarray, nearest: np.ndarray) -> None:
        """The effort that this index's own rule chooses for RECALL."""

        def recall_at(effort: int) -> float:
            self.effort = effort
            return recall_of(self, queries, nearest)

        self.effort, _ = approximate.least_effort(recall_at, self.effort, self.most, RECALL)
        self.kept.write_text(str(self.effort))


class Faiss(Adjustable):
    """A FAISS index in a file; ``kind`` None compares with every vector."""

    def __init__(self, folder: Path, vectors: np.ndarray | None, kind: str | None) -> None:
        import faiss

        lists = 0 if kind != "ivf-sq8" or vectors is None else approximate.lists_for(len(vectors))
        least, most = {None: (0, 0), "hnsw": (NEIGHBOURS, approximate.MOST_EFFORT)}.get(kind, (1, lists))
        super().__init__(folder, least, most)
        self.faiss, self.file, self.kind = faiss, folder / "index.faiss", kind
        if vectors is None:
            self.index = faiss.read_index(str(self.file))
            return
        folder.mkdir(parents=True)
        if kind is None:
            self.index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
        else:
            count = min(len(vectors), approximate.ROWS_PER_LIST * approximate.lists_for(len(vectors)))
            chosen = np.random.default_rng(0).permutation(len(vectors))[:count]
            self.index = approximate.trained(kind, len(vectors), torch.from_numpy(vectors[chosen]))
        self.add(vectors, 0)

    def search(self, query: np.ndarray) -> list[int]:
        if self.kind is None:
            return [int(number) for number in self.index.search(query[None], NEIGHBOURS)[1][0]]
        found = approximate.search(self.index, self.kind, self.effort, torch.from_numpy(query[None]), NEIGHBOURS, None)
        return [int(number) for number in found[1][0]]

    def add(self, vectors: np.ndarray, first: int) -> None:
        self.index.add_with_ids(np.ascontiguousarray(vectors), np.arange(first, first + len(vectors)))
        self.faiss.write_index(self.index, str(self.file))

    def close(self) -> None:
        del self.index


class USearch(Adjustable):
    """A usearch graph in a file, of int8 or float32 vectors."""

    def __init__(self, folder: Path, vectors: np.ndarray | None, dtype: str) -> None:
        from usearch.index import Index as Graph

        super().__init__(folder, NEIGHBOURS, approximate.MOST_EFFORT)
        self.file = folder / "index.usearch"
        if vectors is None:
            self.index = Graph.restore(str(self.file))
            return
        folder.mkdir(parents=True)
        self.index = Graph(ndim=vectors.shape[1], metric="cos", dtype=dtype)
        self.add(vectors, 0)

    def search(self, query: np.ndarray) -> list[int]:
        self.index.expansion_search = self.effort
        return [int(number) for number in self.index.search(query, NEIGHBOURS, threads=1).keys]

    def add(self, vectors: np.ndarray, first: int) -> None:
        self.index.add(np.arange(first, first + len(vectors)), vectors, threads=1)
        self.index.save(str(self.file))

    def close(self) -> None:
        self.index.reset()


class Lance(Adjustable):
    """A LanceDB table; ``indexed``: with its int8 inverted lists of graphs (IVF_HNSW_SQ)."""

    def __init__(self, folder: Path, vectors: np.ndarray | None, indexed: bool) -> None:
        import lancedb

        super().__init__(folder, *((NEIGHBOURS, approximate.MOST_EFFORT) if indexed else (0, 0)))
        database = lancedb.connect(str(folder))
        if vectors is None:
            self.table = database.open_table("vectors")
            return
        self.table = database.create_table("vectors", data=self._rows(vectors[:BATCH], 0))
        for start in range(BATCH, len(vectors), BATCH):
            self.add(vectors[start : start + BATCH], start)
        self.table.optimize()
        if indexed:
            from lancedb.index import HnswSq

            self.table.create_index("vector", config=HnswSq(distance_type="dot"))

    @staticmethod
    def _rows(vectors: np.ndarray, first: int) -> Any:
        import pyarrow

        flat = pyarrow.array(vectors.reshape(-1), pyarrow.float32())
        column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        return pyarrow.table({"number": np.arange(first, first + len(vectors)), "vector": column})

    def search(self, query: np.ndarray) -> list[int]:
        found = self.table.search(query).distance_type("dot").select(["number", "_distance"]).limit(NEIGHBOURS)
        if self.effort:
            found = found.ef(self.effort)
        return [int(number) for number in found.to_arrow()["number"].to_pylist()]

    def add(self, vectors: np.ndarray, first: int) -> None:
        self.table.add(self._rows(vectors, first))

    def close(self) -> None:
        del self.table


Make = Callable[[Path, Any], Any]
VARIANTS: dict[str, tuple[str | None, Make]] = {
    "grit float32, exact": (None, lambda folder, vectors: Ours(folder, vectors, "float32", None)),
    "grit int8, exact": (None, lambda folder, vectors: Ours(folder, vectors, "int8", None)),
    "grit int8, ivf-sq8": ("faiss", lambda folder, vectors: Ours(folder, vectors, "int8", "ivf-sq8")),
    "grit int8, hnsw": ("faiss", lambda folder, vectors: Ours(folder, vectors, "int8", "hnsw")),
    "faiss flat": ("faiss", lambda folder, vectors: Faiss(folder, vectors, None)),
    "faiss ivf-sq8": ("faiss", lambda folder, vectors: Faiss(folder, vectors, "ivf-sq8")),
    "faiss hnsw": ("faiss", lambda folder, vectors: Faiss(folder, vectors, "hnsw")),
    "usearch float32": ("usearch", lambda folder, vectors: USearch(folder, vectors, "f32")),
    "usearch int8": ("usearch", lambda folder, vectors: USearch(folder, vectors, "i8")),
    "lancedb, exact": ("lancedb", lambda folder, vectors: Lance(folder, vectors, False)),
    "lancedb ivf-hnsw-sq": ("lancedb", lambda folder, vectors: Lance(folder, vectors, True)),
}
"""Each with the package that it needs."""
BASE = next(iter(VARIANTS))


def clustered(count: int, size: int, seed: int) -> np.ndarray:
    """Normalised float32 (count, size) around centres that are the same for every seed."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, size), dtype=np.float32)
    draw = np.random.default_rng(seed)
    points = centres[draw.integers(0, CENTRES, count)] + draw.standard_normal((count, size), dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def true_neighbours(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The numbers (queries, NEIGHBOURS) of the largest inner products, in float64 where float32 might change the order."""
    scores = queries @ vectors.T
    likely = np.argpartition(-scores, 3 * NEIGHBOURS, axis=1)[:, : 3 * NEIGHBOURS]
    exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), vectors[likely].astype(np.float64))
    return np.take_along_axis(likely, np.argsort(-exact, axis=1)[:, :NEIGHBOURS], axis=1)


def recall_of(searcher: Searcher | Adjustable, queries: np.ndarray, nearest: np.ndarray) -> float:
    """The share of the true neighbours found."""
    found = [len(set(searcher.search(q)) & set(true)) for q, true in zip(queries, nearest.tolist(), strict=True)]
    return sum(found) / nearest.size


def measure(vectors: np.ndarray, queries: np.ndarray, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """One row per variant in ``names``."""
    nearest = true_neighbours(vectors, queries)
    rows: list[dict[str, Any]] = []
    opened: dict[str, Any] = {}
    for name in names:
        make, place = VARIANTS[name][1], folder / name.replace(" ", "_").replace(",", "")
        start = time.perf_counter()
        built = make(place, vectors)
        seconds = time.perf_counter() - start
        if isinstance(built, Adjustable):
            built.tune(queries, nearest)
        built.close()
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        start = time.perf_counter()
        opened[name] = make(place, None)
        opened[name].search(queries[0])
        rows.append({"variant": name, "build_s": seconds, "mib": size / 2**20, "open_s": time.perf_counter() - start})
        if isinstance(built, Adjustable) and built.effort:
            rows[-1]["effort"] = built.effort
        print(f"{name}: built in {seconds:.1f} s", flush=True)
    seconds_of: dict[str, list[float]] = {name: [] for name in names}
    for query in queries:
        for name in names:
            start = time.perf_counter()
            opened[name].search(query)
            seconds_of[name].append(time.perf_counter() - start)
    for row in rows:
        name = row["variant"]
        row["recall"] = recall_of(opened[name], queries, nearest)
        row["query_ms"] = 1e3 * statistics.median(seconds_of[name])
        row["times_exact"] = statistics.median(
            own / base for own, base in zip(seconds_of[name], seconds_of[names[0]], strict=True)
        )
        start = time.perf_counter()
        opened[name].add(-queries[:1].repeat(ADDED, axis=0), len(vectors))
        opened[name].search(queries[0])
        row["add_and_search_s"] = time.perf_counter() - start
        row["seconds"] = [round(value, 7) for value in seconds_of[name]]
        opened[name].close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.search", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--vectors", type=Path, help=".npy file (documents, size); the last --queries rows are the queries"
    )
    parser.add_argument("--count", type=int, default=100_000, help="number of random vectors")
    parser.add_argument("--size", type=int, default=576, help="their size")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--folder", type=Path, help="where to build; default: a temporary folder, which needs about 5 GiB"
    )
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args()
    quiet()
    with contextlib.suppress(AttributeError):  # not on every system
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    wanted = list(dict.fromkeys([BASE, *arguments.variants]))
    names = [name for name in wanted if (need := VARIANTS[name][0]) is None or find(need) is not None]
    for name in wanted:
        if name not in names:
            print(f"left out {name}: {VARIANTS[name][0]} is not installed")
    if arguments.vectors is None:
        vectors, queries = (
            clustered(n, arguments.size, seed) for seed, n in ((1, arguments.count), (2, arguments.queries))
        )
    else:
        given = np.load(arguments.vectors).astype(np.float32)
        vectors, queries = given[: -arguments.queries], given[-arguments.queries :]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        rows = measure(vectors, queries, folder, names)
        if arguments.folder is not None:
            for name in names:
                shutil.rmtree(folder / name.replace(" ", "_").replace(",", ""))
    described = {"documents": len(vectors), "size": vectors.shape[1], "queries": len(queries)}
    rows = [{"variant": row["variant"], **described, **row} for row in rows]
    print(table(rows, ["variant", "build_s", "mib", "open_s", "query_ms", "times_exact", "recall", "add_and_search_s"]))
    if arguments.record:
        write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
