"""Runs repeat exactly, and go on exactly after a stop signal, a kill, or from any saved state."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model.train import Interrupted
from python_model.train.checkpointer import Checkpointer
from python_model.train.distributed import Ranks
from tests.python_model.training_samples import LENGTH, figures, toy_config, toy_trainer

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def test_same_seed_same_run(checkpoint: Path, tmp_path: Path) -> None:
    runs = [
        figures(toy_trainer(toy_config(checkpoint, tmp_path, steps=3, resume=False, deterministic=True)).train())
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_the_first_signal_asks_for_a_stop_and_the_second_acts_as_always(checkpoint: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path))
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: seen.append(number))
            trainer._stop = False
            with trainer._stoppable():
                os.kill(os.getpid(), number)
                assert trainer._stop and not seen
                os.kill(os.getpid(), number)
                assert seen.pop() == number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 4, "learn_temperature": True, "chunk_tokens": 2 * LENGTH},
        {"optimizer.kind": "muon"},
        pytest.param({"optimizer.kind": "adamw_8bit", "save_steps": 1}, marks=needs_torchao),
        {"async_save": True, "save_steps": 1},
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """SIGTERM in step 3: the state is saved, and the resumed run's log and weights equal those of a whole run."""
    whole = toy_trainer(toy_config(checkpoint, tmp_path / "whole", steps=6, **changes))
    expected = whole.train()

    config = toy_config(checkpoint, tmp_path / "cut", steps=6, **changes)
    cut = toy_trainer(config)
    stream = cut.stream

    class Interrupting:
        def steps(self, start: int, stop: int) -> Any:
            for step in range(start, stop):
                if step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield stream[step]  # type: ignore[index]

    cut.stream = Interrupting()
    with pytest.raises(Interrupted, match="stopped after step 3"):
        cut.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    resumed = toy_trainer(config)
    assert figures(resumed.train()) == figures(expected)
    for (name, mine), (_, theirs) in zip(resumed.grit.named_parameters(), whole.grit.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert resumed.optimizers.temperature == whole.optimizers.temperature


KILLED = """
import sys
from pathlib import Path
from tests.python_model.training_samples import toy_config, toy_trainer
import torch
torch.set_num_threads(1)
toy_trainer(toy_config(Path(sys.argv[1]), Path(sys.argv[2]), steps=500, save_steps=2, save_total=2)).train()
"""


def test_a_killed_run_resumes_exactly(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL at whatever point the run has reached, perhaps in the middle of saving."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path / "cut")], stderr=subprocess.DEVNULL
    )
    log = tmp_path / "cut" / "out" / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = json.loads(log.read_bytes().splitlines()[-2])["step"]

    config = toy_config(checkpoint, tmp_path / "cut", steps=500, save_steps=2)
    resumed = toy_trainer(config)
    stream, stop = resumed.stream, done + 3

    class Short:
        def steps(self, start: int, _: int) -> Any:
            assert 0 < start <= done + 1, "nothing or too much was kept"
            return stream.steps(start, stop)

    resumed.stream = Short()
    records = resumed.train()
    assert len(records) == stop
    assert len(list((tmp_path / "cut" / "out" / "states").glob("step-*"))) <= 2

    whole = toy_trainer(toy_config(checkpoint, tmp_path / "whole", steps=500))
    start = whole.stream
    whole.stream = type("Stream", (), {"steps": lambda self, a, b: start.steps(a, stop)})()
    assert figures(whole.train()) == figures(records)


def test_a_state_written_in_the_background_holds_its_own_step(checkpoint: Path, tmp_path: Path) -> None:
    """Training goes on while it is written, and changes nothing in it."""
    whole = toy_trainer(toy_config(checkpoint, tmp_path, steps=6, save_steps=2, async_save=True, save_total=3))
    whole.train()
    states = sorted(path.name for path in (tmp_path / "out" / "states").iterdir())
    assert states == [f"step-{step:08d}" for step in (2, 4, 6)]
    for state in states[1:]:
        shutil.rmtree(tmp_path / "out" / "states" / state)
    resumed = toy_trainer(toy_config(checkpoint, tmp_path, steps=6))
    assert figures(resumed.train()) and len(resumed.checkpointer.settings)
    for (name, mine), (_, theirs) in zip(resumed.grit.named_parameters(), whole.grit.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_state_written_in_the_background_counts_in_the_step_after_it_is_on_disk(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Not only at the next save, before which the machine may die."""
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=5, save_steps=2, async_save=True))
    newest = []

    def look(done: int) -> None:
        if done == 3:
            assert trainer.checkpointer._pending is not None
            trainer.checkpointer._pending[1].result()
        newest.append(trainer.checkpointer.latest())

    trainer.after_step = look
    trainer.train()
    assert newest[:3] == [None] * 3 and newest[3] == tmp_path / "out" / "states" / "step-00000002"


def test_all_ranks_take_the_state_that_the_first_one_sees(tmp_path: Path) -> None:
    """On a network file system another rank may not see it yet, or still see one that is gone."""

    class Second(Ranks):
        def all_values(self, values: Sequence[float]) -> torch.Tensor:
            assert list(values) == [-1], "what this rank sees does not count"
            return torch.tensor([[seen], [-1]], dtype=torch.float64)

    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    checkpointer = Checkpointer(tmp_path, {}, Second(1, 2, torch.device("cpu"), object()))
    seen = 7
    assert checkpointer.shared_latest() == tmp_path / "step-00000007"
    seen = -1
    assert checkpointer.shared_latest() is None
    alone = Checkpointer(tmp_path, {}, Ranks(0, 1, torch.device("cpu")))
    assert alone.shared_latest() == tmp_path / "step-00000003"


@pytest.mark.parametrize("failure", ["batch", "data"])
def test_a_state_being_written_survives_the_step_that_fails(checkpoint: Path, tmp_path: Path, failure: str) -> None:
    """The run stops in the step after the save, and goes on from there as if it had not."""
    changes = {"steps": 4, "save_steps": 2, "async_save": True}
    expected = toy_trainer(toy_config(checkpoint, tmp_path / "whole", **changes)).train()
    config = toy_config(checkpoint, tmp_path / "cut", **changes)
    cut = toy_trainer(config)
    stream = cut.stream

    class Failing:
        def steps(self, start: int, stop: int) -> Any:
            yield from stream.steps(start, 2)
            assert cut.checkpointer.latest() is None, "the state is still pending"
            if failure == "data":
                raise OSError("the disk is gone")
            with torch.no_grad():
                next(p for p in cut.grit.parameters() if p.ndim == 1)[0] = float("nan")
            yield from stream.steps(2, 3)

    cut.stream = Failing()
    with pytest.raises(OSError if failure == "data" else FloatingPointError):
        cut.train()
    newest = cut.checkpointer.latest()
    assert newest is not None and newest.name == "step-00000002"
    assert figures(toy_trainer(config).train()) == figures(expected)


def test_states_rotate_and_a_half_written_one_is_ignored(checkpoint: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=4, save_steps=1, save_total=2))
    trainer.train()
    states = tmp_path / "out" / "states"
    assert sorted(p.name for p in states.iterdir()) == ["step-00000003", "step-00000004"]
    (states / "step-00000009").mkdir()
    newest = trainer.checkpointer.latest()
    assert newest is not None and newest.name == "step-00000004"


def test_a_run_that_starts_over_replaces_the_states_of_the_earlier_one(checkpoint: Path, tmp_path: Path) -> None:
    """They have later steps, and must not pass for the newest."""
    toy_trainer(toy_config(checkpoint, tmp_path, steps=6, save_steps=2)).train()
    again = toy_trainer(toy_config(checkpoint, tmp_path, steps=6, save_steps=2, lr=1e-3, resume=False))
    again.after_step = lambda done: setattr(again, "_stop", done == 3)
    with pytest.raises(Interrupted, match="stopped after step 3; the same command continues from .*step-00000003"):
        again.train()
    assert sorted(p.name for p in (tmp_path / "out" / "states").iterdir()) == ["step-00000002", "step-00000003"]
    resumed = toy_trainer(toy_config(checkpoint, tmp_path, steps=6, save_steps=2, lr=1e-3))
    assert [record["step"] for record in resumed.train()] == [1, 2, 3, 4, 5, 6]


def test_a_stop_asked_for_in_the_last_step_finds_the_run_finished(checkpoint: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=2, mode="generative"))
    trainer.after_step = lambda done: setattr(trainer, "_stop", done == 2)
    assert [record["step"] for record in trainer.train()] == [1, 2]
    assert trainer.checkpointer.latest() is None


def test_a_state_is_on_the_disk_before_it_gets_its_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    renamed: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def named(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step-"):
            files = [*Path(source).rglob("*"), Path(source)]
            assert len(files) >= 4 and {path.stat().st_ino for path in files} <= synced
            renamed.append(Path(target).name)
            synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", named)
    toy_trainer(toy_config(checkpoint, tmp_path, steps=2, save_steps=1)).train()
    assert renamed == ["step-00000001", "step-00000002"]
    assert (tmp_path / "out" / "states").stat().st_ino in synced  # the new name as well


@pytest.mark.parametrize("background", [False, True])
def test_a_state_that_cannot_be_written_is_an_error_that_says_so_and_leaves_the_others(
    checkpoint: Path, tmp_path: Path, background: bool
) -> None:
    """A limit on the size of a file stands for a full disk."""
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=3, save_steps=1, async_save=background))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int) -> None:
        if done == 2:
            trainer.checkpointer.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))

    trainer.after_step = fill
    try:
        said = r"(?s)step-00000002: the state cannot be written \((\w*Error: .*)+\); \d+\.\d\d GiB are free there$"
        with pytest.raises(OSError, match=said):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    latest = trainer.checkpointer.latest()
    assert latest is not None and latest.name == "step-00000001"
    assert list(latest.parent.iterdir()) == [latest]  # and nothing half-written fills the disk


def test_a_damaged_state_is_named_and_the_one_before_it_serves(checkpoint: Path, tmp_path: Path) -> None:
    config = toy_config(checkpoint, tmp_path, steps=3, save_steps=1)
    whole = figures(toy_trainer(config).train())
    newest = tmp_path / "out" / "states" / "step-00000003"
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OSError, match=r"step-00000003: the state cannot be read \(.+\); remove it to resume from"):
        toy_trainer(config).train()
    shutil.rmtree(newest)
    assert figures(toy_trainer(config).train()) == whole
