"""BM25 over the documents' titles and texts: SQLite's FTS5, which stays consistent with the documents in every transaction.

Words are runs of letters and digits, without case and accents, stemmed by Porter's algorithm for English. FTS5's BM25 has
k1 = 1.2 and b = 0.75.
"""

from __future__ import annotations

import re
import sqlite3

from python_model.rag.store.folder import StoreError

_WORD = re.compile(r"[^\W_]+")
_STATEMENTS = (
    """CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(title, text, content='documents', content_rowid='id',
        tokenize='porter unicode61')""",
    """CREATE TRIGGER IF NOT EXISTS words_inserted AFTER INSERT ON documents BEGIN
        INSERT INTO words (rowid, title, text) VALUES (new.id, new.title, new.text); END""",
    """CREATE TRIGGER IF NOT EXISTS words_deleted AFTER DELETE ON documents BEGIN
        INSERT INTO words (words, rowid, title, text) VALUES ('delete', old.id, old.title, old.text); END""",
)


def create_words(db: sqlite3.Connection) -> None:
    """Create the table of words, and the triggers that keep it consistent with the table ``documents``.

    Raises:
        StoreError: this Python's SQLite has no FTS5.
    """
    try:
        for statement in _STATEMENTS:
            db.execute(statement)
    except sqlite3.OperationalError as error:
        if "fts5" not in str(error):
            raise
        raise StoreError(
            "this Python's SQLite was built without FTS5, which an index needs; use another build"
        ) from error


def rebuild_words(db: sqlite3.Connection) -> None:
    """Fill the table from documents that existed before it."""
    db.execute("INSERT INTO words (words) VALUES ('rebuild')")


def search_words(db: sqlite3.Connection, text: str, k: int, condition: str, parameters: list[object]) -> list[int]:
    """The ids of the ``k`` best documents with a word of ``text``, best first, among those that satisfy an SQL condition over
    ``documents``."""
    words = dict.fromkeys(_WORD.findall(text.lower()))
    if not words:
        return []
    query = " OR ".join(f'"{word}"' for word in words)
    if condition == "1":
        rows = db.execute("SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank, rowid LIMIT ?", (query, k))
    else:
        rows = db.execute(
            f"SELECT w.rowid FROM words w JOIN documents d ON d.id = w.rowid WHERE words MATCH ? AND {condition} "
            "ORDER BY w.rank, w.rowid LIMIT ?",
            (query, *parameters, k),
        )
    return [row[0] for row in rows]
