"""Packs, padded batches and key ranges as hypothesis draws them, on every backend, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grit_kernels.backend import interpreting
from tests.conftest import Backend
from tests.grit_kernels.attention import test_key_ranges as ranges
from tests.grit_kernels.attention import test_pages as pages
from tests.grit_kernels.attention.oracle import Case, make_case
from tests.grit_kernels.attention.test_public import check_against_oracle, run_padded, run_varlen

# Triton's interpreter takes seconds per example
FEW = settings(max_examples=2 if interpreting() else 12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def cases(draw: Callable[..., Any]) -> Case:
    batch = draw(st.integers(1, 4))
    lens_k = draw(st.lists(st.integers(0, 24), min_size=batch, max_size=batch))
    lens_q = [draw(st.sampled_from([n, n, 0, max(n // 2, 1), n + 2])) for n in lens_k]
    group, heads_kv = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    edges = st.sampled_from([-1, -1, 0, 1, 5, 30])
    case = make_case(
        lens_q,
        lens_k,
        draw(st.lists(st.booleans(), min_size=batch, max_size=batch)),
        window=[(draw(edges), draw(edges)) for _ in range(batch)],
        heads=(group * heads_kv, heads_kv),
        dim=draw(st.sampled_from([32, 40, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        softmax_scale=draw(st.sampled_from([None, 0.3])),
        sinks=draw(st.sampled_from([None, torch.tensor([-1.0, 2.0, 0.0, 5.0, float("-inf"), 0.5, -40.0, 40.0])])),
    )
    if case.sinks is not None:
        case.sinks = case.sinks[: group * heads_kv]
    return case


@FEW
@given(data=st.data())
def test_any_pack_equals_the_oracle_forward_and_backward(backend: Backend, data: st.DataObject) -> None:
    case = cases(data.draw)
    check_against_oracle(case, backend, case.q[0].dtype)


@FEW
@given(data=st.data())
def test_padding_equals_packing_whatever_the_padding_holds(backend: Backend, data: st.DataObject) -> None:
    case = cases(data.draw)
    outs, lses, grads = run_varlen(case, backend, [torch.ones(q.shape) for q in case.q])
    for extra, poison in ((0, float("nan")), (3, float("inf"))):
        out, lse, padded_grads = run_padded(case, backend, extra, poison)
        for b, (part, part_lse) in enumerate(zip(outs, lses, strict=True)):
            rows = part.shape[0]
            torch.testing.assert_close(out[b, :rows], part)
            torch.testing.assert_close(lse[b, :rows], part_lse)
            assert bool((out[b, rows:] == 0).all()) and bool((lse[b, rows:] == float("-inf")).all())
            for found, expected in zip(padded_grads[:3], grads[:3], strict=True):
                used = expected[b].shape[0]
                torch.testing.assert_close(found[b, :used], expected[b])
                assert bool((found[b, used:] == 0).all()), "padding has a gradient"
        if case.sinks is not None:
            torch.testing.assert_close(padded_grads[3], grads[3])


@FEW
@given(data=st.data())
def test_ranges_anywhere_equal_the_oracle_and_rows_between_them_are_never_used(
    backend: Backend, data: st.DataObject
) -> None:
    draw = data.draw
    batch, seed = draw(st.integers(2, 5)), draw(st.integers(0, 2**16))
    lens_k = draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch))
    lens_q = [draw(st.sampled_from([n, min(n, 1), max(n // 2, 1), 0])) for n in lens_k]
    torch.manual_seed(seed)
    edges = st.sampled_from([-1, -1, 0, 1, 5, 30])
    case = make_case(
        lens_q,
        lens_k,
        draw(st.lists(st.booleans(), min_size=batch, max_size=batch)),
        window=[(draw(edges), draw(edges)) for _ in range(batch)],
        heads=draw(st.sampled_from([(4, 2), (2, 2), (4, 1)])),
        dim=draw(st.sampled_from([32, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        softcap=draw(st.sampled_from([0.0, 3.0])),
    )
    ranges.check(case, backend, ranges.run(case, backend, *ranges.scattered(case, seed)))


@FEW
@given(data=st.data())
def test_pages_of_any_table_equal_the_oracle_and_nothing_else_is_used(backend: Backend, data: st.DataObject) -> None:
    case = cases(data.draw)
    first = data.draw(st.lists(st.sampled_from([0, 0, 1, 13]), min_size=len(case.k), max_size=len(case.k)))
    pages.check(case, backend, data.draw(st.sampled_from([1, 3, 16, 64])), first)
