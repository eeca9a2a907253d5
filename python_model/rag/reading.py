"""Reading texts into states: one forward pass that fills a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

import grit_kernels as gk
from python_model.generate.states import TextStates, concatenate, from_cache, to_cache
from python_model.model.modeling import GritLM


@torch.no_grad()
def read(model: GritLM, texts: Sequence[Sequence[int]], *, causal: bool, start: int = 0) -> list[TextStates]:
    """States of each text (token ids, at least one each), with key positions beginning at ``start``; without padding."""
    if not texts or not all(len(ids) for ids in texts):
        raise ValueError("texts: expected at least one token per text, got none or an empty one")
    model.check_patch()
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    cache = gk.hf.new_cache()
    model.decoder[0](
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device) if len(texts) > 1 else None,
        position_ids=torch.arange(start, start + longest, device=model.device)[None],
        is_causal=causal,
        cache=cache,
    )
    found = from_cache(cache, [torch.tensor(text) for text in texts], causal)
    return [replace(states, positions=states.positions + start) for states in found]


@torch.no_grad()
def recompute_first(model: GritLM, states: TextStates, starts: Sequence[int], count: int) -> TextStates:
    """Let the first ``count`` tokens of each joined text see everything before it.

    ``starts``: where texts begin in the joined ``states``; the first text has nothing before it and is left alone. The
    recomputed tokens attend causally. Afterwards no text but the first begins with tokens computed as the start of a sequence,
    which later tokens would attend to most (EPIC, arXiv 2410.15332).
    """
    ends = [*starts[1:], len(states)]
    for start, end in zip(starts, ends, strict=True):
        size = min(count, end - start)
        if start == 0 or size <= 0:
            continue
        cache = to_cache(states.slice(0, start).to(device=model.device, dtype=model.model.dtype))
        part = states.slice(start, start + size)
        model.decoder[0](
            input_ids=part.input_ids[None].to(model.device),
            position_ids=part.positions[None].to(model.device),
            cache=cache,
        )
        fresh = torch.stack([torch.stack([k[0], v[0]])[:, :, start:] for k, v in gk.hf.cached_states(cache)])
        redone = replace(part, keys_values=fresh.to(states.keys_values))
        states = concatenate([states.slice(0, start), redone, states.slice(start + size)])
    return states
