"""tools/mutate.py on a package of three functions: one is tested, one only run, one never called."""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("coverage")

from tests.conftest import ROOT, needs_source_tree  # noqa: E402
from tools import mutate  # noqa: E402
from tools.mutate_fork import Forks  # noqa: E402
from tools.mutate_map import Map, environment, read_map  # noqa: E402
from tools.mutate_sites import cpp_edits, live_lines, python_edits  # noqa: E402

pytestmark = needs_source_tree

SOURCE = '''
"""A docstring with a + b."""
LIMIT: int = 3

def watched(a, b=1):
    return a + b

def run_only(a):
    return a * LIMIT

def never(a):
    if a > 2:
        raise ValueError(f"{a + 1} is too much")
    return a
'''
TESTS = """
import pytest
from grit_kernels.small.values import run_only, watched

@pytest.fixture(scope="module")
def made():
    return run_only(2)

def test_first(made):
    assert made is not None

def test_second(made):
    assert made

def test_watched():
    assert watched(2) == 3 and watched(2, 5) == 7
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the processes inside start quicker
    monkeypatch.setattr(mutate, "LARGE", ())
    files = {
        "grit_kernels/__init__.py": "",
        "grit_kernels/small/__init__.py": "",
        "grit_kernels/small/values.py": SOURCE,
        "python_model/__init__.py": "",
        "tests/test_values.py": TESTS,
        "tests/__init__.py": "",
        "tools/__init__.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for path in ROOT.glob("tools/mutate_*.py"):
        shutil.copy(path, tmp_path / "tools")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def changes(source: str) -> list[tuple[str, str]]:
    return [(edit.before, edit.after) for edit in python_edits("file.py", source)]


def test_what_a_result_depends_on_is_changed_and_texts_and_types_are_not() -> None:
    assert changes('def f(a: "int | None" = None) -> list[int]:\n    """a + b"""\n    print(a + 1)\n    return a') == []
    assert changes("Event = Token | list[Vector] | None") == []
    assert changes("x = isinstance(y, int | float)") == []
    assert changes("x = A | b") == [("A | b", "(A & b)")]
    assert changes("for row in tqdm(rows, desc='rows', unit='row'):\n    f(row, kind=1)") == [
        ("f(row, kind=1)", "f(row)"),
        ("f(row, kind=1)", "pass"),
        ("1", "2"),
    ]
    assert changes("x = a < b") == [("a < b", "(a <= b)")]
    assert changes("x = a and not b") == [("a and not b", "(a or not b)"), ("not b", "(b)")]
    assert changes("x = f(a, mask=m, k=w)") == [
        ("f(a, mask=m, k=w)", "f(a, k=w)"),
        ("f(a, mask=m, k=w)", "f(a, mask=m)"),
    ]
    assert changes("x = a * weight") == [("a * weight", "(a / weight)"), ("a * weight", "(a)")]
    assert changes("x = x.max()") == [("x = x.max()", "pass"), ("x.max", "x.min")]
    assert changes("if f(a):\n    raise ValueError('a' + b)") == [
        ("f(a)", "(not (f(a)))"),
        ("raise ValueError('a' + b)", "pass"),
    ]
    assert changes("ä = 'ü' if b else 2.0") == [
        ("'ü' if b else 2.0", "('ü')"),
        ("'ü' if b else 2.0", "(2.0)"),
        ("2.0", "4.0"),
    ]


@pytest.mark.slow
def test_every_edit_of_this_project_is_a_program() -> None:
    for file in ("grit_kernels/packing.py", "grit_kernels/attention/triton_forward.py", "python_model/settings.py"):
        source = (ROOT / file).read_text(encoding="utf-8")
        edits = python_edits(file, source)
        assert len(edits) > 20 and len(set(edits)) == len(edits)
        for edit in edits:
            changed = edit.apply(source)
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), edit


def test_an_edit_of_another_source_is_refused() -> None:
    edit = python_edits("file.py", "x = a < b")[0]
    with pytest.raises(ValueError, match="expected 'a < b' at file.py:1"):
        edit.apply("y  = a < b")


def test_cpp_is_changed_in_the_lines_that_are_compiled_and_outside_of_texts() -> None:
    source = 'int f(int a) {\n  if (a < 10) return g("a < b", 0.5f);  // a < 3\n  return a + b;\n}\n'
    found = [(e.line, e.before, e.after) for e in cpp_edits("f.cpp", source, {1, 2})]
    assert found == [(2, " < ", " <= "), (2, "10", "11"), (2, "0.5f", "1.0f")]
    for edit in cpp_edits("f.cpp", source, {1, 2, 3}):
        assert edit.apply(source) != source
    text = '# 1 "/r/a.cpp"\nint a;\n\n# 7 "/usr/b.h" 1\nint b;\n# 5 "/r/a.cpp" 2\nint c;\nint d;\n'
    assert live_lines(text, Path("/r")) == {"a.cpp": {1, 5, 6}}
    text = '# 1 "/r/cpu/a.cpp"\nint a;\n# 1 "/r/cpu/../b.h" 1\nint b;\n# 2 "/r/cpu/a.cpp" 2\nint c;\n'
    assert live_lines(text, Path("/r")) == {"cpu/a.cpp": {1, 2}, "b.h": {1}}


def test_a_draw_is_fixed_and_holds_every_folder_by_its_size(tree: Path) -> None:
    found = mutate.python_mutants(tree)
    assert set(found) == {"grit_kernels/small"}
    many = {"a": found["grit_kernels/small"], "b": found["grit_kernels/small"][:2]}
    chosen = mutate.draw(many, [], 6, 0, seed=1)
    assert chosen == mutate.draw(many, [], 6, 0, seed=1) != mutate.draw(many, [], 6, 0, seed=2)
    assert mutate.shares({"a": 60, "b": 39, "c": 1}, 10) == {"a": 6, "b": 3, "c": 1}
    assert mutate.shares({"a": 60, "b": 1, "c": 1}, 2) == {"a": 0, "b": 1, "c": 1}
    assert mutate.shares({"a": 2, "b": 98}, 100) == {"a": 2, "b": 98}


def test_the_interval_is_wilsons() -> None:
    low, high = mutate.wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert mutate.wilson(10, 10)[1] == 1.0 and mutate.wilson(0, 5)[0] == 0.0 and mutate.wilson(0, 0) == (0.0, 1.0)


def test_mutants_are_noticed_survive_or_meet_no_test_and_a_run_goes_on(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sum(map(len, mutate.python_mutants(tree).values()))
    options = ["--count", str(whole), "--cpp", "0", "--only", "grit_kernels/small"]
    mutate.main([*options, "--partial"], tree)  # no piece of the map is there yet
    mutate.main(options, tree)
    rows = [json.loads(line) for line in (tree / "build/mutate/log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * whole and {row["outcome"] for row in rows[:whole]} == {"no test"}
    del rows[:whole]

    def outcomes(start: int, stop: int) -> set[str]:
        return {row["outcome"] for row in rows if start <= row["line"] <= stop}

    line = {
        name: SOURCE.splitlines().index(f"def {name}") + 1 for name in ("watched(a, b=1):", "run_only(a):", "never(a):")
    }
    assert outcomes(line["watched(a, b=1):"], line["run_only(a):"] - 1) == {"noticed"}
    assert outcomes(line["run_only(a):"], line["never(a):"] - 1) == {"survived"}
    assert outcomes(line["never(a):"], line["never(a):"] + 3) == {"no test"}
    assert {row["by"] for row in rows if row["outcome"] == "noticed"} == {"tests/test_values.py::test_watched"}
    assert (tree / "build/mutate/tree0/grit_kernels/small/values.py").read_text() == SOURCE
    printed = capsys.readouterr().out
    assert "95 % interval" in printed and "no test: grit_kernels/small/values.py" in printed

    mutate.main(options, tree)
    assert len((tree / "build/mutate/log.jsonl").read_text().splitlines()) == 2 * whole


def test_a_change_of_cpp_meets_no_test_before_its_piece_of_the_map_is_there(tree: Path) -> None:
    (tree / "csrc/cpu").mkdir(parents=True)
    (tree / "csrc/cpu/pooling.cpp").write_text("bool f(int a) { return a < 2; }\n")
    edit = cpp_edits("csrc/cpu/pooling.cpp", (tree / "csrc/cpu/pooling.cpp").read_text(), {1})[0]
    tests = read_map(tree, tree / "build/mutate/map")
    trial = mutate.Trial(tree, tree / "build/mutate/tree0", tests, budget=60, packages=())
    assert trial(mutate.keyed(edit, "")).outcome == "no test"


def test_the_object_made_from_a_change_of_cpp_is_older_than_the_restored_source(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tree / "csrc/cpu/pooling.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("bool f(int a) { return a < 2; }\n")
    edit = cpp_edits("csrc/cpu/pooling.cpp", source.read_text(), {1})[0]
    trial = mutate.Trial(tree, tree / "build/mutate/tree0", Map(), budget=60, packages=())
    built = []

    def build(folder: Path) -> None:
        (folder / "object").write_bytes((folder / edit.file).read_bytes())
        built.append((folder / "object").stat().st_mtime_ns)

    monkeypatch.setattr(mutate.mutate_cpp, "choose", lambda *_: ["tests/test_values.py::test_watched"])
    monkeypatch.setattr(mutate.mutate_cpp, "build", build)
    assert trial(mutate.keyed(edit, "")).by == "does not compile"
    restored = trial.tree / edit.file
    assert restored.read_text() == source.read_text() != (trial.tree / "object").read_text()
    assert restored.stat().st_mtime_ns > built[0]


def test_neighbours_that_share_a_fixture_are_tried_after_the_covering_tests() -> None:
    edit = next(e for e in python_edits("values.py", SOURCE) if e.before == "a * LIMIT")
    seconds = {"t.py::covering": 1.0, "t.py::dear": 50.0, "t.py::cheap": 0.1, "other.py::far": 0.1}
    known = Map(seconds={"cpu": seconds, "interpret": {}})
    known.lines["cpu", "values.py", edit.line] = {"t.py::covering", "t.py::dear", "t.py::failed"}
    assert known.choose("cpu", edit, budget=3.0) == ["t.py::covering", "t.py::cheap"]
    assert known.choose("cpu", edit, budget=0.5) == ["t.py::covering", "t.py::cheap"]
    assert known.choose("cpu", edit, budget=60.0)[:2] == ["t.py::covering", "t.py::dear"]
    assert known.choose("interpret", edit, budget=60.0) == []


def test_an_endless_loop_is_stopped_and_counts_as_noticed(tree: Path) -> None:
    (tree / "tests/test_loop.py").write_text("def test_loop():\n    while True:\n        pass\n")
    with closing(Forks(environment(tree, "cpu"), ())) as forks:
        verdict = mutate.run_tests(tree, forks, "cpu", ["tests/test_loop.py::test_loop"], limit=4)
        fine = mutate.run_tests(tree, forks, "cpu", ["tests/test_values.py::test_watched"], limit=60)
    assert (verdict.outcome, verdict.by) == ("noticed", "time limit")
    assert fine.outcome == "survived" and fine.tests == 1


def test_a_loop_that_ends_by_its_cpu_limit_before_anyone_looks_counts_as_noticed(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "tests/test_loop.py").write_text("def test_loop():\n    while True:\n        pass\n")
    monkeypatch.setattr(mutate, "wait", lambda child, limit: child.wait(600))
    with closing(Forks(environment(tree, "cpu"), ())) as forks:
        verdict = mutate.run_tests(tree, forks, "cpu", ["tests/test_loop.py::test_loop"], limit=2)
    assert (verdict.outcome, verdict.by) == ("noticed", "time limit")


def test_a_test_can_spawn_processes(tree: Path) -> None:
    (tree / "tests/test_spawn.py").write_text(
        "import multiprocessing\n\n"
        "def test_spawn():\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        assert pool.map(abs, [-1]) == [1]\n"
    )
    with closing(Forks(environment(tree, "cpu"), ())) as forks:
        verdict = mutate.run_tests(tree, forks, "cpu", ["tests/test_spawn.py::test_spawn"], limit=60)
    assert verdict.outcome == "survived"


def test_a_failure_of_a_property_is_not_made_smaller(tree: Path) -> None:
    pytest.importorskip("hypothesis")
    (tree / "tests/conftest.py").write_text(  # as this project's: a profile that leaves open what is made smaller
        "from hypothesis import settings\n\n"
        "settings.register_profile('fixed', derandomize=True, deadline=None, database=None)\n"
        "settings.load_profile('fixed')\n"
    )
    (tree / "tests/test_property.py").write_text(
        "from hypothesis import given, strategies\n\n"
        "@given(strategies.lists(strategies.integers()))\n"
        "def test_property(values):\n"
        "    if sum(values) > 1000:\n"
        "        open('failures', 'a').write('x')\n"
        "        assert False\n"
    )
    with closing(Forks(environment(tree, "cpu"), ())) as forks:
        verdict = mutate.run_tests(tree, forks, "cpu", ["tests/test_property.py::test_property"], limit=60)
    assert verdict.by == "tests/test_property.py::test_property"
    assert len((tree / "failures").read_text()) <= 3, "found, and shown"


@pytest.mark.slow
def test_only_a_test_that_works_or_sleeps_reaches_the_limit_not_one_that_is_stopped() -> None:
    def started(code: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    ends = {"works": "while True: pass", "sleeps": "import time; time.sleep(600)"}
    for name, code in ends.items():
        with started(code) as child:
            assert mutate.wait(child, limit=2) is None, name
            used, _ = mutate.activity(child.pid)
            assert (used >= 2) == (name == "works")
            child.kill()
    with started("import os, signal; os.kill(os.getpid(), signal.SIGSTOP); raise SystemExit(3)") as child:
        threading.Timer(6, child.send_signal, [signal.SIGCONT]).start()
        assert mutate.wait(child, limit=2) == 3
    # the first thread sleeps while another has work
    waits = "import threading; t = threading.Thread(target=lambda: [None for _ in iter(int, 1)]); t.start(); t.join()"
    with started(waits) as child:
        time.sleep(1)
        assert mutate.activity(child.pid)[1] is False
        child.kill()


def test_the_map_knows_which_test_runs_a_line(tree: Path) -> None:
    mutate.make_map(tree, tree / "build/mutate", "cpu")
    known = read_map(tree / "build/mutate/tree", tree / "build/mutate/map")
    edits = python_edits("grit_kernels/small/values.py", SOURCE)
    by_text = {edit.before: known.covering("cpu", edit) for edit in reversed(edits)}
    assert by_text["a + b"] == {"tests/test_values.py::test_watched"}
    assert by_text["1"] >= {"tests/test_values.py::test_watched"}, "a default is watched by the tests of its function"
    assert by_text["a > 2"] == set()
    assert by_text["a * LIMIT"] == {"tests/test_values.py::test_first"}, "the first to ask for the fixture"
    watching = {f"tests/test_values.py::test_{name}" for name in ("first", "watched")}
    assert by_text["3"] == watching, "what runs on import is watched by the tests that run the file's functions"
