"""The aggregations equal the formulas of the paper's loss ablation, gradients included."""

from __future__ import annotations

import pytest
import torch

from python_model.losses import generative_loss
from python_model.prompts import IGNORE_INDEX


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    lengths = [5, 0, 7, 3]
    labels = torch.randint(0, 9, (15,))
    labels[[0, 1, 6, 12, 13, 14]] = IGNORE_INDEX
    losses = torch.rand(15, dtype=torch.float64) * (labels != IGNORE_INDEX)
    return losses.requires_grad_(), labels, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def test_mixed_is_the_mean_over_loss_tokens() -> None:
    losses, labels, cu = _batch()
    expected = losses[labels != IGNORE_INDEX].mean()
    torch.testing.assert_close(generative_loss(losses, labels, cu), expected)


def test_token_is_the_sum_over_samples() -> None:
    losses, labels, cu = _batch()
    torch.testing.assert_close(generative_loss(losses, labels, cu, kind="token"), losses.sum() / 4)


def test_sample_is_the_mean_of_sample_means() -> None:
    losses, labels, cu = _batch()
    means = [
        losses[a:b][labels[a:b] != IGNORE_INDEX].mean()
        for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
        if (labels[a:b] != IGNORE_INDEX).any()
    ]
    torch.testing.assert_close(generative_loss(losses, labels, cu, kind="sample"), torch.stack(means).sum() / 4)


def test_mixed_with_token_count_sums_to_the_exact_mean_over_micro_batches() -> None:
    losses, labels, cu = _batch()
    count = int((labels != IGNORE_INDEX).sum())
    first = generative_loss(losses[:5], labels[:5], cu[:2], token_count=count)
    second = generative_loss(losses[5:], labels[5:], cu[1:] - 5, token_count=count)
    whole = generative_loss(losses, labels, cu)
    torch.testing.assert_close(first + second, whole)
    torch.testing.assert_close(
        torch.autograd.grad(first + second, losses, retain_graph=True)[0], torch.autograd.grad(whole, losses)[0]
    )


@pytest.mark.parametrize("kind", ["mixed", "token", "sample"])
def test_a_batch_without_labels_gives_zero(kind: str) -> None:
    losses = torch.zeros(4)
    labels = torch.full((4,), IGNORE_INDEX)
    assert float(generative_loss(losses, labels, torch.tensor([0, 4]), kind=kind)) == 0.0


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind: got 'tokens'"):
        generative_loss(torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]), kind="tokens")
