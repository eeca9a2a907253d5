"""Training runs learn, export in every variant, and stop at what would ruin the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.train import Trainer
from python_model.train import trainer as trainer_module
from python_model.train.distributed import Ranks
from python_model.train.trackers import StepLog
from python_model.train.trainer import WINDOW
from tests.python_model import training_samples
from tests.python_model.training_samples import LENGTH, ToyStream, data_folder, toy_config, toy_model, toy_trainer


def test_toy_run_learns_both_objectives(checkpoint: Path, tmp_path: Path) -> None:
    config = toy_config(checkpoint, tmp_path, steps=30, lr=3e-3)
    records = toy_trainer(config).train()
    for kind, share in (("contrastive_loss", 0.85), ("generative_loss", 0.5)):
        first, last = (sum(r[kind] for r in chosen) / 5 for chosen in (records[:5], records[-5:]))
        assert last < share * first, kind
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines == records and [line["step"] for line in lines] == list(range(1, 31))
    assert all(line["tokens_per_second"] > 0 and line["memory_gib"] > 0 for line in lines)
    assert all(line["tflops"] > 0 and line["mfu"] > 0 for line in lines)


@pytest.mark.parametrize("length", [28, 64])
def test_a_run_says_how_many_texts_it_cut(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], length: int
) -> None:
    monkeypatch.setattr(training_samples, "LENGTH", length)
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=2))
    read = [s for step in trainer.stream.steps(0, 2) for s in (*step.queries, *step.passages, *step.conversations)]
    cut = sum(sample.truncated for sample in read)
    trainer.train()
    line = f"{cut} of {len(read)} texts were longer than data.query_max_len"
    assert (line in capsys.readouterr().out) == (0 < cut < len(read)) == (length == 28)


@pytest.mark.parametrize("mode", ["embedding", "generative"])
def test_single_objective_modes_skip_the_other_loss(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    records = toy_trainer(toy_config(checkpoint, tmp_path, steps=2, mode=mode)).train()
    assert (records[0]["contrastive_loss"] is None) == (mode == "generative")
    assert (records[0]["generative_loss"] is None) == (mode == "embedding")
    assert (records[0]["contrastive_grad_norm"] is None) == (mode == "generative")
    assert (records[0]["generative_grad_norm"] is None) == (mode == "embedding")


@pytest.mark.parametrize(("mode", "task"), [("embedding", "feature-extraction"), ("unified", "text-generation")])
def test_the_card_says_what_the_trained_model_does(checkpoint: Path, tmp_path: Path, mode: str, task: str) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1, mode=mode))
    card = trainer._card(trainer.grit)
    assert f"pipeline_tag: {task}" in card
    assert ("grit generate" in card) == (mode == "unified")


@pytest.mark.parametrize(
    "changes",
    [
        {"attn": "cccc", "pooling_method": "weightedmean"},
        {"attn": "cccc", "pooling_method": "lasttoken", "embed_eos": "</e>"},
        {"attn": "cbcc"},
        {"attn": "bbbc"},
        {"attn": "bbil"},
        {"projection": 16},
        {"bf16": True},
        {"lora_rank": 4},
    ],
    ids=str,
)
def test_every_variant_trains_exports_and_loads(checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also in plain transformers: the weights of the export are those that were trained."""
    from transformers import AutoModelForCausalLM

    config = toy_config(checkpoint, tmp_path, steps=3, lr=1e-2, **changes)
    trainer = toy_trainer(config)
    before = trainer.grit.encode("a river")
    records = trainer.train()
    assert records[-1]["gradient_norm"] > 0
    trained = trainer.grit.encode("a river")
    folder = trainer.save()
    loaded = GritLM(folder, device="cpu")
    assert loaded.settings == trainer.grit.settings
    again = loaded.encode("a river")
    assert abs(again - trained).max() < 1e-5 < abs(again - before).max()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    state = loaded.model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in plain.state_dict().items())


@pytest.mark.parametrize("mode", ["unified", "embedding"])  # the latter has no head
def test_adapters_train_only_themselves_on_every_linear_layer(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1, lora_rank=4, mode=mode))
    trained = [name for name, p in trainer.grit.model.named_parameters() if p.requires_grad]
    layers = {name.split(".lora_")[0].split(".")[-1] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name in trained)


def test_a_non_finite_loss_stops_and_saves_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=2))
    with torch.no_grad():
        trainer.grit.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss: got nan .*bad_batch\.json"):
        trainer.train()
    saved = json.loads((tmp_path / "out" / "bad_batch.json").read_text())
    assert len(saved["queries"]) == 4 and len(saved["passages"]) == 8 and len(saved["conversations"]) == 2
    assert saved["query_origins"][0] == "toy:0"


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1))
    trainer.grit.decoder[0].norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = [weight.clone() for weight in trainer.grit.parameters()]
    with pytest.raises(FloatingPointError, match=r"its gradient has norm nan.*bad_batch\.json"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.grit.parameters()))


def test_all_ranks_of_a_resumed_run_compare_a_loss_with_the_same_ones(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first rank has the log; if only it stopped, the others would wait for it."""
    trainer = toy_trainer(toy_config(checkpoint, tmp_path))
    log = StepLog(tmp_path / "log.jsonl")
    for step in range(1, WINDOW + 10):
        log.log(step, {"loss": step / 2})
    sent: list[list[float]] = []
    monkeypatch.setattr(Ranks, "all_values", lambda _, values: (sent.append(list(values)), torch.tensor([values]))[1])
    first = trainer._earlier_losses(log)
    log.close()
    assert first == [step / 2 for step in range(10, WINDOW + 10)]
    monkeypatch.setattr(Ranks, "all_values", lambda _, values: torch.tensor([sent.pop(0), values]))
    assert trainer._earlier_losses(None) == first


def test_an_exploding_loss_stops_and_saves_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    config = toy_config(checkpoint, tmp_path, steps=40, lr=50.0, warmup_ratio=0.5, exploding_loss=3.0)
    with pytest.raises(FloatingPointError, match=r"logging.exploding_loss=3\.0|loss: got (nan|inf)"):
        toy_trainer(config).train()
    assert (tmp_path / "out" / "bad_batch.json").exists()


def test_a_loss_explodes_beyond_the_limit_above_the_mean_of_those_before_it(checkpoint: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, exploding_loss=3.0))
    samples = trainer.stream[0]  # type: ignore[index]
    before = [1.0, 2.0, 3.0, 2.0, 2.0]
    for harmless in ([*before, 5.0], [*before[1:], 9.0], [9.0]):  # at the limit, and too few to compare with
        assert trainer._check_explosion(harmless, samples) == harmless
    message = (
        r"loss: got 5\.5, .*exploding_loss=3\.0 above the mean of the last 5 steps \(2\); its samples are in .*json"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer._check_explosion([*before, 5.5], samples)
    trainer.config.logging.exploding_loss = 0.0
    assert trainer._check_explosion([*before, 1e9], samples)[-1] == 1e9


def test_a_loss_is_compared_with_those_of_the_window_before_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "WINDOW", 2)
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=5, mode="generative"))
    compared: list[list[float]] = []
    monkeypatch.setattr(trainer, "_check_explosion", lambda losses, _: compared.append(losses) or losses)
    losses = [record["loss"] for record in trainer.train()]
    assert compared == [losses[max(0, n - 2) : n + 1] for n in range(5)]


def test_each_pass_over_a_chunk_draws_its_own_random_numbers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the run's seed, the step, the rank and the chunk; only the two passes over the same chunk draw alike."""
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, mode="embedding", chunk_tokens=2 * LENGTH))
    drawn: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", drawn.append)
    seen: list[int] = []
    for seed in (0, 1):
        for step in (0, 1):
            for rank in (0, 1):
                drawn.clear()
                trainer.config.seed, trainer.gradients.ranks = seed, Ranks(rank, 1, torch.device("cpu"))
                chunks = trainer.step(trainer.stream[step], step)["chunks"]  # type: ignore[index]
                assert len(drawn) == 2 * chunks > 2 and drawn[:chunks] == drawn[chunks:]
                seen += drawn[:chunks]
    assert len(set(seen)) == len(seen)


def test_the_seed_of_a_run_chooses_its_rows_and_its_new_weights(checkpoint: Path, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data")
    found = []
    for seed in (0, 1, 1):
        config = toy_config(checkpoint, tmp_path, train_data=str(data), seed=seed, projection=8)
        trainer = Trainer.from_config(config, Ranks(0, 1, torch.device("cpu")))
        samples = trainer.stream[0]  # type: ignore[index]
        assert trainer.grit.projection is not None
        weights = [weight.detach() for weight in trainer.grit.projection.parameters() if weight.ndim == 2]
        found.append((samples.query_origins, [s.input_ids for s in samples.passages], weights))
    assert found[0][0] != found[1][0] and found[1][:2] != found[0][:2]
    assert found[1][:1] == found[2][:1] and found[1][1] == found[2][1]
    assert all(map(torch.equal, found[1][2], found[2][2])) and not any(map(torch.equal, found[0][2], found[1][2]))


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_the_steps_of_a_deterministic_run_are_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1, mode="generative", deterministic=deterministic))
    seen: list[bool] = []
    step = trainer.step
    monkeypatch.setattr(
        trainer, "step", lambda *given: seen.append(torch.are_deterministic_algorithms_enabled()) or step(*given)
    )
    trainer.train()
    assert seen == [deterministic] and not torch.are_deterministic_algorithms_enabled()


def test_every_rank_needs_a_query(checkpoint: Path, tmp_path: Path) -> None:
    config = toy_config(checkpoint, tmp_path, embedding_batch_size=4)
    model = toy_model(config)
    stream = ToyStream(model.tokenizer, 4, 2)
    Trainer(model, config, stream, Ranks(0, 4, torch.device("cpu")))
    with pytest.raises(ValueError, match="expected at least one query for each of the 5 ranks, got 4"):
        Trainer(model, config, stream, Ranks(0, 5, torch.device("cpu")))
