"""The next-token loss of each token, and its aggregation over tokens and samples.

Source: GRIT, arXiv 2402.09906 equations 1-3 and the loss ablation (appendix).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import grit_kernels as gk
from python_model.model.modeling import GritLM
from python_model.model.prompts import IGNORE_INDEX
from python_model.support.arguments import check_choice

ROWS = 1024
"""Tokens whose logits are in memory at once where the head must be called as a module."""
GENERATIVE_LOSSES = ("mixed", "token", "sample")


def sample_weights(counts: Tensor, *, kind: str = "mixed", group: int = 0) -> Tensor:
    """Expresses each aggregation as one weight per sample: the step's loss is ``sum_b weight[b] * sum of b's token losses``.

    A step may therefore be split into chunks and over ranks in any way without changing its loss.

    Args:
        counts: int64 (samples), labelled tokens of every sample of the step, on all ranks.
        kind: ``"token"``: sum of the token losses divided by the number of samples. ``"sample"``: mean over the samples
            of each sample's token mean, which is 0 for a sample without labelled tokens. ``"mixed"``: mean over all tokens.
        group: with ``"mixed"``, samples per token mean, and the loss is the mean of these means (the paper's
            "mix (group -> samples / group)"); 0: one mean over everything.

    Returns:
        float64 (samples); the weight of a sample without labelled tokens has no effect.
    """
    check_choice("kind", kind, GENERATIVE_LOSSES)
    samples = counts.shape[0]
    counts = counts.double()
    if kind == "token":
        return torch.full_like(counts, 1 / samples)
    if kind == "sample":
        return 1 / (samples * counts.clamp(min=1))
    size = group or samples
    if samples % size:
        raise ValueError(f"group: expected a divisor of the number of samples ({samples}), got {group}")
    means = counts.view(-1, size).sum(dim=1).clamp(min=1)
    return (size / (samples * means)).repeat_interleave(size)


def group_scores(vectors: Tensor, queries: int) -> Tensor:
    """float32 (queries, group): the dot product of each query with its own passages; ``vectors`` (queries + passages, size), the
    passages of a query one after another."""
    own = vectors[queries:].unflatten(0, (queries, -1))
    return torch.einsum("qd,qgd->qg", vectors[:queries].float(), own.float())


def distillation_losses(student: Tensor, teacher: Tensor) -> Tensor:
    """float32 (queries): KL(softmax(teacher row) || softmax(student row)), 0 where a row of the teacher is NaN.

    Both (queries, group), scores over their temperatures.

    Source: FlagEmbedding's knowledge distillation over a query's own passages (kd_loss_type kl_div), which leaves out the
    teacher's entropy, a constant.
    """
    known = teacher.isfinite().all(dim=1)
    wanted = torch.where(known[:, None], teacher, 0.0).log_softmax(dim=1)
    got = student.float().log_softmax(dim=1)
    losses = nn.functional.kl_div(got, wanted, reduction="none", log_target=True).sum(dim=1)
    return torch.where(known, losses, 0.0)


def next_token_losses(model: GritLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """float32 (tokens): the loss of each labelled token; the language-model head is applied only to those rows."""
    used = (labels != IGNORE_INDEX).nonzero()[:, 0]
    gk.hf.check_plain_head(model.model)
    head: Any = model.model.get_output_embeddings()
    softcap = getattr(model.model.config, "final_logit_softcapping", None)
    if not _is_plain(head):
        losses = _losses_of_module(head, hidden[used], labels[used], softcap)
        return losses.new_zeros(labels.shape[0]).index_copy(0, used, losses)
    weight, rows = head.weight, hidden[used]
    if getattr(head, "bias", None) is not None:
        # GPT-J's head has a bias: one more column, multiplied by a constant 1
        weight = torch.cat([weight, head.bias[:, None].to(weight.dtype)], dim=1)
        rows = nn.functional.pad(rows, (0, 1), value=1.0)
    losses = gk.linear_cross_entropy(rows, weight, labels[used], softcap=softcap)
    return losses.new_zeros(labels.shape[0]).index_copy(0, used, losses)


def _is_plain(head: nn.Module) -> bool:
    """Whether the head is nothing but its weight and bias: no adapter, quantisation, parametrisation, hook or own forward."""
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not gk.hf.is_watched(head)


def _losses_of_module(head: nn.Module, rows: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """The losses by calling the module itself: logits of ROWS tokens at a time, recomputed in the backward pass."""

    def losses(part: Tensor, wanted: Tensor) -> Tensor:
        logits = head(part).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return nn.functional.cross_entropy(logits, wanted, reduction="none")

    parts = [
        cast(Tensor, checkpoint(losses, part, wanted, use_reentrant=False))
        for part, wanted in zip(rows.split(ROWS), labels.split(ROWS), strict=True)
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float32)


def sums_per_sample(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(samples): the sum of each sample's (tokens) values."""
    samples = cu_seqlens.shape[0] - 1
    sample = torch.repeat_interleave(
        torch.arange(samples, device=values.device), cu_seqlens.diff(), output_size=values.shape[0]
    )
    return values.new_zeros(samples).index_add(0, sample, values)
