"""What the Hopper kernels in Gluon share: rings of blocks, copies of them, blocks cleaned of what is not their sample's.

A program has two consumers (a warpgroup each), which multiply and own half of its tile, and a producer (one warpgroup), which has
the tensor memory accelerator copy the tile, then block after block into rings of STAGES places. Block i lies at place i % STAGES.

A copy does not know where a sample ends: a block may hold rows of the next sample or padding, which may be NaN, and 0 * NaN is
NaN. Where a product adds them up, the producer overwrites them with zeros before it hands the block on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from grit_kernels.attention.triton_common import edge_block

CONSUMERS = 2
ROWS_EACH = 64
"""Of the tile's rows (or keys): those of a consumer."""

ROWS = CONSUMERS * ROWS_EACH
CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40
PART = 16

# Triton 3.6 has another name
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def place(step, STAGES: gl.constexpr):
    """Where in its ring block ``step`` lies, and the parity of the phase of its barriers that says it is there."""
    return step % STAGES, (step // STAGES) % 2


@gluon.jit
def block_of(step, first, full_first, full_last):
    """The step-th block: those that need no mask, then the edges, so the last block of a sample comes last."""
    full = full_last - full_first
    return gl.where(step < full, full_first + step, edge_block(step - full, first, full_first, full_last))


@gluon.jit
def zero_rows(rows, keep, layout: gl.constexpr):
    """Overwrite with zeros the rows that are not to be kept."""
    b_rows = rows.load(layout)
    rows.store(gl.where(keep[:, None], b_rows, gl.zeros_like(b_rows)))


@gluon.jit
def clean_values(values, valid, BLOCK: gl.constexpr, D: gl.constexpr, PART: gl.constexpr):
    """Overwrite the rows of ``values`` [BLOCK, D] from ``valid`` on with zeros, PART rows at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    o_row = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    for part in gl.static_range(BLOCK // PART):
        if (part + 1) * PART > valid:
            zero_rows(values.slice(part * PART, PART), part * PART + o_row < valid, layout)


@gluon.jit
def copy_block(
    desc, row, column, values, full, raw, raw_parity, valid, BLOCK: gl.constexpr, D: gl.constexpr, PART: gl.constexpr
):
    """Copy BLOCK rows, with zeros from row ``valid`` of them on: where there are such rows, by way of the barrier ``raw``."""
    if BLOCK > valid:
        mbarrier.expect(raw, BLOCK * D * 2)
        copy_tile(desc, [row, column], raw, values)
        mbarrier.wait(raw, raw_parity)
        clean_values(values, valid, BLOCK, D, PART)
        fence_async_shared()
        mbarrier.arrive(full)
    else:
        mbarrier.expect(full, BLOCK * D * 2)
        copy_tile(desc, [row, column], full, values)


@gluon.jit
def store_tile(p_x, b_x, stride, end, FIRST: gl.constexpr, ROWS_EACH: gl.constexpr, D: gl.constexpr):
    """Store a consumer's rows FIRST to FIRST + ROWS_EACH of a tile, those before ``end`` alone."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    b_x = gl.convert_layout(b_x.to(p_x.dtype.element_ty), layout)
    o_row = FIRST + gl.arange(0, ROWS_EACH, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    m_row = o_row < end
    gl.store(p_x + o_row[:, None] * stride + o_d[None, :], b_x, mask=m_row[:, None])


def tile_layout(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile of 2-byte numbers lies in shared memory, for copies and products alike."""
    return gl.NVMMASharedLayout.get_default_for([rows, dim], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """``x`` (T, H, D) as a matrix of T rows whose columns hold the heads, for copies of ``rows`` rows of one head."""
    tokens, heads, dim = x.shape
    columns = (heads - 1) * x.stride(1) + dim
    return TensorDescriptor(x, [tokens, columns], [x.stride(0), 1], [rows, dim], tile_layout(rows, dim, x.dtype))
