"""The C++ kernels of the contrastive loss on every instruction set of this CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels import _library
from grit_kernels.contrastive import chunked
from grit_kernels.contrastive.problem import ContrastiveProblem
from tests.conftest import assert_within_rule

ISAS = _library.cpu_isas() if _library.status().loaded else []
OPS = torch.ops.grit_kernels


def problem(count: int, group: int, width: int, dtype: torch.dtype, ids: bool) -> tuple[Any, ...]:
    q, p = ((torch.randn(n, width) / width**0.5).to(dtype) for n in (count, count * group))
    targets = torch.arange(count) * group + torch.arange(count) % group
    marks = [torch.randint(-9, 9, (n,)) * 2**33 if ids else None for n in (count, count * group)]
    return q, p, torch.tensor(0.1), targets, *marks


def in_torch(arguments: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Results of the chunked forward, and its gradients."""
    given = ContrastiveProblem(*arguments)
    found = chunked.contrastive_forward(given)
    return (*found, *chunked.contrastive_backward(grad, *found[1:3], given))


def by_ops(arguments: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, ...]:
    *inputs, in_batch_negatives, normalize = arguments
    found = OPS.contrastive_forward(*inputs, in_batch_negatives, normalize)
    return (*found, *OPS.contrastive_backward(grad, *inputs, *found[1:3], in_batch_negatives, normalize))


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
        expected = in_torch(arguments, grad)
        with _library.cpu_isa(isa):
            found = by_ops(arguments, grad)
            step = OPS.contrastive_step(*arguments[:-2], grad, *arguments[-2:])
            scaled = OPS.contrastive_scale(torch.tensor(1.0), *arguments[:2], *step[2:])
        for a, b in zip(found[:4], expected[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert torch.equal(found[4], expected[4])
        torch.testing.assert_close(step[0], (grad * expected[0]).sum(), rtol=2e-5, atol=2e-4)
        assert torch.equal(step[1], expected[4])
        above = -(grad * expected[3]).sum() / arguments[2]
        torch.testing.assert_close(scaled[2], above, rtol=1e-4, atol=1e-3 * float(grad.abs().sum()))
        names = ("grad_queries", "grad_passages", "grad_queries of a step", "grad_passages of a step")
        for name, a, b in zip(names, found[5:] + scaled[:2], expected[5:] * 2, strict=True):
            assert a.dtype == dtype
            assert_within_rule(
                a / 10, b.double() / 10, (b / 10).to(dtype), name
            )  # gradients are of order 1 / temperature


@pytest.mark.parametrize("isa", ISAS)
def test_passages_of_nan_reach_the_losses_of_all_queries(isa: str) -> None:
    q, p, temperature, targets, *ids = problem(3, 100, 2048, torch.float32, ids=False)
    p[150:] = float("nan")  # a share of so wide passages holds nothing else
    with _library.cpu_isa(isa):
        losses, *_ = OPS.contrastive_forward(q, p, temperature, targets, *ids, True, False)
    assert bool(losses.isnan().all())


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_results_do_not_depend_on_the_number_of_threads(restore_threads: None) -> None:
    arguments = (*problem(200, 9, 64, torch.bfloat16, ids=True), True, True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(by_ops(arguments, torch.ones(200)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_over_several_chunks_equals_forward_and_backward(dtype: torch.dtype, restore_threads: None) -> None:
    arguments = problem(1100, 4, 200, dtype, ids=False)  # wide and large enough to keep scores, of a chunk at a time
    coefficients, results = torch.rand(1100), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(OPS.contrastive_step(*arguments, coefficients, True, False))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    losses, _, _, excess, best, *grads = by_ops((*arguments, True, False), coefficients)
    loss, best_of_step, *grads_of_step, grad_temperature = results[0]
    torch.testing.assert_close(loss, (coefficients * losses).sum())
    torch.testing.assert_close(grad_temperature, -(coefficients * excess).sum() / 0.1)
    assert torch.equal(best_of_step, best)
    for a, b in zip(grads_of_step, grads, strict=True):
        torch.testing.assert_close(a.to(dtype), b, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_chunks_of_both_sides_add_up() -> None:
    q, p, temperature, *rest = problem(2100, 1, 24, torch.float32, ids=False)
    arguments = (q, torch.cat([p, torch.randn(6900, 24) / 5]), temperature, *rest)
    coefficients = torch.rand(2100)
    step = OPS.contrastive_step(*arguments, coefficients, True, True)
    found = by_ops((*arguments, True, True), coefficients)
    expected = chunked.contrastive_backward(coefficients, *found[1:3], ContrastiveProblem(*arguments, True, True))
    for early, late, truth in zip(step[2:4], found[5:], expected, strict=True):
        assert torch.equal(early, late)
        torch.testing.assert_close(early, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_the_loss_is_the_same_with_and_without_gradients() -> None:
    q, p = torch.randn(60, 32), torch.randn(120, 32)
    cases: list[dict[str, Any]] = [
        {},
        {"reduction": "sum", "symmetric": True},
        {"weights": torch.rand(60), "return_accuracy": True},
    ]
    for options in cases:
        plain = gk.contrastive_loss(q, p, normalize=True, **options)
        leaf = q.clone().requires_grad_()
        wanted = gk.contrastive_loss(leaf, p, normalize=True, **options)
        torch.testing.assert_close(wanted, plain)
        # per-query losses take two passes
        per_query = gk.contrastive_loss(leaf, p, normalize=True, **(options | {"reduction": "none"}))
        per_query = per_query[0] if isinstance(per_query, tuple) else per_query
        total = per_query.sum()
        if options.get("reduction") != "sum":
            total = total / (options["weights"].sum() if "weights" in options else 60)
        loss = wanted[0] if isinstance(wanted, tuple) else wanted
        torch.testing.assert_close(*(torch.autograd.grad(3 * x, leaf)[0] for x in (loss, total)), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_opcheck_accepts_a_step_and_its_scaling() -> None:
    q, p, temperature, *rest = problem(4, 2, 16, torch.float32, ids=True)
    leaves = [x.requires_grad_() for x in (q, p, temperature)]
    torch.library.opcheck(OPS.contrastive_step.default, (*leaves, *rest, torch.rand(4), True, True))
    plain = [x.detach() for x in leaves]
    torch.library.opcheck(OPS.contrastive_scale.default, (torch.tensor(2.0), *plain[:2], *plain))


@pytest.mark.parametrize("scale", [chunked.contrastive_scale, OPS.contrastive_scale])
def test_gradients_are_those_of_the_step_times_the_losss_own(scale: Any) -> None:
    queries, passages = torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    grads = torch.randn(2, 8), torch.randn(4, 8), torch.tensor(0.5)
    found = scale(torch.tensor(3.0), queries, passages, *(grad.clone() for grad in grads))
    for a, b, dtype in zip(found, grads, (torch.bfloat16, torch.bfloat16, torch.float32), strict=True):
        assert torch.equal(a, (b * 3).to(dtype))


@pytest.mark.skipif(not ISAS, reason="needs the compiled library")
def test_targets_outside_are_refused() -> None:
    q, p, temperature, targets, *ids = problem(4, 2, 8, torch.float32, ids=False)
    with pytest.raises(RuntimeError, match="targets: expected .*, got 8 for query 3"):
        OPS.contrastive_forward(q, p, temperature, targets.index_fill(0, torch.tensor(3), 8), *ids, True, False)
    for queries, passages in ((q[:0], p), (q, p[:0])):
        with pytest.raises(RuntimeError, match="queries, passages: expected at least one row each"):
            OPS.contrastive_forward(queries, passages, temperature, targets[: len(queries)], *ids, True, False)
