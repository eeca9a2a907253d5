"""Runs the Hopper kernel's own source on paper: torch for its arithmetic, a record of what it does to barriers and buffers.

Gluon has no interpreter. The partitions run one after the other, the producer first, so results are right where the rings hold
all blocks; the record holds for rings of any size, as no partition's order of operations depends on another's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import hopper_forward, triton_common, triton_plan
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.attention.triton_common import int32_tables, softmax_constants

ALLOCATED = ("q_tiles", "k_ring", "v_ring", "q_full", "v_raw", "k_full", "k_empty", "v_full", "v_empty", "turns")
Operation = tuple[Any, ...]


@dataclass
class Pointer:
    numbers: Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.numbers.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.numbers, self.offset + offset)


@dataclass
class Tile:
    """A buffer or a barrier, or one place of a ring of them."""

    name: str
    dtype: torch.dtype
    values: Any

    def index(self, at: Any) -> Tile:
        at = int(at)
        return Tile(f"{self.name}[{at}]", self.dtype, self.values[at])

    def permute(self, order: Any) -> Tile:
        return Tile(self.name, self.dtype, self.values.permute(order))

    def slice(self, start: int, length: int) -> Tile:
        return Tile(self.name, self.dtype, self.values[start : start + length])

    def load(self, layout: Any) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        self.values.copy_(values)


@dataclass
class Descriptor:
    name: str
    matrix: Tensor
    block: tuple[int, int]
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype


def _pair(function: Any) -> Any:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    offset = torch.as_tensor(pointer.offset)
    if mask is None:
        return pointer.numbers[offset]
    return torch.where(mask, pointer.numbers[torch.where(mask, offset, 0)], other)


def _store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    offset, mask = torch.broadcast_tensors(pointer.offset, mask)
    pointer.numbers[offset[mask]] = values[mask]


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool) or torch.as_tensor(condition).dim() == 0:
        return a if condition else b
    return torch.where(condition, a, b)


class _Language(SimpleNamespace):
    """gluon.language and triton.language; layouts mean nothing here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _language(program: int, tiles: list[Tile], partitions: Any) -> _Language:
    def allocate(dtype: Any, shape: list[int], layout: Any) -> Tile:
        barrier = dtype == torch.int64
        tile = Tile(ALLOCATED[len(tiles)], dtype, torch.zeros(shape, dtype=torch.int64 if barrier else dtype))
        tiles.append(tile)
        return tile

    return _Language(
        arange=lambda start, end, layout=None: torch.arange(start, end), static_range=range, program_id=lambda axis: program,
        where=_where, maximum=_pair(torch.maximum), minimum=_pair(torch.minimum), cdiv=lambda a, b: (a + b - 1) // b,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype), zeros_like=torch.zeros_like,
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype), float32=torch.float32,
        int32=torch.int32, int64=torch.int64, load=_load, store=_store, cast=lambda x, dtype: x, constexpr=lambda x: x,
        convert_layout=lambda x, layout: x, allocate_shared_memory=allocate, warp_specialize=partitions,
    )  # fmt: skip


@dataclass
class Record:
    """``counts``: arrivals that end a phase, by barrier. ``partitions``: the operations of the consumers and of the producer."""

    counts: dict[str, int] = field(default_factory=dict)
    partitions: list[list[Operation]] = field(default_factory=list)


def run_program(arguments: dict[str, Any], program: int) -> Record | None:
    """Run one program of attention_hopper_kernel; None if it had no tile."""
    record, log, tiles = Record(), list[Operation](), list[Tile]()

    def copy(descriptor: Descriptor, coordinates: list[Any], barrier: Tile, target: Tile) -> None:
        row, column = map(int, coordinates)
        rows, columns = descriptor.block
        found = descriptor.matrix[row : row + rows, column : column + columns]
        target.values.zero_()
        target.values[: len(found)] = found
        log.append(("copy", barrier.name, target.name, (descriptor.name, row), 2 * rows * columns))

    def multiply(a: Any, b: Tile, total: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
        assert is_async, "a product that waits for itself"
        log.append(("multiply", tuple(x.name for x in (a, b) if isinstance(x, Tile))))
        left = a.values if isinstance(a, Tile) else a
        return left.float() @ b.values.float() + (total if use_acc else 0)

    def wait_for_products(running: int, found: list[Tensor]) -> Any:
        log.append(("finish", running))
        return found[0] if len(found) == 1 else found

    def clean(values: Tile, *rest: Any) -> None:
        log.append(("clean", values.name))
        functions["clean_values"](values, *rest)

    def softmax(*given: Any) -> Any:
        log.append(("softmax",))
        return functions["softmax_step"](*given)

    def partitions(found: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        assert [function.__name__ for function, _ in found] == ["consume", "consume", "produce"]
        logs = []
        for function, given in reversed(found):
            log.clear()
            function(*given)
            logs.append([*log, ("end",)])
        record.partitions = logs[::-1]

    names: dict[str, Any] = {
        "gl": (language := _language(program, tiles, partitions)), "tl": language, "copy_tile": copy, "warpgroup_mma": multiply,
        "warpgroup_mma_wait": wait_for_products, "fence_async_shared": lambda: log.append(("fence",)),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: record.counts.update({barrier.name: count}),
            wait=lambda barrier, parity, pred=True: log.append(("wait", barrier.name, int(parity))) if pred else None,
            expect=lambda barrier, size: log.append(("expect", barrier.name, size)),
            arrive=lambda barrier: log.append(("arrive", barrier.name)),
        ),
    }  # fmt: skip
    functions = {
        name: FunctionType(found.fn.__code__, names, name, found.fn.__defaults__)
        for module in (triton_plan, triton_common, hopper_forward)
        for name, found in vars(module).items()
        if hasattr(found, "fn")
    }
    names |= functions | {"clean_values": clean, "softmax_step": softmax}
    functions["attention_hopper_kernel"](**arguments)
    return record if record.partitions else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, stages: int, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Record]]:
    """out, lse and the records of all programs; NaN where nothing was written."""
    tokens, heads, dim = q.shape
    out, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.full((tokens, heads), torch.nan)
    tables = int32_tables(problem)
    blocks = [
        (sample, block)
        for sample, length in enumerate(tables[1].tolist())
        for block in range(-(-max(length, problem.q_rows) // hopper_forward.ROWS))
    ] + [(0, -1)]
    names = ("p_q_start", "p_q_len", "p_k_start", "p_k_len", "p_left", "p_right")
    arguments: dict[str, Any] = {name: Pointer(table.long()) for name, table in zip(names, tables, strict=True)}
    constants = hopper_forward.constants(dim) | {"STAGES": stages}
    each = {"q": constants["ROWS_EACH"], "k": constants["BLOCK"], "v": constants["BLOCK"]}
    for name, x in (("q", q), ("k", k), ("v", v)):
        described = hopper_forward.describe(x, each[name])
        matrix = torch.as_strided(x, described.shape, described.strides)
        arguments[f"{name}_desc"] = Descriptor(name, matrix, tuple(described.block_shape))
        arguments[f"stride_{name}h"] = x.stride(1)
    arguments |= {
        "p_out": Pointer(out.view(-1)), "p_lse": Pointer(lse.view(-1)), "p_sinks": Pointer(lse if sinks is None else sinks),
        "p_table": Pointer(torch.tensor(blocks).view(-1)),
        "p_hi": Pointer(tables[0] if problem.hi is None else problem.hi.long()), "tiles": len(blocks),
        "heads_side_by_side": heads, "q_rows": problem.q_rows, "scale": softmax_constants(problem.softmax_scale, 0.0)[0],
        "HEADS": heads, "GROUP": heads // k.shape[1], "HAS_HI": problem.hi is not None,
        "HAS_SINKS": sinks is not None, **constants,
    }  # fmt: skip
    arguments = {name: arguments[name] for name in hopper_forward.attention_hopper_kernel.arg_names}
    records = [run_program(arguments, program) for program in range(len(blocks) * heads)]
    return out, lse, [record for record in records if record is not None]
