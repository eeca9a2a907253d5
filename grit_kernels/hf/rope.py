"""Rotary scaling that depends on the length of a text (``dynamic``, ``longrope``), decided per text.

transformers' rotary modules take one length per call, the largest position plus 1, and ``dynamic`` remembers it from call to
call; so a text's result would depend on its neighbours in the batch and on earlier batches. A patched pass attaches the length of
each token's text to the position tensor that reaches the rotary module, and every group of equal length gets the tables that a
fresh module would give it alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grit_kernels.hf import compat
from grit_kernels.packing import SamplePack
from grit_kernels.visibility import sample_ids


def _kinds(rotary: Any) -> list[str]:
    kind = getattr(rotary, "rope_type", None) or "default"
    return [str(k) for k in kind.values()] if isinstance(kind, dict) else [str(kind)]


def depends_on_length(decoder: Any) -> bool:
    """Whether the decoder's rotary frequencies depend on the length of the text."""
    rotary = compat.rotary_of(decoder)
    return rotary is not None and any("dynamic" in kind or kind == "longrope" for kind in _kinds(rotary))


class FrequencyChange(NamedTuple):
    """Where rotary frequencies change with the length of a text: texts of up to ``limit`` tokens have the same; longer ones have
    their own (``each``, "dynamic"), or share a second set ("longrope")."""

    limit: int
    each: bool

    def room(self, length: int) -> int | None:
        """By how many tokens a text of ``length`` may grow with the same frequencies; None: any number."""
        if length <= self.limit:
            return self.limit - length
        return 0 if self.each else None


def frequency_change(model: nn.Module) -> FrequencyChange | None:
    """Of a model whose rotary frequencies depend on the length of the text; None: they do not."""
    decoder = compat.decoder_of(model)
    if not depends_on_length(decoder):
        return None
    rotary = compat.rotary_of(decoder)
    return FrequencyChange(_scaled_beyond(rotary), any("dynamic" in kind for kind in _kinds(rotary)))


def with_lengths(positions: Tensor, lengths: Tensor) -> Tensor:
    """A view of ``positions`` (B, T) with the length of each token's text, int64 (B, T), attached."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "rope_parameters: a compiled pass cannot decide a scaling that depends on each text's length; run it uncompiled"
        )
    noted = positions.view_as(positions)
    noted._grit_lengths = lengths  # type: ignore[attr-defined]
    return noted


def from_first_token(slots: Tensor, pack: SamplePack) -> Tensor:
    """Slots (1, tokens), counted from the one of each sample's first token: whatever stands before a text makes it no longer."""
    first = pack.cu_seqlens.to(torch.int64)[sample_ids(pack.cu_seqlens, pack.tokens)]
    return slots - slots[:, first]


def from_first_slot(slots: Tensor, mask: Tensor | None) -> Tensor:
    """Slots (1, T), counted from the first real one of each row of ``mask`` (B, past + T); (B, T), or (1, T) without a mask."""
    if mask is None:
        return slots
    return (slots - (mask != 0).to(torch.int8).argmax(dim=1, keepdim=True)).clamp(min=0)


def lengths_in_pack(positions: Tensor, pack: SamplePack) -> Tensor:
    """Largest position of each token's sample plus 1; positions and result (1, tokens)."""
    sample = sample_ids(pack.cu_seqlens, pack.tokens)
    largest = positions.new_zeros(len(pack)).scatter_reduce(0, sample, positions[0], "amax")
    return (largest[sample] + 1)[None]


def lengths_in_rows(positions: Tensor, real: Tensor | None) -> Tensor:
    """Largest position of each row's real tokens plus 1; positions, ``real`` and result (B, T)."""
    if real is not None and real.shape == positions.shape:
        positions = positions.masked_fill(~real, 0)
    return (positions.amax(dim=1, keepdim=True) + 1).expand(positions.shape)


def _scaled_beyond(rotary: Any) -> int:
    """Texts up to this length have the same tables."""
    parameters = rotary.config.rope_parameters
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    known = [int(p["original_max_position_embeddings"]) for p in nested if p.get("original_max_position_embeddings")]
    return min([int(rotary.original_max_seq_len), *known])


def _tables(rotary: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces ``rotary.forward``: its result for x (B, T, ...) and positions (B, T)."""
    lengths = getattr(position_ids, "_grit_lengths", None)
    if lengths is None:
        raise RuntimeError(
            "a rotary module whose scaling depends on the length was called outside of its patched decoder, or something "
            "between them copied position_ids"
        )
    position_ids = position_ids.minimum(lengths - 1)  # padding after a text does not count
    shortest = _scaled_beyond(rotary)
    group = torch.where(lengths <= shortest, 0, lengths)
    if not any("dynamic" in kind for kind in _kinds(rotary)):
        group = group.clamp(max=shortest + 1)  # longrope has two sets of frequencies
    found: list[Tensor] = []
    for length in group.unique().tolist():
        here = group == length
        with torch.device(x.device):
            alone = type(rotary)(rotary.config)
        parts = type(alone).forward(alone, x, position_ids[here][None], *args, **kwargs)
        for index, part in enumerate(parts):
            if len(found) <= index:
                found.append(part.new_zeros(*position_ids.shape, part.shape[-1]))
            found[index][here] = part[0]
    return tuple(found)


def attach(decoder: Any) -> None:
    """Replace the rotary module's forward, on the instance."""
    rotary = compat.rotary_of(decoder)
    rotary.forward = functools.partial(_tables, rotary)


def detach(decoder: Any) -> None:
    """Undo :func:`attach`."""
    compat.rotary_of(decoder).__dict__.pop("forward", None)
