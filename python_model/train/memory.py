"""Estimates the memory of a run per rank and the tokens per step; printed at the start and by ``--dry_run``.

    weights      4 bytes each, divided among the ranks that share them
    gradients    4 bytes per trained weight; unsharded between chunks with FSDP, unless ``reduce_each_chunk``
    kept         4 bytes per trained weight, divided among the ranks that share them: with two objectives, the gradient of
                 the first while the second is computed (balance.py)
    optimiser    8 bytes per trained weight (two moments), 4 where Muon moves it (one momentum); in 8 bits 2 + 8/256 and a table
                 per moment, but 8 in a tensor of fewer than 4,096 weights or of other than a multiple of 256
    working copy bfloat16 weights in use: all of them (autocast), or with FSDP two layers, embedding and head
    activations  what is kept for the backward pass of one chunk (below), or with gradient checkpointing one state per layer
                 and token, plus one layer in full; the selective kind keeps attention's output (s D Hq + 4 Hq) as well

Per token and layer, with hidden size h, inner size i, Hq/Hkv heads of size D, s bytes per computed and r per residual element:
two norms (4 + 2 s) h each (their FP32 input, their output, its cast), s D (2 Hq + 2 Hkv) + 4 Hq for attention (q, k, v, out,
LSE), r h for the residual and 4 s i for the gated product, of each expert that a token visits in a mixture.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from python_model.data.config import BatchConfig, DataConfig
from python_model.model.heads import head_size, kv_heads, layer_configs
from python_model.support.optional import find
from python_model.train.config import Mode, ModelConfig, OptimizerKind, ParallelConfig
from python_model.train.optimizers import hidden_matrices

GIB = 2**30
BLOCK, LEAST_IN_8_BITS = 256, 4096
"""Weights that share a scale in torchao's 8-bit moments, and the least number of weights in a tensor that is kept so."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank, and the maximum tokens per step."""

    parameters: int
    trained: int
    weights: float
    gradients: float
    kept_gradient: float
    optimizer: float
    working_copy: float
    activations: float
    step_tokens: int
    chunk_tokens: int
    world: int

    @property
    def total(self) -> float:
        """Total bytes per rank."""
        return (
            self.weights + self.gradients + self.kept_gradient + self.optimizer + self.working_copy + self.activations
        )

    def lines(self, limit: float | None) -> list[str]:
        """Readable lines, including whether it fits into ``limit`` bytes."""
        parts = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("kept gradient", self.kept_gradient),
            ("optimiser", self.optimizer),
            ("working copy", self.working_copy),
            (f"activations of {self.chunk_tokens} tokens", self.activations),
        ]
        found = [
            f"{self.parameters / 1e6:,.1f} M weights, {self.trained / 1e6:,.1f} M trained, {self.world} rank(s)",
            f"up to {self.step_tokens:,} tokens per step, {self.chunk_tokens:,} per chunk and rank",
            "memory per rank (estimate): " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts) + " GiB",
        ]
        total = f"total {self.total / GIB:.2f} GiB"
        if limit is not None:
            fits = self.total <= limit
            total += f" of {limit / GIB:.1f} GiB: {'fits' if fits else 'DOES NOT FIT'}"
            if not fits:
                total += (
                    "; try a smaller chunk_tokens, gradient_checkpointing, more ranks, reduce_each_chunk or cpu_offload"
                )
        return [*found, total]


@dataclass(frozen=True)
class StepTokens:
    """Tokens of a step over all ranks, tokens of a rank's largest chunk, and chunks of one objective per rank (between which FSDP
    keeps unsharded gradients)."""

    step: int
    chunk: int
    rounds: int


def plan_memory(
    model: nn.Module,
    model_config: Any,
    tokens: StepTokens,
    config: ModelConfig,
    parallel: ParallelConfig,
    mode: Mode,
    world: int,
    optimizer: OptimizerKind = "adamw",
) -> MemoryPlan:
    """The plan of training ``model`` (on any device, meta included; ``model_config`` is transformers') on ``world`` ranks."""
    bf16 = config.bf16 is not False  # undecided: as on the GPUs that the plan is for
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sharded = world > 1 and parallel.strategy == "fsdp"
    shards = (parallel.shard_size or world) if sharded else 1
    layers = model_config.num_hidden_layers
    per_layer = max(0, parameters - 2 * model_config.vocab_size * model_config.hidden_size) / layers
    working = 0.0
    if sharded:
        outside = parameters - per_layer * layers
        working = (2 * per_layer + outside) * (2 if bf16 else 4)
    elif bf16:
        working = 2.0 * parameters
    whole_gradient = not sharded or not (parallel.reduce_each_chunk or tokens.rounds == 1)
    state = activation_bytes(model_config, bf16, residual_fp32=not sharded)
    residual = (2 if sharded and bf16 else 4) * model_config.hidden_size
    if config.gradient_checkpointing:
        if config.gradient_checkpointing == "selective":
            residual += attention_output_bytes(model_config, bf16)
        activations = tokens.chunk * (layers * residual + state)
    else:
        activations = tokens.chunk * layers * state
    offloaded = 0.0 if parallel.cpu_offload and sharded else 1.0
    return MemoryPlan(
        parameters,
        trained,
        4.0 * parameters / shards * offloaded,
        4.0 * trained / (1 if whole_gradient else shards),
        4.0 * trained / shards * offloaded if mode == "unified" else 0.0,
        optimizer_bytes(model, optimizer, shards) * offloaded,
        working,
        float(activations),
        tokens.step,
        tokens.chunk,
        world,
    )


def optimizer_bytes(model: nn.Module, kind: OptimizerKind, shards: int = 1) -> float:
    """Bytes of what the optimiser keeps of the trained weights on each of ``shards`` ranks; see the top of the file."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    if kind == "adamw_8bit":
        local = [count / shards for count in trained]
        return sum(
            2 * (count + 4 * count / BLOCK + 4 * 256) if count >= LEAST_IN_8_BITS and count % BLOCK == 0 else 8 * count
            for count in local
        )
    by_muon = sum(p.numel() for p in hidden_matrices(model)) if kind == "muon" else 0
    return (8.0 * sum(trained) - 4.0 * by_muon) / shards


def activation_bytes(model_config: Any, bf16: bool, residual_fp32: bool = True) -> float:
    """Bytes that one layer (on average) keeps per token for its backward pass; see the top of the file."""
    hidden = model_config.hidden_size
    inner = getattr(model_config, "intermediate_size", None) or 4 * hidden
    if visited := getattr(model_config, "num_experts_per_tok", None):
        inner = visited * (getattr(model_config, "moe_intermediate_size", None) or inner)
        inner += getattr(model_config, "shared_expert_intermediate_size", None) or 0
    s = 2 if bf16 else 4
    norms = 2 * (4 + (2 * s if bf16 else s)) * hidden
    heads = [(layer.num_attention_heads, kv_heads(layer), head_size(layer)) for layer in layer_configs(model_config)]
    attention = statistics.fmean(s * size * (2 * q + 2 * kv) + 4 * q for q, kv, size in heads)
    residual = (4 if residual_fp32 or not bf16 else 2) * hidden if bf16 else 0
    return norms + attention + residual + 4 * s * inner


def attention_output_bytes(model_config: Any, bf16: bool) -> float:
    """Bytes of attention's results per token and layer (on average): its output, and the LSE of each head in FP32."""
    s = 2 if bf16 else 4
    layers = layer_configs(model_config)
    return statistics.fmean(layer.num_attention_heads * (s * head_size(layer) + 4) for layer in layers)


def plan_tokens(mode: Mode, data: DataConfig, batch: BatchConfig, world: int) -> StepTokens:
    """The tokens of a step if every text has its maximum length."""
    queries = batch.embedding_batch_size if mode != "generative" else 0
    conversations = batch.generative_batch_size if mode != "embedding" else 0
    group = data.query_max_len + data.train_group_size * data.passage_max_len
    step = queries * group + conversations * data.generative_max_len
    # on the rank that has most
    mine, talks = math.ceil(queries / world), math.ceil(conversations / world) * data.generative_max_len
    if batch.chunking == "triplet":
        negatives = (data.train_group_size - 1) * data.passage_max_len
        longest = max(data.passage_max_len, negatives, data.query_max_len)
        return StepTokens(step, max(mine * longest, talks), 3 if queries else 1)
    largest = max(mine * group, talks)
    chunk = min(largest, batch.chunk_tokens or largest)
    return StepTokens(step, chunk, math.ceil(largest / chunk))


def device_limit(device: torch.device) -> float | None:
    """Bytes of the device's memory, None if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    psutil = find("psutil")
    return None if psutil is None else float(psutil.virtual_memory().available)


def used_gib(device: torch.device) -> float | None:
    """Peak GiB in use (GPU), or current GiB (host); None if psutil is missing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    psutil = find("psutil")
    return None if psutil is None else float(psutil.Process().memory_info().rss / GIB)
