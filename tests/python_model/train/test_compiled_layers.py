"""Layers under torch.compile: graphs without breaks that layers and lengths share, and the gradients of the plain run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import grit_kernels as gk
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel
from python_model.train.setup import compile_layers, recompute_activations
from python_model.train.step import StepGradients, plan_step
from tests.python_model.training_samples import LENGTH, ToyStream, figures, toy_config, toy_model, toy_trainer

ALONE = Ranks(0, 1, torch.device("cpu"))


def _gradients(config: Any, step: int, *, backend: Any = None, exact: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of a step; ``exact``: in float64, by the reference."""
    model = toy_model(config)
    if exact:
        model.model.double()
    else:
        recompute_activations(model, config.model)
        compile_layers(model, config.model, backend)
    training = TrainingModel(model)
    training.train()
    samples = ToyStream(model.tokenizer, 4, 2)[step]
    texts = (samples.queries, samples.passages, samples.conversations)
    batch = plan_step(*texts, None, config.batch, config.losses, ALONE)
    with gk.backend("reference") if exact else gk.backend("cpu"):
        StepGradients(training, config.losses, ALONE, bf16=config.model.bf16 and not exact)(batch, seed=0)
    return {name: p.grad.double() for name, p in training.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("checkpointing", "bf16"), [(False, True), (True, False), ("selective", True)])
def test_compiled_layers_give_gradients_as_exact_as_plain_ones(
    checkpoint: Path, tmp_path: Path, checkpointing: Any, bf16: bool
) -> None:
    """At most twice the error of the plain run, against float64."""
    torch._dynamo.reset()
    options = {"chunk_tokens": 2 * LENGTH, "bf16": bf16, "gradient_checkpointing": checkpointing}
    plain, compiled = (toy_config(checkpoint, tmp_path, **options, compile=on) for on in (False, True))
    exact = _gradients(plain, 0, exact=True)
    eager, found = _gradients(plain, 0), _gradients(compiled, 0, backend="aot_eager")
    assert found.keys() == exact.keys()

    def error(grads: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(grads[name] - exact[name]).flatten() for name in exact]).norm())

    assert 0 < error(found) <= 2 * error(eager)


def test_compiled_layers_keep_what_the_model_was_patched_with(checkpoint: Path, tmp_path: Path) -> None:
    config = toy_config(checkpoint, tmp_path, compile=True)
    model = toy_model(config)
    gk.patch(model.model, packing=False, deterministic=False)
    before = gk.hf.patch_options(model.model)
    assert before is not None
    compile_layers(model, config.model, "eager")
    assert gk.hf.patch_options(model.model) == {**before, "fuse": False}


def test_layers_and_lengths_share_their_graphs(checkpoint: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, chunk_tokens=2 * LENGTH))
    compile_layers(trainer.grit, toy_config(checkpoint, tmp_path, compile=True).model, counter)
    for step in range(4):
        trainer.step(trainer.stream[step], step)  # type: ignore[index]
    assert 0 < counter.frame_count <= 6  # with and without gradients, one sample and several


@pytest.mark.slow
def test_a_run_compiled_by_inductor_is_the_plain_run(checkpoint: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    records = []
    for on in (False, True):
        config = toy_config(checkpoint, tmp_path / str(on), steps=3, chunk_tokens=2 * LENGTH, compile=on)
        trainer = toy_trainer(config)
        records.append(figures(trainer.train()))
        files = {path.name for path in trainer.save().iterdir()}
        assert "model.safetensors" in files
    for plain, compiled in zip(*records, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4)
