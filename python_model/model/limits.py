"""How long a text may be for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STRETCHED = ("dynamic", "yarn")
"""Rotary scalings that stretch the positions by their factor, from those of the config where they name no others."""


def max_positions(config: Any) -> int:
    """Most tokens of a text for a model with this config; 2**31 - 1 where it sets no limit.

    transformers gives "dynamic" and "yarn" scaling a factor over the positions that the model had before, which are those of the
    config if it was not updated. For the other scalings ``max_position_embeddings`` has to be the length after scaling.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return 2**31 - 1
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) in STRETCHED:
        before = scaling.get("original_max_position_embeddings") or positions
        return max(int(positions), int(before * (scaling.get("factor") or 1)))
    return int(positions)


def check_prompts(config: Any, lengths: Sequence[int], new_tokens: int) -> None:
    """ValueError unless prompts of so many tokens, and so many new ones after each, are within the model's positions."""
    limit = max_positions(config)
    for index, length in enumerate(lengths):
        if length + new_tokens > limit:
            which = f" (prompt {index})" if len(lengths) > 1 else ""
            raise ValueError(
                f"prompt: expected prompt and reply within the model's {limit} tokens, got {length} and {new_tokens} new ones"
                f"{which}"
            )


def check_texts(config: Any, lengths: Sequence[int], max_length: int) -> None:
    """ValueError unless texts of so many tokens, truncated to ``max_length``, are within the model's positions."""
    longest, limit = max(lengths, default=0), max_positions(config)
    if longest > limit:
        raise ValueError(
            f"max_length: expected at most the model's {limit} tokens, got {max_length} and a text of {longest} tokens"
        )
