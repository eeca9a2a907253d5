"""Traces some steps with torch's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from python_model.train.distributed import Ranks

BEFORE = 2
"""Initial steps that are not recorded: they compile, load and allocate once."""


@contextlib.contextmanager
def step_profiler(folder: Path, steps: int, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Records ``steps`` steps of the block after the first two; 0: none. Call what it yields at the end of each step.

    Each rank writes ``profile/rank-0.json`` (for chrome://tracing or Perfetto) and ``profile/rank-0.txt``, the operations
    sorted by time, once the steps are done or when the block ends.
    """
    if not steps:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    target = folder / "profile"
    target.mkdir(parents=True, exist_ok=True)
    cuda = ranks.device.type == "cuda"

    def write(trace: Any) -> None:
        trace.export_chrome_trace(str(target / f"rank-{ranks.rank}.json"))
        by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=by, row_limit=50)
        (target / f"rank-{ranks.rank}.txt").write_text(table, encoding="utf-8")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(
        activities=activities,
        schedule=schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        acc_events=True,
    ) as profiler:
        yield profiler.step
