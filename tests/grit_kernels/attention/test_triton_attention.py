"""The Triton attention kernels in the interpreter (TRITON_INTERPRET=1): values, tile order, splits, determinism."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the package triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from grit_kernels.attention import (  # noqa: E402
    triton_backward,
    triton_common,
    triton_decode,
    triton_forward,
    triton_plan,
)
from grit_kernels.attention.problem import AttentionProblem, Shapes  # noqa: E402
from grit_kernels.attention.reference import attention_backward as reference_backward  # noqa: E402
from grit_kernels.attention.reference import attention_forward as reference_forward  # noqa: E402
from grit_kernels.attention.triton_common import LARGEST_TILE, addressable, split_head_dim  # noqa: E402
from grit_kernels.attention.triton_configs import (  # noqa: E402
    KERNELS,
    VARIABLE,
    Config,
    choose_config,
    override_config,
    parse_configs,
    table_config,
)
from grit_kernels.visibility import (  # noqa: E402
    TileRange,
    in_blocks,
    tile_keys,
    tile_rows,
    transpose_hi,
    window_bounds,
)
from tests.conftest import assert_within_rule  # noqa: E402
from tests.grit_kernels.attention.samples import (  # noqa: E402
    Call,
    assert_call_equals_the_reference,
    draw_call,
    results,
)

INTERPRET = pytest.mark.interpret
SLOW_START = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def run_triton(call: Any, deterministic: bool = True) -> list[Tensor]:
    inputs = [call.q, call.k, call.v, call.grad_out]
    backward = functools.partial(triton_backward.attention_backward, deterministic=deterministic)
    return results(call, triton_forward.attention_forward, backward, inputs)


@INTERPRET
@SLOW_START
@given(data=st.data())
def test_any_call_equals_the_reference_forward_and_backward(data: st.DataObject) -> None:
    call = draw_call(
        lambda options: data.draw(st.sampled_from(list(options))), lengths=(0, 1, 5, 17, 33), dims=(32, 40, 64)
    )
    assert_call_equals_the_reference(call, run_triton(call), 2e-5)


@INTERPRET
@SLOW_START
@given(data=st.data())
def test_one_kernel_that_adds_up_dq_by_atomics_equals_the_reference(data: st.DataObject) -> None:
    call = draw_call(
        lambda options: data.draw(st.sampled_from(list(options))), lengths=(0, 1, 5, 17, 33), dims=(32, 40, 64)
    )
    assert_call_equals_the_reference(call, run_triton(call, deterministic=False), 2e-5)


@INTERPRET
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the infinite numbers, which nothing reads
def test_a_slot_without_a_key_adds_nothing_to_dq_however_small_the_sum_of_a_row_is() -> None:
    # exp(0 - lse) of such a slot is infinite, as every score of a key is near -148; multiples of 1/8 make the scores exact
    lens = torch.tensor([21], dtype=torch.int32)
    zero = torch.zeros_like(lens)
    bounds = window_bounds(torch.tensor([False]), (-1, -1), 21, 21)
    problem = AttentionProblem(zero, lens, zero, lens, *bounds, None, 0, 0, 21, 21, 1.0, 0.0)
    q, k = torch.ones(21, 2, 32), torch.randint(-2, 3, (21, 1, 32)) / 8 - 4.625
    v, grad = (torch.randn(21, heads, 32) for heads in (1, 2))
    used = torch.ones(21, dtype=torch.bool)
    call = Call(q, k, v, grad, None, problem, used, used)
    reference = (reference_forward, reference_backward)
    truth, eager = (results(call, *reference, call.clean(kind)) for kind in (torch.float64, torch.float32))
    for name, *found in zip(
        ("out", "lse", "dq", "dk", "dv", "dsinks"), run_triton(call, deterministic=False), truth, eager, strict=True
    ):
        assert_within_rule(*found, name)


@INTERPRET
@pytest.mark.parametrize("seed", range(3))
def test_few_rows_over_long_keys_split_the_keys(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "SHORTEST_SPLIT", 16)
    call = draw_call(random.Random(seed).choice, lengths=(0, 1, 2, 50, 70), dims=(32, 48))
    assert_call_equals_the_reference(call, run_triton(call), 2e-5)


@INTERPRET
@pytest.mark.parametrize("dim", [320, 512])
def test_heads_beyond_256_equal_the_reference(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "SHORTEST_SPLIT", 16)  # so that some samples split their keys
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        call = draw_call(random.Random(dim).choice, lengths=(0, 1, 17, 33), dims=(dim,), dtype=dtype)
        for deterministic in (True, False):
            assert_call_equals_the_reference(call, run_triton(call, deterministic), tolerance)


@INTERPRET
def test_bf16_inputs_accumulate_in_fp32() -> None:
    call = draw_call(random.Random(3).choice, lengths=(17, 40), dims=(64,), dtype=torch.bfloat16)
    assert_call_equals_the_reference(call, run_triton(call), 2e-2)


@INTERPRET
def test_every_merge_of_splits_gives_the_unsplit_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 4, 32), torch.randn(150, 2, 32), torch.randn(150, 2, 32)
    zero, numbers = torch.zeros(1, dtype=torch.int32), torch.tensor([[3], [150]], dtype=torch.int32)
    left, right = window_bounds(torch.tensor([True]), (-1, -1), 3, 150)
    problem = AttentionProblem(zero, numbers[0], zero, numbers[1], left, right, None, 0, 0, 3, 150, 0.2, 0.0)
    expected = reference_forward(q, k, v, problem)
    monkeypatch.setattr(triton_plan, "SHORTEST_SPLIT", 16)
    for splits in (1, 2, 12):
        monkeypatch.setattr(triton_decode, "choose_splits", lambda *_, n=splits: n)
        for a, b in zip(triton_forward.attention_forward(q, k, v, problem), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@INTERPRET
@pytest.mark.parametrize("splits", [1, 2])
def test_rows_of_padding_before_long_keys_give_0(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "SHORTEST_SPLIT", 16)
    monkeypatch.setattr(triton_decode, "choose_splits", lambda *_: splits)
    q, k, v = torch.randn(6, 4, 96), torch.randn(300, 2, 96), torch.randn(300, 2, 96)
    numbers = torch.tensor([[0, 3], [1, 3], [0, 150], [150, 40]], dtype=torch.int32)
    bounds = window_bounds(torch.tensor([True, False]), (-1, -1), 3, 150)
    problem = AttentionProblem(*numbers, *bounds, None, 3, 150, 3, 150, 0.2, 0.0)
    q[1:3] = float("nan")
    out, lse = triton_forward.attention_forward(q, k, v, problem)
    assert bool((out[1:3] == 0).all()) and bool((lse[1:3] == float("-inf")).all())
    for found, expected in zip((out, lse), reference_forward(q, k, v, problem), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def server_step(q_len: list[int], k_len: list[int], heads: int, heads_kv: int) -> tuple[list[Tensor], AttentionProblem]:
    """q, k, v of a pack whose samples continue caches, and its problem."""
    lens = [torch.tensor(x, dtype=torch.int32) for x in (q_len, k_len)]
    starts = [(x.cumsum(0) - x).to(torch.int32) for x in lens]
    bounds = window_bounds(torch.tensor([True, False] * (len(q_len) // 2)), (-1, -1), max(q_len), max(k_len))
    ranges = (starts[0], lens[0], starts[1], lens[1])
    problem = AttentionProblem(*ranges, *bounds, None, 0, 0, max(q_len), max(k_len), 0.2, 0.0)
    sizes = ((sum(q_len), heads), (sum(k_len), heads_kv), (sum(k_len), heads_kv))
    return [torch.randn(rows, n, 32) for rows, n in sizes], problem


@INTERPRET
@pytest.mark.parametrize("splits", [1, 3])
def test_in_a_mixed_pack_the_keys_of_those_samples_are_split_that_have_few_rows_and_many_keys(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_plan, "SHORTEST_SPLIT", 48)
    monkeypatch.setattr(triton_decode, "choose_splits", lambda *_: splits)
    # few and many; few rows, few keys; a prompt; one row more than a tile of the group's heads holds; idle; few and many
    q_len, k_len, split = [1, 3, 40, 9, 0, 8], [90, 20, 70, 60, 50, 48], [True, False, False, False, False, True]
    tensors, problem = server_step(q_len, k_len, 4, 2)
    q, k, v = tensors
    grid = triton_plan.tile_grid("forward", Shapes.of(q, k), problem)
    table = triton_plan.plan_tiles(grid, problem.tables, None).table
    listed = {sample for sample, block in table.tolist() if block >= 0}
    assert listed == {b for b, n in enumerate(q_len) if n and not split[b]}
    filled: list[int] = []
    real = triton_decode.decode_samples

    def decode(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, **named: Any) -> None:
        out.fill_(float("nan"))
        real(q, k, v, out, lse, *rest, **named)
        filled.extend(torch.where(out.isfinite().flatten(1).all(1))[0].tolist())

    monkeypatch.setattr(triton_forward, "decode_samples", decode)
    found = triton_forward.attention_forward(q, k, v, problem)
    rows = torch.repeat_interleave(torch.arange(len(q_len)), torch.tensor(q_len))
    assert filled == [row for row, b in enumerate(rows.tolist()) if split[b]], "no row of another sample is written"
    expected = reference_forward(*(x.double() for x in tensors), problem)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@INTERPRET
def test_the_parts_of_a_window_share_its_blocks_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    merge, parts = triton_decode.merge_splits_kernel, []

    class Merge:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *tensors, **constants: [parts.append(tensors[1].clone()), merge[grid](*tensors, **constants)]

    monkeypatch.setattr(triton_decode, "merge_splits_kernel", Merge())
    monkeypatch.setattr(triton_decode, "choose_splits", lambda *_: 4)
    q, k, v = torch.randn(2, 4, 32), torch.randn(500, 2, 32), torch.randn(500, 2, 32)
    numbers = torch.tensor([[0], [2], [0], [500]], dtype=torch.int32)
    bounds = window_bounds(torch.tensor([True]), (200, 0), 2, 500)
    problem = AttentionProblem(*numbers, *bounds, None, 0, 0, 2, 500, 0.2, 0.0)
    with override_config("decode", Config(16, 16, 4, 1)):
        found = triton_forward.attention_forward(q, k, v, problem)
    assert parts[0].shape == (4, 1, 2, 4) and bool(parts[0].isfinite().all()), "a part without keys"
    for a, b in zip(found, reference_forward(q, k, v, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@INTERPRET
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_fill_several_tiles_share_split_keys(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "choose_splits", lambda *_: splits)
    monkeypatch.setattr(triton_plan, "processor_count", lambda _: 1000)
    q, k, v = torch.randn(40, 4, 32), torch.randn(300, 2, 32), torch.randn(300, 2, 32)
    numbers = torch.tensor([[0], [40], [0], [300]], dtype=torch.int32)
    bounds = window_bounds(torch.tensor([True]), (-1, -1), 40, 300)
    problem = AttentionProblem(*numbers, *bounds, None, 0, 0, 40, 300, 0.2, 0.0)
    assert triton_plan.split_samples(Shapes.of(q, k), problem) == triton_plan.Split(40, 0)
    found = triton_forward.attention_forward(q, k, v, problem)
    for a, b in zip(found, reference_forward(q, k, v, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_keys_are_split_for_few_rows_of_a_group_or_where_rows_leave_the_gpu_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_plan, "processor_count", lambda _: 16)

    def split(rows: int, samples: int) -> triton_plan.Split:
        tensors, problem = server_step([rows] * samples, [600] * samples, 4, 2)
        return triton_plan.split_samples(Shapes.of(*tensors[:2]), replace(problem, q_rows=rows))

    assert split(32, 20) == triton_plan.Split(32, 0), "64 pairs of row and head fit a tile"
    assert split(128, 2) == triton_plan.Split(128, 0), "8 programs do not fill 16 processors twice"
    assert split(129, 2) == split(33, 4) == triton_plan.NO_SPLIT


def test_a_pack_of_whole_samples_never_splits_keys() -> None:
    tensors, problem = server_step([300, 1, 700, 20], [300, 1, 700, 20], 4, 2)
    assert triton_plan.split_samples(Shapes.of(*tensors[:2]), problem) == triton_plan.NO_SPLIT


@INTERPRET
def test_gradients_repeat_bit_by_bit() -> None:
    call = draw_call(random.Random(5).choice, lengths=(20,), dims=(32,))
    assert all(torch.equal(a, b) for a, b in zip(run_triton(call), run_triton(call), strict=True))


@INTERPRET
@pytest.mark.parametrize("tiles", [Config(16, 32, 4, 1), Config(64, 16, 4, 1)])
def test_tile_sizes_do_not_change_results(tiles: Config) -> None:
    call = draw_call(random.Random(11).choice, lengths=(20, 33), dims=(32,))
    with override_config("forward", tiles), override_config("backward_keys", tiles):
        with override_config("backward_rows", tiles):
            assert_call_equals_the_reference(call, run_triton(call), 2e-5)


@INTERPRET
def test_which_program_computes_a_tile_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    call = draw_call(random.Random(3).choice, lengths=(40, 17, 0, 65), dims=(32,))
    tiles = Config(16, 16, 4, 1, persistent=False)
    given = (call.q, call.k, call.v, call.problem)
    with override_config("forward", tiles):
        want = triton_forward.attention_forward(*given)
    for warps in (1, 4, 64):  # one program for all tiles, a few tiles each, more programs than tiles
        monkeypatch.setattr(triton_forward, "WARPS_PER_PROCESSOR", warps)
        with override_config("forward", tiles._replace(persistent=True)):
            assert all(map(torch.equal, triton_forward.attention_forward(*given), want))


@INTERPRET
def test_products_ahead_of_the_softmax_change_no_bit() -> None:
    any_call: dict[str, Any] = {"lengths": (40, 17, 0, 65), "dims": (32, 40)}
    beyond_the_first_block: dict[str, Any] = {"lengths": (90,), "dims": (32,), "windows": (40,)}
    for seed, options in ((0, any_call), (1, any_call), (4, beyond_the_first_block)):
        call = draw_call(random.Random(seed).choice, **options)
        found = []
        for ahead in (False, True):
            with override_config("forward", Config(16, 16, 4, 1, ahead=ahead)):
                found.append(triton_forward.attention_forward(call.q, call.k, call.v, call.problem))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def make_plan(
    q_len: list[int], k_len: list[int], causal: list[bool], window: tuple[int, int], rows: int, over_keys: bool, hi: Any
) -> tuple[list[tuple[int, int]], tuple[Tensor, Tensor]]:
    lens = [torch.tensor(x, dtype=torch.int32) for x in (q_len, k_len)]
    starts = [torch.cat((x.new_zeros(1), x.cumsum(0)[:-1].to(torch.int32))) for x in lens]
    if rows:
        starts = [torch.arange(len(q_len), dtype=torch.int32) * rows] * 2
    bounds = window_bounds(torch.tensor(causal), window, max(*q_len, rows), max(*k_len, rows))
    own = q_len if over_keys else k_len
    grid = triton_plan.TileGrid(
        Config(16, 32, 4, 1), over_keys, len(own) * -(-rows // (16 if over_keys else 32)), 2, 8, rows
    )
    if not rows:
        grid = grid._replace(tiles=sum(own) // (16 if over_keys else 32) + len(own))
    plan = triton_plan.plan_tiles(grid, (starts[0], lens[0], starts[1], lens[1], *bounds), hi)
    assert plan.counter.tolist() == [0]
    return [tuple(x) for x in plan.table.tolist()], bounds


@INTERPRET
@pytest.mark.parametrize("rows", [0, 100])
@pytest.mark.parametrize("window", [(-1, -1), (20, 7)])
@pytest.mark.parametrize("over_keys", [True, False])
def test_every_tile_runs_once_and_the_longest_first(rows: int, window: tuple[int, int], over_keys: bool) -> None:
    q_len, k_len, causal = [0, 50, 1, 100, 64, 0], [0, 50, 40, 100, 90, 3], [True, False] * 3
    table, bounds = make_plan(q_len, k_len, causal, window, rows, over_keys, None)
    tile, own = (16, q_len) if over_keys else (32, k_len)
    wanted = {(b, t) for b, n in enumerate(own) for t in range(-(-(rows or n) // tile))}
    listed = [entry for entry in table if entry[1] >= 0]
    assert set(listed) == wanted and len(listed) == len(wanted)
    assert all(block == -1 for _, block in table[len(listed) :]), "slots left over come last"
    work = []
    for b, t in listed:
        begin, end = t * tile, min((t + 1) * tile, own[b])
        shape = (q_len[b], k_len[b], int(bounds[0][b]), int(bounds[1][b]))
        span = (tile_keys if over_keys else tile_rows)(begin, end, *shape) if begin < end else None
        blocks = in_blocks(span, 32 if over_keys else 16) if span else None
        work.append(blocks.end - blocks.begin if blocks else 0)
    assert work == sorted(work, reverse=True)


@INTERPRET
@pytest.mark.parametrize("seed", range(6))
def test_the_transpose_of_upper_bounds_equals_the_rule(seed: int) -> None:
    problem = draw_call(random.Random(seed).choice, lengths=(0, 1, 7, 40), dims=(32,)).problem
    keys = int((problem.k_start + problem.k_len).max()) + 2
    hi = torch.zeros(int((problem.q_start + problem.q_len).max()), dtype=torch.int32)
    for first, n, m in zip(problem.q_start.tolist(), problem.q_len.tolist(), problem.k_len.tolist(), strict=True):
        hi[first : first + n] = torch.randint(-2, m + 3, (n,), dtype=torch.int32).sort().values
    found = triton_plan.transpose_upper_bounds(hi, problem.tables, torch.full((keys,), -9, dtype=torch.int32))
    assert torch.equal(found, transpose_hi(hi, *problem.tables[:4], keys))


@INTERPRET
def test_upper_bounds_order_tiles_by_what_they_show() -> None:
    hi = torch.arange(1, 65, dtype=torch.int32)
    table, _ = make_plan([64], [64], [False], (-1, -1), 0, True, hi)
    assert [block for _, block in table if block >= 0] == [2, 3, 0, 1]
    starts, lens = torch.zeros(1, dtype=torch.int32), torch.tensor([64], dtype=torch.int32)
    first_row = transpose_hi(hi, starts, lens, starts, lens, 64)
    table, _ = make_plan([64], [64], [False], (-1, -1), 0, False, first_row)
    assert [block for _, block in table if block >= 0] == [0, 1]


def test_heads_run_side_by_side_in_whole_groups_that_fit_half_an_l2_cache() -> None:
    assert triton_plan.section_heads(32, 4, 1) == 32
    assert triton_plan.section_heads(32, 4, 8 << 20) == 8  # 3 groups would fit, 2 divide 8
    assert triton_plan.section_heads(32, 4, 1 << 30) == 4
    assert triton_plan.section_heads(6, 1, 8 << 20) == 3
    sizes = ((50_000, 8), (50_000, 2), (50_000, 2))
    q, k, _ = (torch.empty(rows, heads, 128, device="meta") for rows, heads in sizes)
    _, problem = server_step([50_000] * 2, [50_000] * 2, 1, 1)
    for kernel, heads in (("forward", 4), ("backward_rows", 4), ("backward_keys", 1)):
        assert triton_plan.tile_grid(kernel, Shapes.of(q, k), problem).side_by_side == heads, (
            "the heads of a group share keys"
        )


@pytest.mark.parametrize("dim", range(32, 513, 8))
def test_a_head_dim_splits_into_powers_of_two_that_cover_it(dim: int) -> None:
    first, second = split_head_dim(dim)
    assert first & (first - 1) == 0 and second & (second - 1) == 0
    assert first <= dim <= first + second and (second == 0) == (first == dim) and max(first, second) <= 256


def test_splits_fill_the_gpu_but_keep_two_blocks_each() -> None:
    assert triton_decode.choose_splits(8, 32768, 64, 132) == 64
    assert triton_decode.choose_splits(8, 1024, 64, 132) == 8
    assert triton_decode.choose_splits(512, 32768, 64, 132) == 2
    assert triton_decode.choose_splits(10**4, 32768, 64, 132) == 1


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx9"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_and_warps_of_the_table_are_powers_of_two(kernel: str, arch: str) -> None:
    """Triton has no others, and a matrix instruction has at least 16 rows; what an entry takes is compiled elsewhere."""
    for dim in (64, 128, 256, 512):
        for element_bytes in (2, 4):
            config = table_config(kernel, dim, element_bytes, arch)
            assert all(size & (size - 1) == 0 and 16 <= size <= LARGEST_TILE for size in (config.rows, config.keys))
            assert config.warps in (4, 8) and 1 <= config.stages <= 3, "the pipeline's stages are shared memory"


def test_rows_whose_offsets_within_a_tile_need_64_bits_are_copied() -> None:
    dense = torch.zeros(2, 1, 32)
    far = torch.zeros(2**23 + 32, dtype=torch.float16).as_strided((2, 1, 32), (2**23, 32, 1))
    near = torch.zeros(2**22 + 32, dtype=torch.float16).as_strided((2, 1, 32), (2**22, 32, 1))
    assert addressable(dense) is dense and addressable(near) is near
    assert addressable(far).stride() == (32, 32, 1), "256 rows of 2**23 values each"
    assert addressable(torch.zeros(2, 1, 64)[..., ::2]).stride() == (32, 32, 1), "values side by side"


def test_a_size_that_no_entry_covers_is_named() -> None:
    with pytest.raises(ValueError, match="^head dim 520 with elements of 2 bytes has no entry for forward$"):
        table_config("forward", 520, 2, "sm90")
    with pytest.raises(ValueError, match="^head dim 64 with elements of 8 bytes has no entry for decode$"):
        table_config("decode", 64, 8, "sm90")


@triton.jit
def blocks_kernel(p_spans, p_blocks, spans, BLOCK: tl.constexpr):
    for n in range(0, spans):
        p_span = p_spans + 4 * n
        first, full_first, full_last, last = triton_common.in_blocks(
            tl.load(p_span), tl.load(p_span + 1), tl.load(p_span + 2), tl.load(p_span + 3), BLOCK
        )
        p_block = p_blocks + 4 * n
        tl.store(p_block, first)
        tl.store(p_block + 1, full_first)
        tl.store(p_block + 2, full_last)
        tl.store(p_block + 3, last)


@INTERPRET
def test_ranges_in_blocks_are_those_of_the_rule() -> None:
    ends = range(0, 13)
    spans = [TileRange(a, b, c, d) for a in ends for d in ends[a:] for b in (a, d, 5) for c in (b, d, 8) if a <= b <= d]
    found = torch.full((len(spans), 4), -1, dtype=torch.int32)
    blocks_kernel[(1,)](torch.tensor(spans, dtype=torch.int32), found, len(spans), BLOCK=4)
    for span, (first, full_first, full_last, last) in zip(spans, found.tolist(), strict=True):
        rule = in_blocks(span, 4)
        assert (first, last) == (rule.begin, rule.end) or first == last and span.begin == span.end, span
        full = range(rule.full_begin, rule.full_end)
        assert range(full_first, full_last) == full or not full and full_first == full_last == last, span


@triton.jit
def tanh_kernel(p_x, p_y, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    tl.store(p_y + o, triton_common.tanh(tl.load(p_x + o)))


@INTERPRET
def test_tanh_is_exact_to_a_few_roundings_everywhere() -> None:
    x = torch.cat((torch.linspace(-0.16, 0.16, 3000), torch.linspace(-20, 20, 1000), torch.logspace(-30, -2, 96)))
    y = torch.empty_like(x)
    tanh_kernel[(1,)](x, y, SIZE=4096)
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=2e-6, atol=0)


def test_configs_come_from_the_override_then_the_environment_then_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    table = choose_config("forward", 64, torch.bfloat16, device)
    monkeypatch.setenv(VARIABLE, "forward=64x32x4x2,decode=16x16x4x1")
    assert choose_config("forward", 64, torch.bfloat16, device) == Config(64, 32, 4, 2)
    for flags in ("p", "a", "pa"):
        monkeypatch.setenv(VARIABLE, f"forward=64x32x4x2{flags}")
        config = choose_config("forward", 64, torch.bfloat16, device)
        assert config == Config(64, 32, 4, 2, "p" in flags, "a" in flags) and str(config) == f"64x32x4x2{flags}"
    with override_config("forward", Config(32, 32, 4, 1)):
        assert choose_config("forward", 64, torch.bfloat16, device) == Config(32, 32, 4, 1)
    monkeypatch.delenv(VARIABLE)
    assert choose_config("forward", 64, torch.bfloat16, device) == table
    for text in ("forwards=64x32x4x2", "forward=64x32x4", "forward=64x32x4xa"):
        with pytest.raises(ValueError, match=text.split("=")[0]):
            parse_configs(text)
    with pytest.raises(ValueError, match="prefill"):
        with override_config("prefill", Config(16, 16, 4, 1)):
            pass


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx9"])
def test_the_table_has_a_config_for_every_head_dim_and_dtype(kernel: str, arch: str) -> None:
    for dim in range(32, 513, 8):
        for size in (2, 4):
            config = table_config(kernel, dim, size, arch)
            assert all(x & (x - 1) == 0 for x in config[:3]) and config.rows >= 16 and config.keys >= 16
