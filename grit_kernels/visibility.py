"""The visibility rule: which key may a query see? The only mask definition in the project.

A sample has ``len_k`` keys and ``len_q`` queries at its last ``len_q`` positions (bottom-right aligned), so row ``r`` has the
absolute position ``i = r + len_k - len_q``. It sees key ``j`` iff ``lo(i) <= j < hi(i)``:

    lo(i) = clamp(i - left, 0, len_k)
    hi(i) = clamp(i + right + 1, 0, len_k)         or, with per-token upper bounds,  clamp(hi[row], 0, len_k)

``left`` and ``right`` are inclusive distances. A causal sample has ``right = 0``. Neither bound ever decreases with ``i``, so

* the keys of a tile of rows are one interval, ``[lo(first row), hi(last row))``, and the keys that *every* row of the tile
  sees are ``[lo(last row), hi(first row))``: only the two edges in between compare positions;
* the transposed question, which rows see key ``j``, is an interval too.

The reference, the Triton kernels and the C++ kernels all follow the functions of this file. They take Python ints or
integer tensors (elementwise); everything is counted in tokens.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from grit_kernels.checks import check_cu_seqlens, described, is_integer

UNLIMITED = -1
"""Window entry that sets no limit on that side."""

FARTHEST = 2**30
"""Larger windows are clipped to this, so ``i - left`` and ``i + right`` fit int32 for samples of up to 2**30 tokens."""

Index = TypeVar("Index", int, Tensor)


class TileRange(NamedTuple):
    """A half-open interval that a tile needs, and its part that needs no mask.

    ``[begin, end)`` is what the tile touches, ``[full_begin, full_end)`` what needs no comparison of positions (empty when
    ``full_begin >= full_end``). Units are those of the function that returns it: keys, rows or blocks.
    """

    begin: int
    full_begin: int
    full_end: int
    end: int


def _clamp(value: Index, low: int, high: Index | int) -> Index:
    if isinstance(value, Tensor):
        return value.clamp(min=low).clamp(max=high)
    if isinstance(high, Tensor):
        return high.clamp(max=max(low, value)).clamp(min=low)
    return max(low, min(value, high))


def key_range(position: Index, len_k: Index | int, left: Index | int, right: Index | int) -> tuple[Index, Index]:
    """Keys ``[lo, hi)`` that the query at absolute ``position`` (may be negative) sees; empty when ``lo >= hi``."""
    return _clamp(position - left, 0, len_k), _clamp(position + right + 1, 0, len_k)


def row_range(
    key: Index, len_q: Index | int, len_k: Index | int, left: Index | int, right: Index | int
) -> tuple[Index, Index]:
    """Rows ``[first, last)`` that see ``key``: the transpose of :func:`key_range` (``0 <= key < len_k``)."""
    shift = len_q - len_k  # row = position + shift
    return _clamp(key - right + shift, 0, len_q), _clamp(key + left + 1 + shift, 0, len_q)


def tile_keys(first_row: int, last_row: int, len_q: int, len_k: int, left: int, right: int) -> TileRange:
    """Keys needed by rows ``[first_row, last_row)`` and, within them, the keys that all of these rows see."""
    lo_first, hi_first = key_range(first_row + len_k - len_q, len_k, left, right)
    lo_last, hi_last = key_range(last_row - 1 + len_k - len_q, len_k, left, right)
    return TileRange(lo_first, lo_last, hi_first, hi_last)


def tile_rows(first_key: int, last_key: int, len_q: int, len_k: int, left: int, right: int) -> TileRange:
    """Rows that see any key of ``[first_key, last_key)`` and, within them, the rows that see all of these keys."""
    begin, full_end = row_range(first_key, len_q, len_k, left, right)
    full_begin, end = row_range(last_key - 1, len_q, len_k, left, right)
    return TileRange(begin, full_begin, full_end, end)


def in_blocks(tile: TileRange, block: int) -> TileRange:
    """The interval in blocks of ``block``: the blocks touched, and within them those that need no mask.

    A kernel walks ``[begin, full_begin)`` masked (left edge), ``[full_begin, full_end)`` unmasked, ``[full_end, end)``
    masked (right edge). If every block needs a mask, ``full_begin == full_end == end``.
    """
    if tile.begin >= tile.end:
        return TileRange(0, 0, 0, 0)
    begin, end = tile.begin // block, -(-tile.end // block)
    full_begin = max(begin, -(-tile.full_begin // block))
    full_end = min(end, tile.full_end // block)
    if full_begin >= full_end:
        return TileRange(begin, end, end, end)
    return TileRange(begin, full_begin, full_end, end)


def dense_mask(
    len_q: int, len_k: int, left: int, right: int, hi: Tensor | None = None, *, device: torch.device | str = "cpu"
) -> Tensor:
    """The rule as a bool matrix (len_q, len_k), True where a query sees a key. For references, tests and drawings."""
    positions = torch.arange(len_q, device=device) + (len_k - len_q)
    lo, hi_closed = key_range(positions, len_k, left, right)
    upper = hi_closed if hi is None else _clamp(hi.to(positions.dtype), 0, len_k)
    keys = torch.arange(len_k, device=device)
    return (keys >= lo[:, None]) & (keys < upper[:, None])


def window_bounds(
    causal: Tensor, window_size: tuple[int, int] | Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[Tensor, Tensor]:
    """Per-sample ``left`` and ``right`` (int32 (B)) of a call.

    ``causal``: bool (B). ``window_size``: one ``(left, right)`` pair or an integer tensor (B, 2); -1 means unlimited and
    becomes a distance that no pair of positions reaches, and larger windows are clipped to it, so ``i - left`` and ``i + right``
    stay far from int32 overflow. A causal sample gets ``right = 0``.
    """
    bound = min(max_seqlen_q + max_seqlen_k, FARTHEST)
    if isinstance(window_size, Tensor):
        window = window_size.to(causal.device)
        window = torch.where(window < 0, bound, window.clamp(max=bound)).to(torch.int32)
        left, right = window[:, 0], window[:, 1]
    else:
        left, right = (
            torch.full_like(causal, min(w, bound) if w >= 0 else bound, dtype=torch.int32) for w in window_size
        )
    return left.contiguous(), torch.where(causal, 0, right).to(torch.int32)


def span_hi(cu_seqlens: Tensor, bidirectional: Tensor, right: int = UNLIMITED) -> Tensor:
    """Per-token upper bounds ``hi`` (int32 (tokens)) of samples in which runs of tokens see each other and everything else is
    causal.

    ``bidirectional``: bool (tokens), True for tokens of a bidirectional run; a run is a maximal stretch of True inside one
    sample. With ``end(i)`` the end of the run around token i (0 outside):  ``hi(i) = max(i + 1, min(end(i), i + right + 1))``.
    PrefixLM marks the prefix, CB marks all but the instruction, interleaved turns mark the user turns. ``right``: -1 is
    unlimited.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    if bidirectional.ndim != 1 or bidirectional.dtype != torch.bool:
        raise ValueError(f"bidirectional: expected torch.bool (tokens,), got {described(bidirectional)}")
    if right < UNLIMITED:
        raise ValueError(f"right: expected -1 (unlimited) or a distance >= 0, got {right}")
    tokens = bidirectional.shape[0]
    check_cu_seqlens("cu_seqlens", cu_seqlens, tokens)
    device = bidirectional.device
    index = torch.arange(tokens, device=device)
    sample = sample_ids(cu_seqlens, tokens)
    start = cu_seqlens.to(torch.int64)[sample]
    sample_end = cu_seqlens.to(torch.int64)[sample + 1]
    # the end of a run is the next token outside it: a reversed running minimum over the positions outside runs
    outside = torch.where(bidirectional, tokens, index)
    next_outside = outside.flip(0).cummin(0).values.flip(0) if tokens else outside
    end = torch.where(bidirectional, torch.minimum(next_outside, sample_end) - start, 0)
    position = index - start
    if right != UNLIMITED:
        end = torch.minimum(end, position + right + 1)
    return torch.maximum(position + 1, end).to(torch.int32)


def prefix_lm_hi(cu_seqlens: Tensor, prefix_lens: Tensor, tokens: int, right: int = UNLIMITED) -> Tensor:
    """PrefixLM: the first ``prefix_lens[b]`` (int (B)) tokens of a sample see each other, the rest is causal.

    Upper bounds and errors as of :func:`span_hi`.
    """
    position, sample = _checked_positions(cu_seqlens, "prefix_lens", prefix_lens, tokens)
    return span_hi(cu_seqlens, position < prefix_lens.to(position.device)[sample], right)


def causal_instruction_hi(cu_seqlens: Tensor, instruction_lens: Tensor, tokens: int, right: int = UNLIMITED) -> Tensor:
    """CB: the instruction (first ``instruction_lens[b]`` tokens, int (B)) is causal, the text after it sees everything.

    Upper bounds and errors as of :func:`span_hi`.
    """
    position, sample = _checked_positions(cu_seqlens, "instruction_lens", instruction_lens, tokens)
    return span_hi(cu_seqlens, position >= instruction_lens.to(position.device)[sample], right)


def _checked_positions(cu_seqlens: Tensor, name: str, lens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    check_cu_seqlens("cu_seqlens", cu_seqlens, tokens)
    batch = cu_seqlens.shape[0] - 1
    if not is_integer(lens, batch):
        raise ValueError(f"{name}: expected int32 ({batch},), got {described(lens)}")
    return positions_and_samples(cu_seqlens, tokens)


def sample_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sample (int64 (tokens)) each token of a pack belongs to."""
    index = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, index, right=True).sub_(1).clamp_(max=cu_seqlens.shape[0] - 2)


def positions_and_samples(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Position within its sample, and index of the sample, for each token of a pack (both int64 (tokens))."""
    sample = sample_ids(cu_seqlens, tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens.to(torch.int64)[sample], sample


def transpose_hi(hi: Tensor, q_start: Tensor, q_len: Tensor, k_start: Tensor, k_len: Tensor, keys: int) -> Tensor:
    """First row (relative to its sample) whose ``hi`` exceeds each key: int32 (keys), ``q_len`` if none does.

    This is the transpose of the upper bounds: rows ``[transpose_hi[j], ...)`` see key j as far as ``hi`` is concerned. Keys that
    belong to no sample get 0. No host sync: one searchsorted over ``sample * stride + value`` keys.
    """
    device = hi.device
    row_index = torch.arange(hi.shape[0], device=device)
    key_index = torch.arange(keys, device=device)
    starts_q, starts_k = q_start.to(torch.int64), k_start.to(torch.int64)
    row_sample = torch.searchsorted(starts_q, row_index, right=True).sub_(1).clamp_(min=0)
    key_sample = torch.searchsorted(starts_k, key_index, right=True).sub_(1).clamp_(min=0)
    # empty samples share their start with the next sample; searchsorted(right=True) picks the last of them, which owns rows
    row_in = row_index - starts_q[row_sample]
    key_in = key_index - starts_k[key_sample]
    row_used = (row_in >= 0) & (row_in < q_len.to(torch.int64)[row_sample])
    key_used = (key_in >= 0) & (key_in < k_len.to(torch.int64)[key_sample])
    stride = keys + 2
    clamped = hi.to(torch.int64).clamp(0, keys)
    # rows after a sample's last one sort after all its values, so the whole vector is non-decreasing
    values = row_sample * stride + torch.where(row_used, clamped, keys + 1)
    found = torch.searchsorted(values, key_sample * stride + key_in, right=True)
    first = (found - starts_q[key_sample]).clamp(min=0)
    first = torch.minimum(first, q_len.to(torch.int64)[key_sample])
    return torch.where(key_used, first, 0).to(torch.int32)
