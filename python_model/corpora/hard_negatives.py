"""Hard negatives: passages that score high for a query but are not its answer, by BM25 or by a model's embeddings."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from tqdm.auto import tqdm

from python_model.support.arguments import check_at_least
from python_model.support.optional import require

if TYPE_CHECKING:
    from python_model.model.modeling import GritLM

SKIPPED_RANKS = 2
"""Top-ranked other passages that are skipped: too often they are correct as well."""
SCORE_CAP = 0.95
"""Passages above this share of the positive's score are skipped for the same reason."""
SPREAD = 3
"""Every third of the remaining ranks is taken, for variety."""


class Scorer(Protocol):
    """Scores of all passages for a query."""

    def rows(self) -> Iterator[np.ndarray]:
        """Yields float (passages) for each query in turn."""


class BM25:
    """BM25 (k1 1.2, b 0.75) over lower-cased words."""

    def __init__(self, queries: Sequence[str], passages: Sequence[str]) -> None:
        bm25s = require("bm25s", "data")
        self._queries, self._count = queries, len(passages)
        self._index = bm25s.BM25(k1=1.2, b=0.75)
        self._index.index([words(text) for text in passages], show_progress=False)

    def rows(self) -> Iterator[np.ndarray]:
        """BM25 of all passages, query by query."""
        for query in self._queries:
            terms = list(dict.fromkeys(word for word in words(query) if word in self._index.vocab_dict))
            yield self._index.get_scores(terms) if terms else np.zeros(self._count, np.float32)


class Embeddings:
    """Cosine similarities of a model's embeddings; ``queries`` are (instruction, text). ``owners``: if ``passages`` are chunks,
    the index of the passage that each belongs to, which is as similar as its best chunk.
    """

    def __init__(
        self,
        model: GritLM,
        queries: Sequence[tuple[str, str]],
        passages: Sequence[str],
        *,
        max_length: int = 512,
        owners: Sequence[int] | None = None,
    ) -> None:
        from python_model.evaluation.retrieval import embed_documents, embed_queries

        self._passages = embed_documents(model, passages, max_length=max_length)
        self._queries = embed_queries(model, queries, max_length=max_length)
        self._owners = owners

    def rows(self) -> Iterator[np.ndarray]:
        """Similarities of all passages, query by query."""
        from python_model.evaluation.retrieval import best_chunks

        for start in range(0, len(self._queries), 256):
            scores = (self._queries[start : start + 256] @ self._passages.T).float().cpu()
            yield from (scores if self._owners is None else best_chunks(scores, self._owners)).numpy()


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def mine_negatives(
    scorer: Scorer,
    positives: Sequence[Sequence[int]],
    passages: int,
    count: int,
    allowed: Callable[[int, int], bool] = lambda query, passage: True,
    *,
    skipped_ranks: int = SKIPPED_RANKS,
    margin: float = SCORE_CAP,
    top_only: bool = False,
    description: str = "hard negatives",
) -> Iterator[tuple[list[int], np.ndarray]]:
    """For each query, the indices of ``count`` negatives, and the scores of all passages.

    Negatives are chosen after the first ``skipped_ranks`` wrong passages, among those that score at most ``margin`` times the
    best positive (false negatives score like positives). If too few of them score above 0, evenly spaced others that score no
    more are added, and if there are none, those that score least.

    Args:
        positives: for each query, the indices of the passages that answer it.
        passages: number of passages.
        allowed: whether a passage may be a negative of a query, given their indices.
        top_only: choose from the top ranks alone, though a query whose positive is not among them finds none below it there, and
            add others whatever they score: so the data sets of ``grit data`` keep the rows that the records were trained on.

    Raises:
        ValueError: there are not more passages than ``count``.
    """
    check_at_least("count", count, 1)
    if passages <= count:
        raise ValueError(f"passages: expected more than the {count} negatives of each query, got {passages}")
    step = next(n for n in range(passages // (count + 1) + 1, 2 * passages) if math.gcd(n, passages) == 1)
    rows = tqdm(scorer.rows(), total=len(positives), desc=description, unit="query", leave=False)
    for query, (scores, right) in enumerate(zip(rows, positives, strict=True)):
        answers = set(right)
        kept = min(skipped_ranks + SPREAD * count + 7 + len(answers), passages)
        top = max(float(scores[j]) for j in answers)
        limit = top - (1 - margin) * abs(top)
        ranked = [j for j in _best(scores, kept) if j not in answers and allowed(query, j)]
        below = [j for j in ranked[skipped_ranks:] if scores[j] <= limit]
        if len(below) < SPREAD * count and not top_only:
            above = sum(scores[j] > limit for j in ranked[:skipped_ranks])
            under = _best(np.where(scores <= limit, scores, -np.inf), kept)
            below = [j for j in under if j not in answers and allowed(query, j)][skipped_ranks - above :]
        chosen = below[: SPREAD * count : SPREAD]
        chosen += [j for j in below if j not in chosen][: count - len(chosen)]
        spaced = ((right[0] + place * step) % passages for place in range(1, passages))
        others = itertools.chain((j for j in spaced if top_only or scores[j] <= limit), _rising(scores))
        while len(chosen) < count and (other := next(others, None)) is not None:
            if other not in chosen and other not in answers and allowed(query, other):
                chosen.append(other)
        yield chosen, scores


def _best(scores: np.ndarray, count: int) -> list[int]:
    """The indices of the ``count`` highest scores above 0, and of those that tie with the last one: the order of the passages
    decides."""
    least = np.partition(scores, -count)[-count]
    best = np.flatnonzero((scores >= least) & (scores > 0))
    return [int(j) for j in best[np.lexsort((best, -scores[best]))]]


def _rising(scores: np.ndarray) -> Iterator[int]:
    """All indices, from the lowest score; sorted when the first one is needed."""
    yield from np.argsort(scores, kind="stable").tolist()
