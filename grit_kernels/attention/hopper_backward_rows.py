"""Gradient of the queries for Hopper (sm_90a), in Gluon: copies, products and exponentials of different warps side by side.

The same result as backward_rows_kernel of triton_backward.py, whose plan and row statistics it takes: a program owns ROWS rows of
one sample and query head, and walks over the keys that one of them sees. Its

* producer (one warpgroup) has the tensor memory accelerator copy Q and dO of the tile, then blocks of BLOCK keys K and V into
  rings of STAGES;
* consumers (CONSUMERS warpgroups) each own ROWS_EACH of the rows, with dQ in registers:

      S(i) = Q K(i)^T     dP(i) = dO V(i)^T     dQ += dS(i) K(i)

  In step i a consumer issues S(i), computes dS(i - 1) beside it, issues dQ += dS(i - 1) K(i - 1) and dP(i), and computes P(i)
  beside these. Between P and the end of the last product it waits for the keys of the next step: NVIDIA's assembler moves a wait
  for products ahead of arithmetic, but not past the loop that a wait for a barrier is.

Keys of another sample would add 0 * NaN, so the producer overwrites them and their values with zeros. Rows of another sample give
only rows of dQ that are not stored.

Barriers (mbarrier; each phase ends after the number of arrivals in brackets; step i uses place i % STAGES of a ring):

    tile_full [1, and the bytes of Q and dO]    empty [CONSUMERS]    raw [1, and the bytes of a block to clean]
    k_full, v_full [1, and the bytes; or 1, the producer's once a block is clean]

No GPU has run this. tests/grit_kernels/attention/test_hopper_backward.py runs the functions below on paper, records what they do
to barriers and buffers, explores every order of it, and reads the machine code.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from grit_kernels.attention.hopper_common import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PART,
    ROWS_EACH,
    block_of,
    copy_block,
    copy_tile,
    describe,
    place,
    store_tile,
)
from grit_kernels.attention.problem import SampleTables
from grit_kernels.attention.triton_backward import STATISTICS
from grit_kernels.attention.triton_common import key_range, load_sample, tile_keys
from grit_kernels.attention.triton_plan import Plan, program_tile

BLOCK = 64
STAGES = 3


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, do_desc, q_tiles, do_tiles, k_ring, v_ring, tile_full, k_full, v_full, empty, raw,
    q_row, q_column, do_column, k_row, k_column, v_column, first, full_first, full_last, steps, valid,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, ROWS_EACH: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """Copy Q and dO, then K and V of one block after the other."""
    mbarrier.expect(tile_full, 2 * CONSUMERS * ROWS_EACH * D * 2)
    for consumer in gl.static_range(CONSUMERS):
        copy_tile(q_desc, [q_row + consumer * ROWS_EACH, q_column], tile_full, q_tiles.index(consumer))
        copy_tile(do_desc, [q_row + consumer * ROWS_EACH, do_column], tile_full, do_tiles.index(consumer))
    for step in range(0, steps):
        at, parity = place(step, STAGES)
        key = block_of(step, first, full_first, full_last) * BLOCK
        mbarrier.wait(empty.index(at), 1 - parity)
        copy_block(
            k_desc, k_row + key, k_column, k_ring.index(at), k_full.index(at), raw, 0, valid - key, BLOCK, D, PART
        )
        copy_block(
            v_desc, k_row + key, v_column, v_ring.index(at), v_full.index(at), raw, 1, valid - key, BLOCK, D, PART
        )


@gluon.jit
def probabilities(b_s, b_less, block, b_lo, b_hi, scale, BLOCK: gl.constexpr, EDGE: gl.constexpr, layout: gl.constexpr):
    """P from the products of a block; ``b_less`` is -lse in units of log2."""
    b_p = gl.exp2(b_s * scale + b_less[:, None])
    if EDGE:
        key = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
        b_p = gl.where((key[None, :] >= b_lo[:, None]) & (key[None, :] < b_hi[:, None]), b_p, 0.0)
    return b_p


@gluon.jit
def gather_keys(
    b_dq, b_p, b_dp, b_less, b_less_delta, step, steps, block, b_lo, b_hi, q_tiles, do_tiles, k_ring, v_ring, k_full, v_full,
    empty, scale,
    CONSUMER: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, ROWS_EACH: gl.constexpr, EDGE: gl.constexpr,
    s_layout: gl.constexpr, a_layout: gl.constexpr,
):  # fmt: skip
    """dQ += dS(step - 1) K(step - 1), and P(step) and dP(step). K(step) is there; before dQ is, so is K(step + 1)."""
    at, parity = place(step, STAGES)
    before, _ = place(step - 1, STAGES)
    b_zero = gl.zeros([ROWS_EACH, BLOCK], gl.float32, s_layout)
    s_running = warpgroup_mma(
        q_tiles.index(CONSUMER), k_ring.index(at).permute((1, 0)), b_zero, use_acc=False, is_async=True
    )
    b_dp = b_p * (b_dp + b_less_delta[:, None])
    b_ds = gl.convert_layout(b_dp.to(k_ring.dtype), a_layout)
    dq_running = warpgroup_mma(b_ds, k_ring.index(before), b_dq, is_async=True)
    mbarrier.wait(v_full.index(at), parity)
    dp_running = warpgroup_mma(
        do_tiles.index(CONSUMER), v_ring.index(at).permute((1, 0)), b_zero, use_acc=False, is_async=True
    )
    b_s = warpgroup_mma_wait(2, [s_running])
    b_p = probabilities(b_s, b_less, block, b_lo, b_hi, scale, BLOCK, EDGE, s_layout)
    following, parity = place(step + 1, STAGES)
    mbarrier.wait(k_full.index(following), parity, pred=step + 1 < steps)
    # with p among what it waits for, the wait cannot move before it
    b_dq, b_dp, b_p, b_ds = warpgroup_mma_wait(0, [dq_running, dp_running, b_p, b_ds])
    mbarrier.arrive(empty.index(before))
    return b_dq, b_p, b_dp


@gluon.jit
def consume(
    p_dq, p_stat, p_hi, q_tiles, do_tiles, k_ring, v_ring, tile_full, k_full, v_full, empty,
    first_row, len_q, len_k, left, right, first, full_first, full_last, steps, stored, scale, softmax_scale,
    CONSUMER: gl.constexpr, STRIDE: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    ROWS_EACH: gl.constexpr, HAS_HI: gl.constexpr,
):  # fmt: skip
    """dQ of a consumer's rows of the tile."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    row = first_row + CONSUMER * ROWS_EACH + gl.arange(0, ROWS_EACH, layout=gl.SliceLayout(1, s_layout))
    b_lo, b_hi = key_range(row, p_hi, len_q, len_k, left, right, HAS_HI)
    m_row = (row < len_q) & (b_lo < b_hi)
    b_less = gl.load(p_stat + row * STATISTICS, mask=m_row, other=0.0)
    b_less_delta = gl.load(p_stat + row * STATISTICS + 1, mask=m_row, other=0.0)

    mbarrier.wait(tile_full, 0)
    at, parity = place(0, STAGES)
    mbarrier.wait(k_full.index(at), parity)
    b_zero = gl.zeros([ROWS_EACH, BLOCK], gl.float32, s_layout)
    s_running = warpgroup_mma(
        q_tiles.index(CONSUMER), k_ring.index(at).permute((1, 0)), b_zero, use_acc=False, is_async=True
    )
    mbarrier.wait(v_full.index(at), parity)
    dp_running = warpgroup_mma(
        do_tiles.index(CONSUMER), v_ring.index(at).permute((1, 0)), b_zero, use_acc=False, is_async=True
    )
    b_s = warpgroup_mma_wait(1, [s_running])
    block = block_of(0, first, full_first, full_last)
    b_p = probabilities(b_s, b_less, block, b_lo, b_hi, scale, BLOCK, True, s_layout)
    following, parity = place(1, STAGES)
    mbarrier.wait(k_full.index(following), parity, pred=steps > 1)
    b_dp, b_p = warpgroup_mma_wait(0, [dp_running, b_p])
    b_dq = gl.zeros([ROWS_EACH, D], gl.float32, d_layout)

    full = gl.maximum(full_last - full_first, 1)
    for step in range(1, full):
        b_dq, b_p, b_dp = gather_keys(
            b_dq, b_p, b_dp, b_less, b_less_delta, step, steps, 0, b_lo, b_hi, q_tiles, do_tiles, k_ring, v_ring, k_full,
            v_full, empty, scale, CONSUMER, BLOCK, STAGES, ROWS_EACH, False, s_layout, a_layout,
        )  # fmt: skip
    for step in range(full, steps):
        block = block_of(step, first, full_first, full_last)
        b_dq, b_p, b_dp = gather_keys(
            b_dq, b_p, b_dp, b_less, b_less_delta, step, steps, block, b_lo, b_hi, q_tiles, do_tiles, k_ring, v_ring, k_full,
            v_full, empty, scale, CONSUMER, BLOCK, STAGES, ROWS_EACH, True, s_layout, a_layout,
        )  # fmt: skip
    at, _ = place(steps - 1, STAGES)
    b_dp = b_p * (b_dp + b_less_delta[:, None])
    b_ds = gl.convert_layout(b_dp.to(k_ring.dtype), a_layout)
    dq_running = warpgroup_mma(b_ds, k_ring.index(at), b_dq, is_async=True)
    b_dq, b_ds = warpgroup_mma_wait(0, [dq_running, b_ds])

    # where, as a factor of 0 would keep the NaN of a padding row
    alive = gl.convert_layout(m_row, gl.SliceLayout(1, d_layout))
    b_dq = gl.where(alive[:, None], b_dq * softmax_scale, 0.0)
    store_tile(p_dq, b_dq, STRIDE, stored, CONSUMER * ROWS_EACH, ROWS_EACH, D)


@gluon.jit(do_not_specialize=["rows", "tiles", "heads_side_by_side", "q_rows"])
def backward_rows_hopper_kernel(
    q_desc, k_desc, v_desc, do_desc, p_dq, p_stat, p_table, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
    stride_qh, stride_kh, stride_vh, stride_doh, rows, tiles, heads_side_by_side, q_rows, scale, softmax_scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, ROWS_EACH: gl.constexpr, PART: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    HAS_HI: gl.constexpr,
):  # fmt: skip
    """One tile of the plan's table per program."""
    head, sample, block = program_tile(p_table, tiles, heads_side_by_side, gl.program_id(0))
    if block < 0:
        return
    q_start, len_q, k_start, len_k, left, right = load_sample(
        p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, sample
    )
    first_row = block * (CONSUMERS * ROWS_EACH)
    p_hi += q_start
    first, full_first, full_last, last = tile_keys(
        first_row, first_row + CONSUMERS * ROWS_EACH, p_hi, len_q, len_k, left, right, BLOCK, HAS_HI
    )
    # a tile that sees no key multiplies one block of zeros
    valid = gl.where(last > first, len_k, 0)
    steps = gl.maximum(last - first, 1)
    head_kv = head // GROUP
    p_stat += (gl.cast(head, gl.int64) * rows + q_start) * STATISTICS
    p_dq += ((q_start + first_row) * HEADS + head) * D
    stored = gl.maximum(len_q, q_rows) - first_row

    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS_EACH, D], q_desc.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS_EACH, D], do_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], v_desc.layout)
    tile_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(tile_full, count=1)
    mbarrier.init(raw, count=1)
    for at in gl.static_range(STAGES):
        mbarrier.init(k_full.index(at), count=1)
        mbarrier.init(empty.index(at), count=CONSUMERS)
        mbarrier.init(v_full.index(at), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (produce, (
                q_desc, k_desc, v_desc, do_desc, q_tiles, do_tiles, k_ring, v_ring, tile_full, k_full, v_full, empty,
                raw, (q_start + first_row).to(gl.int32), head * stride_qh, head * stride_doh, k_start.to(gl.int32),
                head_kv * stride_kh, head_kv * stride_vh, first, full_first, full_last, steps, valid,
                D, BLOCK, STAGES, CONSUMERS, ROWS_EACH, PART,
            )),
            (consume, (
                p_dq, p_stat, p_hi, q_tiles, do_tiles, k_ring, v_ring, tile_full, k_full, v_full, empty,
                first_row, len_q, len_k, left, right, first, full_first, full_last, steps, stored, scale, softmax_scale,
                gl.constexpr(0), HEADS * D, D, BLOCK, STAGES, ROWS_EACH, HAS_HI,
            )),
            (consume, (
                p_dq, p_stat, p_hi, q_tiles, do_tiles, k_ring, v_ring, tile_full, k_full, v_full, empty,
                first_row, len_q, len_k, left, right, first, full_first, full_last, steps, stored, scale, softmax_scale,
                gl.constexpr(1), HEADS * D, D, BLOCK, STAGES, ROWS_EACH, HAS_HI,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )  # fmt: skip


def constants(dim: int) -> dict[str, int]:
    """The kernel's compile-time numbers that depend on the head dimension alone."""
    return {
        **{"D": dim, "BLOCK": BLOCK, "STAGES": STAGES, "CONSUMERS": CONSUMERS, "ROWS_EACH": ROWS_EACH},
        **{"PART": PART, "CONSUMER_REGISTERS": CONSUMER_REGISTERS},
    }


def launch(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, dq: Tensor, statistics: Tensor, bounds: SampleTables,
    hi: Tensor | None, q_rows: int, plan: Plan, scale: float, softmax_scale: float,
) -> None:  # fmt: skip
    """Fill ``dq`` for the samples in the plan's table. ``softmax_scale``: with the sign that ``q`` and ``scale`` lack."""
    rows, heads, dim = q.shape
    backward_rows_hopper_kernel[(plan.tiles * heads,)](
        describe(q, ROWS_EACH), describe(k, BLOCK), describe(v, BLOCK), describe(grad_out, ROWS_EACH), dq, statistics,
        plan.table, *bounds, bounds[0] if hi is None else hi, q.stride(1), k.stride(1), v.stride(1), grad_out.stride(1),
        rows, plan.tiles, plan.side_by_side, q_rows, scale, softmax_scale,
        HEADS=heads, GROUP=heads // k.shape[1], HAS_HI=hi is not None, num_warps=4, enable_fp_fusion=True, **constants(dim),
    )  # fmt: skip
