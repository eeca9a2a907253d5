"""What is compiled ahead of the GPU benchmarks is exactly what they launch."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")

from triton.runtime.jit import JITFunction  # noqa: E402

import grit_kernels as gk  # noqa: E402
from bench import (  # noqa: E402
    attention,
    attention_tune,
    common,
    contrastive,
    correctness,
    cuda_twin,
    gpu,
    launches,
    pooling,
    unified,
)
from bench.attention_peers import Problem  # noqa: E402
from bench.launches import GROUPS, recorded  # noqa: E402
from bench.random_model import random_model  # noqa: E402
from grit_kernels.attention import reference, triton_backward, triton_forward  # noqa: E402
from tests.grit_kernels.attention.samples import draw_call, results  # noqa: E402

SHAPE = (4, 2, 64)
REGIMES = [
    attention.mixed("mixed", 4096, 0.5, SHAPE),
    attention.mixed("mixed backward", 4096, 0.5, SHAPE, backward=True),
    attention.same("window", 1024, 4, False, SHAPE, window=(64, 64)),
    attention.decode("decode", 8, 4096, SHAPE),
]


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant that a benchmark would time is called once."""

    def once(variants: dict[str, Any], *_: Any, **__: Any) -> dict[str, list[float]]:
        for run in variants.values():
            run()
        return {name: [1.0 + place] for place, name in enumerate(variants)}

    for module in (common, pooling, contrastive):
        monkeypatch.setattr(module, "interleave", once)
        monkeypatch.setattr(module, "gemm_ceiling", lambda *_: (lambda: None, 1.0), raising=False)
    monkeypatch.setattr(common, "interleave_events", once)
    monkeypatch.setattr(common, "fresh_read_ceiling", lambda *_: (lambda: None, 1.0))
    monkeypatch.setattr(pooling, "read_ceiling", lambda *_: (lambda: None, 1.0))
    monkeypatch.setattr(pooling, "growth", lambda device: lambda: 0.0)
    monkeypatch.setattr(pooling, "slice_mean", lambda *_: None)
    monkeypatch.setattr(contrastive, "once", lambda *_: {})
    monkeypatch.setattr(torch, "compile", lambda function: function)


def measured(what: Any) -> set[launches.Launch]:
    """What a benchmark's own measurement launches on tensors without data."""
    with recorded(launches.HOPPER) as found:
        what()
    return found


def compiled(group: Any) -> set[launches.Launch]:
    with recorded(launches.HOPPER) as found:
        group()
    assert found
    return found


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_the_attention_benchmark_launches_what_was_compiled(regime: attention.Regime) -> None:
    run = functools.partial(attention.measure, regime, "meta", list(launches.OURS), 1)
    assert measured(run) == compiled(lambda: launches.record_attention([regime]))


def test_the_pooling_benchmark_launches_what_was_compiled() -> None:
    shape = (256, 96, 4)

    def run() -> None:
        for dtype in (torch.bfloat16, torch.float32):
            pooling.measure("meta", shape, dtype, 1)

    assert measured(run) == compiled(lambda: launches.record_pooling([shape]))


def test_the_contrastive_benchmark_launches_what_was_compiled() -> None:
    shape = (64, 128, 96)

    def run() -> None:
        for dtype in (torch.bfloat16, torch.float32):
            contrastive.measure("meta", shape, dtype, 1)

    assert measured(run) == compiled(lambda: launches.record_contrastive([shape]))


def test_the_step_of_a_model_launches_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_transformers(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:  # which reads its masks
        loss = torch.zeros((), device="meta", requires_grad=True)
        return loss, loss

    monkeypatch.setattr(unified, "padded_losses", of_transformers)
    monkeypatch.setattr(unified, "padded_pass", of_transformers)

    def run() -> None:
        plain = random_model("tiny", device="meta", dtype=torch.bfloat16)
        unified.measure(plain, unified.make_batch(4, 4, 0.1, "meta", plain.config.vocab_size), "meta", 1)

    assert measured(run) == compiled(lambda: launches.record_unified("tiny", 0.1))


def test_the_check_of_correctness_launches_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        return q + k.sum() + v.sum(), q.detach()  # which reads its tables

    few = correctness.problems(0.02)[:2]
    monkeypatch.setattr(correctness, "problems", lambda scale=1.0: few)
    monkeypatch.setattr(reference, "attention_forward", of_the_reference)
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    found = compiled(launches.record_correctness)
    assert measured(lambda: [correctness.measure(problem, "meta", 1) for problem in few]) == found
    names = [launch.name for launch in found]
    assert {"attention_forward_kernel", "backward_rows_kernel"} < set(names)
    assert names.count("backward_keys_kernel") == 2 * names.count("backward_rows_kernel"), "with and without atomics"


def test_twins_launch_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_twin, "twin", lambda op: op if "attention_decode" in op.name() else None)
    found = compiled(launches.record_twins)
    assert {launch.name for launch in found} == {"attention_decode_kernel", "merge_splits_kernel"}
    with torch.no_grad():
        assert measured(lambda: cuda_twin.measure("meta", 1)) == found


@pytest.mark.parametrize(
    ("kernel", "dim", "few"),
    [
        ("forward", 64, True),
        ("backward", 128, False),
        ("decode", 256, False),
        ("hopper", 64, False),
        ("hopper_backward", 64, False),
    ],
)
def test_tuning_launches_what_was_compiled(kernel: str, dim: int, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "gemm_ceiling", lambda *_: (lambda: None, 1.0))
    monkeypatch.setattr(torch.testing, "assert_close", lambda *_, **__: None)
    problems = attention_tune.problems
    monkeypatch.setattr(attention_tune, "problems", lambda kernel, dim, device="meta": problems(kernel, dim, "meta"))
    found = measured(lambda: list(attention_tune.measure(kernel, dim, few, set())))
    assert found == compiled(lambda: launches.record_tuning([kernel], [dim], few))
    names = {launch.name for launch in found}
    assert ("attention_hopper_kernel" in names) == (kernel == "hopper")
    assert ("backward_keys_hopper_kernel" in names) == (kernel == "hopper_backward")


@pytest.mark.parametrize(
    ("switch", "device", "chosen"),
    [
        ("1", launches.HOPPER, True),
        *((switch, launches.HOPPER, False) for switch in ("0", "")),
        *(("1", device, False) for device in ((80, 108), (100, 148))),
    ],
)
@pytest.mark.filterwarnings("ignore:GRIT_KERNELS_HOPPER=1, but")
def test_the_switch_alone_chooses_the_hopper_kernels(
    switch: str, device: tuple[int, int], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_KERNELS_HOPPER", switch)
    for regime in REGIMES[:3]:  # packed, with gradients, with windows
        problem = Problem(regime, "meta")
        with recorded(device) as found, torch.set_grad_enabled(regime.backward):
            attention.variants(problem, ["grit"])["grit"]()
        names = {launch.name for launch in found}
        for ours, others in (
            ("attention_hopper_kernel", "attention_forward_kernel"),
            ("backward_keys_hopper_kernel", "backward_keys_kernel"),
            ("backward_rows_hopper_kernel", "backward_rows_kernel"),
        ):
            launched = {(ours if chosen else others)} if regime.backward or "forward" in others else set()
            assert names & {ours, others} == launched


def test_only_a_hopper_gpu_compiles_the_hopper_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "record_tests", lambda selected: set())
    names = {launch.name for launch in launches.launches(["hopper"], launches.HOPPER)}
    assert {"attention_hopper_kernel", "backward_keys_hopper_kernel"} <= names
    assert launches.launches(["hopper"], (80, 108)) == []


def launched_by_tests(selected: str) -> set[launches.Launch]:
    with recorded(launches.HOPPER):
        return launches.record_tests(selected)


def test_a_test_of_a_gpu_launches_what_was_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    name = "test_any_call_equals_the_reference_forward_and_backward[2]"
    found = launched_by_tests(f"-m gpu -p no:cacheprovider '{gpu.TESTS}::{name}'")
    call = draw_call(
        random.Random(2).choice,
        lengths=(0, 1, 5, 64, 129, 300, 700),
        dims=(32, 64, 72, 80, 96, 128, 192, 256, 512),
        dtype=torch.bfloat16,
        windows=(-1, -1, 0, 20, 200),
    )
    with recorded(launches.HOPPER, device="cpu") as expected:
        for deterministic in (True, False):
            backward = functools.partial(triton_backward.attention_backward, deterministic=deterministic)
            results(call, triton_forward.attention_forward, backward, [call.q, call.k, call.v, call.grad_out])
    assert found == expected and len(found) > 4
    assert "did not run to its end" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_test_that_ends_early_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_of_a_test.py"
    file.write_text("import torch\n\ndef test_x():\n    torch.zeros(3, device='cuda')[5]\n")
    assert launched_by_tests(f"-p no:cacheprovider {file}") == set()
    printed = capsys.readouterr().out
    assert "test_of_a_test.py::test_x did not run to its end" in printed and "IndexError" in printed
    with pytest.raises(RuntimeError, match="bench.gpu_tests: "):
        launched_by_tests(f"--no-such-option {file}")


@pytest.mark.slow
def test_all_tests_of_the_hopper_kernels_are_recorded_to_their_end(capsys: pytest.CaptureFixture[str]) -> None:
    names = {launch.name for launch in launched_by_tests(gpu.TESTS_OF_HOPPER)}
    assert "did not run to its end" not in capsys.readouterr().out
    assert {"attention_hopper_kernel", "backward_keys_hopper_kernel", "backward_rows_hopper_kernel"} <= names
    assert not names & {"attention_forward_kernel", "backward_keys_kernel", "backward_rows_kernel"}


@pytest.mark.slow
def test_all_tests_of_a_gpu_are_recorded_to_their_end(capsys: pytest.CaptureFixture[str]) -> None:
    names = {launch.name for launch in launched_by_tests(gpu.TESTS_OF_GPU)}
    assert "did not run to its end" not in capsys.readouterr().out
    assert {"attention_decode_kernel", "backward_rows_kernel", "contrastive_weights_kernel", "pool_bwd_kernel"} < names
    assert {"rotary_kernel", "norm_bwd_kernel", "gated_bwd_kernel", "merge_splits_kernel"} < names


def test_each_contender_of_the_tuning_is_compiled_once() -> None:
    found = compiled(lambda: launches.record_tuning(["forward"], [64]))
    forward = [json.loads(launch.data) for launch in found if launch.name == "attention_forward_kernel"]
    contenders = attention_tune.contenders("forward", 64)
    assert len(forward) == len(contenders) == len(set(contenders)) > 4
    other = contenders[0]._replace(stages=9)
    assert attention_tune.tried("forward", 64, True, other) == [other, *contenders], (
        "the entry of this GPU's table first"
    )


def test_another_gpu_another_launch_and_only_inside() -> None:
    before = triton_forward.processor_count
    regimes = REGIMES[:1]
    targets = set()
    for device in (launches.HOPPER, (80, 108)):
        with recorded(device) as found:
            launches.record_attention(regimes)
        targets.add(frozenset(found))
        assert {json.loads(launch.data)["target"]["arch"] for launch in found} == {device[0]}
    assert len(targets) == 2
    assert triton_forward.processor_count is before
    problem = Problem(attention.same("x", 8, 1, True, SHAPE, dtype=torch.float32), "cpu")
    assert attention.variants(problem, ["grit"])["grit"]().isfinite().all(), "the CPU's kernels serve again"


def test_every_group_is_there_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(GROUPS) == {
        *(
            "correctness",
            "hopper",
            "attention",
            "tuning",
            "tuning_all",
            "pooling",
            "contrastive",
            "unified",
            "twins",
            "tests",
        ),
    }
    with pytest.raises(SystemExit):
        launches.main(["--groups", "attention,typo"])
    assert "--groups: expected some of correctness, attention, tuning" in capsys.readouterr().err


@pytest.mark.aot
def test_what_is_compiled_is_what_a_launch_finds_in_tritons_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    group = functools.partial(launches.record_pooling, [(64, 64, 4)])
    broken = launches.Launch("grit_kernels.pooling.triton_pooling", "no_such_kernel", "{}")
    failures = launches.compile_all([*sorted(compiled(group)), broken], 1, launches.HOPPER)
    assert len(failures) == 1 and failures[0].startswith("no_such_kernel: AttributeError")
    files = set(tmp_path.rglob("*"))
    assert any(file.name == "pool_fwd_kernel.cubin" for file in files)
    real = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return real(self, *args, grid=grid, warmup=True, **options)

    with recorded(launches.HOPPER):
        monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
        monkeypatch.setattr(JITFunction, "run", compile_only)
        group()
    assert set(tmp_path.rglob("*")) == files, "a launch had to compile"


def test_tensors_without_data_are_not_served_by_launchers_outside() -> None:
    pooled = gk.pool(torch.empty(8, 16, device="meta"), cu_seqlens=torch.tensor([0, 8], device="meta"))
    assert pooled.device.type == "meta" and pooled.shape == (1, 16)
