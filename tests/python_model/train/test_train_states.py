"""Which runs a state may be resumed by: those with its settings, data and model, of any version that can be read."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from python_model.train.checkpointer import VERSION
from tests.python_model.training_samples import LENGTH, toy_config, toy_trainer

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def test_a_state_of_another_run_is_refused_by_the_setting_that_differs(checkpoint: Path, tmp_path: Path) -> None:
    toy_trainer(toy_config(checkpoint, tmp_path, steps=2, save_steps=1)).train()
    with pytest.raises(ValueError, match="optimizer.lr: expected .*, got 0.5"):
        toy_trainer(toy_config(checkpoint, tmp_path, steps=2, save_steps=1, lr=0.5)).train()
    # what only changes speed and memory may change
    toy_trainer(toy_config(checkpoint, tmp_path, steps=2, save_steps=1, chunk_tokens=LENGTH)).train()


@pytest.mark.parametrize(
    ("name", "default", "given"),
    [("losses.matryoshka_dims", [], [8]), ("data.positives", "draw", "each"), ("grit.truncate_dim", None, 8)],
)
def test_a_setting_that_a_state_does_not_know_had_its_default(
    checkpoint: Path, tmp_path: Path, name: str, default: Any, given: Any
) -> None:
    toy_trainer(toy_config(checkpoint, tmp_path, steps=1, save_steps=1)).train()
    file = tmp_path / "out" / "states" / "step-00000001" / "state.json"
    content = json.loads(file.read_text())
    group, _, field = name.partition(".")
    assert content["config"][group].pop(field) == default
    file.write_text(json.dumps(content))
    message = rf"{name}: expected {re.escape(repr(default))}, with which .* was written, got {re.escape(repr(given))}"
    with pytest.raises(ValueError, match=message):
        toy_trainer(toy_config(checkpoint, tmp_path, steps=1, save_steps=1, **{name: given})).train()
    toy_trainer(toy_config(checkpoint, tmp_path, steps=1, save_steps=1)).train()


def test_negatives_of_each_rank_alone_take_the_same_number_of_ranks(checkpoint: Path, tmp_path: Path) -> None:
    """They are a rank's share of the batch; with those of all ranks, their number does not matter."""
    alone = toy_config(checkpoint, tmp_path, steps=2, save_steps=1, **{"losses.cross_device_negatives": False})
    trainer = toy_trainer(alone)
    assert trainer.checkpointer.identity["ranks (losses.cross_device_negatives false)"] == "1"
    trainer.train()
    again = toy_trainer(alone)
    again.checkpointer.identity["ranks (losses.cross_device_negatives false)"] = "8"
    with pytest.raises(
        ValueError, match=r"ranks \(losses.cross_device_negatives false\): expected 1, .* got 8; use the"
    ):
        again.train()
    for changes in ({}, {"losses.cross_device_negatives": False, "mode": "generative"}):
        identity = toy_trainer(toy_config(checkpoint, tmp_path, steps=2, **changes)).checkpointer.identity
        assert not any(name.startswith("ranks") for name in identity)


# what version 0.1 (commit bdb9736) wrote: four steps of a toy run, and its state after two
STATE_0_1 = Path(__file__).parent / "state_0_1"
RUN_0_1: dict[str, Any] = {"steps": 4, "lora_rank": 1, "lora_targets": "layers.1.self_attn.v_proj"}
RUN_0_1["special_tokens"] = "bos"


def _state_0_1(folder: Path, **changes: Any) -> Path:
    shutil.copytree(STATE_0_1, folder / "out")
    file = folder / "out" / "states" / "step-00000002" / "state.json"
    content = json.loads(file.read_text())
    content["config"] |= changes
    file.write_text(json.dumps(content))
    return file


def test_a_run_of_version_0_1_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    _state_0_1(tmp_path)
    records = toy_trainer(toy_config(checkpoint, tmp_path, **RUN_0_1)).train()
    expected = [json.loads(line) for line in (STATE_0_1 / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for mine, theirs in zip(records, expected, strict=True):
        for name in ("loss", "contrastive_loss", "generative_loss", "gradient_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_a_state_of_version_0_1_is_refused_where_its_settings_are_gone_or_differ(
    checkpoint: Path, tmp_path: Path
) -> None:
    _state_0_1(tmp_path / "gone", plain_text=True)
    with pytest.raises(ValueError, match="trained with plain_text, which version 0.2 removed; start over"):
        toy_trainer(toy_config(checkpoint, tmp_path / "gone", **RUN_0_1)).train()
    _state_0_1(tmp_path / "other", learning_rate=0.5)
    with pytest.raises(ValueError, match="optimizer.lr: expected 0.5, with which .* was written, got 2e-05"):
        toy_trainer(toy_config(checkpoint, tmp_path / "other", **RUN_0_1)).train()


def test_a_state_of_a_newer_version_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1, save_steps=1))
    trainer.train()
    state = trainer.checkpointer.latest()
    assert state is not None
    content = json.loads((state / "state.json").read_text())
    assert content["version"] == VERSION
    (state / "state.json").write_text(json.dumps({**content, "version": VERSION + 1}))
    with pytest.raises(ValueError, match=f"expected a state of at most version {VERSION}, got {VERSION + 1}"):
        toy_trainer(toy_config(checkpoint, tmp_path, steps=1, save_steps=1)).train()


def test_a_resumed_run_goes_on_with_the_same_data_and_model_wherever_they_lie(checkpoint: Path, tmp_path: Path) -> None:
    """A moved copy goes on; other rows or weights under the same name are refused."""
    from safetensors.torch import load_file, save_file

    def run(model: Path, digest: str, steps: int) -> None:
        trainer = toy_trainer(toy_config(model, tmp_path, steps=6, save_steps=1, exploding_loss=0.0))
        trainer.checkpointer.identity["data.train_data"] = digest
        stream = trainer.stream
        trainer.stream = type("Short", (), {"steps": lambda self, start, stop: stream.steps(start, steps)})()
        trainer.train()

    run(checkpoint, "rows", 1)
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    run(moved, "rows", 2)
    with pytest.raises(
        ValueError, match="data.train_data: expected the content with which .* was written, got another"
    ):
        run(moved, "other rows", 3)
    weights = load_file(moved / "model.safetensors")
    weights = {name: weight + 0.01 if "norm" in name else weight for name, weight in weights.items()}
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.name: expected the content with which .* was written, got another"):
        run(moved, "rows", 3)
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 1] += 0.01  # one number of many
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model.name \(weights\): expected the content with which .* was written, got"
    ):
        run(moved, "rows", 3)
    states = sorted((tmp_path / "out" / "states").glob("*/state.json"))
    content = json.loads(states[-1].read_text())
    del content["identity"]["model.name (weights)"]  # as earlier versions wrote it, which knew a sample of them
    states[-1].write_text(json.dumps(content))
    run(checkpoint, "rows", 3)


def test_a_resumed_run_goes_on_with_the_same_config_and_tokenizer_only(checkpoint: Path, tmp_path: Path) -> None:
    """The same weights under another config, or beside another tokenizer, are another model."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    def run(model: Path, steps: int) -> None:
        trainer = toy_trainer(toy_config(model, tmp_path, steps=6, save_steps=1))
        stream = trainer.stream
        trainer.stream = type("Short", (), {"steps": lambda self, start, stop: stream.steps(start, steps)})()
        trainer.train()

    def changed(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    run(checkpoint, 1)
    for number, changes in enumerate(({"rms_norm_eps": 1e-3}, {"sliding_window": 7}, {"attention_dropout": 0.0})):
        folder = changed(f"config {number}", **changes)
        if "attention_dropout" in changes:
            run(folder, 2)  # what it was
            continue
        with pytest.raises(ValueError, match=r"model.name \(config\): expected the content with which .* was written"):
            run(folder, 2)
    folder = changed("tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    tokenizer.backend_tokenizer.add_tokens(["The"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model.name \(tokenizer\): expected the content with which .* was written"):
        run(folder, 3)


def test_every_setting_is_compared_or_known_to_leave_the_result_alone() -> None:
    """By hand: each setting that may differ between a run and its resumption, and why."""
    from python_model.train.checkpointer import _MEASURED, _PATHS, FREE_SETTINGS
    from python_model.train.config import TYPES

    reasons = {
        "where things are written": ("output_dir", "push_to_hub", "logging.trackers", "data.token_cache"),
        "what is done instead of training": ("dry_run", "model.architecture", "parallel.device_memory"),
        "how the same samples and gradients are computed": (
            *("model.gradient_checkpointing", "model.compile", "data.data_workers"),
            *("batch.chunk_tokens", "batch.chunking"),
            *("parallel.strategy", "parallel.shard_size", "parallel.reduce_each_chunk", "parallel.cpu_offload"),
        ),
        "when states are saved, and when a run stops": (
            *("logging.save_steps", "logging.save_total", "logging.async_save", "logging.resume"),
            *("logging.exploding_loss", "evaluation.every", "evaluation.patience"),
        ),
        "what is logged of the speed": ("logging.peak_tflops", "logging.profile_steps"),
        "content that is compared where both runs have some": ("evaluation.data",),
    }
    assert {name for names in reasons.values() for name in names} == FREE_SETTINGS
    assert {"data.train_data", "model.name"} == _PATHS
    assert not FREE_SETTINGS & (_PATHS | _MEASURED) and FREE_SETTINGS | _PATHS | _MEASURED <= set(TYPES)


def test_scores_of_other_held_out_rows_are_not_compared(checkpoint: Path, tmp_path: Path) -> None:
    """The best state is chosen by scores of the same rows and metric, before and after a resumption."""
    from tests.python_model.small_sample import write_small_sample

    held_out = write_small_sample(tmp_path / "held out", per_kind=1, passages=3)

    def run(steps: int, folder: Path = held_out, **changes: Any) -> None:
        chosen = {"evaluation.data": str(folder), "evaluation.every": 1, **changes}
        trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=6, save_steps=1, **chosen))
        stream = trainer.stream
        trainer.stream = type("Short", (), {"steps": lambda self, start, stop: stream.steps(start, steps)})()
        trainer.train()

    run(1)
    moved = tmp_path / "moved"
    shutil.copytree(held_out, moved)
    run(2, moved)
    with pytest.raises(ValueError, match="evaluation.metric: expected 'ndcg_at_10', .*got 'mrr_at_10'"):
        run(3, held_out, **{"evaluation.metric": "mrr_at_10"})
    corpus = (moved / "corpus.jsonl").read_text().splitlines(keepends=True)
    (moved / "corpus.jsonl").write_text("".join([*corpus, corpus[-1].replace('"key": "', '"key": "other ')]))
    with pytest.raises(
        ValueError, match="evaluation.data: expected the content with which .* was written, got another"
    ):
        run(3, moved)
    run(
        3, held_out, **{"evaluation.data": "", "evaluation.metric": "mrr_at_10"}
    )  # nothing is compared without evaluations


@needs_torchao
def test_8_bit_moments_are_resumed_on_as_many_shards_only(checkpoint: Path, tmp_path: Path) -> None:
    kind = {"optimizer.kind": "adamw_8bit"}
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1, save_steps=1, **kind))
    (name,) = (name for name in trainer.checkpointer.identity if name.startswith("shards"))
    trainer.checkpointer.identity[name] = "2"
    trainer.train()
    with pytest.raises(ValueError, match=r"shards of the weights \(optimizer.kind adamw_8bit\): expected 2, .*, got 1"):
        toy_trainer(toy_config(checkpoint, tmp_path, steps=1, **kind)).train()
