"""What the tests of a GPU launch, found without one: a plugin of pytest.

    python -O -m pytest --assert=plain -p bench.gpu_tests --gpu 90,132 --launches FILE -m gpu tests/grit_kernels

The tests run with tensors of the CPU in place of the GPU's. Triton notes the variants of kernels that it would compile
(bench/launches.py) and nothing is launched, so results are whatever was in memory; -O leaves out the assertions about them. FILE
gets the variants, and the tests that did not run to their end.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import launches

MOST_DRAWN = 1 << 28
"""Numbers that are worth drawing: a tensor with more is there for its offsets."""


class _WithoutGpu(TorchFunctionMode):
    """Tensors that were to be on a GPU are on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.normal_ and args[0].numel() > MOST_DRAWN:
            return args[0]
        args = [_on_cpu(x) for x in args]
        return function(*args, **{name: _on_cpu(x) for name, x in (kwargs or {}).items()})


def _on_cpu(x: Any) -> Any:
    return "cpu" if isinstance(x, str | torch.device) and str(x).partition(":")[0] == "cuda" else x


def _once(op: Any, args: Any, kwargs: Any = None, **_: Any) -> None:
    op(*args, **(kwargs or {}))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", help="compute capability and number of multiprocessors")
    parser.addoption("--launches", help="file of the variants")


def pytest_sessionstart(session: pytest.Session) -> None:
    from tests import conftest

    conftest.available_backends = lambda: [conftest.Backend("cuda")]


class Recorder:
    """Collects launches while tests run."""

    def __init__(self) -> None:
        self.found: set[launches.Launch] = set()
        self.ended_early: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        capability, processors = map(int, item.config.getoption("--gpu").split(","))
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(launches.recorded((capability, processors), device="cpu"))
            stack.enter_context(mock.patch.object(torch.testing, "assert_close", lambda *_, **__: None))
            # both trace, which notes no launch; what they would launch is the same
            stack.enter_context(mock.patch.object(torch, "compile", lambda function, **_: function))
            stack.enter_context(mock.patch.object(torch.library, "opcheck", _once))
            stack.enter_context(_WithoutGpu())
            try:
                yield
            finally:
                self.found |= found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.ended_early[report.nodeid] = str(getattr(report.longrepr, "reprcrash", report.longrepr))[-200:]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        content = {"launches": sorted(self.found), "ended_early": self.ended_early}
        Path(session.config.getoption("--launches")).write_text(json.dumps(content), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder())
