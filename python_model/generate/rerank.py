"""Reranking with the generative side of the model: by generating a permutation, by asking about each passage, or by how likely
each passage makes the query.

Listwise: the model is shown numbered passages and writes ``[2] > [0] > [1]`` (Sun et al., arXiv 2304.09542, as in the GRIT paper
for its top 10). Longer lists are sorted by a window that slides from the end of the list to the front. Pointwise: the score of a
passage is the log-odds of "yes" over "no" as the first token of the answer. Likelihood: the score is the mean log-probability of
the query's tokens as the reply to a request for a question about the passage (Sachan et al., arXiv 2204.07496).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

import grit_kernels as gk
from python_model.generate.text import complete, prompt_ids
from python_model.model.chunks import build_chunk
from python_model.model.limits import check_prompts, max_positions
from python_model.model.losses import next_token_losses
from python_model.model.modeling import GritLM, token_batches
from python_model.model.prompts import IGNORE_INDEX, TooLong
from python_model.support.arguments import check_at_least, check_choice

Method = Literal["likelihood", "listwise", "pointwise"]
METHODS: tuple[str, ...] = get_args(Method)
PASSAGE_TOKENS = 160
ANSWER = "Answer:"
"""Begins the reply to :func:`pointwise_turn`."""
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Ranked:
    """A passage's index in the given list, and its score (higher is better). Listwise scores only express the order."""

    index: int
    score: float


def rerank(
    model: GritLM,
    query: str,
    passages: Sequence[str],
    *,
    method: Method = "likelihood",
    window: int = 10,
    step: int = 5,
    passage_tokens: int = PASSAGE_TOKENS,
    batch_size: int = 256,
) -> list[Ranked]:
    """Rank ``passages``: each appears exactly once, best first.

    Args:
        passages: in retrieval order, best first; passages that the model does not rank keep that order.
        window, step: listwise only: how many passages are shown at once, and by how many the window moves.
        passage_tokens: passages are truncated to this many tokens, and counted in ``model.texts_cut``.
        batch_size: unless listwise, most passages scored in one packed pass (a pass also ends at 16384 tokens).

    Raises:
        ValueError: an unknown method, an empty query, a window that cannot sort, a size below 1, or (likelihood only) a query and
            a passage that together exceed the model's positions.
    """
    check_choice("method", method, METHODS)
    if not query.strip():
        raise ValueError(f"query: expected a non-empty text, got {query!r}")
    check_at_least("passage_tokens", passage_tokens, 1)
    check_at_least("batch_size", batch_size, 1)
    model.check_head("rerank")
    shown = [shorten(model, passage, passage_tokens) for passage in passages]
    model.texts_cut += sum(short != on_one_line(passage) for short, passage in zip(shown, passages, strict=True))
    if method != "listwise":
        score = yes_scores if method == "pointwise" else query_likelihoods
        scores = score(model, query, shown, batch_size=batch_size)
        order = sorted(range(len(passages)), key=lambda i: -scores[i])
        return [Ranked(i, scores[i]) for i in order]

    def permute(part: list[int]) -> list[int]:
        prompt = prompt_ids(model, model.formatter.chat_prompt([listwise_turn(query, [shown[i] for i in part])]))
        # "[12] > " takes about five tokens
        (text,) = complete(model, [prompt], max_new_tokens=8 * len(part))
        return parse_permutation(text, len(part))

    order = sliding_order(len(passages), permute, window, step)
    return [Ranked(index, float(len(order) - place)) for place, index in enumerate(order)]


def sliding_order(count: int, permute: Callable[[list[int]], list[int]], window: int, step: int) -> list[int]:
    """The order of ``count`` items after ``permute`` has sorted each window, from the last to the first.

    ``permute`` receives the items of a window and returns their new order. One sweep carries the best ``window - step`` items of
    each window into the next, so these end up first wherever they started.
    """
    if window < 2 or not 1 <= step < window:
        raise ValueError(f"window, step: expected window >= 2 and 1 <= step < window, got {window}, {step}")
    order = list(range(count))
    end = count
    while end > 1:
        start = max(end - window, 0)
        part = order[start:end]
        order[start:end] = [part[place] for place in permute(part)]
        if start == 0:
            break
        end = end - step
    return order


def parse_permutation(text: str, count: int) -> list[int]:
    """The indices 0 .. count - 1 in the order ``text`` names them; those it omits follow in their old order.

    Numbers are recognised whatever separates them; repeated and unknown ones are ignored.
    """
    named = [int(number) for number in _NUMBER.findall(text) if len(number) < 10]
    found = list(dict.fromkeys(place for place in named if place < count))
    return found + [place for place in range(count) if place not in found]


def listwise_turn(query: str, passages: Sequence[str]) -> str:
    """The user turn whose reply is a permutation; passages are numbered from 0."""
    count = len(passages)
    listed = "\n\n".join(f"[{i}] {passage}" for i, passage in enumerate(passages))
    return (
        f"I will provide you with {count} passages, each indicated by a number identifier []. "
        f"Rank the passages by their relevance to the query: {query}\n\n{listed}\n\n"
        f"Search query: {query}\n\nRank the {count} passages above by their relevance to the search query, the most "
        "relevant first. Answer with the identifiers only, in the format [] > [] > []."
    )


def pointwise_turn(query: str, passage: str) -> str:
    """The user turn whose reply, after :data:`ANSWER`, is yes or no."""
    return f"Passage: {passage}\n\nQuery: {query}\n\nDoes the passage answer the query? Answer yes or no."


def likelihood_turn(passage: str) -> str:
    """The user turn whose reply is a question about the passage."""
    return f"Passage: {passage}\n\nWrite a question that this passage answers."


@torch.no_grad()
def yes_scores(model: GritLM, query: str, passages: Sequence[str], *, batch_size: int = 256) -> list[float]:
    """Log-odds of the answer "yes" over "no" for each passage, from one packed forward pass per batch; prompts are read
    as by :func:`python_model.generate.complete`."""
    shared, yes, no = answer_tokens(model)
    gk.hf.check_plain_head(model.model)
    cap = getattr(model.model.config, "final_logit_softcapping", None)
    turns = [model.formatter.chat_prompt([pointwise_turn(query, passage)]) for passage in passages]
    prompts = [[*prompt_ids(model, turn + ANSWER), *shared] for turn in turns]
    check_prompts(model.model.config, [len(prompt) for prompt in prompts], 1)
    scores = [0.0] * len(passages)
    for batch in token_batches([len(prompt) for prompt in prompts], batch_size):
        lengths = [len(prompts[index]) for index in batch]
        pack = gk.SamplePack.from_lengths(lengths, model.attention.generates_causally).to(model.device)
        ids = torch.tensor([token for index in batch for token in prompts[index]], device=model.device)
        last = model.hidden_states(ids, pack)[pack.cu_seqlens[1:].long() - 1]
        logits = model.model.get_output_embeddings()(last).float()[:, [yes, no]]
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        for index, score in zip(batch, (logits[:, 0] - logits[:, 1]).tolist(), strict=True):
            scores[index] = score
    return scores


@torch.no_grad()
def query_likelihoods(model: GritLM, query: str, passages: Sequence[str], *, batch_size: int = 256) -> list[float]:
    """The mean log-probability of the query (and its end) as the reply to :func:`likelihood_turn`, for each passage, from one
    packed forward pass per batch; conversations are read as in training."""
    longest = max_positions(model.model.config)
    try:
        samples = [model.formatter.conversation([likelihood_turn(passage), query], longest) for passage in passages]
        fit = not any(sample.truncated for sample in samples)
    except TooLong:
        fit = False
    if not fit:
        raise ValueError(f"passages: expected the query and each passage within the model's {longest} tokens, got more")
    scores = [0.0] * len(passages)
    for batch in token_batches([len(sample) for sample in samples], batch_size):
        chosen = [samples[index] for index in batch]
        chunk = build_chunk([], chosen, attention=model.attention).to(model.device)
        losses = next_token_losses(model, model.hidden_states(chunk.input_ids, chunk.pack), chunk.labels)
        lengths = [len(sample) for sample in chosen]
        for index, part, labels in zip(batch, losses.split(lengths), chunk.labels.split(lengths), strict=True):
            scores[index] = -float(part[labels != IGNORE_INDEX].mean())
    return scores


def answer_tokens(model: GritLM) -> tuple[list[int], int, int]:
    """The tokens with which "yes" and "no" after "Answer:" begin alike (a separate space token), and those where they differ."""
    before, yes, no = (
        list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (ANSWER, f"{ANSWER} yes", f"{ANSWER} no")
    )
    place = next(i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b)
    return yes[len(before) : place], yes[place], no[place]


def on_one_line(passage: str) -> str:
    """``passage`` with one space for every run of white space, as it is shown to the model."""
    return " ".join(passage.split())


def shorten(model: GritLM, passage: str, tokens: int) -> str:
    """``passage`` truncated to at most ``tokens`` tokens, on one line."""
    text = on_one_line(passage)
    encoded = model.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    ends = [end for _, end in encoded["offset_mapping"]]
    return text if len(ends) <= tokens else text[: ends[tokens - 1]]
