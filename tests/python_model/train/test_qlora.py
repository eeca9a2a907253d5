"""QLoRA: the checkpoint that is written is the model that was trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.train import setup
from python_model.train.adapters import nf4
from python_model.train.distributed import Ranks
from python_model.train.trainer import Trainer
from tests.python_model.training_samples import toy_config, toy_trainer

for package in ("peft", "bitsandbytes"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

TEXTS = ["where is the river", "a city of France", "code"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command refuses it there."""
    monkeypatch.setattr(setup, "quantization_arguments", lambda config: {"quantization_config": nf4(torch.float32)})


def train(checkpoint: Path, folder: Path, **changes: Any) -> Trainer:
    """A run whose adapters move far."""
    options: dict[str, Any] = {"lora_rank": 4, "quantization": "nf4", "lr": 1e-2, "schedule": "constant", "steps": 4}
    trainer = toy_trainer(toy_config(checkpoint, folder, **options, **changes))
    for module in trainer.grit.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would store weights in another order
            module.support_avx512bf16_for_cpu = False
    trainer.train()
    return trainer


def test_adapters_are_merged_into_weights_that_are_not_rounded_again(checkpoint: Path, tmp_path: Path) -> None:
    trainer = train(checkpoint, tmp_path)
    trained = torch.tensor(trainer.grit.eval().encode(TEXTS))
    folder = trainer.save()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    saved = GritLM(folder, device="cpu", dtype="float32")
    assert {weight.dtype for weight in saved.model.parameters()} == {torch.float32}
    error = (torch.tensor(saved.encode(TEXTS)) - trained).norm()
    moved = (torch.tensor(GritLM(checkpoint, device="cpu", dtype="float32").encode(TEXTS)) - trained).norm()
    assert error < 0.01 * trained.norm() < 0.1 * moved


def test_shards_of_4_bits_are_refused_before_anything_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    config = toy_config(checkpoint, tmp_path, lora_rank=4, quantization="nf4")
    with pytest.raises(ValueError, match="^model.quantization: expected '' with parallel.strategy fsdp, .* got 'nf4'"):
        Trainer.from_config(config, Ranks(1, 2, torch.device("cpu"), group=object()))


def test_a_run_goes_on_from_its_state(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(checkpoint, tmp_path / "whole", save_steps=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "out" / "states" / "step-00000004")
    resumed = train(checkpoint, tmp_path / "cut", save_steps=2)
    assert "resuming after step 2" in capsys.readouterr().out
    for (name, mine), (_, theirs) in zip(resumed.grit.named_parameters(), whole.grit.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
