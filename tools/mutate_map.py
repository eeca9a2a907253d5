"""Which tests run a line: every test once, under coverage with a context per test (see tools/mutate.py).

The tests run in pieces, a folder each, as they are (``cpu``) and in Triton's interpreter (``interpret``); an existing
piece is not run again. What a test does in child processes counts as its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.mutate_plugin import CONTEXT, DURATIONS
from tools.mutate_sites import Edit

MODES = ("cpu", "interpret")
PORTABLE = "portable"
"""The kernels' tests on the library that tools/mutate_cpp.py builds: their seconds only."""


def environment(tree: Path, mode: str) -> dict[str, str]:
    """For tests of the sources in ``tree``."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return inherited | own | ({"TRITON_INTERPRET": "1"} if mode == "interpret" else {})


OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "tools.mutate_plugin", "-o", "timeout=0")
"""Of pytest: one process that leaves no files of pytest's own and in which no clock on the wall fails a test."""


def pieces(tree: Path) -> list[tuple[str, str]]:
    """(mode, path of tests); the interpreter runs few tests, so they are divided only by package."""
    paths: dict[str, list[Path]] = {mode: [] for mode in MODES}
    for package in sorted((tree / "tests").iterdir()):
        inside = sorted(package.iterdir()) if package.is_dir() else []
        paths["cpu"] += inside if any(_has_tests(path) for path in inside if path.is_dir()) else [package]
        paths["interpret"] += [package] if inside else []
    return [(mode, str(path.relative_to(tree))) for mode in MODES for path in paths[mode] if _has_tests(path)]


def _has_tests(path: Path) -> bool:
    if path.is_file():
        return path.name.startswith("test_") and path.suffix == ".py"
    return any(path.rglob("test_*.py"))


def measure(tree: Path, folder: Path, name: str, mode: str, paths: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run the tests of ``paths`` and leave their seconds in ``folder/name.json``."""
    environ = environment(tree, mode) | {DURATIONS: str(folder / f"{name}.json")} | dict(variables)
    with open(folder / f"{name}.log", "w") as log:
        command = [sys.executable, "-m", "pytest", *OPTIONS, *paths]
        run = subprocess.run(command, cwd=tree, env=environ, stdout=log, stderr=subprocess.STDOUT)
    if run.returncode not in (0, 1, 5):  # all passed, some failed, there were none
        raise RuntimeError(f"coverage map: pytest {' '.join(paths)} ended with {run.returncode}, see {log.name}")


def run_piece(tree: Path, folder: Path, mode: str, path: str) -> None:
    """Run the tests of ``path`` under coverage, unless their data is in ``folder``."""
    name = f"{mode}.{path.removesuffix('.py').replace('/', '.')}"
    if (folder / f"{name}.json").exists():
        return
    for stale in folder.glob(f"{name}.coverage.*"):
        stale.unlink()
    site, settings = folder / "site", folder / f"{name}.coveragerc"
    site.mkdir(parents=True, exist_ok=True)
    # a Python process that finds this module measures its own coverage
    (site / "sitecustomize.py").write_text("import coverage\n\ncoverage.process_startup()\n")
    settings.write_text(
        f"[run]\nsource =\n    {tree / 'grit_kernels'}\n    {tree / 'python_model'}\n"
        f"data_file = {folder / name}.coverage\nparallel = true\ncore = ctrace\ncontext = ${{{CONTEXT}-}}\n"
        "disable_warnings = no-data-collected,module-not-measured,module-not-imported,couldnt-parse\n"
    )
    variables = {"PYTHONPATH": f"{tree}{os.pathsep}{site}", "COVERAGE_PROCESS_START": str(settings)}
    measure(tree, folder, name, mode, [path], variables)


@dataclass
class Map:
    """What :func:`run_piece` left: per mode, the seconds of every passing test and the tests of every line."""

    seconds: dict[str, dict[str, float]] = field(default_factory=lambda: {mode: {} for mode in (*MODES, PORTABLE)})
    lines: dict[tuple[str, str, int], set[str]] = field(default_factory=lambda: defaultdict(set))

    def covering(self, mode: str, edit: Edit) -> set[str]:
        """Passing tests that run the edit's line; what runs on import is watched by the tests of its function or file."""
        if not edit.on_import:
            found = set(self.lines.get((mode, edit.file, edit.line), ()))
            # a statement of several lines counts at its first
            line = edit.line
            while not found and edit.scope and line > edit.scope[0]:
                line -= 1
                found = set(self.lines.get((mode, edit.file, line), ()))
        else:
            first, last = edit.scope or (0, sys.maxsize)
            found = set()
            for (of, file, line), tests in self.lines.items():
                if of == mode and file == edit.file and first <= line <= last:
                    found |= tests
        return found & self.seconds[mode].keys()

    def choose(self, mode: str, edit: Edit, budget: float) -> list[str]:
        """The tests for an edit, at most ``budget`` seconds of them but always one: those that run its line, cheap ones first,
        then others of the same files, which may share a covering test's set-up. Grouped by file."""
        seconds = self.seconds[mode]
        covering = sorted(self.covering(mode, edit), key=lambda test: (seconds[test], test))
        files = {test.split("::")[0] for test in covering}
        rest = sorted(
            (t for t in seconds if t.split("::")[0] in files and t not in set(covering)), key=lambda t: (seconds[t], t)
        )
        chosen: list[str] = []
        for group, share in ((covering, budget), (rest, budget / 3)):
            spent, kept = 0.0, []
            for test in group:
                if spent + seconds[test] > share and (kept or group is rest):
                    break
                spent += seconds[test]
                kept.append(test)
            cost: dict[str, float] = defaultdict(float)
            for test in kept:
                cost[test.split("::")[0]] += seconds[test]
            chosen += sorted(kept, key=lambda test: (cost[test.split("::")[0]], test.split("::")[0]))
        return chosen


def read_map(tree: Path, folder: Path) -> Map:
    """Join the pieces in ``folder``, made from the sources in ``tree``."""
    import coverage

    result = Map()
    for mode in MODES:
        for file in sorted(folder.glob(f"{mode}.*.json")):
            result.seconds[mode] |= json.loads(file.read_text())["passed"]
        for file in sorted(folder.glob(f"{mode}.*.coverage.*")):
            data = coverage.CoverageData(str(file))
            data.read()
            for measured in data.measured_files():
                name = str(Path(measured).relative_to(tree))
                for line, contexts in data.contexts_by_lineno(measured).items():
                    result.lines[mode, name, line] |= {context for context in contexts if context}
    if (portable := folder / f"{PORTABLE}.json").exists():
        result.seconds[PORTABLE] = json.loads(portable.read_text())["passed"]
    return result
