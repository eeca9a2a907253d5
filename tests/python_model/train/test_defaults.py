"""The defaults of a run's settings: a change to one changes every run that does not name it, so it is made here as well."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from python_model.data import sample_dir
from python_model.settings import GritSettings
from python_model.train.config import TrainConfig

DEFAULTS = {
    "mode": "unified",
    "steps": 40,
    "output_dir": "grit_output",
    "seed": 0,
    "deterministic": False,
    "push_to_hub": "",
    "dry_run": False,
    "model": {
        "name": "smollm2-135m",
        "architecture": "",
        "bf16": None,
        "gradient_checkpointing": False,
        "compile": False,
        "lora_rank": 0,
        "lora_alpha": 64,
        "lora_dropout": 0.1,
        "lora_targets": "all-linear",
        "quantization": "",
    },
    "data": {
        "train_group_size": 2,
        "query_max_len": 256,
        "passage_max_len": 2048,
        "generative_max_len": 2048,
        "causal_documents": 0.0,
        "positives": "draw",
        "same_dataset": True,
        "dataset_weights": {},
        "max_rows_per_dataset": 0,
        "max_left_out": 0.1,
        "few_shot": 0.0,
        "few_shot_style": "retrieval",
        "data_workers": 0,
        "token_cache": "",
    },
    "batch": {"embedding_batch_size": 12, "generative_batch_size": 3, "chunk_tokens": 0, "chunking": "tokens"},
    "optimizer": {
        "kind": "adamw",
        "lr": 2e-5,
        "warmup_ratio": 0.03,
        "schedule": "linear",
        "decay_ratio": 0.2,
        "weight_decay": 0.0,
        "objective_grad_norm": 0.0,
        "max_grad_norm": 1.0,
    },
    "losses": {
        "temperature": 0.02,
        "learn_temperature": False,
        "matryoshka_dims": [],
        "contrastive_weight": 1.0,
        "distillation_weight": 0.0,
        "teacher_temperature": 1.0,
        "generative_weight": 1.0,
        "router_loss_weight": None,
        "in_batch_negatives": True,
        "cross_device_negatives": True,
        "symmetric": False,
        "mask_duplicates": True,
        "generative_loss": "mixed",
        "generative_group": 0,
    },
    "parallel": {
        "strategy": "fsdp",
        "shard_size": 0,
        "reduce_each_chunk": False,
        "cpu_offload": False,
        "device_memory": 80.0,
    },
    "evaluation": {"data": "", "every": 100, "metric": "ndcg_at_10", "patience": 0, "max_length": 512},
    "logging": {
        "save_steps": 0,
        "save_total": 2,
        "async_save": False,
        "resume": True,
        "trackers": [],
        "exploding_loss": 20.0,
        "peak_tflops": 0.0,
        "profile_steps": 0,
    },
}


def test_a_setting_that_is_not_named_has_its_default() -> None:
    found = asdict(TrainConfig.from_dict({"data.train_data": str(sample_dir())}))
    given, found["data"]["train_data"] = found["data"]["train_data"], None
    assert given == str(sample_dir())
    wanted = {**DEFAULTS, "data": {"train_data": None, **DEFAULTS["data"]}}  # type: ignore[dict-item]
    assert found.pop("grit") == {field.name: None for field in fields(GritSettings)}, "those of the checkpoint"
    assert found == wanted


DATA = {"data.train_data": str(sample_dir())}
LENGTHS = {"data.query_max_len": 10, "data.passage_max_len": 20, "data.generative_max_len": 30}
TOGETHER: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    # what goes together to the last value, what no longer does, and what the error says
    "a chunk holds the longest sample": (
        [{**LENGTHS, "batch.chunk_tokens": n} for n in (0, 30, 31)],
        {**LENGTHS, "batch.chunk_tokens": 29},
        r"batch.chunk_tokens: expected 0 or at least the longest sample \(30 tokens\), got 29",
    ),
    "a chunk of texts holds the longest text": (
        [{**LENGTHS, "mode": "embedding", "batch.chunk_tokens": 20}],
        {**LENGTHS, "mode": "embedding", "batch.chunk_tokens": 19},
        r"batch.chunk_tokens: expected 0 or at least the longest sample \(20 tokens\), got 19",
    ),
    "a chunk of conversations holds the longest one": (
        [{**LENGTHS, "mode": "generative", "data.passage_max_len": 99, "batch.chunk_tokens": 30}],
        {**LENGTHS, "data.passage_max_len": 99, "batch.chunk_tokens": 30},
        r"batch.chunk_tokens: expected 0 or at least the longest sample \(99 tokens\), got 30",
    ),
    "a queries' chunk": (
        [{**LENGTHS, "mode": "embedding", "data.query_max_len": 50, "batch.chunk_tokens": 50}],
        {**LENGTHS, "mode": "embedding", "data.query_max_len": 50, "batch.chunk_tokens": 49},
        r"batch.chunk_tokens: expected 0 or at least the longest sample \(50 tokens\), got 49",
    ),
    "the paper's split has chunks of its own": (
        [{"batch.chunking": "triplet"}],
        {"batch.chunking": "triplet", "batch.chunk_tokens": 4096},
        "batch.chunk_tokens: expected 0 with chunking 'triplet', got 4096",
    ),
    "groups of conversations divide a step": (
        [
            {"batch.generative_batch_size": 6, "losses.generative_group": 3},
            {"batch.generative_batch_size": 5, "losses.generative_group": 3, "mode": "embedding"},
        ],
        {"batch.generative_batch_size": 5, "losses.generative_group": 3},
        r"losses.generative_group: expected a divisor of batch.generative_batch_size \(5\), got 3",
    ),
    "groups are those of the mixed loss": (
        [{"losses.generative_loss": "token", "losses.generative_group": 0}],
        {"losses.generative_loss": "token", "losses.generative_group": 1},
        "losses.generative_group: expected 0 with generative_loss 'token', got 1",
    ),
    "without the batch's negatives a query has its own": (
        [
            {"losses.in_batch_negatives": False, "data.train_group_size": 2},
            {"data.train_group_size": 1},
            {"losses.in_batch_negatives": False, "data.train_group_size": 1, "mode": "generative"},
        ],
        {"losses.in_batch_negatives": False, "data.train_group_size": 1},
        "data.train_group_size: expected hard negatives .* got 1",
    ),
    "frozen weights need adapters": (
        [{"model.quantization": "nf4", "model.lora_rank": 1}],
        {"model.quantization": "nf4"},
        r"model.quantization: expected '' without adapters \(lora_rank 0\), got 'nf4'",
    ),
    "a run needs data": (
        [{"data.train_data": "memory://rows"}, {"data.train_data": "", "dry_run": True}],
        {"data.train_data": ""},
        "data.train_data: expected a jsonl file or a folder of them, got nothing",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_settings_go_together_up_to_the_last_value(name: str) -> None:
    accepted, refused, message = TOGETHER[name]
    for changes in accepted:
        TrainConfig.from_dict({**DATA, **changes})
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig.from_dict({**DATA, **refused})


def test_a_card_has_the_settings_that_differ_and_no_paths(tmp_path: Path) -> None:
    changes = {
        "steps": 7,
        "optimizer.lr": 0.5,
        "losses.temperature": 0.02,  # its default
        "batch.chunk_tokens": 4096,
        "output_dir": str(tmp_path),
        "model.name": str(tmp_path),
        "data.token_cache": str(tmp_path / "tokens"),
        "data.data_workers": 2,
        "grit.attn": "cccc",
        "logging.save_steps": 5,
    }
    found = TrainConfig.from_dict({**DATA, **changes}).card_settings()
    assert found == {"steps": 7, "optimizer.lr": 0.5, "batch.chunk_tokens": 4096}
