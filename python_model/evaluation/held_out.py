"""Held-out rows of a data folder, and one call that measures a model on them.

The folder has ``corpus.jsonl`` (passages with keys) and ``test/embedding.jsonl`` (queries whose ``key`` names the passage that
answers them), or ``test/generative.jsonl``, or all three, as the bundled sample has.
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
    """Queries with the index of their document, documents, conversations.

    Attributes:
        documents, place: the corpus, and the index of each key in it.
        rows, queries: the embedding rows, and their queries.
        relevant: by query, the index of the document its key names.
        also_relevant: by query, the indices of its further positives.
        conversations: the generative rows.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
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


def evaluate(
    model: GritLM, held_out: HeldOut, *, max_length: int = 512, bf16: bool = True
) -> tuple[dict[str, Any], Tensor]:
    """Retrieval metrics, next-token loss (None without conversations or a language-model head), and the documents' embeddings.

    Raises:
        ValueError: there are no queries.
    """
    if not held_out.rows:
        raise ValueError("data: expected queries and a corpus, got conversations alone")
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        corpus = embed_documents(model, held_out.documents, max_length=max_length)
        retrieval = evaluate_retrieval(
            model,
            held_out.queries,
            corpus,
            held_out.relevant,
            also_relevant=held_out.also_relevant,
            max_length=max_length,
        )
        loss = None
        if model.mode != "embedding" and held_out.conversations:
            loss = next_token_loss(model, held_out.conversations, max_length=max_length)
    return {**asdict(retrieval), "next_token_loss": loss}, corpus
