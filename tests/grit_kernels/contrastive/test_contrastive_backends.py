"""Every backend of gk.contrastive_loss against a float64 oracle with all scores, and the ops' contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from grit_kernels.contrastive import reference
from tests.conftest import Backend, assert_within_rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run_everything(
    q: Tensor, p: Tensor, temperature: Tensor, grad: Tensor, options: dict[str, Any], dtype: torch.dtype, plain: bool
) -> tuple[Tensor, ...]:
    """Per-query losses and the gradients of queries, passages and temperature; ``plain``: all scores in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, p)]
    divisor = temperature.detach().to(dtype if plain else torch.float32).requires_grad_()
    if plain:
        a, b = (F.normalize(x, dim=-1) if options["normalize"] else x for x in leaves)
        scores = a @ b.T / divisor
        keep = reference.candidate_mask(
            q.shape[0], p.shape[0], options["targets"], options["in_batch_negatives"], options["mask_ids"]
        )
        losses = F.cross_entropy(scores.masked_fill(~keep, float("-inf")), options["targets"], reduction="none")
    else:
        losses = gk.contrastive_loss(*leaves, temperature=divisor, reduction="none", **options)
    return losses.detach(), *torch.autograd.grad(losses, [*leaves, divisor], grad.to(losses.dtype))


def test_symmetric_weights_and_accuracy_equal_the_reference(backend: Backend) -> None:
    q, p = (torch.randn(n, 32, device=backend.device) for n in (12, 24))
    options: dict[str, Any] = {
        "symmetric": True, "normalize": True, "return_accuracy": True, "temperature": 0.3,
        "weights": torch.rand(12, device=backend.device),
    }  # fmt: skip
    with gk.backend("reference"):
        expected = gk.contrastive_loss(q, p, **options)
    with backend():
        found = gk.contrastive_loss(q, p, **options)
    torch.testing.assert_close(found, expected)


def test_fp32_inputs_are_not_rounded_to_tf32_or_bf16(backend: Backend) -> None:
    q, p = (F.normalize(torch.randn(40, 64, device=backend.device), dim=-1) for _ in range(2))
    truth = F.cross_entropy(q.double() @ p.double().T / 0.01, torch.arange(40, device=q.device), reduction="none")
    with backend():
        found = gk.contrastive_loss(q, p, temperature=0.01, reduction="none")
    # TF32 scores would be wrong by 1e-3 / temperature = 0.05
    assert (found - truth).abs().max() < 5e-5


def test_results_repeat_bit_by_bit(backend: Backend) -> None:
    q, p = (torch.randn(n, 24, device=backend.device).bfloat16().requires_grad_() for n in (70, 210))

    def run() -> tuple[Tensor, ...]:
        loss = gk.contrastive_loss(q, p, temperature=5.0)
        return loss, *torch.autograd.grad(loss, (q, p))

    with backend():
        for a, b in zip(run(), run(), strict=True):
            assert torch.equal(a, b)


def test_rows_of_any_stride_are_accepted_and_padding_between_them_is_not_read(backend: Backend) -> None:
    wide = torch.full((30, 40), float("nan"), device=backend.device)
    wide[:, :16] = torch.randn(30, 16)
    q, p = wide[:10, :16], wide[10:, :16]
    with backend():
        expected = gk.contrastive_loss(q.contiguous(), p.contiguous())
        assert torch.equal(gk.contrastive_loss(q, p), expected)
        columns = (x.T.contiguous().T for x in (q, p))
        torch.testing.assert_close(gk.contrastive_loss(*columns), expected)


def test_targets_ids_and_weights_of_any_stride_are_accepted(backend: Backend) -> None:
    q, p = (torch.randn(n, 16, device=backend.device, requires_grad=True) for n in (6, 12))
    table = torch.stack([torch.arange(6) * 2 + 1, torch.arange(6) % 3], dim=1).to(backend.device)
    passage_ids = torch.randint(0, 3, (12, 2), device=backend.device)[:, 1]
    weights = torch.rand(6, 2, device=backend.device)[:, 0]
    assert not table[:, 0].is_contiguous()
    with backend():
        strided, plain = (
            gk.contrastive_loss(
                *(q, p),
                temperature=4.0,
                targets=take(table[:, 0]),
                mask_ids=(take(table[:, 1]), take(passage_ids)),
                weights=take(weights),
                reduction="sum",
            )
            for take in (lambda x: x, torch.Tensor.contiguous)
        )
        assert torch.equal(strided, plain)


def test_opcheck_accepts_both_ops_and_a_second_derivative_is_refused(backend: Backend) -> None:
    if not backend.is_op:
        return
    q, p = (torch.randn(n, 16, device=backend.device, requires_grad=True) for n in (4, 8))
    temperature = torch.tensor(1.0, device=backend.device, requires_grad=True)
    targets = torch.arange(4, device=backend.device) * 2
    ids = [torch.randint(0, 3, (n,), device=backend.device) for n in (4, 8)]
    ops = torch.ops.grit_kernels
    grads = [torch.randn(4, device=backend.device) for _ in range(3)]
    for masks in (ids, [None, None]):
        forward = (temperature, targets, *masks, True, True)
        torch.library.opcheck(ops.contrastive_forward.default, (q, p, *forward))
        for name in ("test_schema", "test_faketensor"):  # of bfloat16, the losses are float32
            torch.library.opcheck(
                ops.contrastive_forward.default, (q.bfloat16(), p.bfloat16(), *forward), test_utils=name
            )
        detached = [x.detach() for x in (q, p, temperature)]
        arguments = (grads[0], *detached, targets, *masks, *grads[1:], False, False)
        torch.library.opcheck(ops.contrastive_backward.default, arguments)
    with backend():
        (first,) = torch.autograd.grad(gk.contrastive_loss(q, p), q, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative.*reference"):
            first.sum().backward()


def test_compile_captures_the_loss_whole(backend: Backend) -> None:
    if not backend.is_op:
        return
    q, p = (torch.randn(n, 16, device=backend.device, requires_grad=True) for n in (4, 8))
    temperature = torch.tensor(0.5, device=backend.device, requires_grad=True)

    def run(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return gk.contrastive_loss(a, b, temperature=t, normalize=True, symmetric=True)

    leaves = (q, p, temperature)
    with backend():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        found, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, run))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_scores_of_mixed_magnitudes_keep_their_digits(backend: Backend, reduction: Any) -> None:
    """Losses of thousands alongside losses near zero, in both directions."""
    q = torch.randn(64, 48, device=backend.device) * 10 ** (3 * torch.rand(64, 1, device=backend.device))
    p = torch.randn(128, 48, device=backend.device) * 10 ** torch.rand(128, 1, device=backend.device)

    def gradients(dtype: torch.dtype, chosen: Any) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, p)]
        with chosen:
            loss = gk.contrastive_loss(*leaves, temperature=0.5, symmetric=True, reduction=reduction)
            return torch.autograd.grad(loss.sum(), leaves)

    found = gradients(torch.float32, backend())
    truth, eager = (gradients(dtype, gk.backend("reference")) for dtype in (torch.float64, torch.float32))
    for name, a, b, c in zip(("queries", "passages"), found, truth, eager, strict=True):
        size = b.abs().max()
        assert_within_rule(a / size, b / size, c / size, name)
