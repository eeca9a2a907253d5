"""Support for GPT-J up to transformers 5.23, where neither its layers nor its language-model head pass on keyword arguments, and
its attention is a method of the layer. (Later versions use the AttentionInterface like all others and need none of this.)

transformers passes a 4-D mask through to the layers untouched, so what the layers of a pass share is attached as an attribute to
that tensor, and each attention module's ``_attn`` is replaced on the instance. In the same way, the head's ``forward`` attaches
the call's flags to the input tensor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grit_kernels.hf import compat
from grit_kernels.hf.attention_pass import AttentionPass
from grit_kernels.hf.interface import grit_attention

OF_THE_LOSS = ("num_items_in_batch",)
"""What the head passes on to its loss."""


@dataclass
class _Carried:
    grit_pass: AttentionPass
    relative: Tensor | None


def attends_by_itself(decoder: Any) -> bool:
    """Whether attention is a method of the layers, outside transformers' AttentionInterface."""
    layers = getattr(decoder, "h", None)
    return (
        layers is not None
        and len(layers) > 0
        and hasattr(getattr(layers[0], "attn", None), "_attn")
        and decoder.config.model_type == "gptj"
    )


def carry(decoder: Any, grit_pass: AttentionPass, inputs: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
    """The 4-D tensor to pass to the decoder as its mask. ``inputs``: (B, T) ids or (B, T, hidden) states."""
    relative: Any = None
    if grit_pass.pack is None:
        # our registered mask function returns None, or the distance of every key slot to the first query
        shape_only = inputs if inputs.ndim == 3 else inputs[..., None]
        relative = compat.causal_mask(decoder.config, shape_only, attention_mask, cache)
    carrier = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=inputs.device)
    carrier._grit = _Carried(grit_pass, relative)  # type: ignore[attr-defined]
    return carrier


def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
    """Replaces ``GPTJAttention._attn``: query, key, value (B, H, T, D) -> ((B, H, T, D), None)."""
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


def _head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    # the head would drop what it has no argument for, except from the loss; the decoder understands or refuses it
    named = compat.arguments_of(type(self).forward)
    call = {name: value for name, value in kwargs.items() if name in compat.CACHE_NAMES or name not in named}
    kwargs = {name: value for name, value in kwargs.items() if name not in call or name in OF_THE_LOSS}

    def marked(inputs: Tensor) -> Tensor:
        inputs = inputs.view_as(inputs)  # leave the caller's tensor unchanged
        inputs._grit_call = call  # type: ignore[attr-defined]
        return inputs

    if args and args[0] is not None:
        args = (marked(args[0]), *args[1:])
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            kwargs[name] = marked(kwargs[name])
    return type(self).forward(self, *args, **kwargs)


def left_by_the_head(bound: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the head's caller that the head does not pass on."""
    inputs = bound.get("input_ids") if bound.get("input_ids") is not None else bound.get("inputs_embeds")
    return dict(getattr(inputs, "_grit_call", {}))


def attach(model: Any, decoder: Any) -> None:
    """Replace the attention of every layer and the head's ``forward``."""
    if model is not decoder:
        model.forward = functools.partial(_head_forward, model)
    for block in compat.layers_of(decoder):
        attention: Any = block.attn
        attention._attn = functools.partial(_attn, attention)


def detach(model: Any, decoder: Any) -> None:
    """Undo :func:`attach`."""
    model.__dict__.pop("forward", None) if model is not decoder else None
    for block in compat.layers_of(decoder):
        block.attn.__dict__.pop("_attn", None)
