"""Switch attention forward on the GPU, in Triton: one kernel for packed and padded, causal and bidirectional samples.

    score_rj = cap(softmax_scale * q_r . k_j),   out_r = sum_j softmax_j(score_rj) v_j,   lse_r = ln sum_j exp(score_rj)

over the keys ``lo(r) <= j < hi(r)`` of visibility.py. q (Tq, Hq, D), k and v (Tk, Hkv, D) -> out (Tq, Hq, D), lse (Tq, Hq).
A program owns BM rows of one sample and one query head and walks over its key blocks: those that every row sees first,
without any mask, then the left and right edge, which compare positions. The flag of a sample is two integers that enter
these ranges and the mask alike, so windows skip blocks in both modes. Few rows over long keys go to triton_decode.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.attention.hopper import hopper_kernel
from grit_kernels.attention.problem import AttentionProblem, Shapes
from grit_kernels.attention.triton_common import (
    addressable,
    attend_blocks,
    int32_tables,
    key_range,
    load_part,
    load_sample,
    positive_scale,
    softmax_constants,
    split_head_dim,
    store_part,
    tile_keys,
    with_sink,
)
from grit_kernels.attention.triton_decode import decode_samples
from grit_kernels.attention.triton_plan import (
    NO_SPLIT,
    count_tiles,
    plan_grids,
    plan_kernels,
    plan_sections,
    plan_tiles,
    program_tile,
    section_size,
    tile_grid,
    transpose_upper_bounds,
)
from grit_kernels.triton_launch import on_device, processor_count, upcast_operands

WARPS_PER_PROCESSOR = 16
"""Of a persistent grid: as many as can be resident, or a few more, which find the list empty and end."""


@triton.jit
def forward_tile(
    p_q, p_k, p_v, p_out, p_lse, p_sinks, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, head, sample, block, q_rows, scale, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_HI: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr,
    PERSISTENT: tl.constexpr, AHEAD: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Rows [block * BM, block * BM + BM) of a sample, for one query head."""
    q_start, len_q, k_start, len_k, left, right = load_sample(
        p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, sample
    )
    p_hi += q_start
    head_kv = tl.cast(head // GROUP, tl.int64)
    p_k += k_start * stride_kt + head_kv * stride_kh
    p_v += k_start * stride_vt + head_kv * stride_vh

    first_row = block * BM
    o_m = tl.arange(0, BM)
    row = first_row + o_m
    m_row = row < len_q
    p_q += tl.cast(head, tl.int64) * stride_qh
    p_out += tl.cast(head, tl.int64) * D
    if PERSISTENT:
        # recomputed for each tile: what all tiles share would stay in registers
        o_row = q_start + row
    else:
        p_q += (q_start + first_row) * stride_qt
        p_out += (q_start + first_row) * (HEADS * D)
        o_row = o_m
    b_q1 = load_part(p_q, o_row, stride_qt, m_row, 0, D1, D, True)  # [BM, D1]
    if D2 > 0:
        b_q2 = load_part(p_q, o_row, stride_qt, m_row, D1, D2, D, True)
    else:
        b_q2 = b_q1
    b_lo, b_hi = key_range(row, p_hi, len_q, len_k, left, right, HAS_HI)
    first, full_first, full_last, last = tile_keys(
        first_row, first_row + BM, p_hi, len_q, len_k, left, right, BN, HAS_HI
    )
    b_out1, b_out2, b_lse = attend_blocks(
        b_q1, b_q2, p_k, p_v, p_hi, p_hi, stride_kt, stride_vt, 0, 0, 0, first, full_first, full_last, last, b_lo, b_hi, len_k,
        scale, cap, D, D1, D2, BM, BN, 0, HAS_CAP, UPCAST, AHEAD, False,
    )  # fmt: skip
    if HAS_SINKS:
        b_lse, b_factor = with_sink(b_lse, tl.load(p_sinks + head))
        b_out1 = b_out1 * b_factor[:, None]
        b_out2 = b_out2 * b_factor[:, None]
    # padding rows inside a rectangular sample are written as well
    b_out1 = tl.where(m_row[:, None], b_out1, 0.0)
    b_out2 = tl.where(m_row[:, None], b_out2, 0.0)
    b_lse = tl.where(m_row, b_lse * 0.6931471805599453, float("-inf"))
    m_store = row < tl.maximum(len_q, q_rows)
    store_part(p_out, o_row, HEADS * D, m_store, b_out1, 0, D1, D)
    if D2 > 0:
        store_part(p_out, o_row, HEADS * D, m_store, b_out2, D1, D2, D)
    tl.store(p_lse + (q_start + row) * HEADS + head, b_lse, mask=m_store)


@triton.jit(do_not_specialize=["tiles", "heads_side_by_side", "q_rows"])
def attention_forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_sinks, p_table, p_counter, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, tiles, heads_side_by_side, q_rows, scale, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_HI: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr,
    PERSISTENT: tl.constexpr, AHEAD: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """PERSISTENT: take tiles off the list until it is empty (which program takes a tile changes no bit of it). Else: one tile.

    Every tile that is taken draws one number from the counter, so the last number is known, and who draws it clears the counter
    for the next launch. HAS_SINKS: p_sinks (Hq), one more score of every row of a head, to which no value belongs.
    """
    order = tl.program_id(0)
    if PERSISTENT:
        while order < tiles * HEADS:
            head, sample, block = program_tile(p_table, tiles, heads_side_by_side, order)
            if block >= 0:
                forward_tile(
                    p_q, p_k, p_v, p_out, p_lse, p_sinks, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
                    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, head, sample, block, q_rows, scale, cap,
                    HEADS, GROUP, D, D1, D2, BM, BN, HAS_HI, HAS_CAP, UPCAST, True, AHEAD, HAS_SINKS,
                )  # fmt: skip
            # each program's first tile is that of its own index
            order = tl.num_programs(0) + tl.atomic_add(p_counter, 1, sem="relaxed")
        if order == tl.num_programs(0) + tiles * HEADS - 1:
            tl.store(p_counter, 0)
    else:
        head, sample, block = program_tile(p_table, tiles, heads_side_by_side, order)
        if block >= 0:
            forward_tile(
                p_q, p_k, p_v, p_out, p_lse, p_sinks, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
                stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, head, sample, block, q_rows, scale, cap,
                HEADS, GROUP, D, D1, D2, BM, BN, HAS_HI, HAS_CAP, UPCAST, False, AHEAD, HAS_SINKS,
            )  # fmt: skip


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    sinks: Tensor | None = None,
    plan: Tensor | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """The op ``grit_kernels::attention_forward``. No autotuning, nothing read back.

    ``sinks`` (Hq) are part of ``lse``. ``plan``: that of :func:`attention_plan` for this call; without one the tiles are put in
    order here. ``deterministic`` is for the backward pass.
    """
    rows, heads, dim = q.shape
    group = heads // k.shape[1]
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    if not rows:
        return out, lse
    q, softmax_scale = positive_scale(q, problem.softmax_scale)
    q, k, v = addressable(q), addressable(k), addressable(v)
    sinks = None if sinks is None else sinks.contiguous()
    bounds, hi, q_rows = int32_tables(problem), problem.hi, problem.q_rows
    scale, cap = softmax_constants(softmax_scale, problem.softcap)
    with on_device(q):
        grid = tile_grid("forward", Shapes.of(q, k), problem)
        if grid.split != NO_SPLIT:
            decode_samples(q, k, v, out, lse, problem, bounds, grid.split, scale, cap, sinks=sinks)
            if grid.splits_all:
                return out, lse
        order = plan_tiles(grid, bounds, hi) if plan is None else grid.plan(plan[: grid.size])
        config = grid.config
        if (hopper := hopper_kernel("hopper_forward", config.rows, problem, q=q, k=k, v=v)) is not None:
            hopper.launch(q, k, v, out, lse, sinks, bounds, hi, q_rows, order, scale)
            return out, lse
        table, counter, tiles, side_by_side = order
        d1, d2 = split_head_dim(dim)
        programs = tiles * heads
        if config.persistent:
            programs = min(programs, processor_count(q.device) * WARPS_PER_PROCESSOR // config.warps)
        attention_forward_kernel[(programs,)](
            q, k, v, out, lse, lse if sinks is None else sinks, table, counter, *bounds, bounds[0] if hi is None else hi,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            tiles, side_by_side, q_rows, scale, cap,
            HEADS=heads, GROUP=group, D=dim, D1=d1, D2=d2, BM=config.rows, BN=config.keys,
            HAS_HI=hi is not None, HAS_CAP=problem.softcap > 0, UPCAST=upcast_operands(), PERSISTENT=config.persistent,
            AHEAD=config.ahead, HAS_SINKS=sinks is not None,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def plan_size(shapes: Shapes, backward: bool, deterministic: bool, problem: AttentionProblem) -> int:
    """int32 numbers of :func:`attention_plan`."""
    transpose = shapes.keys if backward and problem.hi is not None else 0
    tiles = [count_tiles(kernel, shapes, problem)[-1] for kernel in plan_kernels(backward, deterministic)]
    return sum(map(section_size, tiles)) + transpose


def attention_plan(*given: Any) -> Tensor:
    """The op ``grit_kernels::attention_plan``: the order of the tiles of every kernel, for all layers of a pass.

    ``given``: the fields of :class:`Shapes`, ``backward``, ``deterministic``, the problem. The result is int32, one section after
    the other: forward, and with ``backward`` backward_keys and backward_rows (backward alone, if it need not be
    ``deterministic``) and, with ``hi``, its transpose. Launches of one stream may share a plan, as they take turns with its
    counter; launches that may run at the same time may not.
    """
    *sizes, backward, deterministic, problem = given
    shapes = Shapes(*sizes)
    tables, hi = int32_tables(problem), problem.hi
    numbers = torch.empty(plan_size(shapes, backward, deterministic, problem), dtype=torch.int32, device=problem.device)
    if not shapes.rows:
        return numbers
    grids = plan_grids(shapes, backward, problem, deterministic)
    *sections, transpose = plan_sections(numbers, grids)
    with on_device(numbers):
        if not grids[0].splits_all:
            plan_tiles(grids[0], tables, hi, sections[0])
        if backward and shapes.keys:
            first_row = None if hi is None else transpose_upper_bounds(hi, tables, transpose)
            for grid, section in zip(grids[1:], sections[1:], strict=True):
                plan_tiles(grid, tables, hi if grid.over_keys else first_row, section)
    return numbers
