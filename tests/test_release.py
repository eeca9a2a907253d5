"""What a release promises: one wheel for every Python and an old glibc, types, a command, all extras that users run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import grit_kernels
from grit_kernels import _library
from python_model import cli
from tests.conftest import needs_source_tree

ROOT = Path(__file__).parent.parent
pytestmark = needs_source_tree


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of pyproject.toml")
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_recipe_names_the_same_oldest_system(pyproject: dict[str, Any]) -> None:
    """tests/grit_kernels/test_library.py holds the compiled library to it."""
    tag = "manylinux_2_28"
    recipe = pyproject["tool"]["cibuildwheel"]
    assert recipe["manylinux-x86_64-image"] == tag and f"--plat {tag}_" in text("Makefile")
    assert re.findall(r"py3-none-(manylinux\w+)", text("CONTRIBUTING.md")) == [tag]
    assert "pypa/cibuildwheel@" in text(".github/workflows/wheels.yml")
    # both leave CUDA's library to the machine that has nvcc, and torch's to torch
    assert recipe["environment"]["GRIT_KERNELS_CUDA"] == "0" and "GRIT_KERNELS_CUDA=0 $(BIN)/python -m build" in text(
        "Makefile"
    )
    assert "--exclude libtorch_cpu.so" in recipe["repair-wheel-command"] and "--exclude libtorch_cpu.so" in text(
        "Makefile"
    )


@pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
def test_what_is_tried_on_a_wheel_passes_here(pyproject: dict[str, Any], tmp_path: Path) -> None:
    command = pyproject["tool"]["cibuildwheel"]["test-command"].format(project=ROOT).split()
    assert command[0] == "python"
    run = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stdout.startswith("Python "), run.stderr


def test_the_command_the_version_and_the_types_are_declared(pyproject: dict[str, Any]) -> None:
    module, _, name = pyproject["project"]["scripts"]["grit"].partition(":")
    assert (module, name) == (cli.__name__, cli.main.__name__)
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "grit_kernels._version.__version__"}
    newest = re.search(r"^## (\S+)", text("CHANGELOG.md"), flags=re.MULTILINE)
    assert newest and newest[1] == grit_kernels.__version__
    for package in ("grit_kernels", "python_model"):
        assert (ROOT / package / "py.typed").is_file()


def test_all_is_every_extra_that_a_command_asks_for_but_two(pyproject: dict[str, Any]) -> None:
    """A command without its package says ``pip install 'grit-kernels[EXTRA]'``."""
    extras = pyproject["project"]["optional-dependencies"]
    asked: set[str] = set()
    for path in (ROOT / "python_model").rglob("*.py"):
        asked |= set(re.findall(r'\brequire\([\w."]+, "([\w-]+)"\)', path.read_text(encoding="utf-8")))
    inside = set(extras["all"][0].partition("[")[2].rstrip("]").split(","))
    assert len(asked) > 8 and asked <= set(extras) and inside <= set(extras)
    assert asked - inside == {"ray", "8bit"}  # a cluster's, and an optimiser that needs a compiler


def test_the_citation_has_what_its_format_requires() -> None:
    """GitHub shows none without (citation-file-format 1.2.0)."""
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert {"type", "title", "authors"} <= set(citation["preferred-citation"])
