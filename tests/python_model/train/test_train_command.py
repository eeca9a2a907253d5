"""grit train from the command line, alone and under torchrun."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

import python_model
from python_model import GritLM
from python_model.commands.train import COMMAND as grit_train
from python_model.train.config import TYPES
from tests.python_model.training_samples import data_folder, figures


def test_command_line_trains_and_the_checkpoint_loads(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    data = data_folder(tmp_path / "data")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"steps: 5\nmodel: {{name: {checkpoint}, bf16: false}}\ndata: {{train_data: {data}}}\n"
        "batch: {embedding_batch_size: 4}\n"
    )
    grit_train(["--config", str(config), "--steps", "2", "--output_dir", str(tmp_path / "out")])
    folder = tmp_path / "out" / "checkpoint"
    printed = capsys.readouterr().out
    assert f"saved {folder}" in printed and "memory per rank" in printed
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert GritLM(folder, device="cpu").encode("a text").shape == (64,)


def test_an_output_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not hold for every user, so the system's refusal is made up."""
    data = data_folder(tmp_path / "data")
    run = ["--model.name", str(checkpoint), "--data.train_data", str(data), "--batch.embedding_batch_size", "2"]
    monkeypatch.setattr("python_model.train.trainer.load_model", None)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file: expected a folder or a new name, got a file"):
        grit_train([*run, "--output_dir", str(tmp_path / "file")])

    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir / "tmp123"))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(SystemExit, match="new: this user has no permission for it"):
        grit_train([*run, "--output_dir", str(tmp_path / "new")])


def test_a_plot_that_fails_or_has_nothing_to_show_costs_no_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = data_folder(tmp_path / "data"), tmp_path / "out"
    arguments = [
        "--model.name",
        str(checkpoint),
        "--data.train_data",
        str(data),
        "--output_dir",
        str(out),
        "--steps",
        "1",
    ]
    arguments += ["--batch.embedding_batch_size", "2", "--model.bf16", "false", "--logging.save_steps", "1"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        grit_train(arguments)
    assert re.search(
        r"note: no loss.png, as matplotlib is missing .*pip install 'grit-kernels\[train\]'", capsys.readouterr().out
    )
    assert GritLM(out / "checkpoint", device="cpu").encode("a text").shape == (64,)
    (out / "log.jsonl").unlink()
    grit_train(arguments)  # resumes a run that has nothing left to do, and no log
    assert not (out / "loss.png").exists()


def test_command_line_errors_name_what_is_wrong(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="no file or folder nowhere"):
        grit_train(["--data.train_data", "nowhere"])
    data = data_folder(tmp_path / "data")
    with pytest.raises(SystemExit, match="mode: expected .*got 'both'"):
        grit_train(["--data.train_data", str(data), "--mode", "both"])
    for name, value in (
        ("optimizer.warmup_ratio", "1.5"),
        ("grit.projection", "0"),
        ("data.query_max_len", "0"),
        ("data.few_shot", "-1"),
        ("losses.generative_weight", ".nan"),
    ):
        with pytest.raises(SystemExit, match=f"{name}: expected a.*, got"):
            grit_train(["--data.train_data", str(data), f"--{name}", value])
    with pytest.raises(SystemExit, match="chunk_tokens: expected 0 or at least .* got 10"):
        grit_train(["--data.train_data", str(data), "--batch.chunk_tokens", "10"])
    with pytest.raises(ValueError, match="no_such_option"):
        grit_train.arguments(["--data.train_data", str(data), "--no_such_option", "1"])
    with pytest.raises(
        SystemExit, match="losses.router_loss_weight: expected none for a model without experts, got 1.0"
    ):
        grit_train(
            ["--model.name", str(checkpoint), "--data.train_data", str(data), "--losses.router_loss_weight", "1.0"]
            + ["--output_dir", str(tmp_path / "out")]
        )


@pytest.mark.parametrize(
    ("package", "options", "install"),
    [
        ("peft", ["--model.lora_rank", "4"], r"'grit-kernels\[lora\]'"),
        ("torchao", ["--optimizer.kind", "adamw_8bit"], r"'grit-kernels\[8bit\]'"),
        ("bitsandbytes", ["--model.lora_rank", "4", "--model.quantization", "nf4"], "bitsandbytes"),
        ("tensorboard", ["--logging.trackers", "[tensorboard]"], "tensorboard"),
        ("wandb", ["--logging.trackers", "[wandb]"], "wandb"),
    ],
)
def test_a_missing_package_ends_training_with_how_to_install_it(
    package: str, options: list[str], install: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, f"{package}.optim"):  # the second if an earlier test has imported it
        monkeypatch.setitem(sys.modules, name, None)
    base = ["--model.name", str(checkpoint), "--data.train_data", str(data_folder(tmp_path / "data"))]
    with pytest.raises(SystemExit, match=f"grit train: {package} is missing .*pip install {install}$"):
        grit_train([*base, "--output_dir", str(tmp_path / "out"), *options])


def test_a_flat_setting_of_version_0_1_is_refused_with_its_new_place(tmp_path: Path) -> None:
    for name, place in (("embedding_batch_size", "batch.embedding_batch_size"), ("learning_rate", "optimizer.lr")):
        with pytest.raises(SystemExit, match=f"{name}: expected its new name {place}"):
            grit_train([f"--{name}", "4"])
    with pytest.raises(SystemExit, match="model: expected its new name model.name"):
        grit_train(["--model", "smollm2-135m"])
    with pytest.raises(SystemExit, match="plain_text: this setting of version 0.1 was removed"):
        grit_train(["--plain_text=true"])
    file = tmp_path / "old.yaml"
    file.write_text("steps: 2\ntemperature: 0.1\n")
    with pytest.raises(SystemExit, match="old.yaml: temperature: expected its new name losses.temperature"):
        grit_train(["--config", str(file)])


def test_a_group_without_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for content, got in (("logging:\n  # save_steps: 9\n", "None"), ("logging: 9\n", "9"), ("model:\n", "None")):
        file.write_text(content)
        with pytest.raises(SystemExit, match=f"run.yaml: (logging|model): expected a mapping of settings, got {got}"):
            grit_train(["--config", str(file)])
    file.write_text("- steps\n")
    with pytest.raises(SystemExit, match="config: expected settings in .*run.yaml, got list"):
        grit_train(["--config", str(file)])


def test_the_help_explains_every_setting_and_lists_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        grit_train.arguments(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, hint in TYPES.items():
        # Python 3.13 prints the name, a comma and the form that appends to a list
        described = re.split(rf" --{re.escape(name)},? ", printed[printed.index("options:") :], maxsplit=1)[1]
        explanation = described[: described.index("(type:")]
        assert len(explanation.split()) > 2, name
        if get_origin(hint) is Literal:
            assert "{" + ",".join(get_args(hint)) + "}" in explanation, name


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_torchrun_trains_resumes_and_exports_what_one_process_does(
    checkpoint: Path, tmp_path: Path, parallel: str
) -> None:
    """Two ranks, stopped after two steps and started again, against one process that was never stopped."""
    data = data_folder(tmp_path / "data")
    file = tmp_path / "run.yaml"
    settings = {
        "model": {"name": str(checkpoint), "bf16": False},
        "data": {"train_data": str(data), "query_max_len": 64, "passage_max_len": 64, "generative_max_len": 64},
        "batch": {"embedding_batch_size": 4, "generative_batch_size": 3, "chunk_tokens": 128},
        "optimizer": {"lr": 1e-3},
        "logging": {"save_steps": 2},
    }
    file.write_text(yaml.safe_dump(settings))
    common = ["--config", str(file)]
    grit_train([*common, "--steps", "4", "--output_dir", str(tmp_path / "one")])

    def ranks(*more: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            + [
                "-m",
                "python_model.train",
                *common,
                "--parallel.strategy",
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


def test_only_the_trainer_and_what_starts_it_take_all_settings() -> None:
    """Every other function takes the groups that it needs."""
    package = Path(python_model.__file__).parent
    functions = [
        (file, node)
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    takers = {
        f"{file.relative_to(package)}: {function.name}"
        for file, function in functions
        for argument in ast.walk(function.args)
        if isinstance(argument, ast.arg) and argument.annotation and "TrainConfig" in ast.unparse(argument.annotation)
    }
    assert takers == {
        "commands/demo.py: run",
        "commands/train.py: run",
        "train/run.py: run",
        "train/trainer.py: __init__",
        "train/trainer.py: from_config",
    }
