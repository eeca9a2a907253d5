"""Splits the samples of a step into chunks: packs of texts to embed and conversations for one forward and backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import grit_kernels as gk
from python_model.model.prompts import IGNORE_INDEX, EncodedSample, ReadDocuments
from python_model.settings import AttentionVariant


@dataclass(frozen=True)
class Chunk:
    """Some samples of a step as one pack: texts to embed first, then conversations.

    A conversation that follows cached documents is preceded by each of them as a sample of its own, which it sees as a cache of
    their joined states (:func:`python_model.rag.rope.join`): at consecutive positions, without any BOS but the first.

    Attributes:
        input_ids: int64 (tokens).
        pack: texts to embed have the flag of the attention variant, conversations are causal (or have the variant's upper
            bounds per token).
        embedded: int64 (E), indices of these texts among the step's texts (queries first, then passages).
        conversations: int64 (C), indices of the conversations that follow them, among the step's conversations.
        embedding_tokens: number of tokens of the texts to embed; the conversations' tokens follow.
        labels: int64 (tokens of the conversations), shifted; IGNORE_INDEX where no loss applies.
        generative_cu_seqlens: int32 (C + 1), where each conversation with its documents starts, counted from the first one.
    """

    input_ids: Tensor
    pack: gk.SamplePack
    embedded: Tensor
    conversations: Tensor
    embedding_tokens: int
    labels: Tensor
    generative_cu_seqlens: Tensor

    def to(self, device: torch.device | str) -> Chunk:
        """The same chunk on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            pack=self.pack.to(device),
            embedded=self.embedded.to(device),
            conversations=self.conversations.to(device),
            labels=self.labels.to(device),
            generative_cu_seqlens=self.generative_cu_seqlens.to(device),
        )


def build_chunk(
    texts: Sequence[EncodedSample],
    conversations: Sequence[EncodedSample],
    *,
    attention: AttentionVariant | None = None,
    embedded_index: Sequence[int] | None = None,
    conversation_index: Sequence[int] | None = None,
) -> Chunk:
    """One pack of encoded samples.

    ``attention``: the model's (default: ``bbcc``). ``embedded_index``, ``conversation_index``: default to 0, 1, 2, ...
    """
    attention = attention or AttentionVariant()
    samples = [*texts, *conversations]
    lengths = [len(s) for s in samples]
    ends = torch.tensor([0, *(len(s) for s in conversations)]).cumsum(0, dtype=torch.int32)
    if any(s.documents for s in conversations):
        pack = _pack_with_documents(texts, conversations, attention)
    else:
        skips = [s.instruction_len for s in samples]
        flags = [attention.embedding_causal] * len(texts) + [True] * len(conversations)
        pack = gk.SamplePack.from_lengths(lengths, flags, skips)
        if not (attention.embedding_is_uniform and attention.generates_causally):
            # every variant is given by upper bounds: tokens in a run see it up to its end, all others are causal
            bidirectional = [run for s in texts for run in _embedding_runs(s, attention)]
            bidirectional += [run for s in conversations for run in s.bidirectional or [False] * len(s)]
            hi = gk.span_hi(pack.cu_seqlens, torch.tensor(bidirectional))
            pack = gk.SamplePack.from_lengths(lengths, flags, skips, hi=hi)
    labels = [label for s in conversations for label in s.labels or [IGNORE_INDEX] * len(s)]
    return Chunk(
        input_ids=torch.tensor([t for s in samples for t in s.input_ids], dtype=torch.int64),
        pack=pack,
        embedded=torch.tensor(range(len(texts)) if embedded_index is None else embedded_index, dtype=torch.int64),
        conversations=torch.tensor(
            range(len(conversations)) if conversation_index is None else conversation_index, dtype=torch.int64
        ),
        embedding_tokens=sum(len(s) for s in texts),
        labels=torch.tensor(labels, dtype=torch.int64),
        generative_cu_seqlens=ends,
    )


def _pack_with_documents(
    texts: Sequence[EncodedSample], conversations: Sequence[EncodedSample], attention: AttentionVariant
) -> gk.SamplePack:
    """The pack of samples of which some conversations follow documents."""
    if not attention.generates_causally or (texts and not attention.embedding_is_uniform):
        raise ValueError(f"attention: expected one flag per sample ('bbcc', 'cccc') with documents, got {attention}")
    lengths = [len(s) for s in texts]
    flags = [attention.embedding_causal] * len(texts)
    skips = [s.instruction_len for s in texts]
    firsts = [0] * len(texts)
    contexts: list[list[int] | None] = [None] * len(texts)
    start = sum(lengths)  # in the pack
    for sample in conversations:
        context: list[int] = []
        read = sample.documents or ReadDocuments(())
        for length in read.lengths:
            hidden = read.hidden if context else 0
            # a BOS that only its document sees has the position of the token before: the others follow without a gap
            firsts.append(len(context) - hidden)
            context += range(start + hidden, start + length)
            lengths.append(length)
            flags.append(read.causal)
            contexts.append(None)
            start += length
        lengths.append(len(sample) - sum(read.lengths))
        flags.append(True)
        firsts.append(len(context))
        contexts.append(context or None)
        start += lengths[-1]
    skips += [0] * (len(lengths) - len(texts))
    return gk.SamplePack.from_lengths(lengths, flags, skips, contexts=contexts, first_positions=firsts)


def _embedding_runs(sample: EncodedSample, attention: AttentionVariant) -> list[bool]:
    behind = len(sample) - sample.instruction_len
    return [not attention.instruction_causal] * sample.instruction_len + [not attention.embedding_causal] * behind


def plan_texts(
    queries: int,
    lengths: Sequence[int],
    *,
    budget: int = 0,
    chunking: str = "tokens",
    group_size: int = 2,
) -> list[list[int]]:
    """Which texts (queries first, then passages, ``group_size`` per query) share a chunk.

    ``"triplet"``: positives, negatives and queries apart. ``"tokens"``: see :func:`first_fit`.
    """
    if chunking == "triplet":
        positives = [i for i in range(queries, len(lengths)) if (i - queries) % group_size == 0]
        negatives = [i for i in range(queries, len(lengths)) if (i - queries) % group_size]
        return [part for part in (positives, negatives, list(range(queries))) if part]
    return first_fit(lengths, budget)


def first_fit(lengths: Sequence[int], budget: int = 0) -> list[list[int]]:
    """Which samples share a chunk: all if ``budget`` is 0, else each sample, longest first, goes into the first chunk with room,
    so that no chunk exceeds ``budget`` tokens."""
    if not budget:
        return [list(range(len(lengths)))] if lengths else []
    chunks: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((c for c, left in enumerate(room) if left >= lengths[index]), len(chunks))
        if place == len(chunks):
            chunks.append([])
            room.append(budget)
        chunks[place].append(index)
        room[place] -= lengths[index]
    return [sorted(chosen) for chosen in chunks]
