"""The process group of a test that runs on several ranks."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from python_model.support.quiet import KNOWN_WARNINGS


@contextlib.contextmanager
def process_group(rank: int, world: int, store: str | Path) -> Iterator[dist.ProcessGroup]:
    """Rank ``rank`` of ``world`` in a Gloo group that meets at the new file ``store``; one thread computes in each rank,
    and deprecated calls are errors.

    The group ends when all ranks are done, and after the garbage: shards hold communicators in reference cycles, and those
    that are left until exit abort the interpreter with their threads.
    """
    # a process of its own does not have pytest's filters
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("error", category)
    # torch.utils.mkldnn, which torch.compile's CPU backend imports, is written with it
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    for category, text in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", text, category)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
