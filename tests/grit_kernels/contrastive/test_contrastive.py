"""gk.contrastive_loss against torch's cross entropy in float64, and across processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import grit_kernels as gk
from tests.conftest import assert_within_rule
from tests.ranks import process_group


def unit(rows: int, dim: int = 16) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=-1)


def plain(q: Tensor, p: Tensor, temperature: float, targets: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Per-query losses by torch's own cross entropy."""
    return F.cross_entropy(q.to(dtype) @ p.to(dtype).T / temperature, targets, reduction="none")


@settings(max_examples=25)
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([0.02, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 999),
)
def test_default_targets_equal_cross_entropy_over_all_passages(
    count: int, group: int, temperature: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    q, p = unit(count).to(dtype), unit(count * group).to(dtype)
    targets = torch.arange(count) * group
    truth = plain(q, p, temperature, targets)
    found = gk.contrastive_loss(q, p, temperature=temperature, reduction="none")
    assert found.dtype == torch.float32
    # a product of unit vectors has an FP32 rounding error of order eps / temperature in the scores
    eager = plain(q, p, temperature, targets, dtype).float()
    error, allowed = (x.double().sub(truth).abs().max().item() for x in (found, eager))
    assert error <= 2 * allowed + 8 * torch.finfo(torch.float32).eps / temperature
    mean = gk.contrastive_loss(q, p, temperature=temperature)
    torch.testing.assert_close(mean, found.mean())
    torch.testing.assert_close(gk.contrastive_loss(q, p, temperature=temperature, reduction="sum"), found.sum())


@pytest.mark.parametrize("backend_name", ["reference", None])
def test_queries_may_outnumber_the_passages_that_their_targets_name(backend_name: str | None) -> None:
    q, p, targets = unit(5), unit(2), torch.tensor([0, 1, 1, 0, 1])
    with gk.backend("reference") if backend_name else torch.enable_grad():
        found = gk.contrastive_loss(q, p, targets=targets, reduction="none")
    torch.testing.assert_close(found, plain(q, p, 0.02, targets).float(), rtol=1e-4, atol=1e-4)


def test_gradients_equal_cross_entropy_including_a_learnable_temperature() -> None:
    q, p = unit(5).requires_grad_(), unit(10).requires_grad_()
    temperature = torch.tensor(0.1, requires_grad=True)
    targets = torch.tensor([1, 0, 9, 4, 4])
    found = torch.autograd.grad(
        gk.contrastive_loss(q, p, temperature=temperature, targets=targets), (q, p, temperature)
    )
    leaves = [x.detach().double().requires_grad_() for x in (q, p, temperature)]
    loss = F.cross_entropy(leaves[0] @ leaves[1].T / leaves[2], targets)
    for a, b in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_float64_passes_gradcheck_with_every_option() -> None:
    q, p = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 6))
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    ids = (torch.tensor([1, 2, 1]), torch.tensor([1, 9, 2, 9, 1, 9]))
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    for options in ({}, {"symmetric": True, "mask_ids": ids}, {"in_batch_negatives": False}, {"weights": weights}):
        assert torch.autograd.gradcheck(
            lambda a, b, t, o=options: gk.contrastive_loss(a, b, temperature=t, **o), (q, p, temperature)
        )


def test_without_in_batch_negatives_each_query_sees_its_own_group_only() -> None:
    q, p = unit(3), unit(12)
    targets = torch.tensor([0, 6, 11])
    found = gk.contrastive_loss(q, p, targets=targets, in_batch_negatives=False, reduction="none")
    expected = [plain(q[i : i + 1], p[4 * i : 4 * i + 4], 0.02, targets[i : i + 1] - 4 * i)[0] for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-4, atol=1e-4)


def test_a_passage_with_the_querys_id_is_no_negative_of_it() -> None:
    q, p = unit(3), unit(6)
    query_ids, passage_ids = torch.tensor([7, 8, 7]), torch.tensor([7, 0, 8, 1, 7, 7])
    found = gk.contrastive_loss(q, p, mask_ids=(query_ids, passage_ids), reduction="none")
    for i in range(3):
        keep = [j for j in range(6) if passage_ids[j] != query_ids[i] or j == 2 * i]
        expected = plain(q[i : i + 1], p[keep], 0.02, torch.tensor([keep.index(2 * i)]))
        torch.testing.assert_close(found[i : i + 1], expected.float(), rtol=1e-4, atol=1e-4)


def test_symmetric_adds_the_reverse_direction_of_positives_and_halves() -> None:
    q, p = unit(4), unit(8)
    targets = torch.arange(4) * 2
    expected = (plain(q, p, 0.02, targets) + plain(p[targets], q, 0.02, torch.arange(4))) / 2
    found = gk.contrastive_loss(q, p, symmetric=True, reduction="none")
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    # two queries with one id: neither is a negative of the other's passage, in both directions
    same = gk.contrastive_loss(q, p, symmetric=True, reduction="none", mask_ids=(torch.zeros(4), torch.zeros(8)))
    torch.testing.assert_close(same, torch.zeros(4), rtol=0, atol=1e-5)


def test_weights_scale_losses_and_the_mean_divides_by_their_sum() -> None:
    q, p, weights = unit(4), unit(4), torch.tensor([0.0, 1.0, 2.0, 0.5])
    each = gk.contrastive_loss(q, p, reduction="none")
    torch.testing.assert_close(gk.contrastive_loss(q, p, weights=weights), (each * weights).sum() / weights.sum())
    torch.testing.assert_close(gk.contrastive_loss(q, p, weights=weights, reduction="none"), each * weights)


def test_the_gradient_of_a_weight_is_its_querys_loss() -> None:
    q, p, weights = unit(4).requires_grad_(), unit(8), torch.rand(4).requires_grad_()
    loss = gk.contrastive_loss(q, p, temperature=0.1, weights=weights, reduction="sum")
    (found,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(found, gk.contrastive_loss(q.detach(), p, temperature=0.1, reduction="none"))


def test_normalize_equals_normalising_first_and_accuracy_counts_hits() -> None:
    q = torch.eye(4, 16) * 5
    p = torch.eye(4, 16)[[0, 1, 3, 2]] * 2
    loss, accuracy = gk.contrastive_loss(q, p, normalize=True, return_accuracy=True)
    torch.testing.assert_close(loss, gk.contrastive_loss(F.normalize(q), F.normalize(p)))
    assert accuracy == 0.5


def test_large_logits_do_not_overflow() -> None:
    q = torch.randn(4, 16, dtype=torch.float16) * 30
    assert bool(gk.contrastive_loss(q, q, temperature=0.001).isfinite())


def test_autocast_does_not_lower_the_precision_of_similarities() -> None:
    q, p = unit(6), unit(6)
    expected = gk.contrastive_loss(q, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gk.contrastive_loss(q, p), expected)


def test_bf16_keeps_the_accuracy_rule() -> None:
    q, p = unit(32, 64).bfloat16(), unit(64, 64).bfloat16()
    targets = torch.arange(32) * 2
    found = gk.contrastive_loss(q, p, temperature=0.02, reduction="none")
    truth = plain(q, p, 0.02, targets)
    assert_within_rule(found, truth, plain(q, p, 0.02, targets, torch.bfloat16))


# ---- across processes

UNEVEN = (3, 2)  # queries of each rank, two passages each


def _rank(rank: int, file: str, q: Tensor, p: Tensor, weights: Tensor, results: Any) -> None:
    with process_group(rank, len(UNEVEN), file) as group:
        first = sum(UNEVEN[:rank])
        own, own_passages = slice(first, first + UNEVEN[rank]), slice(2 * first, 2 * (first + UNEVEN[rank]))
        leaves = [q[own].clone(), p[own_passages].clone(), torch.tensor(0.1)]
        queries, passages, temperature = (x.requires_grad_() for x in leaves)
        loss = gk.contrastive_loss(
            queries,
            passages,
            temperature=temperature,
            weights=weights[own],
            mask_ids=(torch.arange(5)[own] % 4, torch.arange(10)[own_passages] // 2 % 4),
            process_group=group,
        )
        grads = torch.autograd.grad(loss, leaves)
        results[rank] = (float(loss), *(g.tolist() for g in grads))


def test_two_processes_with_uneven_batches_equal_one_process(tmp_path: Path) -> None:
    q, p, weights = unit(5).requires_grad_(), unit(10).requires_grad_(), torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    temperature = torch.tensor(0.1, requires_grad=True)
    ids = (torch.arange(5) % 4, torch.arange(10) // 2 % 4)
    loss = gk.contrastive_loss(q, p, temperature=temperature, weights=weights, mask_ids=ids)
    expected = torch.autograd.grad(loss, (q, p, temperature))
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (str(tmp_path / "store"), q.detach(), p.detach(), weights, results), nprocs=len(UNEVEN))
        found = dict(results)
    by_rank = [found[rank] for rank in range(len(UNEVEN))]
    for rank_loss, _, _, temperature_grad in by_rank:
        assert rank_loss == pytest.approx(loss.item(), rel=1e-5)
        # every rank sees the loss of all rows: the mean over ranks of this gradient is the global one
        assert temperature_grad == pytest.approx(expected[2].item(), rel=1e-4)
    for index in (0, 1):
        rows = torch.cat([torch.tensor(rank[1 + index]) for rank in by_rank])
        torch.testing.assert_close(rows / len(UNEVEN), expected[index], rtol=1e-4, atol=1e-6)


def _refusals(rank: int, file: str, results: Any) -> None:
    """What each rank says to rows that another rank's would make up for, or take for its own."""
    with process_group(rank, 2, file) as group:
        queries = (2, 3)[rank]
        q, p = torch.zeros(queries, 4), torch.zeros(2 * queries, 4)
        ids = torch.arange(queries), torch.arange(2 * queries)
        wrong: list[dict[str, Any]] = [
            {"targets": torch.full((queries,), 2 * queries)},  # the first passage of the next rank
            {"targets": torch.zeros(queries - 1, dtype=torch.int64)},
            {"weights": torch.ones(queries - 1)},
            {"mask_ids": (ids[0][1:], ids[1])},
            {"mask_ids": (ids[0], ids[1][1:])},
        ]
        found = []
        for options in wrong:
            with pytest.raises(ValueError) as error:
                gk.contrastive_loss(q, p, process_group=group, **options)
            found.append(str(error.value))
        results[rank] = found


def test_each_rank_checks_its_own_rows_before_they_are_gathered(tmp_path: Path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_refusals, (str(tmp_path / "store"), results), nprocs=2)
        found = dict(results)
    for rank, queries in enumerate((2, 3)):
        expected = [
            f"targets: expected values in 0..{2 * queries - 1}",
            f"targets: expected int64 ({queries},)",
            f"weights: expected ({queries},)",
            *[f"mask_ids: expected shapes ({queries},) and ({2 * queries},)"] * 2,
        ]
        assert [text[: len(start)] for text, start in zip(found[rank], expected, strict=True)] == expected


# ---- refused

A, B = torch.zeros(2, 4), torch.zeros(4, 4)


def call(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {"queries": A, "passages": B, **changes}
    return lambda: gk.contrastive_loss(**arguments)


REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "queries of one dimension": ("queries: expected", call(queries=A[0])),
    "integer queries": ("queries: expected .*got torch.int64", call(queries=A.long())),
    "no queries": ("queries: expected .*got an empty batch", call(queries=A[:0])),
    "no columns": ("queries: expected at least one column, got .*2, 0", call(queries=A[:, :0], passages=B[:, :0])),
    "no passages": ("passages: expected .*got an empty batch", call(passages=B[:0])),
    "another width": ("passages: expected", call(passages=torch.zeros(4, 5))),
    "another dtype": ("passages: expected .*got torch.bfloat16", call(passages=B.bfloat16())),
    "another device": ("passages: expected .*got .* on meta", call(passages=B.to("meta"))),
    "fewer passages than queries": ("passages: expected .*got 1 rows", call(passages=B[:1])),
    "passages no multiple of queries": ("passages: expected .*got 3 rows", call(passages=B[:3])),
    "NaN temperature": ("temperature: expected .*got nan", call(temperature=float("nan"))),
    "zero temperature": ("temperature: expected .*got 0", call(temperature=0)),
    "NaN learnable temperature": ("temperature: expected .*got nan", call(temperature=torch.tensor(float("nan")))),
    "two temperatures": ("temperature: expected .*got shape", call(temperature=torch.ones(2))),
    "float targets": ("targets: expected .*got torch.float32", call(targets=torch.zeros(2))),
    "target outside": ("targets: expected values in 0..3, got", call(targets=torch.tensor([0, 4]))),
    "target of another group": ("targets: with in_batch", call(targets=torch.tensor([0, 1]), in_batch_negatives=False)),
    "weights shape": ("weights: expected .*got shape", call(weights=torch.ones(3))),
    "ids shape": ("mask_ids: expected shapes", call(mask_ids=(torch.ones(2), torch.ones(3)))),
    "weights on another device": ("weights: expected a tensor on cpu", call(weights=torch.ones(2, device="meta"))),
    "ids on another device": (
        "mask_ids: expected a tensor on cpu",
        call(mask_ids=(torch.ones(2), torch.ones(4, device="meta"))),
    ),
    "reduction": ("reduction: expected .*got 'max'", call(reduction="max")),
}


@pytest.mark.parametrize(("message", "make"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_by_name(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
