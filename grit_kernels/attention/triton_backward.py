"""Switch attention backward on the GPU, in Triton: deterministic, or one kernel that adds up dQ by atomics.

With p = exp(score - lse) on visible pairs and delta_r = sum_d grad_out_rd out_rd - grad_lse_r:

    dv_j = sum_r p_rj grad_out_r          ds_rj = p_rj (grad_out_r . v_j - delta_r) cap'(score_rj)
    dk_j = softmax_scale sum_r ds_rj q_r  dq_r = softmax_scale sum_j ds_rj k_j

Three kernels: the statistics of each row; dK and dV (a tile of keys walks over the rows of all query heads of its group);
dQ (a tile of rows walks over keys). Both walks visit blocks that need no mask first, then the edges, as in the forward pass.
Seven products per block, as p and ds are computed in both walks; the same inputs give the same bits.

A sink z is one more score of every row, without a value, so its gradient is -sum_r exp(z - lse_r) delta_r: the kernel of the
statistics adds up blocks of rows, and torch adds those in order.

Without the promise of the same bits, the walk over rows adds ds k to an FP32 dQ as well, by atomics: five products, no second
walk, but 4 bytes per number of dQ added in memory for every block of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.attention.hopper import hopper_kernel
from grit_kernels.attention.problem import AttentionProblem, Shapes
from grit_kernels.attention.triton_common import (
    addressable,
    edge_block,
    int32_tables,
    key_range,
    load_part,
    load_sample,
    positive_scale,
    softmax_constants,
    split_head_dim,
    store_part,
    tanh,
    tile_keys,
    tile_rows,
)
from grit_kernels.attention.triton_plan import (
    plan_grids,
    plan_sections,
    plan_tiles,
    program_tile,
    transpose_upper_bounds,
)
from grit_kernels.triton_launch import dot, on_device, upcast_operands

STATISTICS = tl.constexpr(4)
"""Numbers per row and head: 16 bytes, of which two are used. Fewer would be loaded in pieces of 4 bytes."""


@triton.jit(do_not_specialize=["rows"])
def row_statistics_kernel(
    p_do, p_out, p_lse, p_dlse, p_sinks, p_stat, p_dq, p_dsinks, stride_dot, stride_doh, rows,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, HAS_DLSE: tl.constexpr, CLEAR_DQ: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """p_stat (Hq, Tq, STATISTICS): -lse in units of log2, and -delta; what a walk adds to the products of a row.

    CLEAR_DQ: the FP32 dQ (Tq, Hq, D), to which atomics add, starts from 0. HAS_SINKS: p_dsinks (Hq, blocks of rows), FP32, what
    these rows add to the gradient of their head's sink.
    """
    head = tl.cast(tl.program_id(1), tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    m_row = row < rows
    o_d = tl.arange(0, DP)
    mask = m_row[:, None] & (o_d[None, :] < D)
    o_row = tl.cast(row, tl.int64)
    o_do = o_row * stride_dot + head * stride_doh
    o_pair = o_row * HEADS + head
    b_do = tl.load(p_do + o_do[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_out = tl.load(p_out + o_pair[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_do * b_out, 1)
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + o_pair, mask=m_row, other=0.0)
    b_lse = tl.load(p_lse + o_pair, mask=m_row, other=0.0) * -1.4426950408889634
    if HAS_SINKS:
        b_sink = tl.load(p_sinks + head).to(tl.float32) * 1.4426950408889634
        # a row that sees no key, whose lse is -inf, may hold anything
        m_alive = m_row & (b_lse != float("inf"))
        b_dsink = tl.where(m_alive, tl.exp2(b_sink + tl.where(m_alive, b_lse, 0.0)) * b_delta, 0.0)
        tl.store(p_dsinks + head * tl.num_programs(0) + tl.program_id(0), -tl.sum(b_dsink, 0))
    if CLEAR_DQ:
        tl.store(p_dq + o_pair[:, None] * D + o_d[None, :], tl.zeros([BM, DP], dtype=tl.float32), mask=mask)
    p_stat += (head * rows + row) * STATISTICS
    tl.store(p_stat, b_lse, mask=m_row)
    tl.store(p_stat + 1, -b_delta, mask=m_row)


@triton.jit
def probabilities(b_qk, b_less, scale, cap, HAS_CAP: tl.constexpr):
    """p and cap'(score) from raw products; ``b_less`` is -lse in units of log2 and already broadcast."""
    if HAS_CAP:
        b_tanh = tanh(b_qk * scale)
        b_p = tl.exp2(cap * b_tanh + b_less)
        b_slope = 1.0 - b_tanh * b_tanh
    else:
        b_p = tl.exp2(b_qk * scale + b_less)
        b_slope = b_p
    return b_p, b_slope


@triton.jit
def add_part(p_x, o_row, stride, m_row, b_x, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Add to columns [FIRST, FIRST + WIDTH) of the rows ``o_row`` of p_x, by atomics."""
    o_d = FIRST + tl.arange(0, WIDTH)
    mask = m_row[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (o_d[None, :] < D)
    tl.atomic_add(p_x + o_row[:, None] * stride + o_d[None, :], b_x, mask=mask, sem="relaxed")


@triton.jit
def next_head(ended, p_q, p_do, p_dq, p_stat, stride_qh, stride_doh, rows, D: tl.constexpr, ATOMIC: tl.constexpr):
    """The pointers of a query head, or where it ``ended`` of the next: fewer registers than its number and the strides take."""
    p_q += tl.where(ended, stride_qh, 0)
    p_do += tl.where(ended, stride_doh, 0)
    p_stat += tl.cast(tl.where(ended, rows, 0), tl.int64) * STATISTICS
    if ATOMIC:
        p_dq += tl.where(ended, D, 0)
    return p_q, p_do, p_dq, p_stat


@triton.jit
def gather_rows(
    b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, p_q, p_do, p_dq, p_stat, p_hi, block, key, len_q, len_k, left, right,
    scale, cap, STRIDE_QT: tl.constexpr, STRIDE_DOT: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr,
    EDGE: tl.constexpr, HAS_HI: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add the rows of one block of the query head at p_q to dK and dV; all products are transposed, [BN, BM].

    ATOMIC: and add what these keys contribute to dQ, without ``softmax_scale``.
    """
    o_m = tl.arange(0, BM)
    row = block * BM + o_m
    b_lo, b_hi = key_range(row, p_hi, len_q, len_k, left, right, HAS_HI)
    # fully masked rows may hold anything
    m_row = (row < len_q) & (b_lo < b_hi)
    first_row = tl.cast(block * BM, tl.int64)
    # not from 0 as o_m, whose numbers the masks need as well: so a thread keeps one address and adds constants to it
    o_load = tl.arange(BM, 2 * BM)
    p_q += (first_row - BM) * STRIDE_QT
    p_do += (first_row - BM) * STRIDE_DOT
    # one load of 16 bytes a row, and the sums keep it one: each would otherwise be loaded once per thread that needs it
    o_stat = tl.arange(0, STATISTICS)
    p_stat += first_row * STATISTICS
    p_stat = p_stat + o_m[:, None] * STATISTICS + o_stat[None, :]
    if EDGE:
        b_stat = tl.load(p_stat, mask=m_row[:, None] & (o_stat < 2)[None, :], other=0.0)
    else:
        b_stat = tl.load(p_stat)
    b_less = tl.sum(tl.where(o_stat[None, :] == 0, b_stat, 0.0), 1)[None, :]
    b_less_delta = tl.sum(tl.where(o_stat[None, :] == 1, b_stat, 0.0), 1)[None, :]
    b_q1 = load_part(p_q, o_load, STRIDE_QT, m_row, 0, D1, D, EDGE)
    b_do1 = load_part(p_do, o_load, STRIDE_DOT, m_row, 0, D1, D, EDGE)
    b_zero = tl.zeros([b_k1.shape[0], BM], dtype=tl.float32)
    b_qk = dot(b_k1, tl.trans(b_q1), b_zero, UPCAST)  # [BN, BM]
    b_dp = dot(b_v1, tl.trans(b_do1), b_zero, UPCAST)
    if D2 > 0:
        b_q2 = load_part(p_q, o_load, STRIDE_QT, m_row, D1, D2, D, EDGE)
        b_do2 = load_part(p_do, o_load, STRIDE_DOT, m_row, D1, D2, D, EDGE)
        b_qk = dot(b_k2, tl.trans(b_q2), b_qk, UPCAST)
        b_dp = dot(b_v2, tl.trans(b_do2), b_dp, UPCAST)
    b_p, b_slope = probabilities(b_qk, b_less, scale, cap, HAS_CAP)
    if EDGE:
        # key_range by distances, which cost no registers per row. Its clamps need no mask here: fully masked rows
        # were loaded as 0, and slots that hold no key of the sample are cleared when the tile is stored
        distance = key[:, None] - (row + len_k - len_q)[None, :]
        visible = distance >= -left
        if HAS_HI:
            visible = visible & (key[:, None] < b_hi[None, :])
        else:
            visible = visible & (distance <= right)
        b_p = tl.where(visible, b_p, 0.0)
    b_ds = b_p * (b_dp + b_less_delta)
    if HAS_CAP:
        b_ds = b_ds * b_slope
    if ATOMIC:
        # a slot without a key has a score of 0, whose exponential need not be finite
        b_ds = tl.where(((key >= 0) & (key < len_k))[:, None], b_ds, 0.0)
    b_p = b_p.to(b_do1.dtype)
    b_ds = b_ds.to(b_q1.dtype)
    b_dv1 = dot(b_p, b_do1, b_dv1, UPCAST)
    b_dk1 = dot(b_ds, b_q1, b_dk1, UPCAST)
    if D2 > 0:
        b_dv2 = dot(b_p, b_do2, b_dv2, UPCAST)
        b_dk2 = dot(b_ds, b_q2, b_dk2, UPCAST)
    if ATOMIC:
        p_dq += first_row * (HEADS * D)
        b_dq1 = dot(tl.trans(b_ds), b_k1, tl.zeros([BM, D1], dtype=tl.float32), UPCAST)
        add_part(p_dq, o_m, HEADS * D, m_row, b_dq1, 0, D1, D)
        if D2 > 0:
            b_dq2 = dot(tl.trans(b_ds), b_k2, tl.zeros([BM, D2], dtype=tl.float32), UPCAST)
            add_part(p_dq, o_m, HEADS * D, m_row, b_dq2, D1, D2, D)
    return b_dk1, b_dk2, b_dv1, b_dv2


@triton.jit(do_not_specialize=["rows", "tiles", "heads_side_by_side", "k_rows"])
def backward_keys_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_dq, p_stat, p_table, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
    p_first_row, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_doh,
    rows, tiles, heads_side_by_side, k_rows, scale, cap, softmax_scale,
    STRIDE_QT: tl.constexpr, STRIDE_DOT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_HI: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of BN keys of a sample and key head: the rows of all query heads of its group that see a key.

    Rows that see every key of the tile come first, without any mask, then the edges. Padding keys get 0. ATOMIC: what the keys
    contribute to dQ is added to p_dq, FP32 (Tq, Hq, D). The rows' strides are constants, as addresses then need fewer registers:
    a model has one or two.
    """
    head_kv, sample, block = program_tile(p_table, tiles, heads_side_by_side, tl.program_id(0))
    if block < 0:
        return
    q_start, len_q, k_start, len_k, left, right = load_sample(
        p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, sample
    )
    head_first = tl.cast(head_kv, tl.int64) * GROUP
    p_q += q_start * STRIDE_QT + head_first * stride_qh
    p_do += q_start * STRIDE_DOT + head_first * stride_doh
    if ATOMIC:
        p_dq += (q_start * HEADS + head_first) * D
    p_stat += (head_first * rows + q_start) * STATISTICS
    p_hi += q_start
    p_first_row += k_start

    # a padded sample owns all its slots, including those before its first key: keys count from -shift there
    shift = tl.where(k_rows > 0, tl.cast(k_start, tl.int32) - sample * k_rows, 0)
    owned = tl.where(k_rows > 0, k_rows, len_k)
    first_key = block * BN - shift
    o_n = tl.arange(0, BN)
    key = first_key + o_n
    m_key = (key >= 0) & (key < len_k)
    tile_start = k_start + first_key
    p_k += tile_start * stride_kt + tl.cast(head_kv, tl.int64) * stride_kh
    p_v += tile_start * stride_vt + tl.cast(head_kv, tl.int64) * stride_vh
    b_k1 = load_part(p_k, o_n, stride_kt, m_key, 0, D1, D, True)  # [BN, D1]
    b_v1 = load_part(p_v, o_n, stride_vt, m_key, 0, D1, D, True)
    b_k2 = b_k1
    b_v2 = b_v1
    if D2 > 0:
        b_k2 = load_part(p_k, o_n, stride_kt, m_key, D1, D2, D, True)
        b_v2 = load_part(p_v, o_n, stride_vt, m_key, D1, D2, D, True)

    last_key = tl.minimum(first_key + BN, len_k)
    real = (first_key < len_k) & (last_key > 0)
    first, full_first, full_last, last = tile_rows(
        tl.where(real, tl.maximum(first_key, 0), 0), tl.where(real, last_key, 1), p_first_row, len_q, len_k, left, right,
        BM, HAS_HI,
    )  # fmt: skip
    b_dk1 = tl.zeros([BN, D1], dtype=tl.float32)
    b_dv1 = tl.zeros([BN, D1], dtype=tl.float32)
    b_dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], dtype=tl.float32)
    b_dv2 = tl.zeros([BN, D2 if D2 > 0 else 16], dtype=tl.float32)
    full = tl.where(real, full_last - full_first, 0)
    edges = tl.where(real, (full_first - first) + (last - full_last), 0)
    # one loop over (query head, block), so that the pipeline of loads fills once rather than once per head
    row_block = full_first
    for _ in range(0, full * GROUP):
        b_dk1, b_dk2, b_dv1, b_dv2 = gather_rows(
            b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, p_q, p_do, p_dq, p_stat, p_hi, row_block, key, len_q, len_k,
            left, right, scale, cap, STRIDE_QT, STRIDE_DOT, HEADS, D, D1, D2, BM, False, HAS_HI, HAS_CAP, UPCAST, ATOMIC,
        )  # fmt: skip
        row_block += 1
        ended = row_block == full_last
        p_q, p_do, p_dq, p_stat = next_head(ended, p_q, p_do, p_dq, p_stat, stride_qh, stride_doh, rows, D, ATOMIC)
        row_block = tl.where(ended, full_first, row_block)
    # the edges start with the group's first head again
    heads = tl.cast(tl.where(full > 0, GROUP, 0), tl.int64)
    p_q -= heads * stride_qh
    p_do -= heads * stride_doh
    p_stat -= heads * rows * STATISTICS
    if ATOMIC:
        p_dq -= heads * D
    edge = 0
    for _ in range(0, edges * GROUP):
        row_block = edge_block(edge, first, full_first, full_last)
        b_dk1, b_dk2, b_dv1, b_dv2 = gather_rows(
            b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, p_q, p_do, p_dq, p_stat, p_hi, row_block, key, len_q, len_k,
            left, right, scale, cap, STRIDE_QT, STRIDE_DOT, HEADS, D, D1, D2, BM, True, HAS_HI, HAS_CAP, UPCAST, ATOMIC,
        )  # fmt: skip
        edge += 1
        ended = edge == edges
        p_q, p_do, p_dq, p_stat = next_head(ended, p_q, p_do, p_dq, p_stat, stride_qh, stride_doh, rows, D, ATOMIC)
        edge = tl.where(ended, 0, edge)
    # padding slots get 0: unmasked blocks have summed arbitrary values there
    b_dk1 = tl.where(m_key[:, None], b_dk1 * softmax_scale, 0.0)
    b_dk2 = tl.where(m_key[:, None], b_dk2 * softmax_scale, 0.0)
    b_dv1 = tl.where(m_key[:, None], b_dv1, 0.0)
    b_dv2 = tl.where(m_key[:, None], b_dv2, 0.0)
    m_store = o_n < owned - block * BN
    p_dk += (tile_start * (HEADS // GROUP) + head_kv) * D
    p_dv += (tile_start * (HEADS // GROUP) + head_kv) * D
    stride_dk: tl.constexpr = (HEADS // GROUP) * D
    store_part(p_dk, o_n, stride_dk, m_store, b_dk1, 0, D1, D)
    store_part(p_dv, o_n, stride_dk, m_store, b_dv1, 0, D1, D)
    if D2 > 0:
        store_part(p_dk, o_n, stride_dk, m_store, b_dk2, D1, D2, D)
        store_part(p_dv, o_n, stride_dk, m_store, b_dv2, D1, D2, D)


@triton.jit
def gather_keys(
    b_dq1, b_dq2, b_q1, b_q2, b_do1, b_do2, b_less, b_less_delta, p_k, p_v, stride_k, stride_v, block, b_lo, b_hi, len_k,
    scale, cap, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EDGE: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to dQ; all products are [BM, BN]."""
    o_n = tl.arange(0, BN)
    key = block * BN + o_n
    m_key = key < len_k
    p_k += tl.cast(block * BN, tl.int64) * stride_k
    p_v += tl.cast(block * BN, tl.int64) * stride_v
    b_k1 = load_part(p_k, o_n, stride_k, m_key, 0, D1, D, EDGE)
    b_v1 = load_part(p_v, o_n, stride_v, m_key, 0, D1, D, EDGE)
    b_zero = tl.zeros([BM, BN], dtype=tl.float32)
    b_qk = dot(b_q1, tl.trans(b_k1), b_zero, UPCAST)
    b_dp = dot(b_do1, tl.trans(b_v1), b_zero, UPCAST)
    if D2 > 0:
        b_k2 = load_part(p_k, o_n, stride_k, m_key, D1, D2, D, EDGE)
        b_v2 = load_part(p_v, o_n, stride_v, m_key, D1, D2, D, EDGE)
        b_qk = dot(b_q2, tl.trans(b_k2), b_qk, UPCAST)
        b_dp = dot(b_do2, tl.trans(b_v2), b_dp, UPCAST)
    b_p, b_slope = probabilities(b_qk, b_less[:, None], scale, cap, HAS_CAP)
    if EDGE:
        visible = (key[None, :] >= b_lo[:, None]) & (key[None, :] < b_hi[:, None])
        b_p = tl.where(visible, b_p, 0.0)
    b_ds = b_p * (b_dp + b_less_delta[:, None])
    if HAS_CAP:
        b_ds = b_ds * b_slope
    b_ds = b_ds.to(b_k1.dtype)
    b_dq1 = dot(b_ds, b_k1, b_dq1, UPCAST)
    if D2 > 0:
        b_dq2 = dot(b_ds, b_k2, b_dq2, UPCAST)
    return b_dq1, b_dq2


@triton.jit(do_not_specialize=["rows", "tiles", "heads_side_by_side", "q_rows"])
def backward_rows_kernel(
    p_q, p_k, p_v, p_do, p_dq, p_stat, p_table, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    rows, tiles, heads_side_by_side, q_rows, scale, cap, softmax_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_HI: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of BM rows of a sample and query head: the keys that every row sees first, then the edges.

    Padding rows inside a rectangular sample get 0.
    """
    head, sample, block = program_tile(p_table, tiles, heads_side_by_side, tl.program_id(0))
    if block < 0:
        return
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
    b_lo, b_hi = key_range(row, p_hi, len_q, len_k, left, right, HAS_HI)
    m_row = (row < len_q) & (b_lo < b_hi)
    tile_start = q_start + first_row
    p_q += tile_start * stride_qt + tl.cast(head, tl.int64) * stride_qh
    p_do += tile_start * stride_dot + tl.cast(head, tl.int64) * stride_doh
    b_q1 = load_part(p_q, o_m, stride_qt, m_row, 0, D1, D, True)  # [BM, D1]
    b_do1 = load_part(p_do, o_m, stride_dot, m_row, 0, D1, D, True)
    b_q2 = b_q1
    b_do2 = b_do1
    if D2 > 0:
        b_q2 = load_part(p_q, o_m, stride_qt, m_row, D1, D2, D, True)
        b_do2 = load_part(p_do, o_m, stride_dot, m_row, D1, D2, D, True)
    p_stat += (tl.cast(head, tl.int64) * rows + tile_start + o_m) * STATISTICS
    b_less = tl.load(p_stat, mask=m_row, other=0.0)
    b_less_delta = tl.load(p_stat + 1, mask=m_row, other=0.0)

    first, full_first, full_last, last = tile_keys(
        first_row, first_row + BM, p_hi, len_q, len_k, left, right, BN, HAS_HI
    )
    b_dq1 = tl.zeros([BM, D1], dtype=tl.float32)
    b_dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], dtype=tl.float32)
    for key_block in range(full_first, full_last):
        b_dq1, b_dq2 = gather_keys(
            b_dq1, b_dq2, b_q1, b_q2, b_do1, b_do2, b_less, b_less_delta, p_k, p_v, stride_kt, stride_vt, key_block, b_lo, b_hi,
            len_k, scale, cap, D, D1, D2, BM, BN, False, HAS_CAP, UPCAST,
        )  # fmt: skip
    for step in range(0, (full_first - first) + (last - full_last)):
        key_block = edge_block(step, first, full_first, full_last)
        b_dq1, b_dq2 = gather_keys(
            b_dq1, b_dq2, b_q1, b_q2, b_do1, b_do2, b_less, b_less_delta, p_k, p_v, stride_kt, stride_vt, key_block, b_lo, b_hi,
            len_k, scale, cap, D, D1, D2, BM, BN, True, HAS_CAP, UPCAST,
        )  # fmt: skip
    m_store = row < tl.maximum(len_q, q_rows)
    p_dq += (tile_start * HEADS + head) * D
    store_part(p_dq, o_m, HEADS * D, m_store, tl.where(m_row[:, None], b_dq1 * softmax_scale, 0.0), 0, D1, D)
    if D2 > 0:
        store_part(p_dq, o_m, HEADS * D, m_store, tl.where(m_row[:, None], b_dq2 * softmax_scale, 0.0), D1, D2, D)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: AttentionProblem,
    sinks: Tensor | None = None,
    plan: Tensor | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``grit_kernels::attention_backward``: gradients of q, k, v and the sinks, the last empty without sinks.

    ``plan``: that of triton_forward.attention_plan with ``backward`` and this ``deterministic``; without one the tiles are put in
    order here. ``deterministic``: the same inputs give the same bits; else dQ is added up in any order.
    """
    rows, heads, dim = q.shape
    keys, heads_kv, _ = k.shape
    group = heads // heads_kv
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sums = dq if deterministic or q.dtype == torch.float32 else torch.empty_like(dq, dtype=torch.float32)
    if not rows or not keys:
        return dq.zero_(), dk.zero_(), dv.zero_(), q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    sign = -1.0 if problem.softmax_scale < 0 else 1.0
    q, softmax_scale = positive_scale(q, problem.softmax_scale)
    q, k, v, grad_out, out = (addressable(x) for x in (q, k, v, grad_out.to(q.dtype), out))
    out, lse = out.contiguous(), lse.contiguous()
    bounds, hi, q_rows, k_rows = int32_tables(problem), problem.hi, problem.q_rows, problem.k_rows
    scale, cap = softmax_constants(softmax_scale, problem.softcap)
    forward_grid, *grids = plan_grids(Shapes.of(q, k), True, problem, deterministic)
    if plan is not None:
        _, *sections, transpose = plan_sections(plan, [forward_grid, *grids])
        plans = [grid.plan(section) for grid, section in zip(grids, sections, strict=True)]
        first_row = None if hi is None else transpose
    d1, d2 = split_head_dim(dim)
    statistics = torch.empty((heads, rows, STATISTICS.value), dtype=torch.float32, device=q.device)
    strides = (
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
        *(v.stride(0), v.stride(1), grad_out.stride(0), grad_out.stride(1)),
    )
    shared = {
        **{"HEADS": heads, "GROUP": group, "D": dim, "D1": d1, "D2": d2},
        **{"HAS_HI": hi is not None, "HAS_CAP": problem.softcap > 0, "UPCAST": upcast_operands()},
    }
    block = 4096 // triton.next_power_of_2(dim)
    blocks = triton.cdiv(rows, block)
    shares = statistics if sinks is None else torch.empty((heads, blocks), dtype=torch.float32, device=q.device)
    with on_device(q):
        row_statistics_kernel[(blocks, heads)](
            grad_out, out, lse, lse if grad_lse is None else grad_lse.float().contiguous(),
            lse if sinks is None else sinks.contiguous(), statistics, sums, shares,
            grad_out.stride(0), grad_out.stride(1), rows,
            HEADS=heads, D=dim, DP=triton.next_power_of_2(dim), BM=block, HAS_DLSE=grad_lse is not None,
            CLEAR_DQ=not deterministic, HAS_SINKS=sinks is not None, enable_fp_fusion=True,
        )  # fmt: skip
        dsinks = q.new_empty(0) if sinks is None else shares.sum(1).to(sinks.dtype)
        if plan is None:
            first_row = None
            if hi is not None:
                first_row = transpose_upper_bounds(hi, bounds, torch.empty(keys, dtype=torch.int32, device=q.device))
            plans = [plan_tiles(grid, bounds, hi if grid.over_keys else first_row) for grid in grids]
        config, key_plan = grids[0].config, plans[0]
        copied = {"q": q, "k": k, "v": v, "grad_out": grad_out}
        hopper = hopper_kernel("hopper_backward_keys", config.keys, problem, deterministic, **copied)
        if hopper is not None:
            hopper.launch(q, k, v, grad_out, dk, dv, statistics, bounds, hi, first_row, k_rows, key_plan, scale)
        else:
            backward_keys_kernel[(key_plan.tiles * heads_kv,)](
                q, k, v, grad_out, dk, dv, sums, statistics, key_plan.table, *bounds,
                bounds[0] if hi is None else hi, bounds[0] if first_row is None else first_row,
                *strides[1:6], strides[7], rows, key_plan.tiles, key_plan.side_by_side, k_rows, scale, cap, softmax_scale,
                STRIDE_QT=q.stride(0), STRIDE_DOT=grad_out.stride(0), BM=config.rows, BN=config.keys, ATOMIC=not deterministic,
                num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True, **shared,
            )  # fmt: skip
        if not deterministic:
            return torch.mul(sums, softmax_scale * sign, out=dq), dk, dv, dsinks
        config, row_plan = grids[1].config, plans[1]
        if (hopper := hopper_kernel("hopper_backward_rows", config.rows, problem, deterministic, **copied)) is not None:
            hopper.launch(q, k, v, grad_out, dq, statistics, bounds, hi, q_rows, row_plan, scale, softmax_scale * sign)
            return dq, dk, dv, dsinks
        backward_rows_kernel[(row_plan.tiles * heads,)](
            q, k, v, grad_out, dq, statistics, row_plan.table, *bounds, bounds[0] if hi is None else hi,
            *strides, rows, row_plan.tiles, row_plan.side_by_side, q_rows, scale, cap, softmax_scale * sign,
            BM=config.rows, BN=config.keys, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True, **shared,
        )  # fmt: skip
    return dq, dk, dv, dsinks
