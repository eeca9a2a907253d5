"""Next-token loss on held-out conversations."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from python_model.data.rows import GenerativeRow
from python_model.model.chunks import build_chunk
from python_model.model.limits import warn_beyond_positions
from python_model.model.losses import next_token_losses, sums_per_sample
from python_model.model.modeling import GritLM
from python_model.model.prompts import IGNORE_INDEX, TooLong

log = logging.getLogger(__name__)


def next_token_loss(
    model: GritLM, rows: Sequence[GenerativeRow], *, max_length: int = 2048, rows_per_pack: int = 16
) -> float:
    """Mean loss (nats) over all reply tokens of the conversations, each token counted once; of a text without roles all count.

    The model reads them in the format and with the attention of its training; a prefix-LM (``bc``) is evaluated only on each last
    reply, since what precedes it is bidirectional.

    A conversation whose documents and first user turn fill ``max_length`` has no reply tokens: it is skipped, with a warning.

    Raises:
        TooLong: no conversation has any.
    """
    total, count, left_out = token_loss_sums(model, rows, max_length=max_length, rows_per_pack=rows_per_pack)
    return mean_token_loss(total, count, left_out, len(rows), max_length)


@torch.no_grad()
def conversation_losses(
    model: GritLM, rows: Sequence[GenerativeRow], *, max_length: int, rows_per_pack: int = 16
) -> list[tuple[float, int]]:
    """The sum of each conversation's reply tokens' losses, and their number; those without a reply within ``max_length`` are
    left out."""
    formatter = model.formatter
    samples = []
    for row in rows:
        try:
            samples.append(formatter.conversation(row.turns, max_length, documents=row.documents))
        except TooLong:
            continue
    model.texts_cut += sum(sample.truncated for sample in samples)
    warn_beyond_positions(model, map(len, samples))
    found: list[tuple[float, int]] = []
    for start in range(0, len(samples), rows_per_pack):
        part = samples[start : start + rows_per_pack]
        chunk = build_chunk([], part, attention=model.attention).to(model.device)
        hidden = model.hidden_states(chunk.input_ids, chunk.pack)
        losses = next_token_losses(model, hidden, chunk.labels).double()
        counted = (chunk.labels != IGNORE_INDEX).long()
        starts = chunk.generative_cu_seqlens
        sums, counts = sums_per_sample(losses, starts).tolist(), sums_per_sample(counted, starts).tolist()
        found.extend(zip(sums, counts, strict=True))
    return found


def token_loss_sums(
    model: GritLM, rows: Sequence[GenerativeRow], *, max_length: int, rows_per_pack: int = 16
) -> tuple[float, int, int]:
    """The sum of the reply tokens' losses, their number, and how many conversations have no reply within ``max_length``."""
    found = conversation_losses(model, rows, max_length=max_length, rows_per_pack=rows_per_pack)
    return sum(total for total, _ in found), sum(count for _, count in found), len(rows) - len(found)


def mean_token_loss(total: float, count: int, left_out: int, conversations: int, max_length: int) -> float:
    """The mean of :func:`token_loss_sums`; warns about conversations that were left out, and raises TooLong if all were."""
    if left_out == conversations:
        raise TooLong(
            f"max_length: expected room for a reply, got {max_length}, which every first turn fills ({conversations} rows)"
        )
    if left_out:
        log.warning(
            "skipping %d of %d conversations, which have no reply within %d tokens", left_out, conversations, max_length
        )
    return total / count
