"""The reference attention: right against an independent oracle, its derivatives against finite differences."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from grit_kernels.attention import reference
from grit_kernels.attention.problem import AttentionProblem
from tests.grit_kernels.attention.oracle import attention, gradients, make_case

# per sample (len_q, len_k, left, right): empty queries, no keys, more queries than keys (fully masked rows), windows, a cache
SAMPLES = [(3, 3, 99, 0), (0, 2, 99, 99), (2, 0, 99, 99), (4, 2, 1, 0), (2, 5, 2, 1), (1, 3, 0, 0)]
HI = {4: [3, 5]}  # upper bounds of sample 4 when there are bounds per token


def numbers() -> dict[str, Tensor]:
    q_len = torch.tensor([s[0] for s in SAMPLES], dtype=torch.int32)
    k_len = torch.tensor([s[1] for s in SAMPLES], dtype=torch.int32)
    return {
        "q_start": q_len.cumsum(0, dtype=torch.int32) - q_len,
        "q_len": q_len,
        "k_start": k_len.cumsum(0, dtype=torch.int32) - k_len,
        "k_len": k_len,
        "left": torch.tensor([s[2] for s in SAMPLES], dtype=torch.int32),
        "right": torch.tensor([s[3] for s in SAMPLES], dtype=torch.int32),
    }


def upper_bounds() -> Tensor:
    rows: list[int] = []
    for b, (len_q, len_k, _, right) in enumerate(SAMPLES):
        rows += HI.get(b, [max(0, min(len_k, r + len_k - len_q + right + 1)) for r in range(len_q)])
    return torch.tensor(rows, dtype=torch.int32)


def inputs(dtype: torch.dtype = torch.float64, dim: int = 2, heads: tuple[int, int] = (2, 1)) -> list[Tensor]:
    tokens_q, tokens_k = sum(s[0] for s in SAMPLES), sum(s[1] for s in SAMPLES)
    q = torch.randn(tokens_q, heads[0], dim, dtype=dtype, requires_grad=True)
    return [q, *(torch.randn(tokens_k, heads[1], dim, dtype=dtype, requires_grad=True) for _ in range(2))]


def problem_of(softcap: float, hi: Tensor | None) -> AttentionProblem:
    return AttentionProblem(
        **numbers(), hi=hi, q_rows=0, k_rows=0, max_q=4, max_k=5, softmax_scale=0.7, softcap=softcap
    )


def sinks_of(sunk: bool) -> list[Tensor]:
    return [torch.tensor([0.4, -1.3], dtype=torch.float64, requires_grad=True)] if sunk else []


VARIANTS = list(product([0.0, 1.5], [False, True], [False, True]))


def live_rows(hi: Tensor | None) -> Tensor:
    with torch.no_grad():
        lse = reference.attention_forward(*inputs(), problem_of(0.0, hi))[1]
    return lse[:, 0].isfinite()


@pytest.mark.parametrize(("softcap", "use_hi", "sunk"), VARIANTS)
def test_forward_passes_gradcheck_in_out_and_lse(softcap: float, use_hi: bool, sunk: bool) -> None:
    hi = upper_bounds() if use_hi else None
    live = live_rows(hi)

    def run(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention_forward(q, k, v, problem_of(softcap, hi), *sinks)
        return out, lse[live]  # a fully masked row's -inf has no difference quotient

    assert torch.autograd.gradcheck(run, inputs() + sinks_of(sunk))


@pytest.mark.parametrize(("softcap", "use_hi", "sunk"), [(0.0, False, False), (1.5, True, False), (1.5, True, True)])
def test_forward_passes_gradgradcheck(softcap: float, use_hi: bool, sunk: bool) -> None:
    hi = upper_bounds() if use_hi else None
    live = live_rows(hi)

    def run(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention_forward(q, k, v, problem_of(softcap, hi), *sinks)
        return out, lse[live]

    assert torch.autograd.gradgradcheck(run, inputs() + sinks_of(sunk), fast_mode=True)


@pytest.mark.parametrize(("softcap", "use_hi", "sunk"), VARIANTS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_closed_form_backward_equals_autograd(softcap: float, use_hi: bool, sunk: bool, with_lse: bool) -> None:
    hi = upper_bounds() if use_hi else None
    tensors, sinks, problem = inputs(), sinks_of(sunk), problem_of(softcap, hi)
    out, lse = reference.attention_forward(*tensors, problem, *sinks)
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(lse) if with_lse else None
    live = lse.isfinite()
    total = (out * grad_out).sum() + (0 if grad_lse is None else (lse[live] * grad_lse[live]).sum())
    expected = torch.autograd.grad(total, tensors + sinks)
    with torch.no_grad():
        *found, dsinks = reference.attention_backward(grad_out, grad_lse, *tensors, out, lse, problem, *sinks)
    if sunk:
        found.append(dsinks)
    for name, a, b in zip(["q", "k", "v", "sinks"], found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=f"d{name}")


@pytest.mark.parametrize(("softcap", "sunk"), [(0.0, False), (2.0, False), (2.0, True)])
def test_forward_and_backward_equal_the_row_by_row_oracle_in_float64(softcap: float, sunk: bool) -> None:
    causal, window = [True, False, False, True], [(-1, -1), (2, 1), (-1, 0), (1, -1)]
    case = make_case([4, 3, 0, 5], [4, 6, 2, 3], causal, window=window, dim=8, dtype=torch.float64, softcap=softcap)
    case.sinks = torch.tensor([0.5, -2.0, 7.0, 0.0], dtype=torch.float64).requires_grad_() if sunk else None
    q, k, v = (torch.cat(x).requires_grad_() for x in (case.q, case.k, case.v))
    ranges = [[0, 4, 7, 7], [4, 3, 0, 5], [0, 4, 10, 12], [4, 6, 2, 3], [99, 2, 99, 1], [0, 1, 0, 0]]
    arguments = [torch.tensor(x, dtype=torch.int32) for x in ranges]
    out, lse = reference.attention_forward(
        q, k, v, AttentionProblem(*arguments, None, 0, 0, 5, 6, 8**-0.5, softcap), case.sinks
    )
    expected, expected_lse = attention(case)
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.cat(expected_lse), rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    leaves = [q, k, v] if case.sinks is None else [q, k, v, case.sinks]
    found = torch.autograd.grad((out * grad).sum(), leaves)
    by_sample, dsinks = gradients(case, list(grad.split([4, 3, 0, 5])))
    wanted = [torch.cat(parts) for parts in zip(*by_sample, strict=True)]
    for a, b in zip(found, wanted if dsinks is None else [*wanted, dsinks], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sink", [None, 0.0, 1e4])
def test_rows_that_see_nothing_give_zero_minus_infinity_and_no_gradient(sink: float | None) -> None:
    tensors, problem = inputs(), problem_of(0.0, None)
    if sink is not None:
        tensors.append(torch.full((2,), sink, dtype=torch.float64, requires_grad=True))
    out, lse = reference.attention_forward(*tensors[:3], problem, *tensors[3:])
    dead = ~live_rows(None)
    assert int(dead.sum()) == 4  # two rows without keys, two before the first key
    assert bool((out[dead] == 0).all()) and bool((lse[dead] == float("-inf")).all())
    grads = torch.autograd.grad(out.sum() + lse[~dead].sum(), tensors)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool((grads[0][dead] == 0).all())


def test_rows_and_keys_that_no_sample_owns_may_hold_nan() -> None:
    tensors, problem = inputs(), problem_of(0.0, None)
    out, lse = reference.attention_forward(*tensors, problem)
    spread = []
    for x, start, length in zip(tensors, ("q_start", "k_start", "k_start"), ("q_len", "k_len", "k_len"), strict=True):
        wide = torch.full((len(SAMPLES) * 6, *x.shape[1:]), float("nan"), dtype=x.dtype)
        for b, (s, n) in enumerate(
            zip(getattr(problem, start).tolist(), getattr(problem, length).tolist(), strict=True)
        ):
            wide[6 * b : 6 * b + n] = x[s : s + n].detach()
        spread.append(wide.requires_grad_())
    rows = torch.arange(len(SAMPLES), dtype=torch.int32) * 6
    padded = replace(problem, q_start=rows, k_start=rows, q_rows=6, k_rows=6)
    out_padded, lse_padded = reference.attention_forward(*spread, padded)
    used = torch.cat([6 * b + torch.arange(s[0]) for b, s in enumerate(SAMPLES)])
    assert torch.equal(out_padded[used], out) and torch.equal(lse_padded[used], lse)
    unused = torch.ones(len(out_padded), dtype=torch.bool).index_fill(0, used, False)
    assert bool((out_padded[unused] == 0).all()) and bool((lse_padded[unused] == float("-inf")).all())
    given = (torch.ones_like(out_padded).masked_fill(unused[:, None, None], float("nan")), None, *spread)
    for found in (
        torch.autograd.grad(out_padded.sum(), spread),
        reference.attention_backward(*given, out_padded, lse_padded, padded, *sinks_of(True)),
    ):
        assert all(bool(g.isfinite().all()) for g in found)
