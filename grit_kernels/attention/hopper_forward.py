"""Switch attention forward for Hopper (sm_90a), in Gluon: copies, products and softmax of different warps run side by side.

The same result as triton_forward.py, whose plan it takes: a program owns ROWS rows of one sample and one query head. Its

* producer (one warpgroup) has the tensor memory accelerator copy Q, then blocks of BLOCK keys K and V into rings of STAGES;
* consumers (CONSUMERS warpgroups) each own ROWS_EACH of the rows. In step i a consumer issues S(i) = Q K(i)^T and
  out += P(i - 1) V(i - 1), then computes the softmax of S(i) while the second product still runs; P stays in registers.
  The consumers issue their products in turns (ping-pong), so the softmax of one runs beside the products of the other.
  Between softmax and the end of the second product a consumer waits for the keys of the next step: NVIDIA's assembler moves a
  wait for products ahead of the exponentials, but not past the loop that a wait for a barrier is.

A copy does not know where a sample ends: a block may hold keys of the next sample. Scores of those are masked as everywhere;
their values may be NaN, and 0 * NaN is NaN, so the producer overwrites them with zeros before it hands the block on.

Barriers (mbarrier; each phase ends after the number of arrivals in brackets; step i uses place i % STAGES of a ring):

    q_full, k_full [1, and the bytes]    k_empty, v_empty [CONSUMERS]    turns, one of each consumer [1: the other one]
    v_full [1, and the bytes; or 1, the producer's once a block is clean]    v_raw [1, and the bytes of the block to clean]

No GPU has run this. tests/grit_kernels/attention/test_hopper.py runs the functions below on paper, records what they do to
barriers and buffers, explores every order of it, and reads the machine code.
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
    PRODUCER_REGISTERS,
    ROWS_EACH,
    block_of,
    copy_block,
    copy_tile,
    describe,
    place,
    store_tile,
)
from grit_kernels.attention.problem import SampleTables
from grit_kernels.attention.triton_common import key_range, load_sample, tile_keys, with_sink
from grit_kernels.attention.triton_plan import Plan, program_tile

BLOCK = 128
STAGES = {64: 3, 128: 2}
"""By head dimension: two blocks of K and V, Q and the rows of out on their way to memory fill the shared memory at 128."""


@gluon.jit
def turn_parity(step, CONSUMER: gl.constexpr):
    """The parity of the phase that begins a consumer's turn: the first consumer's first turn is that of a new barrier."""
    return (step + 1 + CONSUMER) % 2


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring, q_full, k_full, k_empty, v_raw, v_full, v_empty,
    q_row, q_column, k_row, k_column, v_column, first, full_first, full_last, steps, valid,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, ROWS_EACH: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """Copy Q, then K(0), K(1), V(0), K(2), V(1), ...: in the order in which consumers need them."""
    mbarrier.expect(q_full, CONSUMERS * ROWS_EACH * D * 2)
    for consumer in gl.static_range(CONSUMERS):
        copy_tile(q_desc, [q_row + consumer * ROWS_EACH, q_column], q_full, q_tiles.index(consumer))
    for step in range(0, steps + 1):
        if step < steps:
            at, parity = place(step, STAGES)
            mbarrier.wait(k_empty.index(at), 1 - parity)
            mbarrier.expect(k_full.index(at), BLOCK * D * 2)
            row = k_row + block_of(step, first, full_first, full_last) * BLOCK
            copy_tile(k_desc, [row, k_column], k_full.index(at), k_ring.index(at))
        if step > 0:
            at, parity = place(step - 1, STAGES)
            mbarrier.wait(v_empty.index(at), 1 - parity)
            block = block_of(step - 1, first, full_first, full_last)
            copy_block(
                v_desc, k_row + block * BLOCK, v_column, v_ring.index(at), v_full.index(at), v_raw, 0, valid - block * BLOCK,
                BLOCK, D, PART,
            )  # fmt: skip


@gluon.jit
def softmax_step(
    b_s, b_top, b_total, block, b_lo, b_hi, scale, BLOCK: gl.constexpr, EDGE: gl.constexpr, layout: gl.constexpr
):
    """As attend of triton_common.py: (p, maximum, sum, factor of what came before); scores in units of log2."""
    if EDGE:
        key = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
        visible = (key[None, :] >= b_lo[:, None]) & (key[None, :] < b_hi[:, None])
        b_s = gl.where(visible, b_s, float("-inf"))
    b_new = gl.maximum(b_top, gl.max(b_s, 1) * scale)
    b_shift = b_new
    if EDGE:
        # a row that has seen nothing yet subtracts 0: -inf - -inf is NaN
        b_shift = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * scale - b_shift[:, None])
    b_rescale = gl.exp2(b_top - b_shift)
    return b_p, b_new, b_total * b_rescale + gl.sum(b_p, 1), b_rescale


@gluon.jit
def overlapped_step(
    b_out, b_p, b_top, b_total, step, steps, q_tile, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns,
    block, b_lo, b_hi, scale, CONSUMER: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    ROWS_EACH: gl.constexpr, EDGE: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """S(step) and out += P(step - 1) V(step - 1) in one turn, then the softmax of S(step) beside the second product.

    K(step) is there; before the second product ends, so is K(step + 1).
    """
    k_at, _ = place(step, STAGES)
    v_at, v_parity = place(step - 1, STAGES)
    mbarrier.wait(turns.index(CONSUMER), turn_parity(step, CONSUMER))
    b_s = gl.zeros([ROWS_EACH, BLOCK], gl.float32, s_layout)
    s_running = warpgroup_mma(q_tile, k_ring.index(k_at).permute((1, 0)), b_s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_at), v_parity)
    out_running = warpgroup_mma(b_p, v_ring.index(v_at), b_out, is_async=True)
    mbarrier.arrive(turns.index(1 - CONSUMER))
    b_s = warpgroup_mma_wait(1, [s_running])
    mbarrier.arrive(k_empty.index(k_at))
    b_next, b_top, b_total, b_rescale = softmax_step(
        b_s, b_top, b_total, block, b_lo, b_hi, scale, BLOCK, EDGE, s_layout
    )
    at, parity = place(step + 1, STAGES)
    mbarrier.wait(k_full.index(at), parity, pred=step + 1 < steps)
    # with p among what it waits for, the wait cannot move before the softmax
    b_out, b_next = warpgroup_mma_wait(0, [out_running, b_next])
    mbarrier.arrive(v_empty.index(v_at))
    b_rescale = gl.convert_layout(b_rescale, gl.SliceLayout(1, o_layout))
    b_out = b_out * b_rescale[:, None]
    b_p = gl.convert_layout(b_next.to(b_p.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return b_out, b_p, b_top, b_total


@gluon.jit
def consume(
    p_out, p_lse, p_sinks, p_hi, q_tiles, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty, turns,
    q_start, first_row, len_q, len_k, left, right, q_rows, head, first, full_first, full_last, steps, scale,
    CONSUMER: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    ROWS_EACH: gl.constexpr, HAS_HI: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """A consumer's rows of the tile over all its blocks, and their out and lse."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row = first_row + CONSUMER * ROWS_EACH + gl.arange(0, ROWS_EACH, layout=gl.SliceLayout(1, s_layout))
    b_lo, b_hi = key_range(row, p_hi, len_q, len_k, left, right, HAS_HI)
    q_tile = q_tiles.index(CONSUMER)

    mbarrier.wait(q_full, 0)
    at, parity = place(0, STAGES)
    mbarrier.wait(k_full.index(at), parity)
    mbarrier.wait(turns.index(CONSUMER), turn_parity(0, CONSUMER))
    b_s = gl.zeros([ROWS_EACH, BLOCK], gl.float32, s_layout)
    s_running = warpgroup_mma(q_tile, k_ring.index(at).permute((1, 0)), b_s, use_acc=False, is_async=True)
    mbarrier.arrive(turns.index(1 - CONSUMER))
    b_s = warpgroup_mma_wait(0, [s_running])
    mbarrier.arrive(k_empty.index(at))
    b_top = gl.full([ROWS_EACH], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    b_total = gl.zeros([ROWS_EACH], gl.float32, gl.SliceLayout(1, s_layout))
    block = block_of(0, first, full_first, full_last)
    b_s, b_top, b_total, b_rescale = softmax_step(b_s, b_top, b_total, block, b_lo, b_hi, scale, BLOCK, True, s_layout)
    b_p = gl.convert_layout(b_s.to(k_ring.dtype), p_layout)
    at, parity = place(1, STAGES)
    mbarrier.wait(k_full.index(at), parity, pred=steps > 1)
    b_out = gl.zeros([ROWS_EACH, D], gl.float32, o_layout)

    full = gl.maximum(full_last - full_first, 1)
    for step in range(1, full):
        b_out, b_p, b_top, b_total = overlapped_step(
            b_out, b_p, b_top, b_total, step, steps, q_tile, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns,
            full_first + step, b_lo, b_hi, scale, CONSUMER, D, BLOCK, STAGES, ROWS_EACH, False, s_layout, o_layout,
        )  # fmt: skip
    for step in range(full, steps):
        b_out, b_p, b_top, b_total = overlapped_step(
            b_out, b_p, b_top, b_total, step, steps, q_tile, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns,
            block_of(step, first, full_first, full_last), b_lo, b_hi, scale, CONSUMER, D, BLOCK, STAGES, ROWS_EACH, True,
            s_layout, o_layout,
        )  # fmt: skip
    at, parity = place(steps - 1, STAGES)
    mbarrier.wait(v_full.index(at), parity)
    out_running = warpgroup_mma(b_p, v_ring.index(at), b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, [out_running])

    dead = (b_total == 0.0) | (row >= len_q)
    b_lse = b_top + gl.log2(b_total)
    b_factor = gl.where(dead, 0.0, 1.0 / b_total)
    if HAS_SINKS:
        b_lse, b_share = with_sink(b_lse, gl.load(p_sinks + head))
        b_factor = gl.where(dead, 0.0, b_factor * b_share)
    b_lse = gl.where(dead, float("-inf"), b_lse * 0.6931471805599453)
    gl.store(p_lse + (q_start + row) * HEADS + head, b_lse, mask=row < gl.maximum(len_q, q_rows))
    b_factor = gl.convert_layout(b_factor, gl.SliceLayout(1, o_layout))
    # where, as a factor of 0 would keep the NaN of a padding row
    b_out = gl.where(b_factor[:, None] == 0.0, 0.0, b_out * b_factor[:, None])
    p_out += (q_start + first_row) * (HEADS * D) + head * D
    stored = gl.maximum(len_q, q_rows) - first_row
    store_tile(p_out, b_out, HEADS * D, stored, CONSUMER * ROWS_EACH, ROWS_EACH, D)


@gluon.jit(do_not_specialize=["tiles", "heads_side_by_side", "q_rows"])
def attention_hopper_kernel(
    q_desc, k_desc, v_desc, p_out, p_lse, p_sinks, p_table, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
    stride_qh, stride_kh, stride_vh, tiles, heads_side_by_side, q_rows, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, ROWS_EACH: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, HAS_HI: gl.constexpr,
    HAS_SINKS: gl.constexpr,
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
    # a tile that sees no key masks one block, whose values are all zeros
    valid = gl.where(last > first, len_k, 0)
    steps = gl.maximum(last - first, 1)
    head_kv = head // GROUP

    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS_EACH, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    init_barriers(q_full, k_full, k_empty, v_raw, v_full, v_empty, turns, STAGES, CONSUMERS)
    fence_async_shared()

    gl.warp_specialize(
        [
            (consume, (
                p_out, p_lse, p_sinks, p_hi, q_tiles, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty, turns,
                q_start, first_row, len_q, len_k, left, right, q_rows, head, first, full_first, full_last, steps, scale,
                gl.constexpr(0), HEADS, D, BLOCK, STAGES, ROWS_EACH, HAS_HI, HAS_SINKS,
            )),
            (consume, (
                p_out, p_lse, p_sinks, p_hi, q_tiles, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty, turns,
                q_start, first_row, len_q, len_k, left, right, q_rows, head, first, full_first, full_last, steps, scale,
                gl.constexpr(1), HEADS, D, BLOCK, STAGES, ROWS_EACH, HAS_HI, HAS_SINKS,
            )),
            (produce, (
                q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring, q_full, k_full, k_empty, v_raw, v_full, v_empty,
                (q_start + first_row).to(gl.int32), head * stride_qh, k_start.to(gl.int32), head_kv * stride_kh,
                head_kv * stride_vh, first, full_first, full_last, steps, valid,
                D, BLOCK, STAGES, CONSUMERS, ROWS_EACH, PART,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def init_barriers(
    q_full, k_full, k_empty, v_raw, v_full, v_empty, turns, STAGES: gl.constexpr, CONSUMERS: gl.constexpr
):
    mbarrier.init(q_full, count=1)
    mbarrier.init(v_raw, count=1)
    for at in gl.static_range(STAGES):
        mbarrier.init(k_full.index(at), count=1)
        mbarrier.init(k_empty.index(at), count=CONSUMERS)
        mbarrier.init(v_full.index(at), count=1)
        mbarrier.init(v_empty.index(at), count=CONSUMERS)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)


def constants(dim: int) -> dict[str, int]:
    """The kernel's compile-time numbers that depend on the head dimension alone."""
    return {
        **{"D": dim, "BLOCK": BLOCK, "STAGES": STAGES[dim], "CONSUMERS": CONSUMERS, "ROWS_EACH": ROWS_EACH},
        **{"PART": PART, "CONSUMER_REGISTERS": CONSUMER_REGISTERS, "PRODUCER_REGISTERS": PRODUCER_REGISTERS},
    }


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, bounds: SampleTables, hi: Tensor | None,
    q_rows: int, plan: Plan, scale: float,
) -> None:  # fmt: skip
    """Fill ``out`` and ``lse`` for the samples in the plan's table."""
    heads = q.shape[1]
    attention_hopper_kernel[(plan.tiles * heads,)](
        describe(q, ROWS_EACH), describe(k, BLOCK), describe(v, BLOCK), out, lse, lse if sinks is None else sinks, plan.table,
        *bounds, bounds[0] if hi is None else hi, q.stride(1), k.stride(1), v.stride(1), plan.tiles, plan.side_by_side, q_rows,
        scale, HEADS=heads, GROUP=heads // k.shape[1], HAS_HI=hi is not None, HAS_SINKS=sinks is not None, num_warps=4,
        enable_fp_fusion=True, **constants(q.shape[2]),
    )  # fmt: skip
