"""Held-out rows of a data folder, and a function that evaluates a model on them.

The folder has ``corpus.jsonl`` (passages with keys) and ``test/embedding.jsonl`` (queries whose ``key`` names the passage that
answers them), or ``test/generative.jsonl``, or all three, like the bundled sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from python_model.data.reading import read_corpus, read_embedding, read_generative
from python_model.data.rows import DataError, Row
from python_model.evaluation.language import mean_token_loss, token_loss_sums
from python_model.evaluation.retrieval import RetrievalScores, embed_documents, retrieval_ranks, scores_from_ranks
from python_model.model.modeling import GritLM
from python_model.support.arguments import check_path
from python_model.support.precision import computing

EVERYTHING = "all"
"""The name of all data sets together, where scores are given for each."""


class HeldOut:
    """Held-out queries with the index of their document, documents, and conversations.

    Attributes:
        documents, place: the corpus, and the index of each key in it.
        rows, queries: the embedding rows, and their queries.
        relevant: for each query, the index of the document its key names.
        also_relevant: for each query, the indices of its other positives.
        conversations: the generative rows.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        check_path("folder", folder)
        root = Path(folder)
        embedding, generative = (root / "test" / f"{kind}.jsonl" for kind in ("embedding", "generative"))
        if not generative.is_file() or embedding.is_file() or (root / "corpus.jsonl").is_file():
            for path in (root / "corpus.jsonl", embedding):
                if not path.is_file():
                    raise FileNotFoundError(f"data: there is no {path.relative_to(root)} in {root}")
        corpus = read_corpus(root / "corpus.jsonl") if embedding.is_file() else []
        self.documents = [row.text for row in corpus]
        self.place = {row.key: index for index, row in enumerate(corpus)}
        self.rows = read_embedding(embedding) if embedding.is_file() else []
        self.queries = [row.query for row in self.rows]
        if missing := [row for row in self.rows if row.key not in self.place]:
            raise DataError(f"{missing[0].origin}: no passage of the corpus has the key {missing[0].key!r}")
        self.relevant = [self.place[str(row.key)] for row in self.rows]
        places: dict[str, list[int]] = {}
        for index, text in enumerate(self.documents):
            places.setdefault(text, []).append(index)
        self.also_relevant = [
            [index for text in row.pos for index in places.get(text.text, []) if index != own]
            for row, own in zip(self.rows, self.relevant, strict=True)
        ]
        self.conversations = read_generative(generative) if generative.is_file() else []

    def check_datasets(self) -> None:
        """DataError if a data set has the name under which the scores of all are given."""
        rows: list[Row] = [*self.rows, *self.conversations]
        for row in rows:
            if row.dataset == EVERYTHING:
                raise DataError(
                    f"{row.origin}: dataset: expected a name other than {EVERYTHING!r}, which stands for all data sets, got it"
                )


def held_out_digest(folder: str | os.PathLike[str]) -> str:
    """Hex digest of the content of the files that :class:`HeldOut` reads."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("corpus", "test/embedding", "test/generative"):
        path = Path(folder) / f"{name}.jsonl"
        content = path.read_bytes() if path.is_file() else b""
        digest.update(hashlib.blake2b(content, digest_size=16).digest())
    return digest.hexdigest()


class Sharing(Protocol):
    """Processes that evaluate together (python_model.train.distributed.Ranks)."""

    def share(self, count: int) -> range:
        """This process's share of ``count`` rows: contiguous, in the order of the processes."""
        ...

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one after another."""
        ...


class _Alone:
    def share(self, count: int) -> range:
        return range(count)

    def all_rows(self, rows: Tensor) -> Tensor:
        return rows


def evaluate(
    model: GritLM, held_out: HeldOut, *, max_length: int = 512, bf16: bool | None = None, ranks: Sharing | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Retrieval metrics (None without queries), next-token loss (None without conversations or a language-model head), and the
    documents' embeddings.

    ``bf16``: compute in bfloat16; default: where that is not slower than float32. ``ranks``: processes that share the work; each
    receives the overall scores.

    Raises:
        TooLong: no conversation has a reply within ``max_length``.
    """
    ranks = ranks or _Alone()
    retrieval: dict[str, Any] = dict.fromkeys(field.name for field in fields(RetrievalScores))

    def mine(rows: Sequence[Any]) -> Sequence[Any]:
        own = ranks.share(len(rows))
        return rows[own.start : own.stop]

    with computing(model.device, bf16):
        corpus, found = torch.zeros(0, model.embedding_size, device=model.device), torch.zeros(0, device=model.device)
        if documents := mine(held_out.documents):
            corpus = embed_documents(model, documents, max_length=max_length)
        corpus = ranks.all_rows(corpus)
        if queries := mine(held_out.queries):
            also, relevant = mine(held_out.also_relevant), mine(held_out.relevant)
            found = retrieval_ranks(model, queries, corpus, relevant, also_relevant=also, max_length=max_length)
        if held_out.rows:
            retrieval = asdict(scores_from_ranks(ranks.all_rows(found.double()), corpus.shape[0]))
        loss = None
        if model.mode != "embedding" and held_out.conversations:
            sums = token_loss_sums(model, mine(held_out.conversations), max_length=max_length)
            row = torch.tensor([sums], dtype=torch.float64, device=model.device)
            total, count, left_out = ranks.all_rows(row).sum(0).tolist()
            loss = mean_token_loss(total, int(count), int(left_out), len(held_out.conversations), max_length)
    return {**retrieval, "next_token_loss": loss}, corpus


def cut_line(cut: int, held_out: HeldOut, limit: str) -> str:
    """One line that says how many of the held-out texts were truncated; ``limit`` is the setting that limits them."""
    texts = len(held_out.documents) + len(held_out.queries) + len(held_out.conversations)
    return f"evaluation: {cut} of {texts} texts were longer than {limit}; what follows was not read"
