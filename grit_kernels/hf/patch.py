"""patch(model): a transformers decoder with an attention mode per sample that computes no padding.

No modelling code is copied. The attention half is transformers' own AttentionInterface under the name ``"grit"``
(interface.py). The other half is the decoder's ``forward`` (forward.py), bound per instance: it takes ``is_causal`` as a bool
or a bool tensor (B), packs a padded batch before the embedding layer and unpacks it after the last norm.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn

from grit_kernels.hf import compat, gptj, proof, recurrent, rope
from grit_kernels.hf import fuse as fused_modules
from grit_kernels.hf.attention_pass import BIDIRECTIONAL_WINDOWS
from grit_kernels.hf.forward import PatchRecord, exclusive, forward
from grit_kernels.hf.interface import NAME, register

FAMILIES = (*("gemma2", "gemma3_text", "gpt_neox", "gptj", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"),)
"""Model types that are fully tested (tests/grit_kernels/hf/test_families.py)."""

DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
"""Config entries for dropout on attention weights."""


def patch(
    model: Any,
    *,
    bidirectional_window: str = "transformers",
    packing: bool = True,
    fuse: bool = True,
    deterministic: bool = True,
) -> Any:
    """Make ``model``'s decoder switch its attention per sample, in place; returns ``model``.

    Afterwards ``model(...)`` and the bare decoder accept

    * ``is_causal``: bool or bool tensor (B). True (default): the unmodified model. False: a sample sees both sides.
      Padding may be anywhere (2-D ``attention_mask``); padded positions in the output of a packed pass are 0. A window counts
      real tokens (transformers counts slots, which differs only where there is padding between tokens).
    * ``sample_pack``: a :class:`SamplePack` for input that is already packed, ``input_ids`` of shape (1, tokens); the output
      stays packed. transformers' ``cu_seq_lens_q`` and ``max_length_q`` have the same effect.
    * rows with several samples: they are separated by ``position_ids`` that restart within a row, with or without a mask, or by a
      2-D mask that numbers the samples (1, 1, 2, 2, 0), or by transformers' ``seq_idx`` (0, 0, 1, 1). ``is_causal`` remains one
      flag per row.

    Without ``is_causal``, a model with a language-model head and every pass with a cache are causal, whatever the config says;
    a bare decoder follows its config (``is_causal``), as when unpatched. An unsupported keyword is an error.

    A pass builds a KV cache only on request (``use_cache=True`` or a cache, under either of its names); it then keeps the
    padded layout, because a transformers cache holds padded rows. A sliding cache keeps the last slots of the batch, so left-pad
    its prompts, as ``generate`` expects. A padded batch inside ``torch.compile`` stays padded as well, because its number of real
    tokens is data, not a shape; to compile a packed pass, pass a ``sample_pack``.

    Args:
        model: a supported transformers decoder, with or without its language-model head.
        bidirectional_window: what a bidirectional sample sees under ``sliding_window=W``: ``"transformers"`` (``|i - j| <= W``,
            like the unpatched model) or ``"full"`` (everything, like the published GritLM models' sdpa path). Both agree up to W
            tokens.
        packing: compute only real tokens when no cache is involved and nothing is compiled. False keeps the padded layout.
        fuse: run RMSNorm, rotary embedding and gated activations as one op each where a module behaves like the formula; the
            result differs from the unfused one by rounding. Layers with weights are called as they are, including hooks.
        deterministic: gradients repeat bit by bit; False lets attention's backward pass on a GPU use atomics, see
            :func:`switch_attention`.

    Raises:
        TypeError: the model's class is not supported; the message lists those that are.
        ValueError: an option has an invalid value, or the config requires something that no kernel supports.

    The model gets its own copy of the config, since the object may be shared with other models. Other threads may call a patched
    model while it is patched again or unpatched: running calls end first, and new ones wait; a call of the unpatched model that
    runs while it is patched may end in an error. Rotary scaling that depends on the length
    (``dynamic``, ``longrope``) is decided per text, so no result depends on the other texts in a batch. Layers that carry a state
    from token to token (Mamba, gated delta rule, short convolutions) begin anew with every sample; like those of the unpatched
    model, they read forwards whatever ``is_causal`` says.
    """
    decoder = _decoder(model)
    if bidirectional_window not in BIDIRECTIONAL_WINDOWS:
        accepted = ", ".join(map(repr, BIDIRECTIONAL_WINDOWS))
        raise ValueError(f"bidirectional_window: expected one of {accepted}, got {bidirectional_window!r}")
    if not is_patched(model):
        _refuse_what_is_wrong(compat.unwrapped(model), decoder)
    options = {"bidirectional_window": bidirectional_window, "packing": packing, "deterministic": deterministic}
    install(model, decoder, fuse=fuse, **options)
    return model


def install(model: Any, decoder: Any, *, fuse: bool, **options: Any) -> None:
    """:func:`patch` without its checks."""
    record = decoder.__dict__.get("_grit_patch")
    if record is not None:
        record = dataclasses.replace(record, fuse=fuse, **options)
    else:
        cache_name = compat.cache_argument(type(decoder).forward)
        if cache_name is None:
            raise TypeError(f"model: expected a decoder that takes a KV cache, got {type(decoder).__name__}")
        register()
        record = PatchRecord(
            attn_implementation=decoder.config._attn_implementation,
            fuse=fuse,
            **options,
            names=compat.arguments_of(type(decoder).forward),
            cache_name=cache_name,
            has_head=compat.unwrapped(model) is not decoder,
            own_attention=gptj.attends_by_itself(decoder),
            rope_by_length=rope.depends_on_length(decoder),
            recurrent=bool(recurrent.mixers(decoder)),
        )
    with exclusive(decoder):
        new = not is_patched(model)
        decoder._grit_patch = record
        decoder._replicate_for_data_parallel = _refuse_replica
        # a partial, not a closure, so that deepcopy and pickle carry it over; before all else, so that calls that begin wait
        setattr(decoder, fused_modules.forward_slot(decoder), functools.partial(forward, decoder, record))
        if new:
            _give_own_config(model, decoder)
            decoder.config._attn_implementation = NAME
            if record.own_attention:
                gptj.attach(compat.unwrapped(model), decoder)
            if record.rope_by_length:
                rope.attach(decoder)
            recurrent.attach(decoder)
        fused_modules.detach(decoder)
        if fuse:
            fused_modules.attach(decoder)


def _refuse_replica() -> NoReturn:
    """Instead of the copy that torch.nn.DataParallel makes of a module: its forward would remain bound to the original, so every
    replica would compute with the original's weights."""
    raise RuntimeError(
        "model: expected DistributedDataParallel or FSDP2 (fully_shard), a process for each device, got torch.nn.DataParallel, "
        "whose replicas would call the layers of the patched original; unpatch() the model to use it"
    )


def unpatch(model: Any) -> Any:
    """Undo :func:`patch`, in place; an unpatched model is left alone. Returns ``model``.

    Waits for calls of the model running in other threads.
    """
    decoder = _decoder(model)
    with exclusive(decoder):
        if not is_patched(model):
            return model
        slot, record = fused_modules.forward_slot(decoder), decoder._grit_patch
        installed = decoder.__dict__.get(slot)
        if not (isinstance(installed, functools.partial) and installed.func is forward):
            raise RuntimeError("model: its decoder's forward was replaced after patch(); undo that first")
        fused_modules.detach(decoder)
        decoder.config._attn_implementation = record.attn_implementation
        if record.own_attention:
            gptj.detach(compat.unwrapped(model), decoder)
        if record.rope_by_length:
            rope.detach(decoder)
        recurrent.detach(decoder)
        # after all else: until then, calls that begin wait
        del decoder.__dict__["_grit_patch"], decoder.__dict__["_replicate_for_data_parallel"]
        fused_modules.restore_forward(decoder, slot)
    return model


def _refuse_what_is_wrong(inner: Any, decoder: Any) -> None:
    """Refuse configs that no kernel supports, and kinds of models that fail a trial."""
    config = decoder.config
    if compat.reads_texts_both_ways(getattr(config, "use_bidirectional_attention", None)):
        raise ValueError(
            "use_bidirectional_attention: expected a causal config with is_causal=False per call, got it set in the model's"
        )
    tested = inner.config.model_type in FAMILIES
    reason = proof.attention_is_reached(inner) if tested else proof.verdict(inner).refusal
    if reason is not None:
        raise TypeError(
            f"model: expected a decoder on which patch() is right, got {type(inner).__name__} (model type "
            f"{inner.config.model_type!r}): {reason}. Tested are {', '.join(FAMILIES)}; others are tried on a tiny model"
        )
    for name in DROPOUT:
        if dropout := getattr(config, name, None):
            raise ValueError(f"{name}: expected 0, since no kernel has dropout, got {dropout} in the model's config")
    if getattr(config, "output_attentions", None):
        raise ValueError(
            "output_attentions: expected False, since the kernels keep no attention weights, got True in the model's config"
        )


def _give_own_config(model: Any, decoder: Any) -> None:
    """Give this model its own copy of the config: other models may share the object and must not change with it.

    The copy remains after unpatch(), with whatever was set on it in the meantime.
    """
    shared = decoder.config
    own = copy.copy(shared)
    for module in {*model.modules(), *compat.unwrapped(model).modules()}:
        if module.__dict__.get("config") is shared:
            module.config = own


@contextlib.contextmanager
def patched(model: Any, **options: Any) -> Iterator[Any]:
    """``with patched(model):`` patches the model within the block; a model that was patched before gets its options back."""
    before = patch_options(model)
    patch(model, **options)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            patch(model, **before)


def is_patched(model: Any) -> bool:
    """True when ``model``'s decoder runs the kernels of this package."""
    return "_grit_patch" in _decoder(model).__dict__


def patch_options(model: Any) -> dict[str, Any] | None:
    """The options that :func:`patch` was last called with, by name; None: the model is not patched."""
    record = _decoder(model).__dict__.get("_grit_patch")
    names = ("bidirectional_window", "packing", "fuse", "deterministic")
    return None if record is None else {name: getattr(record, name) for name in names}


def _decoder(model: Any) -> Any:
    """The bare decoder inside ``model``: PEFT wrappers, compiled modules and the language-model head are unwrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers decoder, got {type(model).__name__}")
    inner = compat.unwrapped(model)
    if not hasattr(getattr(inner, "config", None), "model_type"):
        raise TypeError(f"model: expected a transformers decoder, got {type(inner).__name__}")
    return compat.decoder_of(inner)
