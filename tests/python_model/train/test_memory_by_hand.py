"""The memory plan's numbers, by hand from the formulas at the top of memory.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from python_model.train.config import ModelConfig, ParallelConfig
from python_model.train.memory import (
    GIB,
    MemoryPlan,
    StepTokens,
    activation_bytes,
    attention_output_bytes,
    optimizer_bytes,
    plan_memory,
)

# h = 64, Hq = 4, Hkv = 2, D = 16, i = 96
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": None,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "vocab_size": 10,
}


def config(**changes: Any) -> Any:
    return SimpleNamespace(**{**CONFIG, **changes})


@pytest.mark.parametrize(
    ("changes", "bf16", "residual_fp32", "by_hand"),
    [
        # norms, attention, residual, gated product
        ({}, True, True, 2 * (4 + 4) * 64 + 2 * 16 * 12 + 4 * 4 + 4 * 64 + 4 * 2 * 96),
        ({}, True, False, 2 * (4 + 4) * 64 + 2 * 16 * 12 + 4 * 4 + 2 * 64 + 4 * 2 * 96),
        # in float32 the cast and a residual beside it are the same tensors
        ({}, False, True, 2 * (4 + 4) * 64 + 4 * 16 * 12 + 4 * 4 + 4 * 4 * 96),
        ({"num_key_value_heads": None}, True, True, 1024 + 2 * 16 * 16 + 16 + 256 + 768),
        ({"intermediate_size": None}, True, True, 1024 + 384 + 16 + 256 + 4 * 2 * 4 * 64),
        ({"num_experts_per_tok": 3}, True, True, 1024 + 384 + 16 + 256 + 3 * 768),
        # experts of a size of their own, without and with one that all tokens visit
        ({"num_experts_per_tok": 3, "moe_intermediate_size": 40}, True, True, 1024 + 384 + 16 + 256 + 3 * 8 * 40),
        (
            {"num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56},
            True,
            True,
            1024 + 384 + 16 + 256 + 8 * (3 * 40 + 56),
        ),
        ({"num_experts_per_tok": None, "head_dim": 32}, True, True, 1024 + 768 + 16 + 256 + 768),
    ],
)
def test_what_a_layer_keeps_of_a_token(
    changes: dict[str, Any], bf16: bool, residual_fp32: bool, by_hand: float
) -> None:
    assert activation_bytes(config(**changes), bf16, residual_fp32) == by_hand


def test_what_attention_returns() -> None:
    assert attention_output_bytes(config(), True) == 4 * (2 * 16 + 4)
    assert attention_output_bytes(config(), False) == 4 * (4 * 16 + 4)


class Decoder(nn.Module):
    """Tensors of every kind that the 8-bit optimiser and Muon tell apart: 4,096, 8,192, 3,840, 4,100 and 20 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(64, 64, bias=False)
        self.wide = nn.Linear(64, 128, bias=False)
        self.small = nn.Linear(64, 60, bias=False)
        self.odd = nn.Linear(41, 100, bias=False)
        self.norm = nn.Parameter(torch.ones(20))


def test_what_the_optimiser_keeps() -> None:
    model = Decoder()
    every = 4096 + 8192 + 3840 + 4100 + 20
    assert optimizer_bytes(model, "adamw") == 8 * every
    assert optimizer_bytes(model, "adamw", 4) == 2 * every
    in_8_bits = sum(2 * (n + 4 * n / 256 + 1024) for n in (4096, 8192))
    assert optimizer_bytes(model, "adamw_8bit") == in_8_bits + 8 * (3840 + 4100 + 20)
    # of halves, only the largest tensor's has 4,096 weights or more
    assert optimizer_bytes(model, "adamw_8bit", 2) == 2 * (4096 + 64 + 1024) + 8 * (2048 + 1920 + 2050 + 10)
    model.wide.requires_grad_(False)
    assert optimizer_bytes(model, "adamw") == 8 * (every - 8192)


@pytest.fixture
def model() -> nn.Module:
    """1,000 weights, 600 of them trained; embedding and head have 2 * 10 * 20, so each of 3 layers has 200."""
    parts = nn.ParameterList([nn.Parameter(torch.ones(600)), nn.Parameter(torch.ones(400), requires_grad=False)])
    return parts


SIZES = config(hidden_size=20, num_attention_heads=1, num_key_value_heads=1, head_dim=20, intermediate_size=30)
FP32_LAYER = 2 * 8 * 20 + 4 * 20 * 4 + 4 + 4 * 4 * 30
BF16_LAYER = 2 * 8 * 20 + 2 * 20 * 4 + 4 + 4 * 20 + 4 * 2 * 30
BF16_SHARDED = BF16_LAYER - 2 * 20
TOKENS = StepTokens(step=50, chunk=7, rounds=2)


@pytest.mark.parametrize(
    ("options", "parallel", "tokens", "mode", "world", "expected"),
    [
        # weights, gradients, kept gradient, optimiser, working copy, activations
        ({"bf16": False}, {}, TOKENS, "embedding", 1, (4000, 2400, 0, 4800, 0, 7 * 3 * FP32_LAYER)),
        ({"bf16": True}, {}, TOKENS, "unified", 1, (4000, 2400, 2400, 4800, 2000, 7 * 3 * BF16_LAYER)),
        ({"bf16": True}, {"strategy": "ddp"}, TOKENS, "unified", 4, (4000, 2400, 2400, 4800, 2000, 21 * BF16_LAYER)),
        # two layers of 200 and 400 outside; gradients whole between the chunks
        ({"bf16": True}, {}, TOKENS, "unified", 4, (1000, 2400, 600, 1200, 1600, 21 * BF16_SHARDED)),
        ({"bf16": False}, {}, TOKENS, "unified", 4, (1000, 2400, 600, 1200, 3200, 21 * FP32_LAYER)),
        (
            {"bf16": True},
            {"reduce_each_chunk": True},
            TOKENS,
            "generative",
            4,
            (1000, 600, 0, 1200, 1600, 21 * BF16_SHARDED),
        ),
        ({"bf16": True}, {}, StepTokens(50, 7, 1), "unified", 4, (1000, 600, 600, 1200, 1600, 21 * BF16_SHARDED)),
        ({"bf16": True}, {"shard_size": 2}, TOKENS, "unified", 4, (2000, 2400, 1200, 2400, 1600, 21 * BF16_SHARDED)),
        ({"bf16": True}, {"cpu_offload": True}, TOKENS, "unified", 4, (0, 2400, 0, 0, 1600, 21 * BF16_SHARDED)),
        # one state per layer and token, and one layer in full
        (
            {"bf16": True, "gradient_checkpointing": True},
            {},
            TOKENS,
            "embedding",
            1,
            (4000, 2400, 0, 4800, 2000, 7 * (3 * 80 + BF16_LAYER)),
        ),
        (
            {"bf16": True, "gradient_checkpointing": True},
            {},
            TOKENS,
            "embedding",
            4,
            (1000, 2400, 0, 1200, 1600, 7 * (3 * 40 + BF16_SHARDED)),
        ),
        (
            {"bf16": False, "gradient_checkpointing": "selective"},
            {},
            TOKENS,
            "embedding",
            1,
            (4000, 2400, 0, 4800, 0, 7 * (3 * (80 + 84) + FP32_LAYER)),
        ),
    ],
)
def test_a_plan_by_hand(
    model: nn.Module,
    options: dict[str, Any],
    parallel: dict[str, Any],
    tokens: StepTokens,
    mode: Any,
    world: int,
    expected: tuple[float, ...],
) -> None:
    plan = plan_memory(model, SIZES, tokens, ModelConfig(**options), ParallelConfig(**parallel), mode, world)
    found = plan.weights, plan.gradients, plan.kept_gradient, plan.optimizer, plan.working_copy, plan.activations
    assert found == expected
    assert plan.total == sum(expected)
    assert (plan.parameters, plan.trained, plan.step_tokens, plan.chunk_tokens, plan.world) == (1000, 600, 50, 7, world)


def test_a_plan_says_whether_it_fits() -> None:
    sizes = [float(n * GIB) for n in (1, 2, 3, 4, 5, 6)]
    plan = MemoryPlan(1_500_000, 500_000, *sizes, 12_345, 678, 2)
    lines = plan.lines(None)
    assert lines == [
        "1.5 M weights, 0.5 M trained, 2 rank(s)",
        "up to 12,345 tokens per step, 678 per chunk and rank",
        "memory per rank (estimate): weights 1.00, gradients 2.00, kept gradient 3.00, optimiser 4.00, working copy 5.00, "
        "activations of 678 tokens 6.00 GiB",
        "total 21.00 GiB",
    ]
    assert plan.lines(21 * GIB)[-1] == "total 21.00 GiB of 21.0 GiB: fits"
    assert plan.lines(21 * GIB - 1)[-1].startswith(
        "total 21.00 GiB of 21.0 GiB: DOES NOT FIT; try a smaller chunk_tokens"
    )
