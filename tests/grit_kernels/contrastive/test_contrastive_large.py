"""Sizes at which memory matters, and four processes: takes minutes, so not among the fast tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from grit_kernels.contrastive import chunked
from tests.ranks import process_group

pytestmark = pytest.mark.slow


def oracle_losses(q: Tensor, p: Tensor, temperature: float, targets: Tensor) -> Tensor:
    """Per-query losses in float64, a few queries at a time."""
    wide, losses = p.double(), []
    for rows, wanted in zip(q.split(256), targets.split(256), strict=True):
        losses.append(F.cross_entropy(rows.double() @ wide.T / temperature, wanted, reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4096_queries_of_width_1024_equal_a_chunked_float64_oracle(dtype: torch.dtype) -> None:
    q, p = (F.normalize(torch.randn(4096, 1024), dim=-1).to(dtype) for _ in range(2))
    truth = oracle_losses(q, p, 0.02, torch.arange(4096))
    found = gk.contrastive_loss(q, p, reduction="none")
    assert (found - truth).abs().max() < 16 * torch.finfo(torch.float32).eps / 0.02


LARGE = """
import resource, torch, torch.nn.functional as F, grit_kernels as gk
torch.manual_seed(0)
q, p = (F.normalize(torch.randn(n, 64), dim=-1).bfloat16().requires_grad_() for n in (65536, 131072))
torch.autograd.grad(gk.contrastive_loss(q[:64], p[:128]), (q, p))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
losses = gk.contrastive_loss(q, p, reduction="none")
grads = torch.autograd.grad(losses.mean(), (q, p))
print("peak grew by", peak() - before, "MB", flush=True)
torch.save([q.detach(), p.detach(), losses.detach(), *grads], PATH)
"""


def test_65536_by_131072_needs_flat_memory_and_equals_a_float64_oracle(tmp_path: Path) -> None:
    file = tmp_path / "result.pt"
    run = subprocess.run([sys.executable, "-c", LARGE.replace("PATH", repr(str(file)))], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    # the scores alone would take 34 GB
    assert float(run.stdout.split()[3]) < 1024
    q, p, losses, grad_q, grad_p = torch.load(file)
    rows = torch.arange(0, 65536, 997)
    wide = p.double()
    scores = q[rows].double() @ wide.T / 0.02
    truth = F.cross_entropy(scores, rows * 2, reduction="none")
    assert (losses[rows] - truth).abs().max() < 16 * torch.finfo(torch.float32).eps / 0.02
    weights = scores.softmax(dim=1)
    weights[torch.arange(len(rows)), rows * 2] -= 1
    expected_q = weights @ wide / 0.02 / 65536
    # a passage's gradient needs the log-sum-exp of every query, which the losses hold
    columns = torch.tensor([0, 1, 2, 77_776, 131_071])
    scores = q.double() @ wide[columns].T / 0.02
    lse = losses.double() + (q.double() * wide[::2]).sum(1) / 0.02
    weights = (scores - lse[:, None]).exp()
    weights -= (columns[None, :] == 2 * torch.arange(65536)[:, None]).double()
    expected_p = weights.T @ q.double() / 0.02 / 65536
    for found, expected in ((grad_q[rows], expected_q), (grad_p[columns], expected_p)):
        assert (found - expected).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_memory_of_the_plain_torch_implementation_is_flat_too() -> None:
    q, p = (torch.randn(n, 8) for n in (3000, 6000))
    blocks = list(chunked.chunks(3000, 6000, True, 1 << 20, 4))
    assert max((b - a) * (d - c) * 4 for a, b, c, d in blocks) <= 1 << 20
    assert [b[:2] for b in blocks][0] == (0, 43) and blocks[-1][1] == 3000
    blocks = list(chunked.chunks(q.shape[0], p.shape[0], False, 1 << 20, 4))
    assert max((b - a) * (d - c) * 4 for a, b, c, d in blocks) <= 1 << 20


# ---- four processes

COUNTS = (3, 1, 4, 2)  # queries of each rank, two passages each


def _rank(rank: int, file: str, q: Tensor, p: Tensor, results: Any) -> None:
    with process_group(rank, len(COUNTS), file) as group:
        first = sum(COUNTS[:rank])
        own = [q[first : first + COUNTS[rank]].clone(), p[2 * first : 2 * (first + COUNTS[rank])].clone()]
        leaves = [x.requires_grad_() for x in own]
        loss = gk.contrastive_loss(*leaves, temperature=0.1, symmetric=True, normalize=True, process_group=group)
        results[rank] = (loss.item(), *(g.tolist() for g in torch.autograd.grad(loss, leaves)))


def test_four_processes_with_uneven_batches_equal_one_process(tmp_path: Path) -> None:
    q, p = (torch.randn(n * sum(COUNTS), 16).requires_grad_() for n in (1, 2))
    loss = gk.contrastive_loss(q, p, temperature=0.1, symmetric=True, normalize=True)
    expected = torch.autograd.grad(loss, (q, p))
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (str(tmp_path / "store"), q.detach(), p.detach(), results), nprocs=len(COUNTS))
        by_rank = [results[rank] for rank in range(len(COUNTS))]
    for value, *_ in by_rank:
        assert value == pytest.approx(loss.item(), rel=1e-5)
    for index, grad in enumerate(expected):
        found = torch.cat([torch.tensor(rank[1 + index]) for rank in by_rank])
        torch.testing.assert_close(found, grad * len(COUNTS), rtol=1e-4, atol=1e-6)
