"""Pooling in Triton: one pass over the hidden states, FP32 sums, no atomics, so results repeat bit for bit.

    out_b  = sum_t w_t x_t / denominators_b,   x_t = h_t  or  h_t r_t * norm_weight,  r_t = rsqrt(mean(h_t^2) + eps)
    dh_t   = g                                 with g = w_t / denominators_b * grad_out_b, without the norm, else
    dh_t   = r_t (g * norm_weight - n_t mean(n_t * g * norm_weight)),  n_t = h_t r_t
    d norm_weight = sum_t g * n_t

Forward: the rows of a sample are split evenly over ``splits`` programs (a number that does not depend on the lengths, which
stay on the device), each leaves one FP32 partial row; the sum of partials is in a fixed order. Backward: a program owns a
run of rows, finds each row's sample by bisection and writes every row of grad_hidden once, zeros included.
A row of weight 0 is not read. With the norm, a program holds whole rows; without it, a slice of the columns.

Naming: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block value; capitals are compile-time constants.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.checks import dense_rows
from grit_kernels.pooling.problem import PoolingProblem
from grit_kernels.triton_launch import on_device, processor_count

MAX_HIDDEN_WITH_NORM = 32768
"""A row is held in registers by one program of at most 32 warps."""

FORWARD_VALUES, BACKWARD_VALUES = 8192, 4096
"""Values of a tile: enough loads in flight for the memory, few enough for the registers (the backward holds two tiles)."""


@triton.jit(do_not_specialize=["splits"])
def pool_fwd_kernel(
    p_hidden, p_weights, p_row_start, p_row_end, p_denominators, p_norm_weight, p_partial,
    stride, hidden_size, splits, norm_eps,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (samples, splits, blocks of columns). The weighted sum of a split's rows, divided, into p_partial (B, splits, C)."""
    sample, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < hidden_size
    start, end = tl.load(p_row_start + sample), tl.load(p_row_end + sample)
    share = tl.cdiv(tl.maximum(end - start, 0), splits)
    first = start + split * share
    last = tl.minimum(first + share, end)
    b_sum = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for row in range(first, last, ROWS):
        o_row = row + tl.arange(0, ROWS)
        b_w = tl.load(p_weights + o_row, mask=o_row < last, other=0.0)  # [ROWS]
        m_x = (b_w != 0)[:, None] & m_c[None, :]
        b_x = tl.load(p_hidden + o_row.to(tl.int64)[:, None] * stride + o_c[None, :], mask=m_x, other=0.0)
        b_x = b_x.to(tl.float32)  # [ROWS, BLOCK_C]
        if HAS_NORM:
            b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / hidden_size + norm_eps)
            b_w = tl.where(b_w != 0, b_w * b_r, 0.0)  # an eps of 0 makes r of an unread row infinite
        b_sum += b_w[:, None] * b_x
    denominator = tl.load(p_denominators + sample).to(tl.float32)
    b_out = tl.sum(b_sum, axis=0)
    if HAS_NORM:
        b_out *= tl.load(p_norm_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_out = tl.where(denominator > 0, b_out / tl.where(denominator > 0, denominator, 1.0), 0.0)
    o_out = (sample.to(tl.int64) * splits + split) * hidden_size + o_c
    tl.store(p_partial + o_out, b_out, mask=m_c)


@triton.jit(do_not_specialize=["rows", "samples", "bisections", "rows_per_program"])
def pool_bwd_kernel(
    p_grad_out, p_hidden, p_weights, p_row_start, p_row_end, p_denominators, p_norm_weight, p_grad_hidden, p_partial,
    stride, rows, hidden_size, samples, bisections, rows_per_program, norm_eps,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, blocks of columns). Gradients of ``rows_per_program`` rows and, HAS_NORM, a part of the weight's."""
    program, block = tl.program_id(0), tl.program_id(1)
    o_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < hidden_size
    # 64 bits: the last program's end may lie beyond 2^31 when the row count is close to it
    first = program.to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    if HAS_NORM:
        b_norm = tl.load(p_norm_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_grad_norm = tl.zeros([BLOCK_C], dtype=tl.float32)
    for row in range(first, last, ROWS):
        o_row = row + tl.arange(0, ROWS)
        m_row = o_row < last
        # the last sample whose first row is not after this one: row_start never decreases, ranges do not overlap
        b_low = tl.zeros([ROWS], dtype=tl.int32)
        b_high = tl.zeros([ROWS], dtype=tl.int32) + samples
        for _ in range(bisections):
            b_middle = (b_low + b_high) // 2
            m_before = tl.load(p_row_start + b_middle, mask=b_middle < samples, other=2147483647) <= o_row
            b_low = tl.where(m_before, tl.minimum(b_middle + 1, samples), b_low)
            b_high = tl.where(m_before, b_high, b_middle)
        b_sample = b_low - 1
        m_row_in = m_row & (b_sample >= 0)
        m_row_in = m_row_in & (o_row < tl.load(p_row_end + b_sample, mask=m_row_in, other=0))
        b_denominator = tl.load(p_denominators + b_sample, mask=m_row_in, other=0.0).to(tl.float32)
        b_w = tl.load(p_weights + o_row, mask=m_row_in, other=0.0).to(tl.float32)
        m_used = (b_w != 0) & (b_denominator > 0)
        b_w = tl.where(m_used, b_w / tl.where(m_used, b_denominator, 1.0), 0.0)
        m_tile = m_used[:, None] & m_c[None, :]
        p_grad = p_grad_out + b_sample.to(tl.int64)[:, None] * hidden_size + o_c[None, :]
        b_g = b_w[:, None] * tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)  # [ROWS, BLOCK_C]
        if HAS_NORM:
            b_x = tl.load(p_hidden + o_row[:, None] * stride + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
            b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / hidden_size + norm_eps)
            b_r = tl.where(m_used, b_r, 0.0)[:, None]
            b_n = b_x * b_r
            b_grad_norm += tl.sum(b_g * b_n, axis=0)
            b_g = b_g * b_norm[None, :]
            b_g = b_r * (b_g - b_n * (tl.sum(b_n * b_g, axis=1) / hidden_size)[:, None])
        p_out = p_grad_hidden + o_row[:, None] * hidden_size + o_c[None, :]
        tl.store(p_out, b_g.to(p_grad_hidden.dtype.element_ty), mask=m_row[:, None] & m_c[None, :])
    if HAS_NORM:
        tl.store(p_partial + program.to(tl.int64) * hidden_size + o_c, b_grad_norm, mask=m_c)


def _tile(hidden_size: int, has_norm: bool, values: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_C, warps) of a tile of about ``values`` values; with the norm a tile spans the row."""
    width = triton.next_power_of_2(hidden_size)
    if not has_norm:
        block = min(width, 1024)
        return min(16, values // block), block, 4
    if width > MAX_HIDDEN_WITH_NORM:
        raise ValueError(
            f"norm_weight: expected at most {MAX_HIDDEN_WITH_NORM} columns for the fused norm, got {hidden_size}"
        )
    return min(16, max(1, values // width)), width, min(32, max(4, width // 512))


def _tables(problem: PoolingProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return problem.weights, problem.row_start, problem.row_end, problem.denominators


def pool_forward(problem: PoolingProblem) -> Tensor:
    """float32 (B, C)."""
    hidden, norm_weight = dense_rows(problem.hidden), problem.norm_weight
    rows, hidden_size = hidden.shape
    samples = problem.row_start.shape[0]
    tile_rows, block, warps = _tile(hidden_size, norm_weight is not None, FORWARD_VALUES)
    blocks = triton.cdiv(hidden_size, block)
    # a partial row costs 8 bytes per column, 64 rows of 16-bit input cost 128: splitting stays below 6 % of the traffic
    splits = max(1, min(rows // (64 * samples), triton.cdiv(8 * processor_count(hidden.device), blocks)))
    partial = torch.empty((samples, splits, hidden_size), dtype=torch.float32, device=hidden.device)
    with on_device(hidden):
        pool_fwd_kernel[(samples, splits, blocks)](
            hidden, *_tables(problem), norm_weight, partial, hidden.stride(0), hidden_size, splits, problem.norm_eps,
            ROWS=tile_rows, BLOCK_C=block, HAS_NORM=norm_weight is not None, num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return partial[:, 0] if splits == 1 else partial.sum(dim=1)


def pool_backward(grad_out: Tensor, problem: PoolingProblem) -> tuple[Tensor, Tensor]:
    """As reference.pool_backward; the samples' row ranges must be in order and must not overlap."""
    grad_out = grad_out.contiguous()
    hidden, norm_weight = dense_rows(problem.hidden), problem.norm_weight
    rows, hidden_size = hidden.shape
    samples = problem.row_start.shape[0]
    has_norm = norm_weight is not None
    grad_hidden = torch.empty((rows, hidden_size), dtype=hidden.dtype, device=hidden.device)
    tile_rows, block, warps = _tile(hidden_size, has_norm, BACKWARD_VALUES)
    # with the norm each program leaves a partial row of grad_norm_weight, so there are only as many as fill the device
    programs = triton.cdiv(rows, tile_rows)
    if has_norm:
        programs = min(programs, 4 * processor_count(hidden.device))
    partial = torch.empty((programs if has_norm else 0, hidden_size), dtype=torch.float32, device=hidden.device)
    if rows:
        with on_device(hidden):
            pool_bwd_kernel[(programs, triton.cdiv(hidden_size, block))](
                grad_out, hidden, *_tables(problem), norm_weight, grad_hidden, partial,
                hidden.stride(0), rows, hidden_size, samples, samples.bit_length(), triton.cdiv(rows, programs),
                problem.norm_eps,
                ROWS=tile_rows, BLOCK_C=block, HAS_NORM=has_norm, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return grad_hidden, partial.sum(dim=0) if has_norm else grad_out.new_empty(0, dtype=torch.float32)
