"""Samples of one batch have their own lengths in a cache, through patch() and in the kernel, beyond a sliding window too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import grit_kernels as gk
from tests.conftest import Backend
from tests.grit_kernels.tiny_mistral import IDS, MASKS, WINDOW, positions, tiny_model

STEPS = 9
# 14, 9, 3 and 13 real tokens: shorter and longer than the window of 6
LEFT = torch.ones_like(IDS)
LEFT[1, :5], LEFT[2, :11], LEFT[3, :1] = 0, 0, 0
CHUNKS = pytest.mark.parametrize(
    "chunks", [[14], [4, 4, 6], [8, 6]], ids=["whole", "chunked", "chunks beyond the window"]
)


def continue_per_sample(model: Any, mask: Tensor, cache: Any, chunks: list[int]) -> Tensor:
    """Greedy tokens (B, STEPS) after padded prompts: every sample continues after its own last token, wherever the cache holds
    its padding."""
    batch, lengths = len(mask), mask.sum(1)
    last_slot = (mask * torch.arange(mask.shape[1])).argmax(1)
    last, start = torch.zeros(batch, 97), 0
    for size in chunks:
        logits = model(
            IDS[:, start : start + size],
            attention_mask=mask[:, : start + size],
            position_ids=positions(mask)[:, start : start + size],
            **gk.hf.cache_keyword(model, cache),
            use_cache=True,
        ).logits
        here = (last_slot >= start) & (last_slot < start + size)
        last[here] = logits[here, last_slot[here] - start]
        start += size
    tokens = [last.argmax(-1)]
    while len(tokens) < STEPS:
        mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        where = (lengths + len(tokens) - 1)[:, None]
        logits = model(
            tokens[-1][:, None],
            attention_mask=mask,
            use_cache=True,
            position_ids=where,
            **gk.hf.cache_keyword(model, cache),
        ).logits
        tokens.append(logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)


def alone(stock: Any, mask: Tensor) -> Tensor:
    """What each sample generates by itself, without padding."""
    prompts = [IDS[b : b + 1, mask[b].bool()] for b in range(len(mask))]
    return torch.cat([stock.generate(p, max_new_tokens=STEPS, do_sample=False)[:, p.shape[1] :] for p in prompts])


@CHUNKS
@pytest.mark.parametrize("window, static", [(WINDOW, False), (None, False), (None, True)])
@torch.no_grad()
def test_right_padded_samples_of_a_cache_that_keeps_everything(
    window: int | None, static: bool, chunks: list[int]
) -> None:
    stock = tiny_model(sliding_window=window)
    model, mask = gk.patch(copy.deepcopy(stock)), MASKS["right"]
    # a cache without the config keeps every token: the window of a sample may reach back over its padding
    cache = transformers.StaticCache(stock.config, max_cache_len=32) if static else transformers.DynamicCache()
    assert torch.equal(continue_per_sample(model, mask, cache, chunks), alone(stock, mask))


@CHUNKS
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_left_padded_samples_of_a_sliding_cache(static: bool, chunks: list[int]) -> None:
    stock = tiny_model()
    model = gk.patch(copy.deepcopy(stock))

    def sliding() -> Any:
        config = stock.config
        cache = transformers.StaticCache(config, 32) if static else transformers.DynamicCache(config=config)
        assert cache.layers[0].is_sliding
        return cache

    found = continue_per_sample(model, LEFT, sliding(), chunks)
    assert torch.equal(found, alone(stock, LEFT))
    # such a cache keeps the last W - 1 positions of the batch, so it drops tokens of a right-padded sample: as in transformers
    right = [continue_per_sample(m, MASKS["right"], sliding(), chunks) for m in (stock, model)]
    assert torch.equal(*right)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_decoding_needs_no_slot_that_left_the_window(backend: Backend, static: bool) -> None:
    """cache_leftpad may follow the window: per sample, slots before it hold anything (static) or are cut off (dynamic)."""
    lengths, slots, dim = torch.tensor([20, 2, 11], dtype=torch.int32), 32, 32
    q, k, v = (torch.randn(3, slots, heads, dim) for heads in (4, 2, 2))
    for step in range(8):
        used = lengths + step + 1  # the query's own key included
        query = q[torch.arange(3), used.long() - 1][:, None]
        with backend():
            whole = gk.switch_attention_with_kvcache(
                *(x.to(backend.device) for x in (query, k, v, used)), window_size=(WINDOW - 1, 0)
            )
        first = (used - WINDOW).clamp(min=0)
        gone = (torch.arange(slots) < first[:, None])[..., None, None]
        keys, values = (x.masked_fill(gone, float("nan")) for x in (k, v))
        if not static:  # a short buffer per sample, as long as the window
            index = (first.long()[:, None] + torch.arange(WINDOW)).clamp(max=slots - 1)[..., None, None]
            keys, values = (x.take_along_dim(index, dim=1) for x in (keys, values))
            used, first = used - first, torch.zeros_like(first)
        with backend():
            kept = gk.switch_attention_with_kvcache(
                *(x.to(backend.device) for x in (query, keys, values, used)),
                cache_leftpad=first.to(backend.device),
                window_size=(WINDOW - 1, 0),
            )
        torch.testing.assert_close(kept, whole, atol=1e-5, rtol=1e-5)
