"""Autocast: which dtype it asks for, and keeping it out of code whose precision is part of its definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


# the last one is the backend that a package such as torch_npu adds, under the name it has chosen
_TYPES = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "ipu", "maia", "xla", torch._C._get_privateuse1_backend_name())
_HAVE_AUTOCAST = tuple(name for name in _TYPES if torch.amp.is_autocast_available(name))
"""Asked once: torch.compile of torch 2.11 cannot ask within a graph."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast asks for on ``device``, None when it is off or does not exist there (meta tensors)."""
    if device.type in _HAVE_AUTOCAST and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` with autocast off on the device of its first argument, a tensor or a problem.

    Autocast stays active inside the Python implementation of an op, where it would turn the FP32 products of scores and
    similarities into BF16 ones.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device  # type: ignore[attr-defined]
        if autocast_dtype(device) is None:
            return function(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return run
