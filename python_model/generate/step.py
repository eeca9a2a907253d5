"""One decoding step of Llama-shaped decoders without the general machinery of their modelling code.

transformers' layers serve any batch, mask and cache; for one token per row most of a step's time on a small model goes into
that generality. This is the same computation, with the model's own modules for everything that has weights:

    x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),  n = rms_norm(x)
    x = x + down_proj(act(gate_proj(m)) * up_proj(m)),                       m = rms_norm(x)

It writes into the cache that the prefill has filled. Models it does not know are decoded by their own forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

import grit_kernels as gk

if TYPE_CHECKING:
    from grit_kernels.hf.static_cache import StaticCache

KNOWN = ("Llama", "Mistral")
PARTS = {
    "self_attn": "Attention",
    "mlp": "MLP",
    "input_layernorm": "RMSNorm",
    "post_attention_layernorm": "RMSNorm",
}
"""What a known layer consists of, by attribute and end of the class's name. Whatever wraps one of them has another name."""


def supports(model: Any) -> bool:
    """Whether :class:`Step` computes what ``model`` (a causal language model) does."""
    decoder = model.get_decoder()
    kind = type(decoder).__name__.removesuffix("Model")
    if not gk.is_patched(model) or kind not in KNOWN or gk.hf.depends_on_length(decoder):
        return False
    plain = all(
        type(layer).__name__ == f"{kind}DecoderLayer"
        and all(type(getattr(layer, name)).__name__ == kind + end for name, end in PARTS.items())
        for layer in decoder.layers
    )
    # a hook (a device map's, say) or a forward of an instance's own expects to be called
    touched = any(
        m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") or _has_foreign_forward(m)
        for layer in decoder.layers
        for m in (layer, *(getattr(layer, name) for name in PARTS))
    )
    return plain and not touched and type(decoder.norm).__name__ == f"{kind}RMSNorm"


def _has_foreign_forward(module: Any) -> bool:
    """Whether the instance has a forward that is not one of patch()'s, which compute the same."""
    own = module.__dict__.get("forward")
    return own is not None and not getattr(own, "func", own).__module__.startswith("grit_kernels.")


class Step:
    """Steps of one ``decode`` call.

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
        self.window = (-1, -1) if window is None else (window - 1, 0)
        self.flags = torch.ones(first.shape[0], dtype=torch.bool, device=first.device)

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions int64 (B, 1) -> logits (B, vocabulary)."""
        decoder = self.decoder
        x = decoder.embed_tokens(ids)[:, 0]  # [B, C]
        cos, sin = decoder.rotary_emb(x, positions)  # [B, 1, D]
        half = cos.shape[-1] // 2
        # the second half of the table for -sin: rotate_half becomes two products
        low, high = -sin[..., :half], sin[..., half:]
        slot = self.cache.static_layers[0].filled
        ends = torch.full_like(self.first, slot + 1)
        for layer, stored in zip(decoder.layers, self.cache.static_layers, strict=True):
            x = x + self._attention(layer, stored, x, (cos, low, high), slot, ends)
            norm, mlp = layer.post_attention_layernorm, layer.mlp
            h = functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
            x = x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)).mul_(mlp.up_proj(h)))
            stored.filled = slot + 1
        x = functional.rms_norm(x, x.shape[-1:], decoder.norm.weight, decoder.norm.variance_epsilon)
        return self.model.get_output_embeddings()(x)

    def _attention(
        self, layer: Any, stored: Any, x: Tensor, rope: tuple[Tensor, Tensor, Tensor], slot: int, ends: Tensor
    ) -> Tensor:
        attention, norm = layer.self_attn, layer.input_layernorm
        cos, low, high = rope
        batch, dim = x.shape[0], cos.shape[-1]
        h = functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
        q, k = attention.q_proj(h), attention.k_proj(h)
        heads = q.shape[1] // dim
        both = torch.cat([q, k], dim=1).view(batch, -1, dim)  # [B, Hq + Hkv, D]
        turned = both * cos
        half = dim // 2
        turned[..., :half].addcmul_(both[..., half:], low)
        turned[..., half:].addcmul_(both[..., :half], high)
        stored.slots_of_keys[:, slot] = turned[:, heads:]
        stored.slots_of_values[:, slot] = attention.v_proj(h).view(batch, -1, dim)
        out = gk.switch_attention_with_kvcache(
            turned[:, None, :heads],
            stored.slots_of_keys,
            stored.slots_of_values,
            ends,
            self.flags,
            cache_leftpad=self.first,
            window_size=self.window,
            softmax_scale=attention.scaling,
        )
        assert isinstance(out, Tensor)
        return attention.o_proj(out.view(batch, -1))
