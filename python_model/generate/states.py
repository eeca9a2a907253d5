"""TextStates: the key-value states of one text, with its tokens and the positions its keys were rotated to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import grit_kernels as gk


@dataclass(frozen=True)
class TextStates:
    """What a model's layers hold after reading a text, without padding.

    Attributes:
        keys_values: (layers, 2, kv_heads, tokens, head_dim); index 0 of the second dimension is keys (after RoPE), 1 is values.
        input_ids: int64 (tokens).
        positions: int64 (tokens), the rotary position of each key.
        causal: the attention that produced the states: True if each token saw only its past.
    """

    keys_values: Tensor
    input_ids: Tensor
    positions: Tensor
    causal: bool

    def __post_init__(self) -> None:
        shape = tuple(self.keys_values.shape)
        if len(shape) != 5 or shape[1] != 2:
            raise ValueError(f"keys_values: expected (layers, 2, kv_heads, tokens, head_dim), got {shape}")
        for name in ("input_ids", "positions"):
            given = tuple(getattr(self, name).shape)
            if given != (shape[3],):
                raise ValueError(f"{name}: expected ({shape[3]},), the tokens of keys_values, got {given}")

    def __len__(self) -> int:
        return self.keys_values.shape[3]

    @property
    def geometry(self) -> tuple[int, int, int]:
        """(layers, kv_heads, head_dim)."""
        layers, _, heads, _, dim = self.keys_values.shape
        return layers, heads, dim

    def slice(self, start: int, end: int | None = None) -> TextStates:
        """The states of tokens ``start`` to ``end``; a view."""
        part = slice(start, end)
        return replace(
            self,
            keys_values=self.keys_values[:, :, :, part],
            input_ids=self.input_ids[part],
            positions=self.positions[part],
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextStates:
        """The same states on another device or in another floating dtype."""
        return replace(
            self,
            keys_values=self.keys_values.to(device=device, dtype=dtype),
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
        )


def concatenate(parts: Sequence[TextStates]) -> TextStates:
    """The states concatenated, unchanged (see rope.join for keys moved to their new positions)."""
    if not parts:
        raise ValueError("parts: expected at least one TextStates, got none")
    if len({part.geometry for part in parts}) > 1:
        raise ValueError(
            f"parts: expected the same (layers, kv_heads, head_dim), got {[part.geometry for part in parts]}"
        )
    return TextStates(
        torch.cat([part.keys_values for part in parts], dim=3),
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.positions for part in parts]),
        all(part.causal for part in parts),
    )


def to_cache(states: TextStates) -> Any:
    """A transformers cache with the states as its only row."""
    return gk.hf.new_cache((layer[0][None], layer[1][None]) for layer in states.keys_values)


def from_cache(cache: Any, input_ids: Sequence[Tensor], causal: bool) -> list[TextStates]:
    """One TextStates per row of a right-padded cache whose rows start at position 0."""
    layers = [torch.stack(states) for states in gk.hf.cached_states(cache)]  # each [2, B, H, S, D]
    found = []
    for row, ids in enumerate(input_ids):
        length = ids.shape[0]
        stacked = torch.stack([layer[:, row, :, :length] for layer in layers])
        found.append(TextStates(stacked, ids, torch.arange(length, device=ids.device), causal))
    return found
