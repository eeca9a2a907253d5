"""Tokenised texts on disk, kept between runs and shared by processes: SQLite with plain integers, nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from python_model.model.prompts import IGNORE_INDEX, EncodedSample, ReadDocuments
from python_model.support.arguments import check_path
from python_model.support.files import place_for_file

_VERSION = 1
_TRUNCATED, _LABELS, _BIDIRECTIONAL, _DOCUMENTS = 1, 2, 4, 8


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex digest of everything that determines the ids of a text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {name: value for name, value in state.items() if name not in ("truncation", "padding")}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.blake2b(json.dumps([state, special], sort_keys=True).encode(), digest_size=16).hexdigest()


class TokenCache:
    """Samples by what they were made from.

    Any number of processes may share the file (on one machine: SQLite's write-ahead log needs shared memory). It may be deleted
    at any time between runs.

    Args:
        path: the SQLite file; created if missing.
        key: of tokenizer and settings; samples of different keys are kept apart.

    Attributes:
        hits, misses: counts for this process.
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        check_path("path", path)
        self.path = Path(path).expanduser()
        self._key = f"{_VERSION}:{key}".encode()
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        self._new: dict[bytes, bytes] = {}
        self.hits = self.misses = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None, "_new": {}, "hits": 0, "misses": 0}

    def digest(self, *parts: Any) -> bytes:
        """The key of a sample; ``parts`` are strings, numbers or None."""
        return hashlib.blake2b(self._key + json.dumps(parts).encode(), digest_size=16).digest()

    def get(self, digest: bytes) -> EncodedSample | None:
        """The sample stored under ``digest`` by :meth:`put`, in this run or an earlier one."""
        value = self._new.get(digest)
        if value is None:
            found = self._open().execute("SELECT value FROM samples WHERE digest = ?", (digest,)).fetchone()
            value = None if found is None else found[0]
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        try:
            return _decode(value)
        except ValueError as error:
            raise ValueError(f"token_cache: {self.path} holds a broken entry; delete the file") from error

    def put(self, digest: bytes, sample: EncodedSample) -> None:
        """Store a sample; it is written to disk by the next :meth:`flush`."""
        self._new[digest] = _encode(sample)

    def flush(self) -> None:
        """Write new samples, all or none."""
        if not self._new:
            return
        with self._open() as connection:
            connection.executemany("INSERT OR IGNORE INTO samples VALUES (?, ?)", self._new.items())
        self._new = {}

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._process != os.getpid():  # a connection must not cross a fork
            self._process = os.getpid()
            place_for_file(self.path)
            try:
                with FileLock(f"{self.path}.lock"):
                    connection = sqlite3.connect(self.path, timeout=300)
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = NORMAL")
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS samples (digest BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
                    )
            except sqlite3.DatabaseError as error:
                raise ValueError(f"token_cache: cannot use {self.path} ({error}); delete it or name another") from error
            self._connection = connection
        return self._connection


def _encode(sample: EncodedSample) -> bytes:
    flags = _TRUNCATED * sample.truncated
    parts = [np.array(sample.input_ids, dtype="<i4").tobytes()]
    if sample.labels is not None:
        flags |= _LABELS  # a label is the next token or none, so one bit encodes it
        parts.append(np.packbits(np.array(sample.labels) != IGNORE_INDEX).tobytes())
    if sample.bidirectional is not None:
        flags |= _BIDIRECTIONAL
        parts.append(np.packbits(np.array(sample.bidirectional)).tobytes())
    if (read := sample.documents) is not None:
        flags |= _DOCUMENTS  # at the end: the lengths, hidden, causal, and how many numbers these are
        numbers = [*read.lengths, read.hidden, int(read.causal)]
        parts.append(np.array([*numbers, len(numbers)], dtype="<i4").tobytes())
    head = np.array([len(sample.input_ids), sample.instruction_len, flags], dtype="<i4").tobytes()
    return b"".join([head, *parts])


def _decode(value: bytes) -> EncodedSample:
    count, instruction_len, flags = np.frombuffer(value, dtype="<i4", count=3).tolist()
    bits = (count + 7) // 8
    documents = None
    if flags & _DOCUMENTS:
        *numbers, size = np.frombuffer(value[len(value) % 4 :], dtype="<i4").tolist()
        if not 2 < size <= len(numbers):
            raise ValueError(f"an entry of {count} tokens names {size} numbers of documents")
        *lengths, hidden, causal = numbers[-size:]
        documents = ReadDocuments(tuple(lengths), hidden, bool(causal))
        value = value[: len(value) - 4 * (size + 1)]
    if len(value) != 12 + 4 * count + bits * (bool(flags & _LABELS) + bool(flags & _BIDIRECTIONAL)):
        raise ValueError(f"an entry of {count} tokens has {len(value)} bytes")
    ids = np.frombuffer(value, dtype="<i4", count=count, offset=12)
    place = 12 + 4 * count
    labels = bidirectional = None
    if flags & _LABELS:
        learns = np.unpackbits(np.frombuffer(value, dtype=np.uint8, count=bits, offset=place), count=count)
        labels = np.where(learns, np.append(ids[1:], IGNORE_INDEX), IGNORE_INDEX).tolist()
        place += bits
    if flags & _BIDIRECTIONAL:
        runs = np.frombuffer(value, dtype=np.uint8, count=bits, offset=place)
        bidirectional = np.unpackbits(runs, count=count).astype(bool).tolist()
    return EncodedSample(ids.tolist(), instruction_len, labels, bool(flags & _TRUNCATED), bidirectional, documents)
