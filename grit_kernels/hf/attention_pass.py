"""What the layers of one forward pass share, as a value that travels through the model's keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.context import SampleTable
from grit_kernels.packing import SamplePack
from grit_kernels.visibility import UNLIMITED, positions_and_samples, window_bounds

BIDIRECTIONAL_WINDOWS = ("transformers", "full")
"""Visible keys of a bidirectional sample under ``sliding_window=W``: ``|i - j| <= W`` as transformers, or all."""

MOST_PREPARED = 32
"""Problems that a pass keeps; a model has as many kinds of attention layers as it has windows."""


@dataclass(frozen=True)
class PackedKeys:
    """The keys of a packed pass that continues its samples (packed_cache.py); arguments of :class:`PackedCache`."""

    lengths: Tensor
    longest: int
    positions: Tensor
    hi: Tensor | None


@dataclass(frozen=True)
class KeyRows:
    """Attached to the keys and values that a layer of a :class:`PackedCache` hands out: the memory (rows, kv_heads, D), the
    first row of each sample's keys, int32 (B), and the size of the layer's values, which may be less than D."""

    keys: Tensor
    values: Tensor
    starts: Tensor
    value_size: int


@dataclass
class AttentionPass:
    """What all layers of one forward pass share: the flags, and for a packed pass the pack.

    ``prepared`` keeps what the layers would otherwise compute over and over: the problem of each kind of layer (alternating
    layers have two), and beside it what the kernels plan for it. ``witness`` notes that attention was called. Both are dicts, so
    that copies of a pass share them. ``places``: where recurrent layers (recurrent.py) want each token of the pack. ``keys``: of
    a packed pass whose samples have more keys than its own tokens. ``in_graph``: a compiled graph without gradients makes this
    pass and runs all layers, so they may share what they find, as eager ones do.
    """

    causal: Tensor
    bidirectional_window: str = "transformers"
    pack: SamplePack | None = None
    deterministic: bool = True
    places: Tensor | None = None
    keys: PackedKeys | None = None
    in_graph: bool = False
    prepared: dict[Any, tuple[AttentionProblem, dict[Any, Tensor], Any]] = field(default_factory=dict)
    witness: dict[str, bool] = field(default_factory=dict)

    def prepare(
        self, key: Any, make: Callable[[], AttentionProblem], alive: Any = None
    ) -> tuple[AttentionProblem, dict[Any, Tensor]]:
        """The problem of ``key`` and its plans, made by ``make`` for the first layer. ``alive``: what ``key`` is an id of."""
        # sizes in the key of a padded pass would be fixed in a graph, which also may not change what it was given
        if torch.compiler.is_compiling() and not (self.in_graph and self.pack is not None):
            if self.pack is not None and key in self.prepared:
                problem, plans, _ = self.prepared[key]
                return problem, dict(plans)
            return make(), {}
        if key not in self.prepared:
            if len(self.prepared) >= MOST_PREPARED:  # of a pass kept on a tensor that its owner uses for many calls
                self.prepared.clear()
            self.prepared[key] = (make(), {}, alive)
        return self.prepared[key][:2]

    def problem_of_pack(
        self, table: SampleTable | None, sliding_window: int | None, options: tuple[float, float]
    ) -> AttentionProblem:
        """Of the pack's samples, or of those in a ``table`` of its contexts. ``options``: softmax_scale and softcap."""
        pack = self.pack
        assert pack is not None
        if table is None:
            ranges, longest = (pack.starts, pack.lengths, pack.starts, pack.lengths), pack.max_seqlen
            bounds = self.window_bounds(sliding_window, longest, longest)
            hi = self.upper_bounds(sliding_window)
            return AttentionProblem(*ranges, *bounds, hi, 0, 0, longest, longest, *options)
        causal = self.causal[table.samples]
        window = window_sizes(causal, sliding_window, self.bidirectional_window)
        bounds = window_bounds(causal, window, table.max_q, table.max_k)
        ranges = (table.q_start, table.q_len, table.k_start, table.k_len)
        return AttentionProblem(*ranges, *bounds, None, 0, 0, table.max_q, table.max_k, *options)

    def window_bounds(self, sliding_window: int | None, longest_q: int, longest_k: int) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` (int32 (B)) of the samples."""
        window = window_sizes(self.causal, sliding_window, self.bidirectional_window)
        return window_bounds(self.causal, window, longest_q, longest_k)

    def upper_bounds(self, sliding_window: int | None) -> Tensor | None:
        """The pack's ``hi`` (int32 (tokens)) as a layer with this window sees it: no token looks further ahead than a
        bidirectional one does."""
        assert self.pack is not None
        hi = self.pack.hi if self.keys is None else self.keys.hi
        if hi is None or sliding_window is None or self.bidirectional_window == "full":
            return hi
        if self.keys is not None:
            positions = self.keys.positions
        else:  # hi counts from a sample's first token, whatever the position of that one is
            positions, _ = positions_and_samples(self.pack.cu_seqlens, self.pack.tokens)
        return torch.minimum(hi, positions.to(torch.int32) + (sliding_window + 1))


def window_sizes(causal: Tensor, sliding_window: int | None, bidirectional_window: str) -> tuple[int, int] | Tensor:
    """``window_size`` of a call, from a config's ``sliding_window``: (W - 1, 0) for a causal sample, else as chosen."""
    if sliding_window is None:
        return (UNLIMITED, UNLIMITED)
    reach = sliding_window if bidirectional_window == "transformers" else UNLIMITED
    left = torch.where(causal, sliding_window - 1, reach)
    right = torch.where(causal, 0, reach)
    return torch.stack([left, right], dim=1).to(torch.int32)
