"""Where hypothesis is not installed, the files that draw examples are left out and the others run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, needs_source_tree

HIDE = """
import importlib.machinery

real = importlib.machinery.PathFinder.find_spec
hidden = ("hypothesis", "_hypothesis_pytestplugin", "_hypothesis_globals")
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] in hidden else real(name, path, target)
)
"""
DRAWS = re.compile(r"^from hypothesis\b", re.MULTILINE)


@needs_source_tree
def test_only_files_that_draw_examples_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "--collect-only", "-q"]
    run = subprocess.run(
        [*command, "tests/grit_kernels"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    collected = {ROOT / line.partition(":")[0] for line in run.stdout.splitlines() if line.startswith("tests/")}
    drawing = {path for path in ROOT.glob("tests/grit_kernels/**/test_*.py") if DRAWS.search(path.read_text())}
    assert drawing and not drawing & collected
    assert ROOT / "tests/grit_kernels/pooling/test_pool.py" in collected


@needs_source_tree
def test_a_file_that_draws_examples_holds_no_other_test_of_a_gpu() -> None:
    for path in ROOT.glob("tests/**/test_*.py"):
        text = path.read_text(encoding="utf-8")
        if DRAWS.search(text) and re.search(r"mark\.gpu|backend: Backend", text):
            assert len(re.findall(r"^def test_", text, re.MULTILINE)) == text.count("\n@given("), path
