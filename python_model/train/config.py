"""Settings of a training run; every field is an option of ``python -m python_model.train`` and a key of its YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from python_model.model.few_shot import STYLES
from python_model.model.losses import GENERATIVE_LOSSES
from python_model.model.modeling import MODES
from python_model.settings import NAMES, GritSettings
from python_model.support.arguments import check_at_least, check_choice

CHUNKINGS = ("tokens", "triplet")
PARALLEL = ("ddp", "fsdp")
TRACKERS = ("tensorboard", "wandb", "trackio")
QUANTIZATIONS = ("", "nf4")


@dataclass
class TrainConfig:
    """One GRIT training run.

    Attributes:
        model: checkpoint to start from (folder or name), or ``smollm2-135m`` for the small model that ``grit fetch-model`` gets.
        architecture: folder with a ``config.json`` that ``dry_run`` builds when the model itself is not at hand.
        train_data: jsonl file or folder of files, one data set per file; rows with ``query`` are embedding rows, rows with
            ``text`` generative ones.
        output_dir: receives ``checkpoint/``, ``states/``, ``log.jsonl`` and ``loss.png``.
        mode: ``unified``, ``embedding`` or ``generative``.
        steps: optimiser steps.
        embedding_batch_size: queries per step, over all ranks.
        generative_batch_size: conversations per step, over all ranks.
        train_group_size: passages per query, the positive included.
        query_max_len, passage_max_len, generative_max_len: tokens; longer texts lose their end.
        same_dataset: batches of texts to embed hold rows of one data set; left-overs make mixed ones.
        dataset_weights: rows of a data set per epoch as a multiple of its size, by name (the file's name up to its first dot);
            1 for those not named, 0 leaves a data set out.
        max_rows_per_dataset: a random choice of that many rows of each larger data set; 0: all rows.
        max_left_out: share of a file's rows that may be unusable; more stop the run.
        few_shot: share of the queries whose instructions get one example from another row of the data set.
        few_shot_style: its wording, ``retrieval``, ``match`` or ``medi2``.
        data_workers: processes that read and tokenise ahead; 0: none. The samples are the same for any number.
        token_cache: SQLite file that keeps tokenised texts between runs; empty: none.
        chunk_tokens: tokens of one forward and backward pass; 0 puts the whole step into one. The gradients are those of the
            whole step either way (gradient caching), and memory depends on this number, not on the batch size.
        chunking: ``tokens`` fills chunks of ``chunk_tokens``; ``triplet`` is the paper's split: one pass each for positives,
            negatives and queries. Conversations have chunks of their own.
        learning_rate, warmup_ratio, weight_decay: AdamW with a linear schedule.
        objective_grad_norm: the gradient of each objective is limited to this norm before the two are added, so that neither
            drowns the other; 0: no limit. It costs nothing: both norms are measured and logged anyway.
        max_grad_norm: the sum of both gradients is limited to this norm.
        temperature: of the contrastive loss.
        learn_temperature: train it too (its logarithm, with the same learning rate).
        contrastive_weight, generative_weight: factors of the two losses.
        router_loss_weight: factor of a mixture's load-balancing loss; default: the model config's ``router_aux_loss_coef``.
        in_batch_negatives: every passage is a negative of every other query; False: only the query's own hard negatives.
        cross_device_negatives: contrast with the passages of all ranks, not only with this rank's.
        symmetric: also contrast each positive with the queries.
        mask_duplicates: a passage with the text of a query's positive is no negative of that query.
        generative_loss: ``mixed``, ``token`` or ``sample`` (see python_model.model.losses).
        generative_group: with ``mixed``, conversations per token mean (the paper's "mix 32 -> 8" has 32 in each of 8 means);
            0: one mean over all conversations of the step.
        pooling_method, normalized, projection, projection_activation, attn, embed_eos, instruction_count, embed_instruction,
            bidirectional_window, special_tokens, format: see :class:`python_model.settings.GritSettings`; None: as the checkpoint
            to start from was trained.
        bf16: compute in bfloat16 over FP32 weights.
        gradient_checkpointing: recompute activations in the backward pass.
        lora_rank: train low-rank adapters on every linear layer instead of all weights; 0: all weights.
        lora_alpha, lora_dropout: of the adapters.
        lora_targets: names of the linear layers with an adapter, separated by commas, or ``all-linear``.
        quantization: ``nf4`` loads the frozen weights in 4 bits (QLoRA; needs bitsandbytes and a GPU).
        parallel: with several ranks (torchrun): ``fsdp`` shards weights, gradients and optimiser, ``ddp`` copies them.
        shard_size: ranks that share one set of weights (hybrid sharding: copies between such groups); 0: all of them.
        reduce_each_chunk: sum gradients over the ranks after each chunk instead of once per step: more traffic, but FSDP then
            holds no whole gradient on any rank.
        cpu_offload: keep sharded weights and optimiser in host memory.
        save_steps: steps between saved states; 0: only when interrupted.
        save_total: states that are kept.
        resume: continue from the newest state in ``output_dir``.
        trackers: any of ``tensorboard``, ``wandb``, ``trackio``, beside ``log.jsonl``.
        exploding_loss: stop when the loss is this much above its mean over the last 50 steps; 0: only when not finite.
        deterministic: ask torch for deterministic algorithms.
        dry_run: print memory per rank and tokens per step, and stop; no weights are loaded.
        device_memory: GiB per rank that ``dry_run`` compares with where no GPU can be asked.
        seed: orders the data, picks positives and negatives, and draws dropout and new weights.
    """

    model: str = "smollm2-135m"
    architecture: str = ""
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
    same_dataset: bool = True
    dataset_weights: dict[str, float] = field(default_factory=dict)
    max_rows_per_dataset: int = 0
    max_left_out: float = 0.1
    few_shot: float = 0.0
    few_shot_style: str = "retrieval"
    data_workers: int = 0
    token_cache: str = ""
    chunk_tokens: int = 0
    chunking: str = "tokens"
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    objective_grad_norm: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 0.02
    learn_temperature: bool = False
    contrastive_weight: float = 1.0
    generative_weight: float = 1.0
    router_loss_weight: float | None = None
    in_batch_negatives: bool = True
    cross_device_negatives: bool = True
    symmetric: bool = False
    mask_duplicates: bool = True
    generative_loss: str = "mixed"
    generative_group: int = 0
    pooling_method: str | None = None
    normalized: bool | None = None
    projection: int | None = None
    attn: str | None = None
    projection_activation: str | None = None
    embed_eos: str | None = None
    instruction_count: str | None = None
    embed_instruction: bool | None = None
    bidirectional_window: str | None = None
    special_tokens: str | None = None
    format: str | None = None
    bf16: bool = True
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: int = 64
    lora_dropout: float = 0.1
    lora_targets: str = "all-linear"
    quantization: str = ""
    parallel: str = "fsdp"
    shard_size: int = 0
    reduce_each_chunk: bool = False
    cpu_offload: bool = False
    device_memory: float = 80.0
    save_steps: int = 0
    save_total: int = 2
    resume: bool = True
    trackers: list[str] = field(default_factory=list)
    exploding_loss: float = 20.0
    deterministic: bool = False
    dry_run: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepted in (
            ("mode", MODES),
            ("generative_loss", GENERATIVE_LOSSES),
            ("chunking", CHUNKINGS),
            ("parallel", PARALLEL),
            ("quantization", QUANTIZATIONS),
            ("few_shot_style", STYLES),
        ):
            check_choice(name, getattr(self, name), accepted)
        for tracker in self.trackers:
            check_choice("trackers", tracker, TRACKERS)
        for name in ("steps", "embedding_batch_size", "generative_batch_size", "train_group_size", "save_total") + (
            "query_max_len",
            "passage_max_len",
            "generative_max_len",
        ):
            check_at_least(name, getattr(self, name), 1)
        for name in ("chunk_tokens", "generative_group", "lora_rank", "shard_size", "save_steps") + (
            "max_rows_per_dataset",
            "data_workers",
            "seed",
        ):
            check_at_least(name, getattr(self, name), 0)
        GritSettings().changed(**self.settings_given)  # checks them
        for name in ("few_shot", "warmup_ratio", "max_left_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        for dataset, weight in self.dataset_weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"dataset_weights: expected a finite number >= 0, got {weight} for {dataset!r}")
        for name in ("learning_rate", "temperature", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {value}")
        for name in ("weight_decay", "contrastive_weight", "generative_weight", "objective_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        self._check_combinations()
        if self.dry_run:
            return
        if not self.train_data:
            raise ValueError("train_data: expected a jsonl file or a folder of them, got nothing")
        if "://" not in self.train_data and not Path(self.train_data).exists():
            raise FileNotFoundError(f"train_data: there is no file or folder {self.train_data}")

    @property
    def settings_given(self) -> dict[str, Any]:
        """The model's settings that are not left to the checkpoint."""
        given = {name: getattr(self, name, None) for name in NAMES}
        return {name: value for name, value in given.items() if value is not None}

    def _check_combinations(self) -> None:
        if self.generative_group and (
            self.generative_loss != "mixed" or self.generative_batch_size % self.generative_group
        ):
            raise ValueError(
                f"generative_group: got {self.generative_group}, accepted with generative_loss 'mixed' is a divisor of "
                f"generative_batch_size ({self.generative_batch_size})"
            )
        if self.chunking == "triplet" and self.chunk_tokens:
            raise ValueError(f"chunk_tokens: got {self.chunk_tokens}, accepted with chunking 'triplet' is 0")
        longest = max(
            (max(self.query_max_len, self.passage_max_len) if self.embeds else 0),
            (self.generative_max_len if self.generates else 0),
        )
        if self.chunk_tokens and self.chunk_tokens < longest:
            raise ValueError(
                f"chunk_tokens: expected 0 or at least the longest sample ({longest} tokens), got {self.chunk_tokens}"
            )
        if self.quantization and not self.lora_rank:
            raise ValueError(f"quantization: got {self.quantization!r}, which needs lora_rank > 0")
        if not self.in_batch_negatives and self.train_group_size < 2:
            raise ValueError("in_batch_negatives: False needs hard negatives, so train_group_size >= 2")

    @property
    def embeds(self) -> bool:
        """Whether the run trains embeddings."""
        return self.mode in ("unified", "embedding")

    @property
    def generates(self) -> bool:
        """Whether the run trains the next token."""
        return self.mode in ("unified", "generative")
