"""Recomputes the few tokens of a joined cache whose states deviate most from what reading everything would have given.

A text that was read alone has not seen the texts that now stand before it. Most of its tokens hardly notice; those that do are
found in the second layer, the first whose keys and values depend on context: all tokens are computed up to there, and compared
with the cache. The chosen tokens are then carried through the remaining layers, attending causally to everything before them,
while all other tokens keep their states (CacheBlend, arXiv 2405.16444, which narrows its choice over several layers).

With n of T tokens chosen in a model of L layers, this costs about one layer on T tokens and L - 1 layers on n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import grit_kernels as gk
from python_model.generate.states import TextStates
from python_model.generate.step import KNOWN, supports
from python_model.model.modeling import GritLM

DECIDING_LAYER = 1
"""The first layer whose keys and values depend on what a token sees."""


@torch.no_grad()
def recompute_selected(model: GritLM, states: TextStates, starts: Sequence[int], share: float) -> TextStates:
    """Recompute ``share`` of the tokens after the first text, those whose states deviate most.

    Args:
        states: joined texts, with positions from 0.
        starts: where each text begins; the first has nothing before it and is left alone.
        share: 0 to 1, of the tokens of the other texts; rounded to whole tokens.

    Raises:
        ValueError: a share outside 0 to 1; a model whose layers this module does not know, or whose window is shorter than
            the joined texts.
    """
    check_share(share)
    first = starts[1] if len(starts) > 1 else len(states)
    count = round(share * (len(states) - first))
    decoder = model.decoder[0]
    if count == 0 or len(decoder.layers) <= DECIDING_LAYER:
        return states
    _check_model(model, len(states))
    stored = states.keys_values.to(device=model.device, dtype=model.model.dtype, copy=True)
    x = decoder.embed_tokens(states.input_ids[None].to(model.device))  # [1, T, C]
    cos, sin = decoder.rotary_emb(x, states.positions[None].to(model.device))  # [1, T, D]
    chosen: Tensor | None = None
    for index, layer in enumerate(decoder.layers):
        q, k, v = _projections(layer, x, cos, sin)  # [1, n, H, D]
        cached = stored[index].transpose(1, 2)  # [2, T, H, D], a view
        if index == DECIDING_LAYER:
            deviation = sum(
                (new[0] - old).float().square().sum((1, 2)) for new, old in zip((k, v), cached, strict=True)
            )
            assert isinstance(deviation, Tensor)
            deviation[:first] = -1
            chosen = deviation.topk(count).indices.sort().values
            x, q, k, v, cos, sin = (part[:, chosen] for part in (x, q, k, v, cos, sin))
        if chosen is None:
            keys, values, visible = k, v, None
        else:
            cached[0, chosen], cached[1, chosen] = k[0], v[0]
            keys, values, visible = cached[0][None], cached[1][None], (chosen + 1).to(torch.int32)[None]
        if index + 1 < len(decoder.layers):
            x = _rest_of_layer(layer, x, q, keys, values, visible)
    return replace(states, keys_values=stored.to(states.keys_values))


def check_share(share: float) -> None:
    """Raise ValueError unless ``share`` is a number from 0 to 1."""
    if not 0 <= share <= 1:
        raise ValueError(f"recompute_share: expected 0 to 1, got {share}")


def _check_model(model: GritLM, tokens: int) -> None:
    if not supports(model.model):
        raise ValueError(
            f"recompute_share: expected a plain {' or '.join(KNOWN)} model, got {type(model.decoder[0]).__name__}"
        )
    window = getattr(model.model.config, "sliding_window", None)
    if window is not None and window < tokens:
        raise ValueError(
            f"recompute_share: expected texts of at most the model's window, {window} tokens, got {tokens}"
        )


def _projections(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (both rotated) and values, (1, tokens, heads, head_dim)."""
    attention, norm = layer.self_attn, layer.input_layernorm
    h = gk.rms_norm(x, norm.weight, norm.variance_epsilon)
    shape = (*x.shape[:2], -1, cos.shape[-1])
    q, k = gk.rotary(attention.q_proj(h).view(shape), attention.k_proj(h).view(shape), cos, sin)
    return q, k, attention.v_proj(h).view(shape)


def _rest_of_layer(layer: Any, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """The layer's output; row i sees the keys below ``visible[i]``, by default up to its own."""
    attention, norm = layer.self_attn, layer.post_attention_layernorm
    seen = gk.switch_attention(q, keys, values, True, hi=visible, softmax_scale=attention.scaling)
    assert isinstance(seen, Tensor)
    x = x + attention.o_proj(seen.flatten(2))
    return x + layer.mlp(gk.rms_norm(x, norm.weight, norm.variance_epsilon))
