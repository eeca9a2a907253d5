"""How long a text may be for a model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
"""Names of a config's limit. Where transformers knows the model, its attribute_map leads from the first to the model's own, but
for MPT; a model of other code has no such map."""
_warned: weakref.WeakSet[Any] = weakref.WeakSet()

STRETCHED = ("dynamic", "yarn")
"""Rotary scalings that stretch the positions by their factor, from those of the config where they name no others."""


def max_positions(config: Any) -> int:
    """Most tokens of a text that a config names; 2**31 - 1 where it sets no limit."""
    named = (getattr(config, name, None) for name in POSITIONS)
    return next((int(positions) for positions in named if positions is not None), 2**31 - 1)


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


def warn_beyond_positions(model: Any, lengths: Iterable[int]) -> None:
    """Warn, once for each GritLM, of texts with more tokens than its positions. They are read as asked."""
    limit, longest = stretched_positions(model.model.config), max(lengths, default=0)
    if longest > limit and model not in _warned:
        _warned.add(model)
        warnings.warn(
            f"max_length: a text of {longest} tokens goes beyond the {limit} positions that the model's config gives "
            "(max_position_embeddings or the like, with its rotary scaling); it is read whole, but the model was not made for it",
            stacklevel=4,
        )
