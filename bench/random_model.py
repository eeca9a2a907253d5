"""Models of real shapes with random weights, for machines that have no checkpoint."""

from __future__ import annotations

from typing import Any

import torch

SHAPES = {
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
"""Settings of a Mistral configuration; a head has hidden_size / num_attention_heads dimensions."""


def set_shape(config: Any, shape: str) -> None:
    """Give a Mistral configuration one of the shapes."""
    for name, value in SHAPES[shape].items():
        setattr(config, name, value)
    config.head_dim = config.hidden_size // config.num_attention_heads


def random_model(shape: str, *, device: str, dtype: torch.dtype, vocabulary: int = 32000) -> Any:
    """An unpatched MistralForCausalLM with sdpa attention; the weights are created on the device."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=vocabulary, sliding_window=None, attn_implementation="sdpa")
    set_shape(config, shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return MistralForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
