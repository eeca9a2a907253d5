"""RAG: answers a question from documents, in any mode of modes.py, with the states of texts that were read before."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from python_model.generate.decode import Sampling, decode
from python_model.generate.states import TextStates, from_cache
from python_model.generate.text import TextStream, eos_token_ids, prompt_ids
from python_model.model.heads import head_size, kv_heads, layer_configs
from python_model.model.identity import fingerprint
from python_model.model.limits import max_positions
from python_model.model.modeling import GritLM
from python_model.model.prompts import ROLE_MARKERS
from python_model.rag.calibration import trusted_modes
from python_model.rag.fingerprint import former_fingerprint, made_by
from python_model.rag.modes import (
    ANSWER_PREFIX,
    DOCUMENT_PREFIX,
    MODES,
    QUERY_PREFIX,
    Document,
    cached_parts,
    choose_mode,
    prompt_text,
)
from python_model.rag.reading import read, recompute_first
from python_model.rag.rope import join
from python_model.rag.selective import check_share, recompute_selected
from python_model.rag.store.folder import StoreFullError
from python_model.rag.store.kvstore import Format, KVStore, WhenFull
from python_model.support.arguments import check_at_least, check_choice

if TYPE_CHECKING:
    from python_model.rag.filters import Filter
    from python_model.rag.index import Hit, Index

TOKENS_AT_ONCE = 8192
"""Batch size of documents embedded and stored in one pass."""


@dataclass(frozen=True)
class Answer:
    """A reply and how it was produced.

    ``cached_tokens`` were taken from states, ``read_tokens`` were read for the answer (the prompt, and texts without stored
    states). ``seconds``: time spent on finding documents ("search"), obtaining states ("states") and generating ("generate"),
    and how much of the latter passed before the first token was known ("first_token").
    """

    text: str
    mode: str
    documents: list[Document]
    scores: list[float]
    cached_tokens: int
    read_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)


class RAG:
    """Retrieval-augmented generation with one model.

    Args:
        model: loaded in mode ``"unified"``.
        index: where documents are searched; without one they must be given with each question.
        store: states of documents (see :func:`open_store`); without one, documents are read when a mode needs their states.
        causal_states: read documents and questions causally instead of with the model's embedding attention. Such states are
            what the model would have computed had the text opened the conversation.
        recompute: number of leading tokens of each cached text but the first to recompute, now seeing what precedes them.
        recompute_share: share of the tokens of all cached texts but the first to recompute instead: those whose states deviate
            most (see :mod:`python_model.rag.selective`).
        marked: tell the model that documents are data, and number them; False: the paper's unmodified prompts.
        trusted: the modes with cached states that ``"auto"`` may choose; default: those that were measured for this checkpoint,
            with as many documents.
        max_length: maximum tokens of a question with its documents and reply; default: the model's. More is an error.
        query_prefix: the format before a question to embed (see :func:`python_model.model.prompts.embed_instruction`).
        keep_read: keep the states of the index's documents that had none when a mode needed them, so that a store with a limit
            and ``when_full="drop_unused"`` comes to hold those that are asked for most.
        hybrid: search the index by words as well. where: find only some documents (see :mod:`python_model.rag.filters`).
    """

    def __init__(
        self,
        model: GritLM,
        *,
        index: Index | None = None,
        store: KVStore | None = None,
        causal_states: bool = False,
        recompute: int = 0,
        recompute_share: float = 0.0,
        marked: bool = True,
        trusted: Collection[str] | None = None,
        max_length: int | None = None,
        query_prefix: str = QUERY_PREFIX,
        keep_read: bool = False,
        hybrid: bool = False,
        where: Filter | None = None,
    ) -> None:
        model.check_head("answer")
        if not model.attention.generates_causally:
            raise ValueError(
                f"attn: expected a model that generates causally ('cc' at the end), got {model.attn!r}: "
                "answers continue a cache of texts that were read before the prompt"
            )
        if model.settings.format == "plain":
            raise ValueError(
                "format: expected a model of 'grit' or 'zephyr' to answer, got 'plain', which has no roles"
            )
        check_at_least("recompute", recompute, 0)
        check_share(recompute_share)
        if recompute and recompute_share:
            raise ValueError(f"recompute_share: expected 0 beside recompute={recompute}, got {recompute_share}")
        self.model, self.index, self.store = model, index, store
        self.causal = _states_attention(model, causal_states)
        if store is not None:
            expected = store_settings(model, causal_states)
            if store.settings != expected or not made_by(store.fingerprint, model):
                raise ValueError(
                    f"store: {store.path} was made by model {store.fingerprint} with {store.settings}, "
                    f"this model is {fingerprint(model)} with {expected}"
                )
        self.recompute, self.recompute_share = recompute, recompute_share
        self.max_length = max_length if max_length is not None else max_positions(model.model.config)
        self.query_prefix, self.marked = query_prefix, marked
        for name, given in (("hybrid", hybrid), ("where", where)):
            if given and index is None:
                raise ValueError(f"{name}: expected an index to search, got none")
        self.hybrid, self.where = hybrid, where
        if keep_read and store is None:
            raise ValueError("keep_read: expected a store to keep states in, got none")
        if keep_read and store is not None and index is not None:
            index.note_store(store.path)  # states go when their document changes or is removed
        self.keep_read = keep_read
        self.trusted: Mapping[str, float]  # and with how many documents at most
        self.trusted = trusted_modes(self) if trusted is None else dict.fromkeys(trusted, math.inf)

    def answer(
        self,
        question: str,
        documents: Sequence[Document | str] | None = None,
        *,
        mode: str = "auto",
        k: int = 1,
        max_new_tokens: int = 16,
        min_new_tokens: int = 1,
        answer_prefix: str = ANSWER_PREFIX,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answer ``question`` from ``documents``, or from the ``k`` best of the index.

        ``mode``: one of modes.MODES, or ``"auto"`` (see :func:`python_model.rag.modes.choose_mode`).

        Raises:
            ValueError: an unknown mode, an empty question, a mode that needs documents when there are none, or more than
                ``max_length`` tokens.
        """
        check_choice("mode", mode, ("auto", *MODES))
        seconds: dict[str, float] = {}
        start = time.perf_counter()
        query_states: TextStates | None = None
        scores: list[float] = []
        if documents is not None:
            given = [d if isinstance(d, Document) else Document(f"given-{i}", d) for i, d in enumerate(documents)]
        elif mode == "none":
            given = []
        elif self.index is None:
            raise ValueError("documents: expected documents or mode='none', got none, and there is no index to search")
        else:
            vector, query_states = self._embed_question(question)
            hits = self.search(question, vector, k)
            given, scores = [hit.document for hit in hits], [hit.score for hit in hits]
        if not given and mode not in ("none", "auto"):
            raise ValueError(f"documents: expected at least one in mode {mode!r}, got none")
        if mode == "auto":
            mode = self.choose(question, given)
            given = given if mode != "none" else []
        seconds["search"] = time.perf_counter() - start
        return self._answer(
            question,
            given,
            scores,
            mode,
            query_states,
            seconds,
            (min_new_tokens, max_new_tokens),
            answer_prefix,
            sampling or Sampling(),
        )

    def _answer(
        self,
        question: str,
        documents: list[Document],
        scores: list[float],
        mode: str,
        query_states: TextStates | None,
        seconds: dict[str, float],
        new_tokens: tuple[int, int],
        answer_prefix: str,
        sampling: Sampling,
    ) -> Answer:
        min_new_tokens, max_new_tokens = new_tokens
        start = time.perf_counter()
        states, prompt, stored, fresh = self.prepare(question, documents, mode, answer_prefix, query_states)
        before = 0 if states is None else len(states)
        total = before + len(prompt) + max_new_tokens
        if total > self.max_length:
            raise ValueError(
                f"max_length: expected at least {total} tokens for question, documents and reply ({before} cached, "
                f"{len(prompt)} in the prompt, {max_new_tokens} new), got {self.max_length}; nothing is truncated silently: "
                "use fewer or shorter documents"
            )
        seconds["states"] = time.perf_counter() - start
        start = time.perf_counter()
        stream = TextStream(self.model.tokenizer, ROLE_MARKERS)

        def receive(row: int, token: int) -> bool:
            seconds.setdefault("first_token", time.perf_counter() - start)
            return stream.push(token)

        decode(
            self.model.model,
            [prompt],
            states=[states],
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            eos_token_ids=eos_token_ids(self.model),
            sampling=sampling,
            on_token=receive,
        )
        seconds["generate"] = time.perf_counter() - start
        seconds.setdefault("first_token", seconds["generate"])  # nothing but an end of the reply
        return Answer(stream.finish().strip(), mode, documents, scores, stored, len(prompt) + fresh, seconds)

    def search(self, question: str, vector: torch.Tensor, k: int) -> list[Hit]:
        """The ``k`` best documents of the index for a question, of which this is the vector (1, size)."""
        if self.index is None:
            raise ValueError("index: expected a RAG with an index to search, got one without")
        return self.index.search(vector, k, where=self.where, texts=[question] if self.hybrid else None)[0]

    def prepare(
        self,
        question: str,
        documents: list[Document],
        mode: str,
        answer_prefix: str = ANSWER_PREFIX,
        query_states: TextStates | None = None,
    ) -> tuple[TextStates | None, list[int], int, int]:
        """What a reply continues: joined states (None without any) and the ids of the prompt after them; then how many tokens
        already had states, and how many were read for them now."""
        text = prompt_text(
            mode, question, documents, answer_prefix, format=self.model.settings.format, marked=self.marked
        )
        prompt = prompt_ids(self.model, text, add_special_tokens=not cached_parts(mode))
        states, stored, fresh = self._states(mode, question, documents, query_states)
        return states, prompt, stored, fresh

    def choose(self, question: str, documents: Sequence[Document]) -> str:
        """The mode chosen by ``"auto"`` (see :func:`python_model.rag.modes.choose_mode`).

        Cached states are chosen only if their quality was measured for this checkpoint (see calibration.py).
        """
        stored = self.store is not None and (self.keep_read or all(d.key in self.store for d in documents))
        tokens = [len(self._ids(DOCUMENT_PREFIX, document.content)) for document in documents]
        trusted = [mode for mode, most in self.trusted.items() if len(documents) <= most]
        return choose_mode(len(self._ids(self.query_prefix, question)), sum(tokens), stored, trusted)

    def add_to_store(
        self,
        documents: Sequence[Document],
        *,
        overwrite: bool = False,
        states: Sequence[TextStates] | None = None,
    ) -> None:
        """Read documents and store their states, each on disk before the next is read; or store the given ``states`` in one
        step.
        """
        if self.store is None:
            raise ValueError("store: expected a RAG with a store, got one without")
        if states is not None:
            items = [(d.key, part, {"title": d.title}) for d, part in zip(documents, states, strict=True)]
            self.store.append_many(items, overwrite=overwrite)
            return
        for document in documents:
            (found,) = read(self.model, [self._ids(DOCUMENT_PREFIX, document.content)], causal=self.causal)
            self.store.append(document.key, found, {"title": document.title}, overwrite=overwrite)

    def embed_and_read(
        self, documents: Sequence[Document], prefix: str
    ) -> tuple[torch.Tensor, list[TextStates]] | None:
        """The documents' vectors after ``prefix`` and their states, from one pass; None if one pass does not give both."""
        if not self._one_pass or prefix != DOCUMENT_PREFIX:
            return None
        ids = [torch.tensor(self._ids(prefix, document.content)) for document in documents]
        vectors, states = [], []
        start = 0
        while start < len(ids):
            end = start + 1
            while end < len(ids) and sum(map(len, ids[start : end + 1])) <= TOKENS_AT_ONCE:
                end += 1
            found, cache = self.model.encode(
                [document.content for document in documents[start:end]],
                instruction=prefix,
                max_length=self.max_length,
                convert_to_tensor=True,
                get_cache=True,
            )
            vectors.append(found)
            states += from_cache(cache, ids[start:end], self.causal)
            start = end
        return torch.cat(vectors), states

    @property
    def _one_pass(self) -> bool:
        """Whether the pass that embeds a text produces the states that this object uses."""
        return self.causal == self.model.attention.embedding_causal and not self.model.embed_eos

    def _states(
        self, mode: str, question: str, documents: list[Document], query_states: TextStates | None
    ) -> tuple[TextStates | None, int, int]:
        """The joined states before the prompt; the number of tokens that already had states, and of those read now."""
        parts: list[TextStates] = []
        fresh = 0
        for part in cached_parts(mode):
            if part == "query":
                if query_states is None:
                    ids = self._ids(self.query_prefix, question)
                    (query_states,) = read(self.model, [ids], causal=self.causal)
                    fresh += len(ids)
                parts.append(query_states)
                continue
            for document in documents:
                states = self._document_states(document, bos=mode != "query_document_cache")
                if states is None:
                    ids = self._document_ids(document, bos=mode != "query_document_cache")
                    (states,) = read(self.model, [ids], causal=self.causal)
                    fresh += len(ids)
                    self._keep(document, states)
                parts.append(states)
        if not parts:
            return None, 0, 0
        stored = sum(map(len, parts)) - fresh
        parts = [part.to(device=self.model.device, dtype=self.model.model.dtype) for part in parts]
        joined, starts = self._join(parts)
        if self.recompute:
            joined = recompute_first(self.model, joined, starts, self.recompute)
        if self.recompute_share:
            joined = recompute_selected(self.model, joined, starts, self.recompute_share)
        return joined, stored, fresh

    def _document_states(self, document: Document, bos: bool) -> TextStates | None:
        """A document's stored states, or None."""
        if self.store is None or document.key not in self.store:
            return None
        states = self.store.load(document.key, dtype=self.model.model.dtype)
        if states.input_ids.tolist() != self._ids(DOCUMENT_PREFIX, document.content):
            raise ValueError(
                f"store: the states of {document.key!r} in {self.store.path} are those of another text; store it again"
            )
        return states

    def _keep(self, document: Document, states: TextStates) -> None:
        """Keep what was read for a document of the index; one that is larger than the whole store is read again next time."""
        if self.keep_read and self.index is not None and document.key in self.index:
            with contextlib.suppress(StoreFullError):
                self.add_to_store([document], states=[states], overwrite=True)

    def _document_ids(self, document: Document, bos: bool) -> list[int]:
        """The tokens of a document to be read; ``bos``: whether it opens the cache (otherwise it follows a question)."""
        return self._ids(DOCUMENT_PREFIX, document.content)

    def _join(self, parts: list[TextStates]) -> tuple[TextStates, list[int]]:
        return join(parts, self.model)

    def _ids(self, prefix: str, text: str, *, bos: bool = True) -> list[int]:
        sample = self.model.formatter.text(prefix, text, self.max_length, add_special_tokens=bos, suffix=False)
        if sample.truncated:
            raise ValueError(
                f"max_length: expected room for the whole text ({text[:60]!r}..), got {self.max_length}; nothing is truncated "
                "silently: split it into shorter documents"
            )
        return sample.input_ids

    def _embed_question(self, question: str) -> tuple[torch.Tensor, TextStates | None]:
        """The question's vector (1, size) and, if one pass gives both, its states."""
        ids = self._ids(self.query_prefix, question)
        options: dict[str, Any] = {"instruction": self.query_prefix, "max_length": self.max_length}
        if not self._one_pass:
            return self.model.encode([question], convert_to_tensor=True, **options), None
        vector, cache = self.model.encode([question], convert_to_tensor=True, get_cache=True, **options)
        (states,) = from_cache(cache, [torch.tensor(ids)], self.causal)
        return vector, states


def _states_attention(model: GritLM, causal_states: bool) -> bool:
    """Whether states are read causally: as requested, or as the model embeds."""
    if not causal_states and not model.attention.embedding_is_uniform:
        raise ValueError("attn: 'cb' fills no cache; expected 'bb' or 'cc', or causal_states=True")
    return causal_states or model.attention.embedding_causal


def store_settings(model: GritLM, causal_states: bool = False) -> dict[str, Any]:
    """What a key-value store records about how its documents were read."""
    special, causal = model.formatter.special_tokens, _states_attention(model, causal_states)
    return {
        "prefix": DOCUMENT_PREFIX,
        "causal": causal,
        "special_tokens": [list(special.start), list(special.end)],
        "bidirectional_window": None if causal else model.settings.bidirectional_window,
    }


def bytes_per_token(model: GritLM, format: str) -> int:
    """Bytes of a token's states in a store, without int8 scales."""
    config = model.model.config
    values = sum(2 * kv_heads(layer) * head_size(layer) for layer in layer_configs(config))
    return int(values * (1 if format == "int8" else getattr(torch, format).itemsize))


def open_store(
    path: str,
    model: GritLM,
    *,
    causal_states: bool = False,
    format: Format | None = None,
    max_bytes: int | None = None,
    when_full: WhenFull = "error",
) -> KVStore:
    """The key-value store at ``path`` for this model, created if missing; one of another model is refused.

    ``format``: default: the store's own, int8 for a new one (half of bfloat16).
    """
    if format is None and not (Path(path) / "index.sqlite").exists():
        format = "int8"
    return KVStore(
        path,
        fingerprint=fingerprint(model),
        former_fingerprint=former_fingerprint(model),
        settings=store_settings(model, causal_states),
        format=format,
        max_bytes=max_bytes,
        when_full=when_full,
    )
