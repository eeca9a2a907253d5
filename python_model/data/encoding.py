"""Turns rows into token ids under the settings of a run, and checks whether a row can be used at all."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from python_model.data.config import DataConfig
from python_model.data.datasets import Problem
from python_model.data.index import FORMAT_TOKENS
from python_model.data.rows import GenerativeRow, InstructedText, Row
from python_model.data.token_cache import TokenCache, tokenizer_fingerprint
from python_model.model.few_shot import few_shot_instruction
from python_model.model.prompts import EncodedSample, Formatter, TooLong
from python_model.settings import GritSettings


class RowEncoder:
    """Tokenises the texts of rows the way a model with these ``settings`` reads them."""

    def __init__(self, tokenizer: Any, config: DataConfig, settings: GritSettings | None = None) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.settings = settings or GritSettings()
        self.formatter = Formatter(tokenizer, self.settings)
        special = self.formatter.special_tokens
        parts = [self.settings.embed_eos, self.settings.instruction_count, self.settings.embed_instruction]
        parts += [self.settings.format, self.settings.attention.generative, special.start, special.end]
        parts += [self.settings.default_prompt]
        self.key = json.dumps([*parts, tokenizer_fingerprint(tokenizer)])
        limits = [config.query_max_len, config.passage_max_len, config.generative_max_len, config.train_group_size]
        self.check_key = f"{self.key} {limits}"
        self.cache = TokenCache(config.token_cache, self.key) if config.token_cache else None
        self._lengths: dict[str, int] = {}

    def text(self, text: InstructedText, max_length: int, example: tuple[str, str] | None = None) -> EncodedSample:
        """A text to embed; ``example`` is the query and positive shown by a few-shot instruction."""
        instruction = text.instruction
        if example is not None:
            instruction = few_shot_instruction(instruction, *example, style=self.config.few_shot_style)
        return self._cached(
            lambda: self._text(text, instruction, max_length),
            ("text", instruction, text.text, max_length),
        )

    def conversation(self, row: GenerativeRow) -> EncodedSample:
        """A conversation, or a text without roles, to train on."""
        parts: tuple[Any, ...] = ("conversation", row.turns, self.config.generative_max_len)
        if row.documents:
            parts += (row.documents, self.settings.attention.embedding, self._reads_causally(row))
        return self._cached(lambda: self._conversation(row), parts)

    def refused(self, facts: np.ndarray, generative: bool) -> tuple[np.ndarray, Problem]:
        """Rows without negatives although ``train_group_size`` requires some."""
        size = self.config.train_group_size
        missing = np.zeros(len(facts), dtype=bool)
        if not generative and size > 1:
            missing = facts["negatives"] == 0
        return missing, ("no negatives", f"neg: expected at least one with train_group_size {size}, got none")

    def doubtful(self, facts: np.ndarray, generative: bool) -> np.ndarray:
        """Rows whose size in bytes does not tell whether instruction, or documents and first user turn, leave room for a text."""
        if generative:
            return ~_fewer_tokens(facts["first"], self.config.generative_max_len)
        special = self.formatter.special_tokens
        eos = len(self.settings.embed_eos) + len(special.start) + len(special.end)
        least = len(self.settings.default_prompt.encode())  # of a text without an instruction
        found = np.zeros(len(facts["first"]), dtype=bool)
        for name, limit in (("first", self.config.query_max_len), ("passage", self.config.passage_max_len)):
            cleared = _fewer_tokens(np.maximum(facts[name], least), limit - eos)
            if self._has_room(InstructedText("", ""), limit):
                cleared |= facts[name] == 0
            found |= ~cleared
        return found

    def problem(self, row: Row) -> Problem | None:
        """Why a row cannot be trained on, or None: its instruction, or documents and first user turn, fill the maximum length."""
        if isinstance(row, GenerativeRow):
            return None if len(row.turns) == 1 else _too_long(lambda: self._conversation(row))
        negatives = row.neg if self.config.train_group_size > 1 else ()
        limits = [(row.query, self.config.query_max_len)]
        limits += [(passage, self.config.passage_max_len) for passage in (*row.pos, *negatives)]
        for text, limit in limits:
            if not self._has_room(text, limit):
                if problem := _too_long(functools.partial(self._text, text, text.instruction, limit)):
                    return problem
        return None

    def flush(self) -> None:
        """Write newly tokenised texts to the cache."""
        if self.cache is not None:
            self.cache.flush()

    def _has_room(self, text: InstructedText, max_length: int) -> bool:
        """False if the instruction may fill ``max_length``."""
        if text.instruction not in self._lengths:
            if len(self._lengths) > 100_000:
                self._lengths.clear()
            shortest = len(self._text(InstructedText(text.instruction, "a"), text.instruction, 1 << 30))
            # the text may take the last word before it apart, at most into its bytes
            word = self.formatter.embed_instruction(text.instruction).rsplit(maxsplit=1)[-1:]
            self._lengths[text.instruction] = shortest + sum(len(part.encode()) + 2 for part in word)
        return self._lengths[text.instruction] < max_length

    def _text(self, text: InstructedText, instruction: str, max_length: int) -> EncodedSample:
        return self.formatter.text(self.formatter.embed_instruction(instruction), text.text, max_length)

    def _conversation(self, row: GenerativeRow) -> EncodedSample:
        causal = bool(row.documents) and self._reads_causally(row)
        limit = self.config.generative_max_len
        return self.formatter.conversation(row.turns, limit, documents=row.documents, causal_documents=causal)

    def _reads_causally(self, row: GenerativeRow) -> bool:
        """Whether a row is one of the share whose documents are read causally: a function of its content."""
        digest = hashlib.blake2b("\0".join((*row.documents, *row.turns)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.config.causal_documents * 2**64

    def _cached(self, encode: Callable[[], EncodedSample], parts: tuple[Any, ...]) -> EncodedSample:
        if self.cache is None:
            return encode()
        digest = self.cache.digest(*parts)
        sample = self.cache.get(digest)
        if sample is None:
            sample = encode()
            self.cache.put(digest, sample)
        return sample


def _fewer_tokens(count: Any, room: int) -> Any:
    """Whether ``count`` bytes (a number or an array) certainly take fewer than ``room`` tokens in their format: no token is
    shorter than a byte, and breaking up markers adds less than a quarter."""
    return 5 * (np.asarray(count, dtype=np.int64)) // 4 + FORMAT_TOKENS < room


def _too_long(encode: Callable[[], EncodedSample]) -> Problem | None:
    try:
        encode()
    except TooLong as error:
        return "too long", str(error)
    return None
