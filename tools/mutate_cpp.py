"""The part of tools/mutate.py for csrc/cpu: what can be changed, how it is rebuilt, which tests run.

One instruction set is built, the portable one, without optimisation: its lines are the same on every CPU. Coverage does not see
the lines of a compiled library, so a source's tests are those in the folder that its name indicates.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tools.mutate_map import PORTABLE, Map, measure
from tools.mutate_sites import Edit, cpp_edits, live_lines

FOLDER = Path("csrc/cpu")
TESTS = {
    "attention": ("attention",),
    "contrastive": ("contrastive", "linear_cross_entropy"),
    "fused": ("fused",),
    "pooling": ("pooling",),
}
KERNELS = "tests/grit_kernels"


def edits(root: Path) -> list[Edit]:
    """Every edit of the lines that the portable build compiles."""
    include = Path(torch.__file__).parent / "include"
    live: dict[str, set[int]] = {}
    for source in sorted((root / FOLDER).glob("*.cpp")):
        flags = [
            "-std=gnu++20",
            "-DGRIT_ISA=portable",
            "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
            f"-isystem{include}",
        ]
        run = subprocess.run(["c++", "-E", *flags, str(source)], capture_output=True, text=True, check=True)
        for file, lines in live_lines(run.stdout, root).items():
            live.setdefault(file, set()).update(lines)
    return [
        edit
        for file in sorted(live)
        if Path(file).is_relative_to(FOLDER)
        for edit in cpp_edits(file, (root / file).read_text(encoding="utf-8"), live[file])
    ]


def build(tree: Path) -> Path | None:
    """Bring the portable library of ``tree`` up to date; None where it does not compile."""
    folder = tree / "build" / PORTABLE
    if not (folder / "build.ninja").exists():
        tools = Path(sys.executable).parent
        cmake, ninja = (shutil.which(name, path=str(tools)) or name for name in ("cmake", "ninja"))
        options = [f"-DTORCH_INCLUDE={Path(torch.__file__).parent / 'include'}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        command = [
            cmake,
            "-S",
            str(tree),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            "-DGRIT_PORTABLE_ONLY=ON",
            "-DCMAKE_BUILD_TYPE=Debug",
        ]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    command = [shutil.which("ninja", path=str(Path(sys.executable).parent)) or "ninja", "-C", str(folder), "-j1"]
    built = subprocess.run(command, stdout=subprocess.DEVNULL)
    return folder / "_C.so" if built.returncode == 0 else None


def run_baseline(tree: Path, folder: Path) -> None:
    """Time the kernels' tests on the unchanged portable library, once."""
    if (folder / f"{PORTABLE}.json").exists():
        return
    library = build(tree)
    if library is None:
        raise RuntimeError("csrc/cpu: the unchanged sources do not compile")
    folders = sorted({f"{KERNELS}/{name}" for names in TESTS.values() for name in names})
    measure(tree, folder, PORTABLE, PORTABLE, folders, {"GRIT_KERNELS_LIBRARY": str(library)})


def choose(tests: Map, file: str, budget: float) -> list[str]:
    """The tests of a source, cheap ones first, at most ``budget`` seconds of them."""
    own = next((names for start, names in TESTS.items() if Path(file).name.startswith(start)), None)
    folders = own or [name for names in TESTS.values() for name in names]
    seconds = tests.seconds[PORTABLE]
    inside = sorted((t for t in seconds if t.split("/")[2] in folders), key=lambda test: (seconds[test], test))
    chosen, spent = [], 0.0
    for test in inside:
        spent += seconds[test]
        if spent > budget:
            break
        chosen.append(test)
    return sorted(chosen, key=lambda test: test.split("::")[0])
