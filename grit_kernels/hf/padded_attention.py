"""Attention of padded rows: queries that are the last slots of their keys, with padding and caches of any kind.

A sample's keys are taken as one interval of slots; if a mask leaves holes, keys and rows are moved to the front first. The GPU's
decode kernel reads a byte per slot instead: a step that decodes moves no key and reads no mask back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grit_kernels.attention import (
    decode_attention,
    has_decode_kernel,
    key_rows,
    prepared_attention,
    rectangular_problem,
)
from grit_kernels.attention.checks import check_qkv, check_softmax_options
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.checks import described, may_read_back
from grit_kernels.hf.attention_pass import AttentionPass

NO_KEY = 2**30
"""In the masks of interface.py: this slot holds no key."""


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor | None,
    grit_pass: AttentionPass,
    sliding_window: int | None,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """(B, Q, H, D) queries that are the last slots of (B, K, Hkv, D) keys; padding and caches of any kind.

    ``relative``: what the mask function of interface.py made.
    """
    batch, q_length = q.shape[:2]
    slots = k.shape[1]
    decodes = q_length == 1 and has_decode_kernel(q, k, v, sinks)
    layout: _KeyLayout | None = None
    used: _UsedSlots | None = None
    if relative is not None and decodes:
        used = _used_slots(relative, batch)
    elif relative is not None:
        layout = _key_layout(relative, q_length)
    holes = None if layout is None else layout.holes
    if holes is not None:
        q, k, v = _reorder(q, holes.rows), _reorder(k, holes.keys), _reorder(v, holes.keys)
    q, k, v = check_qkv(q, k, v, ndim=4)
    keys, values, step = key_rows(q, k, v, sinks)

    def problem() -> AttentionProblem:
        bounds = grit_pass.window_bounds(sliding_window, q_length, slots)
        if used is not None:
            lengths, bounds = used.lengths, used.bounds(bounds[0])
        elif layout is None:
            first = torch.zeros(batch, dtype=torch.int32, device=q.device)
            lengths = (torch.full_like(first, q_length), first, torch.full_like(first, slots))
        else:  # a mask of one row serves the whole batch
            rows, first, end = (x.expand(batch).contiguous() for x in (layout.rows, layout.first, layout.end))
            lengths = (rows, first, end)
        return rectangular_problem(
            q, k, step, lengths, bounds, None, check_softmax_options(scaling, softcap, q.shape[-1])
        )

    of_mask = layout if used is None else used
    key = (sliding_window, scaling, softcap, batch, q_length, slots, step, id(of_mask))
    shared, plans = grit_pass.prepare(key, problem, of_mask)
    rows_of_q = q.flatten(0, 1)
    if decodes:
        slots_in_use = None if used is None else used.used
        return decode_attention(rows_of_q, keys, values, shared, used=slots_in_use, sinks=sinks).view(q.shape)
    out = prepared_attention(rows_of_q, keys, values, shared, plans, sinks, grit_pass.deterministic).view(q.shape)
    return out if holes is None else _reorder(out, holes.rows_back)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """(B, T, H, D) with the rows of each sample in ``order`` (int64 (B, T), or (1, T) for all samples)."""
    # not take_along_dim: its broadcasting fixes the sizes of a compiled graph
    return x.gather(1, order[:, :, None, None].expand(x.shape[0], -1, *x.shape[2:]))


@dataclass(frozen=True)
class _Holes:
    """Orders that move a sample's real keys and real query rows to the front, and the rows back to their places."""

    keys: Tensor  # int64 (B, K)
    rows: Tensor  # int64 (B, Q)
    rows_back: Tensor  # int64 (B, Q)


@dataclass(frozen=True)
class _KeyLayout:
    """Where a padded batch's keys and query rows lie, read off a mask once and reused by all layers."""

    first: Tensor  # int32 (B), first used slot
    end: Tensor  # int32 (B), one past the last used slot
    rows: Tensor  # int32 (B), query rows that are real (right padding excluded)
    holes: _Holes | None  # None when every sample's keys are one interval; else first, end, rows count after moving


def _key_layout(relative: Tensor, q_length: int) -> _KeyLayout:
    cached = getattr(relative, "_grit_layout", None)
    if cached is not None:
        return cached
    distance = relative[:, 0, 0]  # [B, K]
    slots = distance.shape[1]
    valid = distance < NO_KEY
    count = valid.sum(dim=1, dtype=torch.int32)
    index = torch.arange(slots, device=distance.device)
    first = torch.where(valid, index, slots).amin(dim=1)
    last = torch.where(valid, index, -1).amax(dim=1)
    # rows up to the last key are real; a sample without keys has none
    rows = torch.where(valid, distance, -1).amax(dim=1).add(1).clamp(0, q_length)
    holes, moved = None, True  # where nothing may be read back, everything is always moved
    if may_read_back(distance):
        ahead = torch.where(valid, distance - index, NO_KEY)  # of the first query, the same at every key
        mixed = (ahead != ahead.amin()) & valid
        found = int((last - first + 1 > count).any() + 2 * mixed.any())  # read back at once
        moved = found % 2 == 1
        if found > 1:
            raise ValueError(
                f"attention_mask: expected (B, T) with 0 at padding and 1 at real tokens, got {described(relative)}"
            )
    if moved:
        # row r is the key at distance r: a hole among the queries' own slots is a padded row
        row = torch.where(valid & (distance >= 0) & (distance < q_length), distance, q_length).to(torch.int64)
        real = torch.zeros(distance.shape[0], q_length + 1, dtype=torch.bool, device=distance.device)
        real = real.scatter(1, row, True)[:, :q_length]
        order = torch.sort((~real).to(torch.int8), dim=1, stable=True).indices
        holes = _Holes(
            torch.sort((~valid).to(torch.int8), dim=1, stable=True).indices, order, torch.argsort(order, dim=1)
        )
        first, rows = torch.zeros_like(first), real.sum(dim=1)
    layout = _KeyLayout(
        first.clamp(max=slots).to(torch.int32),
        (first + count).clamp(max=slots).to(torch.int32),
        rows.to(torch.int32),
        holes,
    )
    if not torch.compiler.is_compiling():
        relative._grit_layout = layout  # type: ignore[attr-defined]
    return layout


@dataclass(frozen=True)
class _UsedSlots:
    """Which slots hold keys of rows that decode: no key is moved for them and nothing is read back."""

    used: Tensor  # bool (B, K)
    rank: Tensor  # int32 (B, K), used slots up to and with each
    lengths: tuple[Tensor, Tensor, Tensor]  # int32 (B): query rows (0 for padding), 0, end of the used slots

    def bounds(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` (int32 (B)) that count slots, for a ``left`` that counts keys."""
        hidden = (self.rank[:, -1] - 1 - left).clamp(min=0)
        first = (self.rank <= hidden[:, None]).sum(dim=1, dtype=torch.int32)
        return (self.lengths[2] - 1 - first).clamp(min=0), torch.zeros_like(left)


def _used_slots(relative: Tensor, batch: int) -> _UsedSlots:
    """What a mask says of rows that decode, read off it once and reused by all layers."""
    cached: dict[int, _UsedSlots] = getattr(relative, "_grit_used", {})
    if batch in cached:
        return cached[batch]
    distance = relative[:, 0, 0].expand(batch, relative.shape[-1])  # a mask of one row serves the whole batch
    used = (distance < NO_KEY).contiguous()
    slot = torch.arange(distance.shape[1], dtype=torch.int32, device=distance.device)
    rows = (distance == 0).any(dim=1).to(torch.int32)
    end = torch.where(used, slot + 1, 0).amax(dim=1).to(torch.int32)
    found = _UsedSlots(used, used.cumsum(dim=1, dtype=torch.int32), (rows, torch.zeros_like(rows), end))
    if not torch.compiler.is_compiling():
        relative._grit_used = {**cached, batch: found}  # type: ignore[attr-defined]
    return found
