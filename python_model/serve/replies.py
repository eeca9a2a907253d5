"""Replies of generating requests, whole or in chunks, in the format of OpenAI's clients."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from python_model.serve.engine import Generation, Token
from python_model.serve.protocol import ChatRequest, CompletionRequest
from python_model.serve.service import UNKNOWN, Service

if TYPE_CHECKING:
    from fastapi import Request

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity in JSON."""


def usage_of(request: Request, prompt: int, completion: int = 0, cached: int = 0) -> dict[str, Any]:
    """Token counts, for the reply and for the access log."""
    numbers = {"prompt_tokens": prompt, "completion_tokens": completion}
    request.state.usage = numbers
    total = {"total_tokens": prompt + completion, "prompt_tokens_details": {"cached_tokens": cached}}
    return {**numbers, **total}


class Trimmed:
    """A text without leading and trailing whitespace, released piece by piece."""

    def __init__(self) -> None:
        self._kept, self._begun = "", False

    def push(self, text: str) -> str:
        """What can be released now: everything but whitespace that may turn out to be trailing."""
        self._kept += text
        if not self._begun:
            self._kept = self._kept.lstrip()
        shown = self._kept.rstrip()
        self._kept = self._kept[len(shown) :]
        self._begun = self._begun or bool(shown)
        return shown


class _Writer:
    """Common part of chats and completions: one choice per work.

    ``spells``: whether tokens are spelled one by one (for log-probabilities), which may wait for a text that is being tokenised.
    """

    prefix, chunk_object, whole_object = "", "", ""
    spells = False

    def __init__(self, service: Service, request: Any, works: Sequence[Generation]) -> None:
        self.service, self.request, self.works = service, request, works
        self.identity, self.created = f"{self.prefix}{uuid.uuid4().hex}", int(time.time())
        self.texts = [""] * len(works)
        self.tokens: list[list[Token]] = [[] for _ in works]
        self.counts = [0] * len(works)
        self.finishes: list[str | None] = [None] * len(works)

    def usage(self, request: Request) -> dict[str, Any]:
        """Prompts count once, however many choices there are."""
        prompts = self.works[:: self.request.n]
        return usage_of(
            request, sum(work.prompt for work in prompts), sum(self.counts), sum(work.reused for work in prompts)
        )

    def add(self, index: int, token: Token) -> str:
        """Add a token; returns what it adds to the text."""
        if token.finish is not None:
            self.finishes[index] = token.finish
        text = self.shown(index, token.text)
        self.texts[index] += text
        if token.token is not None:
            self.counts[index] += 1
            self.tokens[index].append(token)
        return text

    def shown(self, index: int, text: str) -> str:
        """The part of a choice's new text that can be released."""
        return text

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.service.name}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the token counts."""
        return {**self.head(self.chunk_object), "choices": [], "usage": usage}

    def spelled(self, token: int) -> str:
        return self.service.spelled(token)


class ChatWriter(_Writer):
    """``chat.completion`` and its chunks; a reply has no leading or trailing whitespace."""

    prefix, chunk_object, whole_object = "chatcmpl-", "chat.completion.chunk", "chat.completion"

    def __init__(self, service: Service, request: ChatRequest, works: Sequence[Generation]) -> None:
        super().__init__(service, request, works)
        self._trimmed = [Trimmed() for _ in works]
        self.spells = request.logprobs

    def shown(self, index: int, text: str) -> str:
        """All but whitespace that may turn out to be trailing."""
        return self._trimmed[index].push(text)

    def opening(self) -> list[dict[str, Any]]:
        """A chunk with the role for each choice."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self.works))]

    def chunks(self, index: int, token: Token) -> list[dict[str, Any]]:
        """The chunks of one token; none while nothing can be released yet."""
        text = self.add(index, token)
        found = []
        if text or self.request.logprobs and token.token is not None:
            logprobs = self._logprobs([token]) if token.token is not None else None
            found.append(self._chunk(index, {"content": text}, logprobs=logprobs))
        if token.finish is not None:
            found.append(self._chunk(index, {}, finish=token.finish))
        return found

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The reply."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(tokens),
                "finish_reason": self.finishes[index],
            }
            for index, (text, tokens) in enumerate(zip(self.texts, self.tokens, strict=True))
        ]
        return {**self.head(self.whole_object), "choices": choices, "usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head(self.chunk_object), "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        rows = []
        for token in tokens:
            assert token.token is not None and token.logprob is not None
            row = self._row(token.token, token.logprob)
            rows.append({**row, "top_logprobs": [self._row(other, value) for other, value in token.top]})
        return {"content": rows, "refusal": None}

    def _row(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.spelled(token)
        data = None if UNKNOWN in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}


class CompletionWriter(_Writer):
    """``text_completion``, whole and in chunks."""

    prefix, chunk_object, whole_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, service: Service, request: CompletionRequest, works: Sequence[Generation]) -> None:
        super().__init__(service, request, works)
        self._offsets = [0] * len(works)
        self.spells = request.logprobs is not None

    def chunks(self, index: int, token: Token) -> list[dict[str, Any]]:
        """The chunks of one token."""
        text = self.add(index, token)
        logprobs = self._logprobs(index, [token] if token.token is not None else [])
        if not text and token.finish is None and logprobs is None:
            return []
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": token.finish}
        return [{**self.head(self.chunk_object), "choices": [choice]}]

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The reply."""
        choices = [
            {
                "index": index,
                "text": text,
                "logprobs": self._logprobs(index, tokens),
                "finish_reason": self.finishes[index],
            }
            for index, (text, tokens) in enumerate(zip(self.texts, self.tokens, strict=True))
        ]
        return {**self.head(self.whole_object), "choices": choices, "usage": usage}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            assert token.token is not None and token.logprob is not None
            text = self.spelled(token.token)
            found["tokens"].append(text)
            found["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB))
            top: dict[str, float] = {}
            for other, value in token.top:  # the likeliest of the tokens that read alike, such as parts of a character
                top.setdefault(self.spelled(other), max(value, LEAST_LOGPROB))
            found["top_logprobs"].append(top or None)
            found["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return found
