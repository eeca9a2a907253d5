"""From rows to one pack: queries, passages and conversations of a step behind one another, each with its own flag."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

import grit_kernels as gk
from python_model.data.jsonl import EmbeddingRow, GenerativeRow
from python_model.prompts import EncodedSample, embed_instruction, encode_conversation, encode_text
from python_model.train.config import TrainConfig

Row = TypeVar("Row")


@dataclass(frozen=True)
class UnifiedBatch:
    """One step's samples as a pack, ordered queries, passages, conversations.

    Attributes:
        input_ids: int64 (tokens).
        pack: the pack of all samples; texts to embed carry the flag of the attention variant, conversations are causal.
        queries, passages: how many samples of each kind; the conversations are the rest.
        embedding_tokens: tokens of queries and passages together; the conversations' tokens follow.
        labels: int64 (tokens of the conversations), shifted; IGNORE_INDEX where there is no loss.
        generative_cu_seqlens: int32 (conversations + 1), counted from the first conversation.
        mask_ids: per query and per passage the identity of the (positive) text, so a duplicate is no negative.
    """

    input_ids: Tensor
    pack: gk.SamplePack
    queries: int
    passages: int
    embedding_tokens: int
    labels: Tensor
    generative_cu_seqlens: Tensor
    mask_ids: tuple[Tensor, Tensor] | None

    def to(self, device: torch.device | str) -> UnifiedBatch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            pack=self.pack.to(device),
            labels=self.labels.to(device),
            generative_cu_seqlens=self.generative_cu_seqlens.to(device),
            mask_ids=None if self.mask_ids is None else (self.mask_ids[0].to(device), self.mask_ids[1].to(device)),
        )


def shuffled_epochs(rows: Sequence[Row], batch_size: int, generator: random.Random) -> Iterator[list[Row]]:
    """Batches without end: every row once per epoch, each epoch in a new order; a batch may span two epochs."""
    if not rows:
        raise ValueError("rows: got none, accepted is at least one")
    queue: list[Row] = []
    while True:
        while len(queue) < batch_size:
            queue += generator.sample(list(rows), len(rows))
        yield queue[:batch_size]
        del queue[:batch_size]


def build_batch(
    tokenizer: Any,
    embedding_rows: Sequence[EmbeddingRow],
    generative_rows: Sequence[GenerativeRow],
    config: TrainConfig,
    generator: random.Random,
) -> UnifiedBatch:
    """Tokenise the rows of a step into one pack. Per query one random positive and ``train_group_size - 1`` negatives."""
    queries, passages, texts = [], [], []
    for row in embedding_rows:
        instruction, text = row.query
        queries.append(encode_text(tokenizer, embed_instruction(instruction), text, config.query_max_len))
        group = [generator.choice(row.pos), *_negatives(row, config.train_group_size - 1, generator)]
        texts.append([text for _, text in group])
        passages += [encode_text(tokenizer, embed_instruction(i), t, config.passage_max_len) for i, t in group]
    conversations = [encode_conversation(tokenizer, row.turns, config.generative_max_len) for row in generative_rows]
    return pack_samples(queries, passages, conversations, attn=config.attn, mask_ids=_text_ids(texts))


def pack_samples(
    queries: Sequence[EncodedSample],
    passages: Sequence[EncodedSample],
    conversations: Sequence[EncodedSample],
    *,
    attn: str = "bbcc",
    mask_ids: tuple[Tensor, Tensor] | None = None,
) -> UnifiedBatch:
    """One pack of encoded samples; ``attn`` as in GritLM."""
    embedded = [*queries, *passages]
    samples = [*embedded, *conversations]
    lengths = [len(s) for s in samples]
    skips = [s.instruction_len for s in samples]
    flags = [attn[:2] == "cc"] * len(embedded) + [True] * len(conversations)
    pack = gk.SamplePack.from_lengths(lengths, flags, skips)
    if attn[:2] == "cb":
        # the causal instruction as a staircase; conversations have no bidirectional run, so theirs is plain causal
        bidirectional = [t >= s.instruction_len for s in embedded for t in range(len(s))]
        bidirectional += [False] * (pack.tokens - len(bidirectional))
        hi = gk.span_hi(pack.cu_seqlens, torch.tensor(bidirectional))
        pack = gk.SamplePack.from_lengths(lengths, flags, skips, hi=hi)
    embedding_tokens = sum(len(s) for s in embedded)
    labels = [label for s in conversations for label in s.labels or []]
    starts = pack.cu_seqlens[len(embedded) :] - embedding_tokens
    return UnifiedBatch(
        input_ids=torch.tensor([t for s in samples for t in s.input_ids], dtype=torch.int64),
        pack=pack,
        queries=len(queries),
        passages=len(passages),
        embedding_tokens=embedding_tokens,
        labels=torch.tensor(labels, dtype=torch.int64),
        generative_cu_seqlens=starts,
        mask_ids=mask_ids,
    )


def _negatives(row: EmbeddingRow, count: int, generator: random.Random) -> list[tuple[str, str]]:
    if count == 0:
        return []
    if not row.neg:
        raise ValueError(
            f"train_group_size: got {count + 1}, but the row of query {row.query[1][:60]!r} has no negatives; "
            "accepted is 1 for such data"
        )
    pool = list(row.neg)
    while len(pool) < count:
        pool += row.neg
    return generator.sample(pool, count)


def _text_ids(groups: list[list[str]]) -> tuple[Tensor, Tensor] | None:
    """Identity of each query's positive text and of each passage text."""
    if not groups:
        return None
    ids: dict[str, int] = {}
    passages = [ids.setdefault(text, len(ids)) for group in groups for text in group]
    return torch.tensor([ids[group[0]] for group in groups]), torch.tensor(passages)
