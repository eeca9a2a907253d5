"""BM25 with stemming and stop words: what an embedding model has to beat."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from python_model.evaluation.retrieval import RetrievalScores, ranks_of_relevant, scores_from_ranks


def bm25(queries: Sequence[str], documents: Sequence[str], relevant: Sequence[int]) -> RetrievalScores:
    """:func:`bm25_ranks`, scored."""
    return scores_from_ranks(bm25_ranks(queries, documents, relevant), len(documents))


def bm25_ranks(queries: Sequence[str], documents: Sequence[str], relevant: Sequence[int]) -> torch.Tensor:
    """Rank (1 = best) of each query's document under BM25 (Lucene's variant, Pyserini's k1 = 0.9 and b = 0.4) over English words.

    Words are runs of letters and digits, so the parts of ``an_identifier`` count; stop words are left out, the rest is stemmed by
    Snowball's algorithm.

    Args:
        queries: texts without instructions, which would only add the same words to each.
        documents: what is searched.
        relevant: per query the index of the document that answers it; ties count against it.

    Raises:
        ImportError: bm25s or snowballstemmer is not installed (extra "demo").
    """
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN
    from snowballstemmer import stemmer

    stem = stemmer("english").stemWords

    def words(text: str) -> list[str]:
        found = re.findall(r"[^\W_]+", text.lower())
        return list(stem([word for word in found if word not in STOPWORDS_EN]))

    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index([words(document) for document in documents], show_progress=False)
    scores = torch.zeros(len(queries), len(documents))
    for row, query in enumerate(queries):
        known = [word for word in words(query) if word in index.vocab_dict]
        if known:  # a query without a known word finds nothing: every document ties
            scores[row] = torch.from_numpy(index.get_scores(known))
    return ranks_of_relevant(scores, torch.as_tensor(list(relevant)))
