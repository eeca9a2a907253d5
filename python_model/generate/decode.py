"""Decoding into a cache of fixed size, which is how GritLM generates.

transformers' own loop grows the cache by copying all of it for every token and layer. Here the states have their final place
from the start, in the layout (B, slots, heads, D) that the attention kernels read without a copy, and a step is nothing but the
forward pass and the choice of a token.

A row of the batch occupies the slots ``[gap | states | gap | prompt | new tokens]``, where all prompts end at the same slot:
shorter rows are left-padded, and attention skips the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import grit_kernels as gk
from python_model.generate.step import Step, supports
from python_model.support.arguments import check_at_least

if TYPE_CHECKING:
    from python_model.generate.states import TextStates

OnToken = Callable[[int, int], bool]
"""Called with (row, token) for each new token except EOS; returning True ends the row."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy; otherwise it is sampled from the tokens left by ``top_k`` (0:
    all) and ``top_p`` (the smallest set of most likely tokens whose probabilities sum to it). Of tokens with equal logits, the
    one with the lowest id counts as the more likely one, here as in the greedy choice.

    Before that, as in OpenAI's API, the logit of a token that occurs n times in the reply so far is lowered by
    ``n * frequency_penalty``, and if n > 0 by ``presence_penalty``; both from -2 to 2.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1, got {self}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"sampling: expected {name} from -2 to 2, got {getattr(self, name)}")

    @property
    def penalizes(self) -> bool:
        """Whether what a reply holds so far has an effect on its next token."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    def choose(
        self, logits: Tensor, generator: torch.Generator | None = None, replies: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """logits (B, vocabulary) -> tokens (B); ``replies``: the tokens of each row's reply so far, read by the penalties."""
        if self.penalizes:
            if len(replies) != len(logits):
                raise ValueError(f"replies: expected {len(logits)}, one per row of logits, got {len(replies)}")
            counts = torch.stack([_counts(reply, logits.shape[-1]) for reply in replies]).to(logits.device)
            logits = logits.float() - self.frequency_penalty * counts - self.presence_penalty * (counts > 0)
        if self.temperature == 0:
            return logits.max(dim=-1).indices  # argmax, which takes several times as long for 16 bits on a CPU
        # a temperature close to 0 leaves only the best token, and the quotient is never NaN
        scaled = logits.float()
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / max(self.temperature, 1e-30)
        if self.top_k and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k, dim=-1).values[:, -1:]
            above, ties = scaled > least, scaled == least
            room = self.top_k - above.sum(dim=-1, keepdim=True)
            scaled = scaled.masked_fill(~(above | (ties & (ties.cumsum(dim=-1) <= room))), float("-inf"))
        probabilities = scaled.softmax(dim=-1)
        if self.top_p < 1:
            # by logits: those of two tokens may be equal where their probabilities are rounded differently
            order = scaled.sort(dim=-1, descending=True, stable=True).indices
            ordered = probabilities.gather(-1, order)
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p  # the tokens before it already reach top_p
            beyond[:, 0] = False  # keep the best one even if float32 rounds top_p to 0
            probabilities = probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _counts(tokens: Sequence[int], size: int) -> Tensor:
    """How often each token of a vocabulary of ``size`` occurs."""
    return torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=size)


def _fill(
    cache: Any, states: Sequence[TextStates | None], slots: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Copy each row's states to the end of the first ``slots`` slots of a static cache."""
    given = [(row, part) for row, part in enumerate(states) if part is not None]
    if not given:
        return
    _, heads, dim = given[0][1].geometry
    like = torch.empty(len(states), heads, 1, dim, device=device, dtype=dtype)
    for index, layer in enumerate(cache.static_layers):
        layer.lazy_initialization(like, like)
        layer.filled = slots
        for row, part in given:
            layer.keys[row, :, slots - len(part) : slots] = part.keys_values[index, 0]
            layer.values[row, :, slots - len(part) : slots] = part.keys_values[index, 1]


def _outgrows(
    change: gk.hf.FrequencyChange, read: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> bool:
    """Whether some row may come to a length with other rotary frequencies than its prompt. (The last token is never read.)"""
    for stored, prompt in zip(read, prompts, strict=True):
        room = change.room(stored) if stored else None
        if room is not None and room < len(prompt) + max_new_tokens - 1:
            raise ValueError(
                f"states: expected room for the prompt and the reply below {change.limit} tokens, where the rotary frequencies "
                f"change with which keys were made, got {stored} + {len(prompt)} + {max_new_tokens}"
            )
    rooms = [change.room(stored + len(prompt)) for stored, prompt in zip(read, prompts, strict=True)]
    return any(room is not None and room < max_new_tokens - 1 for room in rooms)


def _in_stretches(
    model: Any,
    prompt: Sequence[int],
    change: gk.hf.FrequencyChange,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    begun: int,
    on_token: Callable[[int], bool] | None,
    **options: Any,
) -> list[int]:
    """:func:`decode` of one row, read anew wherever its rotary frequencies change."""
    found: list[int] = []
    ended = False

    def receive(row: int, token: int) -> bool:
        nonlocal ended
        ended = on_token is not None and on_token(token)
        return ended

    while len(found) < max_new_tokens and not ended:
        ids = [*prompt, *found]
        room = change.room(len(ids))
        count = max_new_tokens - len(found) if room is None else min(room + 1, max_new_tokens - len(found))
        options |= {"min_new_tokens": max(0, min_new_tokens - len(found)), "begun": begun + len(found)}
        (piece,) = decode(model, [ids], max_new_tokens=count, on_token=receive, **options)
        ended = ended or len(piece) < count
        found += piece
    return found


def _of_row(told: Callable[[int], bool], row: int, token: int) -> bool:
    """An :data:`OnToken` that tells of the only row."""
    return told(token)


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    min_new_tokens: int = 0,
    states: Sequence[TextStates | None] | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    begun: int = 0,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids, preceded by its ``states`` if there are any) until EOS or ``max_new_tokens``.

    Args:
        model: a patched causal language model.
        prompts: one non-empty list of ids per row.
        eos_token_ids: tokens that end a row; not returned, and not chosen before ``min_new_tokens``.
        states: the states of what each row has read before; the prompt's positions follow theirs.
        begun: how many tokens at the end of each prompt belong to its reply, as ``sampling`` sees it.
        on_token: see :data:`OnToken`.

    Where rotary frequencies depend on the length of a text, a row is read again when they change ("longrope": once; "dynamic":
    with every token beyond the limit), since keys in a cache keep those they were made with.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: an empty prompt, wrong sizes, states of another length's rotary frequencies, or adapters that PEFT applies
            around the model.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: expected at least one token per prompt, got none or an empty one")
    check_at_least("max_new_tokens", max_new_tokens, 1)
    gk.hf.check_unwrapped(model)
    sampling = sampling if sampling is not None else Sampling()
    device, batch = model.device, len(prompts)
    before = list(states) if states is not None else [None] * batch
    if len(before) != batch:
        raise ValueError(f"states: expected {batch} rows, one per prompt, got {len(before)}")
    read = [0 if part is None else len(part) for part in before]
    change = gk.hf.frequency_change(model)
    if change is not None and _outgrows(change, read, prompts, max_new_tokens):
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
        options |= {"eos_token_ids": eos_token_ids, "sampling": sampling, "generator": generator}
        found: list[list[int]] = []
        for row, (prompt, part) in enumerate(zip(prompts, before, strict=True)):
            told = None if on_token is None else partial(on_token, row)
            if part is None:
                found.append(_in_stretches(model, prompt, change, begun=begun, on_token=told, **options))
                continue
            # what has states has room for its reply, or was refused
            alone = None if told is None else partial(_of_row, told)
            found += decode(model, [prompt], states=[part], begun=begun, on_token=alone, **options)
        return found
    past, longest = max(read), max(map(len, prompts))
    slots = past + longest + max_new_tokens
    # a table of the used slots, right-aligned in both blocks, and each token's position counted over used slots
    used = torch.zeros(batch, slots, dtype=torch.int64)
    ids = torch.zeros(batch, longest, dtype=torch.int64)
    positions = torch.zeros(batch, longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        used[row, past - read[row] : past] = 1
        used[row, past + longest - len(prompt) : past + longest] = 1
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        positions[row, longest - len(prompt) :] = read[row] + torch.arange(len(prompt))
    used[:, past + longest :] = 1
    used, ids, positions = used.to(device), ids.to(device), positions.to(device)
    whole = bool((used == 1).all())
    if not gk.hf.has_recurrent_layers(model):
        cache = gk.hf.StaticCache(model.config.num_hidden_layers, slots)
    elif past:
        raise ValueError(
            f"states: expected none for a {type(model).__name__}, some of whose layers keep no keys and values, got some"
        )
    else:
        cache = gk.hf.new_cache(config=model.config)
    _fill(cache, before, past, device, model.dtype)
    keyword = gk.hf.cache_keyword(model, cache)
    ends = torch.tensor(sorted(eos_token_ids), device=device)
    alive = [True] * batch
    replies: list[list[int]] = [list(prompt[len(prompt) - begun :]) for prompt in prompts]
    # rows with a gap between states and prompt take the general path
    gaps = any(n and len(prompt) < longest for n, prompt in zip(read, prompts, strict=True))
    short_step: Step | None = None
    for step in range(max_new_tokens):
        filled = past + longest + step
        if short_step is not None:
            logits = short_step(ids, positions)
        else:
            logits = model(
                input_ids=ids,
                attention_mask=None if whole else used[:, :filled],
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **keyword,
            ).logits[:, -1]
            if not gaps and supports(model):
                first = torch.tensor([past + longest - len(p) - n for n, p in zip(read, prompts, strict=True)])
                short_step = Step(model, cache, first.to(device=device, dtype=torch.int32))
        if step < min_new_tokens and len(ends):
            logits[:, ends] = float("-inf")
        chosen = sampling.choose(logits, generator, replies)
        for row, token in enumerate(chosen.tolist()):
            if not alive[row]:
                continue
            if token in eos_token_ids:
                alive[row] = False
                continue
            replies[row].append(token)
            if on_token is not None and on_token(row, token):
                alive[row] = False
        if not any(alive):
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
    return [reply[begun:] for reply in replies]
