"""Parity with the public implementation: the same replies as from its recipe, written with transformers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import grit_kernels as gk
from python_model import GritLM
from python_model.rag.answer import RAG
from python_model.rag.modes import Document, prompt_text
from tests.python_model.rag.public_join import PublicRAG

Q, D = "Where is the river?", Document("d", "A river flows through the city. " * 3, "Rivers")


@pytest.mark.parametrize("mode", ["document_cache", "query_document_cache", "document_query_cache"])
def test_overlapping_positions_give_the_public_implementations_replies(checkpoint: Path, mode: str) -> None:
    """It reads each text from position 0, puts the caches one behind the other, and lets generate() count on from there."""
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    tokenizer = model.tokenizer
    query, document = f"<|embed|>\n{Q}", f"<|embed|>\n{D.content}"
    texts = {
        "document_cache": [(document, True)],
        "query_document_cache": [(query, True), ("\n" + document, False)],
        "document_query_cache": [(document, True), (query, True)],
    }[mode]
    caches = []
    for text, bos in texts:
        ids = [tokenizer.bos_token_id] * bos + tokenizer(text, add_special_tokens=False)["input_ids"]
        cache = DynamicCache()
        with torch.no_grad():
            keyword = gk.hf.cache_keyword(model.model, cache)
            model.model(torch.tensor([ids]), **keyword, use_cache=True)
        caches.append([(layer.keys, layer.values) for layer in cache.layers])
    joined = DynamicCache(
        [tuple(torch.cat(x, dim=2) for x in zip(*layer, strict=True)) for layer in zip(*caches, strict=True)]
    )
    length = joined.get_seq_length()
    prompt = tokenizer(prompt_text(mode, Q, [D], marked=False), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        output = model.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, length + len(prompt), dtype=torch.int64),
            **gk.hf.cache_keyword(model.model, joined),
            max_new_tokens=8,
            min_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
        )
    want = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
    options = {"causal_states": True, "marked": False}
    assert PublicRAG(model, **options).answer(Q, [D], mode=mode, max_new_tokens=8).text == want
    parts = [rag(model, **options)._states(mode, Q, [D], None)[0] for rag in (PublicRAG, RAG)]
    assert all(part is not None for part in parts)
    overlap = int((parts[0].positions == 0).sum())
    assert overlap == len(texts) and int((parts[1].positions == 0).sum()) == 1
