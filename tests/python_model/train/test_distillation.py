"""Learning a teacher's scores: the loss against its formula, and that a run follows the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from python_model.model.chunks import build_chunk
from python_model.model.losses import distillation_losses
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel
from python_model.train.step import StepGradients, plan_step
from tests.python_model.training_samples import ToyStream, toy_config, toy_model, toy_trainer


def test_the_loss_is_the_divergence_of_the_two_softmaxes() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    teacher[3] = torch.nan
    losses = distillation_losses(student, teacher)
    p, q = teacher.softmax(dim=1), student.detach().softmax(dim=1)
    expected = (p * (p / q).log()).sum(dim=1)
    expected[3] = 0
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    wanted = q - p
    wanted[3] = 0
    assert student.grad is not None and torch.isfinite(student.grad).all()
    torch.testing.assert_close(student.grad, wanted, rtol=1e-5, atol=1e-6)
    assert distillation_losses(teacher[:3] + 2.0, teacher[:3]).abs().max() < 1e-6


def test_a_steps_loss_is_the_mean_over_the_queries_with_scores(checkpoint: Path, tmp_path: Path) -> None:
    """The third of four queries has a score of one passage only."""
    changes = {"distillation_weight": 1.0, "teacher_temperature": 2.0}
    config = toy_config(checkpoint, tmp_path, mode="embedding", **changes)
    model, alone = TrainingModel(toy_model(config)), Ranks(0, 1, torch.device("cpu"))
    samples = ToyStream(model.grit.tokenizer, 4, 0)[0]
    texts = samples.queries, samples.passages
    batch = plan_step(*texts, [], None, config.batch, config.losses, alone, scores=samples.passage_scores)
    found = StepGradients(model, config.losses, alone, bf16=False)(batch, seed=0).distillation
    with torch.no_grad():
        vectors, _, _ = model(build_chunk([*samples.queries, *samples.passages], []))
    losses = []
    for query in (0, 1, 3):
        group = slice(2 * query, 2 * query + 2)
        p = (torch.tensor(samples.passage_scores[group]) / 2.0).softmax(dim=0)
        q = (vectors[4:][group] @ vectors[query] / config.losses.temperature).softmax(dim=0)
        losses.append((p * (p / q).log()).sum())
    assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_a_run_on_scores_alone_follows_the_teacher(checkpoint: Path, tmp_path: Path) -> None:
    changes = {"contrastive_weight": 0.0, "distillation_weight": 1.0, "mode": "embedding", "lr": 3e-3}
    records = toy_trainer(toy_config(checkpoint, tmp_path, steps=25, **changes)).train()
    first, last = (sum(r["distillation_loss"] for r in chosen) / 5 for chosen in (records[:5], records[-5:]))
    assert last < 0.7 * first
    assert all(r["loss"] == pytest.approx(r["distillation_loss"]) for r in records)


def test_without_a_weight_scores_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    (record,) = toy_trainer(toy_config(checkpoint, tmp_path, steps=1)).train()
    assert "distillation_loss" not in record


def test_scores_need_passages_to_compare(checkpoint: Path, tmp_path: Path) -> None:
    """The softmax over one passage is 1 whatever its score: a run would learn nothing from the teacher."""
    alone = {"distillation_weight": 1.0, "train_group_size": 1}
    with pytest.raises(ValueError, match="data.train_group_size: expected at least 2 passages to compare .*, got 1"):
        toy_config(checkpoint, tmp_path, **alone)
    toy_config(checkpoint, tmp_path, mode="generative", **alone)
