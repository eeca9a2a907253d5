"""Gradients of keys and values for Hopper (sm_90a), in Gluon: copies, products and exponentials of different warps side by side.

The same result as backward_keys_kernel of triton_backward.py, whose plan and row statistics it takes: a program owns KEYS keys of
one sample and key head, and walks over the rows of all query heads of its group that see one of them. Its

* producer (one warpgroup) has the tensor memory accelerator copy K and V of the tile, then blocks of BLOCK rows of Q and dO into
  rings of STAGES, and puts the rows' statistics beside them, and which keys they see;
* consumers (CONSUMERS warpgroups) each own ROWS_EACH of the keys. All products are transposed: P^T and dS^T [keys, rows] are
  what a product leaves in registers, and enter the next one from there:

      S^T(i) = K Q(i)^T     dP^T(i) = V dO(i)^T     dV += P^T(i) dO(i)     dK += dS^T(i) Q(i)

  In step i a consumer issues dK += dS(i - 1) Q(i - 1), S(i) and dP(i), computes P(i) beside the last, issues dV += P(i) dO(i),
  and computes dS(i) beside that. Between dS and the end of that product it waits for the rows of the next step: NVIDIA's
  assembler moves a wait for products ahead of arithmetic, but not past the loop that a wait for a barrier is.

Rows of another sample, and rows that see no key, would add 0 * NaN, so the producer overwrites them with zeros. Keys of another
sample give only rows of dK and dV that are not stored.

Barriers (mbarrier; each phase ends after the number of arrivals in brackets; step i uses place i % STAGES of a ring):

    tile_full [1, and the bytes of K and V]    rows_empty [CONSUMERS]    raw [1, and the bytes of a block to clean]
    rows_full [2: the statistics, and the bytes of Q and dO or the producer once both are clean]

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
    copy_tile,
    describe,
    place,
    store_tile,
    zero_rows,
)
from grit_kernels.attention.problem import SampleTables
from grit_kernels.attention.triton_backward import STATISTICS
from grit_kernels.attention.triton_common import edge_block, key_range, load_sample, tile_rows
from grit_kernels.attention.triton_plan import Plan, program_tile

BLOCK = 64
STAGES = 3


@gluon.jit
def head_and_block(step, first, full_first, full_last, last, GROUP: gl.constexpr):
    """The step-th block of rows: of each head those that need no mask, then of each head the edges."""
    full = full_last - full_first
    edges = gl.maximum((full_first - first) + (last - full_last), 1)
    edge = step - full * GROUP
    head = gl.where(edge < 0, step // gl.maximum(full, 1), edge // edges)
    block = gl.where(
        edge < 0, full_first + step - head * full, edge_block(edge - head * edges, first, full_first, full_last)
    )
    return head, block


@gluon.jit
def clean_rows(
    q_tile, do_tile, first_row, p_hi, len_q, len_k, left, right,
    BLOCK: gl.constexpr, D: gl.constexpr, PART: gl.constexpr, HAS_HI: gl.constexpr,
):  # fmt: skip
    """Overwrite with zeros the rows of a block that see no key, PART rows at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    o_row = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    for part in gl.static_range(BLOCK // PART):
        row = first_row + part * PART + o_row
        b_lo, b_hi = key_range(row, p_hi, len_q, len_k, left, right, HAS_HI)
        keep = (row < len_q) & (b_lo < b_hi)
        zero_rows(q_tile.slice(part * PART, PART), keep, layout)
        zero_rows(do_tile.slice(part * PART, PART), keep, layout)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, do_desc, p_stat, p_hi, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring, lo_ring, hi_ring,
    tile_full, rows_full, rows_empty, raw, q_row, stride_qh, stride_doh, head_first, rows, k_row, k_column, v_column,
    first, full_first, full_last, last, full, steps, len_q, len_k, left, right,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    ROWS_EACH: gl.constexpr, PART: gl.constexpr, HAS_HI: gl.constexpr,
):  # fmt: skip
    """Copy K and V, then the rows of one block after the other with their statistics; a row that sees no key becomes 0."""
    mbarrier.expect(tile_full, 2 * CONSUMERS * ROWS_EACH * D * 2)
    for consumer in gl.static_range(CONSUMERS):
        copy_tile(k_desc, [k_row + consumer * ROWS_EACH, k_column], tile_full, k_tiles.index(consumer))
        copy_tile(v_desc, [k_row + consumer * ROWS_EACH, v_column], tile_full, v_tiles.index(consumer))
    cleaned = 0
    for step in range(0, steps):
        at, parity = place(step, STAGES)
        head, block = head_and_block(step, first, full_first, full_last, last, GROUP)
        head += head_first
        row = block * BLOCK + gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
        b_lo, b_hi = key_range(row, p_hi, len_q, len_k, left, right, HAS_HI)
        m_row = (row < len_q) & (b_lo < b_hi)
        dead = 0
        if step >= full:
            dead = 1 - gl.min(m_row.to(gl.int32), 0)
        mbarrier.wait(rows_empty.index(at), 1 - parity)
        if dead > 0:
            mbarrier.expect(raw, 2 * BLOCK * D * 2)
            copy_tile(q_desc, [q_row + block * BLOCK, head * stride_qh], raw, q_ring.index(at))
            copy_tile(do_desc, [q_row + block * BLOCK, head * stride_doh], raw, do_ring.index(at))
            mbarrier.wait(raw, cleaned % 2)
            cleaned += 1
            clean_rows(
                q_ring.index(at),
                do_ring.index(at),
                block * BLOCK,
                p_hi,
                len_q,
                len_k,
                left,
                right,
                BLOCK,
                D,
                PART,
                HAS_HI,
            )
            fence_async_shared()
            mbarrier.arrive(rows_full.index(at))
        else:
            mbarrier.expect(rows_full.index(at), 2 * BLOCK * D * 2)
            copy_tile(q_desc, [q_row + block * BLOCK, head * stride_qh], rows_full.index(at), q_ring.index(at))
            copy_tile(do_desc, [q_row + block * BLOCK, head * stride_doh], rows_full.index(at), do_ring.index(at))
        p_row = p_stat + (gl.cast(head, gl.int64) * rows + q_row + row) * STATISTICS
        less_ring.index(at).store(gl.load(p_row, mask=m_row, other=0.0))
        delta_ring.index(at).store(gl.load(p_row + 1, mask=m_row, other=0.0))
        lo_ring.index(at).store(b_lo)
        hi_ring.index(at).store(b_hi)
        mbarrier.arrive(rows_full.index(at))


@gluon.jit
def gather_rows(
    b_dk, b_dv, b_ds, step, steps, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring, lo_ring, hi_ring, rows_full,
    rows_empty, key, scale,
    CONSUMER: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, ROWS_EACH: gl.constexpr, FIRST: gl.constexpr,
    EDGE: gl.constexpr, s_layout: gl.constexpr, a_layout: gl.constexpr,
):  # fmt: skip
    """Issue dK += dS(step - 1) Q(step - 1), but for the FIRST step; add P(step) dO(step) to dV; dS(step).

    The rows of the step are there; before dV is, so are those of step + 1.
    """
    at, _ = place(step, STAGES)
    before, _ = place(step - 1, STAGES)
    q_rows, do_rows = q_ring.index(at), do_ring.index(at)
    # 0 as well, but the compiler cannot know: it would keep the tiles' addresses in registers, of which there are too few
    tile = CONSUMER + (step >> 30)
    b_zero = gl.zeros([ROWS_EACH, BLOCK], gl.float32, s_layout)
    if not FIRST:
        dk_running = warpgroup_mma(b_ds, q_ring.index(before), b_dk, is_async=True)
    s_running = warpgroup_mma(k_tiles.index(tile), q_rows.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    if not FIRST:
        # before dP begins, as its sums take the registers of dS
        b_dk, b_ds = warpgroup_mma_wait(1, [dk_running, b_ds])
        mbarrier.arrive(rows_empty.index(before))
    dp_running = warpgroup_mma(v_tiles.index(tile), do_rows.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, [s_running])
    b_less = less_ring.index(at).load(gl.SliceLayout(0, s_layout))
    b_p = gl.exp2(b_s * scale + b_less[None, :])
    if EDGE:
        b_lo = lo_ring.index(at).load(gl.SliceLayout(0, s_layout))
        b_hi = hi_ring.index(at).load(gl.SliceLayout(0, s_layout))
        b_p = gl.where((key[:, None] >= b_lo[None, :]) & (key[:, None] < b_hi[None, :]), b_p, 0.0)
    b_p16 = gl.convert_layout(b_p.to(q_ring.dtype), a_layout)
    dv_running = warpgroup_mma(b_p16, do_rows, b_dv, is_async=True)
    b_dp = warpgroup_mma_wait(1, [dp_running])
    b_less_delta = delta_ring.index(at).load(gl.SliceLayout(0, s_layout))
    b_dp = b_p * (b_dp + b_less_delta[None, :])
    b_ds = gl.convert_layout(b_dp.to(q_ring.dtype), a_layout)
    following, parity = place(step + 1, STAGES)
    mbarrier.wait(rows_full.index(following), parity, pred=step + 1 < steps)
    # with ds among what it waits for, the wait cannot move before it
    b_dv, b_ds, b_p16 = warpgroup_mma_wait(0, [dv_running, b_ds, b_p16])
    return b_dk, b_dv, b_ds


@gluon.jit
def consume(
    p_dk, p_dv, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring, lo_ring, hi_ring, tile_full, rows_full, rows_empty,
    first_key, full, steps, seen_end, owned_end, scale,
    CONSUMER: gl.constexpr, STRIDE: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    ROWS_EACH: gl.constexpr,
):  # fmt: skip
    """dK and dV of a consumer's keys of the tile."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    key = first_key + CONSUMER * ROWS_EACH + gl.arange(0, ROWS_EACH, layout=gl.SliceLayout(1, s_layout))
    b_dk = gl.zeros([ROWS_EACH, D], gl.float32, d_layout)
    b_dv = gl.zeros([ROWS_EACH, D], gl.float32, d_layout)
    b_ds = gl.zeros([ROWS_EACH, BLOCK], q_ring.dtype, a_layout)

    mbarrier.wait(tile_full, 0)
    at, parity = place(0, STAGES)
    mbarrier.wait(rows_full.index(at), parity)
    b_dk, b_dv, b_ds = gather_rows(
        b_dk, b_dv, b_ds, 0, steps, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring, lo_ring, hi_ring, rows_full,
        rows_empty, key, scale, CONSUMER, BLOCK, STAGES, ROWS_EACH, True, True, s_layout, a_layout,
    )  # fmt: skip
    full = gl.maximum(full, 1)
    for step in range(1, full):
        b_dk, b_dv, b_ds = gather_rows(
            b_dk, b_dv, b_ds, step, steps, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring, lo_ring, hi_ring, rows_full,
            rows_empty, key, scale, CONSUMER, BLOCK, STAGES, ROWS_EACH, False, False, s_layout, a_layout,
        )  # fmt: skip
    for step in range(full, steps):
        b_dk, b_dv, b_ds = gather_rows(
            b_dk, b_dv, b_ds, step, steps, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring, lo_ring, hi_ring, rows_full,
            rows_empty, key, scale, CONSUMER, BLOCK, STAGES, ROWS_EACH, False, True, s_layout, a_layout,
        )  # fmt: skip
    at, _ = place(steps - 1, STAGES)
    dk_running = warpgroup_mma(b_ds, q_ring.index(at), b_dk, is_async=True)
    b_dk, b_ds = warpgroup_mma_wait(0, [dk_running, b_ds])

    # keys of no sample, or that no row sees, get 0: their sums may be anything
    local = CONSUMER * ROWS_EACH + gl.arange(0, ROWS_EACH, layout=gl.SliceLayout(1, d_layout))
    m_key = (first_key + local >= 0) & (local < seen_end)
    b_dk = gl.where(m_key[:, None], b_dk * (scale * 0.6931471805599453), 0.0)
    b_dv = gl.where(m_key[:, None], b_dv, 0.0)
    store_tile(p_dk, b_dk, STRIDE, owned_end, CONSUMER * ROWS_EACH, ROWS_EACH, D)
    store_tile(p_dv, b_dv, STRIDE, owned_end, CONSUMER * ROWS_EACH, ROWS_EACH, D)


@gluon.jit(do_not_specialize=["rows", "tiles", "heads_side_by_side", "k_rows"])
def backward_keys_hopper_kernel(
    q_desc, k_desc, v_desc, do_desc, p_dk, p_dv, p_stat, p_table, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right,
    p_hi, p_first_row, stride_qh, stride_kh, stride_vh, stride_doh, rows, tiles, heads_side_by_side, k_rows, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, ROWS_EACH: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, HAS_HI: gl.constexpr,
):  # fmt: skip
    """One tile of the plan's table per program."""
    head_kv, sample, block = program_tile(p_table, tiles, heads_side_by_side, gl.program_id(0))
    if block < 0:
        return
    q_start, len_q, k_start, len_k, left, right = load_sample(
        p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, sample
    )
    p_hi += q_start
    # a padded sample owns all its slots, including those before its first key: keys count from -shift there
    shift = gl.where(k_rows > 0, gl.cast(k_start, gl.int32) - sample * k_rows, 0)
    owned = gl.where(k_rows > 0, k_rows - shift, len_k)
    KEYS: gl.constexpr = CONSUMERS * ROWS_EACH
    first_key = block * KEYS - shift
    last_key = gl.minimum(first_key + KEYS, len_k)
    real = (first_key < len_k) & (last_key > 0)
    first, full_first, full_last, last = tile_rows(
        gl.where(real, gl.maximum(first_key, 0), 0), gl.where(real, last_key, 1), p_first_row + k_start, len_q, len_k, left,
        right, BLOCK, HAS_HI,
    )  # fmt: skip
    # a tile that no row sees multiplies one block of zeros
    seen = real & (last > first)
    first = gl.where(seen, first, 0)
    full_first = gl.where(seen, full_first, 0)
    full_last = gl.where(seen, full_last, 0)
    last = gl.where(seen, last, 0)
    steps = gl.maximum((last - first) * GROUP, 1)
    full = (full_last - full_first) * GROUP
    seen_end = gl.where(seen, len_k - first_key, 0)
    tile_start = k_start + first_key

    dtype: gl.constexpr = k_desc.dtype
    k_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS_EACH, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS_EACH, D], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], do_desc.layout)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    less_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], vector)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], vector)
    lo_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK], vector)
    hi_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK], vector)
    tile_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    rows_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    rows_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(tile_full, count=1)
    mbarrier.init(raw, count=1)
    for at in gl.static_range(STAGES):
        mbarrier.init(rows_full.index(at), count=2)
        mbarrier.init(rows_empty.index(at), count=CONSUMERS)
    fence_async_shared()

    p_dk += (tile_start * (HEADS // GROUP) + head_kv) * D
    p_dv += (tile_start * (HEADS // GROUP) + head_kv) * D
    # first the producer, which runs in the program's own warps: consumers have no registers left for what these hold
    gl.warp_specialize(
        [
            (produce, (
                q_desc, k_desc, v_desc, do_desc, p_stat, p_hi, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring,
                lo_ring, hi_ring, tile_full, rows_full, rows_empty, raw, q_start.to(gl.int32), stride_qh, stride_doh,
                head_kv * GROUP, rows, tile_start.to(gl.int32), head_kv * stride_kh, head_kv * stride_vh,
                first, full_first, full_last, last, full, steps, gl.where(seen, len_q, 0), len_k, left, right,
                GROUP, D, BLOCK, STAGES, CONSUMERS, ROWS_EACH, PART, HAS_HI,
            )),
            (consume, (
                p_dk, p_dv, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring, lo_ring, hi_ring, tile_full, rows_full,
                rows_empty, first_key, full, steps, seen_end, owned - first_key, scale,
                gl.constexpr(0), HEADS // GROUP * D, D, BLOCK, STAGES, ROWS_EACH,
            )),
            (consume, (
                p_dk, p_dv, k_tiles, v_tiles, q_ring, do_ring, less_ring, delta_ring, lo_ring, hi_ring, tile_full, rows_full,
                rows_empty, first_key, full, steps, seen_end, owned - first_key, scale,
                gl.constexpr(1), HEADS // GROUP * D, D, BLOCK, STAGES, ROWS_EACH,
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
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, dk: Tensor, dv: Tensor, statistics: Tensor, bounds: SampleTables,
    hi: Tensor | None, first_row: Tensor | None, k_rows: int, plan: Plan, scale: float,
) -> None:  # fmt: skip
    """Fill ``dk`` and ``dv`` for the samples in the plan's table. ``first_row``: the transpose of ``hi``."""
    rows, heads, dim = q.shape
    heads_kv = k.shape[1]
    backward_keys_hopper_kernel[(plan.tiles * heads_kv,)](
        describe(q, BLOCK), describe(k, ROWS_EACH), describe(v, ROWS_EACH), describe(grad_out, BLOCK), dk, dv, statistics,
        plan.table, *bounds, bounds[0] if hi is None else hi, bounds[0] if first_row is None else first_row,
        q.stride(1), k.stride(1), v.stride(1), grad_out.stride(1), rows, plan.tiles, plan.side_by_side, k_rows, scale,
        HEADS=heads, GROUP=heads // heads_kv, HAS_HI=hi is not None, num_warps=4, enable_fp_fusion=True, **constants(dim),
    )  # fmt: skip
