"""run_on_devices: distributes batches over copies of a model, one thread per device."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def run_on_devices(
    model: Any,
    batches: Sequence[Batch],
    work: Callable[[Any, Batch], Result],
    devices: Sequence[str | torch.device] | None = None,
) -> Iterator[tuple[Batch, Result]]:
    """Yields ``(batch, work(copy of model, batch))`` for each batch as it finishes; without ``devices`` in order, on ``model``.

    The first device that is the model's own uses the model itself. An error in a batch is raised here, and no further batch is
    started.

    Raises:
        ValueError: ``devices`` is empty, or the model is loaded for training (the copies would receive the gradients).
    """
    if devices is None:
        for batch in batches:
            yield batch, work(model, batch)
        return
    if not devices:
        raise ValueError("devices: expected at least one device, got an empty list")
    if not model.is_inference:
        raise ValueError(f"devices: expected None for a model with is_inference=False, got {list(devices)}")
    idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
    own_is_free = True
    for device in devices:
        if own_is_free and torch.empty(0, device=device).device == model.device:
            idle.put(model)
            own_is_free = False
        else:
            idle.put(copy.deepcopy(model).to(device))

    def run(batch: Batch) -> Result:
        chosen = idle.get()
        try:
            return work(chosen, batch)
        finally:
            idle.put(chosen)

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = {pool.submit(run, batch): batch for batch in batches}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
