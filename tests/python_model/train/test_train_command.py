"""grit train from the command line, alone and under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from python_model import GritLM
from python_model.train.__main__ import main, parse
from tests.python_model.training_samples import data_folder, figures


def test_command_line_trains_and_the_checkpoint_loads(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    data = data_folder(tmp_path / "data")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {checkpoint}\ntrain_data: {data}\nsteps: 5\nembedding_batch_size: 4\nbf16: false\n")
    main(["--config", str(config), "--steps", "2", "--output_dir", str(tmp_path / "out")])
    folder = tmp_path / "out" / "checkpoint"
    printed = capsys.readouterr().out
    assert f"saved {folder}" in printed and "memory per rank" in printed
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert GritLM(folder, device="cpu").encode("a text").shape == (64,)


def test_a_plot_that_fails_or_has_nothing_to_show_costs_no_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = data_folder(tmp_path / "data"), tmp_path / "out"
    arguments = ["--model", str(checkpoint), "--train_data", str(data), "--output_dir", str(out), "--steps", "1"]
    arguments += ["--embedding_batch_size", "2", "--bf16", "false", "--save_steps", "1"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError):
            main(arguments)
    assert GritLM(out / "checkpoint", device="cpu").encode("a text").shape == (64,)
    (out / "log.jsonl").unlink()
    main(arguments)  # resumes a run that has nothing left to do, and no log
    assert not (out / "loss.png").exists()


def test_command_line_errors_name_what_is_wrong(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="no file or folder nowhere"):
        main(["--train_data", "nowhere"])
    data = data_folder(tmp_path / "data")
    with pytest.raises(SystemExit, match="mode: expected .*got 'both'"):
        main(["--train_data", str(data), "--mode", "both"])
    for name, value in (
        ("warmup_ratio", "1.5"),
        ("projection", "0"),
        ("query_max_len", "0"),
        ("few_shot", "-1"),
        ("generative_weight", ".nan"),
    ):
        with pytest.raises(SystemExit, match=f"{name}: expected .*, got .*"):
            main(["--train_data", str(data), f"--{name}", value])
    with pytest.raises(SystemExit, match="chunk_tokens: expected .*, got 10"):
        main(["--train_data", str(data), "--chunk_tokens", "10"])
    with pytest.raises(SystemExit):
        parse(["--train_data", str(data), "--no_such_option", "1"])
    assert "no_such_option" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="router_loss_weight: got 1.0, but the model has no experts"):
        main(
            ["--model", str(checkpoint), "--train_data", str(data), "--router_loss_weight", "1.0"]
            + ["--output_dir", str(tmp_path / "out")]
        )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_torchrun_trains_resumes_and_exports_what_one_process_does(
    checkpoint: Path, tmp_path: Path, parallel: str
) -> None:
    """Two ranks, stopped after two steps and started again, against one process that was never stopped."""
    data = data_folder(tmp_path / "data")
    common = [
        *("--model", str(checkpoint), "--train_data", str(data), "--embedding_batch_size", "4", "--bf16", "false"),
        *("--generative_batch_size", "3", "--learning_rate", "1e-3", "--passage_max_len", "64"),
        *("--generative_max_len", "64", "--query_max_len", "64", "--chunk_tokens", "128", "--save_steps", "2"),
    ]
    main([*common, "--steps", "4", "--output_dir", str(tmp_path / "one")])

    def ranks(*more: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            + [
                "-m",
                "python_model.train",
                *common,
                "--parallel",
                parallel,
                "--output_dir",
                str(tmp_path / "two"),
                *more,
            ],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout + run.stderr

    ranks("--steps", "4")
    whole = (tmp_path / "two" / "log.jsonl").read_text()
    # as if it had been killed after step 2
    states = tmp_path / "two" / "states"
    shutil.rmtree(states / "step-00000004")
    assert "resuming after step 2" in ranks("--steps", "4")
    logs = [
        [json.loads(line) for line in text.splitlines()]
        for text in (whole, (tmp_path / "two" / "log.jsonl").read_text())
    ]
    assert figures(logs[0]) == figures(logs[1])
    single = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    for mine, theirs in zip(logs[1], single, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    one, two = (GritLM(tmp_path / name / "checkpoint", device="cpu").encode("a river") for name in ("one", "two"))
    assert abs(one - two).max() < 1e-4
