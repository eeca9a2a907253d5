"""Replies of a model: :func:`reply` to one conversation, :func:`replies` to many, :func:`answer_file` to a file of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

import grit_kernels as gk
from python_model.data.files import read_objects
from python_model.data.forms import NAMES_OF_ROWS
from python_model.generate.decode import Sampling, decode
from python_model.generate.states import TextStates, from_cache
from python_model.model.chat_template import template_ids
from python_model.model.identity import content_digest
from python_model.model.limits import check_prompts
from python_model.model.modeling import GritLM
from python_model.model.prompts import ROLE_MARKERS
from python_model.support.arguments import check_at_least, check_choice

ChatFormat = Literal["grit", "template"]
FORMATS: tuple[str, ...] = get_args(ChatFormat)
OF_CONVERSATIONS = ("messages", "conversations", "system", "documents", "query")
"""Columns of other formats, refused in a file of prompts; a system message is an option, the same for all rows."""
_GENERATING = threading.Lock()
NEW_TOKENS = 128
"""Most tokens of a reply by default."""
UNFINISHED = "\ufffd"  # what the first bytes of a longer character decode to


def rag_prompt(question: str, document: str) -> list[str]:
    """A user turn with a document before the question (the paper's document-first retrieval prompt)."""
    return [f"{document}\n\n{question}\n\nAnswer the prior query while optionally using the context prior to it"]


def eos_token_ids(model: GritLM) -> list[int]:
    """Every token that ends a reply, from the generation config and from the tokenizer."""
    configured = model.model.generation_config.eos_token_id
    found = set(configured) if isinstance(configured, list | tuple) else {configured}
    return sorted(token for token in found | {model.tokenizer.eos_token_id} if token is not None)


def prompt_ids(model: GritLM, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """:func:`python_model.model.prompts.encode_prompt` with the model's tokenizer and its special tokens."""
    return model.formatter.prompt(text, add_special_tokens=add_special_tokens)


def conversation_ids(
    model: GritLM, turns: Sequence[str], *, format: ChatFormat = "grit", system: str = "", prefix: str = ""
) -> list[int]:
    """Token ids of the prompt for the next assistant turn.

    Args:
        turns: user, assistant, .., user.
        format: ``"grit"`` (the text format of the model's settings) or ``"template"`` (the chat template of the tokenizer).
        system: a system message. It opens the first user turn if the format has no system role.
        prefix: the beginning of the reply.

    Raises:
        ValueError: an unknown format, an even number of turns, or a chat template that is missing or broken.
    """
    check_choice("format", format, FORMATS)
    if model.attention.generative == "il" and len(turns) > 1:
        raise ValueError(f"turns: expected one with attn {model.attn!r} (earlier replies are causal), got {len(turns)}")
    if format == "grit":
        opened = [f"{system}\n\n{turns[0]}", *turns[1:]] if system and turns else list(turns)
        return prompt_ids(model, model.formatter.chat_prompt(opened) + prefix)
    return template_ids(model.tokenizer, turns, system=system, prefix=prefix)


class TextStream:
    """A reply as it grows: tokens in, text out, ended by stop strings.

    Text is released only once it can no longer change: not in the middle of a character, and not while it may be the beginning
    of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), on_text: Callable[[str], None] | None = None) -> None:
        if not all(stop):
            raise ValueError("stop: expected non-empty strings, got an empty string")
        self.tokenizer, self.stop, self.on_text = tokenizer, tuple(stop), on_text
        self.tokens: list[int] = []
        self.text = ""
        self.shown = 0
        # `_kept` is the text of the tokens before `_next`. How a token reads may depend on the one before it, so those from
        # `_context` on are decoded again with each new one, and what they give alone is taken off.
        self._kept, self._context, self._next = "", 0, 0
        self._whole = _removes_blanks(tokenizer)

    def push(self, token: int) -> bool:
        """Add a token; True when a stop string is complete (``text`` then ends before it)."""
        self.tokens.append(token)
        known, found = (self._decode(self.tokens[self._context : end]) for end in (self._next, None))
        searched = len(self._kept)
        self.text = self._kept + found[len(known) :]
        if len(found) > len(known) and not found.endswith(UNFINISHED) and not self._whole:
            self._kept, self._context, self._next = self.text, self._next, len(self.tokens)
        places = [self.text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop]
        complete = [place for place in places if place >= 0]
        if complete:
            self.text = self.text[: min(complete)]
        self._show(len(self.text) if complete else self._settled())
        return bool(complete)

    def finish(self) -> str:
        """Release the rest; returns the whole text."""
        self._show(len(self.text))
        return self.text

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _settled(self) -> int:
        end = len(self.text.rstrip(UNFINISHED))
        for stop in self.stop:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if self.text.endswith(stop[:size], 0, end):
                    end -= size
                    break
        return end

    def _show(self, end: int) -> None:
        if self.on_text is not None and end > self.shown:
            self.on_text(self.text[self.shown : end])
        self.shown = max(self.shown, end)


def _removes_blanks(tokenizer: Any) -> bool:
    """Whether decoding turns " ." into ".", so that text may change with any later token. Transformers does not do it for
    byte-pair tokenizers, whatever their setting says."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    ids = tokenizer("a .", add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def complete(
    model: GritLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = NEW_TOKENS,
    min_new_tokens: int = 0,
    sampling: Sampling | None = None,
    num_beams: int = 1,
    stop: Sequence[str] = (),
    seed: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The texts that follow prompts of token ids.

    Args:
        sampling: default: greedy.
        num_beams: above 1: beam search by transformers, without sampling, penalties, streaming and stop strings.
        stop: a reply ends before the first occurrence of one of these strings.
        seed: sampling seed; default: torch's global generator.
        on_text: called with (row, new piece of text) as the texts grow.

    Raises:
        ValueError: mutually exclusive options, a prompt that leaves no room for ``max_new_tokens`` in the model's positions, or a
            model without a language-model head.
    """
    model.check_head("generate")
    check_prompts(model.model.config, [len(prompt) for prompt in prompts], max_new_tokens)
    if num_beams > 1:
        if not model.attention.generates_causally:
            raise ValueError(f"num_beams: expected 1 with attn {model.attn!r}, got {num_beams}")
        chosen = sampling is not None and (sampling.temperature > 0 or sampling.penalizes)
        if chosen or stop or on_text is not None:
            raise ValueError(
                f"num_beams: expected 1 with sampling, penalties, stop strings or streaming, got {num_beams}"
            )
        return _beams(model, prompts, max_new_tokens, min_new_tokens, num_beams)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=model.device).manual_seed(seed)
    streams = [
        TextStream(model.tokenizer, stop, None if on_text is None else _for_row(on_text, row))
        for row in range(len(prompts))
    ]
    states = None
    if not model.attention.generates_causally:
        states = _bidirectional_states(model, prompts)
        prompts = [prompt[-1:] for prompt in prompts]
    decode(
        model.model,
        prompts,
        states=states,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        eos_token_ids=eos_token_ids(model),
        sampling=sampling,
        generator=generator,
        on_token=lambda row, token: streams[row].push(token),
    )
    return [stream.finish() for stream in streams]


@torch.no_grad()
def _bidirectional_states(model: GritLM, prompts: Sequence[Sequence[int]]) -> list[TextStates | None]:
    """States of all tokens but the last of each prompt, read as one bidirectional run (prefix-LM).

    The last token of the run sees all of it either way, so decoding recomputes it causally and continues from there.
    """
    model.check_patch()
    found: list[TextStates | None] = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        cache = gk.hf.new_cache()
        model.decoder[0](input_ids=ids, cache=cache, is_causal=False)
        states = from_cache(cache, [ids[0]], causal=False)[0]
        found.append(states.slice(0, len(prompt) - 1) if len(prompt) > 1 else None)
    return found


def _for_row(on_text: Callable[[int, str], None], row: int) -> Callable[[str], None]:
    return lambda text: on_text(row, text)


def _beams(
    model: GritLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, min_new_tokens: int, num_beams: int
) -> list[str]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), model.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with _own_generation_config(model):
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            num_beams=num_beams,
            do_sample=False,
        )
    return [str(model.tokenizer.decode(row[longest:], skip_special_tokens=True)) for row in output]


@contextlib.contextmanager
def _own_generation_config(model: GritLM) -> Iterator[None]:
    """No penalties, banned words and the like of the checkpoint, which the other ways to decode do not know: transformers would
    take from its config whatever a call's own leaves open."""
    decoder: Any = model.model.get_base_model() if hasattr(model.model, "get_base_model") else model.model
    ends, padding = eos_token_ids(model), model.tokenizer.pad_token_id
    with _GENERATING:
        saved = decoder.generation_config
        decoder.generation_config = type(saved)(eos_token_id=ends, pad_token_id=padding)
        try:
            yield
        finally:
            decoder.generation_config = saved


def reply(
    model: GritLM,
    turns: Sequence[str],
    *,
    prefix: str = "",
    format: ChatFormat = "grit",
    system: str = "",
    max_new_tokens: int = NEW_TOKENS,
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> str:
    """The assistant's next turn, stripped. ``turns`` alternates user, assistant, .., user; ``prefix`` begins the reply.

    ``on_text`` receives the reply piece by piece. ``options``: see :func:`complete`. In the format ``"grit"`` a reply also ends
    where the model goes on with a role marker.
    """
    ids = conversation_ids(model, turns, format=format, system=system, prefix=prefix)
    stream = None if on_text is None else lambda row, text: on_text(text)
    options |= {"max_new_tokens": max_new_tokens, "on_text": stream}
    return _turns_of(model, [ids], format, **options)[0]


def replies(
    model: GritLM,
    conversations: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    prefix: str = "",
    format: ChatFormat = "grit",
    system: str = "",
    **options: Any,
) -> list[str]:
    """:func:`reply` for many conversations, in batches of similar length; results are in the given order."""
    check_at_least("batch_size", batch_size, 1)
    ids = [conversation_ids(model, turns, format=format, system=system, prefix=prefix) for turns in conversations]
    check_prompts(model.model.config, [len(prompt) for prompt in ids], options.get("max_new_tokens", NEW_TOKENS))
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    found = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index, text in zip(batch, _turns_of(model, [ids[i] for i in batch], format, **options), strict=True):
            found[index] = text
    return found


def _turns_of(
    model: GritLM, prompts: Sequence[Sequence[int]], format: ChatFormat, *, stop: Sequence[str] = (), **options: Any
) -> list[str]:
    """:func:`complete`, stripped, each text up to its first role marker in the format ``"grit"``."""
    markers = ROLE_MARKERS if format == "grit" else ()
    if options.get("num_beams", 1) > 1:  # beams know no stop strings, so what follows is cut off
        texts = complete(model, prompts, stop=stop, **options)
        return [min((text.split(marker)[0] for marker in markers), key=len, default=text).strip() for text in texts]
    return [text.strip() for text in complete(model, prompts, stop=[*stop, *markers], **options)]


def answer_file(
    model: GritLM,
    source: Path,
    target: Path,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> int:
    """Answer every row of a jsonl file; returns how many were answered in this run.

    Rows of ``source``: ``{"prompt": str}`` or ``{"turns": [user, assistant, .., user]}``. ``target`` receives
    one row ``{"row", "turns", "reply", "run"}`` each, batch by batch; run again after an interruption, it resumes. ``run`` is a
    digest of model and options, 16 hexadecimal digits.

    Raises:
        ValueError: a row is malformed (the message names its line) or too long for the model, or ``target`` holds replies to
            other rows, of another model, or under other options.
    """
    from python_model.support.resume import ResumableRows

    check_at_least("batch_size", batch_size, 1)
    conversations = read_conversations(source)
    formatted = {name: options[name] for name in ("format", "system", "prefix") if name in options}
    lengths = [len(conversation_ids(model, turns, **formatted)) for turns in conversations]
    # before the first is answered
    check_prompts(model.model.config, lengths, options.get("max_new_tokens", NEW_TOKENS))
    run = _run(model, options)
    with ResumableRows(target, [{"turns": turns} for turns in conversations], run=run) as rows:
        for start in range(0, len(rows.missing), batch_size):
            batch = rows.missing[start : start + batch_size]
            texts = replies(model, [conversations[i] for i in batch], batch_size=batch_size, **options)
            rows.write([(index, {"reply": text}) for index, text in zip(batch, texts, strict=True)])
            if progress is not None:
                progress(start + len(batch), len(rows.missing))
        return len(rows.missing)


def _run(model: GritLM, options: Mapping[str, Any]) -> str:
    """Distinguishes runs that give different replies: by the content of the model, and by options."""
    found = [content_digest(model), eos_token_ids(model), options]
    return hashlib.blake2b(json.dumps(found, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()


def read_conversations(path: Path) -> list[list[str]]:
    """See :func:`answer_file`."""
    found: list[list[str]] = []
    ignored: dict[str, None] = {}
    for origin, columns in read_objects(path):
        row = {name: value for name, value in columns.items() if value is not None}
        for name in row:
            if name in OF_CONVERSATIONS or ("prompt" in row and "turns" in row):
                raise ValueError(f"{origin}: expected a row of 'prompt' or of 'turns' alone, got {name!r} beside it")
            if name not in ("prompt", "turns", *NAMES_OF_ROWS):
                ignored[name] = None
        turns: Any = row["turns"] if "turns" in row else [row.get("prompt")]
        texts = isinstance(turns, list) and all(isinstance(turn, str) and turn.strip() for turn in turns)
        if not texts or len(turns) % 2 == 0:
            raise ValueError(
                f"{origin}: expected a 'prompt', or 'turns' with an odd number of non-empty texts, got neither"
            )
        found.append(turns)
    if ignored:
        warnings.warn(f"{path}: ignored columns: {', '.join(ignored)}", stacklevel=2)
    return found
