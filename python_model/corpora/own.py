"""Turns your own rows into a data folder: training rows, held-out rows, a corpus to search, and settings for training.

Rows that share a query, a positive, a key or a first user turn form a group and stay together; a hash of the group decides
which side it is on, whatever the order of the files. So what a test asks for is in no training row, and it is removed from the
negatives of training rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from python_model.corpora.split import digest, held_out
from python_model.data.reading import tolerant_rows
from python_model.data.report import DataReport
from python_model.data.rows import EmbeddingRow, GenerativeRow, Row, to_object


def split_rows(rows: Sequence[Row], percent: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows, each in their original order; about ``percent`` of the groups are held out."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent[above]
            name = above
        return name

    for row in rows:
        first, *others = map(root, _names(row))
        for other in others:
            if root(other) != root(first):
                low, high = sorted((root(first), root(other)))  # the name of a group does not depend on the order
                parent[high] = low
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[held_out(root(_names(row)[0]), percent)].append(row)
    answers = {_folded(text.text) for row in sides[True] if isinstance(row, EmbeddingRow) for text in row.pos}
    return [_without(row, answers) for row in sides[False]], sides[True]


def _names(row: Row) -> list[str]:
    if isinstance(row, GenerativeRow):
        names = [f"user:{_folded(row.turns[0])}"]
    else:
        names = [f"query:{_folded(row.query.text)}", *(f"passage:{_folded(text.text)}" for text in row.pos)]
    return [*names, f"key:{row.key}"] if row.key else names


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _without(row: Row, answers: set[str]) -> Row:
    """The row without negatives that answer a held-out query, and without their scores."""
    if isinstance(row, GenerativeRow):
        return row
    kept = [i for i, text in enumerate(row.neg) if _folded(text.text) not in answers]
    if len(kept) == len(row.neg):
        return row
    scores = tuple(row.neg_scores[i] for i in kept) if row.neg_scores else ()
    return replace(row, neg=tuple(row.neg[i] for i in kept), neg_scores=scores)


def own_files(
    paths: Sequence[str], percent: int, max_queries: int
) -> tuple[dict[str, list[dict[str, Any]]], DataReport]:
    """The rows of files and folders as the files of a data folder; ``max_queries``: held-out queries per data set.

    Raises:
        ValueError: there are too few rows of a kind to hold any out.
    """
    report = DataReport()
    rows = [row for path in paths for row in tolerant_rows(path, report)]
    if not rows:
        raise ValueError(
            "from: expected files with rows that training can use (`grit convert` shows why not), got none"
        )
    train, test = split_rows(rows, percent)
    files: dict[str, list[dict[str, Any]]] = {}
    for row in train:
        kind = "generative" if isinstance(row, GenerativeRow) else "embedding"
        name = re.sub(r"[/\\\0]", "_", row.dataset)  # the rows themselves name their data set
        while (same := files.get(f"train/{name}.jsonl")) and ("query" in same[0]) != (kind == "embedding"):
            name += f"_{kind}"
        files.setdefault(f"train/{name}.jsonl", []).append(to_object(row))
    asked = _first(sorted(test, key=lambda row: digest(f"test:{_names(row)[0]}")), max_queries)
    for kept in (EmbeddingRow, GenerativeRow):
        if any(isinstance(row, kept) for row in rows) and not any(isinstance(row, kept) for row in asked):
            raise ValueError(
                f"held-out: expected rows of each kind to hold out, got none at {percent} percent; add rows or raise it"
            )
    queries = [row for row in asked if isinstance(row, EmbeddingRow)]
    if queries:
        files["test/embedding.jsonl"] = [to_object(row) | {"key": _key(row.pos[0].text)} for row in queries]
        passages = [text.text for row in queries for text in (*row.pos[:1], *row.neg)]
        passages += [text.text for row in test if isinstance(row, EmbeddingRow) for text in (*row.pos, *row.neg)]
        files["corpus.jsonl"] = [{"key": _key(text), "text": text} for text in dict.fromkeys(passages)]
    if talks := [row for row in asked if isinstance(row, GenerativeRow)]:
        files["test/generative.jsonl"] = [to_object(row) for row in talks]
    return files, report


def _key(text: str) -> str:
    return f"{digest(text):016x}"


def _first(rows: Iterable[Row], count: int) -> list[Row]:
    """The first ``count`` of each data set."""
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        seen[row.dataset] = seen.get(row.dataset, 0) + 1
        if seen[row.dataset] <= count:
            found.append(row)
    return found
