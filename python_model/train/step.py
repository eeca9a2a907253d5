"""Gradients of one step: exact for the whole batch, in memory for one chunk of it (gradient caching).

With L_Rep a function of all embeddings, dL_Rep/dtheta = sum over texts of (dL_Rep/de_i) (de_i/dtheta). So the texts are embedded
without gradients, the loss of all embeddings gives each dL_Rep/de_i, and every chunk is embedded again with the surrogate
``sum_i <e_i, dL_Rep/de_i>``, whose gradient is the chunk's part. The generative loss is a sum with one weight per conversation,
so conversations ride in the same chunks, and the sum over chunks and ranks is the gradient of the whole step's loss.

Source: GradCache, arXiv 2101.06983; GRIT, arXiv 2402.09906 (the memory appendix splits the triplet the same way).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import grit_kernels as gk
from python_model.model.chunks import Chunk, build_chunk, plan_chunks
from python_model.model.losses import sample_weights
from python_model.model.prompts import IGNORE_INDEX, EncodedSample
from python_model.train.config import TrainConfig
from python_model.train.distributed import Ranks, gradient_sync


@dataclass(frozen=True)
class Share:
    """This rank's chunks of a step, and the numbers that all ranks share.

    Attributes:
        chunks: as many on every rank; a rank with less to do has empty ones at the end.
        filled: how many of them hold samples of this rank.
        embedding_rounds: the first that many chunks of some rank hold texts to embed.
        queries, texts: this rank's queries, and its queries and passages together.
        mask_ids: identity of each query's and each passage's text, or None.
        weights: float64 (conversations), what each conversation's summed token losses count in the step's loss.
        conversations: conversations of the step, on all ranks.
        tokens: of the step, on all ranks.
    """

    chunks: list[Chunk]
    filled: int
    embedding_rounds: int
    queries: int
    texts: int
    mask_ids: tuple[Tensor, Tensor] | None
    weights: Tensor
    conversations: int
    tokens: int


@dataclass(frozen=True)
class StepLosses:
    """Losses of the whole step, the same on all ranks; None where the step has no such samples."""

    total: float
    contrastive: float | None
    generative: float | None
    router: float | None = None


def plan_step(
    queries: Sequence[EncodedSample],
    passages: Sequence[EncodedSample],
    conversations: Sequence[EncodedSample],
    mask_ids: tuple[Sequence[int], Sequence[int]] | None,
    config: TrainConfig,
    ranks: Ranks,
    *,
    right: int = -1,
) -> Share:
    """Chunks of this rank's samples, and what the ranks must agree on. ``right`` as in :func:`build_chunk`."""
    texts = [*queries, *passages]
    plan = plan_chunks(
        len(queries),
        [len(s) for s in passages],
        [len(s) for s in queries],
        [len(s) for s in conversations],
        budget=config.chunk_tokens,
        chunking=config.chunking,
        group_size=config.train_group_size,
        # dropout draws its mask over a whole pack: the pass without gradients must see the same pack
        apart=bool(config.lora_rank and config.lora_dropout),
    )
    # texts first: only these chunks take part in the pass without gradients
    plan.sort(key=lambda part: not part[0])
    chunks = [
        build_chunk(
            [texts[i] for i in chosen],
            [conversations[i] for i in talks],
            attn=config.attn,
            right=right,
            embedded_index=chosen,
            conversation_index=talks,
        )
        for chosen, talks in plan
    ]
    counts = [sum(label != IGNORE_INDEX for label in s.labels or []) for s in conversations]
    everyone = ranks.all_lists(counts)
    shared = ranks.all_values(
        [len(chunks), sum(bool(chosen) for chosen, _ in plan), sum(c.pack.tokens for c in chunks), len(conversations)]
    )
    rounds, embedding_rounds = (int(x) for x in shared[:, :2].amax(dim=0))
    before = int(shared[: ranks.rank, 3].sum())
    weights = torch.zeros(0, dtype=torch.float64)
    if everyone:
        every_weight = sample_weights(
            torch.tensor(everyone), kind=config.generative_loss, group=config.generative_group
        )
        weights = every_weight[before : before + len(conversations)]
    ids = None if mask_ids is None else (torch.tensor(mask_ids[0]), torch.tensor(mask_ids[1]))
    filled = len(chunks)
    chunks += [_empty_chunk(config.attn) for _ in range(rounds - filled)]
    return Share(
        [c.to(ranks.device) for c in chunks],
        filled,
        embedding_rounds,
        len(queries),
        len(texts),
        None if ids is None else (ids[0].to(ranks.device), ids[1].to(ranks.device)),
        weights.to(ranks.device),
        len(everyone),
        int(shared[:, 2].sum()),
    )


def _empty_chunk(attn: str) -> Chunk:
    """One token that nothing is learned from: a rank without work must still take part in collectives."""
    return build_chunk([EncodedSample([0])], [], attn=attn, embedded_index=[-1])


class StepGradients:
    """Adds the gradients of a step to ``model``'s weights (and to ``log_temperature``) and returns the step's losses.

    ``model`` is a TrainingModel, alone or wrapped for the ranks; averaging over ranks, as DDP and FSDP do, gives the gradient
    of the losses returned.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        ranks: Ranks,
        log_temperature: nn.Parameter | None = None,
        router_loss_weight: float = 0.0,
    ) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.log_temperature = log_temperature
        self.router_loss_weight = router_loss_weight

    def __call__(self, share: Share, seed: int) -> StepLosses:
        one_pass = len(share.chunks) == 1
        embeds = share.embedding_rounds > 0
        contrastive: Tensor | None = None
        slopes: Tensor | None = None
        if embeds and not one_pass:
            leaves = self._embed(share, seed)
            contrastive = self._contrastive(leaves, share)
            (contrastive * self.config.contrastive_weight).backward()
            slopes = leaves.grad
            contrastive = contrastive.detach()
        generative = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        router = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for index, chunk in enumerate(share.chunks):
            last = index == len(share.chunks) - 1
            with gradient_sync(self.model, last or self.config.reduce_each_chunk):
                with self._computing(seed, index):
                    vectors, sums, router_loss = self.model(chunk)
                    real = index < share.filled
                    # a mean over ranks follows, so sums over ranks are scaled up
                    portion = chunk.pack.tokens / share.tokens if real else 0.0
                    objective = router_loss * (self.router_loss_weight * portion * self.ranks.world)
                    if vectors is not None:
                        if not real:
                            objective = objective + vectors.sum() * 0
                        elif slopes is not None:
                            objective = objective + (vectors * slopes[chunk.embedded]).sum()
                        else:
                            contrastive = self._contrastive(vectors, share)
                            objective = objective + contrastive * self.config.contrastive_weight
                    if sums is not None:
                        weighted = (sums * share.weights[chunk.conversations].float()).sum()
                        objective = objective + weighted * (self.config.generative_weight * self.ranks.world)
                        generative += weighted.detach().double()
                    router += router_loss.detach().double() * portion
                objective.backward()
        return self._report(share, contrastive, generative, router)

    def _embed(self, share: Share, seed: int) -> Tensor:
        """float32 (texts, size) embeddings of this rank without a graph, ready to collect their gradient."""
        rows: Tensor | None = None
        with torch.no_grad():
            for index, chunk in enumerate(share.chunks[: share.embedding_rounds]):
                with self._computing(seed, index):
                    vectors, _, _ = self.model(self._texts_only(chunk))
                if vectors is None or index >= share.filled:
                    continue
                if rows is None:
                    rows = vectors.new_empty((share.texts, vectors.shape[1]))
                rows[chunk.embedded] = vectors
        assert rows is not None
        return rows.requires_grad_()

    def _texts_only(self, chunk: Chunk) -> Chunk:
        """The chunk without its conversations, which the pass without gradients does not need."""
        texts = chunk.embedded.shape[0]
        if not chunk.conversations.shape[0] or not texts:
            return chunk
        end = chunk.embedding_tokens
        pack = chunk.pack
        lengths = pack.lengths[:texts]
        return Chunk(
            chunk.input_ids[:end],
            gk.SamplePack(
                pack.cu_seqlens[: texts + 1],
                pack.causal[:texts],
                pack.instruction_lens[:texts],
                int(lengths.max()),
                end,
                None if pack.hi is None else pack.hi[:end],
            ),
            chunk.embedded,
            chunk.conversations[:0],
            end,
            chunk.labels[:0],
        )

    def _contrastive(self, vectors: Tensor, share: Share) -> Tensor:
        """The contrastive loss over all ranks' texts, with gradients that a mean over ranks makes exact."""
        config, ranks = self.config, self.ranks
        across = config.cross_device_negatives and ranks.group is not None
        temperature: float | Tensor = config.temperature
        if self.log_temperature is not None:
            temperature = self.log_temperature[0].exp()
        loss = cast(
            Tensor,
            gk.contrastive_loss(
                vectors[: share.queries],
                vectors[share.queries :],
                temperature=temperature,
                in_batch_negatives=config.in_batch_negatives,
                mask_ids=share.mask_ids,
                symmetric=config.symmetric,
                process_group=ranks.group if across else None,
                gradient_scale=cast(Literal["exact", "reference"], config.gradient_scale),
            ),
        )
        if across or ranks.group is None:
            return loss
        # ranks may hold one query more or less: the mean over all queries is the mean over ranks of this
        return loss * (share.queries * ranks.world / config.embedding_batch_size)

    @contextlib.contextmanager
    def _computing(self, seed: int, index: int) -> Iterator[None]:
        """The precision of a forward, and a random state that depends on step, rank and chunk only: both passes draw alike."""
        # torch takes 64 bits
        torch.manual_seed(((seed * 1_000_003 + index) * 4096 + self.ranks.rank) % 2**63)
        autocast: Any = contextlib.nullcontext()
        if self.config.bf16:
            autocast = torch.autocast(self.ranks.device.type, torch.bfloat16)
        with autocast:
            yield

    def _report(self, share: Share, contrastive: Tensor | None, generative: Tensor, router: Tensor) -> StepLosses:
        config = self.config
        mine = 0.0 if contrastive is None else float(contrastive.detach())
        shared = self.ranks.all_values([mine, float(generative), float(router)])
        rep = float(shared[:, 0].mean()) if contrastive is not None else None
        gen = float(shared[:, 1].sum()) if share.conversations else None
        balance = float(shared[:, 2].sum()) if self.router_loss_weight else None
        total = (
            config.contrastive_weight * (rep or 0.0)
            + config.generative_weight * (gen or 0.0)
            + self.router_loss_weight * (balance or 0.0)
        )
        return StepLosses(total, rep, gen, balance)
