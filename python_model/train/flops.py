"""Floating-point operations of a step, and the share of the device's peak that they use (MFU).

Only operations required by the model's definition count: a product with a trained weight takes 6 operations per weight and token
(2 forward, 4 backward), with a frozen one 4; attention takes 12 per layer, head, head dimension and visible pair of tokens. Texts
embedded twice (gradient caching) and recomputed activations count once, so they lower the share. A sliding window is not taken
into account; of a mixture's experts, those that a token is routed to count, and the language-model head counts for labelled
tokens.

Source: MFU of PaLM, arXiv 2204.02311 appendix B.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from python_model.model.heads import head_size, layer_configs
from python_model.model.modeling import GritLM


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a forward and backward pass: per token, per labelled token (its logits), per visible pair of tokens."""

    per_token: float
    per_label: float
    per_pair: float

    @classmethod
    def of(cls, model: GritLM) -> ModelFlops:
        """The operations of a model before it is sharded, given its adapters and frozen weights."""
        config: Any = model.model.config
        head = None if model.mode == "embedding" else model.model.get_output_embeddings()
        # a token is routed to some of the experts
        visited = getattr(config, "num_experts_per_tok", 0) or 0
        body = 0.0
        for module in model.decoder[0].modules():
            if isinstance(module, nn.Linear):  # a quantised layer stores fewer elements than it has weights
                body += _passes(module.weight) * module.in_features * module.out_features
            elif not isinstance(module, nn.Embedding):  # a router, or experts, one matrix each
                for p in module.parameters(recurse=False):
                    body += _passes(p) * p.numel() * {2: 1.0, 3: visited / p.shape[0]}.get(p.ndim, 0.0)
        logits = 0.0
        if head is not None:
            outer = next((m for m in head.modules() if isinstance(m, nn.Linear)), head)
            logits = _passes(outer.weight) * config.vocab_size * config.hidden_size
        width = sum(layer.num_attention_heads * head_size(layer) for layer in layer_configs(config))
        return cls(body, logits, 12.0 * width)

    def step(self, tokens: int, labels: int, pairs: int) -> float:
        """Operations of a step with these numbers of tokens, labelled tokens and visible pairs."""
        return self.per_token * tokens + self.per_label * labels + self.per_pair * pairs


def _passes(weight: Any) -> int:
    return 6 if weight.requires_grad else 4


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product on the device, as the peak."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state is not affected
    a, b = (torch.rand(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):  # the first run is a warm-up
        _wait(device)
        begin = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
