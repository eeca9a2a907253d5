"""The Triton kernels of the contrastive loss: sharing and chunking, and compilation for several GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grit_kernels.contrastive import chunked
from grit_kernels.contrastive.problem import ContrastiveProblem

triton_contrastive = pytest.importorskip(
    "grit_kernels.contrastive.triton_contrastive", reason="the package triton is not installed"
)
from tests.grit_kernels.ahead_of_time import CAPABILITIES, compile_ahead_of_time  # noqa: E402


def problem(count: int, group: int, width: int) -> tuple[Any, ...]:
    q, p = (torch.randn(n, width) / width**0.5 for n in (count, count * group))
    targets = torch.arange(count) * group + torch.arange(count) % group
    ids = (torch.randint(0, 9, (count,)), torch.randint(0, 9, (count * group,)))
    return q, p, torch.tensor(0.1), targets, *ids


@pytest.mark.interpret
@pytest.mark.parametrize("in_batch_negatives", [True, False])
def test_shares_of_passages_and_chunks_of_queries_do_not_change_results(
    monkeypatch: pytest.MonkeyPatch, in_batch_negatives: bool
) -> None:
    given = ContrastiveProblem(*problem(75, 9, 20), in_batch_negatives, True)
    expected = chunked.contrastive_forward(given)
    saved = expected[1:3]
    grad = torch.randn(75)
    expected_grads = chunked.contrastive_backward(grad, *saved, given)
    for processors, chunk_bytes in ((1, 1 << 20), (40, 80_000)):
        monkeypatch.setattr(triton_contrastive, "processor_count", lambda device, n=processors: n)
        monkeypatch.setattr(triton_contrastive, "CHUNK_BYTES", chunk_bytes)

        def run() -> tuple[Tensor, ...]:
            return (
                *triton_contrastive.contrastive_forward(given),
                *triton_contrastive.contrastive_backward(grad, *saved, given),
            )

        found = run()
        for a, b in zip(found, (*expected, *expected_grads), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True)), "results repeat bit by bit"


@pytest.mark.interpret
def test_of_several_best_passages_the_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_contrastive, "processor_count", lambda device: 40)
    q = torch.ones(3, 16)
    targets = torch.zeros(3, dtype=torch.int64)
    given = ContrastiveProblem(q, torch.ones(700, 16), torch.tensor(1.0), targets, None, None, True, False)
    best = triton_contrastive.contrastive_forward(given)[4]
    assert best.tolist() == [0, 0, 0]


def test_float64_is_refused_by_name() -> None:
    inputs = [x.double() if x.is_floating_point() else x for x in problem(4, 2, 8)]
    with pytest.raises(TypeError, match="queries, passages: expected .*got torch.float64"):
        triton_contrastive.contrastive_forward(ContrastiveProblem(*inputs, True, False))


class Grids:
    """Stands in for a kernel and records the grids it is launched with."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.seen.append(grid)
        return lambda *args, **kwargs: None


def test_ten_million_passages_fit_the_grid_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {name: Grids() for name in ("contrastive_fwd_kernel", "contrastive_weights_kernel", "product_kernel")}
    for name, grids in kernels.items():
        monkeypatch.setattr(triton_contrastive, name, grids)
    q, p = (torch.empty(n, 16, dtype=torch.bfloat16, device="meta") for n in (300, 10_000_000))
    targets, row = torch.zeros(300, dtype=torch.int64, device="meta"), torch.empty(300, device="meta")
    given = ContrastiveProblem(q, p, torch.empty(1, device="meta"), targets, None, None, True, False)
    triton_contrastive.contrastive_forward(given)
    triton_contrastive.contrastive_backward(row, row, row, given)
    for name, grids in kernels.items():
        assert grids.seen, name
        assert all(first < 2**31 and all(n <= 65535 for n in others) for first, *others in grids.seen), name


SCORES = {
    "p_query_scale": "*fp32", "p_targets": "*i64", "p_top": "*fp32", "stride_q": "i32", "stride_p": "i32",
    "passages": "i32", "width": "i32", "group": "i32",
}  # fmt: skip
FORWARD = {
    **dict.fromkeys(("p_total", "p_below", "p_positive"), "*fp32"), "p_best": "*i32", "queries": "i32", "splits": "i32",
}  # fmt: skip
WEIGHTS = {
    **dict.fromkeys(("p_a", "p_log_total"), "*fp32"),
    **dict.fromkeys(("first_query", "last_query", "first_passage", "last_passage"), "i32"),
}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("capability", "dtype"), [*((c, "bf16") for c in CAPABILITIES), (90, "fp32"), ("gfx942", "bf16")]
)
def test_kernels_compile_to_tensor_cores_or_full_fp32(capability: int | str, dtype: str) -> None:
    single = dtype == "fp32"
    q = torch.empty(1, 1024, dtype=torch.float32 if single else torch.bfloat16)
    tile = {**triton_contrastive._tile(q, None, None, 0), "UPCAST": False}
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    absent = dict.fromkeys(("p_passage_scale", "p_query_ids", "p_passage_ids"), None)
    vectors = {**SCORES, "p_queries": f"*{dtype}", "p_passages": f"*{dtype}"}
    block_m, block_n, block_k, *product_launch = triton_contrastive._product_tile(
        q.dtype, "gfx9" if capability == "gfx942" else f"sm{capability}"
    )
    product = {"p_a": f"*{dtype}", "p_b": f"*{dtype}", "p_c": "*fp32"}
    product |= dict.fromkeys(("rows", "columns", "inner", "stride_am", "stride_bk", "stride_cm"), "i32")
    blocks = {
        "stride_ak": 1,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "ACCUMULATE": False,
        "UPCAST": False,
    }
    for kernel, types, constants, launch in (
        (triton_contrastive.contrastive_fwd_kernel, vectors | FORWARD, absent | tile, (warps, stages)),
        (
            triton_contrastive.contrastive_weights_kernel,
            vectors | WEIGHTS | {"p_weights": f"*{dtype}"},
            absent | tile | {"p_factor": None},
            (warps, stages),
        ),
        (triton_contrastive.product_kernel, product, blocks, product_launch),
    ):
        compiled = compile_ahead_of_time(kernel, types, constants, capability, warps=launch[0], stages=launch[1])
        name = kernel.__name__
        # the forward keeps a few per-query numbers of its softmax in memory across the inner loop, never the score tile
        allowed = 128 if kernel is triton_contrastive.contrastive_fwd_kernel else 0
        assert compiled.spilled <= allowed, (name, compiled.spilled)
        shared = {80: 163, "gfx942": 64}.get(capability, 227) * 1024
        assert compiled.shared <= shared, (name, compiled.shared)
        instructions = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma_f32")
        uses_tensor_cores = any(word in compiled.ptx for word in instructions)
        assert uses_tensor_cores != single, name
        assert "tf32" not in compiled.ptx, name
