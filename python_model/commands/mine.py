"""``grit mine``: hard negatives for your own rows.

grit mine rows.jsonl ROWS.jsonl                                   # by BM25
grit mine rows.jsonl ROWS.jsonl --model my_run/checkpoint --scores    # by a model, keeping its scores for distillation
grit mine rows.jsonl ROWS.jsonl --corpus passages.jsonl           # from a larger collection ({"text", "title"?} per line)

Candidates are all passages of the rows and of the corpus. A negative scores at most --margin times the query's best positive,
since a passage that scores higher is too often correct as well (only where too few score less, those that score least are added).
Existing negatives are kept, and so are all positives of a query.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import (
    Command,
    add_chunks,
    chunked_texts,
    load,
    location,
    path,
    refuse_without,
    tell_cut,
)
from python_model.corpora.hard_negatives import BM25, SCORE_CAP, SKIPPED_RANKS, Embeddings, Scorer, mine_negatives
from python_model.data.files import read_objects
from python_model.data.reading import tolerant_rows
from python_model.data.report import DataReport
from python_model.data.rows import EmbeddingRow, InstructedText, PlainText, titled_text, to_object
from python_model.support.arguments import check_at_least
from python_model.support.files import new_file


class Pool:
    """Distinct passages, and which of them answer each query (in any of its rows)."""

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
        """The index of a passage."""
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
    """The rows with their own negatives first, then mined ones up to ``count``; ``scores``: with the scorer's scores of all
    passages.
    """
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
            row = replace(row, pos_scores=(), neg_scores=())  # new ones have no score
        yield replace(row, neg=tuple(neg))


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit mine``."""
    parser.add_argument(
        "input", type=location, help="file or folder of rows in any supported format (see grit convert)"
    )
    parser.add_argument("output", type=path, help=".jsonl file to write")
    parser.add_argument("--model", type=location, help="checkpoint that scores passages; default: BM25")
    parser.add_argument("--device", help="device of the model")
    parser.add_argument("--corpus", type=location, help="additional passages to choose from")
    parser.add_argument("--negatives", type=int, default=4, help="negatives per query")
    parser.add_argument(
        "--margin", type=float, default=SCORE_CAP, help="highest score of a negative, as a share of the positive's"
    )
    parser.add_argument("--skip", type=int, default=SKIPPED_RANKS, help="number of top-ranked wrong passages to skip")
    parser.add_argument("--scores", action="store_true", help="write the scores, for distillation")
    parser.add_argument("--max-length", type=int, default=512, help="maximum tokens per text for --model")
    add_chunks(parser, "with --model, score each passage by the best of its chunks")


def run(arguments: Namespace) -> None:
    """Read the rows, score passages, choose negatives, write."""
    check_at_least("negatives", arguments.negatives, 1)
    check_at_least("skip", arguments.skip, 0)
    options_of = COMMAND.parser()
    refuse_without(arguments, options_of, "chunk_tokens", "overlap")
    refuse_without(arguments, options_of, "model", "chunk_tokens", "max_length")
    if not 0 < arguments.margin <= 1:
        raise ValueError(f"margin: expected a number > 0 and <= 1, got {arguments.margin}")
    report = DataReport()
    rows = [row for row in tolerant_rows(arguments.input, report) if isinstance(row, EmbeddingRow)]
    if not rows:
        raise ValueError(f"input: expected rows with a query, got none in {arguments.input}")
    corpus = []
    if arguments.corpus is not None:
        corpus = [titled_text(item, origin) for origin, item in read_objects(arguments.corpus)]
    pool = Pool(rows, corpus)
    passages = [text.text for text in pool.texts]
    scorer: Scorer
    if arguments.model is None:
        scorer = BM25([row.query.text for row in rows], passages)
    else:
        model = load(arguments, mode="embedding")
        texts, owners = chunked_texts(arguments, model, passages)
        scorer = Embeddings(model, [row.query for row in rows], texts, max_length=arguments.max_length, owners=owners)
        tell_cut("mine", model, f"--max-length {arguments.max_length}", "" if arguments.chunk_tokens else "passages")
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


COMMAND = Command("mine", "Mine hard negatives for your own rows, by BM25 or by a model's embeddings.", configure, run)
