"""QLoRA: the checkpoint that is written is the model that was trained."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from python_model import GritLM
from python_model.train import setup
from python_model.train.adapters import nf4
from python_model.train.trainer import Trainer
from tests.python_model.training_samples import toy_config, toy_trainer

for package in ("peft", "bitsandbytes"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

TEXTS = ["where is the river", "a city of France", "code"]


@pytest.fixture
def trainer(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """After a few steps, with adapters that have moved far; on a CPU, which the command refuses."""
    arguments = {"quantization_config": nf4(torch.float32)}
    monkeypatch.setattr(setup, "quantization_arguments", lambda config: dict(arguments))
    changes = {"lora_rank": 4, "quantization": "nf4", "lr": 1e-2, "steps": 4}
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, **changes))
    for module in trainer.grit.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would store weights in another order
            module.support_avx512bf16_for_cpu = False
    trainer.train()
    return trainer


def test_adapters_are_merged_into_weights_that_are_not_rounded_again(trainer: Trainer, checkpoint: Path) -> None:
    trained = torch.tensor(trainer.grit.eval().encode(TEXTS))
    folder = trainer.save()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    saved = GritLM(folder, device="cpu", dtype="float32")
    assert {weight.dtype for weight in saved.model.parameters()} == {torch.float32}
    error = (torch.tensor(saved.encode(TEXTS)) - trained).norm()
    moved = (torch.tensor(GritLM(checkpoint, device="cpu", dtype="float32").encode(TEXTS)) - trained).norm()
    assert error < 0.01 * trained.norm() < 0.1 * moved
