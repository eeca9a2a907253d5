"""The heads of a model, from its config."""

from __future__ import annotations

from typing import Any


def head_size(config: Any) -> int:
    """The size of an attention head of a model with this config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_configs(config: Any) -> list[Any]:
    """Each layer's config: the model's, or its own where layers differ in the number and size of their heads (Gemma 4)."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * int(config.num_hidden_layers)


def kv_heads(config: Any) -> int:
    """The number of heads of keys and values; GPT-NeoX and GPT-J have no groups."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
