"""The text formats of GRIT, and the exact token spans they produce.

    embed, with instruction      <bos><|user|>\\n{instruction}\\n<|embed|>\\n{text}
    embed, without instruction   <bos><|embed|>\\n{text}
    generate                     <bos><|user|>\\n{user}\\n<|assistant|>\\n{assistant}<eos>\\n<|user|>\\n...

The ``zephyr`` format is the same with an <eos> after each instruction and user turn. <bos> stands for what
:class:`SpecialTokens` says, usually what the checkpoint's tokenizer adds itself; <eos> is the tokenizer's own. The role markers
are plain text, as in the published models. Every span comes from the tokenizer's offsets in the whole string: a token belongs to
the instruction only if it ends inside it, so no character of a text is lost to a merge across the boundary and labels do not
drift over turns.

User content cannot become format: special tokens in it are tokenised as plain text, a role marker spelled out in it gets a
space (``<| user|>``), and so does a special token that a tokenizer would assemble from plain pieces.

Source: GRIT, arXiv 2402.09906 section 2 and appendix; the public implementation's training format.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from python_model.settings import (
    FORMATS,
    SPECIAL_TOKEN_RULES,
    Format,
    GenerativeAttention,
    GritSettings,
    InstructionCount,
    SpecialTokenRule,
)
from python_model.support.arguments import check_choice

USER = "<|user|>\n"
EMBED = "<|embed|>\n"
ASSISTANT = "<|assistant|>\n"
TURN_SEPARATOR = "\n"

ROLE_MARKERS = tuple(f"{before}<|{role}|>" for before in ("\n", "") for role in ("user", "embed", "assistant"))
"""What ends a reply of a model that goes on with the next turn instead of its EOS: content cannot hold one (:func:`escape`)."""

TURN_END = "\ufdd0"
"""Stands for the tokenizer's EOS in a format string: a Unicode noncharacter, which :func:`escape` removes from content."""

IGNORE_INDEX = -100
"""Label of a token without loss."""

_MARKER = re.compile(r"<\|(user|embed|assistant)\|>")


@dataclass(frozen=True)
class ReadDocuments:
    """The documents at the start of a conversation, each of which was read on its own, as for cached states.

    Attributes:
        lengths: tokens of each document.
        hidden: leading tokens of each but the first that only the document itself sees: its BOS, which joining caches drops.
        causal: whether the documents are read causally.
    """

    lengths: tuple[int, ...]
    hidden: int = 0
    causal: bool = False


@dataclass(frozen=True)
class EncodedSample:
    """One sample as token ids.

    ``instruction_len``: leading tokens that attend but are not pooled. ``labels``: for a generative sample the token each
    position predicts (already shifted: ``labels[t]`` is ``input_ids[t + 1]`` or IGNORE_INDEX), None for a text to embed.
    ``truncated``: whether the sample was truncated to its maximum length. ``bidirectional``: one bool per token of a
    conversation, True in runs that see each other (prefix-LM, interleaved turns), None if all of it is causal. ``documents``:
    what the first tokens of a conversation that follows cached documents are, None if it follows none.
    """

    input_ids: list[int]
    instruction_len: int = 0
    labels: list[int] | None = None
    truncated: bool = False
    bidirectional: list[bool] | None = None
    documents: ReadDocuments | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class TooLong(ValueError):
    """Format and instruction (or the first user turn) leave no room within the maximum length."""


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids before and after a text; a prompt or a conversation has only those before it."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, rule: SpecialTokenRule = "tokenizer") -> SpecialTokens:
        """Those that ``tokenizer`` itself adds around a text; with ``rule="bos"`` only BOS at the start (if it has one)."""
        check_choice("special_tokens", rule, SPECIAL_TOKEN_RULES)
        if rule == "bos":
            return cls(() if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,))
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        added = list(tokenizer("a", add_special_tokens=True)["input_ids"])
        for start in range(len(added) - len(bare) + 1):
            if added[start : start + len(bare)] == bare:
                return cls(tuple(added[:start]), tuple(added[start + len(bare) :]))
        raise ValueError(
            "tokenizer: expected one that tokenises a text alike with and without special tokens, got one that does not"
        )


class Formatter:
    """Texts, prompts and conversations as token ids, under a model's settings.

    Args:
        tokenizer: a fast tokenizer (offsets are needed).
        settings: of the model.
    """

    def __init__(self, tokenizer: Any, settings: GritSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.special_tokens = SpecialTokens.of(tokenizer, settings.special_tokens)

    @property
    def suffix(self) -> list[int]:
        """The tokens of ``embed_eos``."""
        return _suffix(self.tokenizer, self.settings.embed_eos)

    def tokenizer_that_adds(self, start: Sequence[int], end: Sequence[int]) -> Any:
        """The tokenizer, or a copy of it, that adds these tokens around a text itself, for tools that tokenise on their own."""
        if SpecialTokens(tuple(start), tuple(end)) == SpecialTokens.of(self.tokenizer):
            return self.tokenizer
        from tokenizers.processors import TemplateProcessing

        tokenizer = copy.deepcopy(self.tokenizer)
        around = {"before": list(start), "behind": list(end)}
        known = [
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in around.items()
            if ids
        ]
        single = [name for name in ("before", "$A", "behind") if around.get(name, True)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)
        return tokenizer

    def embed_instruction(self, instruction: str) -> str:
        """The prefix of a text to embed, see :func:`embed_instruction`; without an instruction the default prompt, if any."""
        if not instruction and self.settings.default_prompt:
            return self.settings.default_prompt
        return embed_instruction(instruction, format=self.settings.format)

    def text(
        self, prefix: str, text: str, max_length: int, *, add_special_tokens: bool = True, suffix: bool = True
    ) -> EncodedSample:
        """A text to embed, see :func:`encode_text`; ``suffix=False`` omits ``embed_eos``.

        With the setting ``embed_instruction`` no token is excluded from pooling.
        """
        sample = encode_text(
            self.tokenizer,
            prefix,
            text,
            max_length,
            suffix=self.settings.embed_eos if suffix else "",
            special_tokens=self.special_tokens if add_special_tokens else SpecialTokens(),
            instruction_count=self.settings.instruction_count,
        )
        return replace(sample, instruction_len=0) if self.settings.embed_instruction else sample

    def chat_prompt(self, turns: Sequence[str]) -> str:
        """The prompt for the next reply, see :func:`chat_prompt`."""
        return chat_prompt(turns, format=self.settings.format)

    def prompt(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """A formatted prompt, see :func:`encode_prompt`."""
        special_tokens = self.special_tokens if add_special_tokens else SpecialTokens()
        return encode_prompt(self.tokenizer, prompt, special_tokens=special_tokens)

    def conversation(
        self,
        turns: Sequence[str],
        max_length: int,
        *,
        documents: Sequence[str] = (),
        causal_documents: bool = False,
    ) -> EncodedSample:
        """A conversation to train on, see :func:`encode_conversation`; a single turn is a text without roles.

        ``documents``: texts whose cached states the conversation follows, as in retrieval-augmented generation: each is read on
        its own, causally or with the attention of a text to embed, without ``embed_eos``. They are never truncated.

        Raises:
            TooLong: documents and the first user turn fill ``max_length``.
            ValueError: documents before a text without roles, or with an attention variant that keeps no states.
        """
        if documents:
            return self._after_documents(turns, max_length, documents, causal_documents)
        if len(turns) == 1:
            return encode_plain(self.tokenizer, turns[0], max_length, special_tokens=self.special_tokens)
        return encode_conversation(
            self.tokenizer,
            turns,
            max_length,
            format=self.settings.format,
            attention=self.settings.attention.generative,
            special_tokens=self.special_tokens,
        )

    def _after_documents(
        self, turns: Sequence[str], max_length: int, documents: Sequence[str], causal: bool
    ) -> EncodedSample:
        attention = self.settings.attention
        if not attention.generates_causally or not (causal or attention.embedding_is_uniform):
            raise ValueError(
                "documents: expected a model that reads them with one flag and replies causally, attn 'bbcc' or 'cccc', "
                f"got {attention}"
            )
        ids: list[int] = []
        lengths = []
        try:
            for document in documents:
                # one token more than there is room for shows that it does not fit
                read = self.text(EMBED, document, max_length + 1, suffix=False)
                ids += read.input_ids
                lengths.append(len(read))
            talk = encode_conversation(
                self.tokenizer,
                turns,
                max(max_length - len(ids), 1),
                format=self.settings.format,
                special_tokens=SpecialTokens(),
                follows=True,
            )
        except TooLong:
            raise TooLong(
                f"max_length: expected room for {len(documents)} documents, the first user turn and a reply, got {max_length}"
            ) from None
        start = self.special_tokens.start
        bos = int(bool(start) and start[0] == self.tokenizer.bos_token_id)
        assert talk.labels is not None
        return replace(
            talk,
            input_ids=ids + talk.input_ids,
            labels=[IGNORE_INDEX] * len(ids) + talk.labels,
            documents=ReadDocuments(tuple(lengths), bos, causal or attention.embedding_causal),
        )


def escape(text: str) -> str:
    """``text`` with role markers that a user spelled out broken up by a space."""
    return _MARKER.sub(r"<| \1|>", text).replace(TURN_END, "\ufffd")


def embed_instruction(instruction: str, *, format: Format = "grit") -> str:
    """The prefix of a text to embed: the instruction in its markers, or the bare embed marker if it is empty.

    The format ``"plain"`` has no markers; the prefix is the instruction itself.
    """
    if format == "plain":
        return escape(instruction)
    instruction = instruction.strip("\t\n :")
    return f"{USER}{escape(instruction)}{user_end(format)}{TURN_SEPARATOR}{EMBED}" if instruction else EMBED


def chat_prompt(turns: Sequence[str], *, format: Format = "grit") -> str:
    """The prompt for the next assistant reply: ``turns`` alternates user, assistant, .., user. Without BOS.

    Earlier replies are stripped and end in TURN_END, which :func:`encode_prompt` turns into the EOS seen in training.
    """
    if len(turns) % 2 == 0:
        raise ValueError(f"turns: expected an odd number that ends with a user turn, got {len(turns)}")
    parts = []
    for index, turn in enumerate(turns):
        parts.append(
            f"{ASSISTANT}{escape(turn.strip())}{TURN_END}" if index % 2 else f"{USER}{escape(turn)}{user_end(format)}"
        )
    return TURN_SEPARATOR.join(parts) + TURN_SEPARATOR + ASSISTANT


def encode_prompt(tokenizer: Any, prompt: str, *, special_tokens: SpecialTokens | None = None) -> list[int]:
    """Token ids of a formatted prompt: TURN_END becomes the tokenizer's EOS, special tokens spelled out remain plain text.

    ``special_tokens``: what comes first; default: what the tokenizer adds.
    """
    ids = list(_special(tokenizer, special_tokens).start)
    *closed, last = prompt.split(TURN_END)
    for part in closed:
        ids += [*_tokenize(tokenizer, part)[0], _eos(tokenizer)]
    return ids + _tokenize(tokenizer, last)[0]


def encode_text(
    tokenizer: Any,
    prefix: str,
    text: str,
    max_length: int,
    *,
    suffix: str = "",
    special_tokens: SpecialTokens | None = None,
    instruction_count: InstructionCount = "offsets",
) -> EncodedSample:
    """A text to embed, after its ``prefix`` (see :func:`embed_instruction`; it is format, ``text`` is content).

    A text longer than ``max_length`` is truncated, but never the ``suffix`` (one token if the tokenizer has it as a special or
    added token) nor the surrounding ``special_tokens`` (default: what the tokenizer adds). ``instruction_count="reference"``
    counts the prefix by tokenising it alone, as the public implementation does; the two differ where tokens merge across the
    boundary.

    Raises:
        TooLong: prefix and suffix leave no room for the text in ``max_length``.
        ValueError: the text is empty.
    """
    if not text.strip():
        raise ValueError(f"text: expected a non-empty text, got {text!r}")
    special = _special(tokenizer, special_tokens)
    start = list(special.start)
    ending = _suffix(tokenizer, suffix)
    tail = [*ending, *special.end]
    *closed, prefix = prefix.split(TURN_END)
    for turn in closed:
        start += [*_tokenize(tokenizer, turn)[0], _eos(tokenizer)]
    ids, ends, border = _tokenize(tokenizer, prefix, escape(text), reserved=ending if len(ending) == 1 else ())
    if instruction_count == "offsets":
        skip = sum(end <= border for end in ends) if prefix else 0
    else:
        skip = len(_tokenize(tokenizer, prefix)[0]) if prefix else 0
    room = max_length - len(start) - len(tail)
    if skip >= room:
        raise TooLong(
            f"max_length: expected more than the {len(start) + skip + len(tail)} tokens of the instruction alone "
            f"({''.join(closed + [prefix])[:80]!r}), got {max_length}"
        )
    instruction_len = len(start) + skip if prefix else 0
    return EncodedSample(start + ids[:room] + tail, instruction_len, truncated=len(ids) > room)


def encode_conversation(
    tokenizer: Any,
    turns: Sequence[str],
    max_length: int,
    *,
    format: Format = "grit",
    attention: GenerativeAttention = "cc",
    special_tokens: SpecialTokens | None = None,
    follows: bool = False,
) -> EncodedSample:
    """A conversation to train on: ``turns`` alternates user, assistant, ...; replies and their EOS are labelled.

    A conversation longer than ``max_length`` is truncated.

    Args:
        attention: ``"cc"``: causal. ``"bc"`` (prefix-LM): everything before the last reply is one bidirectional run, and only
            that reply is labelled. ``"il"`` (interleaved): each user turn with its format is a bidirectional run. A token that
            sees its own next token is never labelled.
        special_tokens: what comes first; default: what the tokenizer adds.
        follows: whether something precedes the first turn, which then begins like any other.

    Raises:
        TooLong: the first user turn fills ``max_length``.
        ValueError: a turn is empty, or the number of turns is odd.
    """
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError(f"turns: expected an even number: user, assistant, ..., got {len(turns)}")
    eos = _eos(tokenizer)
    ids = list(_special(tokenizer, special_tokens).start)
    reply = [-1] * len(ids)  # per token the index of the reply it belongs to, -1 for format and user turns
    for index in range(0, len(turns), 2):
        user, assistant = turns[index], turns[index + 1].strip()
        if not user.strip() or not assistant:
            raise ValueError(
                f"turns: expected non-empty texts, got an empty turn {index if not user.strip() else index + 1}"
            )
        *closed, head = f"{TURN_SEPARATOR if index or follows else ''}{_user_turn(user, format)}".split(TURN_END)
        before = [*_tokenize(tokenizer, closed[0])[0], eos] if closed else []
        pieces, ends, border = _tokenize(tokenizer, head, escape(assistant))
        ids += [*before, *pieces, eos]
        reply += [*(-1 for _ in before), *(index // 2 if end > border else -1 for end in ends), index // 2]
    truncated = len(ids) > max_length
    ids, reply = ids[:max_length], reply[:max_length]
    if max(reply) < 0:
        raise TooLong(f"max_length: expected room for a reply after the first user turn, got {max_length}")
    last = max(reply)
    bidirectional: list[bool] | None = None
    if attention == "bc":
        start = reply.index(last)
        bidirectional = [t < start for t in range(len(ids))]
    elif attention == "il":
        bidirectional = [r < 0 for r in reply]
    learned = [r >= 0 and (r == last or attention != "bc") for r in reply]
    return EncodedSample(ids, 0, _labels(ids, learned, bidirectional), truncated, bidirectional)


def encode_plain(
    tokenizer: Any, text: str, max_length: int, *, special_tokens: SpecialTokens | None = None
) -> EncodedSample:
    """A text without roles to train on: all its tokens and the final EOS are labelled.

    ``special_tokens``: what comes first; default: what the tokenizer adds.
    """
    if not text.strip():
        raise ValueError(f"text: expected a non-empty text, got {text!r}")
    ids = [*_special(tokenizer, special_tokens).start, *_tokenize(tokenizer, escape(text))[0], _eos(tokenizer)]
    kept = ids[:max_length]
    return EncodedSample(kept, 0, _labels(kept, [True] * len(kept), None), len(kept) < len(ids))


def _labels(ids: list[int], learned: list[bool], bidirectional: list[bool] | None) -> list[int]:
    """Shifted labels; none for a token in the same bidirectional run as its successor."""
    labels = [token if learns else IGNORE_INDEX for token, learns in zip(ids, learned, strict=True)]
    labels = [*labels[1:], IGNORE_INDEX]
    if bidirectional is not None:
        for t in range(len(ids) - 1):
            if bidirectional[t] and bidirectional[t + 1]:
                labels[t] = IGNORE_INDEX
    return labels


def _user_turn(user: str, format: Format) -> str:
    """A user turn and the marker of the reply."""
    return f"{USER}{escape(user)}{user_end(format)}{TURN_SEPARATOR}{ASSISTANT}"


def _tokenize(tokenizer: Any, *pieces: str, reserved: Sequence[int] = ()) -> tuple[list[int], list[int], int]:
    """Token ids of format and content pieces, where each token ends in their joined string (in characters), and where the last
    piece begins in it. No id is BOS, EOS or one of ``reserved``."""
    ids, ends = _plain_ids(tokenizer, "".join(pieces))
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, *reserved}
    if not special.isdisjoint(ids):
        # merges may produce a special token even though special tokens are split
        for text in tokenizer.convert_ids_to_tokens(sorted(special.intersection(ids))):
            pieces = tuple(piece.replace(text, f"{text[:1]} {text[1:]}") for piece in pieces)
        ids, ends = _plain_ids(tokenizer, "".join(pieces))
        if not special.isdisjoint(ids):
            raise ValueError(f"tokenizer: it merges the plain text {''.join(pieces)[:80]!r} into a special token")
    return ids, ends, sum(map(len, pieces[:-1]))


def _plain_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]


def _suffix(tokenizer: Any, suffix: str) -> list[int]:
    """The suffix as one token if it is a special or added token, else as plain text."""
    if not suffix:
        return []
    token = tokenizer.convert_tokens_to_ids(suffix)
    if token is not None and token in tokenizer.added_tokens_decoder:
        return [token]
    return _plain_ids(tokenizer, suffix)[0]


def _special(tokenizer: Any, given: SpecialTokens | None) -> SpecialTokens:
    return SpecialTokens.of(tokenizer) if given is None else given


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected an EOS token, without which a model cannot learn to stop, got none")
    return int(tokenizer.eos_token_id)


def user_end(format: Format) -> str:
    """What separates a user turn or an instruction from what follows it."""
    check_choice("format", format, FORMATS)
    if format == "plain":
        raise ValueError("format: expected 'grit' or 'zephyr' for a conversation, got 'plain', which has no roles")
    return TURN_END if format == "zephyr" else ""
