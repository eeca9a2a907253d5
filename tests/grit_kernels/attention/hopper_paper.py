"""Runs the Hopper kernels' own source on paper: torch for its arithmetic, a record of what it does to barriers and buffers.

Gluon has no interpreter. The partitions run one after the other, the producer first, so results are right where the rings hold
all blocks; the record holds for rings of any size, as no partition's order of operations depends on another's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import (
    hopper_backward_keys,
    hopper_backward_rows,
    hopper_common,
    hopper_forward,
    triton_common,
    triton_plan,
)
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.attention.triton_backward import STATISTICS
from grit_kernels.attention.triton_common import int32_tables, softmax_constants
from grit_kernels.visibility import transpose_hi
from tests.grit_kernels.attention import samples

ALLOCATED = {
    "attention_hopper_kernel": (
        *("q_tiles", "k_ring", "v_ring", "q_full", "v_raw", "k_full", "k_empty", "v_full", "v_empty", "turns"),
    ),
    "backward_keys_hopper_kernel": (
        *("k_tiles", "v_tiles", "q_ring", "do_ring", "less_ring", "delta_ring", "lo_ring", "hi_ring"),
        *("tile_full", "rows_full", "rows_empty", "raw"),
    ),
    "backward_rows_hopper_kernel": (
        *("q_tiles", "do_tiles", "k_ring", "v_ring", "tile_full", "raw", "k_full", "empty", "v_full"),
    ),
}
"""By kernel: what it takes of shared memory, in order."""

MODULES = {
    "attention_hopper_kernel": hopper_forward,
    "backward_keys_hopper_kernel": hopper_backward_keys,
    "backward_rows_hopper_kernel": hopper_backward_rows,
}
PLAIN = ("less_ring", "delta_ring", "lo_ring", "hi_ring")
"""Rings of numbers that are stored and loaded, not copied and multiplied."""

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
    log: list[Operation]

    def index(self, at: Any) -> Tile:
        at = int(at)
        return Tile(f"{self.name}[{at}]", self.dtype, self.values[at], self.log)

    def permute(self, order: Any) -> Tile:
        return replace(self, values=self.values.permute(order))

    def slice(self, start: int, length: int) -> Tile:
        return replace(self, values=self.values[start : start + length])

    def load(self, layout: Any) -> Tensor:
        if base_name(self.name) in PLAIN:
            self.log.append(("load", self.name))
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        if (name := base_name(self.name)) in PLAIN:
            stored = sum(operation[0] == "store" and base_name(operation[1]) == name for operation in self.log)
            self.log.append(("store", self.name, (name, stored)))
        self.values.copy_(values)


def base_name(name: str) -> str:
    """Of a place of a ring: the ring's."""
    return name.partition("[")[0]


@dataclass
class Running:
    """A product's sums while it may still write them: nothing but a wait takes them. ``number``: of the consumer's products."""

    values: Tensor
    number: int
    kind: tuple[str, ...]


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


def _language(program: int, names: tuple[str, ...], log: list[Operation], partitions: Any) -> _Language:
    left = iter(names)

    def allocate(dtype: Any, shape: list[int], layout: Any) -> Tile:
        return Tile(next(left), dtype, torch.zeros(shape, dtype=dtype), log)

    return _Language(
        arange=lambda start, end, layout=None: torch.arange(start, end), static_range=range, program_id=lambda axis: program,
        where=_where, maximum=_pair(torch.maximum), minimum=_pair(torch.minimum), cdiv=lambda a, b: (a + b - 1) // b,
        max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2, log2=torch.log2,
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


def run_program(kernel: str, arguments: dict[str, Any], program: int) -> Record | None:
    """Run one program of ``kernel``; None if it had no tile."""
    record, log = Record(), list[Operation]()

    def copy(descriptor: Descriptor, coordinates: list[Any], barrier: Tile, target: Tile) -> None:
        row, column = map(int, coordinates)
        rows, columns = descriptor.block
        assert row >= 0 and column >= 0, (row, column)
        found = descriptor.matrix[row : row + rows, column : column + columns]
        target.values.zero_()
        target.values[: len(found)] = found
        log.append(("copy", barrier.name, target.name, (descriptor.name, row, column), 2 * rows * columns))

    def multiply(a: Any, b: Tile, total: Tensor, use_acc: bool = True, is_async: bool = False) -> Running:
        assert is_async, "a product that waits for itself"
        read = tuple(x.name for x in (a, b) if isinstance(x, Tile))
        number = sum(operation[0] == "multiply" for operation in log)
        log.append(("multiply", read))
        left = a.values if isinstance(a, Tile) else a
        found = left.float() @ b.values.float() + (total if use_acc else 0)
        return Running(found, number, tuple(map(base_name, read)))

    def wait_for_products(running: int, given: list[Any]) -> Any:
        issued = sum(operation[0] == "multiply" for operation in log)
        ended = [x for x in given if isinstance(x, Running)]
        assert all(x.number < issued - running for x in ended), "sums are taken from a product that has not ended"
        log.append(("finish", running))
        log.append(("result", tuple(x.kind for x in ended)))
        found = [x.values if isinstance(x, Running) else x for x in given]
        return found[0] if len(found) == 1 else found

    def clean(name: str) -> Any:
        def logged(*given: Any) -> None:
            log.extend(("clean", x.name) for x in given if isinstance(x, Tile))
            functions[name](*given)

        return logged

    def partitions(found: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        assert sorted(function.__name__ for function, _ in found) == ["consume", "consume", "produce"]
        logs = []
        for function, given in sorted(found, key=lambda pair: pair[0].__name__, reverse=True):
            log.clear()
            function(*given)
            logs.append(list(log))
        record.partitions = [*logs[1:], logs[0]]

    names: dict[str, Any] = {
        "gl": (language := _language(program, ALLOCATED[kernel], log, partitions)), "tl": language,
        "copy_tile": copy, "warpgroup_mma": multiply,
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
        for module in (triton_plan, triton_common, hopper_common, MODULES[kernel])
        for name, found in vars(module).items()
        if hasattr(found, "fn")
    }
    names |= functions | {name: clean(name) for name in ("clean_values", "clean_rows")}
    names["STATISTICS"] = STATISTICS.value
    functions[kernel](**arguments)
    return record if record.partitions else None


def _tables(problem: AttentionProblem) -> dict[str, Any]:
    names = ("p_q_start", "p_q_len", "p_k_start", "p_k_len", "p_left", "p_right")
    tables = int32_tables(problem)
    hi = tables[0] if problem.hi is None else problem.hi
    found = {name: Pointer(table.long()) for name, table in zip((*names, "p_hi"), (*tables, hi), strict=True)}
    return {**found, "HAS_HI": problem.hi is not None}


def _descriptors(rows: dict[str, int], tensors: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, x in tensors.items():
        described = hopper_common.describe(x, rows[name])
        matrix = torch.as_strided(x, described.shape, described.strides)
        found[f"{name}_desc"] = Descriptor(name, matrix, tuple(described.block_shape))
        found[f"stride_{name}h"] = x.stride(1)
    return found


def _tiles(lengths: Tensor, owned: int) -> list[tuple[int, int]]:
    """(sample, block) of a plan; ``owned``: slots of a padded sample."""
    return [
        (sample, block)
        for sample, length in enumerate(lengths.tolist())
        for block in range(-(-max(length, owned) // hopper_common.ROWS))
    ]


def _run(kernel: str, arguments: dict[str, Any], blocks: list[tuple[int, int]], heads: int) -> list[Record]:
    """All programs of a plan of these tiles, and one without any."""
    table = torch.tensor([*blocks, (0, -1)])
    arguments |= {"p_table": Pointer(table.view(-1)), "tiles": len(table), "heads_side_by_side": heads}
    arguments = {name: arguments[name] for name in getattr(MODULES[kernel], kernel).arg_names}
    records = [run_program(kernel, arguments, program) for program in range(len(table) * heads)]
    return [record for record in records if record is not None]


def forward(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, stages: int, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Record]]:
    """out, lse and the records of all programs; NaN where nothing was written."""
    tokens, heads, dim = q.shape
    out, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.full((tokens, heads), torch.nan)
    blocks = _tiles(problem.q_len, problem.q_rows)
    constants = hopper_forward.constants(dim) | {"STAGES": stages}
    each = {"q": constants["ROWS_EACH"], "k": constants["BLOCK"], "v": constants["BLOCK"]}
    arguments = {
        **constants, **_tables(problem), **_descriptors(each, {"q": q, "k": k, "v": v}),
        "p_out": Pointer(out.view(-1)), "p_lse": Pointer(lse.view(-1)), "p_sinks": Pointer(lse if sinks is None else sinks),
        "q_rows": problem.q_rows, "scale": softmax_constants(problem.softmax_scale, 0.0)[0],
        "HEADS": heads, "GROUP": heads // k.shape[1], "HAS_SINKS": sinks is not None,
    }  # fmt: skip
    return out, lse, _run("attention_hopper_kernel", arguments, blocks, heads)


def row_statistics(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """As row_statistics_kernel writes them; NaN where no kernel reads."""
    delta = (grad_out.float() * out.float()).sum(-1) - (0 if grad_lse is None else grad_lse)
    found = torch.full((lse.shape[1], lse.shape[0], STATISTICS.value), torch.nan)
    found[..., 0], found[..., 1] = (lse * -1.4426950408889634).T, -delta.T
    return found


def backward_keys(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, statistics: Tensor, problem: AttentionProblem, stages: int
) -> tuple[Tensor, Tensor, list[Record]]:
    """dk, dv and the records of all programs; NaN where nothing was written."""
    rows, heads, dim = q.shape
    heads_kv = k.shape[1]
    dk, dv = (torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (k, v))
    blocks = _tiles(problem.k_len, problem.k_rows)
    constants = hopper_backward_keys.constants(dim) | {"STAGES": stages}
    copied = {"q": q, "k": k, "v": v, "do": grad_out}
    first_row = problem.q_start if problem.hi is None else transpose_hi(problem.hi, *problem.tables[:4], k.shape[0])
    arguments = {
        **constants, **_tables(problem), **_descriptors(dict.fromkeys(copied, hopper_common.ROWS_EACH), copied),
        "p_dk": Pointer(dk.view(-1)), "p_dv": Pointer(dv.view(-1)), "p_stat": Pointer(statistics.view(-1)),
        "p_first_row": Pointer(first_row.long()), "rows": rows, "k_rows": problem.k_rows,
        "scale": softmax_constants(problem.softmax_scale, 0.0)[0], "HEADS": heads, "GROUP": heads // heads_kv,
    }  # fmt: skip
    return dk, dv, _run("backward_keys_hopper_kernel", arguments, blocks, heads_kv)


def backward_rows(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, statistics: Tensor, problem: AttentionProblem, stages: int
) -> tuple[Tensor, list[Record]]:
    """dq and the records of all programs; NaN where nothing was written."""
    rows, heads, dim = q.shape
    dq = torch.full(q.shape, torch.nan, dtype=q.dtype)
    copied = {"q": q, "k": k, "v": v, "do": grad_out}
    arguments = {
        **hopper_backward_rows.constants(dim), "STAGES": stages, **_tables(problem),
        **_descriptors(dict.fromkeys(copied, hopper_common.ROWS_EACH), copied),
        "p_dq": Pointer(dq.view(-1)), "p_stat": Pointer(statistics.view(-1)), "rows": rows, "q_rows": problem.q_rows,
        "scale": softmax_constants(problem.softmax_scale, 0.0)[0], "softmax_scale": problem.softmax_scale,
        "HEADS": heads, "GROUP": heads // k.shape[1],
    }  # fmt: skip
    return dq, _run("backward_rows_hopper_kernel", arguments, _tiles(problem.q_len, problem.q_rows), heads)


def drawn(seed: int, lengths: tuple[int, ...] = (0, 1, 5, 64, 129, 300, 700)) -> samples.Call:
    """A call that the kernels serve: without a softcap."""
    call = samples.draw_call(
        random.Random(seed).choice,
        lengths=lengths,
        dims=(64, 128),
        dtype=(torch.bfloat16, torch.float16)[seed % 2],
        windows=(-1, -1, 0, 20, 200),
    )
    return replace(call, problem=replace(call.problem, softcap=0.0))
