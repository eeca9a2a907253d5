"""StoreFolder: a folder with an SQLite index next to larger files; the common part of KVStore and Index.

SQLite's writer lock guards the folder: a writer holds it while writing large files, others wait; it is freed if a process dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from python_model.support.arguments import check_path
from python_model.support.files import make_folder


class StoreError(RuntimeError):
    """A store cannot do what was requested."""


class StoreFullError(StoreError):
    """No room: the disk is full, or the store has reached ``max_bytes``. Nothing was changed."""


class StoreCorruptError(StoreError):
    """The data on disk are not what was written; the message names the file and the document."""


class StoreBusyError(StoreError):
    """Another process kept writing, or mapping the files, for longer than ``lock_timeout``."""


class Writing(NamedTuple):
    """A transaction, the files to remove if it fails, and those to remove once it is committed."""

    db: sqlite3.Connection
    undo: list[str]
    after: list[str]


class StoreFolder:
    """See the top of the file. ``kind`` is for messages; ``schema`` are the tables, among them ``shards`` (id, file) and
    ``documents`` (key, shard); ``files`` is the folder of the large files; ``version`` is that of the format, which the table
    ``meta`` records; ``rebuild`` is the command that rebuilds the folder."""

    kind: ClassVar[str]
    schema: ClassVar[str]
    files: ClassVar[str]
    version: ClassVar[int]
    rebuild: ClassVar[str]
    own_column: ClassVar[str]
    """Of the table ``documents``, that no other kind has."""
    settings_since: ClassVar[dict[str, Any]] = {"truncate_dim": None}
    """Settings that came after the version that recorded ``special_tokens``, with what code had before it knew them."""
    settings_before: ClassVar[dict[str, Any]] = {
        "instruction_count": "offsets",
        "embed_instruction": False,
        "bidirectional_window": "transformers",
        "projection_activation": "identity",
        "default_prompt": "",
    }

    def __init__(
        self,
        path: str | os.PathLike[str],
        given: dict[str, Any],
        lock_timeout: float,
        create: bool,
        former_fingerprint: str | None = None,
    ) -> None:
        check_path("path", path)
        self.path, self.lock_timeout = Path(path), lock_timeout
        if not create and not (self.path / "index.sqlite").exists():
            raise FileNotFoundError(f"path: there is no {self.kind} in {self.path}")
        self._local = threading.local()
        self._cleaned = False
        make_folder(self.path)
        self.recorded = self._agree(given, former_fingerprint, create)
        make_folder(self._file_folder)

    def close(self) -> None:
        """Close this thread's connection; the object opens it again when it is used."""
        if (db := getattr(self._local, "db", None)) is not None:
            db.close()
            del self._local.db

    @property
    def _file_folder(self) -> Path:
        return self.path / self.files

    @property
    def _db(self) -> sqlite3.Connection:
        db = getattr(self._local, "db", None)
        if db is None:
            # autocommit mode: transactions are begun explicitly, so that a writer takes its lock before it reads
            try:
                db = sqlite3.connect(self.path / "index.sqlite", timeout=self.lock_timeout, isolation_level=None)
            except sqlite3.OperationalError as error:
                raise StoreError(f"{self.path / 'index.sqlite'}: the {self.kind} cannot be opened ({error})") from error
            db.execute("PRAGMA synchronous = FULL")
            self._local.db = db
        return db

    def _agree(self, given: dict[str, Any], former_fingerprint: str | None, create: bool) -> dict[str, Any]:
        """Record the settings of a new store, or compare them with the recorded ones; None matches anything. One that another
        process is just making is waited for.

        Raises:
            FileNotFoundError: nothing is recorded, and ``create`` is False. StoreError: it is another kind of store.
        """
        try:
            known = self._meta()
            columns = [row[1] for row in self._db.execute("PRAGMA table_info(documents)")]
            if columns and self.own_column not in columns:
                raise StoreError(f"path: there is no {self.kind} in {self.path}, but data of another kind")
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            known = {}
        except sqlite3.DatabaseError as error:
            raise StoreCorruptError(f"{self.path / 'index.sqlite'}: {error}") from error
        if not known:
            with self._transaction() as db:
                db.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
                self._create(db)
                known = self._meta(db)  # another process may have been faster
                if not known and not create:
                    raise FileNotFoundError(f"path: there is no {self.kind} in {self.path}")
                if not known:
                    known = {**self._new_settings(given), "version": self.version}
                    for name, value in known.items():
                        set_meta(db, name, value)
        if known.get("version") not in range(1, self.version + 1):
            raise StoreError(
                f"{self.path}: the {self.kind} has format version {known.get('version')}, this code reads 1 to {self.version}: "
                f"update grit-kernels, or rebuild it with `{self.rebuild}`"
            )
        if known["version"] < self.version:
            with self._transaction() as db:
                known = self._meta(db)  # another process may have been faster
                if known["version"] < self.version:
                    known = {**self._upgrade(db, known, given), "version": self.version}
                    for name, value in known.items():
                        set_meta(db, name, value)
        settings = _completed(known.get("settings"), given.get("settings"), self.settings_before, self.settings_since)
        own = given.get("fingerprint")
        former = own is not None and former_fingerprint is not None and known.get("fingerprint") == former_fingerprint
        up_to_date = {"settings": settings, "fingerprint": own if former else known.get("fingerprint")}
        outdated = any(value != known.get(name) for name, value in up_to_date.items())
        known |= up_to_date
        for name, value in given.items():
            if value is not None and known.get(name) != value:
                expected, got = _differing(known.get(name), value)
                raise ValueError(
                    f"{name}: expected {expected!r} as the {self.kind} {self.path} has, got {got!r}; "
                    f"to change it, rebuild the {self.kind}: `{self.rebuild}`"
                )
        if outdated:  # only now: a model that is refused must not leave its own values
            try:
                with self._transaction() as db:
                    for name, value in up_to_date.items():
                        set_meta(db, name, value)
            except sqlite3.OperationalError as error:
                if "readonly" not in str(error):  # then it is done whenever it is opened
                    raise
        return known

    def _create(self, db: sqlite3.Connection) -> None:
        """Create missing tables."""
        for statement in self.schema.split(";"):
            db.execute(statement)

    def _upgrade(self, db: sqlite3.Connection, known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Upgrade the tables of an older version, in the caller's transaction; returns the new entries of ``meta``."""
        return known

    def _new_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """What a new store records."""
        return given

    def _meta(self, db: sqlite3.Connection | None = None) -> dict[str, Any]:
        rows = (db or self._db).execute("SELECT name, value FROM meta")
        return {name: json.loads(value) for name, value in rows}

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Makes this the only writer until the commit; another one waits at BEGIN, and COMMIT waits for readers."""
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                message = f"{self.path}: another process has been writing or reading for {self.lock_timeout:g} s"
                raise StoreBusyError(message) from error
            raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Writing]:
        """A writer's transaction and files."""
        undo: list[str] = []
        after: list[str] = []
        try:
            with self._transaction() as db:
                self._remove_leftovers(db)
                yield Writing(db, undo, after)
        except BaseException as error:
            self._remove_files(undo)
            if isinstance(error, sqlite3.OperationalError) and "readonly" in str(error):
                raise StoreError(f"{self.path}: this user has no permission to write the {self.kind}") from error
            if _is_full(error):
                raise StoreFullError(f"{self.path}: no room for the document ({error}); nothing changed") from error
            raise
        self._remove_files(after)

    def _delete(self, db: sqlite3.Connection, keys: list[str], after: list[str]) -> None:
        """Remove documents, and shards that hold no others; their files are added to those removed ``after`` the commit."""
        if not keys:
            return
        db.executemany("DELETE FROM documents WHERE key = ?", [(key,) for key in keys])
        unused = "SELECT id, file FROM shards s WHERE NOT EXISTS (SELECT 1 FROM documents d WHERE d.shard = s.id)"
        empty = db.execute(unused).fetchall()
        db.executemany("DELETE FROM shards WHERE id = ?", [(identity,) for identity, _ in empty])
        after += [file for _, file in empty]

    def _remove_leftovers(self, db: sqlite3.Connection) -> None:
        """Remove files of killed writers. Only a writer may call this: its lock guarantees that nobody else is writing."""
        if not self._cleaned:
            known = self._known_files(db)
            self._remove_files([file.name for file in self._file_folder.iterdir() if file.name not in known])
            self._cleaned = True

    def _known_files(self, db: sqlite3.Connection) -> set[str]:
        """The names of the large files that are in use."""
        return {row[0] for row in db.execute("SELECT file FROM shards")}

    def _remove_files(self, names: list[str]) -> None:
        for name in names:
            (self._file_folder / name).unlink(missing_ok=True)


def set_meta(db: sqlite3.Connection, name: str, value: Any) -> None:
    """Record a setting of the store."""
    db.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (name, json.dumps(value)))


def _completed(recorded: Any, given: Any, before: dict[str, Any], since: dict[str, Any]) -> Any:
    """Recorded settings plus those unknown to the code that recorded them, at the values it had: ``since`` for any code,
    ``before`` for that of the first version.

    The first version put one token (BOS) before every text and none after it. Which token that is follows from the fingerprint,
    so a model that does the same may continue to use it.
    """
    if not recorded or not given:
        return recorded
    recorded = {**{name: value for name, value in since.items() if name in given}, **recorded}
    if "projection_content" in given:  # earlier versions recorded a sample of it, which is compared too
        recorded.setdefault("projection_content", given["projection_content"])
    if "special_tokens" not in given or "special_tokens" in recorded:
        return recorded
    special = given["special_tokens"]
    as_before = len(special[0]) == 1 and special[1] == []
    missing = {name: value for name, value in before.items() if name in given}
    if recorded.get("causal"):
        missing["bidirectional_window"] = None
    return {**missing, **recorded, "special_tokens": special if as_before else "one token in front"}


def _differing(recorded: Any, given: Any) -> tuple[Any, Any]:
    """Both values, or of two mappings the entries that differ; one that lacks an entry is shown without it."""
    if not isinstance(recorded, dict) or not isinstance(given, dict):
        return recorded, given
    missing = object()
    names = [n for n in {**recorded, **given} if recorded.get(n, missing) != given.get(n, missing)]
    first, second = ({name: values[name] for name in names if name in values} for values in (recorded, given))
    return first, second


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, sqlite3.OperationalError) and "full" in str(error)
