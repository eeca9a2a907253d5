"""Next-token loss on held-out conversations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import grit_kernels as gk
from python_model.data.jsonl import GenerativeRow
from python_model.modeling import GritLM
from python_model.prompts import IGNORE_INDEX, encode_conversation
from python_model.train.batch import pack_samples


@torch.no_grad()
def next_token_loss(
    model: GritLM, rows: Sequence[GenerativeRow], *, max_length: int = 2048, rows_per_pack: int = 16
) -> float:
    """Mean loss (nats) over all reply tokens of the conversations, each token counted once."""
    total, count = 0.0, 0
    weight = model.model.get_output_embeddings().weight
    for start in range(0, len(rows), rows_per_pack):
        samples = [
            encode_conversation(model.tokenizer, row.turns, max_length) for row in rows[start : start + rows_per_pack]
        ]
        batch = pack_samples([], [], samples).to(model.device)
        hidden = model.hidden_states(batch.input_ids, batch.pack)
        used = (batch.labels != IGNORE_INDEX).nonzero()[:, 0]
        losses = gk.linear_cross_entropy(hidden[used], weight, batch.labels[used])
        total += float(losses.double().sum())
        count += used.shape[0]
    return total / count
