"""The contrastive ops in plain torch with bounded memory: only the scores of one chunk of queries exist at a time.

Serves devices without a compiled kernel.

    score_ij = q_i . p_j / temperature, with ``normalize``: q_i . p_j / (|q_i| |p_j| temperature)
    positive_i = score_{i, target_i}          top_i = max_{j in C_i} score_ij
    log_total_i = ln sum_{j in C_i} exp(score_ij - top_i)
    loss_i = (top_i - positive_i) + log_total_i
    excess_i = sum_j softmax_ij (score_ij - positive_i),  so d loss_i / d temperature = -excess_i / temperature

The backward's softmax_ij = exp((score_ij - top_i) - log_total_i) takes two numbers: scores may be around 1 / temperature and
losses around 0, or some scores far larger than others, and their sum in one number would lose the digits that matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from grit_kernels.contrastive.problem import ContrastiveProblem
from grit_kernels.precision import without_autocast

CHUNK_BYTES = 64 << 20
"""Upper bound of the FP32 scores held at once (a row of scores is always held)."""

NORM_EPS = 1e-12


def row_scales(problem: ContrastiveProblem) -> tuple[Tensor, Tensor | None]:
    """float32 (Q) and (P) or None, such that score_ij = query_scale_i * passage_scale_j * q_i . p_j."""
    queries, passages = problem.queries, problem.passages
    scale = problem.temperature.reshape(1).float().reciprocal()
    if not problem.normalize:
        return scale.expand(queries.shape[0]).contiguous(), None
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).clamp(min=NORM_EPS) for x in (queries, passages)]
    return scale / norms[0], norms[1].reciprocal()


def unscaled_gradients(grad_q: Tensor, grad_p: Tensor, problem: ContrastiveProblem) -> tuple[Tensor, Tensor]:
    """FP32 gradients of scaled queries and passages -> their gradients, in their dtype."""
    pairs = ((grad_q, problem.queries), (grad_p, problem.passages))
    grad_queries, grad_passages = (_unscaled_gradient(grad, rows, problem.normalize) for grad, rows in pairs)
    return grad_queries, grad_passages


def _unscaled_gradient(grad: Tensor, rows: Tensor, normalize: bool) -> Tensor:
    """FP32 gradient of scaled rows -> gradient of ``rows`` in their dtype: with normalize, less its part along the row."""
    if normalize:
        x = rows.float()
        square = x.square().sum(dim=1, keepdim=True)
        # rows shorter than eps are divided by the constant eps, whose gradient has no such part
        along = torch.where(square > NORM_EPS**2, (x * grad).sum(dim=1, keepdim=True) / square, 0.0)
        grad = grad - along * x
    return grad.to(rows.dtype)


def chunks(
    queries: int, passages: int, in_batch_negatives: bool, chunk_bytes: int, item: int
) -> Iterator[tuple[int, ...]]:
    """(first query, last query, first passage, last passage) of blocks of scores that cover all candidates."""
    group = passages // queries
    rows = max(1, chunk_bytes // (item * passages))
    if not in_batch_negatives:  # r queries see r * group passages
        rows = max(1, int((chunk_bytes / (item * max(1, group))) ** 0.5))
    for first in range(0, queries, rows):
        last = min(first + rows, queries)
        yield (first, last, 0, passages) if in_batch_negatives else (first, last, first * group, last * group)


def _scores(
    chunk: tuple[int, ...],
    q: Tensor,
    p: Tensor,
    query_scale: Tensor,
    passage_scale: Tensor | None,
    problem: ContrastiveProblem,
) -> tuple[Tensor, Tensor]:
    """Scores of a chunk, -inf where the passage is not a candidate, and the targets' columns within it; q and p are float32."""
    first, last, begin, end = chunk
    group, query_ids, passage_ids = problem.group, problem.query_ids, problem.passage_ids
    scores = (q[first:last] @ p[begin:end].T).mul_(query_scale[first:last, None])
    if passage_scale is not None:
        scores.mul_(passage_scale[None, begin:end])
    target = problem.targets[first:last] - begin
    column = torch.arange(end - begin, device=q.device)
    if group:
        row = torch.arange(last - first, device=q.device)
        scores.masked_fill_(column[None, :] // group != row[:, None], float("-inf"))
    if query_ids is not None and passage_ids is not None:
        same = query_ids[first:last, None] == passage_ids[None, begin:end]
        scores.masked_fill_(same & (column[None, :] != target[:, None]), float("-inf"))
    return scores, target


@without_autocast
def contrastive_forward(
    problem: ContrastiveProblem,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """losses, top, log_total, excess, all float32 (Q), and best, int64 (Q): the first candidate of the highest score."""
    scales = row_scales(problem)
    q, p = problem.queries.float(), problem.passages.float()
    losses, tops, log_totals, excess = (torch.empty(q.shape[0], dtype=torch.float32, device=q.device) for _ in range(4))
    best = torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
    for chunk in chunks(*problem.counts, problem.in_batch_negatives, CHUNK_BYTES, 4):
        scores, target = _scores(chunk, q, p, *scales, problem)
        rows = slice(*chunk[:2])
        positive = scores.gather(1, target[:, None])[:, 0]
        top, index = scores.max(dim=1)
        best[rows] = index + chunk[2]
        weights = scores.sub(top[:, None]).exp_()
        total = weights.sum(dim=1)
        tops[rows], log_totals[rows] = top, total.log()
        above = top - positive
        losses[rows] = above + log_totals[rows]
        below = scores.sub_(top[:, None]).masked_fill_(weights == 0, 0.0)
        excess[rows] = above + weights.mul_(below).sum(dim=1) / total
    return losses, tops, log_totals, excess, best


@without_autocast
def contrastive_backward(
    grad_losses: Tensor, top: Tensor, log_total: Tensor, problem: ContrastiveProblem
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and passages: d score_ij = grad_losses_i (softmax_ij - [j = target_i])."""
    query_scale, passage_scale = row_scales(problem)
    q, p = problem.queries.float(), problem.passages.float()
    grad_q, grad_p = torch.empty_like(q), torch.zeros_like(p)
    for chunk in chunks(*problem.counts, problem.in_batch_negatives, CHUNK_BYTES, 4):
        scores, target = _scores(chunk, q, p, query_scale, passage_scale, problem)
        rows, columns = slice(*chunk[:2]), slice(*chunk[2:])
        grad = scores.sub_(top[rows, None]).sub_(log_total[rows, None]).exp_()
        grad.scatter_add_(1, target[:, None], torch.full_like(target, -1, dtype=grad.dtype)[:, None])
        grad.mul_((grad_losses * query_scale)[rows, None])
        if passage_scale is not None:
            grad.mul_(passage_scale[None, columns])
        grad_q[rows] = grad @ p[columns]
        grad_p[columns] += grad.T @ q[rows]
    return unscaled_gradients(grad_q, grad_p, problem)


def contrastive_step(
    coefficients: Tensor, problem: ContrastiveProblem
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss = sum_i coefficients_i loss_i, ``best``, and the loss's gradients, all float32: queries, passages, temperature.

    The gradients of a sum with known coefficients need the scores only once: three matrix products instead of four.
    """
    losses, top, log_total, excess, best = contrastive_forward(problem)
    precise = replace(problem, queries=problem.queries.float(), passages=problem.passages.float())
    grads = contrastive_backward(coefficients, top, log_total, precise)
    loss = (coefficients * losses).sum()
    grad_temperature = -(coefficients * excess).sum() / problem.temperature.reshape(())
    return loss, best, *grads, grad_temperature.float()


def contrastive_scale(
    grad_loss: Tensor,
    queries: Tensor,
    passages: Tensor,
    grad_queries: Tensor,
    grad_passages: Tensor,
    grad_temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`contrastive_step` times ``grad_loss``, those of queries and passages in their dtype."""
    return (
        (grad_queries * grad_loss).to(queries.dtype),
        (grad_passages * grad_loss).to(passages.dtype),
        grad_temperature * grad_loss,
    )
