"""A run measures itself on held-out rows, keeps its best state, and stops where it no longer improves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from python_model import GritLM
from python_model.evaluation import next_token_loss
from python_model.evaluation.held_out import HeldOut, evaluate
from python_model.train import TrainConfig, Trainer, validation
from python_model.train.distributed import Ranks
from tests.python_model.training_samples import data_folder, held_out_folder, toy_config, toy_trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return held_out_folder(tmp_path / "held_out")


def _scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> dict[float, torch.Tensor]:
    """Scores in this order instead of measured ones, and a weight as it was at each."""
    left, weights = list(losses), {}

    def evaluate(model: Any, *_: Any, **__: Any) -> tuple[dict[str, Any], None]:
        score = left.pop(0)
        weights[score] = model.decoder[0].norm.weight.detach().clone()
        return {"next_token_loss": score}, None

    monkeypatch.setattr(validation, "evaluate", evaluate)
    return weights


def _killed(config: TrainConfig, step: int) -> Trainer:
    """The trainer of a run that ended in this step, before its evaluation and its state."""
    trainer = toy_trainer(config)

    def kill(done: int) -> None:
        if done == step:
            raise RuntimeError("killed")

    trainer.after_step = kill
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    return trainer


def test_held_out_texts_that_are_cut_are_counted_once(
    checkpoint: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"evaluation.data": str(folder), "evaluation.every": 1, "evaluation.max_length": 20}
    toy_trainer(toy_config(checkpoint, tmp_path, steps=2, **settings)).train()
    model, held_out = GritLM(checkpoint, device="cpu", dtype="float32"), HeldOut(folder)
    evaluate(model, held_out, max_length=20, bf16=False)
    texts = len(held_out.documents) + len(held_out.queries) + len(held_out.conversations)
    assert 0 < model.texts_cut < texts
    said = [line for line in capsys.readouterr().out.splitlines() if "longer than evaluation" in line]
    assert [line.strip() for line in said] == [
        f"evaluation: {model.texts_cut} of {texts} texts were longer than evaluation.max_length (20 tokens); "
        "what follows was not read"
    ]


def test_scores_are_logged_and_the_last_step_is_measured(
    checkpoint: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_config(checkpoint, tmp_path, steps=5, **{"evaluation.data": str(folder), "evaluation.every": 2})
    toy_trainer(config).train()
    assert "longer than evaluation" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(0 <= line["ndcg_at_10"] <= 1 and line["next_token_loss"] > 0 for line in lines)


def test_sums_shared_by_ranks_keep_their_digits(checkpoint: Path, folder: Path) -> None:
    model, held_out = GritLM(checkpoint, device="cpu", dtype="float32"), HeldOut(folder)
    scores, _ = evaluate(model, held_out, max_length=64, bf16=False)
    expected = next_token_loss(model, held_out.conversations, max_length=64)
    assert scores["next_token_loss"] == pytest.approx(expected, rel=1e-12)


def test_the_best_state_is_what_is_left_and_no_improvement_stops(
    checkpoint: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = _scripted(monkeypatch, [3.0, 2.0, 2.5, 2.2, 1.0])
    settings = {"evaluation.data": str(folder), "evaluation.every": 1, "evaluation.metric": "next_token_loss"}
    config = toy_config(checkpoint, tmp_path, steps=9, lr=1e-2, save_steps=1, **settings, **{"evaluation.patience": 2})
    trainer = toy_trainer(config)
    records = trainer.train()
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert not torch.equal(weights[2.0], weights[2.2])
    assert torch.equal(trainer.grit.decoder[0].norm.weight, weights[2.0])
    assert [state.name for state in (tmp_path / "out" / "best").iterdir()] == ["step-00000002"]
    # the same command finds the run finished
    again = toy_trainer(config)
    assert len(again.train()) == 4
    assert torch.equal(again.grit.decoder[0].norm.weight, weights[2.0])


def test_a_best_state_later_than_the_state_that_a_run_resumes_from_stays(
    checkpoint: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 3, its best, the run goes on from step 2; repeated, step 3 would come out otherwise, as on GPUs."""
    weights = _scripted(monkeypatch, [3.0, 2.5, 1.0, 7.0, 2.0])
    settings = {"evaluation.data": str(folder), "evaluation.every": 1, "evaluation.metric": "next_token_loss"}
    config = toy_config(checkpoint, tmp_path, steps=4, lr=1e-2, save_steps=2, **settings)
    trainer = _killed(config, 4)
    assert trainer.checkpointer.latest() == tmp_path / "out" / "states" / "step-00000002"
    again = toy_trainer(config)
    again.train()
    lines = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["next_token_loss"]) for line in lines] == [(1, 3.0), (2, 2.5), (3, 1.0), (4, 7.0)]
    assert [state.name for state in (tmp_path / "out" / "best").iterdir()] == ["step-00000003"]
    assert torch.equal(again.grit.decoder[0].norm.weight, weights[1.0])


def test_a_best_state_holds_what_was_measured_and_an_earlier_versions_is_read(
    checkpoint: Path, tmp_path: Path, folder: Path
) -> None:
    """Weights and temperature, no moments; earlier versions wrote a whole state."""
    settings = {"evaluation.data": str(folder), "evaluation.every": 2, "losses.learn_temperature": True}
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=2, save_steps=2, lr=1e-2, **settings))
    trainer.train()
    (best,) = (tmp_path / "out" / "best").iterdir()
    names = FileSystemReader(best).read_metadata().state_dict_metadata
    assert [name for name in names if not name.startswith("model.")] == ["temperature.log_temperature"]
    assert {f"model.{name}" for name, _ in trainer.model.named_parameters()} < set(names)
    expected = trainer.grit.decoder[0].norm.weight.detach().clone()
    shutil.rmtree(best)
    shutil.copytree(tmp_path / "out" / "states" / best.name, best)
    again = toy_trainer(trainer.config)
    assert not torch.equal(again.grit.decoder[0].norm.weight, expected)
    again._best.load(best, again.optimizers.weights)
    assert torch.equal(again.grit.decoder[0].norm.weight, expected)
    assert again.optimizers.temperature == trainer.optimizers.temperature != 0.02


def test_a_best_state_of_another_run_keeps_no_evaluation(checkpoint: Path, tmp_path: Path, folder: Path) -> None:
    settings = {"evaluation.data": str(folder), "evaluation.every": 2}
    config = toy_config(checkpoint, tmp_path, steps=4, save_steps=1, **settings)
    _killed(config, 3)
    best, file = tmp_path / "out" / "best" / "step-00000002", tmp_path / "out" / "evaluation.jsonl"
    best.rename(best.with_name("step-00000009"))
    file.write_text(file.read_text() + json.dumps({"step": 3, "ndcg_at_10": 2.0}) + "\n")
    toy_trainer(config).train()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 4]


@pytest.mark.parametrize("metric", sorted(validation.HIGHER_IS_BETTER))
def test_the_best_evaluation_has_the_highest_score_or_the_lowest_loss(tmp_path: Path, metric: str) -> None:
    """Of equal ones it is the earliest."""
    values = [0.3, 0.5, 0.5, 0.2, 0.2]
    lines = [json.dumps({"step": step, metric: value}) + "\n" for step, value in enumerate(values, 1)]
    (tmp_path / "evaluation.jsonl").write_text("".join(lines))
    found = validation.best_scores(tmp_path / "evaluation.jsonl", metric)
    assert found is not None and found["step"] == (4 if metric == "next_token_loss" else 2)
    (tmp_path / "evaluation.jsonl").write_text("")
    assert validation.best_scores(tmp_path / "evaluation.jsonl", metric) is None


def test_dropout_is_off_while_a_run_is_measured_and_on_in_every_step(
    checkpoint: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool, bool]] = []

    def evaluate(model: Any, *_: Any, **__: Any) -> tuple[dict[str, Any], None]:
        seen.append(("measured", model.decoder[0].training, model.is_inference))
        return {"next_token_loss": 1.0}, None

    monkeypatch.setattr(validation, "evaluate", evaluate)
    settings = {"evaluation.data": str(folder), "evaluation.every": 1, "evaluation.metric": "next_token_loss"}
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=2, mode="generative", **settings))
    trainer.after_step = lambda done: trainer.model.eval() and None
    step, grit = trainer.step, trainer.grit
    monkeypatch.setattr(
        trainer, "step", lambda *g: seen.append(("step", grit.decoder[0].training, grit.is_inference)) or step(*g)
    )
    trainer.train()
    assert seen == [("step", True, False), ("measured", False, True)] * 2


def test_a_metric_that_the_run_does_not_give_is_refused_before_a_model_is_loaded(
    checkpoint: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"evaluation.data": str(folder), "evaluation.every": 1, "evaluation.metric": "next_token_loss"}
    data = str(data_folder(tmp_path / "data"))
    config = toy_config(checkpoint, tmp_path, steps=2, mode="embedding", train_data=data, **settings)
    message = "evaluation.metric: expected one available for this mode and data .*ndcg_at_10.*, got 'next_token_loss'"
    with pytest.raises(ValueError, match=message):
        toy_trainer(config).train()
    assert not (tmp_path / "out" / "evaluation.jsonl").exists()
    monkeypatch.setattr("python_model.train.trainer.load_model", None)
    with pytest.raises(ValueError, match=message):
        Trainer.from_config(config, Ranks(0, 1, torch.device("cpu")))
    with pytest.raises(FileNotFoundError, match=r"^evaluation\.data: there is no folder nowhere"):
        toy_config(checkpoint, tmp_path, **{"evaluation.data": "nowhere"})
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"^evaluation\.data: there is no corpus\.jsonl in "):
        Trainer.from_config(config, Ranks(0, 1, torch.device("cpu")))


def test_a_run_on_conversations_alone_is_measured_by_its_loss(checkpoint: Path, tmp_path: Path, folder: Path) -> None:
    for name in ("corpus.jsonl", "test/embedding.jsonl"):
        (folder / name).unlink()
    settings: dict[str, Any] = {"evaluation.data": str(folder), "evaluation.every": 1}
    config = toy_config(checkpoint, tmp_path, steps=2, mode="generative", **settings)
    with pytest.raises(ValueError, match=r"evaluation.metric: .*\(\['next_token_loss'\]\), got 'ndcg_at_10'"):
        toy_trainer(config).train()
    settings["evaluation.metric"] = "next_token_loss"
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=2, mode="generative", **settings))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()]
    expected = next_token_loss(trainer.grit, HeldOut(folder).conversations, max_length=512)
    assert [line["ndcg_at_10"] for line in lines] == [None, None]
    assert min(line["next_token_loss"] for line in lines) == pytest.approx(expected, rel=1e-6)
    assert f"{expected:.4f}" in (trainer.save() / "README.md").read_text()


def test_a_run_that_starts_over_has_no_best_state_of_the_earlier_one(
    checkpoint: Path, tmp_path: Path, folder: Path
) -> None:
    settings = {"evaluation.data": str(folder), "evaluation.every": 2, "resume": False}
    config = toy_config(checkpoint, tmp_path, steps=2, **settings)
    earlier = Path(config.output_dir) / "best" / "step-00000099"
    earlier.mkdir(parents=True)
    (earlier / "state.json").write_text("{}")
    toy_trainer(config).train()
    assert [state.name for state in earlier.parent.iterdir()] == ["step-00000002"]
