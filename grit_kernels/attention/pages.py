"""Keys in pages: slot s of sample b lies in block ``block_table[b, s // block_size]`` of a cache, at ``s % block_size``.

A cache is (num_blocks, block_size, H, D); one without a table, (B, S, H, D), has a block per sample. Attention over pages is
defined as attention over the rows of :func:`gather_pages`; kernels that read the table themselves are compared with that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.backend import has_kernel, runs_triton, use_reference
from grit_kernels.checks import check_device, dense_rows, described, is_integer, readable
from grit_kernels.precision import autocast_dtype

MOST_PAIRS = 64
"""(row, head of a group) pairs of a sample up to which a GPU reads pages in place; with more, gathering them is little work."""


def check_block_table(block_table: Tensor, k_cache: Tensor, batch: int, device: torch.device) -> Tensor:
    """``block_table`` as int32 (B, max_blocks) with a contiguous last dimension; its entries: :func:`check_entries`."""
    if k_cache.shape[0] == 0 or k_cache.shape[1] == 0:
        raise ValueError(
            f"k_cache: expected at least one block of at least one slot beside block_table, got shape {tuple(k_cache.shape)}"
        )
    if (
        not isinstance(block_table, Tensor)
        or block_table.ndim != 2
        or not is_integer(block_table, batch, block_table.shape[1])
    ):
        raise ValueError(f"block_table: expected int32 ({batch}, max_blocks), got {described(block_table)}")
    check_device("block_table", block_table, device)
    return dense_rows(block_table.to(torch.int32))


def needed_entries(table: Tensor, first: Tensor, end: Tensor, block_size: int) -> Tensor:
    """bool (B, max_blocks): entries of the slots ``[first[b], end[b])``; the others may hold anything."""
    entry = torch.arange(table.shape[1], device=table.device)
    first, end = first[:, None], end[:, None]
    return (entry >= first // block_size) & (entry * block_size < end) & (first < end)


def check_entries(table: Tensor, k_cache: Tensor, first: Tensor, used: Tensor, end: Tensor) -> None:
    """ValueError unless the slots ``[first[b], end[b])`` lie in blocks of the cache, and those from ``used[b]`` on, which will be
    written, in blocks that no other needed entry names. Where values may be read.
    """
    blocks, block_size = k_cache.shape[:2]
    needed = needed_entries(table, first.minimum(used), end, block_size)
    wrong = needed & ((table < 0) | (table >= blocks))
    if bool(wrong.any()):
        b, entry = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"block_table: expected entries in 0..{blocks - 1}, the blocks of k_cache, for the {int(end[b])} slots of sample "
            f"{b}, got {int(table[b, entry])} as entry {entry}"
        )
    written = needed_entries(table, used, end, block_size)
    if not bool(written.any()):
        return
    shared = written & (torch.bincount(table[needed])[torch.where(written, table, 0)] > 1)
    if bool(shared.any()):
        b, entry = shared.nonzero()[0].tolist()
        raise ValueError(
            f"block_table: expected blocks of their own for the slots to which k and v are added, got block "
            f"{int(table[b, entry])}, entry {entry} of sample {b}, more than once"
        )


def gather_pages(cache: Tensor, table: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """The slots of each sample side by side, (B, S, H, D); those outside of ``[first[b], end[b])`` hold anything.

    S covers the whole table, or where values may be read the longest sample.
    """
    block_size = cache.shape[1]
    if readable(end):
        table = table[:, : -(-int(end.max()) // block_size)]
    # an entry that is not needed may name no block
    blocks = torch.where(needed_entries(table, first, end, block_size), table, 0)
    return dense_rows(cache[blocks]).flatten(1, 2)


def has_paged_kernel(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether :func:`attention_in_pages` serves these tensors: pages that need no copy, and on a GPU few rows."""
    dtype = autocast_dtype(q.device) or q.dtype
    if dtype == torch.float64 or any(x.dtype != dtype or x.stride(-1) != 1 for x in (k_cache, v_cache)):
        return False
    if use_reference(q.device) or not has_kernel("attention_decode_paged", q.device):
        return False
    if q.device.type == "cpu" and not runs_triton("attention_decode_paged", q.device):
        return True
    few = q.shape[1] * q.shape[2] // k_cache.shape[2] <= MOST_PAIRS
    return few and q.shape[0] < 2**16  # an axis of the grid


def attention_in_pages(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    table: Tensor,
    lengths: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    hi: Tensor | None,
    options: tuple[float, float],
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention that reads keys through the table; ``lengths`` = real query rows, first key slot, end of the key slots."""
    batch, max_q = q.shape[:2]
    slots = table.shape[1] * caches[0].shape[1]
    q_len, first, end = lengths
    start = torch.arange(batch, device=q.device, dtype=torch.int32) * max_q
    ranges = (start, q_len, first, (end - first).clamp(min=0))
    problem = AttentionProblem(*ranges, *bounds, hi, max_q, slots, max_q, slots, *options)
    rows = q.to(caches[0].dtype).flatten(0, 1)
    out, lse = torch.ops.grit_kernels.attention_decode_paged(rows, *caches, table, sinks, *problem.flat())
    return out.view(q.shape), lse.view(q.shape[:3])


def append(
    caches: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], used: Tensor, q_len: Tensor, table: Tensor | None
) -> None:
    """Write the ``q_len[b]`` real rows of each ``new`` (B, T, H, D) after the used slots of its cache.

    No list of the real rows is made, which would read the lengths back: a padded row repeats the sample's last real one, and a
    sample without real rows those of another, slot and value alike, so the order of writes does not matter. Where no sample has
    any, what is there is written again.
    """
    batch, rows = new[0].shape[:2]
    sample = torch.arange(batch, device=used.device)
    sample = torch.where(q_len > 0, sample, (q_len > 0).int().argmax())[:, None]
    row = torch.arange(rows, device=used.device).minimum((q_len[sample] - 1).clamp(min=0))  # [B, T]
    slot = used[sample] + row
    if table is None:
        block, place = sample, slot.clamp(max=caches[0].shape[1] - 1)
    else:
        block_size = caches[0].shape[1]
        entry = (slot // block_size).clamp(max=table.shape[1] - 1)
        block, place = table[sample, entry], slot % block_size
    real = (q_len[sample] > 0)[:, :, None, None]
    if table is not None:
        block = torch.where(real[:, :, 0, 0], block, 0)
    for cache, states in zip(caches, new, strict=True):
        cache[block, place] = torch.where(real, states[sample, row].to(cache.dtype), cache[block, place])
