"""The text formats of GRIT and the exact token spans they produce.

    embed, with instruction      <bos><|user|>\\n{instruction}\\n<|embed|>\\n{text}
    embed, without instruction   <bos><|embed|>\\n{text}
    generate                     <bos><|user|>\\n{user}\\n<|assistant|>\\n{assistant}<eos>\\n<|user|>\\n...

BOS and EOS are the tokenizer's own. The role markers are plain text, as in the published models. Every span is read off the
tokenizer's offsets of the whole string: a token belongs to the instruction only if it ends inside of it, so no character of a
text is lost to a merge over the border and no label drifts over turns.

User content cannot become format: it is tokenised with special tokens split into plain text, and a role marker spelled out
in it gets a space (``<| user|>``).

Source: GRIT, arXiv 2402.09906 section 2 and appendix; the public implementation's training format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

USER = "<|user|>\n"
EMBED = "<|embed|>\n"
ASSISTANT = "<|assistant|>\n"
TURN_SEPARATOR = "\n"

IGNORE_INDEX = -100
"""Label of a token that carries no loss."""

_MARKER = re.compile(r"<\|(user|embed|assistant)\|>")


@dataclass(frozen=True)
class EncodedSample:
    """One sample as token ids.

    ``instruction_len``: leading tokens that attend but are not pooled. ``labels``: for a generative sample the token each
    position predicts (already shifted: ``labels[t]`` is ``input_ids[t + 1]`` or IGNORE_INDEX), None for a text to embed.
    ``truncated``: the sample was cut to its maximum length. ``bidirectional``: one bool per token of a conversation, True in
    runs that see each other (prefix-LM, interleaved turns), None where all of it is causal.
    """

    input_ids: list[int]
    instruction_len: int = 0
    labels: list[int] | None = None
    truncated: bool = False
    bidirectional: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def escape(text: str) -> str:
    """``text`` with role markers that a user spelled out broken up."""
    return _MARKER.sub(r"<| \1|>", text)


def embed_instruction(instruction: str) -> str:
    """The prefix of a text to embed: with an instruction, or the bare embed marker for an empty one."""
    instruction = instruction.strip("\t\n :")
    return f"{USER}{escape(instruction)}{TURN_SEPARATOR}{EMBED}" if instruction else EMBED


def chat_prompt(turns: Sequence[str]) -> str:
    """The prompt that asks for the next assistant reply: ``turns`` alternates user, assistant, .., user. Without BOS."""
    if len(turns) % 2 == 0:
        raise ValueError(f"turns: got {len(turns)}, accepted is an odd number that ends with a user turn")
    parts = []
    for index, turn in enumerate(turns):
        role = USER if index % 2 == 0 else ASSISTANT
        parts.append(f"{role}{escape(turn)}")
    return TURN_SEPARATOR.join(parts) + TURN_SEPARATOR + ASSISTANT


def _tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids of ``text`` as plain text, and where each token ends in it (characters)."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode_text(
    tokenizer: Any,
    prefix: str,
    text: str,
    max_length: int,
    *,
    suffix: str = "",
    add_special_tokens: bool = True,
    instruction_count: Literal["offsets", "reference"] = "offsets",
) -> EncodedSample:
    """A text to embed, after its ``prefix`` (see :func:`embed_instruction`; it is format, ``text`` is content).

    A text longer than ``max_length`` loses its end, never the ``suffix``. ``instruction_count="reference"`` counts the prefix by
    tokenising it alone, as the public implementation does; the two differ where tokens merge over the border.

    Raises:
        ValueError: the text is empty, or prefix and suffix leave no room for it in ``max_length``.
    """
    if not text.strip():
        raise ValueError(f"text: got {text!r}, accepted is a text that is not empty")
    start = _bos(tokenizer) if add_special_tokens else []
    ids, ends = _tokenize(tokenizer, prefix + escape(text))
    tail = _tokenize(tokenizer, suffix)[0] if suffix else []
    if instruction_count == "offsets":
        skip = sum(end <= len(prefix) for end in ends) if prefix else 0
    else:
        skip = len(_tokenize(tokenizer, prefix)[0]) if prefix else 0
    room = max_length - len(start) - len(tail)
    if skip >= room:
        raise ValueError(
            f"max_length: got {max_length}, but the instruction alone takes {len(start) + skip + len(tail)} tokens "
            f"(instruction: {prefix[:80]!r})"
        )
    instruction_len = len(start) + skip if prefix else 0
    return EncodedSample(start + ids[:room] + tail, instruction_len, truncated=len(ids) > room)


def encode_conversation(tokenizer: Any, turns: Sequence[str], max_length: int) -> EncodedSample:
    """A conversation to learn: ``turns`` alternates user, assistant, ...; replies and their EOS carry the loss.

    A conversation longer than ``max_length`` loses its end.

    Raises:
        ValueError: a turn is empty, the number of turns is odd, or the first user turn fills ``max_length``.
    """
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError(f"turns: got {len(turns)}, accepted is an even number: user, assistant, ...")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no EOS token, so a model could not learn to stop")
    ids = _bos(tokenizer)
    learned = [False] * len(ids)
    for index in range(0, len(turns), 2):
        user, assistant = turns[index], turns[index + 1].strip()
        if not user.strip() or not assistant:
            raise ValueError(f"turns: turn {index if not user.strip() else index + 1} is empty")
        head = f"{TURN_SEPARATOR if index else ''}{USER}{escape(user)}{TURN_SEPARATOR}{ASSISTANT}"
        pieces, ends = _tokenize(tokenizer, head + escape(assistant))
        ids += [*pieces, tokenizer.eos_token_id]
        learned += [*(end > len(head) for end in ends), True]
    truncated = len(ids) > max_length
    ids, learned = ids[:max_length], learned[:max_length]
    if not any(learned):
        raise ValueError(
            f"max_length: got {max_length}, which the first user turn fills; no reply token is left to learn"
        )
    labels = [token if learns else IGNORE_INDEX for token, learns in zip(ids, learned, strict=True)]
    return EncodedSample(ids, 0, [*labels[1:], IGNORE_INDEX], truncated)
