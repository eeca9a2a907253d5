"""What all tests share: the backends that this process can run, and the tolerance rule.

One process runs one kind of kernel on CPU tensors: started with TRITON_INTERPRET=1 it runs the Triton kernels in Triton's
interpreter and only the tests that ask for them (``backend`` fixture, marker ``interpret``); otherwise everything else.
Tests that a process cannot run are deselected, not skipped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels import _library
from grit_kernels.backend import interpreting

HAS_HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None
if HAS_HYPOTHESIS:
    from hypothesis import settings

    settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
    settings.load_profile("deterministic")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A machine with a GPU may lack hypothesis: files that draw examples are left out there, and none has other GPU tests."""
    draws = collection_path.suffix == ".py" and "from hypothesis import" in collection_path.read_text(encoding="utf-8")
    return True if draws and not HAS_HYPOTHESIS else None


def pytest_report_header() -> list[str]:
    return [] if HAS_HYPOTHESIS else ["hypothesis is not installed: the test files that import it are left out"]


ROOT = Path(__file__).parent.parent
needs_source_tree = pytest.mark.skipif(
    not (ROOT / "grit_kernels").is_dir() or not (ROOT / "python_model").is_dir(),
    reason="the tests of an installed package run without the sources beside them",
)


@dataclass(frozen=True)
class Backend:
    """One way to run a kernel: where its tensors live and how it is chosen."""

    name: str
    device: str = "cpu"
    forced: str | None = None

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        """``with backend():`` runs the calls inside on this backend."""
        return contextlib.nullcontext() if self.forced is None else gk.backend(self.forced)

    @property
    def is_op(self) -> bool:
        """False for the plain torch reference, True where calls go through the dispatcher."""
        return self.forced != "reference"


def available_backends() -> list[Backend]:
    if interpreting():
        return [Backend("interpret", forced="triton")]
    # without the compiled library the ops run their plain torch implementation: other code than the reference's autograd
    on_cpu = Backend("cpu", forced="cpu") if _library.status().loaded else Backend("fallback")
    return [Backend("reference", forced="reference"), on_cpu, Backend("cuda", device="cuda", forced="triton")]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpret: runs Triton kernels in the interpreter (TRITON_INTERPRET=1)")
    config.addinivalue_line("markers", "feature(*names): what the test shows of its family, a row of docs/families.md")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.gpu], "interpret": [pytest.mark.interpret]}
        backends = [pytest.param(b, id=b.name, marks=marks.get(b.name, [])) for b in available_backends()]
        metafunc.parametrize("backend", backends)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    other = [item for item in items if (item.get_closest_marker("interpret") is not None) != interpreting()]
    if other:
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in set(other)]


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from one seed and one thread: on tiny tensors more threads only wait for each other. A test of
    parallel code sets the threads itself."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What tests write need not outlive a power failure. Whether a file is synced before its name says so, tests see by calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For tests that change the number of torch's threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def assert_within_rule(actual: Tensor, oracle: Tensor, eager: Tensor, what: str = "result") -> None:
    """The project's accuracy rule: the error against a float64 oracle is at most twice the error of the same computation
    done eagerly in the inputs' dtype, plus one rounding of the output (an eager error may happen to be 0) and 32 FP32
    roundings of sums of order 1 (on small FP32 samples the eager error is luck; tests draw standard normal inputs)."""
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if not actual.numel():
        return
    truth = oracle.double()
    assert bool(actual.isfinite().all()), f"{what}: not finite"
    error = (actual.double() - truth).abs().max().item()
    allowed = 2 * (eager.double() - truth).abs().max().item()
    roundings = torch.finfo(eager.dtype).eps + 32 * torch.finfo(torch.float32).eps
    allowed += roundings * max(truth.abs().max().item(), 1.0)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
