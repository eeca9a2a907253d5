"""Gradients of one step: exact for the whole batch, in memory for one chunk of it (gradient caching).

With L_Rep a function of all embeddings, dL_Rep/dtheta = sum over texts of (dL_Rep/de_i) (de_i/dtheta). So the texts are embedded
without gradients, the loss of all embeddings gives each dL_Rep/de_i, and every chunk is embedded again with the surrogate
``sum_i <e_i, dL_Rep/de_i>``, whose gradient is the chunk's part. The generative loss is a sum with one weight per conversation,
so the sum over chunks and ranks is the gradient of the whole step's loss. Texts that fit in one chunk are embedded once.

Source: GradCache, arXiv 2101.06983; GRIT, arXiv 2402.09906 (the memory appendix splits the triplet the same way).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import grit_kernels as gk
from python_model.data.config import BatchConfig
from python_model.model.chunks import Chunk, build_chunk, first_fit, plan_texts
from python_model.model.losses import sample_weights
from python_model.model.prompts import IGNORE_INDEX, EncodedSample
from python_model.settings import AttentionVariant
from python_model.train.balance import ObjectiveGradients
from python_model.train.config import LossConfig
from python_model.train.distributed import Ranks, gradient_sync


@dataclass(frozen=True)
class RankBatch:
    """This rank's chunks of a step, and the numbers that all ranks share.

    Attributes:
        text_chunks, conversation_chunks: as many of each on every rank; a rank with less to do has empty ones at the end.
        queries, texts: this rank's queries, and its queries and passages together.
        mask_ids: identity of each query's and each passage's text, or None.
        weights: float64 (conversations), what each conversation's summed token losses count in the step's loss.
        conversations, all_queries: conversations and queries of the step, on all ranks.
        tokens: of the step, on all ranks.
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

    @property
    def num_chunks(self) -> int:
        """Forward and backward passes of the step."""
        return len(self.text_chunks) + len(self.conversation_chunks)


@dataclass(frozen=True)
class StepLosses:
    """Losses of the whole step and the norms of their gradients before any limit, the same on all ranks.

    None where the step has no such samples.
    """

    total: float
    contrastive: float | None
    generative: float | None
    router: float | None = None
    contrastive_grad_norm: float | None = None
    generative_grad_norm: float | None = None


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
) -> RankBatch:
    """Chunks of this rank's samples, and what the ranks must agree on. ``attention`` as in :func:`build_chunk`."""
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
    shared = ranks.all_values([len(text_chunks), len(conversation_chunks), tokens, len(conversations), len(queries)])
    before = int(shared[: ranks.rank, 3].sum())
    weights = torch.zeros(0, dtype=torch.float64)
    if everyone:
        every_weight = sample_weights(
            torch.tensor(everyone), kind=losses.generative_loss, group=losses.generative_group
        )
        weights = every_weight[before : before + len(conversations)]
    ids = None if mask_ids is None else (torch.tensor(mask_ids[0]), torch.tensor(mask_ids[1]))
    for index, chunks in enumerate((text_chunks, conversation_chunks)):
        chunks += [_empty_chunk() for _ in range(int(shared[:, index].max()) - len(chunks))]
    return RankBatch(
        [c.to(ranks.device) for c in text_chunks],
        [c.to(ranks.device) for c in conversation_chunks],
        len(queries),
        len(texts),
        None if ids is None else (ids[0].to(ranks.device), ids[1].to(ranks.device)),
        weights.to(ranks.device),
        len(everyone),
        int(shared[:, 4].sum()),
        int(shared[:, 2].sum()),
    )


def _empty_chunk() -> Chunk:
    """One token that nothing is learned from: a rank without work must still take part in collectives."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return replace(build_chunk([EncodedSample([0])], []), embedded=nothing)


class StepGradients:
    """Adds the gradients of a step to ``model``'s weights (and to ``log_temperature``) and returns the step's losses.

    ``model`` is a TrainingModel, alone or wrapped for the ranks; averaging over ranks, as DDP and FSDP do, gives the gradient
    of the losses returned. Texts come first, then conversations, so that each objective's gradient can be limited
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
        self._router = torch.zeros((), dtype=torch.float64)

    def __call__(self, batch: RankBatch, seed: int) -> StepLosses:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = ObjectiveGradients(trained, self.objective_grad_norm)
        self._router = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        contrastive = generative = contrastive_norm = generative_norm = None
        if batch.text_chunks:
            contrastive = self._text_gradients(batch, seed)
            contrastive_norm = gradients.take()
        if batch.conversation_chunks:
            generative = self._conversation_gradients(batch, seed)
            generative_norm = gradients.take()
        gradients.add()
        return self._report(contrastive, generative, contrastive_norm, generative_norm)

    def _text_gradients(self, batch: RankBatch, seed: int) -> Tensor:
        """Adds the contrastive loss' gradients; returns this rank's part of the loss."""
        embedding_grads: Tensor | None = None
        contrastive: Tensor | None = None
        if len(batch.text_chunks) > 1:
            leaves = self._embed(batch, seed)
            contrastive = self._contrastive(leaves, batch)
            (contrastive * self.losses.contrastive_weight).backward()
            embedding_grads = leaves.grad
        for index, chunk in enumerate(batch.text_chunks):
            with self._pass(batch, chunk, seed, index, last=chunk is batch.text_chunks[-1]) as (vectors, _, objective):
                if vectors is not None and embedding_grads is not None:
                    objective = objective + (vectors * embedding_grads[chunk.embedded]).sum()
                elif vectors is not None:
                    contrastive = self._contrastive(vectors, batch)
                    objective = objective + contrastive * self.losses.contrastive_weight
                objective.backward()
        assert contrastive is not None
        return contrastive.detach()

    def _conversation_gradients(self, batch: RankBatch, seed: int) -> Tensor:
        """Adds the next-token loss' gradients; returns this rank's part of the loss."""
        generative = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for index, chunk in enumerate(batch.conversation_chunks):
            last = chunk is batch.conversation_chunks[-1]
            with self._pass(batch, chunk, seed, len(batch.text_chunks) + index, last=last) as (_, sums, objective):
                if sums is not None:
                    weighted = (sums * batch.weights[chunk.conversations].float()).sum()
                    objective = objective + weighted * (self.losses.generative_weight * self.ranks.world)
                    generative += weighted.detach().double()
                objective.backward()
        return generative

    @contextlib.contextmanager
    def _pass(
        self, batch: RankBatch, chunk: Chunk, seed: int, index: int, *, last: bool
    ) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor]]:
        """One forward: embeddings, sums of token losses, and the router loss' part of the objective. The block inside calls
        backward, which sums gradients over the ranks after an objective's last chunk."""
        with gradient_sync(self.model, last or self.reduce_each_chunk):
            with self._computing(seed, index):
                vectors, sums, router_loss = self.model(chunk)
            real = chunk.embedded.shape[0] or chunk.conversations.shape[0]
            portion = chunk.pack.tokens / batch.tokens if real else 0.0
            self._router += router_loss.detach().double() * portion
            # a mean over ranks follows, so sums over ranks are scaled up
            yield vectors, sums, router_loss * (self.router_loss_weight * portion * self.ranks.world)

    def _embed(self, batch: RankBatch, seed: int) -> Tensor:
        """float32 (texts, size) embeddings of this rank without a graph, ready to collect their gradient."""
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

    def _contrastive(self, vectors: Tensor, batch: RankBatch) -> Tensor:
        """The contrastive loss over all ranks' texts, with gradients that a mean over ranks makes exact."""
        config, ranks = self.losses, self.ranks
        across = config.cross_device_negatives and ranks.group is not None
        temperature: float | Tensor = config.temperature
        if self.log_temperature is not None:
            temperature = self.log_temperature[0].exp()
        size = vectors.shape[1]
        if wrong := [dim for dim in config.matryoshka_dims if dim >= size]:
            raise ValueError(f"losses.matryoshka_dims: expected sizes below the embedding's {size}, got {wrong[0]}")
        parts = []
        for dim in (size, *config.matryoshka_dims):
            cut = vectors[:, :dim]
            if dim < size and self.normalized:
                cut = nn.functional.normalize(cut, dim=-1)
            loss = gk.contrastive_loss(
                cut[: batch.queries],
                cut[batch.queries :],
                temperature=temperature,
                in_batch_negatives=config.in_batch_negatives,
                mask_ids=batch.mask_ids,
                symmetric=config.symmetric,
                process_group=ranks.group if across else None,
            )
            parts.append(cast(Tensor, loss))
        loss = torch.stack(parts).mean() if len(parts) > 1 else parts[0]
        if across or ranks.group is None:
            return loss
        # ranks may hold one query more or less: the mean over all queries is the mean over ranks of this
        return loss * (batch.queries * ranks.world / batch.all_queries)

    @contextlib.contextmanager
    def _computing(self, seed: int, index: int) -> Iterator[None]:
        """The precision of a forward, and a random state that depends on step, rank and chunk only: both passes draw alike."""
        # torch takes 64 bits
        torch.manual_seed(((seed * 1_000_003 + index) * 4096 + self.ranks.rank) % 2**63)
        autocast: Any = contextlib.nullcontext()
        if self.bf16:
            autocast = torch.autocast(self.ranks.device.type, torch.bfloat16)
        with autocast:
            yield

    def _report(
        self,
        contrastive: Tensor | None,
        generative: Tensor | None,
        contrastive_norm: float | None,
        generative_norm: float | None,
    ) -> StepLosses:
        config = self.losses
        mine = [0.0 if loss is None else float(loss) for loss in (contrastive, generative, self._router)]
        shared = self.ranks.all_values(mine)
        rep = float(shared[:, 0].mean()) if contrastive is not None else None
        gen = float(shared[:, 1].sum()) if generative is not None else None
        balance = float(shared[:, 2].sum()) if self.router_loss_weight else None
        total = (
            config.contrastive_weight * (rep or 0.0)
            + config.generative_weight * (gen or 0.0)
            + self.router_loss_weight * (balance or 0.0)
        )
        return StepLosses(total, rep, gen, balance, contrastive_norm, generative_norm)
