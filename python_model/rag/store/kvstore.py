"""KVStore: the key-value states of documents on disk.

    folder/index.sqlite          one row per document and per shard; the store's settings
    folder/shards/*.safetensors  one stacked (layers, 2, kv_heads, tokens, head_dim) tensor per document

A shard is never changed: it is written next to the others, synced to disk and renamed before the index refers to it, within the
transaction that keeps other writers waiting. So a process killed at any moment leaves a store with every document whose
``append`` had returned; the next writer removes its leftovers. Readers need no lock; a reader that finds a shard merged away
meanwhile queries the index again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from python_model.generate.states import TextStates
from python_model.rag.store import quantization, shards
from python_model.rag.store.folder import StoreCorruptError, StoreFolder, StoreFullError, set_meta
from python_model.support.arguments import check_choice

Format = Literal["bfloat16", "float16", "float32", "int8"]
FORMATS: tuple[str, ...] = get_args(Format)
WhenFull = Literal["error", "drop_oldest", "drop_unused"]
WHEN_FULL: tuple[str, ...] = get_args(WhenFull)
OPEN_SHARDS = 256
"""Number of mapped shards that a KVStore keeps open."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT UNIQUE NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, shard INTEGER NOT NULL REFERENCES shards (id),
    tensor TEXT NOT NULL, checksum INTEGER NOT NULL, causal INTEGER NOT NULL, input_ids BLOB NOT NULL, positions BLOB NOT NULL,
    metadata TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS documents_of_shard ON documents (shard);
"""


class KVStore(StoreFolder):
    """States of documents by key, made by one model with one setting.

    Args:
        path: the store's folder; created if missing (unless ``create`` is False).
        fingerprint: of the model whose states these are (see fingerprint.py); must equal the stored one.
        former_fingerprint: what an earlier version called the same model; a folder that records it is brought up to date.
        format: ``"bfloat16"``, ``"float16"``, ``"float32"``, or ``"int8"`` (half its size).
            Default: the store's own, bfloat16 for a new one.
        settings: how the documents were read (text prefix, attention); recorded, and must equal what is stored.
        max_bytes: maximum total size of all shards; None: unlimited.
        when_full: ``"error"`` refuses a document that does not fit into ``max_bytes``; ``"drop_oldest"`` removes the oldest
            shards for it, ``"drop_unused"`` those that no document was loaded from for the longest time, by any process.
        lock_timeout: seconds that a writer waits for another.
        create: False refuses a folder that holds no store.

    An object may be shared by threads. Objects in several processes may read and write the same folder.
    """

    kind = "key-value store"
    schema = _SCHEMA
    files = "shards"
    own_column = "tensor"
    version = 1
    rebuild = "grit index INDEX --add FOLDER --store NEW_STORE"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        former_fingerprint: str | None = None,
        format: Format | None = None,
        settings: dict[str, Any] | None = None,
        max_bytes: int | None = None,
        when_full: WhenFull = "error",
        lock_timeout: float = 60.0,
        create: bool = True,
    ) -> None:
        if format is not None:
            check_choice("format", format, FORMATS)
        check_choice("when_full", when_full, WHEN_FULL)
        self.max_bytes, self.when_full = max_bytes, when_full
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._handles_lock = threading.Lock()
        self._checked: set[int] = set()
        given = {"fingerprint": fingerprint, "format": format, "settings": settings}
        super().__init__(path, given, lock_timeout, create, former_fingerprint)
        self.format: str = self.recorded["format"]
        self.fingerprint: str | None = self.recorded["fingerprint"]
        self.settings: dict[str, Any] = self.recorded["settings"] or {}

    def append(
        self, key: str, states: TextStates, metadata: dict[str, Any] | None = None, *, overwrite: bool = False
    ) -> None:
        """Write one document; when this returns it is on disk. See :meth:`append_many`."""
        self.append_many([(key, states, metadata or {})], overwrite=overwrite)

    def append_many(self, items: Iterable[tuple[str, TextStates, dict[str, Any]]], *, overwrite: bool = False) -> None:
        """Write (key, states, metadata) items as one shard: all of them or, on an error, none.

        Raises:
            ValueError: a key exists already (and ``overwrite`` is False) or occurs twice in ``items``, or the states do not have
                this store's layers, heads and head size.
            StoreFullError, StoreBusyError: see there.
        """
        entries = []
        for key, states, metadata in items:
            tensors = self._tensors(states)
            entries.append((key, states, tensors, shards.checksum(tensors.values()), json.dumps(metadata)))
        if not entries:
            return
        keys = [entry[0] for entry in entries]
        if len(set(keys)) < len(keys):
            raise ValueError(f"items: expected different keys, got a duplicate key in {keys}")
        geometries = {entry[1].geometry for entry in entries}
        named = {f"{index}.{part}": t for index, entry in enumerate(entries) for part, t in entry[2].items()}
        with self._writing() as (db, undo, after):
            meta = self._meta(db)
            for geometry in geometries:
                known = meta.get("geometry")
                if known is None:
                    set_meta(db, "geometry", list(geometry))
                    meta["geometry"] = list(geometry)
                elif list(geometry) != known:
                    raise ValueError(
                        f"states: expected (layers, kv_heads, head_dim) {tuple(known)} as this store has, got {geometry}"
                    )
            present = [key for key in keys if self._row(key, db) is not None]
            if present and not overwrite:
                raise ValueError(f"key: {present[0]!r} is in the store already; pass overwrite=True to replace it")
            self._delete(db, present, after)
            self._make_room(db, shards.file_size(named), after)
            shard = self._write_shard(db, named, undo)
            db.executemany(
                "INSERT INTO documents (key, shard, tensor, checksum, causal, input_ids, positions, metadata) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (key, shard, str(i), check, int(s.causal), _pack_ints(s.input_ids), _pack_ints(s.positions), text)
                    for i, (key, s, _, check, text) in enumerate(entries)
                ],
            )

    def load(
        self,
        key: str,
        *,
        dtype: torch.dtype | None = None,
        verify: Literal["first", "always", "never"] = "first",
    ) -> TextStates:
        """A document's states. In the stored format they are mapped into memory, not read: do not write into them.

        ``dtype``: default: the stored one (bfloat16 for int8). ``verify``: compare the checksum on this object's first load of
        the document, on every load, or never.

        Raises:
            KeyError: there is no such document.
            StoreCorruptError: the shard is damaged, truncated or missing.
        """
        for attempt in range(3):
            row = self._row(key)
            if row is None:
                raise KeyError(f"{key!r} is not in the key-value store {self.path}")
            identity, file, tensor, check, causal, ids, positions = row
            try:
                found = self._read(file, tensor)
                self._note_use(file)
            except FileNotFoundError:
                if attempt < 2:  # merged away since the index was queried
                    continue
                raise StoreCorruptError(f"{file}: the shard of {key!r} is missing from {self.path}") from None
            except (SafetensorError, OSError) as error:
                raise StoreCorruptError(f"{file}: the shard of {key!r} cannot be read ({error})") from error
            break
        if verify == "always" or (verify == "first" and identity not in self._checked):
            if shards.checksum(found.values()) != check:
                raise StoreCorruptError(f"{file}: {key!r} does not have the checksum it was written with")
            self._checked.add(identity)
        data = found["data"]
        if data.dtype == torch.int8:
            data = quantization.dequantize(
                data, found["key_scales"], found["value_scales"], dtype if dtype is not None else torch.bfloat16
            )
        elif dtype is not None:
            data = data.to(dtype)
        return TextStates(data, _unpack_ints(ids), _unpack_ints(positions), bool(causal))

    def metadata(self, key: str) -> dict[str, Any]:
        """The metadata given to :meth:`append`."""
        row = self._db.execute("SELECT metadata FROM documents WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(f"{key!r} is not in the key-value store {self.path}")
        return json.loads(row[0])

    def __contains__(self, key: str) -> bool:
        return self._row(key) is not None

    def __len__(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM documents").fetchone()[0])

    def keys(self) -> list[str]:
        """All keys, oldest first."""
        return [row[0] for row in self._db.execute("SELECT key FROM documents ORDER BY id")]

    @property
    def bytes_used(self) -> int:
        """Bytes of all shards, including those of deleted documents whose shard still holds others (see :meth:`compact`)."""
        return int(self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM shards").fetchone()[0])

    def delete(self, key: str) -> None:
        """Remove a document. Its space is freed with the last document of its shard, or by :meth:`compact`."""
        with self._writing() as (db, _, after):
            if self._row(key, db) is None:
                raise KeyError(f"{key!r} is not in the key-value store {self.path}")
            self._delete(db, [key], after)

    def discard(self, keys: Iterable[str]) -> int:
        """Remove those of ``keys`` that exist; returns how many did."""
        with self._writing() as (db, _, after):
            present = [key for key in keys if self._row(key, db) is not None]
            self._delete(db, present, after)
        return len(present)

    def verify(self) -> list[str]:
        """Keys of the documents that cannot be read back as they were written."""
        damaged = []
        for key in self.keys():
            try:
                self.load(key, verify="always")
            except StoreCorruptError:
                damaged.append(key)
        return damaged

    def compact(self, shard_bytes: int = 1 << 30) -> None:
        """Merge shards into shards of about ``shard_bytes``, without deleted documents. Readers may continue.

        Needs room for a copy of what is merged. A damaged document stops it (:meth:`verify` finds them; delete them first).
        """
        with self._writing() as (db, undo, after):
            rows = db.execute(
                "SELECT d.id, d.key, d.tensor, d.checksum, s.file FROM documents d JOIN shards s ON s.id = d.shard ORDER BY d.id"
            ).fetchall()
            old = db.execute("SELECT id, file FROM shards").fetchall()
            groups: list[tuple[dict[str, Tensor], list[int]]] = []
            filled = shard_bytes
            for identity, key, tensor, check, file in rows:
                try:
                    found = self._read(file, tensor)
                except (SafetensorError, OSError) as error:
                    raise StoreCorruptError(f"{file}: the shard of {key!r} cannot be read ({error})") from error
                if shards.checksum(found.values()) != check:
                    raise StoreCorruptError(f"{file}: {key!r} does not have the checksum it was written with")
                if filled >= shard_bytes:
                    groups.append(({}, []))
                    filled = 0
                tensors, members = groups[-1]
                tensors.update({f"{len(members)}.{part}": t for part, t in found.items()})
                members.append(identity)
                filled += shards.size_in_bytes(found.values())
            for tensors, members in groups:
                shard = self._write_shard(db, tensors, undo)
                db.executemany(
                    "UPDATE documents SET shard = ?, tensor = ? WHERE id = ?",
                    [(shard, str(index), identity) for index, identity in enumerate(members)],
                )
            db.executemany("DELETE FROM shards WHERE id = ?", [(identity,) for identity, _ in old])
            after += [file for _, file in old]

    def close(self) -> None:
        """Close this thread's connection and all mapped shards; the object opens them again when it is used."""
        super().close()
        with self._handles_lock:
            self._handles.clear()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _new_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "format": given["format"] or "bfloat16"}

    def _row(self, key: str, db: sqlite3.Connection | None = None) -> tuple[Any, ...] | None:
        query = (
            "SELECT d.id, s.file, d.tensor, d.checksum, d.causal, d.input_ids, d.positions "
            "FROM documents d JOIN shards s ON s.id = d.shard WHERE d.key = ?"
        )
        return (db or self._db).execute(query, (key,)).fetchone()

    def _remove_files(self, names: list[str]) -> None:
        with self._handles_lock:
            for name in names:
                self._handles.pop(name, None)
        super()._remove_files(names)

    def _write_shard(self, db: sqlite3.Connection, tensors: dict[str, Tensor], undo: list[str]) -> int:
        name = shards.new_name()
        undo.append(name)
        size = shards.write_shard(self._file_folder / name, tensors)
        row = db.execute("INSERT INTO shards (file, bytes) VALUES (?, ?)", (name, size))
        assert row.lastrowid is not None
        return row.lastrowid

    def _make_room(self, db: sqlite3.Connection, needed: int, after: list[str]) -> None:
        if self.max_bytes is None:
            return
        used = self.bytes_used
        if needed > self.max_bytes or (used + needed > self.max_bytes and self.when_full == "error"):
            raise StoreFullError(
                f"max_bytes: {needed} more bytes do not fit: {used} of {self.max_bytes} are used; nothing changed"
            )
        present = db.execute("SELECT id, file, bytes FROM shards ORDER BY id").fetchall()
        if self.when_full == "drop_unused":
            present.sort(key=lambda shard: self._last_use(shard[1]))
        for identity, file, size in present:
            if used + needed <= self.max_bytes:
                break
            db.execute("DELETE FROM documents WHERE shard = ?", (identity,))
            db.execute("DELETE FROM shards WHERE id = ?", (identity,))
            after.append(file)
            used -= size

    # shards

    def _note_use(self, file: str) -> None:
        """A shard's modification time, which nothing else changes, records its last use without locking the database."""
        with contextlib.suppress(OSError):  # a store or file system that is read-only, or a shard dropped meanwhile
            os.utime(self._file_folder / file)

    def _last_use(self, file: str) -> int:
        try:
            return (self._file_folder / file).stat().st_mtime_ns
        except FileNotFoundError:  # damaged: the first to go
            return 0

    def _tensors(self, states: TextStates) -> dict[str, Tensor]:
        if self.format == "int8":
            names = ("data", "key_scales", "value_scales")
            return dict(zip(names, quantization.quantize(states.keys_values.cpu()), strict=True))
        return {"data": states.keys_values.to(device="cpu", dtype=getattr(torch, self.format))}

    def _read(self, file: str, tensor: str) -> dict[str, Tensor]:
        with self._handles_lock:
            handle = self._handles.get(file)
            if handle is None:
                handle = safe_open(str(self._file_folder / file), framework="pt")
                self._handles[file] = handle
                if len(self._handles) > OPEN_SHARDS:
                    self._handles.popitem(last=False)
            self._handles.move_to_end(file)
            names = ("data", "key_scales", "value_scales") if self.format == "int8" else ("data",)
            return {name: handle.get_tensor(f"{tensor}.{name}") for name in names}


def _pack_ints(values: Tensor) -> bytes:
    return values.cpu().numpy().astype("<i4").tobytes()


def _unpack_ints(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<i4").astype(np.int64))
