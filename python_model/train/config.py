"""Settings of a training run; every field is an option of ``python -m python_model.train`` and a key of its YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from python_model.losses import GENERATIVE_LOSSES

MODES = ("unified", "embedding", "generative")


@dataclass
class TrainConfig:
    """One GRIT training run.

    Attributes:
        model: checkpoint to start from (folder or name), or ``smollm2-135m`` for the small model that ``grit fetch-model`` gets.
        train_data: jsonl file or folder of files; rows with ``query`` are embedding rows, rows with ``text`` generative ones.
        output_dir: receives ``checkpoint/``, ``log.jsonl`` and ``loss.png``.
        mode: ``unified``, ``embedding`` or ``generative``.
        steps: optimiser steps.
        embedding_batch_size: queries per step.
        generative_batch_size: conversations per step.
        train_group_size: passages per query, the positive included.
        query_max_len, passage_max_len, generative_max_len: tokens; longer texts lose their end.
        learning_rate, warmup_ratio, weight_decay, max_grad_norm: AdamW with a linear schedule.
        temperature: of the contrastive loss.
        contrastive_weight, generative_weight: factors of the two losses.
        generative_loss: ``mixed``, ``token`` or ``sample`` (see python_model.losses).
        pooling_method, normalized, attn: as in GritLM.
        bf16: autocast to bfloat16 over FP32 weights.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: orders the data and picks positives and negatives.
    """

    model: str = "smollm2-135m"
    train_data: str = ""
    output_dir: str = "grit_output"
    mode: str = "unified"
    steps: int = 40
    embedding_batch_size: int = 12
    generative_batch_size: int = 3
    train_group_size: int = 2
    query_max_len: int = 256
    passage_max_len: int = 2048
    generative_max_len: int = 2048
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 0.02
    contrastive_weight: float = 1.0
    generative_weight: float = 1.0
    generative_loss: str = "mixed"
    pooling_method: str = "mean"
    normalized: bool = True
    attn: str = "bbcc"
    bf16: bool = True
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: got {self.mode!r}, accepted are {', '.join(map(repr, MODES))}")
        if self.generative_loss not in GENERATIVE_LOSSES:
            accepted = ", ".join(map(repr, GENERATIVE_LOSSES))
            raise ValueError(f"generative_loss: got {self.generative_loss!r}, accepted are {accepted}")
        for name in ("steps", "embedding_batch_size", "generative_batch_size", "train_group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, accepted is an int >= 1")
        for name in ("learning_rate", "temperature", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: got {value}, accepted is a finite number > 0")
        if not self.train_data:
            raise ValueError("train_data: got nothing, accepted is a jsonl file or a folder of them")
        if not Path(self.train_data).exists():
            raise FileNotFoundError(f"train_data: there is no file or folder {self.train_data}")

    @property
    def embeds(self) -> bool:
        return self.mode in ("unified", "embedding")

    @property
    def generates(self) -> bool:
        return self.mode in ("unified", "generative")
