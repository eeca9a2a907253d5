"""Hard negatives by BM25: passages that share words with the query but are not its answer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from tqdm.auto import tqdm

SKIPPED_RANKS = 2
"""The best ranked other passages are too often right as well."""
SCORE_CAP = 0.95
"""So are those that score above this share of the positive's score."""
SPREAD = 3
"""Of the remaining ranks every third is taken, so that not all negatives are alike."""


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def mine_negatives(
    queries: Sequence[str],
    passages: Sequence[str],
    count: int,
    allowed: Callable[[int, int], bool] = lambda query, passage: True,
    *,
    description: str = "hard negatives",
) -> list[list[int]]:
    """For query i, whose answer is passage i, the indices of ``count`` passages: ranks 3 and on that score at most 0.95 of it.

    Where too few passages share words with the query, evenly spread others fill up.

    Args:
        allowed: whether a passage may be a negative of a query, by their indices.

    Raises:
        ValueError: there are not more passages than ``count``.
    """
    if len(passages) <= count:
        raise ValueError(f"passages: expected more than the {count} negatives of each query, got {len(passages)}")
    if count == 0:
        return [[] for _ in queries]
    import bm25s

    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index([words(text) for text in passages], show_progress=False)
    step = next(
        n for n in range(len(passages) // (count + 1) + 1, 2 * len(passages)) if math.gcd(n, len(passages)) == 1
    )
    kept = SKIPPED_RANKS + SPREAD * count + 8
    found = []
    for i, query in enumerate(tqdm(queries, desc=description, unit="query", leave=False)):
        terms = list(dict.fromkeys(word for word in words(query) if word in index.vocab_dict))
        scores = index.get_scores(terms) if terms else np.zeros(len(passages), np.float32)
        least = np.partition(scores, -min(kept, len(scores)))[-min(kept, len(scores))]
        best = np.flatnonzero(scores >= least)  # with all that are equal, so that the order of the passages decides
        ranked = [
            int(j) for j in best[np.lexsort((best, -scores[best]))] if scores[j] > 0 and j != i and allowed(i, int(j))
        ]
        below = [j for j in ranked[SKIPPED_RANKS:] if scores[j] <= SCORE_CAP * scores[i]]
        chosen = below[: SPREAD * count : SPREAD]
        chosen += [j for j in below if j not in chosen][: count - len(chosen)]
        for place in range(1, len(passages)):
            if len(chosen) >= count:
                break
            other = (i + place * step) % len(passages)
            if other not in chosen and allowed(i, other):
                chosen.append(other)
        found.append(chosen)
    return found
