"""A cache in pages: what its samples' rows would be side by side decides the result, and nothing else is read or written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from tests.conftest import Backend, assert_within_rule
from tests.grit_kernels.attention.oracle import Case, attention, make_case, padded
from tests.grit_kernels.attention.paged import NO_BLOCKS, in_pages, in_rows
from tests.grit_kernels.attention.test_decode import Case as Op
from tests.grit_kernels.attention.test_decode import drawn, moved, on_every_device

SIZES = [1, 7, 16, 32, 64, 128, 256]


def ints(values: list[int], backend: Backend) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=backend.device)


def run(
    case: Case, backend: Backend, pages: list[Tensor], table: Tensor, first: list[int], **options: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse), (B, T, ...), of a case whose keys lie in pages from slot ``first`` on."""
    rows, keys = ([x.shape[0] for x in group] for group in (case.q, case.k))
    hi = None
    if case.hi is not None:
        hi = padded([torch.tensor(x, dtype=torch.int32) for x in case.hi], max(rows), 0).to(backend.device)
    with backend():
        out, lse = gk.switch_attention_with_kvcache(
            padded(case.q, max(rows)).to(backend.device),
            *(x.to(backend.device) for x in pages),
            ints([a + b for a, b in zip(first, keys, strict=True)], backend),
            torch.tensor(case.causal, device=backend.device),
            cache_leftpad=ints(first, backend),
            block_table=table.to(backend.device),
            window_size=torch.tensor(case.window, device=backend.device),
            hi=hi,
            seqlens_q=ints(rows, backend),
            softmax_scale=case.softmax_scale,
            softcap=case.softcap,
            sinks=None if case.sinks is None else case.sinks.to(backend.device),
            return_lse=True,
            **options,
        )
    return out.cpu(), lse.cpu()


def check(case: Case, backend: Backend, block_size: int, first: list[int]) -> None:
    """Against the float64 oracle; slots, entries and blocks of nobody are poisoned."""
    slots = max(f + k.shape[0] for f, k in zip(first, case.k, strict=True)) + 5
    caches = [
        torch.cat([padded([x], slots, first=f) for f, x in zip(first, group, strict=True)])
        for group in (case.k, case.v)
    ]
    end = [f + k.shape[0] for f, k in zip(first, case.k, strict=True)]
    out, lse = run(case, backend, *in_pages(caches, first, end, block_size), first)
    truth, truth_lse = (torch.cat(x) for x in attention(case))
    eager, eager_lse = (torch.cat(x) for x in attention(case, case.q[0].dtype))
    rows = [x.shape[0] for x in case.q]
    found, found_lse = (torch.cat([x[b, :n] for b, n in enumerate(rows)]) for x in (out, lse))
    assert_within_rule(found, truth, eager, "out")
    live = truth_lse.isfinite()
    assert torch.equal(found_lse.isfinite(), live) and not found[~live].any()
    assert_within_rule(found_lse[live], truth_lse[live], eager_lse[live], "lse")
    for b, n in enumerate(rows):
        assert not out[b, n:].any() and bool((lse[b, n:] == float("-inf")).all())


@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [
        *((torch.float32, size) for size in SIZES),
        *((torch.bfloat16, size) for size in (1, 16, 64)),
        (torch.float16, 16),
    ],
)
def test_rows_that_decode_equal_the_oracle_in_blocks_of_any_size(
    backend: Backend, block_size: int, dtype: torch.dtype
) -> None:
    check(
        make_case([1, 1, 1, 1], [70, 0, 1, 33], [True, False, True, False], dtype=dtype), backend, block_size, [0] * 4
    )


@pytest.mark.parametrize(
    ("options", "block_size"),
    [
        ({"window": [(9, 0), (20, 3), (0, 0), (-1, -1)]}, 16),
        ({"softcap": 3.0, "softmax_scale": -0.3, "heads": (8, 1)}, 16),
        ({"hi": [[3, 40, 61], [5], [0, 29], []]}, 32),
        ({"heads": (2, 2), "dim": 80, "softmax_scale": 0.1}, 7),
        ({"heads": (16, 1), "dim": 72, "dtype": torch.bfloat16}, 16),
    ],
)
def test_windows_bounds_caps_and_groups_work_as_without_pages(
    backend: Backend, options: dict[str, Any], block_size: int
) -> None:
    case = make_case([3, 1, 2, 0], [61, 40, 29, 9], [True, False, False, True], **options)
    check(case, backend, block_size, [0, 3, 17, 0])


def test_sinks_work_as_without_pages(backend: Backend) -> None:
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0], device=backend.device)
    q, k, v = (torch.randn(2, n, h, 32, device=backend.device) for n, h in ((1, 4), (16, 2), (16, 2)))
    used, table = ints([13, 0], backend), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=backend.device)
    pages = [x.reshape(4, 8, 2, 32) for x in (k, v)]
    with backend():
        expected = gk.switch_attention_with_kvcache(q, k, v, used, sinks=sinks, return_lse=True)
        found = gk.switch_attention_with_kvcache(q, *pages, used, block_table=table, sinks=sinks, return_lse=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_prompts_behind_pages_equal_the_oracle(backend: Backend) -> None:
    check(make_case([45, 20, 0], [61, 20, 5], [False, True, True], heads=(4, 1)), backend, 16, [0, 19, 0])


def appended(backend: Backend, block_size: int, dtype: torch.dtype = torch.float32) -> None:
    """Four steps of 0 to 3 new rows per sample, in pages and in rows: the same outputs, and caches of the same bits."""
    slots, start = 40, [0, 15, 31]
    steps = [[1, 3, 0], [0, 0, 0], [2, 0, 3], [1, 1, 1]]
    end = [a + sum(step[b] for step in steps) for b, a in enumerate(start)]
    caches = [padded([torch.randn(n, 2, 32).to(dtype) for n in start], slots).to(backend.device) for _ in "kv"]
    pages, table = in_pages(caches, [0, 0, 0], end, block_size)
    pages, table = [x.to(backend.device) for x in pages], table.to(backend.device)
    used = ints(start, backend)
    for step in steps:
        rows = ints(step, backend)
        q, k, v = (torch.randn(3, 3, h, 32, device=backend.device).to(dtype) for h in (4, 2, 2))
        for x in (q, k, v):
            for b, n in enumerate(step):
                x[b, n:] = float("nan")
        given = {"seqlens_q": rows, "return_lse": True}
        with backend():
            wanted = gk.switch_attention_with_kvcache(q, *caches, used, k=k, v=v, **given)
            found = gk.switch_attention_with_kvcache(q, *pages, used, k=k, v=v, block_table=table, **given)
        used = used + rows
        with gk.backend("reference"):
            exact = [x.double() for x in (q, *caches)]
            truth = gk.switch_attention_with_kvcache(*exact, used, **given)
        dead = truth[1].isinf()
        assert torch.equal(found[1].isinf(), dead) and not found[0][dead].any()
        for a, b, c in zip(found, truth, wanted, strict=True):
            assert_within_rule(a[~dead], b[~dead], c[~dead])
        for page, cache in zip(pages, caches, strict=True):
            assert torch.equal(in_rows(page, table, slots).nan_to_num(9.0), cache.nan_to_num(9.0))
            assert bool(page[sorted(set(range(len(page))) - set(table.flatten().tolist()))].isnan().all())
    assert used.tolist() == end


@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_new_states_are_written_through_the_table_and_read_again(backend: Backend, block_size: int) -> None:
    appended(backend, block_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_states_of_half_precision_are_written_as_they_are(backend: Backend, dtype: torch.dtype) -> None:
    appended(backend, 16, dtype)


def test_a_step_without_any_new_state_writes_nothing(backend: Backend) -> None:
    q, k = (torch.randn(2, 2, h, 32, device=backend.device) for h in (4, 2))
    pages = [torch.randn(3, 4, 2, 32, device=backend.device) for _ in "kv"]
    before = [x.clone() for x in pages]
    none, table = ints([0, 0], backend), torch.tensor([NO_BLOCKS[:2], NO_BLOCKS[2:]]).int().to(backend.device)
    with backend():
        out = gk.switch_attention_with_kvcache(q, *pages, none, k=k, v=k, block_table=table, seqlens_q=none)
    assert not out.any() and all(torch.equal(a, b) for a, b in zip(pages, before, strict=True))


def test_a_sample_without_new_states_does_not_undo_those_of_another(backend: Backend) -> None:
    """Its entries may name the block and slot that another sample fills in the same call."""
    new = torch.randn(2, 2, 2, 32, device=backend.device)
    pages = [torch.full((1, 4, 2, 32), float("nan"), device=backend.device) for _ in "kv"]
    table = torch.zeros(2, 1, dtype=torch.int32, device=backend.device)
    with backend():
        out = gk.switch_attention_with_kvcache(
            new, *pages, ints([0, 0], backend), k=new, v=new, block_table=table, seqlens_q=ints([2, 0], backend)
        )
    for x in pages:
        assert torch.equal(x[0, :2], new[0]) and bool(x[0, 2:].isnan().all())
    assert torch.equal(out[0, 0], new[0, 0]) and not out[1].any()


def test_samples_may_share_the_blocks_of_a_prefix(backend: Backend) -> None:
    """Two samples whose first 32 slots are the same blocks, and which then grow in blocks of their own."""
    prefix, own = (torch.randn(n, 2, 32) for n in (32, 6))
    cases = make_case([1, 1], [38, 35], [True, True])
    for group in (cases.k, cases.v):
        for x in group:
            x[:32] = prefix
        group[0][32:] = own
    caches = [padded(group, 40) for group in (cases.k, cases.v)]
    pages, table = in_pages(caches, [0, 0], [38, 36], 16)
    alone, _ = run(cases, backend, pages, table, [0, 0])
    table[1, :2] = table[0, :2]
    shared, _ = run(cases, backend, pages, table, [0, 0])
    assert torch.equal(shared, alone)
    new = torch.randn(2, 1, 2, 32)
    k, v = new.to(backend.device), -new.to(backend.device)
    pages, table = [x.to(backend.device) for x in pages], table.to(backend.device)
    with backend():
        gk.switch_attention_with_kvcache(
            k.repeat(1, 1, 2, 1), *pages, ints([37, 35], backend), block_table=table, k=k, v=v
        )
    assert torch.equal(in_rows(pages[0], table, 40)[0, 37], k[0, 0])
    assert torch.equal(in_rows(pages[1], table, 40)[1, 35], v[1, 0])


def test_tables_and_caches_of_any_stride_are_read(backend: Backend) -> None:
    case = make_case([1, 1, 1], [20, 11, 3], [True, True, False])
    caches = [padded(group, 21) for group in (case.k, case.v)]
    pages, table = in_pages(caches, [0, 0, 0], [20, 11, 3], 8)
    expected = run(case, backend, pages, table, [0, 0, 0])
    wide = torch.full((3, 12), -5, dtype=torch.int32)
    wide[:, 1:10:3][:, : table.shape[1]] = table
    tables = [
        wide[:, 1:10:3].long(),
        wide[:, 1:10:3],
        table.t().contiguous().t(),
        torch.cat([table, table], 1)[:, : table.shape[1]],
    ]
    both = torch.stack(pages, 1)  # (blocks, 2, size, H, D)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pages]
    for given, of in [(x, pages) for x in tables] + [(table, list(both.unbind(1))), (table, heads_first)]:
        found = run(case, backend, of, given, [0, 0, 0])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    every_other = [torch.stack([x, x], -1)[..., 0] for x in pages]
    for a, b in zip(run(case, backend, every_other, table, [0, 0, 0]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_new_states_reach_pages_of_any_stride(backend: Backend) -> None:
    case = make_case([1, 1], [17, 4], [True, True])
    caches = [padded(group, 20) for group in (case.k, case.v)]
    plain, table = in_pages(caches, [0, 0], [18, 5], 16)
    new = torch.randn(2, 1, 2, 32, device=backend.device)
    strided = [torch.stack([x, x], -1).to(backend.device)[..., 0] for x in plain]
    plain, table = [x.to(backend.device) for x in plain], table.to(backend.device)
    outs = []
    for pages in (plain, strided):
        with backend():
            q = torch.stack(case.q).to(backend.device)
            used = ints([17, 4], backend)
            outs.append(gk.switch_attention_with_kvcache(q, *pages, used, block_table=table, k=new, v=new))
    torch.testing.assert_close(*outs)
    assert all(torch.equal(a.nan_to_num(5.0), b.nan_to_num(5.0)) for a, b in zip(plain, strided, strict=True))


def test_a_sample_has_the_same_bits_in_any_batch(backend: Backend) -> None:
    if backend.name == "cuda":
        return  # there the batch decides how many parts keys are split into
    case = make_case([1, 2, 1], [50, 33, 4], [True, False, True])
    caches = [padded(group, 50) for group in (case.k, case.v)]
    pages, table = in_pages(caches, [0, 0, 0], [50, 33, 4], 16)
    together = run(case, backend, pages, table, [0, 0, 0])
    order = [2, 0, 1]
    for chosen in ([0], [1], [2], order):
        part = Case(*([x[b] for b in chosen] for x in (case.q, case.k, case.v, case.causal, case.window)))
        for a, b in zip(run(part, backend, pages, table[chosen], [0] * len(chosen)), together, strict=True):
            assert torch.equal(a, b[chosen][:, : a.shape[1]])


OPS = [
    (Op(64, keys=(40, 1, 300), sinks=True), 16),
    (Op(128, heads=24, rows=(1, 2, 1), keys=(40, 1, 130), hi=True, dtype=torch.bfloat16), 32),
    (Op(40, rows=(3, 0, 2), keys=(40, 1, 130), window=(20, 4), softcap=5.0, sinks=True), 7),
    (Op(264, keys=(40, 0, 90), softmax_scale=-0.1, dtype=torch.float16), 256),
]


def of_ops(case: Op, block_size: int, device: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of attention_decode, and of attention_decode_paged for the same keys in pages."""
    q, k, v, used, sinks, problem = drawn(case)
    first = problem.k_start - torch.arange(len(case.rows), dtype=torch.int32) * problem.max_k
    caches = [x.unflatten(0, (-1, problem.max_k)) for x in (k, v)]
    pages, table = in_pages(caches, first.tolist(), (first + problem.k_len).tolist(), block_size)
    paged = (q, *pages, table, sinks, dataclasses.replace(problem, k_start=first))
    return moved((q, k, v, used, sinks, problem), device), moved(paged, device)


def has_op(where: Backend) -> bool:
    key = "CUDA" if where.device == "cuda" else "CPU"
    return torch._C._dispatch_has_kernel_for_dispatch_key("grit_kernels::attention_decode_paged", key)


@on_every_device
@pytest.mark.parametrize(("case", "block_size"), OPS, ids=str)
def test_keys_in_pages_give_the_bits_of_keys_side_by_side(case: Op, block_size: int, where: Backend) -> None:
    if not has_op(where):
        pytest.skip("pages are gathered without the compiled library")
    rows, paged = of_ops(case, block_size, where.device)
    if where.name == "cpu":
        q, k, v, _, sinks, *problem = rows
        expected = torch.ops.grit_kernels.attention_forward(q, k, v, *problem, sinks, None, True)
    else:
        expected = torch.ops.grit_kernels.attention_decode(*rows)
    found = torch.ops.grit_kernels.attention_decode_paged(*paged)
    for a, b in zip(found, expected, strict=True):
        if where.name != "cuda":
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b)  # on a GPU a tile may have other warps, which add up in another order


@on_every_device
def test_opcheck_accepts_the_op_that_reads_pages(where: Backend) -> None:
    if not has_op(where):
        pytest.skip("pages are gathered without the compiled library")
    for case, block_size in OPS[2:]:
        _, arguments = of_ops(case, block_size, where.device)
        op = torch.ops.grit_kernels.attention_decode_paged.default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_autocast_computes_in_its_dtype(backend: Backend) -> None:
    q, pages = torch.randn(2, 1, 4, 32), [torch.randn(4, 16, 2, 32) for _ in "kv"]
    q, pages = q.to(backend.device), [x.to(backend.device) for x in pages]
    used, table = ints([30, 7], backend), torch.tensor([[2, 0], [3, -1]], dtype=torch.int32, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16), backend():
        found = gk.switch_attention_with_kvcache(q, *pages, used, block_table=table)
    with backend():
        halves = [x.bfloat16() for x in (q, *pages)]
        assert torch.equal(found, gk.switch_attention_with_kvcache(*halves, used, block_table=table))


def test_compile_captures_a_call_that_adds_to_pages(backend: Backend) -> None:
    if not backend.is_op:  # the reference reads lengths on the host by design
        return
    pages = [torch.randn(4, 16, 2, 32, device=backend.device) for _ in "kv"]
    copies = [x.clone() for x in pages]
    table = torch.tensor([[2, 0], [3, -1]], dtype=torch.int32, device=backend.device)
    q, new = (torch.randn(2, 1, h, 32, device=backend.device) for h in (4, 2))

    def step(k_cache: Tensor, v_cache: Tensor, used: Tensor) -> Any:
        return gk.switch_attention_with_kvcache(q, k_cache, v_cache, used, k=new, v=new, block_table=table)

    used = ints([17, 3], backend)
    with backend():
        expected = step(*pages, used)
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(*copies, used)
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(copies, pages, strict=True))
