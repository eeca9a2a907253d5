"""Shared by the attention kernels: the visibility rule per tile, the softmax step, loads of a split head dimension.

Naming: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block value; capitals are compile-time constants.

A head dimension that is not a power of two is split into D1 (the largest power of two below it) and D2 (the rest, rounded up
to a power of two of at least 16 and masked): 96 = 64 + 32, 80 = 64 + 16, 72 = 64 + 8 of 16. So 96 costs 96, not 128.
For a power of two D2 is 0 and every value named ``..2`` is a constant that the compiler removes. D1 is at most 256, as the
compiler spills more with products of 512: 512 = 256 + 256, 384 = 256 + 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem, SampleTables
from grit_kernels.triton_launch import dot

LOG2E = 1.4426950408889634
LARGEST_TILE = 256


def split_head_dim(dim: int, least: int = 16) -> tuple[int, int]:
    """``dim`` (a multiple of 8, at least 32) as D1 + D2, see the top of the file; a D2 has ``least`` columns or more."""
    first = min(256, 1 << (dim.bit_length() - 1))
    rest = dim - first
    return first, max(least, triton.next_power_of_2(rest)) if rest else 0


def softmax_constants(softmax_scale: float, softcap: float) -> tuple[float, float]:
    """``(scale, cap)`` such that a score in units of log2 is ``q.k * scale``, or ``cap * tanh(q.k * scale)`` with a cap."""
    if softcap > 0:
        return softmax_scale / softcap, softcap * LOG2E
    return softmax_scale * LOG2E, 0.0


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale, which lets a kernel take the row maximum before it scales."""
    if softmax_scale > 0:
        return q, softmax_scale
    # -inf * 0 is NaN, so a scale of 0 becomes one that rounds every score to 0
    return (-q, -softmax_scale) if softmax_scale < 0 else (q, 1e-30)


def addressable(x: Tensor) -> Tensor:
    """``x`` (rows, H, D) with a contiguous last dimension and row offsets inside one tile that fit 32 bits."""
    if x.stride(-1) != 1 or x.stride(0) * LARGEST_TILE >= 2**31:
        return x.contiguous()
    return x


def int32_tables(problem: AttentionProblem) -> SampleTables:
    """The numbers of each sample as kernels read them: int32, side by side."""
    q_start, q_len, k_start, k_len, left, right = (x.to(torch.int32).contiguous() for x in problem.tables)
    return q_start, q_len, k_start, k_len, left, right


@triton.jit
def load_sample(p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, sample):
    """A sample's entries of the tables: (q_start, len_q, k_start, len_k, left, right), the starts in 64 bits."""
    return (
        tl.cast(tl.load(p_q_start + sample), tl.int64),
        tl.load(p_q_len + sample),
        tl.cast(tl.load(p_k_start + sample), tl.int64),
        tl.load(p_k_len + sample),
        tl.load(p_left + sample),
        tl.load(p_right + sample),
    )


@triton.jit
def clamp(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def tanh(x):
    """tanh without libdevice (the interpreter has none): a polynomial where the quotient would cancel."""
    square = x * x
    small = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315))))
    large = 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0
    return tl.where(tl.abs(x) < 0.15, small, large)


@triton.jit
def load_part(
    p_x, o_row, stride, m_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr
):
    """Columns [FIRST, FIRST + WIDTH) of the rows ``o_row`` of p_x: [rows, WIDTH]; 0 outside D and where m_row is False."""
    o_d = FIRST + tl.arange(0, WIDTH)
    p = p_x + o_row[:, None] * stride + o_d[None, :]
    if FIRST + WIDTH > D:
        mask = o_d[None, :] < D
        if MASKED:
            mask = mask & m_row[:, None]
        b_x = tl.load(p, mask=mask, other=0.0)
    elif MASKED:
        b_x = tl.load(p, mask=m_row[:, None], other=0.0)
    else:
        b_x = tl.load(p)
    return b_x


@triton.jit
def store_part(p_x, o_row, stride, m_row, b_x, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    o_d = FIRST + tl.arange(0, WIDTH)
    p = p_x + o_row[:, None] * stride + o_d[None, :]
    mask = m_row[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (o_d[None, :] < D)
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def key_range(row, p_hi, len_q, len_k, left, right, HAS_HI: tl.constexpr):
    """visibility.key_range of ``row`` (scalar or block): keys [lo, hi). ``p_hi`` points at the sample's first row."""
    position = row + len_k - len_q
    lo = clamp(position - left, 0, len_k)
    if HAS_HI:
        hi = clamp(tl.load(p_hi + row, mask=row < len_q, other=0), 0, len_k)
    else:
        hi = clamp(position + right + 1, 0, len_k)
    return lo, hi


@triton.jit
def in_blocks(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """visibility.in_blocks: (begin, full_begin, full_end, end) counted in blocks."""
    first = begin // BLOCK
    last = tl.where(begin < end, tl.cdiv(end, BLOCK), first)
    full_first = tl.maximum(first, tl.cdiv(full_begin, BLOCK))
    full_last = tl.minimum(last, full_end // BLOCK)
    empty = full_first >= full_last
    return first, tl.where(empty, last, full_first), tl.where(empty, last, full_last), last


@triton.jit
def tile_keys(first_row, last_row, p_hi, len_q, len_k, left, right, BLOCK: tl.constexpr, HAS_HI: tl.constexpr):
    """visibility.tile_keys of rows [first_row, min(last_row, len_q)), in blocks of BLOCK keys; none if all rows are padding."""
    # a sample without rows has no last one: row 0 takes its place, as nothing before it may be loaded
    final_row = tl.maximum(tl.minimum(last_row, len_q) - 1, 0)
    lo_first, hi_first = key_range(first_row, p_hi, len_q, len_k, left, right, HAS_HI)
    lo_last, hi_last = key_range(final_row, p_hi, len_q, len_k, left, right, HAS_HI)
    hi_last = tl.where(first_row < len_q, hi_last, 0)
    return in_blocks(lo_first, lo_last, hi_first, hi_last, BLOCK)


@triton.jit
def row_range(key, p_first_row, len_q, len_k, left, right, HAS_HI: tl.constexpr):
    """visibility.row_range of a key: rows [first, last) that see it. ``p_first_row``: transpose_hi at the sample's first key."""
    shift = len_q - len_k
    if HAS_HI:
        first = clamp(tl.load(p_first_row + key, mask=key < len_k, other=0), 0, len_q)
    else:
        first = clamp(key - right + shift, 0, len_q)
    return first, clamp(key + left + 1 + shift, 0, len_q)


@triton.jit
def tile_rows(first_key, last_key, p_first_row, len_q, len_k, left, right, BLOCK: tl.constexpr, HAS_HI: tl.constexpr):
    """visibility.tile_rows of keys [first_key, last_key), in blocks of BLOCK rows."""
    begin, full_end = row_range(first_key, p_first_row, len_q, len_k, left, right, HAS_HI)
    full_begin, end = row_range(last_key - 1, p_first_row, len_q, len_k, left, right, HAS_HI)
    return in_blocks(begin, full_begin, full_end, end, BLOCK)


@triton.jit
def edge_block(step, first, full_first, full_last):
    """The step-th block that needs a mask: those of the left edge, then those of the right edge."""
    left_edge = full_first - first
    return tl.where(step < left_edge, first + step, full_last + step - left_edge)


@triton.jit
def page_offsets(p_table, key, m_key, first_slot, stride_block, stride_row, PAGE: tl.constexpr, EDGE: tl.constexpr):
    """Where the keys [BN] of a sample in pages begin: key j is slot first_slot + j, in block p_table[slot // PAGE]."""
    slot = first_slot + key
    if EDGE:
        b_block = tl.load(p_table + slot // PAGE, mask=m_key, other=0)
    else:
        b_block = tl.load(p_table + slot // PAGE)
    return tl.cast(b_block, tl.int64) * stride_block + tl.cast(slot % PAGE, tl.int64) * stride_row


@triton.jit
def products(
    b_q1, b_q2, p_k, p_table, stride_k, stride_kb, block, first_slot, len_k,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, EDGE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """q k of the rows of a tile and key block ``block``: [BM, BN]. PAGE: as of attend_blocks."""
    o_n = tl.arange(0, BN)
    m_key = block * BN + o_n < len_k
    if PAGE > 0:
        o_n = page_offsets(p_table, block * BN + o_n, m_key, first_slot, stride_kb, stride_k, PAGE, EDGE)
        stride_k = 1
    else:
        p_k += tl.cast(block * BN, tl.int64) * stride_k
    b_k1 = load_part(p_k, o_n, stride_k, m_key, 0, D1, D, EDGE)
    b_s = dot(b_q1, tl.trans(b_k1), tl.zeros([b_q1.shape[0], BN], dtype=tl.float32), UPCAST)
    if D2 > 0:
        b_k2 = load_part(p_k, o_n, stride_k, m_key, D1, D2, D, EDGE)
        b_s = dot(b_q2, tl.trans(b_k2), b_s, UPCAST)
    return b_s


@triton.jit
def attend(
    b_acc1, b_acc2, b_total, b_top, b_s, p_v, p_used, p_table, stride_v, stride_vb, block, first_slot, b_lo, b_hi, len_k,
    scale, cap, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, EDGE: tl.constexpr,
    HAS_CAP: tl.constexpr, UPCAST: tl.constexpr, HAS_USED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over key block ``block``, whose products are b_s; scores are in units of log2.

    b_acc1 [BM, D1], b_acc2 [BM, D2]: sum of p v;  b_total [BM]: sum of p;  b_top [BM]: running maximum. Only a block on an
    EDGE compares positions and guards its loads: rows after the last key belong to another sample or to padding and may
    hold NaN, and 0 * NaN is NaN. HAS_USED: slots whose byte of p_used is 0 hold no key. PAGE: as of attend_blocks.
    """
    o_n = tl.arange(0, BN)
    key = block * BN + o_n
    m_key = key < len_k
    if PAGE > 0:
        o_n = page_offsets(p_table, key, m_key, first_slot, stride_vb, stride_v, PAGE, EDGE)
        stride_v = 1
    else:
        p_v += tl.cast(block * BN, tl.int64) * stride_v
    if HAS_USED:
        m_key = m_key & (tl.load(p_used + key, mask=m_key, other=0) != 0)
    if HAS_CAP:
        b_s = cap * tanh(b_s * scale)
    if EDGE:
        visible = (key[None, :] >= b_lo[:, None]) & (key[None, :] < b_hi[:, None])
        if HAS_USED:
            visible = visible & m_key[None, :]
        b_s = tl.where(visible, b_s, float("-inf"))
    if HAS_CAP:
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
    else:
        b_new = tl.maximum(b_top, tl.max(b_s, 1) * scale)
    b_shift = b_new
    if EDGE:
        # a row that has seen nothing yet subtracts 0: -inf - -inf is NaN
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    if HAS_CAP:
        b_p = tl.exp2(b_s - b_shift[:, None])
    else:
        b_p = tl.exp2(b_s * scale - b_shift[:, None])
    b_rescale = tl.exp2(b_top - b_shift)
    b_total = b_total * b_rescale + tl.sum(b_p, 1)
    b_v1 = load_part(p_v, o_n, stride_v, m_key, 0, D1, D, EDGE)
    b_p = b_p.to(b_v1.dtype)
    b_acc1 = dot(b_p, b_v1, b_acc1 * b_rescale[:, None], UPCAST)
    if D2 > 0:
        b_v2 = load_part(p_v, o_n, stride_v, m_key, D1, D2, D, EDGE)
        b_acc2 = dot(b_p, b_v2, b_acc2 * b_rescale[:, None], UPCAST)
    return b_acc1, b_acc2, b_total, b_new


@triton.jit
def with_sink(b_lse, b_sink):
    """(lse, factor of out) of rows whose softmax has one more score, a sink without a value; lse in units of log2.

    A row that sees no key keeps -inf and out 0.
    """
    b_sink = b_sink.to(tl.float32) * 1.4426950408889634
    dead = b_lse == float("-inf")
    b_top = tl.where(dead, 0.0, tl.maximum(b_lse, b_sink))
    b_all = b_top + tl.log2(tl.exp2(b_lse - b_top) + tl.exp2(b_sink - b_top))
    return tl.where(dead, b_lse, b_all), tl.where(dead, 0.0, tl.exp2(b_lse - b_all))


@triton.jit
def attend_blocks(
    b_q1, b_q2, p_k, p_v, p_used, p_table, stride_k, stride_v, stride_kb, stride_vb, first_slot,
    first, full_first, full_last, last, b_lo, b_hi, len_k, scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    HAS_CAP: tl.constexpr, UPCAST: tl.constexpr, AHEAD: tl.constexpr, HAS_USED: tl.constexpr,
):  # fmt: skip
    """The rows of one tile over key blocks [first, last), of which [full_first, full_last) need no mask.

    AHEAD: the next block's q k is issued before this block's softmax, which then runs beside it; of blocks without a mask, at
    the price of one more product. HAS_USED: p_used [slots] says which slots hold a key, so every block needs a mask. PAGE: keys
    lie in pages of that many slots, from slot first_slot on; p_table [slots // PAGE] names their blocks, stride_kb and stride_vb
    apart. 0: they lie side by side.

    Returns ``out`` [BM, D1], [BM, D2] and ``lse`` [BM] in units of log2; 0 and -inf for a fully masked row.
    """
    b_acc1 = tl.zeros([BM, D1], dtype=tl.float32)
    b_acc2 = tl.zeros([BM, D2 if D2 > 0 else 16], dtype=tl.float32)
    b_total = tl.zeros([BM], dtype=tl.float32)
    b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
    if HAS_USED:
        full_first = last
        full_last = last
    elif AHEAD:
        # a tile without such blocks multiplies another for nothing; a masked load, as there may be no keys
        some = tl.maximum(tl.minimum(full_first, last - 1), 0)
        b_s = products(
            b_q1, b_q2, p_k, p_table, stride_k, stride_kb, some, first_slot, len_k, D, D1, D2, BN, PAGE, True, UPCAST
        )
        for block in range(full_first, full_last):
            following = tl.minimum(block + 1, full_last - 1)
            b_next = products(
                b_q1, b_q2, p_k, p_table, stride_k, stride_kb, following, first_slot, len_k, D, D1, D2, BN,
                PAGE, False, UPCAST,
            )  # fmt: skip
            b_acc1, b_acc2, b_total, b_top = attend(
                b_acc1, b_acc2, b_total, b_top, b_s, p_v, p_used, p_table, stride_v, stride_vb, block, first_slot, b_lo, b_hi,
                len_k, scale, cap, D, D1, D2, BN, PAGE, False, HAS_CAP, UPCAST, False,
            )  # fmt: skip
            b_s = b_next
    else:
        for block in range(full_first, full_last):
            b_s = products(
                b_q1, b_q2, p_k, p_table, stride_k, stride_kb, block, first_slot, len_k, D, D1, D2, BN,
                PAGE, False, UPCAST,
            )  # fmt: skip
            b_acc1, b_acc2, b_total, b_top = attend(
                b_acc1, b_acc2, b_total, b_top, b_s, p_v, p_used, p_table, stride_v, stride_vb, block, first_slot, b_lo, b_hi,
                len_k, scale, cap, D, D1, D2, BN, PAGE, False, HAS_CAP, UPCAST, False,
            )  # fmt: skip
    for step in range(0, (full_first - first) + (last - full_last)):
        block = edge_block(step, first, full_first, full_last)
        b_s = products(
            b_q1, b_q2, p_k, p_table, stride_k, stride_kb, block, first_slot, len_k, D, D1, D2, BN, PAGE, True, UPCAST
        )
        b_acc1, b_acc2, b_total, b_top = attend(
            b_acc1, b_acc2, b_total, b_top, b_s, p_v, p_used, p_table, stride_v, stride_vb, block, first_slot, b_lo, b_hi, len_k,
            scale, cap, D, D1, D2, BN, PAGE, True, HAS_CAP, UPCAST, HAS_USED,
        )  # fmt: skip
    dead = b_total == 0.0
    b_inverse = 1.0 / tl.where(dead, 1.0, b_total)
    b_out1 = tl.where(dead[:, None], 0.0, b_acc1 * b_inverse[:, None])
    b_out2 = tl.where(dead[:, None], 0.0, b_acc2 * b_inverse[:, None])
    b_lse = tl.where(dead, float("-inf"), b_top + tl.log2(tl.where(dead, 1.0, b_total)))
    return b_out1, b_out2, b_lse
