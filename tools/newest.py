"""Installs the newest of everything but torch in a folder of its own; reports differences from the lock, runs tests and a demo.

python -m tools.newest [--torch torch==2.13.0] [--jobs 2]            (make test-newest)
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import venv

from tools.lock import BUILD, CHOSEN_BY_TORCH, ROOT

FOLDER = ROOT / ".newest"
PYTHON = FOLDER / "bin" / "python"
VERSIONS = "import json; from python_model.support.tested import differences; print(json.dumps(differences()))"


def pip(*arguments: str) -> str:
    """What a pip command of the folder's environment prints."""
    run = subprocess.run([PYTHON, "-m", "pip", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return run.stdout


def install(torch: str) -> None:
    """Install torch as given, then the newest of the rest, which must not replace torch or its dependencies."""
    if not PYTHON.exists():
        venv.create(FOLDER, with_pip=True)
    pip("install", "--quiet", "--upgrade", "pip")
    pip("install", "--quiet", torch)
    pins = [line for line in pip("freeze").splitlines() if CHOSEN_BY_TORCH.match(line)]
    # a wheel from a file or another index is frozen as "torch @ file:.."; its version must stay
    pins += [f"torch=={re.search(r'^Version: (.*)$', pip('show', 'torch'), re.MULTILINE)[1]}"]  # type: ignore[index]
    constraints = FOLDER / "torch.txt"
    constraints.write_text("\n".join(pins) + "\n")
    newest = ("install", "--quiet", "--constraint", str(constraints), "--upgrade", "--upgrade-strategy", "eager")
    pip(*newest, *BUILD)
    pip(*newest, "--no-build-isolation", "--editable", ".[dev]")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.newest", description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement of the torch to keep")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests")
    arguments = parser.parse_args()
    install(arguments.torch)
    shown = subprocess.run([PYTHON, "-c", VERSIONS], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    different: dict[str, list[str]] = json.loads(shown)
    print(f"{len(different)} packages differ from the lock" + (":" if different else ""), flush=True)
    for name, (installed, tested) in different.items():
        print(f"  {name:<28} {tested:<18} -> {installed}", flush=True)
    tests = subprocess.run([PYTHON, "-m", "pytest", "-n", str(arguments.jobs)], cwd=ROOT, check=False).returncode
    grit = str(FOLDER / "bin" / "grit")
    demo = subprocess.run(
        [grit, "demo", "--steps", "2", "--output-dir", str(FOLDER / "demo")], cwd=ROOT, check=False
    ).returncode
    print(f"with the newest versions: tests {_verdict(tests)}, demo {_verdict(demo)}")
    sys.exit(bool(tests or demo))


def _verdict(code: int) -> str:
    return "passed" if code == 0 else f"failed (exit status {code})"


if __name__ == "__main__":
    main()
