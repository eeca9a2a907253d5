"""A transformers cache of fixed size in the layout that the attention kernels read without a copy."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class StaticLayer(CacheLayerMixin):
    """One layer of a :class:`StaticCache`: keys and values of ``slots`` slots, handed out as (B, heads, slots, D) views."""

    is_sliding = False

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots; transformers calls this with the first states."""
        batch, heads, _, dim = key_states.shape
        # zeros: attention skips unused slots, but a kernel may load values that it then ignores
        self.slots_of_keys = key_states.new_zeros(batch, self.slots, heads, dim)
        self.slots_of_values = value_states.new_zeros(batch, self.slots, heads, value_states.shape[-1])
        self.keys, self.values = self.slots_of_keys.transpose(1, 2), self.slots_of_values.transpose(1, 2)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states after the existing ones; returns all slots, including empty ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.filled + key_states.shape[-2]
        if end > self.slots:
            raise ValueError(f"cache: expected at most {self.slots} states, got {end}")
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys, self.values

    def reset(self) -> None:
        """Empty the slots."""
        super().reset()
        self.filled = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of slots that a mask covers, and the index of the first."""
        return self.slots, 0

    def get_seq_length(self) -> int:
        """The number of slots in use."""
        return self.filled

    def get_max_length(self) -> int:
        """Slots."""
        return self.slots


class StaticCache(Cache):
    """A transformers cache with ``slots`` slots per row for ``layers`` layers."""

    def __init__(self, layers: int, slots: int) -> None:
        self.static_layers = [StaticLayer(slots) for _ in range(layers)]
        super().__init__(layers=list(self.static_layers))
