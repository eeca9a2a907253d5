"""Every variant of the training benchmark times the same computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import train
from tests.python_model.conftest import checkpoint, tokenizer  # noqa: F401  (fixtures)


def test_every_variant_has_the_same_loss_and_gradients(
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "VOCABULARY", 300)
    # within the tiny model's sliding window; the padded passes and the packed pass agree beyond it too, but not exactly alike
    batch = train.make_batch(0, 3, 2, scale=0.12)
    losses, gradients = {}, {}
    for name in train.VARIANTS:
        step, model = train.make(name, str(checkpoint), batch, bf16=False)
        found: dict[str, torch.Tensor] = {}
        # a step ends in dropping its gradients
        model.zero_grad = lambda model=model, found=found: found.update(
            {k: w.grad for k, w in model.named_parameters()}
        )
        losses[name], gradients[name] = step(), found
    expected = gradients["three padded passes"]
    for name in train.VARIANTS[:3]:
        assert losses[name] == pytest.approx(losses["three padded passes"], rel=1e-5)
        for key, grad in expected.items():
            assert (gradients[name][key] - grad).norm() <= 1e-4 * grad.norm().clamp(min=1e-3), key
