"""Installs a wheel into empty environments, without a compiler on the path, and uses it there.

    python -m tools.try_wheel dist/grit_kernels-*.whl --python python3.10 python3.13 --torch torch==2.11.0 torch

A line for each pair of Python and torch says what was installed and whether kernels, a patched model and the command worked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

USE = """
from importlib.resources import files
import platform, torch, transformers, grit_kernels as gk
from grit_kernels import _library
assert _library.status().loaded, _library.status().reason
q, k, v = (torch.randn(2, 9, 2, 32, dtype=torch.bfloat16) for _ in range(3))
flags = torch.tensor([True, False])
out = gk.switch_attention(q, k, v, flags)
with gk.backend("reference"):
    truth = gk.switch_attention(q.double(), k.double(), v.double(), flags)
assert (out - truth).abs().max() < 0.05
try:
    gk.switch_attention(q, k, v[:1], flags)
except ValueError as error:
    assert "expected" in str(error)
else:
    raise AssertionError("a wrong shape was taken")
shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
model = gk.patch(transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=99, **shape)))
ids = torch.randint(0, 99, (2, 7))
model(ids, is_causal=flags).logits.sum().backward()
own = ("py.typed", "data/sample/corpus.jsonl", "serve/page/index.html", "support/constraints.txt")
for package, names in (("grit_kernels", ("py.typed",)), ("python_model", own)):
    for name in names:
        assert (files(package) / name).is_file(), f"{package}/{name}"
print("Python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)
"""


def attempt(wheel: Path, python: str, torch: str) -> str:
    """Install and use ``wheel``; returns what it printed, or the last line before it failed."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        scripts = Path(folder, "bin")
        # all that pip needs; a build would fail for lack of a compiler
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CC", "VIRTUAL_ENV")}
        environment |= {"PATH": str(scripts), "HOME": folder}
        steps = [
            [str(scripts / "python"), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", torch, str(wheel)],
            [str(scripts / "python"), "-c", USE],
            [str(scripts / "grit"), "doctor", "--json"],
        ]
        printed = []
        for step in steps:
            run = subprocess.run(step, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if run.returncode:
                return f"FAILED: {Path(step[0]).name}: {(run.stderr or run.stdout).strip().splitlines()[-1]}"
            printed.append(run.stdout.strip())
        return printed[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.try_wheel", description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="?")
    parser.add_argument("--use", action="store_true", help="no wheel: use the package installed here")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--torch", nargs="+", default=["torch==2.13.0"], help="requirements")
    arguments = parser.parse_args()
    if arguments.use:
        exec(compile(USE, "use", "exec"), {})
        return
    if arguments.wheel is None:
        parser.error("wheel: expected a file, or --use, got neither")
    failed = False
    for python in arguments.python:
        for torch in arguments.torch:
            result = attempt(arguments.wheel.resolve(), python, torch)
            failed |= result.startswith("FAILED")
            print(f"{python} {torch}: {result}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
