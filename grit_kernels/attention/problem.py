"""Everything that defines an attention call besides q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from grit_kernels.problem import Problem

SampleTables: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]"
"""q_start, q_len, k_start, k_len, left, right."""


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """B samples over q (Tq, Hq, D) and k, v (Tk, Hkv, D).

    Sample b owns the ``q_len[b]`` rows from row ``q_start[b]`` and the ``k_len[b]`` keys from row ``k_start[b]`` (int32 (B)).
    A pack and a padded batch differ in these numbers only. ``left``, ``right`` (int32 (B)), ``hi`` (int32 (Tq)): see
    visibility.py. ``q_rows``: 0 for a pack; in a rectangular batch the number of rows each sample owns, whose unused part gets
    out 0 and lse -inf (``k_rows`` likewise for the gradients of k and v). ``max_q``, ``max_k``: upper bounds of the lengths, so
    nothing is read back from the device.
    """

    q_start: Tensor
    q_len: Tensor
    k_start: Tensor
    k_len: Tensor
    left: Tensor
    right: Tensor
    hi: Tensor | None
    q_rows: int
    k_rows: int
    max_q: int
    max_k: int
    softmax_scale: float
    softcap: float

    @property
    def tables(self) -> SampleTables:
        """The numbers of each sample."""
        return self.q_start, self.q_len, self.k_start, self.k_len, self.left, self.right


class Shapes(NamedTuple):
    """What the order of tiles depends on besides the problem: q (rows, heads, dim) and k (keys, heads_kv, dim) in ``dtype``."""

    rows: int
    heads: int
    keys: int
    heads_kv: int
    dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Shapes:
        """Those of tensors."""
        return cls(q.shape[0], q.shape[1], k.shape[0], k.shape[1], q.shape[2], q.dtype)
