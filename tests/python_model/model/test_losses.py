"""The aggregations equal the formulas of the paper's loss ablation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from python_model import GritLM
from python_model.model import losses as losses_module
from python_model.model.losses import next_token_losses, sample_weights
from python_model.model.prompts import IGNORE_INDEX

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


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_losses_are_those_of_the_heads_logits_also_where_it_must_be_called(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rows: int, softcap: float | None
) -> None:
    """A hook makes the head more than its weight: it is called with a few rows at a time."""
    monkeypatch.setattr(losses_module, "ROWS", rows)
    model = GritLM(checkpoint, device="cpu", dtype="float32", is_inference=False)
    model.model.config.final_logit_softcapping = softcap
    head = model.model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, head.in_features, generator=generator).requires_grad_()
    labels = torch.randint(head.out_features, (9,), generator=generator)
    labels[2] = labels[5] = IGNORE_INDEX
    logits = torch.nn.functional.linear(hidden, head.weight)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    wanted = torch.autograd.grad(expected.sum(), (hidden, head.weight))
    called: list[int] = []
    for hooked in (False, True):
        if hooked:
            head.register_forward_hook(lambda module, inputs, output: called.append(len(output)))
        found = next_token_losses(model, hidden, labels)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert called == ([min(rows, 7 - start) for start in range(0, 7, rows)] if hooked else [])
        for mine, theirs in zip(torch.autograd.grad(found.sum(), (hidden, head.weight)), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        nothing = next_token_losses(model, hidden, torch.full_like(labels, IGNORE_INDEX))
        assert torch.equal(nothing, torch.zeros(9))
