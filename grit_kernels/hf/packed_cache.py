"""A transformers cache for packed passes: each sample's keys are an interval of the rows of one memory, wherever it lies.

A stock cache holds padded rows of one batch. A server's samples come and go, have any length, and some are read whole while
others continue; so here a pass says where each token's states go and where each sample's keys begin. A layer's new states are
written to their rows, and attention reads the memory itself: nothing is copied, and no padding is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin

from grit_kernels.checks import described
from grit_kernels.hf.attention_pass import KeyRows, PackedKeys
from grit_kernels.hf.interface import served_size


class PackedLayer(CacheLayerMixin):
    """One layer of a :class:`PackedCache`: ``rows`` int64 (tokens) for its new states, ``starts`` int32 (B) of its keys."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, starts: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.rows, self.starts = keys, values, rows, starts
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The memory exists already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write states (1, kv_heads, tokens, size) to their rows; returns views (1, kv_heads, rows, size) of the whole memory.

        Tokens beyond those with a row (which only fill up a pass) are not kept.
        """
        assert self.keys is not None and self.values is not None
        if key_states.requires_grad or value_states.requires_grad:
            raise ValueError(
                "cache: expected a pass under torch.no_grad() with a PackedCache, which keeps no graph for a gradient, got "
                "states that require one"
            )
        count = self.rows.shape[0]
        for memory, states in ((self.keys, key_states), (self.values, value_states)):
            new = states[0, :, :count].transpose(0, 1)  # [tokens, heads, D]
            missing = memory.shape[-1] - new.shape[-1]
            memory.index_copy_(0, self.rows, functional.pad(new, (0, missing)) if missing else new)
        size = value_states.shape[-1]
        keys = self.keys[..., : key_states.shape[-1]].transpose(0, 1)[None]
        values = self.values[..., :size].transpose(0, 1)[None]
        # attention recognises what was handed out by this, and reads the memory instead
        keys._grit_rows = values._grit_rows = KeyRows(self.keys, self.values, self.starts, size)  # type: ignore[attr-defined]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A packed pass builds no mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: each sample has a length of its own, and positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Rows."""
        assert self.keys is not None
        return self.keys.shape[0]


class PackedCache(Cache):
    """The cache of one packed pass; make one per pass, over the same memory.

    ``decoder(input_ids=ids[None], sample_pack=pack, cache=PackedCache(..))`` of a patched model reads the pack's tokens as the
    last ones of their samples. B and tokens are those of the pack; tokens at the end of the pack without an entry in ``rows``
    belong to samples without keys, whose output is 0.

    Args:
        keys, values: (all rows, kv_heads, D) of the dtype of the model's states, D of :func:`served_size`.
        rows: int64 (layers, tokens), the row of each token's states in each layer.
        starts: for each layer int32 (B), the first row of each sample's keys.
        lengths: int32 (B), keys of each sample, the pass's own included.
        longest: the largest of ``lengths``, or more.
        positions: int (tokens), each token's position in its sample.
        hi: int32 (tokens) or None: the upper bounds of visible keys, as in :class:`SamplePack`, but counted from the sample's
            first key.

    Raises:
        ValueError: shapes that do not belong together, or heads of a size that the kernels do not serve; in the pass, states
            that require a gradient.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        rows: Tensor,
        starts: Sequence[Tensor],
        lengths: Tensor,
        longest: int,
        positions: Tensor,
        hi: Tensor | None = None,
    ) -> None:
        if keys.ndim != 3 or keys.shape != values.shape or keys.dtype != values.dtype:
            raise ValueError(
                f"values: expected {described(keys)}, (rows, kv_heads, D), as keys, got {described(values)}"
            )
        if keys.shape[-1] != served_size(keys.shape[-1]):
            raise ValueError(f"keys: expected heads of size {served_size(keys.shape[-1])}, got {keys.shape[-1]}")
        if rows.ndim != 2 or rows.shape[0] != len(starts):
            raise ValueError(
                f"rows: expected ({len(starts)}, tokens), one row per layer in starts, got {described(rows)}"
            )
        if any(start.shape != lengths.shape for start in starts):
            raise ValueError(f"starts: expected {tuple(lengths.shape)} per layer, as lengths, got other shapes")
        self.packed_keys = PackedKeys(lengths, longest, positions, hi)
        super().__init__(
            layers=[PackedLayer(keys, values, of_layer, start) for of_layer, start in zip(rows, starts, strict=True)]
        )
