"""Where hypothesis is not installed its tests are skipped and those beside them run."""

from __future__ import annotations

import os
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


@needs_source_tree
def test_only_its_own_tests_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["tests/grit_kernels/test_packing.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "hypothesis is not installed" in run.stdout and " passed, " in run.stdout, run.stdout
