"""How many small changes to the code do the tests notice?

    python -m tools.mutate                              (make mutate)
    python -m tools.mutate --only grit_kernels/hf       the part of the draw in one folder
    python -m tools.mutate --survivors                  retry those that no test noticed
    python -m tools.mutate --map "cpu tests/bench"      one piece of the coverage map

A fixed seed draws mutants (one small edit each, see tools/mutate_sites.py) from the Python packages, each folder in
proportion to what can be changed in it, and from csrc/cpu. Each is made in a copy of the tree, and the tests that run its line
(see tools/mutate_map.py) run until one fails; ending by a signal or at the time limit counts as noticed, too. csrc/cpu is
rebuilt for the portable instruction set without optimisation, so its draw is the same on every CPU and leaves out code that only
other sets compile.

The order of the draw is random, so if a run is stopped early, its first n mutants are a sample as well. Everything is kept in
build/mutate, and a run resumes where the last one stopped. The coverage map there is made once, piece by piece, from the
sources at that time; delete build/mutate/map for a new one. A mutant that no test can notice, because it computes the same, is
listed with the reason in tools/mutate_equivalent.jsonl and counted separately.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from python_model.support.resume import JsonLines
from tools import mutate_cpp
from tools.mutate_fork import LARGE, Forks, Run
from tools.mutate_map import MODES, OPTIONS, PORTABLE, Map, environment, pieces, read_map, run_piece
from tools.mutate_plugin import SELECTED
from tools.mutate_sites import Edit, python_edits

ROOT = Path(__file__).parent.parent
PACKAGES = ("grit_kernels", "python_model")
CPP = str(mutate_cpp.FOLDER)
EQUIVALENT = Path(__file__).parent / "mutate_equivalent.jsonl"


@dataclass(frozen=True)
class Mutant:
    """An edit with the folder it is counted under and a name that is stable while its file is unchanged."""

    key: str
    folder: str
    edit: Edit


def folder_of(file: str) -> str:
    """The package, or the folder in it."""
    return "/".join(Path(file).parts[:-1][:2])


def keyed(edit: Edit, source: str) -> Mutant:
    """Name an edit by the file's content."""
    text = "\0".join((edit.file, source, str(edit.start), edit.before, edit.after))
    return Mutant(hashlib.sha256(text.encode()).hexdigest()[:16], folder_of(edit.file), edit)


def shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """``count`` divided in proportion to ``sizes``: at least 1 each, rounded by largest remainder."""
    total = sum(sizes.values())
    exact = {name: count * size / total for name, size in sizes.items()}
    whole = {name: min(sizes[name], max(1, math.floor(value))) for name, value in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: (math.floor(exact[name]) - exact[name], name))
    while (left := count - sum(whole.values())) > 0 and any(whole[name] < sizes[name] for name in sizes):
        for name in [name for name in by_remainder if whole[name] < sizes[name]][:left]:
            whole[name] += 1
    while sum(whole.values()) > max(count, 0):
        whole[max(whole, key=lambda name: (whole[name], sizes[name]))] -= 1
    return whole


def draw(python: dict[str, list[Mutant]], cpp: list[Mutant], count: int, cpp_count: int, seed: int) -> list[Mutant]:
    """The draw: ``cpp_count`` of ``cpp`` and the rest of ``count`` from the folders of ``python``, in random order."""
    chosen = random.Random(f"{seed} {CPP}").sample(cpp, min(cpp_count, len(cpp)))
    wanted = shares({folder: len(mutants) for folder, mutants in python.items()}, count - len(chosen))
    for folder, mutants in sorted(python.items()):
        chosen += random.Random(f"{seed} {folder}").sample(mutants, wanted[folder])
    random.Random(seed).shuffle(chosen)
    return chosen


def python_mutants(root: Path) -> dict[str, list[Mutant]]:
    """All mutants of the Python packages, by folder."""
    found: dict[str, list[Mutant]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            file, source = str(path.relative_to(root)), path.read_text(encoding="utf-8")
            for edit in python_edits(file, source):
                found[folder_of(file)].append(keyed(edit, source))
    return dict(found)


def copy_tree(root: Path, target: Path) -> None:
    """Copy the files that git knows and the compiled library, with their times; compile to bytecode once."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True
    )
    names = [name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()]
    for name in [*names, *(str(path.relative_to(root)) for path in root.glob("grit_kernels/_C*.so"))]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    compiled = [package for package in (*PACKAGES, "tests") if (target / package).is_dir()]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *compiled], cwd=target, check=True)


@dataclass
class Verdict:
    """``noticed``, ``survived``, or ``no test`` (nothing runs the line)."""

    outcome: str
    by: str = ""
    """The first test that failed, or how it ended."""
    tests: int = 0


def wait(child: subprocess.Popen[bytes] | Run, limit: float) -> int | None:
    """The status with which ``child``, first of its process session, ends; None once the session has used ``limit`` seconds of
    CPU time, or has slept so long with no thread that could run. Neither grows while a busy machine has no time for the
    session, or while something has stopped it: a test that ends on a quiet machine does so on any."""
    slept = 0
    while True:
        try:
            return child.wait(1)
        except subprocess.TimeoutExpired:
            used, asleep = activity(child.pid)
        slept += asleep
        if used >= limit or slept >= limit:
            return None


def activity(session: int) -> tuple[float, bool]:
    """CPU seconds of a session's processes with the children they have waited for, and whether all their threads sleep."""
    used, asleep = 0, True
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = _stat(path)
            if int(fields[3]) != session:
                continue
            used += sum(map(int, fields[11:15]))
            asleep &= all(_stat(thread)[0] in "SZX" for thread in (path / "task").iterdir())
        except OSError:  # it has ended
            continue
    return used / os.sysconf("SC_CLK_TCK"), asleep


def _stat(path: Path) -> list[str]:
    """The fields of a ``stat`` file that follow the name, which may hold blanks and brackets: state, parent, group, session..."""
    return (path / "stat").read_text().rpartition(")")[2].split()


def run_tests(
    tree: Path, forks: Forks, mode: str, tests: Sequence[str], limit: float, variables: dict[str, str] | None = None
) -> Verdict:
    """Run ``tests`` in ``tree`` until one fails, or until :func:`wait` finds ``limit`` passed."""
    scratch = tree / "build" / "mutant"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / "tests.json").write_text(json.dumps(list(tests)))
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    arguments = [*OPTIONS, "-x", "--tb=no", "-rfE", f"--basetemp={scratch / 'tmp'}", *files]
    environ = environment(tree, mode) | {SELECTED: str(scratch / "tests.json")} | (variables or {})
    child = forks.start(arguments, tree, environ, scratch / "log")
    # if this process is killed, or is late to look, the child ends by SIGXCPU
    seconds = math.ceil(limit) + 1
    resource.prlimit(child.pid, resource.RLIMIT_CPU, (seconds, seconds + 30))
    status = wait(child, limit)
    try:
        os.killpg(child.pid, signal.SIGKILL)  # servers and ranks that a failed test left behind
    except ProcessLookupError:
        pass
    child.wait()
    said = (scratch / "log").read_text(errors="replace")
    if status == 0:
        return Verdict("survived", tests=len(tests))
    if status == 5:
        return Verdict("no test", "pytest found none of the chosen tests")
    first = next((line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))), "")
    ended = "time limit" if status in (None, -signal.SIGXCPU) else f"exit status {status}"
    return Verdict("noticed", first.split(" - ")[0].split(" ", 1)[-1] or ended, len(tests))


class Trial:
    """One worker: a copy of the tree in which mutants are made and undone."""

    def __init__(self, root: Path, folder: Path, tests: Map, budget: float, packages: Sequence[str]) -> None:
        self.root, self.tree, self.tests, self.budget = root, folder, tests, budget
        self.forks = {mode: Forks(environment(folder, mode), packages) for mode in MODES}
        copy_tree(root, folder)

    def close(self) -> None:
        """End the processes that run tests."""
        for forks in self.forks.values():
            forks.close()

    def __call__(self, mutant: Mutant) -> Verdict:
        """Make the mutant, test it, undo it."""
        edit = mutant.edit
        path = self.tree / edit.file
        original = (self.root / edit.file).read_text(encoding="utf-8")
        path.write_text(edit.apply(original), encoding="utf-8")
        try:
            return self._cpp(edit) if edit.file.startswith(CPP) else self._python(edit)
        finally:
            shutil.copy2(self.root / edit.file, path)
            if edit.file.startswith(CPP):
                path.touch()  # newer than the object made from the mutant, which the next build must replace

    def _python(self, edit: Edit) -> Verdict:
        ran = 0
        for mode in MODES:
            tests = self.tests.choose(mode, edit, self.budget)
            if not tests:
                continue
            verdict = run_tests(self.tree, self.forks[mode], mode, tests, self._limit(mode, tests))
            ran += verdict.tests
            if verdict.outcome == "noticed":
                return verdict
        return Verdict("survived" if ran else "no test", tests=ran)

    def _cpp(self, edit: Edit) -> Verdict:
        tests = mutate_cpp.choose(self.tests, edit.file, self.budget)
        if not tests:
            return Verdict("no test")
        library = mutate_cpp.build(self.tree)
        if library is None:
            return Verdict("noticed", "does not compile")
        limit = self._limit(PORTABLE, tests)
        variables = {"GRIT_KERNELS_LIBRARY": str(library)}
        return run_tests(self.tree, self.forks["cpu"], "cpu", tests, limit, variables)

    def _limit(self, mode: str, tests: Iterable[str]) -> float:
        return 60 + 10 * sum(self.tests.seconds[mode][test] for test in tests)


def wilson(noticed: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share."""
    if not count:
        return 0.0, 1.0
    share = noticed / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def report(rows: Iterable[dict[str, object]], equivalent: set[str]) -> str:
    """Scores with their intervals, per folder and overall, and the mutants that no test noticed."""
    rows = list(rows)
    counted = [row for row in rows if row["key"] not in equivalent]
    lines = []

    def line(name: str, of: list[dict[str, object]]) -> None:
        noticed = sum(row["outcome"] == "noticed" for row in of)
        low, high = wilson(noticed, len(of))
        share = f"{noticed / len(of):7.1%}" if of else "      -"
        lines.append(f"{name:34} {noticed:4} of {len(of):4} {share}   95 % interval {low:.1%} to {high:.1%}")

    for folder in sorted({str(row["folder"]) for row in counted}):
        line(folder, [row for row in counted if row["folder"] == folder])
    line("Python", [row for row in counted if row["folder"] != CPP])
    line("all", counted)
    lines.append(f"equivalent, not counted: {len(rows) - len(counted)}")
    unnoticed = sorted(
        (row for row in counted if row["outcome"] != "noticed"), key=lambda row: (str(row["file"]), row["line"])
    )
    for row in unnoticed:
        before, after = (" ".join(str(row[name]).split()) for name in ("before", "after"))
        lines.append(
            f"{row['outcome']}: {row['file']}:{row['line']} {row['operator']}: {before}  ->  {after}   [{row['key']}]"
        )
    return "\n".join(lines)


def known_equivalent(path: Path = EQUIVALENT) -> set[str]:
    """Keys of the mutants that compute the same as the code."""
    return {json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines() if line}


def try_all(
    mutants: list[Mutant], trials: Sequence[Callable[[Mutant], Verdict]], log: JsonLines, partial: bool = False
) -> None:
    """Try every mutant once, with a thread per trial; each one's row is on disk as soon as it is decided."""
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        waiting.put(mutant)
    writing, errors = threading.Lock(), list[BaseException]()
    done = Counter[str]()

    def work(trial: Callable[[Mutant], Verdict]) -> None:
        while not errors:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            started = time.monotonic()
            try:
                verdict = trial(mutant)
            except BaseException as error:
                errors.append(error)
                return
            edit = {name: value for name, value in asdict(mutant.edit).items() if name not in ("scope", "on_import")}
            with writing:
                log.append(
                    {
                        "key": mutant.key,
                        "folder": mutant.folder,
                        **edit,
                        **asdict(verdict),
                        "seconds": round(time.monotonic() - started),
                        "partial": partial,
                    }
                )
                done[verdict.outcome] += 1
                print(
                    f"{done.total()}/{len(mutants)} {verdict.outcome}: {mutant.edit.file}:{mutant.edit.line} {verdict.by}",
                    flush=True,
                )

    threads = [threading.Thread(target=work, args=(trial,), daemon=True) for trial in trials]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutate", description="How many small changes of the code do the tests notice?"
    )
    parser.add_argument("--count", type=int, default=400, help="mutants of the draw")
    parser.add_argument("--cpp", type=int, default=50, help="how many of them in csrc/cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="FOLDER", default="", help="only the part of the draw in this folder")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument(
        "--seconds", type=float, default=60, help="limit for the tests of a mutant, by their time for the map"
    )
    parser.add_argument("--survivors", action="store_true", help="retry the mutants that no test noticed")
    parser.add_argument(
        "--map", metavar="TEXT", help="only run the pieces 'MODE PATH' of the map that contain this text"
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="use only the existing pieces of the map; a later run retries what was not noticed",
    )
    parser.add_argument("--report", action="store_true", help="only print the results so far")
    options = parser.parse_args(arguments)
    work = root / "build" / "mutate"
    if options.map is not None:
        make_map(root, work, options.map)
        return

    sources = python_mutants(root)
    found = mutate_cpp.edits(root) if options.cpp else []
    cpp = [keyed(edit, (root / edit.file).read_text(encoding="utf-8")) for edit in found]
    mutants = draw(sources, cpp, options.count, options.cpp, options.seed)
    mutants = [mutant for mutant in mutants if mutant.edit.file.startswith(options.only)]
    log = JsonLines(work / "log.jsonl")
    if not options.report:
        if not options.partial:
            make_map(root, work, "")
        tests = read_map(work / "tree", work / "map")
        rows = {str(row["key"]): row for row in log.rows}
        again = {key for key, row in rows.items() if options.survivors or (row["partial"] and not options.partial)}
        tried = {key for key, row in rows.items() if row["outcome"] == "noticed" or key not in again}
        missing = [mutant for mutant in mutants if mutant.key not in tried]
        workers = range(min(options.jobs, len(missing)))
        trials = [Trial(root, work / f"tree{worker}", tests, options.seconds, LARGE) for worker in workers]
        try:
            try_all(missing, trials, log, partial=options.partial)
        finally:
            for trial in trials:
                trial.close()
    log.close()
    rows = {str(row["key"]): row for row in log.rows}  # the last row of a key counts
    print(report((rows[mutant.key] for mutant in mutants if mutant.key in rows), known_equivalent()))


def make_map(root: Path, work: Path, text: str) -> None:
    """Run the pieces of the coverage map that are missing and whose path contains ``text``."""
    tree = work / "tree"
    if not tree.exists():
        copy_tree(root, tree)
    for mode, path in pieces(tree):
        if text in f"{mode} {path}":
            run_piece(tree, work / "map", mode, path)
    if text in PORTABLE and (root / mutate_cpp.FOLDER).exists():
        mutate_cpp.run_baseline(tree, work / "map")


if __name__ == "__main__":
    main()
