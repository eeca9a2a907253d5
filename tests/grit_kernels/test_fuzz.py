"""A few of the random calls of fuzz.py on every set of CPU kernels (make fuzz runs thousands)."""

from __future__ import annotations

import pytest

from grit_kernels import _library
from tests.grit_kernels.fuzz import KERNELS, run_call

ISAS = _library.cpu_isas() if _library.status().loaded else []


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
def test_random_calls_equal_their_definitions(kernel: str, isa: str) -> None:
    with _library.cpu_isa(isa):
        wrong = [run_call(kernel, number, gradients=number % 4 != 3) for number in range(24)]
    assert not any(wrong), "\n".join(filter(None, wrong))
