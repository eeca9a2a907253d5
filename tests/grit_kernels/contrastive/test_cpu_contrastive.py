"""The C++ kernels of the contrastive loss on every instruction set of this CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grit_kernels import _library
from grit_kernels.contrastive import chunked
from tests.conftest import assert_within_rule

ISAS = _library.cpu_isas() if _library.status().loaded else []
OPS = torch.ops.grit_kernels


def problem(count: int, group: int, width: int, dtype: torch.dtype, ids: bool) -> tuple[Any, ...]:
    q, p = ((torch.randn(n, width) / width**0.5).to(dtype) for n in (count, count * group))
    targets = torch.arange(count) * group + torch.arange(count) % group
    marks = [torch.randint(-9, 9, (n,)) * 2**33 if ids else None for n in (count, count * group)]
    return q, p, torch.tensor(0.1), targets, *marks


def both(arguments: tuple[Any, ...], grad: Tensor, module: Any) -> tuple[Tensor, ...]:
    *inputs, in_batch_negatives, normalize = arguments
    found = module.contrastive_forward(*inputs, in_batch_negatives, normalize)
    return (*found, *module.contrastive_backward(grad, *inputs, *found[:2], in_batch_negatives, normalize))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("in_batch_negatives", "normalize"), [(True, False), (True, True), (False, True)])
def test_both_directions_equal_chunked_torch(
    isa: str, dtype: torch.dtype, in_batch_negatives: bool, normalize: bool
) -> None:
    # widths: odd (no pairs of bfloat16), smaller and larger than a tile; counts: part of a tile, several tiles and blocks
    for count, group, width in ((1, 1, 7), (49, 3, 20), (130, 5, 130), (30, 60, 2050)):
        arguments = (*problem(count, group, width, dtype, ids=group == 3), in_batch_negatives, normalize)
        grad = torch.randn(count)
        expected = both(arguments, grad, chunked)
        with _library.cpu_isa(isa):
            found = both(arguments, grad, OPS)
        for a, b in zip(found[:3], expected[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert torch.equal(found[3], expected[3])
        for name, a, b in zip(("grad_queries", "grad_passages"), found[4:], expected[4:], strict=True):
            assert a.dtype == dtype
            assert_within_rule(
                a / 10, b.double() / 10, (b / 10).to(dtype), name
            )  # gradients are of order 1 / temperature


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_results_do_not_depend_on_the_number_of_threads(restore_threads: None) -> None:
    arguments = (*problem(200, 9, 64, torch.bfloat16, ids=True), True, True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(both(arguments, torch.ones(200), OPS))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_targets_outside_are_refused() -> None:
    q, p, temperature, targets, *ids = problem(4, 2, 8, torch.float32, ids=False)
    with pytest.raises(RuntimeError, match="targets: got 8 for query 3, accepted are values in 0..7"):
        OPS.contrastive_forward(q, p, temperature, targets.index_fill(0, torch.tensor(3), 8), *ids, True, False)
