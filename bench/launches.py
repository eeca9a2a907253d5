"""The Triton kernels that the GPU benchmarks launch: found without a GPU, compiled in parallel.

    python -m bench.launches [--groups attention,pooling] [--jobs 16]      # fills Triton's cache before anything is measured

A group runs a benchmark's own calls on the meta device, whose tensors have shapes but no data. The launchers run as they are; at
each launch Triton says which variant of which kernel it would compile (its ``jit_cache_hook``), and this is recorded instead.
Compiling needs no GPU either, so all cores compile before the first measurement, and no measurement waits for a compiler.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bench import attention, attention_tune, common, contrastive, correctness, cuda_twin, pooling, unified
from bench.attention_peers import Problem
from bench.gpu import TESTS_OF_GPU, TESTS_OF_HOPPER
from bench.random_model import random_model
from grit_kernels import triton_launch
from grit_kernels.attention import triton_backward, triton_forward  # noqa: F401  (patched below: imported before)
from grit_kernels.attention.triton_configs import KERNELS
from grit_kernels.contrastive import triton_contrastive  # noqa: F401
from grit_kernels.fused import triton_fused  # noqa: F401
from grit_kernels.pooling import triton_pooling  # noqa: F401

OURS = ("grit", "grit, two launches", "grit, atomics")
HOPPER = (90, 132)
"""Compute capability and number of multiprocessors, if this machine has no GPU to ask."""


class Launch(NamedTuple):
    """A variant of a kernel: where the kernel is defined, its name, and Triton's own description of the variant."""

    module: str
    name: str
    data: str


class _Driver:
    """What Triton asks its driver for before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> str:
        return f"ahead of time, {self.target.arch}"  # kernels are cached per device: never mix them with those of a real one

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _Launchers(TorchDispatchMode):
    """Runs this package's launchers on tensors of ``device``: on meta torch would only ask for the shapes of results."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # other tensors, such as those of a check by patch(), take the usual path
        ours = function.namespace == "grit_kernels" and any(
            isinstance(x, torch.Tensor) and x.device.type == self.device for x in args
        )
        if ours and torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CUDA"):
            return function._op_dk(torch._C.DispatchKey.CUDA, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def this_gpu() -> tuple[int, int]:
    """Compute capability (90 for 9.0) and number of multiprocessors."""
    if not torch.cuda.is_available():
        return HOPPER
    found = torch.cuda.get_device_properties(0)
    return 10 * found.major + found.minor, found.multi_processor_count


def _architecture(capability: int) -> str:
    """The name that triton_launch.architecture gives it."""
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(capability // 10, "sm80")


@contextlib.contextmanager
def _ahead_of_time(capability: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def recorded(gpu: tuple[int, int] | None = None, device: str = "meta") -> Iterator[set[Launch]]:
    """Within the block, ops on tensors of ``device`` call the launchers for a GPU (compute capability, number of
    multiprocessors), and every launch of a Triton kernel is added to the set."""
    capability, processors = gpu or this_gpu()
    found: set[Launch] = set()

    def note(fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.add(Launch(fn.module, fn.name, compile["specialization_data"]))
        return True  # neither compile nor launch

    answers = {"processor_count": lambda device: processors, "architecture": lambda device: _architecture(capability)}
    with contextlib.ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("grit_kernels.")]:
            for name, answer in answers.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, answer))
        for choices in sys.modules["grit_kernels.backend"]._choices.values():  # the attribute is the function backend()
            stack.enter_context(mock.patch.dict(choices, {device: choices["cuda"]}))
        if device == "meta":  # lets results that do not exist be compared
            stack.enter_context(mock.patch.object(torch.Tensor, "__float__", lambda self: 0.0))
        stack.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note))
        stack.enter_context(_ahead_of_time(capability))
        stack.enter_context(_Launchers(device))
        yield found


def record_attention(regimes: Sequence[attention.Regime] | None = None) -> None:
    for regime in attention.gpu_regimes() if regimes is None else regimes:
        with torch.set_grad_enabled(regime.backward):
            for run in attention.variants(Problem(regime, "meta"), OURS).values():
                run()


def record_tuning(kernels: Sequence[str] = ("forward",), dims: Sequence[int] = (64, 128), few: bool = True) -> None:
    for kernel, dim in itertools.product(kernels, dims):
        for _, problem in attention_tune.problems(kernel, dim, "meta"):
            run = attention_tune.call(problem, kernel)
            table = attention_tune.table_entry(kernel, dim, problem.q.device)
            for config in attention_tune.tried(kernel, dim, few, table):
                with attention_tune.trying(kernel, config):
                    run()


def record_correctness() -> None:
    for problem in correctness.problems():
        for deterministic in (True, False):
            correctness.gradients(correctness.inputs(problem, "meta"), deterministic=deterministic)


def record_pooling(shapes: Sequence[tuple[int, int, int]] | None = None) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in pooling.shapes("cuda") if shapes is None else shapes:
            for name, run in pooling.variants("meta", shape, dtype).items():
                if name.startswith("grit"):
                    run()


def record_contrastive(shapes: Sequence[tuple[int, int, int]] | None = None) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in contrastive.shapes("cuda") if shapes is None else shapes:
            given = contrastive.inputs("meta", shape, dtype)
            with torch.no_grad():
                contrastive.ours(*given)
            torch.autograd.grad(contrastive.ours(*given), given[:2])


def record_unified(shape: str = "mistral-7b", scale: float = 1.0) -> None:
    plain = random_model(shape, device="meta", dtype=torch.bfloat16)
    runs = unified.packed_runs(plain, unified.make_batch(4, 4, scale, "meta", plain.config.vocab_size))
    for run in runs.values():
        run()


def record_twins() -> None:
    with torch.no_grad():
        for run in cuda_twin.problems("meta").values():
            run()


def record_tests(selected: str = TESTS_OF_GPU) -> set[Launch]:
    """What the tests launch; they run in a process of their own, see bench/gpu_tests.py."""
    gpu = driver.active.get_current_target().arch, triton_forward.processor_count(torch.device("meta"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches.json"
        options = ["-p", "bench.gpu_tests", "--gpu", ",".join(map(str, gpu)), "--launches", str(path), "--assert=plain"]
        command = [sys.executable, "-O", "-m", "pytest", *options, *shlex.split(selected)]
        paths = os.pathsep.join([str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # -O also leaves out the assertions of pytest's other plugins, which need not work without
        environment = {**os.environ, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        run = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True, check=False)
        if not path.exists():
            raise RuntimeError(f"bench.gpu_tests: {(run.stdout + run.stderr)[-500:]}")
        found = json.loads(path.read_text(encoding="utf-8"))
    for test, why in found["ended_early"].items():
        print(f"{test} did not run to its end, and may launch more: {why}")
    return {Launch(*launch) for launch in found["launches"]}


def record_hopper() -> set[Launch]:
    """What GRIT_KERNELS_HOPPER=1 adds on such a GPU."""
    if triton_launch.architecture(torch.device("cuda")) != "sm90":
        return set()
    record_tuning(list(attention_tune.HOPPER_KERNELS), few=False)
    return record_tests(TESTS_OF_HOPPER)


GROUPS: dict[str, Callable[[], set[Launch] | None]] = {
    "correctness": record_correctness,
    "attention": record_attention,
    "tuning": record_tuning,
    "tuning_all": functools.partial(record_tuning, KERNELS, (64, 128, 256), few=False),
    "hopper": record_hopper,
    "pooling": record_pooling,
    "contrastive": record_contrastive,
    "unified": record_unified,
    "twins": record_twins,
    "tests": record_tests,
}


def launches(names: Sequence[str], gpu: tuple[int, int] | None = None) -> list[Launch]:
    """The variants that the groups launch, in order, each once."""
    found: dict[Launch, None] = {}
    for name in names:
        with recorded(gpu) as group:
            group |= GROUPS[name]() or set()
        found.update(dict.fromkeys(sorted(group)))
    return list(found)


def _compile(launch: Launch, capability: int) -> str:
    """Compile into Triton's cache; returns what went wrong, or an empty text."""
    with _ahead_of_time(capability):
        try:
            getattr(importlib.import_module(launch.module), launch.name).preload(launch.data)
        except Exception as error:  # a variant that does not compile becomes a line of the report
            return f"{launch.name}: {attention.reason(error)}"
    return ""


def compile_all(found: Sequence[Launch], jobs: int, gpu: tuple[int, int] | None = None) -> list[str]:
    """Compile in ``jobs`` processes; returns the failures."""
    capability, _ = gpu or this_gpu()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return [error for error in pool.map(_compile, found, [capability] * len(found)) if error]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__.splitlines()[0])
    everything = ",".join(name for name in GROUPS if name != "tuning_all")
    parser.add_argument("--groups", default=everything, help=f"of {', '.join(GROUPS)}; default: all but tuning_all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(argv)
    names = arguments.groups.split(",")
    if unknown := sorted(set(names) - set(GROUPS)):
        parser.error(f"--groups: expected some of {', '.join(GROUPS)}, got {', '.join(unknown)}")
    start = time.monotonic()
    found = launches(names)
    print(f"{len(found)} variants of kernels, found in {time.monotonic() - start:.0f} s", flush=True)
    failures = compile_all(found, arguments.jobs)
    print(f"{len(found) - len(failures)} of {len(found)} are in Triton's cache, {time.monotonic() - start:.0f} s")
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
