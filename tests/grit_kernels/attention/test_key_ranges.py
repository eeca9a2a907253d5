"""switch_attention_varlen with key ranges that lie anywhere in k: what a server's packed step calls."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from tests.conftest import Backend, assert_within_rule
from tests.grit_kernels.attention.oracle import Case, attention, make_case


def scattered(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """All keys in one tensor in a random order of samples, with gaps of NaN between them; values; starts (B)."""
    order = random.Random(seed)
    batch = list(range(len(case.k)))
    order.shuffle(batch)
    heads, dim = case.k[0].shape[1:]
    starts, parts_k, parts_v, place = torch.zeros(len(batch), dtype=torch.int32), [], [], 0
    for b in batch:
        gap = torch.full((order.choice([0, 1, 7]), heads, dim), float("nan"), dtype=case.k[0].dtype)
        parts_k += [gap, case.k[b]]
        parts_v += [gap, case.v[b]]
        starts[b] = place + len(gap)
        place += len(gap) + len(case.k[b])
    tail = torch.full((3, heads, dim), float("nan"), dtype=case.k[0].dtype)
    return torch.cat([*parts_k, tail]), torch.cat([*parts_v, tail]), starts


def run(case: Case, backend: Backend, k: Tensor, v: Tensor, starts: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    lens_q, lens_k = [len(x) for x in case.q], [len(x) for x in case.k]
    hi = None if case.hi is None else torch.tensor(sum(case.hi, []), dtype=torch.int32, device=backend.device)
    with backend():
        out, lse = gk.switch_attention_varlen(
            torch.cat(case.q).to(backend.device),
            k.to(backend.device),
            v.to(backend.device),
            torch.tensor(case.causal, device=backend.device),
            torch.tensor([0, *lens_q]).cumsum(0).int().to(backend.device),
            None,
            max(*lens_q, 1),
            max(*lens_k, 1),
            window_size=torch.tensor(case.window, dtype=torch.int32, device=backend.device),
            hi=hi,
            softmax_scale=case.softmax_scale,
            softcap=case.softcap,
            sinks=None if case.sinks is None else case.sinks.to(backend.device),
            return_lse=True,
            k_starts=starts.to(backend.device),
            seqlens_k=torch.tensor(lens_k, dtype=torch.int32, device=backend.device),
            **changes,
        )
    return out.cpu(), lse.cpu()


def check(case: Case, backend: Backend, found: tuple[Tensor, Tensor]) -> None:
    (truth, truth_lse), (eager, eager_lse) = attention(case), attention(case, case.q[0].dtype)
    assert_within_rule(found[0], torch.cat(truth), torch.cat(eager), "out")
    live = torch.cat(truth_lse).isfinite()
    assert torch.equal(found[1].isfinite(), live)
    assert bool((found[0][~live] == 0).all())
    assert_within_rule(found[1][live], torch.cat(truth_lse)[live], torch.cat(eager_lse)[live], "lse")


def test_decode_rows_beside_long_texts_and_pieces_of_prompts_equal_the_oracle(backend: Backend) -> None:
    # one new token after 300, a piece of 5 after 60, a text of 130 read from both sides, one of 3, an idle sequence
    case = make_case(
        [1, 5, 130, 3, 0, 1],
        [301, 65, 130, 3, 17, 1],
        [True, True, False, False, True, True],
        window=[(-1, 0), (30, 0), (-1, -1), (2, 2), (-1, 0), (-1, 0)],
    )
    for case.sinks in (None, torch.tensor([-2.0, 0.5, 3.0, float("-inf")])):
        check(case, backend, run(case, backend, *scattered(case, 3)))


def test_upper_bounds_count_positions_inside_the_range(backend: Backend) -> None:
    case = make_case([3, 4], [5, 4], [True, False], hi=[[3, 3, 5], [2, 2, 4, 4]])
    check(case, backend, run(case, backend, *scattered(case, 1)))


def test_overlapping_ranges_read_the_same_rows(backend: Backend) -> None:
    keys, values = torch.randn(12, 2, 32), torch.randn(12, 2, 32)
    starts = torch.tensor([2, 2, 4], dtype=torch.int32)
    case = make_case([1, 4, 8], [10, 4, 8], [True, True, False])
    case.k = [keys[s : s + n] for s, n in zip(starts.tolist(), (10, 4, 8), strict=True)]
    case.v = [values[s : s + n] for s, n in zip(starts.tolist(), (10, 4, 8), strict=True)]
    check(case, backend, run(case, backend, keys, values, starts))


def test_ranges_one_after_another_equal_the_table_bitwise(backend: Backend) -> None:
    case = make_case([3, 6, 1], [9, 6, 40], [True, False, True])
    k, v = torch.cat(case.k), torch.cat(case.v)
    found = run(case, backend, k, v, torch.tensor([0, 9, 15], dtype=torch.int32))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=backend.device) for x in ([0, 3, 9, 10], [0, 9, 15, 55]))
    with backend():
        expected = gk.switch_attention_varlen(
            *(x.to(backend.device) for x in (torch.cat(case.q), k, v, torch.tensor(case.causal))), cu_q, cu_k, 6, 40
        )
    assert isinstance(expected, Tensor) and torch.equal(found[0], expected.cpu())


def test_a_gradient_is_refused_not_lost(backend: Backend) -> None:
    case = make_case([2], [2], [True])
    k, v, starts = torch.cat(case.k).requires_grad_(), torch.cat(case.v), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^k: expected a tensor without gradients beside k_starts.*no_grad"):
        run(case, backend, k, v, starts)
    case.sinks = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"^sinks: expected a tensor without gradients beside k_starts.*no_grad"):
        run(case, backend, k.detach(), v, starts)
    with torch.no_grad():
        check(case, backend, run(case, backend, k, v, starts))
