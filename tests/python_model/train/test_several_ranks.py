"""Whole runs on two ranks: measured while they train, saved in the background, exported from shards, as one process does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from python_model.train import Trainer
from python_model.train.distributed import Ranks, forwards_apart, move_buffers
from python_model.train.setup import load_model
from tests.python_model.training_samples import LENGTH, ToyStream, data_folder, held_out_folder, toy_config, toy_trainer
from tests.ranks import process_group

CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel": "fsdp", "projection": 16, "async_save": True, "save_steps": 2},
    "ddp": {"parallel": "ddp", "evaluation.patience": 1},
    "muon": {"parallel": "fsdp", "optimizer.kind": "muon", "lora_rank": 0},
    "adapters": {"parallel": "fsdp", "lora_rank": 4, "lora_dropout": 0.0},
}
STEPS = 3


def _options(held_out: Path, case: str) -> dict[str, Any]:
    common = {"steps": STEPS, "lr": 1e-3, "chunk_tokens": 2 * LENGTH, "evaluation.data": str(held_out)}
    return {**common, "evaluation.every": 2, "evaluation.metric": "next_token_loss", **CASES[case]}


def _rank(rank: int, world: int, folder: str, checkpoint: str) -> None:
    root = Path(folder)
    with process_group(rank, world, root / "store") as group:
        here = Ranks(rank, world, torch.device("cpu"), group)
        for case in CASES:
            config = toy_config(Path(checkpoint), root / case / "two", **_options(root / "held_out", case))
            whole = here.first or config.parallel.strategy == "ddp"
            model = load_model(
                config.model,
                here.device,
                mode=config.mode,
                settings=config.settings_given,
                seed=config.seed,
                weights=whole,
            )
            trainer = Trainer(model, config, ToyStream(model.tokenizer, 4, 2, here), here)
            trainer.train()
            trainer.save()
            if case == "fsdp":  # unequal numbers of forwards, and the shards are as they were afterwards
                with torch.no_grad(), forwards_apart(trainer.model, here):
                    trainer.grit.is_inference = True
                    vectors = [trainer.grit.encode(f"a river {n}") for n in range(1 + 2 * rank)]
                assert all(abs((vector**2).sum() - 1) < 1e-5 for vector in vectors)
                trainer.step(trainer.stream[STEPS], STEPS)  # type: ignore[index]
            del trainer, model


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    held_out_folder(root / "held_out")
    mp.spawn(_rank, (2, str(root), str(checkpoint)), nprocs=2)
    return root


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_measure_and_export_what_one_process_does(runs: Path, checkpoint: Path, case: str) -> None:
    from safetensors.torch import load_file

    alone = toy_trainer(toy_config(checkpoint, runs / case / "one", **_options(runs / "held_out", case)))
    alone.train()
    alone.save()
    one, two = (runs / case / name / "out" for name in ("one", "two"))
    # Muon makes matrices orthogonal in bfloat16, whose sums shards form in another order
    rel = 2e-3 if case == "muon" else 1e-4
    for mine, theirs in zip(_lines(two / "log.jsonl"), _lines(one / "log.jsonl"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=rel)
        assert mine["tflops"] * mine["seconds"] == pytest.approx(theirs["tflops"] * theirs["seconds"] / 2)
    measured = _lines(two / "evaluation.jsonl")
    assert [record["step"] for record in measured] == [2, 3]
    for mine, theirs in zip(measured, _lines(one / "evaluation.jsonl"), strict=True):
        assert (mine["queries"], mine["documents"]) == (theirs["queries"], theirs["documents"]) == (8, 8)
        assert mine["next_token_loss"] == pytest.approx(theirs["next_token_loss"], rel=rel)
        assert mine["ndcg_at_10"] == pytest.approx(theirs["ndcg_at_10"], abs=0.05)
    files = {file.name for file in (one / "checkpoint").iterdir()}
    assert files == {file.name for file in (two / "checkpoint").iterdir()}
    for name in sorted(file for file in files if file.endswith(".safetensors")):
        mine, theirs = load_file(two / "checkpoint" / name), load_file(one / "checkpoint" / name)
        assert mine.keys() == theirs.keys()
        for key, weight in theirs.items():
            # steps have the size of the rate where a gradient is near 0
            assert (mine[key] - weight).abs().max() <= 2 * STEPS * 1e-3, key
            assert (mine[key] - weight).norm() <= (0.02 if case == "muon" else 1e-3) * weight.norm(), key


def test_a_state_written_in_the_background_is_whole(runs: Path, checkpoint: Path) -> None:
    states = runs / "fsdp" / "two" / "out" / "states"
    assert sorted(path.name for path in states.iterdir()) == ["step-00000002", "step-00000003"]
    assert all((state / ".metadata").is_file() and (state / "state.json").is_file() for state in states.iterdir())


@pytest.mark.parametrize(
    ("rank", "strategy", "device", "weights"),
    [(0, "fsdp", "cpu", True), (1, "fsdp", "cpu", False), (1, "ddp", "cuda:3", True)],
)
def test_no_device_holds_all_weights_of_a_sharded_model(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    strategy: str,
    device: str,
    weights: bool,
) -> None:
    """They go through CPU memory, from which FSDP moves one layer after another."""

    class Loaded(Exception):
        pass

    def load(config: Any, where: torch.device, **options: Any) -> None:
        raise Loaded(str(where), options["weights"])

    monkeypatch.setattr("python_model.train.trainer.load_model", load)
    config = toy_config(
        checkpoint, tmp_path, parallel=strategy, **{"data.train_data": str(data_folder(tmp_path / "data"))}
    )
    with pytest.raises(Loaded) as found:
        Trainer.from_config(config, Ranks(rank, 2, torch.device("cuda", 3), object()))
    assert found.value.args == (device, weights)


def test_buffers_lie_on_the_device_although_parameters_are_offloaded() -> None:
    """A rank that has just made room for its shards on the CPU, and the one whose buffers FSDP moved, broadcast alike."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    model[0].register_buffer("nothing", None)
    move_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"} and len(list(model.buffers())) == 6
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
