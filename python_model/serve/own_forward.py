"""Packed steps of families that :mod:`python_model.serve.step` does not know, by their own forward over a pack-aware cache.

The patched decoder runs as it is, hooks and wrappers included; a :class:`grit_kernels.hf.PackedCache` writes each layer's new
states into the arena and lets attention read every sample's keys where they lie. Whether a family computes the same packed as
alone is tried on a tiny model of its kind before the server starts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import grit_kernels as gk
from python_model.model.heads import head_size
from python_model.model.limits import max_positions
from python_model.model.losses import ROWS
from python_model.model.modeling import GritLM
from python_model.model.prompts import IGNORE_INDEX
from python_model.serve.arena import Arena
from python_model.serve.step import Call, PackedStep, unfit


def refusal(model: GritLM) -> str | None:
    """Why no packed step can compute what ``model`` does, or None."""
    try:
        gk.hf.check_unwrapped(model.model)
    except ValueError as error:
        return str(error)
    if unfit(model) is None:
        return None
    whole = {model.model, gk.hf.unwrapped(model.model)} - {model.decoder[0]}
    if any(gk.hf.is_watched(module) for module in whole):
        return (
            "model: expected one whose decoder and head may be called separately, got hooks or a replaced forward on the whole "
            "(such as those of a device map)"
        )
    reason = gk.hf.packed_cache_refusal(model.model)
    if reason is None:
        return None
    kind = type(model.decoder[0]).__name__
    return f"model: expected one that computes the same in packed steps as alone, got a {kind}: {reason}"


def step_of(model: GritLM, rows: int, scratch: int) -> PackedStep:
    """The step that computes what ``model`` does, with an arena of so many rows.

    Raises:
        ValueError: there is none, with the reason.
    """
    if (reason := refusal(model)) is not None:
        raise ValueError(reason)
    config, options = model.model.config, {"dtype": model.model.dtype, "device": model.device}
    if unfit(model) is None:
        sizes = config.num_hidden_layers, config.num_key_value_heads, head_size(config)
        return PackedStep(model, Arena(*sizes, rows, scratch, **options))
    with torch.inference_mode():
        layers, heads, size, served, dtype = gk.hf.states_geometry(model.model)
    return OwnForwardStep(
        model, Arena(layers, heads, size, rows, scratch, **options | {"dtype": dtype}, memory_dim=served)
    )


def longest_text(model: GritLM) -> int:
    """Tokens up to which a served sequence may grow: the model's positions, and where rotary frequencies depend on the length,
    those with the same frequencies, since keys in the arena keep theirs. A model may have no limit of its own."""
    limits = [max_positions(model.model.config)]
    if (change := gk.hf.frequency_change(model.model)) is not None:
        limits.append(change.limit)
    return min(limits)


class OwnForwardStep(PackedStep):
    """See the top of the file. Takes what :func:`refusal` does not refuse."""

    can_be_captured = False
    """What the model's own forward reads back is not known."""

    def _prepare(self) -> None:
        """Everything is the model's own."""

    def _states(self, ids: Tensor, positions: Tensor, rows: Tensor, call: Call) -> Tensor:
        pack = gk.SamplePack(
            call.cu_seqlens,
            call.causal,
            torch.zeros_like(call.lengths),
            call.longest[0],
            ids.shape[0],
        )
        cache: Any = gk.hf.PackedCache(
            self.arena.keys,
            self.arena.values,
            rows=rows,
            starts=call.starts,
            lengths=call.lengths,
            longest=call.longest[1],
            positions=positions,
            hi=call.hi,
        )
        keyword = gk.hf.cache_keyword(self.model.model, cache)
        return self.decoder(input_ids=ids[None], sample_pack=pack, position_ids=positions[None], **keyword)[0][0]

    @torch.inference_mode()
    def label_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """By the model's own logits."""
        used = (labels != IGNORE_INDEX).nonzero()[:, 0]
        parts = [
            functional.cross_entropy(self.logits(part).float(), wanted, reduction="none")
            for part, wanted in zip(hidden[used].split(ROWS), labels[used].split(ROWS), strict=True)
        ]
        losses = hidden.new_zeros(labels.shape[0], dtype=torch.float32)
        return losses.index_copy_(0, used, torch.cat(parts)) if parts else losses

    def _head(self, hidden: Tensor) -> Tensor:
        return gk.hf.own_logits(self.model.model, hidden)
