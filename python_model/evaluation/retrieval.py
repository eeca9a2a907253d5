"""Retrieval with exact search and one relevant document per query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from python_model.model.modeling import GritLM


@dataclass(frozen=True)
class RetrievalScores:
    """nDCG@10, MRR@10 and recall at 1, 10 and 100 over ``queries`` queries against ``documents`` documents; shares in 0..1."""

    ndcg_at_10: float
    mrr_at_10: float
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float
    queries: int
    documents: int


def ranks_of_relevant(scores: Tensor, relevant: Tensor) -> Tensor:
    """Rank (1 = best) of each query's relevant document; ties and NaN count against it. scores (Q, N), relevant int64 (Q)."""
    own = scores.gather(1, relevant[:, None])
    return (~(scores < own)).sum(dim=1)


def scores_from_ranks(ranks: Tensor, documents: int) -> RetrievalScores:
    """The metrics of relevant documents found at ``ranks``. With one relevant document, nDCG = 1 / log2(1 + rank)."""
    hit = ranks <= 10
    rank = ranks.double()
    return RetrievalScores(
        ndcg_at_10=float(torch.where(hit, 1 / torch.log2(1 + rank), 0.0).mean()),
        mrr_at_10=float(torch.where(hit, 1 / rank, 0.0).mean()),
        recall_at_1=float((ranks <= 1).double().mean()),
        recall_at_10=float(hit.double().mean()),
        recall_at_100=float((ranks <= 100).double().mean()),
        queries=ranks.shape[0],
        documents=documents,
    )


def embed_documents(model: GritLM, documents: Sequence[str], *, max_length: int = 512) -> Tensor:
    """Embeddings (N, size) of documents, without instruction."""
    prefix = model.formatter.embed_instruction("")
    vectors: Tensor = model.encode(documents, instruction=prefix, max_length=max_length, convert_to_tensor=True)
    return vectors


def evaluate_retrieval(
    model: GritLM,
    queries: Sequence[tuple[str, str]],
    documents: Sequence[str] | Tensor,
    relevant: Sequence[int],
    *,
    also_relevant: Sequence[Sequence[int]] = (),
    max_length: int = 512,
) -> RetrievalScores:
    """:func:`retrieval_ranks`, scored."""
    corpus = documents if isinstance(documents, Tensor) else embed_documents(model, documents, max_length=max_length)
    ranks = retrieval_ranks(model, queries, corpus, relevant, also_relevant=also_relevant, max_length=max_length)
    return scores_from_ranks(ranks, corpus.shape[0])


def embed_queries(model: GritLM, queries: Sequence[tuple[str, str]], *, max_length: int = 512) -> Tensor:
    """Embeddings (Q, size) of (instruction, text) queries."""
    by_instruction: dict[str, list[int]] = {}
    for index, (instruction, _) in enumerate(queries):
        by_instruction.setdefault(instruction, []).append(index)
    parts = [
        model.encode(
            [queries[i][1] for i in members],
            instruction=model.formatter.embed_instruction(instruction),
            max_length=max_length,
            convert_to_tensor=True,
        )
        for instruction, members in by_instruction.items()
    ]
    order = [i for members in by_instruction.values() for i in members]
    vectors = torch.cat(parts)
    return torch.empty_like(vectors).index_copy_(0, torch.tensor(order, device=vectors.device), vectors)


def retrieval_ranks(
    model: GritLM,
    queries: Sequence[tuple[str, str]],
    corpus: Tensor,
    relevant: Sequence[int],
    *,
    also_relevant: Sequence[Sequence[int]] = (),
    max_length: int = 512,
    owners: Sequence[int] | None = None,
) -> Tensor:
    """Rank (1 = best) of each query's document when (instruction, text) queries search ``corpus`` exactly.

    ``corpus``: embeddings (N, size) from :func:`embed_documents`. ``relevant[i]`` is the index of the document that answers
    query i; ``also_relevant[i]`` are other answers, which are excluded from its ranking. ``owners``: if ``corpus`` holds chunks,
    the index of the document that each belongs to, see :func:`best_chunks`.
    """
    vectors = embed_queries(model, queries, max_length=max_length)
    with torch.autocast(corpus.device.type, enabled=False):  # in BF16, documents with close scores would tie
        scores = vectors.float() @ corpus.float().T
    if owners is not None:
        scores = best_chunks(scores, owners)
    for row, others in zip(scores, also_relevant, strict=False):
        row[list(others)] = -torch.inf
    return ranks_of_relevant(scores, torch.as_tensor(relevant, device=corpus.device))


def best_chunks(scores: Tensor, owners: Sequence[int]) -> Tensor:
    """Scores (Q, N) of documents from those of their chunks (Q, C): a document's is that of its best chunk (MaxP, Dai and Callan,
    arXiv 1905.09217). ``owners[c]`` is the document of chunk c; every document has one.
    """
    places = torch.as_tensor(owners, device=scores.device)
    found = scores.new_full((scores.shape[0], int(places.max()) + 1), -torch.inf)
    return found.scatter_reduce_(1, places.expand_as(scores), scores, "amax")
