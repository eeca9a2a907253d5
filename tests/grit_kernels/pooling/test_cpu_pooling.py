"""The C++ kernels of pooling on every instruction set of this CPU."""

from __future__ import annotations

import pytest
import torch

from grit_kernels import _library
from grit_kernels.pooling import reference
from grit_kernels.pooling.problem import PoolingProblem
from tests.conftest import assert_within_rule
from tests.grit_kernels.pooling.test_triton_pooling import DTYPES, problem

ISAS = _library.cpu_isas() if _library.status().loaded else []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [7, 96, 133])
def test_any_instruction_set_keeps_the_accuracy_rule(isa: str, dtype: torch.dtype, columns: int) -> None:
    rows = 300
    hidden = torch.randn(rows, columns).to(dtype)
    weights = torch.rand(rows) * (torch.rand(rows) > 0.3)
    hidden[weights == 0] = float("nan")  # rows without weight must not be read into the sum
    start, end = torch.tensor([0, 3, 130, 140], dtype=torch.int32), torch.tensor([3, 130, 130, 300], dtype=torch.int32)
    denominators = torch.tensor([2.0, 5.0, 1.0, 0.0])
    for gain in (None, torch.rand(columns).to(dtype)):
        numbers = (weights, start, end, denominators, gain, 1e-6)
        with _library.cpu_isa(isa):
            found = torch.ops.grit_kernels.pool_forward(hidden, *numbers)
        exact = reference.pool_forward(PoolingProblem(hidden.double(), weights, start, end, denominators, gain, 1e-6))
        used = torch.where(weights[:, None] != 0, hidden, 0)
        eager = torch.zeros(4, columns, dtype=dtype)
        for b, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
            if first < last and denominators[b] > 0:
                x = used[first:last]
                if gain is not None:
                    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * gain
                eager[b] = (weights[first:last, None].to(dtype) * x).sum(0) / denominators[b].to(dtype)
        assert_within_rule(found, exact, eager)
        assert bool((found[2:] == 0).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
def test_both_directions_keep_the_accuracy_rule(isa: str, dtype: torch.dtype, has_norm: bool) -> None:
    for hidden_size in (5, 64, 131):
        # 130 rows are split into parts; rows between samples belong to none and hold NaN
        arguments = problem([130, 0, 7, 1], [3, 2, 0, 5], hidden_size, dtype)
        norm = torch.randn(hidden_size).to(dtype) if has_norm else None
        doubles = (arguments[0].double(), *arguments[1:], None if norm is None else norm.double(), 1e-6)
        truth = reference.pool_forward(PoolingProblem(*doubles))
        grad = torch.randn(truth.shape)
        truths = reference.pool_backward(grad.double(), PoolingProblem(*doubles))
        with _library.cpu_isa(isa):
            out = torch.ops.grit_kernels.pool_forward(*arguments, norm, 1e-6)
            grads = torch.ops.grit_kernels.pool_backward(grad, *arguments, norm, 1e-6)
        for name, a, b in zip(("out", "grad_hidden", "grad_norm_weight"), (out, *grads), (truth, *truths), strict=True):
            assert_within_rule(a, b, b.to(dtype), name)


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_results_do_not_depend_on_the_number_of_threads(restore_threads: None) -> None:
    arguments = (*problem([300, 64, 129], [0, 1, 0], 40, torch.bfloat16), torch.randn(40), 1e-6)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = torch.ops.grit_kernels.pool_forward(*arguments)
        results.append((out, *torch.ops.grit_kernels.pool_backward(torch.ones_like(out), *arguments)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_overlapping_samples_are_refused_by_the_backward() -> None:
    hidden, weights, *_ = problem([6], [0], 8, torch.float32)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2], [4, 6])]
    with pytest.raises(RuntimeError, match=r"row_start, row_end: expected ranges .* got \[2, 6\) for sample 1"):
        torch.ops.grit_kernels.pool_backward(torch.ones(2, 8), hidden, weights, *bounds, torch.ones(2), None, 1e-6)
