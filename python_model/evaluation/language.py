"""Next-token loss on held-out conversations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from python_model.data.jsonl import GenerativeRow
from python_model.modeling import GritLM
from python_model.prompts import IGNORE_INDEX, encode_conversation
from python_model.train.chunks import build_chunk
from python_model.train.model import next_token_losses


@torch.no_grad()
def next_token_loss(
    model: GritLM, rows: Sequence[GenerativeRow], *, max_length: int = 2048, rows_per_pack: int = 16
) -> float:
    """Mean loss (nats) over all reply tokens of the conversations, each token counted once."""
    total, count = 0.0, 0
    for start in range(0, len(rows), rows_per_pack):
        samples = [
            encode_conversation(model.tokenizer, row.turns, max_length) for row in rows[start : start + rows_per_pack]
        ]
        chunk = build_chunk([], samples, attn=model.attn).to(model.device)
        hidden = model.hidden_states(chunk.input_ids, chunk.pack)
        total += float(next_token_losses(model, hidden, chunk.labels).double().sum())
        count += int((chunk.labels != IGNORE_INDEX).sum())
    return total / count
