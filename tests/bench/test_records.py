"""Records: the same measurement is found again, drift is told from noise, and the page shows what is committed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import bench.__main__ as everything
from bench import charts, common, records, report
from tests.bench.parsing import parsed


def _rows(slow: float, scatter: float = 0.01) -> list[dict[str, Any]]:
    def times(base: float) -> list[float]:
        return [base * (1 + scatter * k) for k in (-1, 0, 1)]

    return [
        {"variant": "ours", "tokens": 100, "dtype": "bf16", "rate": 3.3, "seconds": times(1.0)},
        {"variant": "theirs", "tokens": 100, "dtype": "bf16", "rate": 1.1, "seconds": times(slow)},
        {"variant": "ours", "tokens": 200, "dtype": "bf16", "rate": 3.3, "seconds": times(5.0)},
        {"variant": "theirs", "tokens": 200, "dtype": "bf16", "rate": 1.1, "seconds": times(10.0)},
    ]


def test_a_ratio_that_moves_beyond_the_scatter_is_reported_by_setting_and_variant() -> None:
    count, moves = records.moved(_rows(3.0), _rows(2.0))
    assert count == 2
    assert [(m.variant, m.before, m.after) for m in moves] == [("theirs", pytest.approx(3.0), pytest.approx(2.0))]
    assert "tokens 100" in moves[0].setting


@pytest.mark.parametrize(("after", "scatter"), [(3.2, 0.01), (2.0, 0.3)])
def test_small_changes_and_noisy_ones_are_not(after: float, scatter: float) -> None:
    assert records.moved(_rows(3.0, scatter), _rows(after, scatter)) == (2, [])


def test_a_slower_machine_moves_nothing() -> None:
    slower = [{**row, "seconds": [7 * t for t in row["seconds"]], "rate": row["rate"] / 7} for row in _rows(3.0)]
    assert records.moved(_rows(3.0), slower) == (2, [])


COMMITTED = [path for paths in report.committed().values() for path in paths]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_committed_records_name_their_machine_commit_and_command(path: Path) -> None:
    record = records.read(path)
    assert record["rows"] and record["command"].startswith("python -m bench.")
    assert " /" not in record["command"], "a path of the machine it was made on"
    assert {"processor", "torch", "commit", "time", "threads"} <= record["machine"].keys()
    assert records.moved(record["rows"], record["rows"])[1] == []


def test_the_page_shows_the_committed_records() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(), "run python -m bench.report"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_record_stands_in_the_folder_of_its_kind_of_machine(path: Path) -> None:
    assert common.machine_kind(records.read(path)["machine"]) == path.parent.name


@pytest.mark.parametrize(
    ("described", "kind"),
    [
        ({"processor": "AMD EPYC", "instruction_sets": ["avx512_bf16", "avx2"]}, "amd-avx512_bf16"),
        (
            {"processor": "Intel(R) Xeon(R)", "cpu_features": ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]},
            "intel-amx",
        ),
        ({"processor": "Intel(R) Core(TM) i5", "cpu_features": ["avx2"]}, "intel-avx2"),
        ({"processor": "something else", "cpu_features": []}, "cpu"),
        ({"processor": "AMD EPYC", "gpu": {"name": "NVIDIA H200"}}, "nvidia-h200"),
    ],
)
def test_machines_are_of_one_kind_by_their_maker_and_widest_instruction_set(described: Any, kind: str) -> None:
    assert common.machine_kind(described) == kind


def test_a_part_that_is_measured_anew_replaces_its_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    first = [{"regime": regime, "variant": "ours", "value": 1} for regime in ("a", "b", "b2", "c")]
    common.write_records(path, first)
    origin = records.read(path)["machine"]
    common.write_records(path, [{"regime": "b", "value": 2}], lambda row: row["regime"] == "b")
    common.write_records(path, [{"regime": "d", "value": 3}], lambda row: row["regime"] == "d")
    rows = records.read(path)["rows"]
    assert [(row["regime"], row["value"]) for row in rows] == [("a", 1), ("b", 2), ("b2", 1), ("c", 1), ("d", 3)]
    assert rows[0]["measured"] == f"{origin['commit'][:10]}, {origin['time'][:10]}" and "measured" not in rows[-1]


def test_rows_of_different_kinds_of_machines_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    common.write_records(path, [{"regime": "a"}, {"regime": "b"}])
    record = records.read(path)
    record["machine"] |= {"processor": "another", "cpu_features": ["sve"]}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="record of this kind of machine"):
        common.write_records(path, [{"regime": "b"}], lambda row: row["regime"] == "b")
    common.write_records(path, [{"regime": "b"}])  # the whole record is another machine's now
    assert len(records.read(path)["rows"]) == 1


def test_a_run_is_compared_with_the_records_of_a_like_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "machine_kind", lambda described: "here")
    for folder, slow in (("here", 3.0), ("there", 9.0), ("latest", 2.0)):
        common.write_records(tmp_path / folder / "x_cpu.json", _rows(slow))
    common.write_records(tmp_path / "latest" / "y_cpu.json", _rows(2.0))
    (tmp_path / "proof").mkdir()
    (tmp_path / "proof" / "base.json").write_text('{"name": "base"}')  # of no kind of machine
    lines = everything.compare(tmp_path / "latest")
    assert "here" in lines[0] and lines[1].startswith("x_cpu: 1 of 2") and "3.00x -> 2.00x" in lines[2]
    assert lines[-1] == "y_cpu: no record to compare with"
    monkeypatch.setattr(common, "machine_kind", lambda described: "elsewhere")
    assert everything.compare(tmp_path / "latest")[0].endswith("there are records of here, there")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_chart_draws_its_record(path: Path, tmp_path: Path) -> None:
    drawn = charts.draw(tmp_path / path.name, records.read(path)["rows"])
    assert drawn is None or drawn.stat().st_size > 5000


def test_red_tests_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "tests_pass", lambda: False)
    monkeypatch.setattr(everything.ceilings, "measure", lambda device: pytest.fail("measured all the same"))
    with pytest.raises(SystemExit, match="tests are red"):
        everything.main([])


def test_an_interrupted_run_goes_on_with_what_has_not_finished(tmp_path: Path) -> None:
    script = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text('x'); sys.exit(int(sys.argv[2]))"
    (tmp_path / "job.py").write_text(script)

    class Job(everything.Benchmark):
        def command(self, folder: Path, full: bool) -> list[str]:
            return [sys.executable, str(tmp_path / "job.py"), str(folder / self.name), self.quick]

    jobs = [Job("first", "", "0", ""), Job("second", "", "3", ""), Job("third", "", "0", "", limit=0)]
    first = everything.run_all(jobs, tmp_path / "out", full=False)
    assert first["first"].startswith("ok") and first["second"] == "failed with code 3"
    assert first["third"] == "stopped after 0 s"
    (tmp_path / "out" / "first").unlink()
    again = everything.run_all(jobs, tmp_path / "out", full=False)
    assert again["first"] == "done before" and not (tmp_path / "out" / "first").exists()
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["finished"] == ["first"]


def test_a_stopped_benchmark_takes_with_it_what_it_has_started(tmp_path: Path) -> None:
    late = tmp_path / "late"
    assert everything.run_within(["sh", "-c", f"(sleep 0.5; touch {late}) & sleep 30"], 0.1) is None
    time.sleep(0.7)
    assert not late.exists()
    assert everything.run_within(["sh", "-c", "exit 3"], None) == 3


@pytest.mark.parametrize("job", everything.CPU, ids=lambda b: b.name)
@pytest.mark.parametrize("full", [False, True])
def test_every_benchmark_is_a_module_that_takes_its_arguments(
    job: everything.Benchmark, full: bool, tmp_path: Path
) -> None:
    _, _, module, *arguments = job.command(tmp_path, full)
    assert module == job.module
    assert Path(parsed(module, arguments).record).name.startswith(job.name)


def test_every_commit_that_a_record_names_is_in_the_history_or_explained() -> None:
    root = common.RESULTS.parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout

    if not (root / ".git").exists() or "false" not in git("rev-parse", "--is-shallow-repository"):
        pytest.skip("without the history")
    known = set(git("rev-list", "HEAD").split())
    explained = set(re.findall(r"^\| (\w{10}) \|", (common.RESULTS / "README.md").read_text(encoding="utf-8"), re.M))
    named: set[str] = set()
    for path in common.RESULTS.glob("*/*.json"):
        named |= set(re.findall(r'"commit": "(\w{40})"', path.read_text(encoding="utf-8")))
    if not known & named:
        pytest.skip("with another history")
    assert {commit[:10] for commit in named - known} == explained
