"""Choosing an implementation: by device, by name, and what is said when one is missing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import grit_kernels as gk
from grit_kernels import _library

# the package exports the context manager under the module's name
backend_module = importlib.import_module("grit_kernels.backend")


def attend() -> torch.Tensor:
    q = torch.ones(1, 2, 1, 32)
    return gk.switch_attention(q, q, q, True)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(gk.__file__).parents[1])
    paths = os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH", "")) if x)
    env = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_an_unknown_backend_is_refused_with_the_accepted_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'reference', 'cpu', 'triton', got 'cuda'"):
        with gk.backend("cuda"):
            pass
    monkeypatch.setenv("GRIT_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend: expected .*got 'fast'"):
        attend()


def test_backends_nest_and_are_restored_after_an_error() -> None:
    assert backend_module.forced_backend() is None
    with pytest.raises(KeyError), gk.backend("reference"):
        with gk.backend("cpu"):
            assert backend_module.forced_backend() == "cpu"
        assert backend_module.forced_backend() == "reference"
        raise KeyError("inside")
    assert backend_module.forced_backend() is None


def test_the_context_manager_overrules_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_BACKEND", "triton")
    with gk.backend("reference"):
        attend()


def test_triton_is_refused_for_cpu_tensors_outside_the_interpreter() -> None:
    with (
        gk.backend("triton"),
        pytest.raises(ValueError, match="'triton' was requested, but the tensors are on the CPU"),
    ):
        attend()


def test_cpu_is_refused_with_the_reason_when_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "status", lambda: _library.LibraryStatus(False, "it is missing; build it"))
    with gk.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was requested, but it is missing; build it"):
        attend()


def test_cpu_is_refused_for_tensors_elsewhere() -> None:
    q = torch.ones(1, 2, 1, 32, device="meta")
    with gk.backend("cpu"), pytest.raises(ValueError, match="'cpu' was requested, but the tensors are on meta"):
        gk.switch_attention(q, q, q, True)


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setattr(_library, "_cuda", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_library, "_cpu", None)
    missing = _library.status()
    assert not missing.loaded and "pip install ." in missing.reason
    monkeypatch.setattr(_library, "_cpu", None)
    (tmp_path / "_C.so").write_bytes(b"no library")
    broken = _library.status()
    assert not broken.loaded and "does not load" in broken.reason and torch.__version__ in broken.reason


def test_a_slower_implementation_is_announced_once() -> None:
    announced = backend_module._announced(lambda x: x + 1, "a test message that nothing else uses")
    with pytest.warns(RuntimeWarning, match="a test message"):
        assert announced(1) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert announced(2) == 3


def test_importing_the_package_imports_neither_triton_nor_transformers() -> None:
    result = run_python("import sys, grit_kernels; print([m for m in ('triton', 'transformers') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_environment_variable_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_BACKEND", "reference")
    q = torch.ones(1, 2, 1, 32, dtype=torch.float64)  # only the reference takes float64
    assert float(gk.switch_attention(q, q, q, True).sum()) == 64
    monkeypatch.setenv("GRIT_KERNELS_BACKEND", "")
    with pytest.raises(TypeError):
        gk.switch_attention(q, q, q, True)


def test_every_public_name_is_there_and_documented() -> None:
    for name in gk.__all__:
        assert hasattr(gk, name)
        if name != "__version__":
            assert getattr(gk, name).__doc__, name
    assert importlib.import_module("grit_kernels._version").__version__ == gk.__version__
