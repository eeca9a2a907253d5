"""Ranks: joining the process group, wrapping the model, and the few numbers that ranks must agree on."""

from __future__ import annotations

import contextlib
import datetime
import gc
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from python_model.data.order import rank_share
from python_model.model.chunks import build_chunk
from python_model.model.modeling import GritLM
from python_model.model.prompts import EncodedSample
from python_model.train.config import ParallelConfig
from python_model.train.model import TrainingModel


@dataclass(frozen=True)
class Ranks:
    """This process among the others. ``group`` is None if there is only one process."""

    rank: int
    world: int
    device: torch.device
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's rows of a step: contiguous, and split as evenly as possible."""
        return rank_share(count, self.rank, self.world)

    def all_values(self, values: Sequence[float]) -> Tensor:
        """float64 (world, len(values)): every rank's values, the same on all ranks."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.group is None:
            return mine[None].cpu()
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.stack(parts).cpu()

    def all_lists(self, values: Sequence[int]) -> list[int]:
        """The concatenation of every rank's list, in rank order."""
        counts = self.all_values([len(values)])[:, 0].long().tolist()
        padded = [*values, *[0] * (max(counts) - len(values))]
        if max(counts) == 0:
            return []
        return [int(x) for row, n in zip(self.all_values(padded), counts, strict=True) for x in row[:n]]

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks (their numbers may differ), in rank order."""
        if self.group is None:
            return rows
        counts = [int(count) for count in self.all_values([rows.shape[0]])[:, 0]]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """This process's rank as set up by torchrun, or a single rank; the process group exists within the block."""
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and "RANK" not in os.environ:
        yield Ranks(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mine = not dist.is_initialized()
    if mine:
        # a slow first compilation or a large checkpoint must not be taken for a dead rank
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)
    finally:
        if mine:
            # shards hold communicators in reference cycles; left until exit, their threads would abort the interpreter
            gc.collect()
            dist.destroy_process_group()


def wrap(model: TrainingModel, config: ParallelConfig, ranks: Ranks, *, bf16: bool) -> nn.Module:
    """The model wrapped for the ranks: itself, DDP or FSDP2. All ranks receive the weights of rank 0."""
    if ranks.group is None:
        return model
    if config.strategy == "ddp":
        # a tied or frozen weight is one parameter for DDP; touch_all gives each weight a gradient on each rank
        devices = [ranks.device.index] if ranks.device.type == "cuda" else None
        # buffers never change, so no forward has to send them; torch 2.13 gave the switch a new name
        new = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
        unsent: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, **unsent)
    return _shard(model, config, ranks, bf16)


def _shard(model: TrainingModel, config: ParallelConfig, ranks: Ranks, bf16: bool) -> nn.Module:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    size = config.shard_size or ranks.world
    if ranks.world % size:
        raise ValueError(f"shard_size: expected a divisor of the {ranks.world} ranks, got {size}")
    shape, names = (
        ((ranks.world,), ("shard",)) if size == ranks.world else ((ranks.world // size, size), ("replicate", "shard"))
    )
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    options: dict[str, Any] = {"mesh": mesh}
    if bf16:
        # float inputs of a layer are hidden states; rotary tables keep the dtype the model gave them
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    full = model.state_dict() if ranks.first else {}
    buffers = dict(model.named_buffers())
    for layer in layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device="cpu" if config.cpu_offload else ranks.device)
        move_buffers(model, ranks.device)
        buffers = dict(model.named_buffers())
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in buffers.values():
        dist.broadcast(buffer.data, 0, group=ranks.group)
    return model


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers alone, as FSDP does on the rank that has weights: offloading concerns parameters, and of a broadcast whose
    tensors lie on different devices, each side would wait in a backend of its own."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def layers(model: TrainingModel) -> list[nn.Module]:
    """The decoder's layers, in order."""
    decoder = model.grit.decoder[0]
    found = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if found is None:
        raise TypeError(f"model: {type(decoder).__name__} has neither 'layers' nor 'h'")
    return list(found)


class ForwardsApart:
    """The ranks, while each calls a decoder with sharded weights any number of times.

    A forward over shards needs all ranks. So each announces its forwards, and a rank that waits for the others (in
    :meth:`all_rows`, or at the end) runs empty ones until nobody announces any more.
    """

    def __init__(self, grit: GritLM, ranks: Ranks) -> None:
        self.grit, self.ranks, self._waiting = grit, ranks, False

    def share(self, count: int) -> range:
        """As :meth:`Ranks.share`."""
        return self.ranks.share(count)

    def all_rows(self, rows: Tensor) -> Tensor:
        """As :meth:`Ranks.all_rows`, once all have done their forwards."""
        self.wait()
        return self.ranks.all_rows(rows)

    def announce(self, *_: Any) -> None:
        """Called when a forward pass of this rank begins."""
        if not self._waiting:
            self._anyone(1)

    def wait(self) -> None:
        """Take part in the forward passes of the others until they are done."""
        self._waiting = True
        nothing = build_chunk([EncodedSample([0])], []).to(self.ranks.device)
        while self._anyone(0):
            self.grit.hidden_states(nothing.input_ids, nothing.pack)
        self._waiting = False

    def _anyone(self, forwards: int) -> bool:
        return bool(self.ranks.all_values([forwards])[:, 0].any())


@contextlib.contextmanager
def forwards_apart(model: nn.Module, ranks: Ranks) -> Iterator[Ranks | ForwardsApart]:
    """Within the block, the ranks may call parts of ``model`` (a wrapped TrainingModel that has been trained) any number of
    times each, without gradients, and exchange data through the object it yields."""
    if not hasattr(model, "set_requires_gradient_sync"):  # every rank has all weights
        yield ranks
        return
    sharded = cast(Any, model)
    apart = ForwardsApart(sharded.grit, ranks)
    sharded.unshard()  # embeddings, heads and the last norm, which only a forward of the whole model gathers by itself
    hook = apart.grit.decoder[0].register_forward_pre_hook(apart.announce)
    try:
        yield apart
        apart.wait()
    finally:
        hook.remove()
        sharded.reshard()


@contextlib.contextmanager
def gradient_sync(model: nn.Module, reduce: bool) -> Iterator[None]:
    """Within the block, backward sums gradients over the ranks or, if not ``reduce``, only adds to this rank's."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if reduce else model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        cast(Any, model).set_requires_gradient_sync(reduce)
    yield
