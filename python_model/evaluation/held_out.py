"""Held-out rows of a data folder, and one call that measures a model on them.

The folder has ``corpus.jsonl`` (passages with keys), ``test/embedding.jsonl`` (queries whose ``key`` names the passage that
answers them) and ``test/generative.jsonl``, as the bundled sample has.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_model.data.reading import read_corpus, read_embedding, read_generative
from python_model.data.rows import DataError
from python_model.evaluation.language import next_token_loss
from python_model.evaluation.retrieval import embed_documents, evaluate_retrieval
from python_model.model.modeling import GritLM


class HeldOut:
    """Queries with the index of their document, documents, conversations."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        for name in ("corpus.jsonl", "test/embedding.jsonl", "test/generative.jsonl"):
            if not (root / name).is_file():
                raise FileNotFoundError(f"data: there is no {name} in {root}")
        corpus = read_corpus(root / "corpus.jsonl")
        self.documents = [row.text for row in corpus]
        self.place = {row.key: index for index, row in enumerate(corpus)}
        self.rows = read_embedding(root / "test" / "embedding.jsonl")
        self.queries = [row.query for row in self.rows]
        if missing := [row for row in self.rows if row.key not in self.place]:
            raise DataError(f"{missing[0].origin}: no passage of the corpus has the key {missing[0].key!r}")
        self.relevant = [self.place[str(row.key)] for row in self.rows]
        self.conversations = read_generative(root / "test" / "generative.jsonl")


def evaluate(
    model: GritLM, held_out: HeldOut, *, max_length: int = 512, bf16: bool = True
) -> tuple[dict[str, Any], Tensor]:
    """Retrieval metrics, next-token loss (None without a language-model head), and the documents' embeddings."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        corpus = embed_documents(model, held_out.documents, max_length=max_length)
        retrieval = evaluate_retrieval(model, held_out.queries, corpus, held_out.relevant, max_length=max_length)
        loss = None
        if model.mode != "embedding":
            loss = next_token_loss(model, held_out.conversations, max_length=max_length)
    return {**asdict(retrieval), "next_token_loss": loss}, corpus
