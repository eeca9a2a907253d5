"""The op attention_decode: few rows over a cache, in Triton, and in CUDA C++ (on a CPU: its templates compiled for the host)."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels import _library
from grit_kernels.attention import has_decode_kernel
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.visibility import dense_mask, window_bounds
from tests.conftest import ROOT, Backend, assert_within_rule, available_backends, needs_source_tree
from tests.grit_kernels.test_backend import run_python
from tests.grit_kernels.tiny_mistral import IDS, MASKS, close, output_cache, tiny_model

MARKS = {"cuda": [pytest.mark.gpu], "interpret": [pytest.mark.interpret]}
on_every_device = pytest.mark.parametrize(
    "where",
    [
        pytest.param(b, id=b.name, marks=MARKS.get(b.name, []))
        for b in available_backends()
        if b.name in ("cpu", "interpret", "cuda")
    ],
)
needs_library = pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
SINKS = torch.tensor([-2.0, 0.0, 1.5, 30.0])


@dataclass(frozen=True)
class Case:
    """Rows and keys of each sample; sample 1 begins at slot 3 of its cache."""

    dim: int
    heads: int = 4
    heads_kv: int = 2
    rows: tuple[int, ...] = (1, 1, 1)
    keys: tuple[int, ...] = (40, 1, 700)
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float = 0.2
    hi: bool = False
    used: bool = False
    sinks: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in vars(self).values())


CASES = [
    Case(32),
    Case(40, used=True, sinks=True, dtype=torch.bfloat16),
    Case(64, rows=(0, 1, 1), keys=(5, 0, 300), used=True),
    Case(64, heads=8, heads_kv=1, window=(50, 0), used=True, dtype=torch.float16),
    Case(128, heads=4, heads_kv=4, sinks=True, dtype=torch.bfloat16),
    Case(128, rows=(3, 0, 2), window=(20, 4), softcap=5.0, sinks=True),
    Case(128, heads=24, heads_kv=2, rows=(1, 2, 1), hi=True, dtype=torch.bfloat16),
    Case(200, softmax_scale=-0.1, softcap=3.0, dtype=torch.float16),
    Case(256, heads=8, softmax_scale=0.0, used=True, sinks=True),
    Case(264, used=True, sinks=True, dtype=torch.bfloat16),
    Case(512, heads=16, rows=(1, 2, 1), softcap=3.0),
    Case(512, heads=2, used=True, dtype=torch.float16),
]


def drawn(case: Case) -> tuple[Any, ...]:
    """Arguments of the op: a cache (B, slots, heads_kv, D) as rows, with NaN where no key is."""
    batch, most, slots = len(case.rows), max(case.rows), max(case.keys) + 8
    q = torch.randn(batch * most, case.heads, case.dim).to(case.dtype)
    k, v = (torch.randn(batch, slots, case.heads_kv, case.dim).to(case.dtype) for _ in "kv")
    first = torch.tensor([3 if b == 1 else 0 for b in range(batch)], dtype=torch.int32)
    rows, keys = (torch.tensor(x, dtype=torch.int32) for x in (case.rows, case.keys))
    used = torch.rand(batch, slots) < 0.7 if case.used else None
    for b in range(batch):
        empty = torch.ones(slots, dtype=torch.bool)
        here = slice(int(first[b]), int(first[b] + keys[b]))
        empty[here] = False if used is None else ~used[b, : int(keys[b])]
        k[b, empty] = v[b, empty] = float("nan")
    causal = torch.tensor([b % 2 == 0 for b in range(batch)])
    bounds = window_bounds(causal, case.window, most, slots)
    hi = torch.randint(0, max(case.keys) + 1, (batch, most), dtype=torch.int32).sort(1).values.flatten()
    index = torch.arange(batch, dtype=torch.int32)
    ranges = (index * most, rows, index * slots + first, keys)
    numbers = (most, slots, most, slots, case.softmax_scale, case.softcap)
    problem = AttentionProblem(*ranges, *bounds, hi if case.hi else None, *numbers)
    sinks = SINKS.repeat(6)[: case.heads].to(case.dtype) if case.sinks else None
    return q, k.flatten(0, 1), v.flatten(0, 1), used, sinks, problem


def explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    used: Tensor | None,
    sinks: Tensor | None,
    problem: AttentionProblem,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """A row and a head at a time, over the keys it sees, with the sink as one more score."""
    out, lse = torch.zeros(q.shape, dtype=dtype), torch.full(q.shape[:2], float("-inf"), dtype=dtype)
    group = q.shape[1] // k.shape[1]
    for b, (q_start, q_len, k_start, k_len, left, right) in enumerate(
        zip(*(x.tolist() for x in problem.tables), strict=True)
    ):
        hi = None if problem.hi is None else problem.hi[q_start : q_start + q_len]
        seen = dense_mask(q_len, k_len, left, right, hi)
        if used is not None:
            seen = seen & used[b, :k_len]
        for row in range(q_len):
            here = k_start + torch.nonzero(seen[row]).flatten()
            if not len(here):
                continue
            for head in range(q.shape[1]):
                keys, values = (x[here, head // group].to(dtype) for x in (k, v))
                scores = keys @ q[q_start + row, head].to(dtype) * problem.softmax_scale
                if problem.softcap > 0:
                    scores = problem.softcap * torch.tanh(scores / problem.softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head, None].to(dtype)])
                out[q_start + row, head] = scores.softmax(0)[: len(here)] @ values
                lse[q_start + row, head] = scores.logsumexp(0)
    return out, lse


def ops(where: Backend) -> list[Any]:
    """The implementations that this process has there, in Triton and in C++."""
    names, key = ("attention_decode", "attention_decode_cuda"), "CUDA" if where.device == "cuda" else "CPU"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = [getattr(torch.ops.grit_kernels, name) for name in names if has_kernel(f"grit_kernels::{name}", key)]
    assert found
    return found


def moved(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    *tensors, problem = arguments
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in (*tensors, *problem.flat()))


@on_every_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_attend_to_the_keys_that_they_see_and_to_no_other_slot(case: Case, where: Backend) -> None:
    arguments = drawn(case)
    oracle, eager = explicit(*arguments, torch.float64), explicit(*arguments, case.dtype)
    for op in ops(where):
        out, lse = (x.cpu() for x in op(*moved(arguments, where.device)))
        assert out.dtype == case.dtype and lse.dtype == torch.float32
        assert_within_rule(out, oracle[0], eager[0], "out")
        dead = oracle[1].isinf()
        assert torch.equal(lse.isinf(), dead) and not out[dead].any()
        assert_within_rule(lse[~dead], oracle[1][~dead], eager[1][~dead], "lse")


@on_every_device
@pytest.mark.parametrize("offset", [0, 1])
def test_states_may_lie_in_memory_as_caches_have_them(offset: int, where: Backend) -> None:
    """(B, H, S, D) caches as overlapping rows; with the offset no row begins at a multiple of 16 bytes."""
    case = Case(64, keys=(300, 300, 300), dtype=torch.bfloat16)
    q, k, v, used, sinks, problem = drawn(case)
    slots, batch = 308, len(case.rows)

    def cached(x: Tensor) -> Tensor:
        memory = torch.empty(x.numel() + offset, dtype=x.dtype, device=where.device)[offset:]
        memory = memory.view(batch, case.heads_kv, slots, case.dim)
        memory.copy_(x.view(batch, slots, case.heads_kv, case.dim).transpose(1, 2))
        rows = (batch - 1) * case.heads_kv * slots + slots
        return memory.as_strided((rows, case.heads_kv, case.dim), (case.dim, slots * case.dim, 1))

    index = torch.arange(batch, dtype=torch.int32)
    first = problem.k_start - index * slots
    strided = AttentionProblem(*problem.flat()[:2], index * case.heads_kv * slots + first, *problem.flat()[3:])
    wide = torch.zeros(*q.shape[:2], 2 * case.dim, dtype=q.dtype)
    wide[..., : case.dim] = q
    for op in ops(where):
        expected = op(*moved((q, k, v, used, sinks, problem), where.device))
        given = moved((q, k, v, used, sinks, strided), where.device)
        found = op(wide.to(where.device)[..., : case.dim], cached(k), cached(v), *given[3:])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_every_device
def test_opcheck_accepts_both_ops(where: Backend) -> None:
    for case in CASES[:2]:
        for op in ops(where):
            arguments = moved(drawn(case), where.device)
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_library
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 4, 36)}, r"q: expected a head dim that is a multiple of 8 up to 512, got 36"),
        ({"q": torch.zeros(3, 3, 32)}, r"q: expected a multiple of k's 2 heads, got 3"),
        ({"q": torch.zeros(3, 4, 32, dtype=torch.float64)}, r"q: expected float32, bfloat16 or float16"),
        ({"v": torch.zeros(5, 2, 32)}, r"v: expected the \d+ rows of k"),
        ({"v": torch.zeros(2124, 2, 40)}, r"v: expected \(rows, 2, 32\) in the dtype of q"),
        ({"used": torch.zeros(3, 5, dtype=torch.bool)}, r"used: expected a contiguous bool tensor \(3, 708\)"),
        ({"sinks": torch.zeros(3)}, r"sinks: expected a contiguous tensor \(4\)"),
    ],
)
def test_wrong_tensors_are_refused(changes: dict[str, Tensor], message: str) -> None:
    *tensors, problem = drawn(Case(32))
    given = dict(zip(("q", "k", "v", "used", "sinks"), tensors, strict=True)) | changes
    with pytest.raises(RuntimeError, match=message):
        torch.ops.grit_kernels.attention_decode_cuda(*given.values(), *problem.flat())


@needs_library
@pytest.mark.parametrize("mask", ["left", "holes"])
def test_a_model_decodes_through_the_cuda_kernel_as_without(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Served as where GRIT_KERNELS_CUDA_CPP=1 chooses it, but on the CPU."""
    model = gk.patch(tiny_model())
    step = {"attention_mask": torch.cat([MASKS[mask], torch.ones_like(MASKS[mask][:, :1])], dim=1), "use_cache": True}
    compiled = torch.ops.grit_kernels.attention_decode_cuda
    calls: list[Any] = []

    def served(*arguments: Any) -> Any:
        calls.append(arguments[3])
        return compiled(*arguments)

    def logits() -> Tensor:
        cache = output_cache(model(IDS, attention_mask=MASKS[mask], use_cache=True))
        return model(IDS[:, :1], **gk.hf.cache_keyword(model, cache), **step).logits

    with torch.no_grad():
        expected = logits()
        with torch.library._scoped_library("grit_kernels", "IMPL") as library:
            library.impl("attention_decode", served, "CPU")
            choices = importlib.import_module("grit_kernels.backend")._choices
            monkeypatch.setitem(choices["attention_decode"], "cpu", "cuda (C++)")
            found = logits()
    assert len(calls) == model.config.num_hidden_layers and all(used.dtype == torch.bool for used in calls)
    close(found, expected)


def test_decoding_refuses_a_backend_that_cannot_serve_its_device() -> None:
    q = torch.ones(1, 1, 2, 32, device="meta")
    with gk.backend("cpu"), pytest.raises(ValueError, match="'cpu' was requested, but the tensors are on meta"):
        has_decode_kernel(q, q, q)


TWINS = """
import importlib, torch
backend = importlib.import_module("grit_kernels.backend")
backend.declare_op("twin_cuda(Tensor x) -> Tensor")
library = torch.library.Library("grit_kernels", "IMPL")
if {compiled}:
    library.impl("twin_cuda", lambda x: x, "CUDA")
backend.define_op("twin(Tensor x) -> Tensor", reference=None, triton={triton!r}, cuda="twin_cuda")
print(backend._choices["twin"]["cuda"])
"""


@pytest.mark.parametrize(
    ("switch", "compiled", "triton", "choice"),
    [
        ("", True, "module:function", "triton"),
        ("0", True, "module:function", "triton"),
        ("1", True, "module:function", "cuda (C++)"),
        ("1", False, "module:function", "triton"),
        ("", True, None, "cuda (C++)"),
    ],
)
def test_cuda_cpp_serves_where_it_is_asked_for_or_alone(
    switch: str, compiled: bool, triton: str | None, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setenv("GRIT_KERNELS_CUDA_CPP", switch)
    found = run_python(TWINS.format(compiled=compiled, triton=triton))
    assert found.stdout.strip() == choice, found.stderr


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CUDA_CPP", "yes")
    with pytest.raises(ValueError, match="GRIT_KERNELS_CUDA_CPP: expected 0 or 1, got 'yes'"):
        importlib.import_module("grit_kernels.backend")._prefers_cuda_cpp()


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


@pytest.mark.nvcc
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@needs_source_tree
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_cuda_kernel_spills_nothing_and_reads_16_bytes_at_a_time(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed, which brings cuobjdump")
    from tests.grit_kernels.ahead_of_time import _cuobjdump

    cubin, include = tmp_path / "decode.cubin", Path(torch.__file__).parent / "include"
    command = [
        *(str(NVCC), "-cubin", f"-arch={architecture}", "-std=c++17", "-O3", "-Xptxas=-v", "-DUSE_CUDA"),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-isystem", str(include), "-o", str(cubin)),
        str(ROOT / "csrc/cuda/attention_decode.cu"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)]
    kernels = 3 * (4 * 4 + 3)  # of each dtype, 1 to 8 pairs up to head size 256 and 1 to 4 up to 512
    assert len(spills) >= 2 * kernels and not any(spills), run.stderr
    needed = re.findall(
        r"Compiling entry function '\w+decode_kernel\w+?Li(\d+)ELi(\d+)EEEv\w+'.*?Used (\d+) registers",
        run.stderr,
        re.S,
    )
    assert len(needed) == kernels and {int(pairs) for _, pairs, _ in needed} == {1, 2, 4, 8}
    for dim, pairs, registers in needed:
        resident = {8: 2, 4: 3}.get(
            int(pairs) * (2 if int(dim) > 256 else 1), 4
        )  # blocks_per_processor of decode_call.h
        assert int(registers) * 128 * resident <= 65536, (dim, pairs, registers)
    code = _cuobjdump("--dump-sass", cubin.read_bytes())
    assert code.count("LDG.E.128") >= 2 * kernels
