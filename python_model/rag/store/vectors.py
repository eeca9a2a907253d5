"""Vectors by the ids of their documents: the interface that an index needs, and the implementation in its own folder.

    folder/vectors/*.safetensors  matrices (documents, size) in float32, float16 or int8 with a float32 scale per row

A file is written once and never changed. Each file has the number of the change that last touched it, and mapped files stay
mapped, so that a search after an addition reads only what was added. To keep the number of files small, ``FAN_OUT``
neighbours or more are merged into one of a larger order of magnitude: a vector is copied once per order by which the index grows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from python_model.rag.filters import Filter
from python_model.rag.modes import Document
from python_model.rag.store import shards
from python_model.rag.store.folder import StoreCorruptError, Writing

VectorFormat = Literal["float32", "float16", "int8"]
FORMATS: tuple[str, ...] = get_args(VectorFormat)
ROWS_AT_ONCE = 1 << 16
FAN_OUT = 8
MERGED_ROWS = 1 << 20
"""Files with this many rows are not merged further, so that an addition never copies more than a few million vectors."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT UNIQUE NOT NULL, checksum INTEGER NOT NULL,
    rows INTEGER NOT NULL, changed INTEGER NOT NULL);
"""


@dataclass(frozen=True)
class Selection:
    """Which documents a search may find: those with these ids (int64, sorted) and this filter; None allows all.

    Both are equivalent. Vectors in this process use the ids, a server uses the filter, with its file patterns expanded.
    """

    ids: Tensor | None = None
    where: Filter | None = None


class Vectors(Protocol):
    """What an index needs from its vectors. They may return ids that are no longer in the index, which it ignores."""

    exhaustive: bool
    """Whether :meth:`search` never returns such ids."""

    def add(self, writing: Writing, ids: range, documents: Sequence[Document], matrix: Tensor) -> None:
        """Add rows (documents, size) of documents that the index has just inserted, in its transaction."""
        ...

    def removed(self, ids: Sequence[int]) -> None:
        """Called when the index has removed these documents and the transaction is committed."""
        ...

    def search(self, queries: Tensor, k: int, selection: Selection) -> tuple[Tensor, Tensor]:
        """The ``k`` largest inner products per query (Q, k), float32, largest first, and their ids, -1 if there are fewer."""
        ...

    def all(self) -> tuple[Tensor, Tensor]:
        """All ids, and their vectors in float32."""
        ...

    def compact(self, writing: Writing) -> None:
        """Free the space of removed documents."""
        ...


def stable_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row of ``scores`` (rows, n), largest first, and their columns; equal scores keep their order.

    ``torch.topk`` is several times faster than a full sort, but may pick any of equal scores. So its choice is put in order, and
    only rows in which a tie with the k-th score was left out are sorted fully.
    """
    k = min(k, scores.shape[1])
    best = scores.topk(min(k + 1, scores.shape[1]), dim=1)  # one more, to see whether the k-th has a tie outside
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


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 and their scales (rows, 1): ``row = scale * int8``, the largest value 127."""
    scales = matrix.abs().amax(dim=1, keepdim=True) / 127
    return (matrix / torch.where(scales > 0, scales, 1.0)).round().clamp(-127, 127).to(torch.int8), scales


def int8_products(queries: Tensor, data: Tensor, scales: Tensor) -> Tensor:
    """Inner products of float32 ``queries`` (Q, size) with int8 rows (n, size) and their scales (n, 1), in float32 (Q, n).

    The rows are never widened: the processor multiplies int8 by int8 and sums exactly in int32. A query is used twice, rounded
    to int8 and as the rounded remainder, which together are 16 bits; so the error is about 1/250 of that of the rows' own
    rounding.
    """
    high, high_scales = quantize(queries)
    low, low_scales = quantize(queries - high * high_scales)
    products = torch._int_mm(torch.cat([high, low]), data.T).float()
    first, second = products.split(len(queries))
    return (first * high_scales + second * low_scales) * scales.T


@dataclass
class _Block:
    """One file: a matrix and the ids of its rows, -1 for removed documents."""

    changed: int
    ids: Tensor  # int64 (rows)
    data: Tensor  # (rows, size)
    scales: Tensor | None  # (rows, 1) float32, of int8

    def products(self, queries: Tensor, rows: slice | Tensor) -> Tensor:
        if self.scales is not None:
            return int8_products(queries, self.data[rows], self.scales[rows])
        return queries @ self.data[rows].float().T

    def floats(self, rows: slice) -> tuple[Tensor, Tensor]:
        used = self.ids[rows] >= 0
        data = self.data[rows][used].float()
        return self.ids[rows][used], data if self.scales is None else data * self.scales[rows][used]


class ShardVectors:
    """See the top of the file; every search compares with every vector.

    Args:
        folder: folder of the files.
        format: how vectors are stored.
        connect: returns the calling thread's connection to the index's database.
    """

    exhaustive = True

    def __init__(self, folder: Path, format: str, connect: Callable[[], sqlite3.Connection]) -> None:
        self.folder, self.format, self._connect = folder, format, connect
        self._blocks: dict[int, _Block] = {}

    def add(self, writing: Writing, ids: range, documents: Sequence[Document], matrix: Tensor) -> None:
        """See :class:`Vectors`. The rows' places are written to the table ``documents``."""
        if self.format == "int8":
            data, scales = quantize(matrix)
            self._write(writing, {"data": data, "scales": scales}, ids)
        else:
            self._write(writing, {"data": matrix.to(getattr(torch, self.format))}, ids)
        self._merge(writing, self._due(writing.db))

    def removed(self, ids: Sequence[int]) -> None:
        """See :class:`Vectors`: everything needed is in the database."""

    def compact(self, writing: Writing) -> None:
        """Rewrite all files with up to about ``MERGED_ROWS`` rows each, without those of removed documents."""
        groups: list[list[int]] = []
        filled = MERGED_ROWS
        for shard, rows in writing.db.execute("SELECT id, rows FROM shards ORDER BY id").fetchall():
            if filled + rows > MERGED_ROWS:
                groups.append([])
                filled = 0
            groups[-1].append(shard)
            filled += rows
        for group in groups:
            self._merge(writing, group)

    def search(self, queries: Tensor, k: int, selection: Selection, newer_than: int = 0) -> tuple[Tensor, Tensor]:
        """See :class:`Vectors`; of equal scores the older document comes first. ``newer_than``: only larger ids count."""
        best = torch.full((len(queries), 0), 0.0)
        found = torch.full((len(queries), 0), -1)
        for block in self._current(newer_than):
            for start in range(0, len(block.ids), ROWS_AT_ONCE):
                part = block.ids[start : start + ROWS_AT_ONCE]
                allowed = part > max(newer_than, 0)
                if selection.ids is not None:
                    allowed &= torch.isin(part, selection.ids)
                count = int(allowed.sum())
                rows: slice | Tensor = slice(start, start + len(part))
                if 2 * count < len(part):  # copying these few is cheaper than comparing with all
                    rows, part, allowed = start + allowed.nonzero()[:, 0], part[allowed], allowed[allowed]
                if not count:
                    continue
                scores = block.products(queries, rows)
                if count < len(part):
                    scores[:, ~allowed] = -torch.inf
                scores, places = stable_top_k(scores, k)
                best = torch.cat([best, scores], dim=1)
                found = torch.cat([found, part[places].where(scores > -torch.inf, -1)], dim=1)
                best, order = stable_top_k(best, k)
                found = found.gather(1, order)
        return best, found

    def all(self) -> tuple[Tensor, Tensor]:
        """See :class:`Vectors`."""
        parts = list(self.parts())
        if not parts:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
        return torch.cat([ids for ids, _ in parts]), torch.cat([matrix for _, matrix in parts])

    def parts(self, newer_than: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`all`, a few rows at a time, for ids above ``newer_than``."""
        for block in self._current(newer_than):
            for start in range(0, len(block.ids), ROWS_AT_ONCE):
                ids, matrix = block.floats(slice(start, start + ROWS_AT_ONCE))
                newer = ids > newer_than
                yield ids[newer], matrix[newer]

    def _current(self, newer_than: int = 0) -> list[_Block]:
        """The current files that hold ids above ``newer_than``; only what has changed is read."""
        db = self._connect()
        db.execute("BEGIN")  # a consistent state of the index, whatever others write meanwhile
        try:
            present = db.execute("SELECT id, file, checksum, changed FROM shards ORDER BY id").fetchall()
            self._blocks = {shard: self._blocks[shard] for shard, *_ in present if shard in self._blocks}
            used = []
            for shard, file, check, changed in present:
                if newer_than and _last_id(db, shard) <= newer_than:
                    continue
                block = self._blocks.get(shard)
                if block is None:
                    tensors = read_file(self.folder / file, check)
                    block = _Block(-1, torch.zeros(0), tensors["data"], tensors.get("scales"))
                    self._blocks[shard] = block
                if block.changed != changed:
                    ids = torch.full((len(block.data),), -1)
                    places = torch.tensor(_places(db, shard))
                    ids[places[:, 0]] = places[:, 1]
                    block.ids, block.changed = ids, changed  # another thread may be searching the block
                used.append(block)
            return used
        finally:
            db.execute("ROLLBACK")

    def _write(self, writing: Writing, tensors: dict[str, Tensor], ids: Sequence[int]) -> None:
        name = shards.new_name()
        writing.undo.append(name)
        shards.write_shard(self.folder / name, tensors)
        shard = writing.db.execute(
            "INSERT INTO shards (file, checksum, rows, changed) VALUES (?, ?, ?, 0)",
            (name, shards.checksum(tensors.values()), len(ids)),
        ).lastrowid
        places = [(shard, row, identity) for row, identity in enumerate(ids)]
        writing.db.executemany("UPDATE documents SET shard = ?, row = ? WHERE id = ?", places)

    def _due(self, db: sqlite3.Connection) -> list[int]:
        """The newest files to merge: at least ``FAN_OUT``, that together reach an order of magnitude which none of them has.

        Otherwise a large file would be copied for every few small ones behind it.
        """
        newest = db.execute("SELECT id, rows FROM shards ORDER BY id DESC").fetchall()
        due: list[int] = []
        limit = FAN_OUT
        while limit <= MERGED_ROWS:
            count = next((i for i, (_, rows) in enumerate(newest) if rows >= limit), len(newest))
            if count >= FAN_OUT and sum(rows for _, rows in newest[:count]) >= limit:
                due = [shard for shard, _ in reversed(newest[:count])]
            limit *= FAN_OUT
        return due

    def _merge(self, writing: Writing, group: Sequence[int]) -> None:
        """Merge neighbouring files into a new one, without rows of removed documents."""
        db, parts, ids = writing.db, [], []
        for shard in group:
            file, check = db.execute("SELECT file, checksum FROM shards WHERE id = ?", (shard,)).fetchone()
            places = _places(db, shard)
            tensors = read_file(self.folder / file, check)
            rows = torch.tensor([row for row, _ in places])
            parts.append({name: tensor[rows] for name, tensor in tensors.items()})
            ids += [identity for _, identity in places]
            db.execute("DELETE FROM shards WHERE id = ?", (shard,))
            writing.after.append(file)
        if parts:
            self._write(writing, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, ids)


def read_file(path: Path, check: int) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory; their checksum is compared.

    Raises:
        StoreCorruptError: the file is damaged, truncated or missing.
    """
    try:
        with safe_open(str(path), framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise StoreCorruptError(f"{path}: the vectors cannot be read ({error})") from error
    if shards.checksum(tensors.values()) != check:
        raise StoreCorruptError(f"{path}: the vectors do not have the checksum they were written with")
    return tensors


def _places(db: sqlite3.Connection, shard: int) -> list[tuple[int, int]]:
    """(row, id) of a file's documents; both grow together."""
    return db.execute("SELECT row, id FROM documents WHERE shard = ? ORDER BY row", (shard,)).fetchall()


def _last_id(db: sqlite3.Connection, shard: int) -> int:
    query = "SELECT id FROM documents WHERE shard = ? ORDER BY row DESC LIMIT 1"
    return int(db.execute(query, (shard,)).fetchone()[0])
