"""One decoding step of a Llama-like decoder without the general machinery of its modelling code.

transformers' layers support any batch, mask and cache; with one token per row, most of a step's time on a small model goes into
that generality. This is the same computation, using the model's own modules for everything that has weights:

    x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),  n = rms_norm(x)
    x = x + mlp(rms_norm(x))

It writes into the cache filled by the prefill. Models it does not know are decoded by their own forward method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels.attention import key_rows, prepared_attention, rectangular_problem
from grit_kernels.visibility import window_bounds
from python_model.model.heads import head_size

if TYPE_CHECKING:
    from grit_kernels.attention.problem import AttentionProblem
    from grit_kernels.hf.static_cache import StaticCache

KNOWN = ("Llama", "Mistral")
LEAST_HEAD = 32
PARTS = {
    "self_attn": ("Attention",),
    "mlp": ("MLP", "SparseMoeBlock"),
    "input_layernorm": ("RMSNorm",),
    "post_attention_layernorm": ("RMSNorm",),
}
"""The parts of a known layer, by attribute and endings of the class name."""


def supports(model: Any) -> bool:
    """Whether :class:`Step` computes what ``model`` (a causal language model) does."""
    return (
        gk.is_patched(model)
        and unlike(model, KNOWN) is None
        and heads_fit(model.config)
        and not gk.hf.depends_on_length(gk.hf.decoder_of(model))
    )


def heads_fit(config: Any) -> bool:
    """Whether the kernels take a model's heads as they are; patch() fills others up with zeros."""
    size = head_size(config)
    return size >= LEAST_HEAD and size % 8 == 0


def unlike(model: Any, kinds: Sequence[str]) -> str | None:
    """What keeps ``model`` from being computed from its layers' parts as transformers' own of these kinds is; None: nothing.

    The parts must be exactly transformers' classes with their own forward (a subclass, a wrapper or a remote class of the same
    name computes what it wants), and nobody may wait for a call of a module that is not called: a hook or a forward of its own.
    """
    decoder = gk.hf.decoder_of(model)
    kind = type(decoder).__name__.removesuffix("Model")
    if kind not in kinds:
        return f"a {type(decoder).__name__}"
    home = type(decoder).__module__

    def is_own(part: Any, *endings: str) -> bool:
        cls: Any = type(part)
        return cls.__name__ in {kind + end for end in endings} and cls.__module__ == cls.forward.__module__ == home

    if not (home.startswith("transformers.models.") and is_own(decoder, "Model") and is_own(decoder.norm, "RMSNorm")):
        return f"a {type(decoder).__name__} with a {type(decoder.norm).__name__}, not transformers' own"
    uncalled = [decoder, decoder.norm, *({model, gk.hf.unwrapped(model)} - {decoder})]
    for layer in decoder.layers:
        if not is_own(layer, "DecoderLayer"):
            return f"layers of {type(layer).__name__}"
        parts = {name: getattr(layer, name) for name in PARTS}
        for name, part in parts.items():
            if not is_own(part, *PARTS[name]):
                return f"layers whose {name} is a {type(part).__name__}"
        uncalled += [layer, *parts.values()]
    if any(gk.hf.is_watched(module) for module in uncalled):
        return "hooks or a replaced forward (such as those of a device map)"
    return None


class Step:
    """The steps of one ``decode`` call.

    Args:
        model: see :func:`supports`.
        cache: filled by the prefill; every row's used slots are one interval that ends where the next token goes.
        first: int32 (B), the first used slot of each row.
    """

    def __init__(self, model: Any, cache: StaticCache, first: Tensor) -> None:
        self.model, self.decoder, self.cache, self.first = model, model.get_decoder(), cache, first
        # Llama's attention has no window, whatever its config carries
        mistral = type(self.decoder).__name__ == "MistralModel"
        window = self.decoder.config.sliding_window if mistral else None
        causal = torch.ones_like(first, dtype=torch.bool)
        pair = (-1, -1) if window is None else (window - 1, 0)
        self.bounds = window_bounds(causal, pair, 1, cache.static_layers[0].slots)
        self.one = torch.ones_like(first)

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions int64 (B, 1) -> logits (B, vocabulary)."""
        decoder = self.decoder
        x = decoder.embed_tokens(ids)[:, 0]  # [B, C]
        cos, sin = decoder.rotary_emb(x, positions)  # [B, 1, D]
        slot = self.cache.static_layers[0].filled
        lengths = (self.one, self.first, torch.full_like(self.first, slot + 1))
        # what the layers share, by their scale: made by the first one
        prepared: dict[float, tuple[AttentionProblem, dict[Any, Tensor]]] = {}
        branch: Tensor | None = None  # of the previous layer, not yet added to x
        for layer, stored in zip(decoder.layers, self.cache.static_layers, strict=True):
            h, x = add_and_norm(x, branch, layer.input_layernorm)
            attended = self._attention(layer, stored, h, cos, sin, slot, lengths, prepared)
            h, x = add_and_norm(x, attended, layer.post_attention_layernorm)
            branch = layer.mlp(h)
            stored.filled = slot + 1
        h, _ = add_and_norm(x, branch, decoder.norm)
        return self.model.get_output_embeddings()(h)

    def _attention(
        self,
        layer: Any,
        stored: Any,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot: int,
        lengths: tuple[Tensor, Tensor, Tensor],
        prepared: dict[float, tuple[AttentionProblem, dict[Any, Tensor]]],
    ) -> Tensor:
        attention = layer.self_attn
        shape = (h.shape[0], 1, -1, cos.shape[-1])
        q, k = gk.rotary(attention.q_proj(h).view(shape), attention.k_proj(h).view(shape), cos, sin)
        stored.slots_of_keys[:, slot] = k[:, 0]
        stored.slots_of_values[:, slot] = attention.v_proj(h).view(shape)[:, 0]
        keys, values, step = key_rows(q, stored.slots_of_keys, stored.slots_of_values)
        scale = attention.scaling
        if scale not in prepared:
            slots, options = stored.slots_of_keys, (scale, 0.0)
            prepared[scale] = (rectangular_problem(q, slots, step, lengths, self.bounds, None, options), {})
        out = prepared_attention(q.flatten(0, 1), keys, values, *prepared[scale])
        return attention.o_proj(out.view(h.shape[0], -1))


def add_and_norm(x: Tensor, branch: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + branch), x + branch)."""
    if branch is None:
        return gk.rms_norm(x, norm.weight, norm.variance_epsilon), x
    return gk.rms_norm(branch, norm.weight, norm.variance_epsilon, residual=x)
