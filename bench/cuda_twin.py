"""Each CUDA C++ kernel beside its Triton twin: the same op with the same arguments, in turn.

    python -m bench.cuda_twin [--repeats 11] [--record cuda_twin_cuda.json]

An op ``grit_kernels::NAME`` whose CUDA C++ kernel is ``grit_kernels::NAME_cuda`` is found by calling this package's functions and
recording what they call. Without the compiled CUDA library there is nothing to compare.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import attention, common
from grit_kernels.hf.attention_pass import AttentionPass
from grit_kernels.hf.interface import grit_attention, grit_mask

COLUMNS = ["op", "problem", "variant", "milliseconds", "times_triton", "note"]


class _Calls(TorchDispatchMode):
    """Records the arguments of each op of this package that has a twin."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "grit_kernels" and twin(function) is not None:
            self.found[function.name()] = (function, args)
        return function(*args, **(kwargs or {}))


def twin(function: Any) -> Any:
    """The op of the CUDA C++ kernel; None if there is none or the library is not loaded."""
    name = f"{function.name()}_cuda"
    try:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            return None
    except RuntimeError:  # there is no such op
        return None
    return getattr(torch.ops.grit_kernels, name.removeprefix("grit_kernels::"))


def problems(device: str) -> dict[str, Callable[[], Any]]:
    """Calls that reach every op with a twin."""
    runs: dict[str, Callable[[], Any]] = {}
    for batch, cache in ((1, 4096), (8, 32768), (64, 4096)):
        for padded in (False, True):
            name = f"decode B{batch} cache {cache}{' with holes' if padded else ''}"
            runs[name] = decoding_layer(device, batch, cache, padded)
    return runs


def decoding_layer(device: str, batch: int, cache: int, padded: bool) -> Callable[[], Any]:
    """A layer's call by transformers, of 32 query heads over 8; ``padded``: a tenth of the cache's slots hold no key."""
    query, key, value = (
        torch.randn(batch, heads, rows, 128, device=device, dtype=torch.bfloat16)
        for heads, rows in ((32, 1), (8, cache), (8, cache))
    )
    real = torch.rand(batch, cache, device=device) < 0.9
    real[:, -1] = True
    mask = grit_mask(batch, 1, cache, cache - 1, attention_mask=real if padded else None, device=device)
    grit_pass = AttentionPass(torch.ones(batch, dtype=torch.bool, device=device))
    module = torch.nn.Module()
    return lambda: grit_attention(module, query, key, value, mask, grit_pass=grit_pass)


def measure(device: str, repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for problem, run in problems(device).items():
        with _Calls() as calls:
            run()
        for name, (function, args) in calls.found.items():
            ops = {"triton": function, "cuda": twin(function)}
            variants = {kind: functools.partial(op, *args) for kind, op in ops.items()}
            results = [variants[kind]() for kind in variants]
            row: dict[str, Any] = {"op": name.removeprefix("grit_kernels::"), "problem": problem}
            pairs = [[r] if isinstance(r, torch.Tensor) else [x for x in r if x.is_floating_point()] for r in results]
            error = max(attention.relative_error(a, b) for a, b in zip(*pairs, strict=True))
            if error > 0.01:
                rows.append({**row, "variant": "cuda", "note": f"differs from its twin: relative error {error:.3g}"})
                continue
            seconds = common.interleave_events(variants, repeats)
            middle, ratios = common.medians(seconds), common.ratios(seconds, "triton")
            for kind in variants:
                figures = {"milliseconds": middle[kind] * 1e3, "times_triton": ratios[kind], "seconds": seconds[kind]}
                rows.append({**row, "variant": kind, **figures})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_twin", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--record", help="JSON file, a bare name goes into bench/results/KIND")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = measure("cuda", arguments.repeats)
    if not rows:
        raise SystemExit(
            "bench.cuda_twin: expected the compiled CUDA library (GRIT_KERNELS_CUDA=1 at pip install), got none"
        )
    print(common.table(rows, COLUMNS))
    if arguments.record:
        common.write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
