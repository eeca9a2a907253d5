"""A few of the random calls of fuzz.py on every set of CPU kernels (make fuzz runs thousands)."""

from __future__ import annotations

from typing import Any

import pytest

import grit_kernels as gk
from grit_kernels import _library
from tests.grit_kernels.fuzz import KERNELS, run_call

ISAS = _library.cpu_isas() if _library.status().loaded else []


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
def test_random_calls_equal_their_definitions(kernel: str, isa: str) -> None:
    with _library.cpu_isa(isa):
        wrong = [run_call(kernel, number, gradients=number % 4 != 3) for number in range(24)]
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.parametrize(
    ("kernel", "number"),
    [
        ("linear_cross_entropy", 2013),  # a loss of 8e-13, the logarithm of what FP32 rounds to 1
        ("pool", 5562),  # rows of width 1 are signs after the norm, and as many of either cancel
    ],
)
def test_what_fp32_cannot_know_is_no_fault(kernel: str, number: int) -> None:
    assert run_call(kernel, number) == ""


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "attention"])
def test_an_error_of_a_thousandth_is_a_fault(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds let no wrong result or gradient through: it shows in most FP32 calls."""
    name = {"kvcache": "switch_attention_with_kvcache", "key_ranges": "switch_attention_varlen"}.get(kernel, kernel)
    right = getattr(gk, name)

    def wrong(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        return tuple(x * 1.001 for x in found) if isinstance(found, tuple) else found * 1.001

    monkeypatch.setattr(gk, name, wrong)
    messages = [message for number in range(24) if (message := run_call(kernel, number, gradients=True))]
    assert sum("torch.float32" in message for message in messages) >= 4
