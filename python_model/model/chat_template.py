"""Prompts in the chat template of a checkpoint's tokenizer, where user content stays content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from python_model.model.prompts import escape


def template_prompt(tokenizer: Any, turns: Sequence[str], *, system: str = "") -> str:
    """The prompt for the next reply: ``turns`` alternates user, assistant, .., user.

    A space breaks up role markers and special tokens that a user spelled out. A system message opens the first user turn
    where the template rejects or ignores the system role.

    Raises:
        ValueError: an even number of turns, or a template that is missing, broken, or drops the last turn.
    """
    if len(turns) % 2 == 0:
        raise ValueError(f"turns: expected an odd number that ends with a user turn, got {len(turns)}")
    if not tokenizer.chat_template:
        raise ValueError("format: expected 'grit', since the tokenizer has no chat template, got 'template'")
    contents = [_plain(tokenizer, turn) for turn in turns]
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    if system:
        opening = _plain(tokenizer, system)
        text, _ = _render(tokenizer, [{"role": "system", "content": opening}, *messages])
        if text is not None and opening.strip() in text:
            return _with_last_turn(text, contents[-1])
        messages[0]["content"] = f"{opening}\n\n{messages[0]['content']}"
    text, error = _render(tokenizer, messages)
    if text is None:
        raise ValueError(
            f"format: expected 'grit', since the tokenizer's chat template fails ({error}), got 'template'"
        )
    return _with_last_turn(text, contents[-1])


def template_ids(tokenizer: Any, turns: Sequence[str], *, system: str = "", prefix: str = "") -> list[int]:
    """Token ids of :func:`template_prompt` followed by ``prefix``, the beginning of the reply; the template writes its special
    tokens.
    """
    text = template_prompt(tokenizer, turns, system=system) + prefix
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str | None, Exception | None]:
    """The text, or None and the reason why the template produces none."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), None
    except Exception as error:  # a template is a program of the checkpoint's, which may fail in any way
        return None, error


def _with_last_turn(text: str, content: str) -> str:
    if content.strip() not in text:
        raise ValueError(
            "format: expected 'grit', since the tokenizer's chat template leaves the last turn out, got 'template'"
        )
    return text


def _plain(tokenizer: Any, text: str) -> str:
    """``text`` with a space inside each role marker and special token that a user spelled out."""
    text = escape(text)
    # not only named special tokens count: Llama 3 opens a turn with <|start_header_id|>
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    for token in sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True):
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
