"""Where the figures of a run go: log.jsonl and trackers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from python_model.train.trackers import StepLog
from tests.python_model.training_samples import toy_config, toy_trainer


def test_a_log_keeps_the_steps_of_the_state_and_drops_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in (1, 2, 3)) + '{"step": 4, "lo')
    log = StepLog(path, step=2)
    log.log(3, {"loss": 0.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]


def test_a_log_without_psutil_is_json_all_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1))
    monkeypatch.setitem(sys.modules, "psutil", None)
    records = trainer.train()
    (line,) = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    refuse = pytest.fail  # NaN is no JSON
    assert json.loads(line, parse_constant=refuse) == records[0] and records[0]["memory_gib"] is None


def test_a_tracker_gets_what_the_log_gets(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package trackio, found by its name like the real one."""
    seen: list[tuple[int, dict[str, Any]]] = []

    class Trackio:
        @staticmethod
        def init(project: str, name: str, config: dict[str, Any]) -> None:
            assert project == "grit_kernels" and config["steps"] == 2

        @staticmethod
        def log(figures: dict[str, Any], step: int) -> None:
            seen.append((step, figures))

        @staticmethod
        def finish() -> None:
            seen.append((-1, {}))

    monkeypatch.setitem(sys.modules, "trackio", Trackio)  # type: ignore[arg-type]
    records = toy_trainer(toy_config(checkpoint, tmp_path, steps=2, trackers=["trackio"])).train()
    assert [step for step, _ in seen] == [1, 2, -1]
    assert seen[0][1]["contrastive_loss"] == records[0]["contrastive_loss"]


def test_a_tracker_whose_package_is_missing_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ImportError, match="wandb is missing .*pip install wandb"):
        toy_trainer(toy_config(checkpoint, tmp_path, trackers=["wandb"])).train()
    assert (tmp_path / "out" / "log.jsonl").read_text() == '{"step": 1}\n'  # of an earlier run
