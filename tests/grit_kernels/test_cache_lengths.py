"""Samples of one batch continue from a cache after their own last token: cache lengths per sample through patch()."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import grit_kernels as gk
from tests.grit_kernels.test_patch import IDS, MASKS, WINDOW, positions, tiny_model


def continue_per_sample(model: Any, mask: Tensor, cache: Any, chunks: list[int], steps: int) -> Tensor:
    """Greedy tokens (B, steps) after right-padded prompts: every sample goes on after its own last token, though the cache
    holds its padding in between."""
    batch, lengths = len(mask), mask.sum(1)
    last, start = torch.zeros(batch, 97), 0
    for size in chunks:
        logits = model(
            IDS[:, start : start + size],
            attention_mask=mask[:, : start + size],
            position_ids=positions(mask)[:, start : start + size],
            past_key_values=cache,
            use_cache=True,
        ).logits
        here = (lengths > start) & (lengths <= start + size)
        last[here] = logits[here, lengths[here] - 1 - start]
        start += size
    tokens = [last.argmax(-1)]
    while len(tokens) < steps:
        mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        where = (lengths + len(tokens) - 1)[:, None]
        step = {"position_ids": where, "cache_position": torch.tensor([mask.shape[1] - 1])}
        logits = model(tokens[-1][:, None], attention_mask=mask, past_key_values=cache, use_cache=True, **step).logits
        tokens.append(logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("chunks", [[14], [4, 4, 6]], ids=["whole", "chunked"])
@pytest.mark.parametrize("window, static", [(WINDOW, False), (None, False), (None, True)])
@torch.no_grad()
def test_samples_of_one_cache_have_their_own_lengths(window: int | None, static: bool, chunks: list[int]) -> None:
    stock = tiny_model(sliding_window=window)
    model, mask, steps = gk.patch(copy.deepcopy(stock)), MASKS["right"], 8
    # a cache without the config keeps every token: the window of a sample may reach back over its padding
    cache = transformers.StaticCache(stock.config, max_cache_len=32) if static else transformers.DynamicCache()
    found = continue_per_sample(model, mask, cache, chunks, steps)
    for b, length in enumerate(mask.sum(1).tolist()):
        alone = stock.generate(IDS[b : b + 1, :length], max_new_tokens=steps, do_sample=False)
        assert torch.equal(found[b], alone[0, length:]), b
