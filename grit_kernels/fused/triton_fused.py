"""The fused ops in Triton. Each reads its inputs once and writes its outputs once; no atomics, so results repeat bit for bit.

    norm      total = x + residual,  out = total r (weight + offset),  r = rsqrt(mean(total^2) + eps)
              grad = r (g - n mean(g n)) + grad_total,  n = total r,  g = grad_out (weight + offset)
              grad_weight = sum over rows of grad_out n
    rotary    (x1 c1 - x2 s1, x2 c2 + x1 s2), transposed (x1 c1 + x2 s2, x2 c2 - x1 s1)
    gated     x sigmoid(u) up,  derivative of the first factor s + x s (1 - s) u'

A program of the norm holds whole rows. In its backward a program owns a run of rows and leaves one partial row of grad_weight.

Naming: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block value; capitals are compile-time constants.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.triton_launch import on_device, processor_count

MAX_COLUMNS = 32768
"""A row is held in registers by one program of at most 32 warps."""
FORWARD_VALUES, BACKWARD_VALUES = 8192, 4096
"""Values of a tile: enough loads in flight for the memory, few enough for the registers."""
SLOPE, CUBE = 1.5957691216057308, 0.07135481627159
"""GELU's tanh form is x sigmoid(SLOPE x + CUBE x^3)."""


@triton.jit(do_not_specialize=["rows"])
def norm_fwd_kernel(
    p_x, p_residual, p_weight, p_out, p_total,
    x_stride, residual_stride, rows, hidden_size, eps, offset,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out, and with HAS_RESIDUAL the total, of ROWS rows of reference.rms_norm_forward."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < hidden_size
    m_tile = (o_row < rows)[:, None] & m_c[None, :]
    b_x = tl.load(p_x + o_row[:, None] * x_stride + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
    o_out = o_row[:, None] * hidden_size + o_c[None, :]
    if HAS_RESIDUAL:
        p_added = p_residual + o_row[:, None] * residual_stride + o_c[None, :]
        b_x += tl.load(p_added, mask=m_tile, other=0.0).to(tl.float32)
        b_total = b_x.to(p_total.dtype.element_ty)
        tl.store(p_total + o_out, b_total, mask=m_tile)
        b_x = b_total.to(tl.float32)
    b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / hidden_size + eps)
    b_gain = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32) + offset
    b_out = b_x * b_r[:, None] * b_gain[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def norm_bwd_kernel(
    p_grad_out, p_grad_total, p_total, p_weight, p_grad_x, p_partial,
    grad_out_stride, grad_total_stride, total_stride, rows, hidden_size, rows_per_program, eps, offset,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_TOTAL: tl.constexpr, NEED_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Gradients of ``rows_per_program`` rows; with NEED_WEIGHT one partial sum of the weight's gradient, FP32 (programs, C)."""
    program = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < hidden_size
    b_gain = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32) + offset
    if NEED_WEIGHT:
        b_grad_weight = tl.zeros([BLOCK_C], dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for row in range(first, last, ROWS):
        o_row = row + tl.arange(0, ROWS)
        m_tile = (o_row < last)[:, None] & m_c[None, :]
        b_x = tl.load(p_total + o_row[:, None] * total_stride + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_g = tl.load(p_grad_out + o_row[:, None] * grad_out_stride + o_c[None, :], mask=m_tile, other=0.0)
        b_g = b_g.to(tl.float32)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / hidden_size + eps)
        b_r = tl.where(o_row < last, b_r, 0.0)[:, None]  # an eps of 0 makes r of an unread row infinite
        b_n = b_x * b_r
        if NEED_WEIGHT:
            b_grad_weight += tl.sum(b_g * b_n, axis=0)
        b_g = b_g * b_gain[None, :]
        b_out = b_r * (b_g - b_n * (tl.sum(b_g * b_n, axis=1) / hidden_size)[:, None])
        if HAS_TOTAL:
            p_passed = p_grad_total + o_row[:, None] * grad_total_stride + o_c[None, :]
            b_out += tl.load(p_passed, mask=m_tile, other=0.0).to(tl.float32)
        p_out = p_grad_x + o_row[:, None] * hidden_size + o_c[None, :]
        tl.store(p_out, b_out.to(p_grad_x.dtype.element_ty), mask=m_tile)
    if NEED_WEIGHT:
        tl.store(p_partial + program * hidden_size + o_c, b_grad_weight, mask=m_c)


@triton.jit
def _rotate_heads(
    p_x, p_out, b_cos_1, b_cos_2, b_sin_1, b_sin_2, first_head, heads, head_stride, dim,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one row: the halves of the first 2 HALF values are rotated, the rest is copied."""
    o_head = (first_head + tl.arange(0, HEADS))[:, None]
    o_c = tl.arange(0, BLOCK_HALF)[None, :]
    m_tile = (o_head < heads) & (o_c < HALF)
    p_in, p_to = p_x + o_head.to(tl.int64) * head_stride + o_c, p_out + o_head * dim + o_c
    b_1 = tl.load(p_in, mask=m_tile, other=0.0).to(tl.float32)
    b_2 = tl.load(p_in + HALF, mask=m_tile, other=0.0).to(tl.float32)
    if TRANSPOSED:
        b_first, b_second = b_1 * b_cos_1 + b_2 * b_sin_2, b_2 * b_cos_2 - b_1 * b_sin_1
    else:
        b_first, b_second = b_1 * b_cos_1 - b_2 * b_sin_1, b_2 * b_cos_2 + b_1 * b_sin_2
    tl.store(p_to, b_first.to(p_out.dtype.element_ty), mask=m_tile)
    tl.store(p_to + HALF, b_second.to(p_out.dtype.element_ty), mask=m_tile)
    if BLOCK_REST:
        o_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        m_rest = (o_head < heads) & (o_rest < dim)
        b_rest = tl.load(p_x + o_head.to(tl.int64) * head_stride + o_rest, mask=m_rest, other=0.0)
        tl.store(p_out + o_head * dim + o_rest, b_rest, mask=m_rest)


@triton.jit(do_not_specialize=["length", "table_batch_stride"])
def rotary_kernel(
    p_q, p_k, p_q_out, p_k_out, p_cos, p_sin,
    q_batch_stride, q_row_stride, q_head_stride, k_batch_stride, k_row_stride, k_head_stride,
    table_batch_stride, table_row_stride, length, heads_q, heads_k, dim,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, blocks of HEADS heads of q, then of k). TRANSPOSED: by the transposed matrix, for the backward."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sample, token = row // length, row % length
    o_c = tl.arange(0, BLOCK_HALF)[None, :]
    o_table = sample * table_batch_stride + token * table_row_stride + o_c
    m_c = o_c < HALF
    b_cos_1 = tl.load(p_cos + o_table, mask=m_c, other=0.0).to(tl.float32)
    b_cos_2 = tl.load(p_cos + o_table + HALF, mask=m_c, other=0.0).to(tl.float32)
    b_sin_1 = tl.load(p_sin + o_table, mask=m_c, other=0.0).to(tl.float32)
    b_sin_2 = tl.load(p_sin + o_table + HALF, mask=m_c, other=0.0).to(tl.float32)
    q_blocks = tl.cdiv(heads_q, HEADS)
    if block < q_blocks:
        _rotate_heads(
            p_q + sample * q_batch_stride + token * q_row_stride, p_q_out + row * heads_q * dim,
            b_cos_1, b_cos_2, b_sin_1, b_sin_2, block * HEADS, heads_q, q_head_stride, dim,
            HALF, HEADS, BLOCK_HALF, BLOCK_REST, TRANSPOSED,
        )  # fmt: skip
    else:
        _rotate_heads(
            p_k + sample * k_batch_stride + token * k_row_stride, p_k_out + row * heads_k * dim,
            b_cos_1, b_cos_2, b_sin_1, b_sin_2, (block - q_blocks) * HEADS, heads_k, k_head_stride, dim,
            HALF, HEADS, BLOCK_HALF, BLOCK_REST, TRANSPOSED,
        )  # fmt: skip


@triton.jit
def _sigmoid_and_slope(b_x, KIND: tl.constexpr, SLOPE: tl.constexpr, CUBE: tl.constexpr):
    """sigmoid(u) and u' (1 for SiLU)."""
    if KIND == 0:
        return tl.sigmoid(b_x), tl.full(b_x.shape, 1.0, tl.float32)
    # bounded, so that an infinity never meets the 0 of a saturated sigmoid
    b_square = tl.where(b_x * b_x > 1e30, 1e30, b_x * b_x)
    return tl.sigmoid(b_x * (CUBE * b_square + SLOPE)), 3 * CUBE * b_square + SLOPE


@triton.jit(do_not_specialize=["rows"])
def gated_fwd_kernel(
    p_gate, p_up, p_out, gate_stride, up_stride, rows, hidden_size,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr, SLOPE: tl.constexpr, CUBE: tl.constexpr,
):  # fmt: skip
    """act(gate) * up of one tile; KIND: index into reference.KINDS."""
    o_row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_tile = (o_row < rows) & (o_c < hidden_size)
    b_x = tl.load(p_gate + o_row * gate_stride + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_row * up_stride + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_s, _ = _sigmoid_and_slope(b_x, KIND, SLOPE, CUBE)
    b_out = b_x * b_s * b_up
    tl.store(p_out + o_row * hidden_size + o_c, b_out.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows"])
def gated_bwd_kernel(
    p_grad, p_gate, p_up, p_grad_gate, p_grad_up, grad_stride, gate_stride, up_stride, rows, hidden_size,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr, SLOPE: tl.constexpr, CUBE: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up of one tile, see reference.gated_backward."""
    o_row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_tile = (o_row < rows) & (o_c < hidden_size)
    b_g = tl.load(p_grad + o_row * grad_stride + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_x = tl.load(p_gate + o_row * gate_stride + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_row * up_stride + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_s, b_slope = _sigmoid_and_slope(b_x, KIND, SLOPE, CUBE)
    b_act = b_x * b_s
    o_out = o_row * hidden_size + o_c
    b_grad_gate = b_g * b_up * (b_act * (1.0 - b_s) * b_slope + b_s)
    tl.store(p_grad_gate + o_out, b_grad_gate.to(p_grad_gate.dtype.element_ty), mask=m_tile)
    tl.store(p_grad_up + o_out, (b_g * b_act).to(p_grad_up.dtype.element_ty), mask=m_tile)


def norm_tile(columns: int, values: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_C, warps) of a tile of about ``values`` values that spans its rows."""
    if columns > MAX_COLUMNS:
        raise ValueError(f"x: expected at most {MAX_COLUMNS} columns on a GPU, got {columns}")
    width = triton.next_power_of_2(columns)
    rows = min(16, max(1, values // (4 * width)))
    return rows, width, min(32, max(4, rows * width // 512))


def gated_tile(columns: int) -> tuple[int, int]:
    """(ROWS, BLOCK_C)."""
    block = min(triton.next_power_of_2(columns), 1024)
    return max(1, min(16, 2048 // block)), block


def rotary_tile(heads_q: int, heads_k: int, dim: int, rotated: int) -> tuple[int, int, int]:
    """(HEADS, BLOCK_HALF, BLOCK_REST)."""
    width = triton.next_power_of_2(max(rotated // 2, 1))
    heads = max(1, min(triton.next_power_of_2(max(heads_q, heads_k)), 2048 // width))
    return heads, width, triton.next_power_of_2(dim - rotated) if dim > rotated else 0


def _rows(x: Tensor) -> Tensor:
    """(rows, C), without a copy where one row stride serves."""
    return x.reshape(-1, x.shape[-1])


def rms_norm_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As reference.rms_norm_forward."""
    flat = _rows(x)
    added = None if residual is None else _rows(residual)
    rows, columns = flat.shape
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = torch.empty((0,) if residual is None else x.shape, dtype=dtype, device=x.device)
    tile_rows, block, warps = norm_tile(columns, FORWARD_VALUES)
    if rows:
        with on_device(x):
            norm_fwd_kernel[(triton.cdiv(rows, tile_rows),)](
                flat, added, weight, out, total,
                flat.stride(0), 0 if added is None else added.stride(0), rows, columns, eps, offset,
                ROWS=tile_rows, BLOCK_C=block, HAS_RESIDUAL=residual is not None, num_warps=warps,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out, total


def rms_norm_backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """As reference.rms_norm_backward."""
    flat, grad = _rows(total), _rows(grad_out)
    passed = None if grad_total is None else _rows(grad_total)
    rows, columns = flat.shape
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    tile_rows, block, warps = norm_tile(columns, BACKWARD_VALUES)
    programs = triton.cdiv(rows, tile_rows)
    if need_weight:  # each program leaves a partial row, so there are only as many as fill the device
        programs = min(programs, 4 * processor_count(total.device))
    partial = torch.empty((programs if need_weight else 0, columns), dtype=torch.float32, device=total.device)
    if rows:
        with on_device(total):
            norm_bwd_kernel[(programs,)](
                grad, passed, flat, weight, grad_x, partial,
                grad.stride(0), 0 if passed is None else passed.stride(0), flat.stride(0),
                rows, columns, triton.cdiv(rows, programs), eps, offset,
                ROWS=tile_rows, BLOCK_C=block, HAS_TOTAL=passed is not None, NEED_WEIGHT=need_weight, num_warps=warps,
                enable_fp_fusion=True,
            )  # fmt: skip
    return grad_x, partial.sum(dim=0) if need_weight else partial.new_empty(0)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """As reference.rotary."""
    batch, length, heads_q, dim = q.shape
    heads_k, rotated = k.shape[2], cos.shape[2]
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    heads, width, rest = rotary_tile(heads_q, heads_k, dim, rotated)
    if batch * length:
        with on_device(q):
            rotary_kernel[(batch * length, triton.cdiv(heads_q, heads) + triton.cdiv(heads_k, heads))](
                q, k, *outs, cos, sin, *q.stride()[:3], *k.stride()[:3],
                0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), length, heads_q, heads_k, dim,
                HALF=rotated // 2, HEADS=heads, BLOCK_HALF=width, BLOCK_REST=rest, TRANSPOSED=transposed,
                enable_fp_fusion=True,
            )  # fmt: skip
    return outs[0], outs[1]


def gated_forward(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """As reference.gated_forward."""
    g, u = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    tile_rows, block = gated_tile(g.shape[1])
    if g.numel():
        with on_device(gate):
            gated_fwd_kernel[(triton.cdiv(g.shape[0], tile_rows), triton.cdiv(g.shape[1], block))](
                g, u, out, g.stride(0), u.stride(0), *g.shape,
                ROWS=tile_rows, BLOCK_C=block, KIND=kind, SLOPE=SLOPE, CUBE=CUBE, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """As reference.gated_backward."""
    d, g, u = _rows(grad), _rows(gate), _rows(up)
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    tile_rows, block = gated_tile(g.shape[1])
    if g.numel():
        with on_device(gate):
            gated_bwd_kernel[(triton.cdiv(g.shape[0], tile_rows), triton.cdiv(g.shape[1], block))](
                d, g, u, grad_gate, grad_up, d.stride(0), g.stride(0), u.stride(0), *g.shape,
                ROWS=tile_rows, BLOCK_C=block, KIND=kind, SLOPE=SLOPE, CUBE=CUBE, enable_fp_fusion=True,
            )  # fmt: skip
    return grad_gate, grad_up
