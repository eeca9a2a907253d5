"""Pooling of batches as hypothesis draws them, on every backend, against the formulas."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grit_kernels as gk
from grit_kernels.pooling import METHODS
from tests.conftest import Backend, assert_within_rule
from tests.grit_kernels.pooling.test_pool import oracle, place

FEW = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(data=st.data())
def test_every_method_equals_its_formula_for_any_padding(backend: Backend, data: st.DataObject) -> None:
    draw = data.draw
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    keep = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(batch)]
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    samples = [torch.randn(sum(row), 24).to(dtype) for row in keep]
    skips = [draw(st.integers(0, len(s))) for s in samples]
    method = draw(st.sampled_from(METHODS))
    weight = draw(st.sampled_from([None, torch.randn(24)]))
    options: dict[str, Any] = {"method": method, "norm_weight": weight, "normalize": draw(st.booleans())}
    truth = oracle(samples, skips, **options)
    eager = oracle(samples, skips, **options, dtype=dtype).float()
    lens = torch.tensor(skips, device=backend.device)
    if weight is not None:
        options["norm_weight"] = weight.to(backend.device)
    hidden, mask = (x.to(backend.device) for x in place(samples, keep, draw(st.sampled_from([float("nan"), 7.0]))))
    packed = torch.cat(samples).to(backend.device)
    cu = torch.tensor([0, *[len(s) for s in samples]]).cumsum(0).int().to(backend.device)
    with backend():
        padded = gk.pool(hidden, attention_mask=mask, instruction_lens=lens, empty="zeros", **options)
        pack = gk.pool(packed, cu_seqlens=cu, instruction_lens=lens, empty="zeros", **options)
    assert padded.dtype == pack.dtype == torch.float32
    assert_within_rule(padded.cpu(), truth, eager, f"padded {method}")
    assert_within_rule(pack.cpu(), truth, eager, f"packed {method}")
