"""The samples of a training step as token ids: a function of (settings, data, step)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from python_model.data.jsonl import EmbeddingRow, GenerativeRow, InstructedText, read_rows
from python_model.data.order import BatchOrder
from python_model.prompts import EncodedSample, embed_instruction, encode_conversation, encode_text


@dataclass
class StepSamples:
    """What a rank trains on in one step.

    ``passages`` are laid out ``[pos_0, neg_0.., pos_1, ...]``; ``query_ids`` and ``passage_ids`` are the identity of each
    query's positive text and of each passage's text; the origins are ``file:line``.
    """

    queries: list[EncodedSample] = field(default_factory=list)
    passages: list[EncodedSample] = field(default_factory=list)
    conversations: list[EncodedSample] = field(default_factory=list)
    query_ids: list[int] = field(default_factory=list)
    passage_ids: list[int] = field(default_factory=list)
    query_origins: list[str] = field(default_factory=list)
    conversation_origins: list[str] = field(default_factory=list)


class TrainingStream:
    """The steps of a run over rows in memory; each rank tokenises its own share of a step."""

    def __init__(
        self,
        embedding: Sequence[EmbeddingRow],
        generative: Sequence[GenerativeRow],
        tokenizer: Any,
        config: Any,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for wanted, rows, kind in (
            (config.embeds, embedding, "embedding"),
            (config.generates, generative, "generative"),
        ):
            if wanted and not rows:
                raise ValueError(
                    f"train_data: {config.train_data} has no {kind} rows, which mode {config.mode!r} needs"
                )
        self.tokenizer, self.config, self.rank, self.world = tokenizer, config, rank, world
        self._embedding = _grouped(embedding) if config.embeds else []
        self._generative = _grouped(generative) if config.generates else []
        self._orders = [
            BatchOrder([len(rows) for rows in groups], size, config.seed + offset) if groups else None
            for groups, size, offset in (
                (self._embedding, config.embedding_batch_size, 1),
                (self._generative, config.generative_batch_size, 2),
            )
        ]

    def steps(self, start: int, stop: int) -> Iterator[StepSamples]:
        """The samples of steps ``start`` .. ``stop - 1``."""
        for step in range(start, stop):
            yield self[step]

    def __getitem__(self, step: int) -> StepSamples:
        samples = StepSamples()
        for place, (dataset, row) in enumerate(self._rows(0, step)):
            self._add_query(samples, self._embedding[dataset][row], random.Random(f"{self.config.seed}:{step}:{place}"))
        for dataset, row in self._rows(1, step):
            chosen = self._generative[dataset][row]
            samples.conversations.append(
                encode_conversation(self.tokenizer, chosen.turns, self.config.generative_max_len)
            )
            samples.conversation_origins.append(chosen.origin)
        return samples

    def _rows(self, kind: int, step: int) -> list[tuple[int, int]]:
        order = self._orders[kind]
        if order is None:
            return []
        batch = order.batch(step)
        return batch[len(batch) * self.rank // self.world : len(batch) * (self.rank + 1) // self.world]

    def _add_query(self, samples: StepSamples, row: EmbeddingRow, draw: random.Random) -> None:
        config = self.config
        instruction, text = row.query
        samples.queries.append(
            encode_text(
                self.tokenizer, embed_instruction(instruction), text, config.query_max_len, suffix=config.embed_eos
            )
        )
        group = [draw.choice(row.pos), *_negatives(row, config.train_group_size - 1, draw)]
        for instruction, text in group:
            samples.passages.append(
                encode_text(
                    self.tokenizer,
                    embed_instruction(instruction),
                    text,
                    config.passage_max_len,
                    suffix=config.embed_eos,
                )
            )
            samples.passage_ids.append(_identity(text))
        samples.query_ids.append(_identity(group[0].text))
        samples.query_origins.append(row.origin)


def open_stream(config: Any, tokenizer: Any, rank: int = 0, world: int = 1) -> TrainingStream:
    """The stream over ``config.train_data``."""
    return TrainingStream(*read_rows(Path(config.train_data)), tokenizer, config, rank, world)


def _grouped(rows: Sequence[Any]) -> list[list[Any]]:
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(row.dataset, []).append(row)
    return list(groups.values())


def _identity(text: str) -> int:
    """The same number for the same text on every rank (63 bits of a hash)."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _negatives(row: EmbeddingRow, count: int, draw: random.Random) -> list[InstructedText]:
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
    return draw.sample(pool, count)
