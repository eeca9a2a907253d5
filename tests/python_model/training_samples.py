"""Samples of a toy task for the training tests: a stream whose steps are a function of their index, as the real one's are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from python_model.prompts import EncodedSample, embed_instruction, encode_conversation, encode_text
from python_model.train.distributed import Ranks

WORDS = ["river", "city", "code", "word", "capital", "France", "space", "line"]
LENGTH = 64


@dataclass
class ToySamples:
    queries: list[EncodedSample] = field(default_factory=list)
    passages: list[EncodedSample] = field(default_factory=list)
    conversations: list[EncodedSample] = field(default_factory=list)
    query_ids: list[int] = field(default_factory=list)
    passage_ids: list[int] = field(default_factory=list)
    query_origins: list[str] = field(default_factory=list)
    conversation_origins: list[str] = field(default_factory=list)


class ToyStream:
    """``queries`` queries with a positive and a negative each, and ``conversations`` conversations; a rank gets its share."""

    def __init__(self, tokenizer: Any, queries: int, conversations: int, ranks: Ranks | None = None) -> None:
        self.tokenizer, self.queries, self.conversations, self.ranks = tokenizer, queries, conversations, ranks

    def steps(self, start: int, stop: int) -> Iterator[ToySamples]:
        for step in range(start, stop):
            yield self[step]

    def __getitem__(self, step: int) -> ToySamples:
        draw = random.Random(step)
        rows, talks = range(self.queries), range(self.conversations)
        mine = (rows, talks) if self.ranks is None else (self.ranks.share(len(rows)), self.ranks.share(len(talks)))
        samples = ToySamples()
        for row in rows:
            word, number = draw.choice(WORDS), draw.randrange(100)
            longer = "to be seen " * draw.randrange(1, 4)
            if row in mine[0]:
                samples.queries.append(self._text("Find the text", f"where is {word} {number}"))
                samples.passages.append(self._text("", f"the {word} number {number} is here"))
                samples.passages.append(self._text("", f"no {draw.choice(WORDS)} {longer}{number}"))
                samples.query_ids.append(row)
                samples.passage_ids += [row, 1000 + row]
                samples.query_origins.append(f"toy:{row}")
            else:
                draw.choice(WORDS)
        for row in talks:
            word, more = draw.choice(WORDS), draw.randrange(3)
            if row in mine[1]:
                turns = [f"say {word}", f"{word} it is" + " it is" * more, "and?", "done"]
                samples.conversations.append(encode_conversation(self.tokenizer, turns, LENGTH))
                samples.conversation_origins.append(f"talk:{row}")
        return samples

    def _text(self, instruction: str, text: str) -> EncodedSample:
        return encode_text(self.tokenizer, embed_instruction(instruction), text, LENGTH)
