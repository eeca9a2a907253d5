"""Turns requests into works: tokens of prompts and texts, limits, indexes. Runs alongside the engine, which owns the model.

Tokenizers cannot be shared between threads (splitting special tokens is a state of the tokenizer), so this has its own copy
behind a lock; the engine's thread uses the model's.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from python_model.generate.decode import Sampling
from python_model.generate.rerank import likelihood_turn, on_one_line, shorten
from python_model.generate.text import ChatFormat, conversation_ids, prompt_ids
from python_model.model.modeling import GritLM
from python_model.model.prompts import ROLE_MARKERS, TURN_END, TooLong
from python_model.rag.answer import RAG
from python_model.rag.index import Hit
from python_model.rag.modes import Document
from python_model.serve.engine import Engine, Generation, TextWork
from python_model.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Message,
    RagRequest,
    RerankRequest,
)

UNKNOWN = "\ufffd"


@dataclass(frozen=True)
class Limits:
    """The limits of a request. ``seconds``: until it fails; ``texts``: per embedding or reranking request."""

    reply_tokens: int = 256
    texts: int = 2048
    seconds: float = 600.0
    body_bytes: int = 8 << 20
    requests: int = 512


@dataclass
class Searchable:
    """An index of the server and, if there is one, the store of its documents' states, behind one lock."""

    name: str
    rag: RAG
    lock: threading.Lock = field(default_factory=threading.Lock)


class Service:
    """See the top of the file.

    Args:
        engine: started by the caller.
        name: the model's name in the API.
        format: format of chat prompts, ``"grit"`` or ``"template"``.
        query_instruction: instruction for queries (``input_type="query"``); documents have none.
        indexes: the indexes that ``/v1/rag`` may search, by name. Their RAG must be created with :attr:`reader`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        format: ChatFormat = "grit",
        query_instruction: str = "",
        limits: Limits | None = None,
    ) -> None:
        self.engine, self.name, self.format = engine, name, format
        self.limits = limits or Limits()
        self.created = int(time.time())
        self.reader = reader_of(engine.model)
        self.query_prefix = self.reader.formatter.embed_instruction(query_instruction)
        self.indexes: dict[str, Searchable] = {}
        self._lock = threading.Lock()
        self.context = min(engine.positions, engine.arena.rows)
        self.text_tokens = min(engine.positions, engine.scheduler.max_step_tokens)
        # a text of n characters has at least n / longest tokens: one that cannot fit is refused without tokenising it
        self._longest = max(map(len, self.reader.tokenizer.get_vocab()))

    def check_model(self, name: str) -> None:
        """ApiError 404 for the name of another model."""
        if name not in ("", self.name):
            raise ApiError(404, f"model: expected {self.name!r}, got another", param="model", code="model_not_found")

    def add_index(self, name: str, rag: RAG) -> None:
        """Serve an index under a name; the first is the default.

        Raises:
            ValueError: it has no index, or would read documents, for which requests have no model: the engine owns it.
        """
        if rag.index is None:
            raise ValueError(f"rag: expected one with an index to serve as {name!r}, got one without")
        if rag.keep_read:
            raise ValueError("keep_read: expected False in a server, whose answers read no documents apart, got True")
        self.indexes[name] = Searchable(name, rag)

    # ---- generation

    def chat(self, request: ChatRequest) -> list[Generation]:
        """The works of a conversation, one per choice."""
        system, turns = conversation(request.messages)
        self._fits("messages", sum(map(len, turns)) + len(system), self.context)
        with self._lock:
            ids = self._chat_ids(system, turns)
        limit = request.max_completion_tokens or request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        markers = ROLE_MARKERS if self.format == "grit" else ()
        return self._generations("messages", [ids], request, limit, logprobs, markers)

    def complete(self, request: CompletionRequest) -> list[Generation]:
        """The works of plain continuations, ``n`` per prompt."""
        ids = []
        for prompt in self._inputs("prompt", request.prompt):
            with self._lock:  # for one text at a time: others wait for it
                ids.append(prompt_ids(self.reader, prompt.replace(TURN_END, UNKNOWN)))
            if not ids[-1]:
                raise ApiError(
                    400,
                    "prompt: expected a text that is not empty, as this model's tokenizer adds no token, got an empty one",
                    param="prompt",
                    code="invalid_value",
                )
        return self._generations("prompt", ids, request, request.max_tokens, request.logprobs)

    def _chat_ids(self, system: str, turns: list[str]) -> list[int]:
        try:
            return conversation_ids(self.reader, turns, format=self.format, system=system)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None

    def _generations(
        self,
        param: str,
        prompts: list[list[int]],
        request: Any,
        limit: int | None,
        logprobs: int | None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        works = []
        for prompt in prompts:
            tokens = self._reply_tokens(param, len(prompt), limit)
            for choice in range(request.n):
                works.append(
                    Generation(
                        list(prompt),
                        max_tokens=tokens,
                        deadline=self._deadline(),
                        sampling=Sampling(
                            request.temperature,
                            request.top_k,
                            request.top_p,
                            request.frequency_penalty,
                            request.presence_penalty,
                        ),
                        seed=None if request.seed is None else (request.seed + choice) % 2**63,
                        stop=[*request.stops, *stop],
                        logprobs=logprobs,
                    )
                )
        return works

    def _reply_tokens(self, param: str, prompt: int, limit: int | None, context: int | None = None) -> int:
        context = self.context if context is None else context
        room = context - prompt
        if room < 1 or (limit or 1) > room:
            asked = "" if limit is None else f" and {limit} new ones"
            raise ApiError(
                400,
                f"{param}: expected prompt and reply within {context} tokens, got {prompt}{asked}",
                param=param,
                code="context_length_exceeded",
            )
        return limit if limit is not None else min(self.limits.reply_tokens, room)

    # ---- texts

    def embed(self, request: EmbeddingRequest) -> list[TextWork]:
        """The works of texts to embed."""
        texts = self._inputs("input", request.input)
        if request.dimensions is not None and request.dimensions > self.dimensions:
            raise ApiError(
                400, f"dimensions: expected at most {self.dimensions}", param="dimensions", code="invalid_value"
            )
        if request.instruction is not None:
            prefix = self.reader.formatter.embed_instruction(request.instruction)
        else:
            asks = request.input_type in ("query", "search_query")
            prefix = self.query_prefix if asks else self.reader.formatter.embed_instruction("")
        bulk = len(texts) > 1 if request.priority is None else request.priority == "bulk"
        return [self.text_work("input", text, prefix, bulk=bulk) for text in texts]

    def text_work(self, param: str, text: str, prefix: str, *, bulk: bool = False) -> TextWork:
        """One text to embed after its format prefix."""
        self._fits(param, len(text), self.text_tokens)
        model = self.reader
        try:
            with self._lock:
                sample = model.formatter.text(prefix, text, self.text_tokens)
        except TooLong:
            raise ApiError(
                400,
                f"instruction: expected fewer than {self.text_tokens} tokens",
                param="instruction",
                code="context_length_exceeded",
            ) from None
        except ValueError as error:
            if text.strip():
                raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from None
            message = f"{param}: expected texts that are not empty, got an empty one"
            raise ApiError(400, message, param=param, code="invalid_value") from None
        if sample.truncated:
            self._too_long(param, self.text_tokens)
        skip = 0 if model.settings.embed_instruction else sample.instruction_len
        return TextWork(
            sample.input_ids,
            deadline=self._deadline(),
            causal=model.attention.embedding_causal,
            causal_prefix=None if model.attention.embedding_is_uniform else skip,
            instruction_len=skip,
            bulk=bulk,
        )

    def shape(self, vector: Tensor, dimensions: int | None) -> Tensor:
        """The requested vector: its first ``dimensions`` numbers, renormalised if the model normalises."""
        if dimensions is None or dimensions == len(vector):
            return vector
        part = vector[:dimensions]
        return torch.nn.functional.normalize(part, dim=0) if self.reader.normalized else part

    def rerank(self, request: RerankRequest) -> tuple[list[TextWork], list[bool]]:
        """One work per document: how likely it makes the query, as by the default of
        :func:`python_model.generate.rerank.rerank`; and for each, whether the document was truncated.
        """
        if not self.engine.generates:
            raise ApiError(400, "model: expected one that generates, for reranking", param="model")
        self._count("documents", len(request.documents))
        self._fits("query", len(request.query), self.text_tokens)
        if not request.query.strip():
            message = "query: expected a text that is not empty, got an empty text"
            raise ApiError(400, message, param="query", code="invalid_value")
        works, truncated = [], []
        for text in map(on_one_line, request.texts):
            # text beyond the tokens that are shown need not be tokenised
            beginning = text[: request.max_tokens_per_doc * self._longest]
            try:
                with self._lock:
                    shown = shorten(self.reader, beginning, request.max_tokens_per_doc)
                    sample = self.reader.formatter.conversation(
                        [likelihood_turn(shown), request.query], self.text_tokens
                    )
            except TooLong:
                self._too_long("documents", self.text_tokens)
            if sample.truncated:
                self._too_long("documents", self.text_tokens)
            truncated.append(len(shown) < len(text))
            works.append(
                TextWork(
                    sample.input_ids,
                    deadline=self._deadline(),
                    causal=True,
                    bulk=len(request.documents) > 16,
                    labels=sample.labels,
                )
            )
        return works, truncated

    # ---- indexes

    def searchable(self, name: str | None) -> Searchable:
        """The index of this name, or the first."""
        if not self.indexes:
            raise ApiError(
                404, "index: this server has no indexes (grit serve --index)", param="index", code="index_not_found"
            )
        found = next(iter(self.indexes.values())) if name is None else self.indexes.get(name)
        if found is None:
            raise ApiError(404, "index: there is no index of this name", param="index", code="index_not_found")
        return found

    def question(self, request: RagRequest, where: Searchable) -> TextWork:
        """The work of embedding a question."""
        return self.text_work("question", request.question, where.rag.query_prefix)

    def search(self, where: Searchable, question: str, vector: Tensor, k: int) -> list[Hit]:
        """The best documents for a question and its vector."""
        with where.lock:
            return where.rag.search(question, vector[None], k)

    def answer(self, request: RagRequest, where: Searchable, hits: Sequence[Hit]) -> tuple[Generation, str]:
        """The work of an answer from documents, and the mode that was chosen."""
        documents: list[Document] = [hit.document for hit in hits]
        rag = where.rag
        try:
            with where.lock, self._lock:
                mode: str = request.mode if documents else "none"
                if mode == "auto":
                    mode = rag.choose(request.question, documents)
                if mode == "query_cache":
                    mode = "document_first"  # the question's states were left in scratch rows, which are reused
                if mode == "document_cache" and (
                    rag.store is None or not all(document.key in rag.store for document in documents)
                ):
                    raise ApiError(400, "mode: some of these documents have no states in a store", param="mode")
                states, prompt, _, _ = rag.prepare(request.question, documents, mode)
        except ValueError as error:
            raise ApiError(400, str(error), param="question", code="invalid_value") from None
        before = [] if states is None else states.input_ids.tolist()
        context = min(self.context, rag.max_length)
        tokens = self._reply_tokens("question", len(before) + len(prompt), request.max_tokens, context)
        work = Generation(
            [*before, *prompt],
            max_tokens=tokens,
            deadline=self._deadline(),
            states=states,
            sampling=Sampling(request.temperature, 0, request.top_p),
            seed=None if request.seed is None else request.seed % 2**63,
            stop=ROLE_MARKERS,
        )
        return work, mode

    # ---- shared

    def spelled(self, token: int) -> str:
        """The text of one token."""
        with self._lock:
            return str(self.reader.tokenizer.decode([token]))

    @property
    def dimensions(self) -> int:
        """Size of an embedding."""
        return self.reader.embedding_size

    def _inputs(self, param: str, given: Any) -> list[str]:
        """The inputs as strings; token arrays become the text they spell, so they cannot smuggle in special tokens."""
        rows = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        self._count(param, len(rows))
        texts = []
        for row in rows:
            if isinstance(row, str):
                self._fits(param, len(row), max(self.context, self.text_tokens))
                texts.append(row)
                continue
            self._fits(param, len(row), max(self.context, self.text_tokens) * self._longest)
            with self._lock:
                size = len(self.reader.tokenizer)
                if max(row) >= size:
                    raise ApiError(400, f"{param}: expected token ids below {size}", param=param, code="invalid_value")
                texts.append(str(self.reader.tokenizer.decode(row, skip_special_tokens=True)))
        return texts

    def _count(self, param: str, count: int) -> None:
        if count > self.limits.texts:
            raise ApiError(
                400, f"{param}: expected at most {self.limits.texts}, got {count}", param=param, code="invalid_value"
            )

    def _fits(self, param: str, characters: int, tokens: int) -> None:
        if characters > tokens * self._longest:
            self._too_long(param, tokens)

    def _too_long(self, param: str, tokens: int) -> NoReturn:
        raise ApiError(
            400,
            f"{param}: expected at most {tokens} tokens, got more; nothing is truncated silently",
            param=param,
            code="context_length_exceeded",
        )

    def _deadline(self) -> float:
        return self.engine.clock() + self.limits.seconds


def reader_of(model: GritLM) -> GritLM:
    """The same model (weights are not copied) with its own tokenizer."""
    reader = copy.copy(model)
    reader.tokenizer = copy.deepcopy(model.tokenizer)
    return reader


def conversation(messages: Sequence[Message]) -> tuple[str, list[str]]:
    """(system message, [user, assistant, .., user]) from messages in any order, ending with the user.

    Consecutive messages of the same role become one turn. A system message after the first user turn is prepended to the next.
    """
    system: list[str] = []
    turns: list[str] = []
    pending: list[str] = []  # system messages inside the conversation
    for message in messages:
        if message.role in ("system", "developer"):
            (system if not turns else pending).append(message.text)
            continue
        role = 0 if message.role == "user" else 1
        text = "\n\n".join([*pending, message.text]) if role == 0 else message.text
        if role == 0:
            pending = []
        if len(turns) % 2 == role:
            turns.append(text)
        elif turns:
            turns[-1] = f"{turns[-1]}\n\n{text}"
        else:
            raise ApiError(400, "messages: expected a user message first, got assistant", param="messages")
    if len(turns) % 2 == 0 or pending:
        raise ApiError(400, "messages: expected the last one to be the user's", param="messages", code="invalid_value")
    if not turns[-1].strip():
        raise ApiError(
            400,
            "messages: expected a last message that is not empty, got an empty one",
            param="messages",
            code="invalid_value",
        )
    return "\n\n".join(system), turns
