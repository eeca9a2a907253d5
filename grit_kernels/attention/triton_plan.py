"""The order in which tiles run: a table [tiles] of (sample, block), longest first, computed on the device.

A pack mixes samples of 20 and 2000 tokens, causal and bidirectional, so tiles differ a hundredfold in work. The GPU hands
out programs in the order of their index; with the longest tiles first, no long tile is left alone at the end. Sizes come
from the device tensors, the number of tiles from bounds that the host knows, so nothing is read back:

* rectangular (``rows > 0`` rows per sample): slot t is block ``t % ceil(rows / BLOCK)`` of sample ``t // ceil(rows / BLOCK)``;
* packed: sample b takes the slots from ``start[b] // BLOCK + b`` on. ``ceil(n / BLOCK)`` slots always fit before those of the
  next sample, and all need ``total // BLOCK + B``; the slots left over have block -1 and end at once.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem, SampleTables, Shapes
from grit_kernels.attention.triton_common import tile_keys, tile_rows
from grit_kernels.attention.triton_configs import Config, choose_config
from grit_kernels.triton_launch import processor_count

SHORTEST_SPLIT = 256
"""With fewer keys than this a sample is never split."""

LARGEST_GRID_AXIS = 65535
"""CUDA's limit of a grid's second and third axis; of triton_decode's grids the last holds the samples."""

_FEW_PAIRS = 16
"""(row, head of a group) pairs of a sample that is split beside others: the smallest tile of a matrix product."""

LARGEST_SORT = 16384
"""Beyond this many tiles each runs many waves, and their order no longer matters; ranking is quadratic."""

_SECTION_BYTES = 24 << 20
_ALIGNED = 4  # int32 numbers in 16 bytes


class Split(NamedTuple):
    """Which samples triton_decode takes: those of at most ``rows`` rows and at least ``keys`` keys, see :func:`splits_sample`."""

    rows: int
    keys: int


NO_SPLIT = Split(-1, 0)


class Plan(NamedTuple):
    """One kernel's order of tiles.

    ``table``: int32 (tiles, 2) of (sample, block). ``counter``: int32 (1), 0 between launches; programs of a persistent grid draw
    tiles from it. ``side_by_side``: heads that run side by side so their operands stay in L2.
    """

    table: Tensor
    counter: Tensor
    tiles: int
    side_by_side: int


def section_size(tiles: int) -> int:
    """int32 numbers of one kernel's plan: the counter, then the table, each from a multiple of 16 bytes on."""
    return _ALIGNED + triton.cdiv(2 * tiles, _ALIGNED) * _ALIGNED


class TileGrid(NamedTuple):
    """What the host knows of a kernel's plan: ``tiles`` of each of ``heads``, see :class:`Plan`.

    ``rows``: those of a sample (keys where tiles are of keys) in a rectangular batch, 0 for a pack. ``split``: samples that have
    no tiles.
    """

    config: Config
    over_keys: bool
    tiles: int
    side_by_side: int
    heads: int
    rows: int
    split: Split = NO_SPLIT

    @property
    def splits_all(self) -> bool:
        """Whether no sample is left for tiles."""
        return self.split != NO_SPLIT and not self.split.keys

    @property
    def size(self) -> int:
        """int32 numbers of the plan, see :func:`section_size`."""
        return section_size(self.tiles)

    def plan(self, numbers: Tensor) -> Plan:
        """``numbers`` (int32 (size)) split into its parts."""
        table = numbers[_ALIGNED : _ALIGNED + 2 * self.tiles].view(self.tiles, 2)
        return Plan(table, numbers[:1], self.tiles, self.side_by_side)


@triton.jit
def splits_sample(len_q, len_k, most_rows, least_keys):
    """Whether a sample belongs to a :class:`Split`."""
    return (len_q <= most_rows) & (len_k >= least_keys)


@triton.jit(do_not_specialize=["batch", "tiles", "rows", "search_steps", "split_rows", "split_keys"])
def list_tiles_kernel(
    p_table, p_work, p_counter, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi, batch, tiles, rows, search_steps,
    split_rows, split_keys,
    OVER_KEYS: tl.constexpr, RECTANGULAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_HI: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Fill the table in slot order, and the number of blocks that each tile walks over; clear the counter.

    OVER_KEYS: tiles of BM rows walk over blocks of BN keys (p_hi = hi); otherwise tiles of BN keys walk over blocks of BM
    rows (p_hi = transpose_hi).
    """
    if tl.program_id(0) == 0:
        tl.store(p_counter, 0)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    m_slot = slot < tiles
    p_start = p_q_start if OVER_KEYS else p_k_start
    TILE: tl.constexpr = BM if OVER_KEYS else BN
    if RECTANGULAR:
        per_sample = tl.cdiv(rows, TILE)
        sample = tl.minimum(slot // per_sample, batch - 1)
        block = slot - sample * per_sample
    else:
        # the last sample whose first slot is not after this one
        sample = tl.zeros([SLOTS], dtype=tl.int32)
        above = tl.zeros([SLOTS], dtype=tl.int32) + batch
        for _ in range(0, search_steps):
            middle = (sample + above) // 2
            inside = tl.load(p_start + middle) // TILE + middle <= slot
            sample = tl.where(inside, middle, sample)
            above = tl.where(inside, above, middle)
        block = slot - (tl.load(p_start + sample) // TILE + sample)
    len_q = tl.load(p_q_len + sample)
    len_k = tl.load(p_k_len + sample)
    left = tl.load(p_left + sample)
    right = tl.load(p_right + sample)
    q_start = tl.load(p_q_start + sample)
    k_start = tl.load(p_k_start + sample)
    if OVER_KEYS:
        begin = block * TILE
        owned = rows if RECTANGULAR else len_q
        real = begin < len_q
        first_block, _a, _b, last_block = tile_keys(
            begin, begin + TILE, p_hi + q_start, len_q, len_k, left, right, BN, HAS_HI
        )
        used = (begin < owned) & (splits_sample(len_q, len_k, split_rows, split_keys) == 0)
    else:
        # a padded sample owns all its slots, including those before its first key
        shift = k_start - sample * rows if RECTANGULAR else tl.zeros_like(k_start)
        begin = block * TILE - shift
        owned = rows - shift if RECTANGULAR else len_k
        last = tl.minimum(begin + TILE, len_k)
        real = (begin < len_k) & (last > 0)
        begin_safe = tl.where(real, tl.maximum(begin, 0), 0)
        last_safe = tl.where(real, last, 1)
        first_block, _a, _b, last_block = tile_rows(
            begin_safe, last_safe, p_hi + k_start, len_q, len_k, left, right, BM, HAS_HI
        )
        used = begin < owned
    work = tl.where(real, last_block - first_block, 0)
    used = used & m_slot
    tl.store(p_table + slot * 2, sample, mask=m_slot)
    tl.store(p_table + slot * 2 + 1, tl.where(used, block, -1), mask=m_slot)
    tl.store(p_work + slot, tl.where(used, work, -1), mask=m_slot)


@triton.jit(do_not_specialize=["tiles"])
def sort_tiles_kernel(p_table, p_work, p_sorted, tiles, SLOTS: tl.constexpr, CHUNK: tl.constexpr):
    """Write each tile at its rank: the number of tiles with more work, or as much and a smaller slot. Deterministic."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    m_slot = slot < tiles
    work = tl.load(p_work + slot, mask=m_slot, other=0)
    rank = tl.zeros([SLOTS], dtype=tl.int32)
    for begin in range(0, tiles, CHUNK):
        other = begin + tl.arange(0, CHUNK)
        other_work = tl.load(p_work + other, mask=other < tiles, other=-2)
        ahead = (other_work[None, :] > work[:, None]) | (
            (other_work[None, :] == work[:, None]) & (other[None, :] < slot[:, None])
        )
        rank += tl.sum(ahead.to(tl.int32), 1)
    tl.store(p_sorted + rank * 2, tl.load(p_table + slot * 2, mask=m_slot, other=0), mask=m_slot)
    tl.store(p_sorted + rank * 2 + 1, tl.load(p_table + slot * 2 + 1, mask=m_slot, other=0), mask=m_slot)


@triton.jit(do_not_specialize=["batch", "keys", "search_steps", "row_steps"])
def transpose_hi_kernel(
    p_hi, p_first_row, p_q_start, p_q_len, p_k_start, p_k_len, batch, keys, search_steps, row_steps, SLOTS: tl.constexpr
):
    """visibility.transpose_hi: the first row of its sample that sees each key, 0 for a key that belongs to none."""
    key = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    # the last sample whose first key is not after this one
    sample = tl.zeros([SLOTS], dtype=tl.int32)
    above = tl.zeros([SLOTS], dtype=tl.int32) + batch
    for _ in range(0, search_steps):
        middle = (sample + above) // 2
        inside = tl.load(p_k_start + middle) <= key
        sample = tl.where(inside, middle, sample)
        above = tl.where(inside, above, middle)
    inner = key - tl.load(p_k_start + sample)
    used = (inner >= 0) & (inner < tl.load(p_k_len + sample))
    p_rows = p_hi + tl.load(p_q_start + sample)
    first = tl.zeros([SLOTS], dtype=tl.int32)
    last = tl.load(p_q_len + sample)
    for _ in range(0, row_steps):
        middle = (first + last) // 2
        searching = used & (first < last)
        sees = tl.load(p_rows + middle, mask=searching, other=0) > inner
        last = tl.where(searching & sees, middle, last)
        first = tl.where(searching & (sees == 0), middle + 1, first)
    tl.store(p_first_row + key, tl.where(used, first, 0), mask=key < keys)


def transpose_upper_bounds(hi: Tensor, tables: SampleTables, first_row: Tensor) -> Tensor:
    """Fill ``first_row`` (int32 (Tk)) with the transpose of ``hi`` (int32 (Tq)); one launch."""
    slots, batch, keys = 128, tables[0].shape[0], first_row.shape[0]
    transpose_hi_kernel[(triton.cdiv(keys, slots),)](
        hi, first_row, *tables[:4], batch, keys, batch.bit_length(), hi.shape[0].bit_length(),
        SLOTS=slots, enable_fp_fusion=True,
    )  # fmt: skip
    return first_row


def section_heads(heads: int, group: int, bytes_per_head: int) -> int:
    """How many of ``heads`` run side by side: whole groups, a divisor, operands of at most about half an L2 cache."""
    groups = heads // group
    fitting = max(1, _SECTION_BYTES // max(bytes_per_head, 1))
    return group * max(d for d in range(1, groups + 1) if groups % d == 0 and d <= fitting)


def count_tiles(kernel: str, shapes: Shapes, problem: AttentionProblem) -> tuple[Config, bool, int, int]:
    """(config, over_keys, rows, tiles) of ``kernel``, see :class:`TileGrid`. Nothing is compared with a number of tokens, which
    would fix it in a compiled graph."""
    over_keys = kernel in ("forward", "backward_rows")
    config = choose_config(kernel, shapes.dim, shapes.dtype, problem.device)
    rows, tile = (problem.q_rows, config.rows) if over_keys else (problem.k_rows, config.keys)
    batch = problem.q_len.shape[0]
    tiles = batch * triton.cdiv(rows, tile) if rows else (shapes.rows if over_keys else shapes.keys) // tile + batch
    return config, over_keys, rows, tiles


def tile_grid(kernel: str, shapes: Shapes, problem: AttentionProblem) -> TileGrid:
    """The grid of ``kernel`` (one of plan_kernels): shapes alone decide."""
    config, over_keys, rows, tiles = count_tiles(kernel, shapes, problem)
    # the operand that heads of a group share: k and v, or the group's rows of q and grad_out
    group = shapes.heads // shapes.heads_kv
    heads, shared = (shapes.heads, shapes.keys) if over_keys else (shapes.heads_kv, shapes.rows * group)
    side_by_side = section_heads(heads, group if over_keys else 1, 2 * shared * shapes.dim * shapes.dtype.itemsize)
    split = split_samples(shapes, problem) if kernel == "forward" else NO_SPLIT
    return TileGrid(config, over_keys, tiles, side_by_side, heads, rows, split)


def split_samples(shapes: Shapes, problem: AttentionProblem) -> Split:
    """Which samples triton_decode takes: few rows over many keys share the keys among programs, the heads of a group a tile."""
    group = shapes.heads // shapes.heads_kv
    batch, max_q, max_k = problem.q_len.shape[0], max(problem.q_rows, problem.max_q), problem.max_k
    if max_k < SHORTEST_SPLIT or batch > LARGEST_GRID_AXIS:
        return NO_SPLIT
    # the second: a short prompt after a long cache, where tiles of rows alone would leave most of the GPU idle
    few_tiles = batch * triton.cdiv(max_q, 128) * shapes.heads * 2 <= processor_count(problem.device)
    if max_q * group <= 64 or few_tiles:
        return Split(max_q, 0)
    # In a pack of whole samples nothing has more keys than rows. In a server's step the rows that decode do: their sample is read
    # once per group of heads instead of by a tile of rows, nearly all of them padding, per head.
    if not problem.q_rows and max_k > max_q:
        return Split(max(1, _FEW_PAIRS // group), SHORTEST_SPLIT)
    return NO_SPLIT


def plan_kernels(backward: bool, deterministic: bool = True) -> tuple[str, ...]:
    """Kernels that share a plan: forward and, with ``backward``, backward_keys and backward_rows or the one for both."""
    behind = (("backward_keys", "backward_rows") if deterministic else ("backward",)) if backward else ()
    return ("forward", *behind)


def plan_grids(shapes: Shapes, backward: bool, problem: AttentionProblem, deterministic: bool = True) -> list[TileGrid]:
    """Of :func:`plan_kernels`, in order."""
    return [tile_grid(kernel, shapes, problem) for kernel in plan_kernels(backward, deterministic)]


def plan_sections(plan: Tensor, grids: list[TileGrid]) -> list[Tensor]:
    """``plan`` (int32) cut into a section for each grid and what follows them, the transpose of ``hi``."""
    ends = list(accumulate(grid.size for grid in grids))
    return [plan[start:end] for start, end in pairwise([0, *ends, plan.shape[0]])]


def plan_tiles(grid: TileGrid, tables: SampleTables, hi: Tensor | None, numbers: Tensor | None = None) -> Plan:
    """Fill ``numbers`` (int32 (grid.size), default new ones). ``hi``: the bounds per token, over rows their transpose."""
    device, batch = tables[0].device, tables[0].shape[0]
    plan = grid.plan(torch.empty(grid.size, dtype=torch.int32, device=device) if numbers is None else numbers)
    # one wave runs in any order
    sort = processor_count(device) < grid.tiles * grid.heads and grid.tiles <= LARGEST_SORT
    table = torch.empty_like(plan.table) if sort else plan.table
    work = torch.empty(grid.tiles, dtype=torch.int32, device=device)
    slots = 128
    list_tiles_kernel[(triton.cdiv(grid.tiles, slots),)](
        table, work, plan.counter, *tables, tables[0] if hi is None else hi, batch, grid.tiles, grid.rows, batch.bit_length(),
        *grid.split,
        OVER_KEYS=grid.over_keys, RECTANGULAR=grid.rows > 0, BM=grid.config.rows, BN=grid.config.keys, HAS_HI=hi is not None,
        SLOTS=slots, enable_fp_fusion=True,
    )  # fmt: skip
    if sort:
        slots = 32
        sort_tiles_kernel[(triton.cdiv(grid.tiles, slots),)](
            table, work, plan.table, grid.tiles, SLOTS=slots, CHUNK=128, enable_fp_fusion=True,
        )  # fmt: skip
    return plan


@triton.jit
def program_tile(p_table, tiles, heads_side_by_side, order):
    """(head, sample, block) of program ``order``: sections of heads one after another; inside, the longest tiles of all heads."""
    per_section = tiles * heads_side_by_side
    section = order // per_section
    inside = order - section * per_section
    tile = inside // heads_side_by_side
    head = section * heads_side_by_side + inside - tile * heads_side_by_side
    sample = tl.load(p_table + tile * 2)
    block = tl.load(p_table + tile * 2 + 1)
    return head, sample, block
