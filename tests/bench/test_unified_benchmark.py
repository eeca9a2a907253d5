"""bench.unified: both variants compute the same losses and gradients, at a tiny shape."""

from __future__ import annotations

import copy

import pytest
import torch

import grit_kernels as gk
from bench.random_model import random_model
from bench.unified import PACKED, PADDED, make_batch, measure, packed_losses, padded_losses


def test_one_packed_pass_has_the_losses_and_gradients_of_three_padded_ones() -> None:
    torch.manual_seed(0)
    plain = random_model("tiny", device="cpu", dtype=torch.float32, vocabulary=97)
    patched = gk.patch(copy.deepcopy(plain))
    batch = make_batch(3, 2, 0.02, "cpu", 97)
    found = {}
    for name, model, losses in ((PACKED, patched, packed_losses), (PADDED, plain, padded_losses)):
        values = losses(model, batch)
        found[name] = [*values, *torch.autograd.grad(sum(values), list(model.parameters()))]
    for a, b in zip(found[PACKED], found[PADDED], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_name_the_work_and_refuse_wrong_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = random_model("tiny", device="cpu", dtype=torch.bfloat16, vocabulary=97)
    batch = make_batch(2, 1, 0.02, "cpu", 97)
    rows = measure(plain, batch, "cpu", 1)
    assert [(row["work"], row["variant"]) for row in rows] == [
        ("forward", PACKED),
        ("forward", PADDED),
        ("step", PACKED),
        ("step", PADDED),
    ]
    assert all(row["tokens"] == batch.tokens and row["tokens_per_second"] > 0 for row in rows)
    monkeypatch.setattr(
        "bench.unified.padded_losses", lambda model, batch: tuple(2 * x for x in packed_losses(model, batch))
    )
    with pytest.raises(AssertionError, match="the losses differ"):
        measure(plain, batch, "cpu", 1)
