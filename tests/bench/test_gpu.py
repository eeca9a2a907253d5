"""A run on a borrowed GPU brings its records home whatever fails, within its time, and goes on where it stopped."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from bench import attention, attention_tune, common, gpu, gpu_dry, gpu_table, gpu_verdict, launches, records, report  # noqa: E402
from bench.gpu import Run, Task, run_all  # noqa: E402
from tests.bench.parsing import parsed  # noqa: E402

MACHINE = {
    "processor": "AMD EPYC",
    "cpu_features": ["avx2"],
    "torch": "2.11",
    "triton": "3.6",
    "commit": "",
    "time": "-",
}
SCRIPT = """
import json, pathlib, sys, time
record = pathlib.Path(sys.argv[2])
def write(*names):
    record.write_text(json.dumps({"machine": {}, "command": "x", "rows": [{"variant": name} for name in names]}))
match sys.argv[1]:
    case "fine": write("a", "b")
    case "fails": write("a"); sys.exit("nvcc fatal")
    case "hangs": write("a"); time.sleep(60)
    case "hangs once":
        if record.exists(): write("a", "b")
        else: write("a"); time.sleep(60)
    case "loses the GPU": sys.exit(75)
    case "prints": print("FAILED tests/x.py::test_y - AssertionError: 3\\n1 failed, 2 passed in 0.1s"); sys.exit(1)
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a task that does what its name says."""
    (tmp_path / "job_of_a_test.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "RESERVE", 0.0)

    def make(name: str, **changes: Any) -> Task:
        made = Task(name.replace(" ", "_"), 1, f"job_of_a_test '{name}' {{record}} --resume", 20, 0.1)
        return replace(made, **changes)

    return make


def outcomes(out: Path) -> dict[str, str]:
    return {name: found["outcome"] for name, found in json.loads((out / gpu.RECORDS).read_text())["tasks"].items()}


def rows(out: Path, name: str) -> list[str]:
    found = json.loads((out / gpu.RECORDS).read_text())["records"].get(name, {"rows": []})
    return [row["variant"] for row in found["rows"]]


def test_nothing_ends_a_run_and_every_row_comes_home(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SILENCE", 1.0)
    tasks = [
        *(task("fails"), task("hangs"), task("hangs once"), task("loses the GPU")),
        *(task("prints", parse=gpu.parse_tests), task("profiler", before="no-such-profiler --csv"), task("fine")),
    ]
    out = tmp_path / "out"
    run_all(Run(out, MACHINE), tasks, 60)
    assert outcomes(out) == {
        "fails": "failed with status 1",
        "hangs": "hung",
        "hangs_once": "ok",
        "loses_the_GPU": "lost the GPU",
        "prints": "failed with status 1",
        "profiler": "no-such-profiler is not installed",
        "fine": "ok",
    }
    assert rows(out, "fails") == rows(out, "hangs") == ["a"] and rows(out, "fine") == rows(out, "hangs_once") == [
        "a",
        "b",
    ]
    state = json.loads((out / gpu.RECORDS).read_text())
    assert [row["test"] for row in state["records"]["prints"]["rows"]] == ["all", "tests/x.py::test_y"]
    assert state["tasks"]["hangs"]["tries"] == state["tasks"]["loses_the_GPU"]["tries"] == gpu.TRIES
    assert "nvcc fatal" in state["tasks"]["fails"]["note"] and "== fine" in (out / gpu.LOG).read_text()
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "records.json", "table.txt"], (
        "few files to bring home"
    )


def test_a_run_that_is_killed_or_never_started_leaves_nothing_outside_its_folder(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, out = tmp_path / "temporary", tmp_path / "out"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    killed = Run(out, MACHINE)
    killed.run(task("fine"), time.monotonic() + 20)
    (out / "work" / "foreign.json").write_text("{")
    run_all(Run(out, MACHINE), [task("fine"), task("prints", parse=gpu.parse_tests)], 20)
    assert rows(out, "fine") == ["a", "b"] and not list(temporary.iterdir())
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "records.json", "table.txt"]


def test_a_run_ends_in_time_and_another_goes_on(task: Any, tmp_path: Path) -> None:
    tasks = [task("fine"), task("hangs"), task("second", command="job_of_a_test fine {record}", least=5)]
    first, second = tmp_path / "first", tmp_path / "second"
    start = time.monotonic()
    run_all(Run(first, MACHINE), tasks, 3)
    assert time.monotonic() - start < 10
    assert outcomes(first) == {"fine": "ok", "hangs": outcomes(first)["hangs"], "second": "no time left"}
    assert outcomes(first)["hangs"].startswith("stopped after") and rows(first, "hangs") == ["a"]
    run = Run(second, MACHINE, earlier=first)
    assert [t.name for t in run.to_do(tasks)] == ["hangs", "second"], "what ended is not run again"
    run_all(run, [tasks[0], tasks[2]], 20)
    assert outcomes(second)["second"] == "ok" and rows(second, "fine") == ["a", "b"] and rows(second, "hangs") == ["a"]


def test_records_of_another_kind_of_machine_are_not_gone_on_with(task: Any, tmp_path: Path) -> None:
    run_all(Run(tmp_path / "out", MACHINE), [task("fine")], 20)
    with pytest.raises(ValueError, match=r"records.json: expected records of this kind of machine \(nvidia-h100\)"):
        Run(tmp_path / "new", {"gpu": {"name": "NVIDIA H100"}}, earlier=tmp_path / "out")


def test_the_order_is_what_is_worth_most_first() -> None:
    steps = [task.step for task in gpu.TASKS]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3, 4}
    names = [task.name for task in gpu.TASKS]
    assert len(set(names)) == len(names)
    assert names[:8] == [
        *("install", "compile_first", "correctness_cuda", "hopper_tests", "attention_hopper_cuda"),
        *("ceilings_cuda", "attention_cuda", "attention_tune_cuda"),
    ]
    assert gpu.TASKS[0].environment == {"GRIT_KERNELS_NO_EXTENSION": "1"}, (
        "no compiler stands between a GPU and its kernels"
    )
    assert all(task.limit <= 540 and task.least <= task.limit for task in gpu.TASKS)
    chosen = gpu.FIRST_REGIMES.split(";")
    assert sum(any(text in regime.name for text in chosen) for regime in attention.gpu_regimes()) == 5


NEEDED = {
    "bench.correctness": {"correctness"},
    "bench.attention": {"attention"},
    "bench.attention_tune": {"tuning_all"},
    "bench.pooling": {"pooling"},
    "bench.contrastive": {"contrastive"},
    "bench.unified": {"unified"},
    "bench.cuda_twin": {"twins"},
    "pytest": {"tests"},
    # launch no kernel of this package's in Triton
    **dict.fromkeys(("pip", "bench.launches", "bench.ceilings", "bench.generative_loss"), set[str]()),
}


def test_what_a_task_launches_is_compiled_before_it() -> None:
    compiled: set[str] = set()
    for task in gpu.TASKS:
        module, *arguments = shlex.split(task.command)
        if module == "bench.launches":
            compiled |= set(arguments[arguments.index("--groups") + 1].split(","))
        needed = {"tuning"} if "--few" in arguments else NEEDED[module]
        if "hopper" in task.name:
            needed = {"hopper"}
        assert needed <= compiled, task.name
    assert compiled == set(launches.GROUPS)


@pytest.mark.parametrize(
    "task", [t for t in gpu.TASKS if t.command.startswith("bench.attention_tune ")], ids=lambda t: t.name
)
def test_all_that_a_tuning_tries_is_compiled(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, int, bool]] = []
    monkeypatch.setattr(
        attention_tune, "problems", lambda *_: [("", SimpleNamespace(q=SimpleNamespace(device="meta")))]
    )
    monkeypatch.setattr(attention_tune, "call", lambda *_: None)
    monkeypatch.setattr(attention_tune, "table_entry", lambda *_: None)
    monkeypatch.setattr(launches, "record_tests", lambda *_: set())
    monkeypatch.setattr(launches.triton_launch, "architecture", lambda device: "sm90")
    monkeypatch.setattr(
        attention_tune, "tried", lambda kernel, dim, few, table: compiled.append((kernel, dim, few)) or ()
    )
    module, *arguments = shlex.split(task.command)
    asked = parsed(module, arguments)
    launches.GROUPS["hopper" if "hopper" in task.name else "tuning" if asked.few else "tuning_all"]()
    tried = product(asked.kernels.split(","), map(int, asked.dims.split(",")), [asked.few])
    assert set(tried) == set(compiled)


@pytest.mark.parametrize("task", [t for t in gpu.TASKS if t.command.startswith("bench.")], ids=lambda t: t.name)
def test_every_task_is_a_module_that_takes_its_arguments(task: Task, tmp_path: Path) -> None:
    command = Run(tmp_path, MACHINE).command(task)
    module, *arguments = command[command.index("-m") + 1 :]
    only = getattr(parsed(module, arguments), "only", "")
    names = [regime.name for regime in attention.gpu_regimes()]
    assert not only or all(any(text in name for name in names) for text in only.split(";"))


def test_tests_that_sanitize_exist() -> None:
    for task in gpu.TASKS:
        if task.before.startswith("compute-sanitizer"):
            path, name = task.command.split()[-1].strip("'").split("::")
            assert f"def {name.split('[')[0]}(" in (common.ROOT / path).read_text()


def test_what_tools_print_becomes_rows() -> None:
    text = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 2 errors"
    assert gpu.parse_sanitizer(text) == [{"errors": 2, "note": "Invalid __global__ read of size 4 bytes"}]
    assert gpu.parse_sanitizer("========= ERROR SUMMARY: 0 errors") == [{"errors": 0, "note": ""}]
    assert gpu.parse_sanitizer("Device not supported")[0]["errors"] == "no summary"
    profile = """==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","us","register/thread"\n"0","attention_forward_kernel","123.4","168"\n"""
    assert gpu.parse_profile(profile) == [
        {"kernel": "attention_forward_kernel", "time us": "123.4", "registers register/thread": "168"}
    ]
    assert gpu.parse_profile("==ERROR== no permission")[0] == {"kernel": "none", "note": "==ERROR== no permission"}
    assert gpu.parse_tests("") == [{"test": "all", "result": "none ran"}]


def test_the_table_is_short_and_says_who_is_quickest() -> None:
    regimes = [
        {"regime": f"r{i}", "variant": "grit", "ms": 1.0, "tflops": 5.0, "of_gemm": 0.6, "times_grit": 1.0}
        for i in range(200)
    ]
    peers = [
        {"regime": "r0", "variant": name, "ms": t, "times_grit": t}
        for name, t in (("flex", 2.0), ("torch varlen", 0.8))
    ]
    peers.append({"regime": "r0", "variant": "flash-attn", "note": "differs from grit: relative error 0.5"})
    text = gpu_table.table(MACHINE, {}, {"attention_cuda": {"rows": [*peers, *regimes]}})
    lines = text.splitlines()
    assert len(lines) < 100 and lines[-3].endswith("more lines, see records.json")
    first = next(line for line in lines if line.startswith("r0 "))
    assert "torch varlen" in first and "0.8" in first and "flash-attn: differs" in first and "flex" not in first
    twice = gpu_table.best_peers([peers[-1], peers[-1]])[0]["note"]
    assert twice == "flash-attn: differs from grit: relative error 0.5"


def test_a_regime_that_hangs_goes_last_and_after_twice_no_more(tmp_path: Path) -> None:
    regimes = [attention.same(name, 8, 1, True, (1, 1, 32)) for name in ("first", "hangs", "hung twice", "new")]
    path = tmp_path / "record.json"
    assert attention.to_do(regimes, path) == regimes
    notes = (("first", None), ("hangs", attention.BEGAN), ("hung twice", attention.BEGAN_TWICE))
    common.write_records(path, [{"regime": name, "variant": "grit", "note": note} for name, note in notes])
    assert [regime.name for regime in attention.to_do(regimes, path)] == ["new", "hangs"]


def test_a_regime_in_which_this_package_fails_is_a_row_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [attention.same(name, 8, 1, True, (1, 1, 32)) for name in ("good", "bad", "better")]
    monkeypatch.setattr(attention, "cpu_regimes", lambda: small)
    monkeypatch.setitem(common.GEMM_SIZE, "cpu", 16)

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(attention.PEERS, "grit", gpu_dry.broken("bad", fail))
    arguments = [
        "--device",
        "cpu",
        "--peers",
        "grit;sdpa loop",
        "--repeats",
        "1",
        "--record",
        str(tmp_path / "r.json"),
        "--resume",
    ]
    with pytest.raises(SystemExit, match="this package failed in a regime"):
        attention.main(arguments)
    found = records.read(tmp_path / "r.json")["rows"]
    assert [(row["regime"], row["variant"], "ms" in row) for row in found] == [
        *(("good", "grit", True), ("good", "sdpa loop", True), ("bad", "grit", False)),
        *(("better", "grit", True), ("better", "sdpa loop", True)),
    ]
    attention.main(arguments)  # nothing is left to do
    assert records.read(tmp_path / "r.json")["rows"] == found
    monkeypatch.setattr(attention, "device_lost", lambda device: True)
    (tmp_path / "r.json").unlink()
    with pytest.raises(SystemExit) as left:
        attention.main(arguments)
    assert left.value.code == attention.AGAIN and len(records.read(tmp_path / "r.json")["rows"]) == 2


def test_records_of_a_dry_run_are_not_kept_and_those_of_a_gpu_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "write", lambda plots: None)
    machine = {**MACHINE, "gpu": {"name": "NVIDIA H100 80GB HBM3"}}
    saved = {"machine": machine, "dry_run": True, "tasks": {}, "records": {"attention_cuda": {"rows": [{"ms": 1.0}]}}}
    (tmp_path / gpu.RECORDS).write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="expected records of a GPU, got those of a dry run"):
        gpu.keep(tmp_path)
    (tmp_path / gpu.RECORDS).write_text(json.dumps({**saved, "dry_run": False}))
    gpu.main(["--keep", str(tmp_path)])
    kept = tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "attention_cuda.json"
    assert records.read(kept)["rows"] == [{"ms": 1.0}]


def ended(outcome: str = "ok") -> dict[str, Any]:
    return {"step": 1, "tries": 1, "seconds": 1.0, "ended": True, "outcome": outcome}


def regime(variant: str, note: str = "", name: str = "r") -> dict[str, Any]:
    return (
        {"regime": name, "variant": variant, "note": note} if note else {"regime": name, "variant": variant, "ms": 1.0}
    )


@pytest.mark.parametrize(
    ("name", "rows", "against"),
    [
        (
            "correctness_cuda",
            [{"problem": "p", "variant": "eager"}, {"problem": "p", "variant": "grit", "right": True}],
            "",
        ),
        ("correctness_cuda", [{"problem": "p", "variant": "grit", "right": False}], "p, grit: not right"),
        (
            "correctness_cuda",
            [{"problem": "p", "variant": "grit", "right": True, "differing_repeats": 2}],
            "p: 2 repeats differ",
        ),
        ("tests", [{"test": "all", "result": "1 failed"}, {"test": "x.py::y", "result": "failed"}], "x.py::y failed"),
        ("sanitizer_1", [{"errors": 0}], ""),
        ("sanitizer_1", [{"errors": 2}], "sanitizer_1: errors 2"),
        ("sanitizer_1", [{"errors": "no summary"}], "sanitizer_1: errors no summary"),
        ("attention_cuda", [regime("grit"), regime("flex", "differs from grit"), regime("sdpa loop")], ""),
        ("attention_cuda", [regime("grit"), regime("flex", "ValueError: no kernel")], ""),
        (
            "attention_cuda",
            [regime("grit"), regime("flex", "differs from grit"), regime("matmul only")],
            "r, flex: differs from grit",
        ),
        ("decode_cuda", [regime("grit", attention.BEGAN)], ""),
        ("decode_cuda", [regime("grit", "RuntimeError: an illegal")], "r, grit: RuntimeError: an illegal"),
        ("contrastive_cuda", [{"variant": "grit_kernels", "milliseconds": 3.0}], ""),
    ],
)
def test_the_exit_status_says_whether_results_were_right(name: str, rows: list[dict[str, Any]], against: str) -> None:
    tasks = {"correctness_cuda": ended(), "unified_cuda": ended("failed with status 1")}
    found = gpu_verdict.verdict(tasks, {name: {"rows": rows}})
    held = (gpu_verdict.HELD, "correctness held")
    assert found == ((gpu_verdict.WRONG, f"correctness did not hold: {against}") if against else held)


def test_a_check_that_did_not_end_is_not_taken_for_one_that_held() -> None:
    held, wrong, unchecked = (
        gpu_verdict.verdict({"correctness_cuda": {**ended(outcome), "ended": outcome == "ok"}}, {})[0]
        for outcome in ("ok", "hung", "stopped after 20 s")
    )
    assert (held, wrong, unchecked) == (0, 1, 3) and gpu_verdict.verdict({}, {})[0] == 3
    tasks = {"correctness_cuda": ended(), "tests": ended("failed with status 4")}
    assert gpu_verdict.wrong(tasks, {"tests": {"rows": [{"test": "all", "result": "none ran"}]}}) == [
        "tests failed with status 4"
    ]
    skipped = {"correctness_cuda": ended(), "sanitizer_1": {**ended("compute-sanitizer is not installed"), "tries": 0}}
    assert gpu_verdict.verdict(skipped, {})[0] == 0


def test_a_run_ends_with_its_verdict(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "described", lambda: MACHINE)
    for name, status in (("fine", 0), ("fails", 1)):
        monkeypatch.setattr(gpu, "TASKS", [replace(task(name), name="correctness_cuda")])
        assert gpu.main(["--out", str(tmp_path / name), "--limit", "30"]) == status
        assert (tmp_path / name / gpu.TABLE).read_text().splitlines()[-1].startswith("correctness ")


def test_a_dry_run_that_misses_what_was_injected_fails() -> None:
    tasks = {
        **{name: ended() for name in ("attention_cuda", "unified_cuda")},
        **{name: ended(gpu_dry.OUTCOMES[name]) for name in ("tests", "install")},
    }
    rows = [
        regime("grit", attention.BEGAN_TWICE, gpu_dry.HANGS),
        regime("grit", "RuntimeError: CUDA error", gpu_dry.RAISES),
    ]
    found: dict[str, Any] = {
        **{"attention_cuda": {"rows": rows}, "unified_cuda": {"rows": [{}]}},
        "tests": {"rows": [{"test": gpu_dry.RED, "result": "failed"}]},
    }
    assert gpu_dry.surprises(tasks, found) == []
    assert gpu_dry.surprises({**tasks, "install": ended()}, found) == [
        "install: expected 'failed with status 1', got 'ok'"
    ]
    assert gpu_dry.surprises(tasks, {**found, "unified_cuda": {"rows": []}}) == [
        "unified_cuda: expected rows, got none"
    ]
    for name in ("attention_cuda", "tests"):
        assert "verdict: expected" in gpu_dry.surprises(tasks, {**found, name: {"rows": [{}]}})[0]


def test_the_page_shows_the_outcomes_of_a_dry_run() -> None:
    page = (common.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").partition("## The dry run")[2]
    lines = page.partition("```text\n")[2].partition("```")[0].splitlines()
    shown = [line.split("  ")[0] for line in lines[2 : 2 + len(gpu.TASKS)]]
    assert shown == [task.name for task in gpu.TASKS]
    for line, task in zip(lines[2:], gpu.TASKS, strict=False):
        expected = "has nothing to watch on a CPU" if task.before else gpu_dry.OUTCOMES.get(task.name, "ok")
        assert f" {expected}" in line
    assert lines[-1].startswith("correctness did not hold: ") and gpu_dry.RED in lines[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_dry_run_brings_records_home(tmp_path: Path) -> None:
    """Every benchmark, tiny, on the CPU, with what gpu_dry injects."""
    out = tmp_path / "out"
    statuses = [gpu.main(["--out", str(out), "--dry-run", "--limit", "400"]) for _ in range(2)]
    found = outcomes(out)
    assert set(found) == {task.name for task in gpu.TASKS} and statuses[-1] == 0
    state = json.loads((out / gpu.RECORDS).read_text())
    notes = {(row["regime"], row["variant"]): row.get("note", "") for row in state["records"]["attention_cuda"]["rows"]}
    assert notes[gpu_dry.HANGS, "grit"] == attention.BEGAN_TWICE
    assert "illegal memory access" in notes[gpu_dry.RAISES, "grit"]
    for regime in ("mixed 50% causal", "dense bidirectional N4096 D128"):
        assert notes[regime, "grit"] == "" and notes[regime, "torch varlen"].startswith("differs from grit")
        assert notes[regime, "flex"].startswith("ValueError: injected")
    for name in (
        "correctness_cuda",
        "ceilings_cuda",
        "unified_cuda",
        "decode_cuda",
        "pooling_cuda",
        "contrastive_cuda",
    ):
        assert state["records"][name]["rows"] and found[name] == "ok"
    assert state["records"]["tests"]["rows"][0]["result"] == "1 failed, 2 passed"
    assert len((out / gpu.TABLE).read_text().splitlines()) < 100
