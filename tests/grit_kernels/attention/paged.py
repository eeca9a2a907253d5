"""Caches laid out in pages for tests, with everything that no sample needs poisoned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_BLOCKS = (-1, -7, 2**31 - 1, 10**6)
"""Entries of a table that name no block."""


def in_pages(
    caches: Sequence[Tensor], first: Sequence[int], end: Sequence[int], block_size: int
) -> tuple[list[Tensor], Tensor]:
    """The slots [first, end) of caches (B, S, H, D) in blocks of their own, and the table (B, max_blocks).

    Blocks come in random order; slots and blocks of nobody (three) hold NaN, and entries without a slot name no block.
    """
    batch, slots = caches[0].shape[:2]
    entries = -(-slots // block_size)
    owned = [
        (b, e)
        for b in range(batch)
        for e in range(entries)
        if max(first[b], e * block_size) < min(end[b], (e + 1) * block_size)
    ]
    blocks = len(owned) + 3
    table = torch.tensor(NO_BLOCKS)[torch.randint(len(NO_BLOCKS), (batch, entries))].int()
    pages = [x.new_full((blocks, block_size, *x.shape[2:]), float("nan")) for x in caches]
    for (b, e), block in zip(owned, torch.randperm(blocks).tolist(), strict=False):
        table[b, e] = block
        here = slice(max(first[b], e * block_size), min(end[b], (e + 1) * block_size))
        for page, cache in zip(pages, caches, strict=True):
            page[block, here.start - e * block_size : here.stop - e * block_size] = cache[b, here]
    return pages, table


def in_rows(pages: Tensor, table: Tensor, slots: int) -> Tensor:
    """Back to (B, slots, H, D), NaN where an entry names no block."""
    known = (table >= 0) & (table < pages.shape[0])
    rows = pages[torch.where(known, table, 0)]
    return torch.where(known[:, :, None, None, None], rows, float("nan")).flatten(1, 2)[:, :slots]
