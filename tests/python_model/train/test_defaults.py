"""The defaults of a run's settings: a change to one changes every run that does not name it, so it is made here as well."""

from __future__ import annotations

from dataclasses import asdict, fields

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
        "bf16": True,
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
