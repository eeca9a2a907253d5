"""Streams over rows that a test writes, or over the bundled sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from python_model.data import sample_dir
from python_model.data.stream import TrainingStream, check_data, open_stream
from python_model.settings import GritSettings
from python_model.train.config import TrainConfig
from tests.python_model.training_config import make_config


def config_of(**changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "train_data": str(sample_dir() / "train"),
        "embedding_batch_size": 8,
        "generative_batch_size": 3,
        "query_max_len": 192,
        "passage_max_len": 256,
        "generative_max_len": 256,
    }
    return make_config(**{**options, **changes})


def stream_of(config: TrainConfig, tokenizer: Any, rank: int = 0, world: int = 1) -> TrainingStream:
    return open_stream(
        config.data,
        config.batch,
        tokenizer,
        settings=GritSettings().changed(**config.settings_given),
        mode=config.mode,
        in_batch_negatives=config.losses.in_batch_negatives,
        seed=config.seed,
        rank=rank,
        world=world,
    )


def check(config: TrainConfig) -> None:
    check_data(config.data, config.mode, in_batch_negatives=config.losses.in_batch_negatives)


def folder_of(folder: Path, **files: list[dict[str, Any]]) -> str:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def query(number: int, dataset: str = "", negatives: int = 3) -> dict[str, Any]:
    return {
        "query": ["Find the text", f"{dataset} query {number}"],
        "pos": [["", f"{dataset} positive {number} {n}"] for n in range(2)],
        "neg": [["", f"{dataset} negative {number} {n}"] for n in range(negatives)],
    }


def decoded(tokenizer: Any, samples: list[Any]) -> list[str]:
    return [tokenizer.decode(s.input_ids[1:], clean_up_tokenization_spaces=False) for s in samples]
