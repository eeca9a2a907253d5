"""``grit mine``: hard negatives for one's own rows.

grit mine rows.jsonl ROWS.jsonl                                   # by BM25
grit mine rows.jsonl ROWS.jsonl --model my_run/checkpoint --scores    # by a model, its scores kept for distillation
grit mine rows.jsonl ROWS.jsonl --corpus passages.jsonl           # out of a larger collection ({"text": ..} a line)

Candidates are all passages of the rows, and of the corpus. A negative scores at most --margin times the query's best positive:
what scores higher is too often right as well. Negatives that a row has are kept; several positives of a query are kept too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, load
from python_model.corpora.hard_negatives import BM25, SCORE_CAP, SKIPPED_RANKS, Embeddings, Scorer, mine_negatives
from python_model.data.files import read_objects
from python_model.data.reading import tolerant_rows
from python_model.data.report import DataReport
from python_model.data.rows import EmbeddingRow, InstructedText, PlainText, check_text, to_object
from python_model.support.arguments import check_at_least
from python_model.support.files import new_file


class Pool:
    """Distinct passages, and which of them answer a query (in any of its rows)."""

    def __init__(self, rows: Sequence[EmbeddingRow], corpus: Sequence[str] = ()) -> None:
        self.texts: list[InstructedText] = []
        self._places: dict[str, int] = {}
        answers: dict[tuple[str, str], list[int]] = {}
        for row in rows:
            answers.setdefault(row.query, []).extend(self.place(text) for text in row.pos)
            for text in row.neg:
                self.place(text)
        for passage in corpus:
            self.place(PlainText("", passage))
        self.positives = [list(dict.fromkeys(answers[row.query])) for row in rows]

    def place(self, text: InstructedText) -> int:
        """The passage's number."""
        if text.text not in self._places:
            self._places[text.text] = len(self.texts)
            self.texts.append(text)
        return self._places[text.text]


def mined(
    rows: Sequence[EmbeddingRow],
    scorer: Scorer,
    pool: Pool,
    count: int,
    *,
    margin: float = SCORE_CAP,
    skipped_ranks: int = SKIPPED_RANKS,
    scores: bool = False,
) -> Iterator[EmbeddingRow]:
    """The rows with their own negatives first and mined ones up to ``count``; ``scores``: with the scorer's scores of all."""
    found = mine_negatives(scorer, pool.positives, len(pool.texts), count, margin=margin, skipped_ranks=skipped_ranks)
    for row, (chosen, of_all) in zip(rows, found, strict=True):
        own = [pool.place(text) for text in row.neg]
        places = list(dict.fromkeys([*own, *chosen]))[: max(count, len(own))]
        neg = [*row.neg, *(pool.texts[j] for j in places if j not in own)]
        if scores:
            row = replace(
                row,
                pos_scores=tuple(float(of_all[pool.place(text)]) for text in row.pos),
                neg_scores=tuple(float(of_all[pool.place(text)]) for text in neg),
            )
        elif row.neg_scores and len(neg) > len(row.neg):
            row = replace(row, pos_scores=(), neg_scores=())  # the new ones have no such score
        yield replace(row, neg=tuple(neg))


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit mine``."""
    parser.add_argument("input", help="file or folder of rows, of any tool (see grit convert)")
    parser.add_argument("output", type=Path, help=".jsonl file to write")
    parser.add_argument("--model", help="checkpoint that scores; BM25 unless given")
    parser.add_argument("--device", help="where the model computes")
    parser.add_argument("--corpus", help="further passages to choose from")
    parser.add_argument("--negatives", type=int, default=4, help="of each query")
    parser.add_argument("--margin", type=float, default=SCORE_CAP, help="share of the positive's score")
    parser.add_argument("--skip", type=int, default=SKIPPED_RANKS, help="best wrong passages to pass over")
    parser.add_argument("--scores", action="store_true", help="write the scores, as a teacher's")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text for --model")


def run(arguments: Namespace) -> None:
    """Read the rows, score, choose, write."""
    check_at_least("negatives", arguments.negatives, 1)
    check_at_least("skip", arguments.skip, 0)
    if not 0 < arguments.margin <= 1:
        raise ValueError(f"margin: expected a share above 0 and up to 1, got {arguments.margin}")
    report = DataReport()
    rows = [row for row in tolerant_rows(arguments.input, report) if isinstance(row, EmbeddingRow)]
    if not rows:
        raise ValueError(f"{arguments.input}: no rows with a query")
    corpus = []
    if arguments.corpus is not None:
        corpus = [check_text(item.get("text"), "text", origin) for origin, item in read_objects(arguments.corpus)]
    pool = Pool(rows, corpus)
    passages = [text.text for text in pool.texts]
    scorer: Scorer
    if arguments.model is None:
        scorer = BM25([row.query.text for row in rows], passages)
    else:
        model = load(arguments, mode="embedding")
        scorer = Embeddings(model, [row.query for row in rows], passages, max_length=arguments.max_length)
    found = mined(
        rows,
        scorer,
        pool,
        arguments.negatives,
        margin=arguments.margin,
        skipped_ranks=arguments.skip,
        scores=arguments.scores,
    )
    added = 0
    with new_file(arguments.output) as file:
        for before, row in zip(rows, found, strict=True):
            added += len(row.neg) - len(before.neg)
            file.write(json.dumps(to_object(row), ensure_ascii=False).encode() + b"\n")
    print("\n".join(report.lines()))
    positives = np.mean([len(row.pos) for row in rows])
    print(f"{added} negatives for {len(rows)} queries ({positives:.1f} positives each) in {arguments.output}")


COMMAND = Command("mine", "Mine hard negatives for one's own rows, by BM25 or by a model's embeddings.", configure, run)
