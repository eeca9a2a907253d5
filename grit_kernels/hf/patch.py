"""patch(model): a transformers decoder that takes its attention mode per sample and computes no padding.

No modelling code is copied. The attention half is transformers' own AttentionInterface under the name ``"grit"``
(transformers_interface.py). The other half is the decoder's ``forward``, bound per instance: it takes ``is_causal`` as a bool
or a bool tensor (B), packs a padded batch before the embedding layer and unpacks it after the last norm.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grit_kernels.checks import described
from grit_kernels.hf import fuse as fused_modules
from grit_kernels.hf import gptj
from grit_kernels.hf.interface import BIDIRECTIONAL_WINDOWS, NAME, AttentionPass, register
from grit_kernels.packing import SamplePack


@dataclass(frozen=True)
class Family:
    """What patch() must know about the decoders of one ``config.model_type``."""

    dropout: str = "attention_dropout"
    """Config entry of the dropout on attention weights, which no kernel here has."""
    interface: bool = True
    """Attention goes through transformers' AttentionInterface; False: GPT-J's own way (gptj.py)."""


FAMILIES = {
    "gemma2": Family(),
    "gemma3_text": Family(),
    "gpt_neox": Family(),
    "gptj": Family(dropout="attn_pdrop", interface=False),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


@dataclass(frozen=True)
class PatchRecord:
    """Kept in the patched decoder's ``__dict__`` (so copies of the model carry it): its options and how to undo them."""

    attn_implementation: str
    bidirectional_window: str
    packing: bool
    fuse: bool


# a 4-D mask is passed through by transformers untouched; a packed pass needs none, and this one costs nothing
_NO_MASK_SHAPE = (1, 1, 1, 1)


def patch(model: Any, *, bidirectional_window: str = "transformers", packing: bool = True, fuse: bool = True) -> Any:
    """Make ``model``'s decoder switch its attention per sample, in place; returns ``model``.

    After it, ``model(...)`` and the bare decoder accept

    * ``is_causal``: bool or bool tensor (B). True (default) is the model as it was; False lets a sample see both sides.
      Padding may stand anywhere (2-D ``attention_mask``); padded places of a packed pass's output are 0. A window counts real
      tokens (transformers counts places, which differs only where padding stands between tokens).
    * ``sample_pack``: a :class:`SamplePack` for input that is packed already, ``input_ids`` of shape (1, tokens); the output
      stays packed. transformers' ``cu_seq_lens_q`` and ``max_length_q`` are understood the same way, and so are
      ``position_ids`` without a mask that start over inside a row (flattened input).

    A pass builds a KV cache only when it is asked to (``use_cache=True`` or ``past_key_values``, as ``generate`` does); it then
    keeps the padded layout, because a transformers cache holds padded rows. A sliding one keeps the last places of the batch, so
    pad its prompts on the left, as ``generate`` expects. A padded batch inside ``torch.compile`` stays padded as well, because
    its number of real tokens is data and no shape; compile a packed pass by giving it a ``sample_pack``.

    Args:
        model: a supported transformers decoder, with or without its language-model head.
        bidirectional_window: what a bidirectional sample sees under ``sliding_window=W``: ``"transformers"`` (``|i - j| <= W``,
            as the unpatched model) or ``"full"`` (everything, as the published GritLM models' sdpa path). Equal up to W tokens.
        packing: compute only real tokens when no cache is involved and nothing is compiled. False keeps the padded layout.
        fuse: run RMSNorm, rotary embedding and gated activations as one op each where a module behaves as the formula; the
            result differs from the unfused one by roundings. Layers with weights are called as they are, hooks included.

    Raises:
        TypeError: the model's class is not supported; the message lists what is.
        ValueError: an option has a value that is not accepted.
    """
    decoder = _decoder(model)
    if bidirectional_window not in BIDIRECTIONAL_WINDOWS:
        accepted = ", ".join(map(repr, BIDIRECTIONAL_WINDOWS))
        raise ValueError(f"bidirectional_window: expected one of {accepted}, got {bidirectional_window!r}")
    if is_patched(model):
        before = decoder._grit_patch.attn_implementation
    else:
        family = FAMILIES[decoder.config.model_type]
        if dropout := getattr(decoder.config, family.dropout, 0.0):
            raise ValueError(
                f"{family.dropout}: the model's config has {dropout}, accepted is 0: no kernel has dropout"
            )
        if getattr(decoder.config, "use_bidirectional_attention", None):
            raise ValueError(
                "use_bidirectional_attention: the model's config sets it; pass is_causal=False per call instead"
            )
        register()
        before = decoder.config._attn_implementation
        # a partial, not a closure: deepcopy and pickle carry it over to the copy
        forward = functools.partial(_forward, decoder)
        if family.interface:
            _set_attn_implementation(model, decoder, NAME)
        else:
            gptj.attach(_unwrapped(model), decoder)
            forward = functools.partial(gptj.decoder_forward, _forward, decoder)
        setattr(decoder, _forward_slot(decoder), forward)
    fused_modules.detach(decoder)
    if fuse:
        fused_modules.attach(decoder)
    decoder._grit_patch = PatchRecord(before, bidirectional_window, packing, fuse)
    return model


def unpatch(model: Any) -> Any:
    """Undo :func:`patch`, in place; a model that is not patched is left alone. Returns ``model``."""
    decoder = _decoder(model)
    if is_patched(model):
        slot = _forward_slot(decoder)
        installed = decoder.__dict__.get(slot)
        if not (isinstance(installed, functools.partial) and installed.func in (_forward, gptj.decoder_forward)):
            raise RuntimeError("model: its decoder's forward was replaced after patch(); undo that first")
        before = decoder._grit_patch.attn_implementation
        fused_modules.detach(decoder)
        if slot == "forward":
            del decoder.__dict__[slot]
        else:
            setattr(decoder, slot, types.MethodType(type(decoder).forward, decoder))
        del decoder.__dict__["_grit_patch"]
        if FAMILIES[decoder.config.model_type].interface:
            _set_attn_implementation(model, decoder, before)
        else:
            gptj.detach(_unwrapped(model), decoder, before)
    return model


def _forward_slot(decoder: Any) -> str:
    """Where the decoder keeps the forward to replace: accelerate's hooks move it and call it from around."""
    return "_old_forward" if "_old_forward" in decoder.__dict__ else "forward"


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
        raise TypeError(f"model: expected a transformers decoder, got {type(model).__name__}")
    inner = _unwrapped(model)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise TypeError(
            f"model: got {type(inner).__name__} (model type {model_type!r}), "
            f"accepted are models of type {', '.join(FAMILIES)}"
        )
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner.base_model


def _unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile's and PEFT's wrappers."""
    inner = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


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
    default = bool(getattr(self.config, "is_causal", True))

    def run(grit_pass: AttentionPass, mask: Tensor | None, **arguments: Any) -> Any:
        if not FAMILIES[self.config.model_type].interface:
            mask = gptj.carry(self, grit_pass, arguments[name], mask, arguments.get("past_key_values"))
        elif grit_pass.pack is not None:
            mask = torch.zeros(_NO_MASK_SHAPE, dtype=torch.int32, device=inputs.device)
        return original(attention_mask=mask, grit_pass=grit_pass, **arguments, **kwargs)

    compiling = torch.compiler.is_compiling()
    if sample_pack is None and cu_seq_lens_q is not None:
        if compiling:
            raise ValueError("cu_seq_lens_q: a compiled pass cannot read its values; give it a sample_pack")
        flags = default if is_causal is None else is_causal
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
        grit_pass = AttentionPass(sample_pack.causal, record.bidirectional_window, sample_pack)
        return run(grit_pass, None, position_ids=position_ids, use_cache=False, **{name: inputs})
    causal = _flags(is_causal, default, batch, inputs.device)
    pack = None
    if not caching and inputs.shape[1]:
        if attention_mask is None and position_ids is not None:
            if compiling:
                raise ValueError(
                    "position_ids: a compiled pass cannot look for samples that start over in them; "
                    "give it an attention_mask or a sample_pack too"
                )
            pack = SamplePack.from_position_ids(position_ids.expand(batch, length), causal)
            # several samples in a row cannot be told apart in the padded layout
            pack = pack if record.packing or len(pack) > batch else None
        elif record.packing and not compiling and (attention_mask is None or attention_mask.ndim == 2):
            real = inputs.new_ones((batch, length), dtype=torch.int64) if attention_mask is None else attention_mask
            pack = SamplePack.from_mask(real, causal)
    if pack is None:
        return run(
            AttentionPass(causal, record.bidirectional_window),
            attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            **{name: inputs},
        )
    if position_ids is None:
        position_ids = torch.arange(length, device=inputs.device)[None]
    packed_positions = pack.pack(position_ids.expand(batch, length))[None]
    grit_pass = AttentionPass(pack.causal, record.bidirectional_window, pack)
    outputs = run(grit_pass, None, position_ids=packed_positions, use_cache=False, **{name: pack.pack(inputs)[None]})
    return _unpack_outputs(outputs, pack)


def _unpack_outputs(outputs: Any, pack: SamplePack) -> Any:
    """Bring every (1, tokens, ...) tensor of a decoder's output back to (B, T, ...)."""

    def unpack(x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == (1, pack.tokens):
            return pack.unpack(x[0])
        if isinstance(x, Tensor) and x.ndim == 2 and x.shape[0] == pack.tokens:
            return pack.unpack(x).flatten(
                0, 1
            )  # router logits, one row per token: the padded places are masked by their user
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
        given = described(is_causal) if isinstance(is_causal, Tensor) else repr(is_causal)
        raise ValueError(f"is_causal: expected a bool or a bool tensor ({batch},), got {given}")
    return is_causal.to(device)
