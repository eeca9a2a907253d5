"""A few rows of the bundled sample, of every kind, in the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from python_model.data import sample_dir

NAMES = ("train/embedding", "train/generative", "test/embedding", "test/generative", "test/names")


def write_small_sample(folder: Path, per_kind: int = 2, passages: int = 12) -> Path:
    """Write ``per_kind`` rows of each data set (four times as many to train on) and the passages that the queries need."""
    needed: set[str] = set()
    for name in NAMES:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in _read(sample_dir() / f"{name}.jsonl"):
            kinds.setdefault(row["dataset"], []).append(row)
        count = 4 * per_kind if name.startswith("train") else per_kind
        kept = [row for rows in kinds.values() for row in sorted(rows, key=lambda r: len(str(r)))[:count]]
        _write(folder / f"{name}.jsonl", kept)
        if name == "test/embedding":
            needed = {row["key"] for row in kept}
    corpus = _read(sample_dir() / "corpus.jsonl")
    others = [row for row in corpus if row["key"] not in needed][: passages - len(needed)]
    _write(folder / "corpus.jsonl", [row for row in corpus if row["key"] in needed] + others)
    return folder


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
