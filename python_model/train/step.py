"""Gradients of one step: exact for the whole batch, with the memory of a single chunk (gradient caching).

With L_Rep a function of all embeddings, dL_Rep/dtheta = sum over texts of (dL_Rep/de_i) (de_i/dtheta). So the texts are
embedded without gradients, the loss of all embeddings gives each dL_Rep/de_i, and every chunk is embedded again with the
surrogate loss ``sum_i <e_i, dL_Rep/de_i>``, whose gradient is the chunk's contribution. The generative loss is a sum with one
weight per conversation, so the sum over chunks and ranks is the gradient of the whole step's loss. Texts that fit in one chunk
are embedded once.

Source: GradCache, arXiv 2101.06983; GRIT, arXiv 2402.09906 (the memory appendix splits the triplet the same way).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import grit_kernels as gk
from python_model.data.config import BatchConfig
from python_model.model.chunks import Chunk, build_chunk, first_fit, plan_texts
from python_model.model.losses import distillation_losses, group_scores, sample_weights
from python_model.model.prompts import IGNORE_INDEX, EncodedSample
from python_model.settings import AttentionVariant
from python_model.train.balance import ObjectiveGradients
from python_model.train.config import LossConfig
from python_model.train.distributed import Ranks, gradient_sync


@dataclass(frozen=True)
class RankBatch:
    """This rank's chunks of a step, and the numbers shared by all ranks.

    Attributes:
        text_chunks, conversation_chunks: the same number of each on every rank; a rank with less work has empty ones at the end.
        queries, texts: this rank's queries, and its queries and passages together.
        mask_ids: identity of each query's and each passage's text, or None.
        weights: float64 (conversations), the weight of each conversation's summed token losses in the step's loss.
        conversations, all_queries: conversations and queries of the step, on all ranks.
        tokens, labels, pairs: of the step, on all ranks: tokens, those with a label, and (query, key) pairs that see each other.
        first_query: number of queries on earlier ranks.
        scores: float32 (queries, passages per query), of a teacher, NaN in rows of queries without scores; None if no query has
            any.
        scored: queries of the step with scores, on all ranks.
        datasets: int64 (queries) and (conversations), the data set of each, or None.
        num_datasets: number of data sets.
        labels_of: int64 (conversations), labelled tokens of each.
    """

    text_chunks: list[Chunk]
    conversation_chunks: list[Chunk]
    queries: int
    texts: int
    mask_ids: tuple[Tensor, Tensor] | None
    weights: Tensor
    conversations: int
    all_queries: int
    tokens: int
    labels: int
    pairs: int
    first_query: int
    scores: Tensor | None
    scored: int
    datasets: tuple[Tensor, Tensor] | None
    num_datasets: int
    labels_of: Tensor

    @property
    def num_chunks(self) -> int:
        """Forward and backward passes of the step."""
        return len(self.text_chunks) + len(self.conversation_chunks)


@dataclass(frozen=True)
class StepLosses:
    """Losses of the whole step and the norms of their gradients before clipping, the same on all ranks.

    None if the step has no such samples. ``added_norms``: of each objective's gradient after its own limit.
    """

    total: float
    contrastive: float | None
    generative: float | None
    router: float | None = None
    contrastive_grad_norm: float | None = None
    generative_grad_norm: float | None = None
    distillation: float | None = None
    contrastive_by_dataset: list[float | None] = field(default_factory=list)
    generative_by_dataset: list[float | None] = field(default_factory=list)
    added_norms: list[float] = field(default_factory=list)


def plan_step(
    queries: Sequence[EncodedSample],
    passages: Sequence[EncodedSample],
    conversations: Sequence[EncodedSample],
    mask_ids: tuple[Sequence[int], Sequence[int]] | None,
    batch: BatchConfig,
    losses: LossConfig,
    ranks: Ranks,
    *,
    attention: AttentionVariant | None = None,
    scores: Sequence[float | None] = (),
    datasets: tuple[Sequence[int], Sequence[int]] | None = None,
    num_datasets: int = 0,
) -> RankBatch:
    """Splits this rank's samples into chunks, and gathers what ranks must agree on.

    Args:
        attention: as in :func:`build_chunk`.
        scores: a teacher's score of each passage; a query counts as scored if all of its passages are.
        datasets: the data set (of ``num_datasets``) of each query and each conversation, for losses per data set.
    """
    texts = [*queries, *passages]
    text_plan = plan_texts(
        len(queries),
        [len(s) for s in texts],
        budget=batch.chunk_tokens,
        chunking=batch.chunking,
        group_size=len(passages) // len(queries) if queries else 1,
    )
    text_chunks = [
        build_chunk([texts[i] for i in chosen], [], attention=attention, embedded_index=chosen) for chosen in text_plan
    ]
    conversation_chunks = [
        build_chunk([], [conversations[i] for i in chosen], attention=attention, conversation_index=chosen)
        for chosen in first_fit([len(s) for s in conversations], batch.chunk_tokens)
    ]
    counts = [sum(label != IGNORE_INDEX for label in s.labels or []) for s in conversations]
    everyone = ranks.all_lists(counts)
    tokens = sum(c.pack.tokens for c in [*text_chunks, *conversation_chunks])
    teacher = _teacher(scores, len(queries)) if losses.distillation_weight else None
    scored = 0 if teacher is None else int(teacher.isfinite().all(dim=1).sum())
    pairs = sum(_visible_pairs(c.pack) for c in [*text_chunks, *conversation_chunks])
    mine = [len(text_chunks), len(conversation_chunks), tokens, len(conversations), len(queries), scored, pairs]
    shared = ranks.all_values(mine)
    before = int(shared[: ranks.rank, 3].sum())
    totals = [int(total) for total in shared.sum(dim=0)]
    weights = torch.zeros(0, dtype=torch.float64)
    if everyone:
        every_weight = sample_weights(
            torch.tensor(everyone), kind=losses.generative_loss, group=losses.generative_group
        )
        weights = every_weight[before : before + len(conversations)]
    ids = None if mask_ids is None else (torch.tensor(mask_ids[0]), torch.tensor(mask_ids[1]))
    for index, chunks in enumerate((text_chunks, conversation_chunks)):
        chunks += [_empty_chunk() for _ in range(int(shared[:, index].max()) - len(chunks))]
    device = ranks.device
    numbers = None if datasets is None else tuple(torch.tensor(of, dtype=torch.int64, device=device) for of in datasets)
    return RankBatch(
        text_chunks=[c.to(device) for c in text_chunks],
        conversation_chunks=[c.to(device) for c in conversation_chunks],
        queries=len(queries),
        texts=len(texts),
        mask_ids=None if ids is None else (ids[0].to(device), ids[1].to(device)),
        weights=weights.to(device),
        conversations=len(everyone),
        all_queries=totals[4],
        tokens=totals[2],
        labels=sum(everyone),
        pairs=totals[6],
        first_query=int(shared[: ranks.rank, 4].sum()),
        scores=teacher.to(device) if teacher is not None and totals[5] else None,
        scored=totals[5],
        datasets=cast("tuple[Tensor, Tensor] | None", numbers),
        num_datasets=num_datasets,
        labels_of=torch.tensor(counts, dtype=torch.int64, device=device),
    )


def _teacher(scores: Sequence[float | None], queries: int) -> Tensor | None:
    """float32 (queries, passages per query), NaN in the whole row of a query that lacks a score."""
    if not scores:
        return None
    rows = torch.tensor([math.nan if score is None else score for score in scores]).view(queries, -1)
    return torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, math.nan)


def _visible_pairs(pack: gk.SamplePack) -> int:
    """Pairs of a query and a key that it sees, without a sliding window."""
    lengths = pack.lengths.long()
    if pack.hi is not None:
        return int(pack.hi.long().sum())
    pairs = torch.where(pack.causal, lengths * (lengths + 1) // 2, lengths * lengths)
    return int((pairs if pack.contexts is None else pairs + lengths * pack.contexts.lens).sum())


def _empty_chunk() -> Chunk:
    """One token without loss: a rank without work must still take part in collectives."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return replace(build_chunk([EncodedSample([0])], []), embedded=nothing)


class StepGradients:
    """Adds the gradients of a step to ``model``'s weights (and to ``log_temperature``) and returns the step's losses.

    ``model`` is a TrainingModel, plain or wrapped for the ranks; averaging over ranks, as DDP and FSDP do, gives the gradient
    of the returned losses. Texts come first, then conversations, so that each objective's gradient can be clipped
    (``objective_grad_norm``) before they are added.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: LossConfig,
        ranks: Ranks,
        *,
        bf16: bool = True,
        normalized: bool = True,
        objective_grad_norm: float = 0.0,
        reduce_each_chunk: bool = False,
        log_temperature: nn.Parameter | None = None,
        router_loss_weight: float = 0.0,
    ) -> None:
        self.model, self.losses, self.ranks = model, losses, ranks
        self.normalized = normalized
        self.bf16, self.objective_grad_norm, self.reduce_each_chunk = bf16, objective_grad_norm, reduce_each_chunk
        self.log_temperature = log_temperature
        self.router_loss_weight = router_loss_weight
        # without other ranks, this one has all queries
        self._across = losses.cross_device_negatives or ranks.group is None
        self._router = torch.zeros((), dtype=torch.float64)
        self._distillation = torch.zeros((), dtype=torch.float64)
        self._by_dataset = torch.zeros(4, 0, dtype=torch.float64)

    def __call__(self, batch: RankBatch, seed: int) -> StepLosses:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = ObjectiveGradients(trained, self.objective_grad_norm)
        device = self.ranks.device
        self._router = torch.zeros((), dtype=torch.float64, device=device)
        self._distillation = torch.zeros((), dtype=torch.float64, device=device)
        # sums of the queries' losses, queries, sums of the tokens' losses, tokens
        self._by_dataset = torch.zeros(4, batch.num_datasets, dtype=torch.float64, device=device)
        contrastive = generative = contrastive_norm = generative_norm = None
        if batch.text_chunks:
            contrastive = self._text_gradients(batch, seed)
            # losses without a teacher's scores have no part in this step's gradient
            distilled = self.losses.distillation_weight if batch.scored else 0.0
            contrastive_norm = gradients.take(self.losses.contrastive_weight + distilled)
        if batch.conversation_chunks:
            generative = self._conversation_gradients(batch, seed)
            generative_norm = gradients.take(self.losses.generative_weight)
        added = gradients.add()
        return self._report(batch, contrastive, generative, contrastive_norm, generative_norm, added)

    def _text_gradients(self, batch: RankBatch, seed: int) -> Tensor:
        """Adds the contrastive loss's gradients; returns this rank's part of the loss."""
        embedding_grads: Tensor | None = None
        contrastive: Tensor | None = None
        if len(batch.text_chunks) > 1:
            leaves = self._embed(batch, seed)
            contrastive, text_objective = self._text_losses(leaves, batch)
            text_objective.backward()
            embedding_grads = leaves.grad
        for index, chunk in enumerate(batch.text_chunks):
            with self._pass(batch, chunk, seed, index, last=chunk is batch.text_chunks[-1]) as (vectors, _, objective):
                if vectors is not None and embedding_grads is not None:
                    objective = objective + (vectors * embedding_grads[chunk.embedded]).sum()
                elif vectors is not None:
                    contrastive, text_objective = self._text_losses(vectors, batch)
                    objective = objective + text_objective
                objective.backward()
        assert contrastive is not None
        return contrastive.detach()

    def _conversation_gradients(self, batch: RankBatch, seed: int) -> Tensor:
        """Adds the next-token loss's gradients; returns this rank's part of the loss."""
        generative = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for index, chunk in enumerate(batch.conversation_chunks):
            last = chunk is batch.conversation_chunks[-1]
            with self._pass(batch, chunk, seed, len(batch.text_chunks) + index, last=last) as (_, sums, objective):
                if sums is not None:
                    weighted = (sums * batch.weights[chunk.conversations].float()).sum()
                    objective = objective + weighted * (self.losses.generative_weight * self.ranks.world)
                    generative += weighted.detach().double()
                    if batch.datasets is not None:
                        chosen = batch.datasets[1][chunk.conversations]
                        self._by_dataset[2].index_add_(0, chosen, sums.detach().double())
                        self._by_dataset[3].index_add_(0, chosen, batch.labels_of[chunk.conversations].double())
                objective.backward()
        return generative

    @contextlib.contextmanager
    def _pass(
        self, batch: RankBatch, chunk: Chunk, seed: int, index: int, *, last: bool
    ) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor]]:
        """One forward pass: embeddings, sums of token losses, and the router loss's part of the objective. The block calls
        backward, which sums gradients over the ranks after an objective's last chunk."""
        with gradient_sync(self.model, last or self.reduce_each_chunk):
            with self._computing(seed, index):
                vectors, sums, router_loss = self.model(chunk)
            real = chunk.embedded.shape[0] or chunk.conversations.shape[0]
            portion = chunk.pack.tokens / batch.tokens if real else 0.0
            self._router += router_loss.detach().double() * portion
            # gradients are averaged over ranks later, so sums are scaled up here
            yield vectors, sums, router_loss * (self.router_loss_weight * portion * self.ranks.world)

    def _embed(self, batch: RankBatch, seed: int) -> Tensor:
        """float32 (texts, size) embeddings of this rank, detached and ready to receive a gradient."""
        rows: Tensor | None = None
        with torch.no_grad():
            for index, chunk in enumerate(batch.text_chunks):
                with self._computing(seed, index):
                    vectors, _, _ = self.model(chunk)
                if vectors is None:
                    continue
                if rows is None:
                    rows = vectors.new_empty((batch.texts, vectors.shape[1]))
                rows[chunk.embedded] = vectors
        assert rows is not None
        return rows.requires_grad_()

    def _text_losses(self, vectors: Tensor, batch: RankBatch) -> tuple[Tensor, Tensor]:
        """The contrastive loss, and the weighted sum of all losses of embeddings, over the texts of all ranks; gradients are
        exact after averaging over ranks."""
        config, ranks = self.losses, self.ranks
        size = vectors.shape[1]
        temperature: float | Tensor = config.temperature
        if self.log_temperature is not None:
            temperature = self.log_temperature[0].exp()
        contrastive, distillation = [], []
        for dim in (size, *config.matryoshka_dims):
            cut = vectors[:, :dim]
            if dim < size and self.normalized:
                cut = nn.functional.normalize(cut, dim=-1)
            contrastive.append(self._contrastive_losses(cut, batch, temperature))
            if batch.scores is not None:
                student = group_scores(cut, batch.queries) / temperature
                distillation.append(distillation_losses(student, batch.scores / config.teacher_temperature))
        # of the queries of all ranks if they share negatives, else of this rank's
        each = torch.stack(contrastive).mean(dim=0)
        loss = each.mean()
        if not self._across:
            # ranks may differ by one query: the mean over all queries is the mean of this over ranks
            loss = loss * (batch.queries * ranks.world / batch.all_queries)
        if batch.datasets is not None:
            own = each[batch.first_query :][: batch.queries] if self._across else each
            self._by_dataset[0].index_add_(0, batch.datasets[0], own.detach().double())
            self._by_dataset[1].index_add_(0, batch.datasets[0], torch.ones_like(own, dtype=torch.float64))
        objective = loss * config.contrastive_weight
        if distillation:
            part = torch.stack(distillation).mean(dim=0).sum() / batch.scored
            self._distillation = part.detach().double()
            objective = objective + part * (config.distillation_weight * ranks.world)
        return loss, objective

    def _contrastive_losses(self, vectors: Tensor, batch: RankBatch, temperature: float | Tensor) -> Tensor:
        """float32: the loss of each query."""
        config = self.losses
        losses = gk.contrastive_loss(
            vectors[: batch.queries],
            vectors[batch.queries :],
            temperature=temperature,
            in_batch_negatives=config.in_batch_negatives,
            mask_ids=batch.mask_ids,
            symmetric=config.symmetric,
            process_group=self.ranks.group if self._across else None,
            reduction="none",
        )
        return cast(Tensor, losses)

    @contextlib.contextmanager
    def _computing(self, seed: int, index: int) -> Iterator[None]:
        """The precision of a forward pass, and a random state that depends only on step, rank and chunk, so both passes draw
        alike.
        """
        # torch accepts 64 bits
        torch.manual_seed(((seed * 1_000_003 + index) * 4096 + self.ranks.rank) % 2**63)
        autocast: Any = contextlib.nullcontext()
        if self.bf16:
            autocast = torch.autocast(self.ranks.device.type, torch.bfloat16)
        with autocast:
            yield

    def _report(
        self,
        batch: RankBatch,
        contrastive: Tensor | None,
        generative: Tensor | None,
        contrastive_norm: float | None,
        generative_norm: float | None,
        added: list[float],
    ) -> StepLosses:
        config = self.losses
        parts = (contrastive, generative, self._router, self._distillation)
        mine = [torch.zeros_like(self._router) if loss is None else loss.double() for loss in parts]
        # read back from the device once
        shared = self.ranks.all_values(torch.cat([torch.stack(mine), self._by_dataset.flatten()]).tolist())
        rep = float(shared[:, 0].mean()) if contrastive is not None else None
        gen = float(shared[:, 1].sum()) if generative is not None else None
        balance = float(shared[:, 2].sum()) if self.router_loss_weight else None
        distilled = float(shared[:, 3].sum()) if batch.scored else None
        total = (
            config.contrastive_weight * (rep or 0.0)
            + config.generative_weight * (gen or 0.0)
            + self.router_loss_weight * (balance or 0.0)
            + config.distillation_weight * (distilled or 0.0)
        )
        query_sum, queries, token_sum, tokens = shared[:, 4:].sum(dim=0).view(4, -1).tolist()
        by_dataset = [
            [loss / count if count else None for loss, count in zip(sums, counts, strict=True)]
            for sums, counts in ((query_sum, queries), (token_sum, tokens))
        ]
        return StepLosses(
            total,
            rep,
            gen,
            balance,
            contrastive_norm,
            generative_norm,
            distilled,
            contrastive_by_dataset=by_dataset[0],
            generative_by_dataset=by_dataset[1],
            added_norms=added,
        )
