"""patch(model): a transformers decoder that takes its attention mode per sample and computes no padding.

No modelling code is copied. The attention half is transformers' own AttentionInterface under the name ``"grit"``
(transformers_interface.py). The other half is the decoder's ``forward``, bound per instance: it takes ``is_causal`` as a bool
or a bool tensor (B), packs a padded batch before the embedding layer and unpacks it after the last norm.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grit_kernels.packing import SamplePack
from grit_kernels.transformers_interface import BIDIRECTIONAL_WINDOWS, NAME, AttentionPass, register

SUPPORTED_MODEL_TYPES = ("mistral",)


@dataclass(frozen=True)
class PatchRecord:
    """Kept in the patched decoder's ``__dict__`` (so copies of the model carry it): its options and how to undo them."""

    attn_implementation: str
    bidirectional_window: str
    packing: bool


# a 4-D mask is passed through by transformers untouched; a packed pass needs none, and this one costs nothing
_NO_MASK_SHAPE = (1, 1, 1, 1)


def patch(model: Any, *, bidirectional_window: str = "transformers", packing: bool = True) -> Any:
    """Make ``model``'s decoder switch its attention per sample, in place; returns ``model``.

    After it, ``model(...)`` and the bare decoder accept

    * ``is_causal``: bool or bool tensor (B). True (default) is the model as it was; False lets a sample see both sides.
      Padding may stand anywhere (2-D ``attention_mask``); padded places of the output are 0. A window counts real tokens
      (transformers counts places, which differs only where padding stands between tokens).
    * ``sample_pack``: a :class:`SamplePack` for input that is packed already, ``input_ids`` of shape (1, tokens); the output
      stays packed. transformers' ``cu_seq_lens_q`` and ``max_length_q`` are understood the same way.

    A pass builds a KV cache only when it is asked to (``use_cache=True`` or ``past_key_values``, as ``generate`` does); it then
    keeps the padded layout, because a transformers cache holds padded rows.

    Args:
        model: a supported transformers decoder, with or without its language-model head.
        bidirectional_window: what a bidirectional sample sees under ``sliding_window=W``: ``"transformers"`` (``|i - j| <= W``,
            as the unpatched model) or ``"full"`` (everything, as the published GritLM models' sdpa path). Equal up to W tokens.
        packing: compute only real tokens when no cache is involved. False keeps the padded layout.

    Raises:
        TypeError: the model's class is not supported; the message lists what is.
        ValueError: an option has a value that is not accepted.
    """
    decoder = _decoder(model)
    if bidirectional_window not in BIDIRECTIONAL_WINDOWS:
        accepted = ", ".join(map(repr, BIDIRECTIONAL_WINDOWS))
        raise ValueError(f"bidirectional_window: got {bidirectional_window!r}, accepted are {accepted}")
    if is_patched(model):
        before = decoder._grit_patch.attn_implementation
    else:
        dropout = getattr(decoder.config, "attention_dropout", 0.0)
        if dropout:
            raise ValueError(
                f"attention_dropout: the model's config has {dropout}, accepted is 0: no kernel has dropout"
            )
        register()
        before = decoder.config._attn_implementation
        _set_attn_implementation(model, decoder, NAME)
        # a partial, not a closure: deepcopy and pickle carry it over to the copy
        decoder.forward = functools.partial(_forward, decoder)
    decoder._grit_patch = PatchRecord(before, bidirectional_window, packing)
    return model


def unpatch(model: Any) -> Any:
    """Undo :func:`patch`, in place; a model that is not patched is left alone. Returns ``model``."""
    decoder = _decoder(model)
    if is_patched(model):
        before = decoder._grit_patch.attn_implementation
        del decoder.__dict__["forward"], decoder.__dict__["_grit_patch"]
        _set_attn_implementation(model, decoder, before)
    return model


@contextlib.contextmanager
def patched(model: Any, **options: Any) -> Iterator[Any]:
    """``with patched(model):`` patches for the block and unpatches after it."""
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


def is_patched(model: Any) -> bool:
    """True when ``model``'s decoder runs the kernels of this package."""
    return "_grit_patch" in _decoder(model).__dict__


def _set_attn_implementation(model: Any, decoder: Any, name: str) -> None:
    decoder.set_attn_implementation(name)
    if model is not decoder and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)


def _decoder(model: Any) -> Any:
    """The bare decoder inside ``model``: PEFT wrappers, compiled modules and the language-model head are unwrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a transformers decoder")
    inner: Any = model
    inner = getattr(inner, "_orig_mod", inner)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise TypeError(
            f"model: got {type(inner).__name__} (model type {model_type!r}), "
            f"accepted are models of type {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner.base_model


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    is_causal: bool | Tensor | None = None,
    sample_pack: SamplePack | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> Any:
    """``forward`` of a patched decoder: chooses the packed or the padded way and calls the class's own forward."""
    record: PatchRecord = self._grit_patch
    original = functools.partial(type(self).forward, self)
    name, inputs = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("input_ids, inputs_embeds: exactly one of them is needed")
    batch, length = inputs.shape[:2]
    caching = past_key_values is not None or bool(use_cache)
    if sample_pack is None and cu_seq_lens_q is not None:
        flags = bool(getattr(self.config, "is_causal", True)) if is_causal is None else is_causal
        lengths = cu_seq_lens_q.to("cpu").diff()
        sample_pack = SamplePack.from_lengths(
            lengths, flags.to("cpu") if isinstance(flags, Tensor) else flags, device=inputs.device
        )
        is_causal = None
    if sample_pack is not None:
        if batch != 1 or sample_pack.tokens != length:
            raise ValueError(f"{name}: got shape {(batch, length)}, the sample_pack wants (1, {sample_pack.tokens})")
        if is_causal is not None:
            raise ValueError("is_causal: a sample_pack carries its own flags")
        if caching:
            raise ValueError("past_key_values, use_cache: packed input cannot fill a transformers cache")
        if position_ids is None:
            position_ids = sample_pack.position_ids[None]
        return _packed_pass(original, record, sample_pack, {name: inputs, "position_ids": position_ids, **kwargs})
    causal = _flags(is_causal, bool(getattr(self.config, "is_causal", True)), batch, inputs.device)
    own_mask = attention_mask is not None and attention_mask.ndim != 2
    if caching or own_mask or not record.packing:
        return original(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            grit_pass=AttentionPass(causal, record.bidirectional_window),
            **{name: inputs},
            **kwargs,
        )
    if attention_mask is None:
        attention_mask = inputs.new_ones((batch, length), dtype=torch.int64)
    pack = SamplePack.from_mask(attention_mask, causal)
    if position_ids is None:
        position_ids = torch.arange(length, device=inputs.device)[None]
    packed_positions = pack.pack(position_ids.expand(batch, length))[None]
    outputs = _packed_pass(
        original, record, pack, {name: pack.pack(inputs)[None], "position_ids": packed_positions, **kwargs}
    )
    return _unpack_outputs(outputs, pack)


def _packed_pass(original: Any, record: PatchRecord, pack: SamplePack, arguments: dict[str, Any]) -> Any:
    return original(
        attention_mask=torch.zeros(_NO_MASK_SHAPE, dtype=torch.int32, device=pack.device),
        use_cache=False,
        grit_pass=AttentionPass(pack.causal, record.bidirectional_window, pack),
        **arguments,
    )


def _unpack_outputs(outputs: Any, pack: SamplePack) -> Any:
    """Bring every (1, tokens, ...) tensor of a decoder's output back to (B, T, ...)."""

    def unpack(x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == (1, pack.tokens):
            return pack.unpack(x[0])
        return tuple(unpack(y) for y in x) if isinstance(x, tuple) else x

    if isinstance(outputs, tuple):
        return unpack(outputs)
    for key, value in list(outputs.items()):
        outputs[key] = unpack(value)
    return outputs


def _flags(is_causal: bool | Tensor | None, default: bool, batch: int, device: torch.device) -> Tensor:
    if is_causal is None:
        is_causal = default
    if isinstance(is_causal, bool):
        return torch.full((batch,), is_causal, dtype=torch.bool, device=device)
    if not isinstance(is_causal, Tensor) or is_causal.dtype != torch.bool or is_causal.shape != (batch,):
        given = f"{is_causal.dtype} {tuple(is_causal.shape)}" if isinstance(is_causal, Tensor) else repr(is_causal)
        raise ValueError(f"is_causal: got {given}, accepted are a bool and a bool tensor ({batch},)")
    return is_causal.to(device)
