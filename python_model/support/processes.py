"""Work shared by processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextlib.contextmanager
def mapped(limit: int) -> Iterator[Map]:
    """A ``map`` over at most ``limit`` processes, and no more than the machine has cores; below two it is Python's own."""
    processes = min(limit, os.cpu_count() or 1)
    if processes < 2:
        yield map
        return
    # spawn: forking a process that has threads (torch, tokenizers) may deadlock
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield pool.map
