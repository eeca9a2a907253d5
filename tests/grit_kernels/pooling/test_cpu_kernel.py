"""The C++ pooling kernel under every instruction set of this CPU, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from grit_kernels import _library
from grit_kernels.pooling import reference
from tests.conftest import assert_within_rule

pytestmark = pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
ISAS = _library.cpu_isas() if _library.status().loaded else ["none"]


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
        exact = reference.pool_forward(hidden.double(), weights, start, end, denominators, gain, 1e-6)
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


def test_the_number_of_threads_changes_no_bit(restore_threads: None) -> None:
    hidden = torch.randn(1000, 64)
    numbers = (
        torch.rand(1000),
        torch.tensor([0, 900]).int(),
        torch.tensor([900, 1000]).int(),
        torch.ones(2),
        None,
        1e-6,
    )
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.grit_kernels.pool_forward(hidden, *numbers))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
