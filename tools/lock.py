"""Writes python_model/support/constraints.txt: the tested versions, for Python 3.10 to 3.14.

    python -m tools.lock            (make lock)

uv resolves every extra of pyproject.toml and the build tools for all Pythons and platforms at once, with the installed torch.
torch itself and what only it depends on (Triton, CUDA's libraries) are left out: the user chooses them by choosing a torch, and a
constraint could only override that choice. The header names the tested ones, for `grit doctor`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from python_model.support.files import write_text
from python_model.support.tested import CONSTRAINTS

ROOT = Path(__file__).parent.parent
PYTHON = "3.10"
"""The lowest one; the resolution holds for all later ones."""
TESTED = ("3.10", "3.11", "3.13")
"""The versions of Python on which the last resolution was installed and tested."""
NEWER_TORCH = ("2.15.0",)
"""Those beyond the installed one with which the test suite passed."""
BUILD = ("setuptools>=77", "wheel", "ninja", "cmake>=3.22")
CHOSEN_BY_TORCH = re.compile(r"(torch|triton|pytorch-triton|nvidia-[\w-]+|cuda-[\w-]+)==")

HEADER = """\
# The versions that are tested, resolved for Python 3.10 to 3.14. Written by `make lock`; `make install` uses it, and
# `pip install --constraint` takes it. torch, Triton and CUDA's libraries are left to the choice of a torch.
# tested: Python {python}, torch {torch}, triton {triton}
# (the whole test suite, from `make install` on; other versions of Python are resolved and untested)
"""


def resolve() -> list[str]:
    """The resolved requirements, one per line."""
    with tempfile.TemporaryDirectory() as folder:
        tools, torch, result = (Path(folder, name) for name in ("tools.in", "torch.txt", "result.txt"))
        tools.write_text("\n".join(BUILD))
        torch.write_text(f"torch=={version('torch').split('+')[0]}")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHON]
        command += [
            "--all-extras",
            "--no-header",
            "--no-annotate",
            "--constraint",
            str(torch),
            "--output-file",
            str(result),
        ]
        subprocess.run([*command, "pyproject.toml", str(tools)], cwd=ROOT, check=True)
        lines = result.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#") and not CHOSEN_BY_TORCH.match(line)]


def main() -> None:
    header = HEADER.format(
        python=" ".join(TESTED),
        torch=" ".join((version("torch").split("+")[0], *NEWER_TORCH)),
        triton=version("triton"),
    )
    write_text(CONSTRAINTS, header + "\n".join(resolve()) + "\n")
    print(f"wrote {CONSTRAINTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
