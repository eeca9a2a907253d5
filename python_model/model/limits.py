"""How long a text may be for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STRETCHED = ("dynamic", "yarn")
"""Rotary scalings that stretch the positions by their factor, from those of the config where they name no others."""


def max_positions(config: Any) -> int:
    """Most tokens of a text that a config names; 2**31 - 1 where it sets no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return 2**31 - 1 if positions is None else int(positions)


def stretched_positions(config: Any) -> int:
    """Most tokens of prompt and reply for a model with this config.

    transformers gives "dynamic" and "yarn" scaling a factor over the positions that the model had before, which are those of the
    config if it was not updated. For the other scalings ``max_position_embeddings`` has to be the length after scaling.
    """
    positions = max_positions(config)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) in STRETCHED:
        before = scaling.get("original_max_position_embeddings") or positions
        return max(positions, int(before * (scaling.get("factor") or 1)))
    return positions


def check_prompts(config: Any, lengths: Sequence[int], new_tokens: int) -> None:
    """ValueError unless prompts of so many tokens, and so many new ones after each, are within the model's positions."""
    limit = stretched_positions(config)
    for index, length in enumerate(lengths):
        if length + new_tokens > limit:
            which = f" (prompt {index})" if len(lengths) > 1 else ""
            raise ValueError(
                f"prompt: expected prompt and reply within the model's {limit} tokens, got {length} and {new_tokens} new ones"
                f"{which}"
            )
