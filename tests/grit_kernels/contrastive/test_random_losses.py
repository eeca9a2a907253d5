"""Losses and gradients for options as hypothesis draws them, on every backend."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Backend, assert_within_rule
from tests.grit_kernels.contrastive.test_contrastive_backends import DTYPES, run_everything

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(data=st.data())
def test_losses_and_gradients_keep_the_accuracy_rule_for_all_options(backend: Backend, data: st.DataObject) -> None:
    draw = data.draw
    count, group = draw(st.sampled_from([1, 2, 7, 33, 70])), draw(st.sampled_from([1, 2, 5]))
    width, dtype = draw(st.sampled_from([8, 24, 72])), draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 99)))
    q, p = (torch.randn(n, width).to(dtype).to(backend.device) for n in (count, count * group))
    ids = tuple(torch.randint(0, 4, (n,), device=backend.device) for n in (count, count * group))
    options = {
        "targets": (torch.arange(count) * group + torch.randint(0, group, (count,))).to(backend.device),
        "in_batch_negatives": draw(st.booleans()),
        "mask_ids": draw(st.sampled_from([None, ids])),
        "normalize": draw(st.booleans()),
    }
    temperature = torch.tensor(draw(st.sampled_from([0.05, 1.0])) * (1 if options["normalize"] else width**0.5))
    temperature, grad = temperature.to(backend.device), torch.rand(count, device=backend.device) / count
    with backend():
        found = run_everything(q, p, temperature, grad, options, dtype, plain=False)
    truth = run_everything(q, p, temperature, grad, options, torch.float64, plain=True)
    eager = run_everything(q, p, temperature, grad, options, dtype, plain=True)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    # gradients are judged in units of what one score's gradient carries, grad / temperature
    step = float(grad.max() / temperature)
    units = {"losses": 1.0, "dqueries": step, "dpassages": step, "dtemperature": count * step / float(temperature)}
    for (name, unit), a, b, c in zip(units.items(), found, truth, eager, strict=True):
        assert_within_rule(a.cpu() / unit, b.cpu() / unit, c.cpu() / unit, name)
