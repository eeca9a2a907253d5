"""The attention benchmark counts what it says, and times no variant that computes something else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

import grit_kernels as gk
from bench import attention, attention_peers, common
from bench.attention_peers import Problem, Regime
from grit_kernels.visibility import dense_mask

SMALL = Regime("small", (20, 7), (20, 7), (True, False), 4, 2, 32, dtype=torch.float32)


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured here."""
    monkeypatch.setitem(common.GEMM_SIZE, "cpu", 128)


@pytest.mark.parametrize("window", [(-1, -1), (5, 3)])
def test_pairs_are_those_of_the_dense_mask(window: tuple[int, int]) -> None:
    regime = Regime("x", (20, 7, 1), (20, 9, 30), (True, False, True), 1, 1, 32, window=window)
    left, right = (10**6 if w < 0 else w for w in window)
    masks = [
        dense_mask(q, k, left, 0 if causal else right)
        for q, k, causal in zip(regime.q_lens, regime.k_lens, regime.causal, strict=True)
    ]
    assert regime.pairs() == sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_mixed_pack_has_the_share_of_causal_tokens_it_names(share: float) -> None:
    regime = attention.mixed("x", 65536, share, (1, 1, 32))
    causal = sum(n for n, c in zip(regime.q_lens, regime.causal, strict=True) if c)
    assert causal / sum(regime.q_lens) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("backward", [False, True])
def test_every_cpu_variant_computes_the_same(backward: bool) -> None:
    regime = Regime(
        "x", (20, 7, 20), (20, 7, 20), (True, False, True), 4, 2, 32, dtype=torch.float32, backward=backward
    )
    peers = [name for name in attention_peers.PEERS if name != "flex"]  # compiling it takes a minute
    with gk.backend("reference"):
        rows = attention.measure(regime, "cpu", peers, repeats=1)
    names = [row["variant"] for row in rows]
    assert names == ["grit", "grit, two launches", "sdpa loop", "sdpa masked", "sdpa split"]
    assert all(row["tflops"] > 0 and row["of_gemm"] > 0 for row in rows)


def test_decoding_is_rated_against_a_read_of_memory() -> None:
    regime = Regime("x", (1, 1), (40, 40), (True, True), 4, 2, 32, dtype=torch.float32)
    with gk.backend("reference"):
        rows = attention.measure(regime, "cpu", ["grit", "sdpa split", "matmul only"], repeats=1)
    assert all(row["gbps"] > 0 and row["of_read"] > 0 for row in rows) and len(rows) == 3


def test_a_causal_window_stands_beside_the_same_samples_without_it() -> None:
    windowed = Regime("x", (40,), (40,), (True,), 2, 1, 32, window=(4, 4), dtype=torch.float32)
    with gk.backend("reference"):
        rows = {r["variant"]: r for r in attention.measure(windowed, "cpu", ["grit", "grit, no window"], repeats=1)}
    whole = rows["grit, no window"]
    assert whole["tflops"] * whole["ms"] * 1e9 == pytest.approx(4 * 32 * 2 * 40 * 41 / 2)
    assert rows["grit"]["tflops"] * rows["grit"]["ms"] * 1e9 == pytest.approx(windowed.flops())
    assert attention_peers.no_window(Problem(SMALL, "cpu")) is None


def test_a_fresh_read_covers_other_memory_each_time() -> None:
    run, size = common.fresh_read_ceiling(4096, pool_megabytes=1)
    assert size == 4096 and len({float(run()) for _ in range(16)}) == 16


@pytest.mark.parametrize("factor, error", [(1.1, "0.1"), (float("nan"), "inf")])
def test_a_peer_that_computes_something_else_is_a_row_without_a_time_and_ends_nothing(
    factor: float, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_peers.PEERS, "sdpa loop", lambda p: lambda: factor * attention_peers.grit(p)())
    with gk.backend("reference"):
        rows = {r["variant"]: r for r in attention.measure(SMALL, "cpu", ["grit", "sdpa loop", "sdpa masked"], 1)}
    assert rows["sdpa loop"]["note"] == f"differs from grit: relative error {error}" and "ms" not in rows["sdpa loop"]
    assert rows["sdpa masked"]["ms"] > 0


def test_a_peer_that_fails_is_a_row_that_says_why_and_this_package_must_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Problem) -> attention_peers.Run:
        raise torch.OutOfMemoryError("out of memory\nmore about it")

    monkeypatch.setitem(attention_peers.PEERS, "sdpa loop", broken)
    with gk.backend("reference"):
        rows = attention.measure(SMALL, "cpu", ["grit", "sdpa loop", "sdpa masked"], repeats=1)
        assert {row["variant"]: row.get("note") for row in rows} == {
            "grit": None,
            "sdpa masked": None,
            "sdpa loop": "OutOfMemoryError: out of memory",
        }
        monkeypatch.setitem(attention_peers.PEERS, "grit", broken)
        with pytest.raises(torch.OutOfMemoryError):
            attention.measure(SMALL, "cpu", ["grit"], repeats=1)


def test_a_kernel_that_this_torch_lacks_is_left_out_and_other_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, cudnn = Problem(SMALL, "cpu"), SDPBackend.CUDNN_ATTENTION
    assert attention_peers.sdpa_loop(problem, cudnn) is None
    run = attention_peers.sdpa_loop(problem, SDPBackend.MATH)
    assert run is not None
    with gk.backend("reference"):
        torch.testing.assert_close(run(), attention_peers.grit(problem)())

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention_peers, "_sdpa", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_peers.sdpa_loop(problem, cudnn)


FLASH_ATTN = """
import torch
import torch.nn.functional as F

calls = []

def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, window_size=(-1, -1)):
    calls.append({"rows": len(q), "samples": len(cu_q) - 1, "longest": (max_q, max_k), "causal": causal, "window": window_size})
    outs = []
    for b in range(len(cu_q) - 1):
        parts = (x[None, s[b] : s[b + 1]].transpose(1, 2) for x, s in ((q, cu_q), (k, cu_k), (v, cu_k)))
        outs.append(F.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs) if __name__ == "flash_attn" else (torch.cat(outs), None)
"""


@pytest.fixture
def not_imported() -> Iterator[None]:
    """Stand-ins are imported anew by each test."""
    yield
    for name in ("flash_attn", "flash_attn_interface"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize("peer, module", [("flash-attn", "flash_attn"), ("flash-attn 3", "flash_attn_interface")])
@pytest.mark.parametrize("backward", [False, True])
def test_flash_attn_is_launched_once_per_mode_on_gathered_packs(
    peer: str, module: str, backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}.py").write_text(FLASH_ATTN)
    monkeypatch.syspath_prepend(tmp_path)
    lens, causal = (20, 7, 13), (True, False, True)
    regime = Regime("x", lens, lens, causal, 4, 2, 32, dtype=torch.float32, backward=backward)
    problem = Problem(regime, "cpu")
    with gk.backend("reference"), torch.set_grad_enabled(backward):
        assert peer in attention.variants(problem, ["grit", peer]), problem.failures
    assert importlib.import_module(module).calls == [
        {"rows": 33, "samples": 2, "longest": (20, 20), "causal": True, "window": (-1, -1)},
        {"rows": 7, "samples": 1, "longest": (7, 7), "causal": False, "window": (-1, -1)},
    ]


@pytest.mark.usefixtures("not_imported")
def test_a_flash_attn_that_does_not_import_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    problem = Problem(SMALL, "cpu")
    with gk.backend("reference"):
        assert list(attention.variants(problem, ["grit", "flash-attn"])) == ["grit"]
    assert problem.failures == {"flash-attn": "ImportError: undefined symbol"}
