"""Samples that also see tokens of earlier samples: a reply that follows documents, each of which was read on its own.

A pack's samples do not see each other. A sample with a context is the exception: its keys are those of its context, tokens of
other samples in a chosen order, and then its own; its queries are the last of these, as after a cache. So nothing is added to
the visibility rule. The other samples compute what a document's cached states hold, and the gradient reaches them.

Two calls per layer give this: one over the samples without a context and one over those with, whose keys are gathered. Keys that
several samples see are rows of their own in the second call, so their gradients are summed by the gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleTable:
    """Some samples of a pack as the rows of one attention call.

    Attributes:
        samples: int64 (S), which samples.
        rows: int64, their tokens in the pack, sample after sample: the queries.
        keys: int64, tokens in the pack whose keys they see, sample after sample.
        q_start, q_len, k_start, k_len: int32 (S), where each sample's queries and keys are among these.
        max_q, max_k: the largest of the lengths.
    """

    samples: Tensor
    rows: Tensor
    keys: Tensor
    q_start: Tensor
    q_len: Tensor
    k_start: Tensor
    k_len: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, samples: Sequence[int], rows: Sequence[Tensor], keys: Sequence[Tensor]) -> SampleTable:
        """``rows``, ``keys``: of each sample, int64."""
        (q_start, q_len), (k_start, k_len) = (_starts_and_lengths(parts) for parts in (rows, keys))
        longest = (int(q_len.max()), int(k_len.max()))
        return cls(
            torch.tensor(samples),
            torch.cat(list(rows)),
            torch.cat(list(keys)),
            q_start,
            q_len,
            k_start,
            k_len,
            *longest,
        )

    def to(self, device: torch.device | str) -> SampleTable:
        """The same table on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def _starts_and_lengths(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """int32 (S): where each part begins in their concatenation, and its length."""
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    return (lengths.cumsum(0) - lengths).to(torch.int32), lengths.to(torch.int32)


@dataclass(frozen=True)
class Contexts:
    """The contexts of a pack.

    Attributes:
        alone, after: the samples without a context, and those with one.
        back: int64 (tokens): where each token of the pack is among the rows of ``alone`` and then ``after``.
        lens: int32 (B), tokens of each sample's context.
    """

    alone: SampleTable
    after: SampleTable
    back: Tensor
    lens: Tensor

    @classmethod
    def of(cls, sizes: Tensor, contexts: Sequence[Sequence[int] | Tensor | None]) -> Contexts | None:
        """Those of samples of ``sizes`` (int64 (B)) tokens; None if no sample has one.

        Raises:
            ValueError: not one context per sample, or tokens that are not those of a sample without a context.
        """
        count = sizes.shape[0]
        if len(contexts) != count:
            raise ValueError(f"contexts: expected one for each of the {count} samples, got {len(contexts)}")
        given = [torch.as_tensor([] if c is None else c, dtype=torch.int64, device="cpu").reshape(-1) for c in contexts]
        after = [b for b, context in enumerate(given) if len(context)]
        if not after:
            return None
        alone = [b for b in range(count) if not len(given[b])]
        own = list(torch.arange(int(sizes.sum())).split(sizes.tolist()))
        allowed = torch.zeros(int(sizes.sum()), dtype=torch.bool)
        for b in alone:
            allowed[own[b]] = True
        for b in after:
            outside = (given[b] < 0) | (given[b] >= allowed.shape[0])
            if bool(outside.any()) or not bool(allowed[given[b]].all()):
                raise ValueError(
                    f"contexts: expected tokens of samples that have none themselves, got others for sample {b}"
                )
        rows = [own[b] for b in (*alone, *after)]
        return cls(
            SampleTable.of(alone, [own[b] for b in alone], [own[b] for b in alone]),
            SampleTable.of(after, [own[b] for b in after], [torch.cat([given[b], own[b]]) for b in after]),
            torch.argsort(torch.cat(rows)),
            torch.tensor([len(context) for context in given], dtype=torch.int32),
        )

    def to(self, device: torch.device | str) -> Contexts:
        """The same contexts on another device."""
        return Contexts(self.alone.to(device), self.after.to(device), self.back.to(device), self.lens.to(device))
