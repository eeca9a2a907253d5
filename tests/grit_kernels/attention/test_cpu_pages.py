"""The C++ kernels read pages where they lie: under every instruction set the bits of the same rows side by side."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from grit_kernels import _library
from tests.conftest import Backend
from tests.grit_kernels.attention.oracle import Case, make_case, padded
from tests.grit_kernels.attention.paged import in_pages
from tests.grit_kernels.attention.test_pages import run

ISAS = _library.cpu_isas() if _library.status().loaded else []

pytestmark = pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
CPU = Backend("cpu", forced="cpu")
SIZES = [1, 3, 7, 15, 16, 17, 64, 100, 256, 1000]


def random_case(rng: random.Random, dtype: torch.dtype, rows: list[int]) -> tuple[Case, list[int]]:
    """Samples of these rows, and the first slot of each. Keys beside the edges of blocks and of parts of the keys."""
    heads = rng.choice([(4, 4), (6, 2), (8, 1), (2, 1)])
    keys = [rng.choice([0, 1, 15, 16, 17, 33, 255, 257, 600]) for _ in rows]
    near = range(-1, 40)
    case = make_case(
        rows,
        keys,
        [rng.random() < 0.5 for _ in rows],
        window=[(-1, -1) if rng.random() < 0.5 else (rng.choice(near), rng.choice(near)) for _ in rows],
        heads=heads,
        dim=rng.choice([32, 40, 64, 128]),
        dtype=dtype,
        softcap=rng.choice([0.0, 0.0, 4.0]),
        hi=[sorted(rng.randint(0, n + 1) for _ in range(m)) for m, n in zip(rows, keys, strict=True)]
        if rng.random() < 0.3
        else None,
        sinks=torch.randn(heads[0]) if rng.random() < 0.5 else None,
    )
    return case, [rng.choice([0, 0, 1, 18, 70]) for _ in rows]


def in_shared_pages(rng: random.Random, case: Case, first: list[int], size: int) -> tuple[list[Tensor], Tensor]:
    """Pages of a case, where samples 0 and 1, if both begin at slot 0, share the whole pages of their common length."""
    end = [f + k.shape[0] for f, k in zip(first, case.k, strict=True)]
    alike = min(end[:2]) // size * size if len(end) > 1 and first[:2] == [0, 0] else 0
    for group in (case.k, case.v):
        if alike:
            group[1][:alike] = group[0][:alike]
    slots = max(end) + rng.choice([0, 5])
    caches = [
        torch.cat([padded([x], slots, first=f) for f, x in zip(first, group, strict=True)])
        for group in (case.k, case.v)
    ]
    pages, table = in_pages(caches, first, end, size)
    if alike:
        for page in pages:
            page[table[1, : alike // size].long()] = float("nan")
        table[1, : alike // size] = table[0, : alike // size]
    return pages, table


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [[1, 1, 1], [4, 2, 0, 1], [3, 40], [20, 1, 5]], ids=str)
def test_pages_read_in_place_give_the_bits_of_rows_side_by_side(
    isa: str, dtype: torch.dtype, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    for size in SIZES:
        case, first = random_case(rng, dtype, rows)
        pages, table = in_shared_pages(rng, case, first, size)
        with _library.cpu_isa(isa):
            with monkeypatch.context() as patch:
                patch.setattr("grit_kernels.attention.gather_pages", None)  # not called
                found = run(case, CPU, pages, table, first)
            with monkeypatch.context() as patch:
                patch.setattr("grit_kernels.attention.has_paged_kernel", lambda *_: False)
                expected = run(case, CPU, pages, table, first)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 9])
def test_keys_and_values_may_lie_in_pages_of_different_strides(isa: str, rows: int) -> None:
    case = make_case([rows], [300], [True], dtype=torch.bfloat16)
    pages, table = in_pages([padded(x, 300) for x in (case.k, case.v)], [0], [300], 7)
    heads_first = pages[1].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([pages[0], pages[0]], -1)[..., :32]
    with _library.cpu_isa(isa):
        expected = run(case, CPU, pages, table, [0])
        found = run(case, CPU, [wide, heads_first], table, [0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 9])
def test_pages_beyond_two_to_the_31_elements_are_reached(rows: int) -> None:
    blocks, step = 40, 2**26
    memory = torch.empty(blocks * step, dtype=torch.bfloat16)  # only the touched pages exist
    case = make_case([rows], [blocks], [False], heads=(2, 1), dim=64, dtype=torch.bfloat16)
    pages, table = in_pages([padded(x, blocks) for x in (case.k, case.v)], [0], [blocks], 1)
    far = [memory[at:].as_strided((blocks, 1, 1, 64), (step, 64, 64, 1)) for at in (0, 64)]
    here = torch.arange(blocks, dtype=torch.int32)[None]
    for x, y in zip(far, pages, strict=True):
        x.copy_(y[table[0].long()])
    expected = run(case, CPU, pages, table, [0])
    assert all(torch.equal(a, b) for a, b in zip(run(case, CPU, far, here, [0]), expected, strict=True))


def of_op() -> dict[str, Any]:
    """Arguments of attention_decode_paged: two samples of 20 and 9 slots in blocks of 8."""
    case = make_case([1, 1], [20, 9], [True, True])
    pages, table = in_pages([padded(x, 24) for x in (case.k, case.v)], [0, 0], [20, 9], 8)
    seen: dict[str, Any] = {}

    def keep(q: Tensor, k: Tensor, v: Tensor, table: Tensor, sinks: Tensor | None, *problem: Any) -> Any:
        seen.update(q=q, k_cache=k, v_cache=v, block_table=table, sinks=sinks, problem=problem)
        return torch.zeros_like(q), torch.zeros(q.shape[:2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.grit_kernels, "attention_decode_paged", keep)
        run(case, CPU, pages, table, [0, 0])
    return seen


def called(arguments: dict[str, Any]) -> Any:
    *tensors, problem = arguments.values()
    return torch.ops.grit_kernels.attention_decode_paged(*tensors, *problem)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ((0, 2), 8, r"block_table: expected entries in 0\.\.7, the blocks of k_cache, got 8 as entry 2 of sample 0"),
        ((1, 0), -1, r"block_table: expected entries in 0\.\.7, the blocks of k_cache, got -1 as entry 0 of sample 1"),
    ],
)
def test_entries_that_name_no_block_are_refused_by_the_op_too(entry: tuple[int, int], value: int, message: str) -> None:
    arguments = of_op()
    assert arguments["k_cache"].shape[0] == 8 and called(arguments)[0].isfinite().all()
    arguments["block_table"][entry] = value
    with pytest.raises(RuntimeError, match=message):
        called(arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_cache": torch.zeros(64, 2, 32)}, r"q, k: expected \(rows, heads, dim\) tensors, k in pages"),
        ({"v_cache": torch.zeros(8, 8, 2, 40)}, r"v_cache: expected \(8, 8, 2, 32\)"),
        ({"v_cache": torch.zeros(8, 8, 2, 32, dtype=torch.bfloat16)}, r"v_cache: its dtype differs from that of q"),
        ({"k_cache": torch.zeros(8, 8, 2, 64)[..., ::2]}, r"k_cache: the last dimension must be contiguous"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int64)}, r"block_table: expected int32 \(2, max_blocks\)"),
        ({"block_table": torch.zeros(3, 3, dtype=torch.int32)}, r"block_table: expected int32 \(2, max_blocks\)"),
        (
            {"block_table": torch.zeros(2, 2, dtype=torch.int32)},
            r"k_start, k_len: sample 0 has rows \[0, 20\), k has 16",
        ),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32).t()}, r"whose last dimension is contiguous"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        called(of_op() | changes)


def test_a_row_that_decodes_looks_at_no_page_outside_of_its_window() -> None:
    case = make_case([1], [300], [True], window=[(20, 0)])
    pages, table = in_pages([padded(x, 300) for x in (case.k, case.v)], [0], [300], 16)
    expected = run(case, CPU, pages, table, [0])
    unseen = table[0, : (299 - 20) // 16].long()
    for page in pages:
        page[unseen] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(run(case, CPU, pages, table, [0]), expected, strict=True))


def test_pages_of_a_strided_last_dimension_are_gathered() -> None:
    case = make_case([1], [30], [True])
    pages, table = in_pages([padded(x, 30) for x in (case.k, case.v)], [0], [30], 8)
    strided = [torch.stack([x, x], -1)[..., 0] for x in pages]
    expected = run(case, CPU, pages, table, [0])
    assert all(torch.equal(a, b) for a, b in zip(run(case, CPU, strided, table, [0]), expected, strict=True))
