"""What the contrastive ops compare."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grit_kernels.problem import Problem


@dataclass(frozen=True)
class ContrastiveProblem(Problem):
    """queries (Q, D) and passages (P, D) of one dtype, temperature a one-element tensor, targets int64 (Q).

    query_ids int64 (Q) and passage_ids int64 (P), or both None: a passage with the query's id that is not its target is no
    candidate. Without ``in_batch_negatives`` only the query's own group of passages are candidates.
    """

    queries: Tensor
    passages: Tensor
    temperature: Tensor
    targets: Tensor
    query_ids: Tensor | None
    passage_ids: Tensor | None
    in_batch_negatives: bool
    normalize: bool

    @property
    def counts(self) -> tuple[int, int]:
        """Queries and passages."""
        return self.queries.shape[0], self.passages.shape[0]

    @property
    def group(self) -> int:
        """Passages of a query's own group; 0 where all passages are candidates."""
        return 0 if self.in_batch_negatives else self.counts[1] // self.counts[0]
