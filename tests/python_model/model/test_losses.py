"""The aggregations equal the formulas of the paper's loss ablation."""

from __future__ import annotations

import pytest
import torch

from python_model.model.losses import sample_weights

COUNTS = torch.tensor([3, 0, 6, 1, 2, 4])  # loss-carrying tokens per sample


def _losses() -> list[torch.Tensor]:
    """Token losses, sample by sample."""
    torch.manual_seed(0)
    return [torch.rand(count, dtype=torch.float64) for count in COUNTS.tolist()]


def _loss(kind: str, group: int = 0) -> torch.Tensor:
    sums = torch.stack([losses.sum() for losses in _losses()])
    return (sample_weights(COUNTS, kind=kind, group=group) * sums).sum()


def test_mixed_is_the_mean_over_loss_tokens() -> None:
    torch.testing.assert_close(_loss("mixed"), torch.cat(_losses()).mean())


@pytest.mark.parametrize("group", [2, 3])
def test_mixed_in_groups_is_the_mean_of_their_token_means(group: int) -> None:
    losses = _losses()
    means = [torch.cat(losses[i : i + group]).mean() for i in range(0, len(losses), group)]
    torch.testing.assert_close(_loss("mixed", group), torch.stack(means).mean())


def test_token_is_the_sum_over_samples() -> None:
    torch.testing.assert_close(_loss("token"), torch.cat(_losses()).sum() / 6)


def test_sample_is_the_mean_of_sample_means() -> None:
    """A sample without a loss-carrying token counts as 0."""
    means = [losses.mean() for losses in _losses() if len(losses)]
    torch.testing.assert_close(_loss("sample"), torch.stack(means).sum() / 6)


@pytest.mark.parametrize("kind", ["mixed", "token", "sample"])
def test_weights_of_a_batch_without_labels_are_finite(kind: str) -> None:
    assert bool(sample_weights(torch.zeros(2, dtype=torch.int64), kind=kind).isfinite().all())


def test_an_unknown_kind_and_a_group_that_leaves_samples_over_are_refused() -> None:
    with pytest.raises(ValueError, match="kind: expected .* got 'tokens'"):
        sample_weights(COUNTS, kind="tokens")
    with pytest.raises(ValueError, match=r"group: expected a divisor of the number of samples \(6\), got 4"):
        sample_weights(COUNTS, group=4)
