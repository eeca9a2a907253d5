"""GPT-J's way in: neither its layers nor its language-model head hand keyword arguments down, and its attention is a method.

The head's ``forward`` leaves the call's flags with the decoder. transformers passes a 4-D mask through to the layers
untouched, so what the layers of one pass share travels as an attribute of that tensor, and each attention module's
``_attn`` is replaced on the instance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grit_kernels.hf.interface import NAME, AttentionPass, grit_attention

CALL_ARGUMENTS = ("is_causal", "sample_pack", "cu_seq_lens_q", "max_length_q")


@dataclass
class _Carried:
    grit_pass: AttentionPass
    relative: Tensor | None


def carry(decoder: Any, grit_pass: AttentionPass, inputs: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
    """The 4-D tensor to hand to the decoder as its mask. ``inputs``: (B, T) ids or (B, T, hidden) states."""
    relative: Any = None
    if grit_pass.pack is None:
        from transformers.masking_utils import create_causal_mask

        # the mask function of NAME answers: None, or the distance of every key slot to the first query
        shape_only = inputs if inputs.ndim == 3 else inputs[..., None]
        relative = create_causal_mask(
            config=decoder.config,
            inputs_embeds=shape_only,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=None,
        )
    carrier = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=inputs.device)
    carrier._grit = _Carried(grit_pass, relative)  # type: ignore[attr-defined]
    return carrier


def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
    """Stands in for ``GPTJAttention._attn``: query, key, value (B, H, T, D) -> ((B, H, T, D), None)."""
    carried = getattr(attention_mask, "_grit", None)
    if carried is None:
        raise RuntimeError(
            "a layer of a patched GPT-J was called without its decoder, or something between them copied the mask tensor"
        )
    out, _ = grit_attention(
        self,
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        carried.relative,
        scaling=float(self.scale_attn) ** -1,
        grit_pass=carried.grit_pass,
    )
    return out.transpose(1, 2), None


def decoder_forward(
    forward: Callable[..., Any],
    self: Any,
    input_ids: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``forward`` of a patched decoder in GPT-J's order of arguments, with what the head left for it."""
    kwargs.update(self.__dict__.get("_grit_call", {}))
    return forward(self, input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)


def _head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    decoder = self.base_model
    decoder._grit_call = {name: kwargs.pop(name) for name in CALL_ARGUMENTS if name in kwargs}
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        del decoder._grit_call


def attach(model: Any, decoder: Any) -> None:
    """Replace the attention of every layer and the head's ``forward``.

    GPT-J's classes ignore ``_attn_implementation``, but transformers' mask functions follow it.
    """
    if model is not decoder:
        model.forward = functools.partial(_head_forward, model)
    decoder.config._attn_implementation = NAME
    for block in decoder.h:
        block.attn._attn = functools.partial(_attn, block.attn)


def detach(model: Any, decoder: Any, attn_implementation: str) -> None:
    """Undo :func:`attach`."""
    if model is not decoder:
        del model.__dict__["forward"]
    decoder.config._attn_implementation = attn_implementation
    for block in decoder.h:
        del block.attn.__dict__["_attn"]
