"""Autocast is seen on every kind of device that has it."""

from __future__ import annotations

import pytest
import torch

from grit_kernels.precision import autocast_dtype


@pytest.mark.parametrize("name", ["cpu", "cuda", "xpu", "mps", "mtia", "hpu", "ipu", "maia", "xla", "privateuseone"])
def test_the_dtype_that_autocast_asks_for_is_known_on_every_device(name: str) -> None:
    if name == "privateuseone":
        name = torch._C._get_privateuse1_backend_name()
    device = torch.device(name)
    assert autocast_dtype(device) is None
    torch.set_autocast_enabled(name, True)
    try:
        assert autocast_dtype(device) == torch.get_autocast_dtype(name)
    finally:
        torch.set_autocast_enabled(name, False)


def test_devices_without_autocast_have_none() -> None:
    assert autocast_dtype(torch.device("meta")) is None
