"""How far a gradient of a softmax loss may be from the exact one, from its formula (docs/kernels.md, "How exact a gradient is").

    g_ij = c_i (P_ij - [j = t_i]) / T        dq_i = sum_j g_ij p_j        dp_j = sum_i g_ij q_i

With u = 2^-24, the unit round-off of FP32, and A_i = max_j sum_k |q_ik p_jk| / T, the largest score without its signs:

* A score of d products, less the highest one, is off by at most E_i = (d + 8) u A_i, so the odds P_ij / (1 - P_ij) are off by a
  factor of at most exp(2 E_i). Where the logarithm of the sum is kept together with the highest score, as by autograd of the
  definition and no kernel, its rounding changes all P_ij of a row alike, by u A_i of each, and they no longer sum to 1.
* P_it - 1 is a difference from 1, so it is off by about u, however small it is: p_t enters dq_i with an error of u c_i / T.
* A sum of n terms is off by at most n u times the sum of their sizes; where g is rounded to 16 bits for a product, every term by
  that rounding too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from tests.conftest import Backend

U = torch.finfo(torch.float32).eps / 2
T = 0.05
SPREADS = pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LABELS = torch.randint(0, 60, (20,), generator=torch.Generator().manual_seed(0))


def unit_of(dtype: torch.dtype) -> float:
    """The unit round-off of a product's operands and of the result, beside FP32's."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def softmax_bound(
    q: Tensor,
    p: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    temperature: float,
    unit: float,
    *,
    together: bool = False,
    of_scores: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Bounds of the errors of dq and dp of ``sum_i coefficients_i loss_i``, float64 as the inputs.

    ``together``: the highest score and the logarithm of the sum are one number. ``of_scores``: the unit round-off of scores that
    are rounded to 16 bits.
    """
    scale = coefficients[:, None] / temperature
    largest = (q.abs() @ p.abs().T).amax(1, keepdim=True) / temperature
    error = ((q.shape[1] + 8) * U + of_scores) * largest
    scores = q @ p.T / temperature
    others = scores[:, None, :].masked_fill(torch.eye(len(p), dtype=torch.bool), float("-inf")).logsumexp(2)
    log_odds = scores - others
    probability = log_odds.sigmoid()
    off = torch.stack([(log_odds + sign * 2 * error).sigmoid() - probability for sign in (1, -1)]).abs().amax(0)
    own = F.one_hot(targets, len(p)).double()
    off = (off + (8 + 2 * largest * together) * U * probability + 2 * U * own) * scale
    weights = (probability - own) * scale
    size = weights.abs() + off

    def bound(off: Tensor, size: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        terms = off + (len(rows) + 4) * U * size + unit * size
        return terms @ rows.abs() + unit * (weights @ rows).abs()

    return bound(off, size, weights, p), bound(off.T, size.T, weights.T, q)


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return [g.double() for g in torch.autograd.grad(loss(*leaves), leaves)]


def mixed(rows: int, width: int, spread: float, dtype: torch.dtype) -> Tensor:
    """Rows whose sizes are spread over 10 ** (-spread) to 10 ** spread."""
    return (torch.randn(rows, width) * 10 ** (torch.rand(rows, 1) * 2 * spread - spread)).to(dtype)


def symmetric_loss(q: Tensor, p: Tensor, temperature: float = T) -> Tensor:
    targets = torch.arange(len(q)) * (len(p) // len(q))
    scores = q @ p.T / temperature
    back = F.cross_entropy(scores[:, targets].T, torch.arange(len(q)))
    return (F.cross_entropy(scores, targets) + back) / 2


def symmetric_bounds(q: Tensor, p: Tensor, unit: float, together: bool = False) -> list[Tensor]:
    targets, numbers = torch.arange(len(q)) * (len(p) // len(q)), torch.arange(len(q))
    half = torch.full((len(q),), 0.5 / len(q), dtype=torch.float64)
    of_q, of_p = softmax_bound(q, p, targets, half, T, unit, together=together)
    of_positives, back = softmax_bound(p[targets], q, numbers, half, T, unit, together=together)
    return [of_q + back, of_p.index_add(0, targets, of_positives)]


def excess(found: list[Tensor], truth: list[Tensor], bounds: list[Tensor], unit: float) -> float:
    """The largest error, as a multiple of what is allowed: the bound, and the rounding of the result."""
    allowed = [b * (1 + 2 * unit) + (unit + U) * x.abs() + 1e-30 for b, x in zip(bounds, truth, strict=True)]
    return max(float(((f - x).abs() / a).max()) for f, x, a in zip(found, truth, allowed, strict=True))


@SPREADS
@DTYPES
def test_gradients_of_the_symmetric_loss_are_within_their_bound(
    backend: Backend, spread: float, dtype: torch.dtype
) -> None:
    q, p = mixed(12, 40, spread, dtype), mixed(24, 40, spread, dtype)
    truth = gradients(symmetric_loss, q.double(), p.double())

    def loss(a: Tensor, b: Tensor) -> Tensor:
        found = gk.contrastive_loss(a.to(backend.device), b.to(backend.device), temperature=T, symmetric=True)
        assert isinstance(found, Tensor)
        return found

    with backend():
        found = gradients(loss, q, p)
    unit = unit_of(dtype)
    bounds = symmetric_bounds(q.double(), p.double(), unit, together=backend.name == "reference")
    assert excess(found, truth, bounds, unit) <= 1


@SPREADS
@DTYPES
def test_gradients_of_the_next_token_loss_are_within_their_bound(
    backend: Backend, spread: float, dtype: torch.dtype
) -> None:
    hidden, weight = mixed(20, 40, spread, dtype), mixed(60, 40, spread / 2, dtype)
    truth = gradients(lambda a, b: F.cross_entropy(a @ b.T, LABELS, reduction="sum"), hidden.double(), weight.double())

    def loss(a: Tensor, b: Tensor) -> Tensor:
        device = backend.device
        return gk.linear_cross_entropy(a.to(device), b.to(device), LABELS.to(device)).sum()

    with backend():
        found = gradients(loss, hidden, weight)
    unit, ones = unit_of(dtype), torch.ones(20, dtype=torch.float64)
    # without a kernel of its own, plain torch on a CPU rounds these logits to the inputs' dtype
    how = {"together": backend.name == "reference", "of_scores": unit * (backend.name in ("fallback", "interpret"))}
    bounds = softmax_bound(hidden.double(), weight.double(), LABELS, ones, 1.0, unit, **how)
    assert excess(found, truth, list(bounds), unit) <= 1


def test_the_definition_in_fp32_needs_the_wider_bound() -> None:
    """Its ``logsumexp`` is one number."""
    q, p = mixed(12, 40, 0.0, torch.float32), mixed(24, 40, 0.0, torch.float32)
    truth = gradients(symmetric_loss, q.double(), p.double())
    with gk.backend("reference"):
        found = gradients(lambda a, b: gk.contrastive_loss(a, b, temperature=T, symmetric=True), q, p)  # type: ignore[arg-type, return-value]
    assert excess(found, truth, symmetric_bounds(q.double(), p.double(), 0.0), 0.0) > 1
    assert excess(found, truth, symmetric_bounds(q.double(), p.double(), 0.0, together=True), 0.0) <= 1


def test_the_bound_notices_a_temperature_that_is_off_by_a_thousandth() -> None:
    q, p = (mixed(rows, 40, 0.0, torch.float64) / 40 for rows in (12, 24))
    truth, found = (gradients(lambda a, b, t=t: symmetric_loss(a, b, t), q, p) for t in (T, 1.001 * T))
    assert excess(found, truth, symmetric_bounds(q, p, 0.0), 0.0) > 10
    assert excess(found, truth, symmetric_bounds(q, p, unit_of(torch.bfloat16)), 0.0) < 1


def test_what_a_sure_query_lacks_to_1_is_known_to_a_rounding_of_1() -> None:
    """The difference that a comparison with float64 shows: 1 - P_it is 1e-10 here, less than FP32 tells from 0."""
    q, p, target = torch.tensor([[1.15, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1000.0]]), torch.tensor([0])

    def loss(a: Tensor, b: Tensor) -> Tensor:
        found = gk.contrastive_loss(a, b, temperature=T, targets=target)
        assert isinstance(found, Tensor)
        return found

    truth = gradients(lambda a, b: F.cross_entropy(a @ b.T / T, target), q.double(), p.double())
    found = gradients(loss, q, p)
    bounds = softmax_bound(q.double(), p.double(), target, torch.ones(1, dtype=torch.float64), T, 0.0)
    assert excess(found, truth, list(bounds), 0.0) <= 1
    # nothing is left of the part along the positive passage, and all of the part along the other one
    (along, across), (along_found, across_found) = truth[0][0].tolist(), found[0][0].tolist()
    assert along < -1e-9 and abs(along_found - along) > 0.5 * abs(along)
    assert across_found == pytest.approx(across, rel=1e-4)
    assert float(bounds[0][0, 0]) < 16 * U / T
