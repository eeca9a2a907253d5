"""The Triton kernels of pooling on lengths and gaps as hypothesis draws them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_kernels.pooling import reference
from grit_kernels.pooling.problem import PoolingProblem
from tests.conftest import assert_within_rule

triton_pooling = pytest.importorskip(
    "grit_kernels.pooling.triton_pooling", reason="the package triton is not installed"
)
from tests.grit_kernels.pooling.test_triton_pooling import DTYPES, problem  # noqa: E402


@pytest.mark.interpret
@settings(max_examples=30)
@given(st.data())
def test_both_directions_keep_the_accuracy_rule_for_any_lengths_and_gaps(data: st.DataObject) -> None:
    draw = data.draw
    lens = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    gaps = [draw(st.integers(0, 6)) for _ in lens]
    dtype, hidden_size = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([8, 40, 128]))
    torch.manual_seed(draw(st.integers(0, 99)))
    arguments = problem(lens, gaps, hidden_size, dtype)
    norm = draw(st.sampled_from([None, torch.randn(hidden_size).to(dtype)]))
    doubles = (arguments[0].double(), *arguments[1:], None if norm is None else norm.double(), 1e-6)
    out = triton_pooling.pool_forward(PoolingProblem(*arguments, norm, 1e-6))
    assert out.dtype == torch.float32 and out.shape == (len(lens), hidden_size)
    truth = reference.pool_forward(PoolingProblem(*doubles))
    assert_within_rule(out, truth, truth.to(dtype), "out")
    grad = torch.randn_like(out)
    grads = triton_pooling.pool_backward(grad, PoolingProblem(*arguments, norm, 1e-6))
    truths = reference.pool_backward(grad.double(), PoolingProblem(*doubles))
    assert grads[0].dtype == dtype and grads[1].dtype == torch.float32
    for name, a, b in zip(("grad_hidden", "grad_norm_weight"), grads, truths, strict=True):
        assert_within_rule(a, b, b.to(dtype), name)
