"""The Hopper backward in Gluon without a GPU: its arithmetic and its barriers on paper, its machine code, when it is chosen."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grit_kernels.attention import reference
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.backend import interpreting

if interpreting():
    pytest.skip("Gluon has no interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from grit_kernels.attention.triton_common import positive_scale  # noqa: E402

keys_kernel = pytest.importorskip("grit_kernels.attention.hopper_backward_keys", reason="this Triton has another Gluon")
from tests.grit_kernels.ahead_of_time import Compiled  # noqa: E402
from tests.grit_kernels.attention import hopper_paper, samples  # noqa: E402
from tests.grit_kernels.attention.barrier_model import Model, changed, operations  # noqa: E402
from tests.grit_kernels.attention.compiled import compile_hopper  # noqa: E402
from tests.grit_kernels.attention.hopper_paper import Record, base_name  # noqa: E402
from tests.grit_kernels.attention.samples import one_sample  # noqa: E402

BLOCK = keys_kernel.BLOCK
MANY = 64
"""Places of a ring that hold all blocks of a sample here: on paper the producer runs first."""


def on_paper(call: samples.Call, sinks: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """dk and dv of the kernel, of the reference in float64, and of the reference in the inputs' dtype."""
    q, scale = positive_scale(call.q, call.problem.softmax_scale)
    out, lse = reference.attention_forward(*call.clean(torch.float64)[:3], call.problem, sinks)
    statistics = hopper_paper.row_statistics(call.grad_out, call.grad_lse, out.to(q.dtype), lse)
    problem = replace(call.problem, softmax_scale=scale)
    found = hopper_paper.backward_keys(q, call.k, call.v, call.grad_out, statistics, problem, MANY)[:2]
    expected = []
    for dtype in (torch.float64, q.dtype):
        *inputs, grad_out = call.clean(dtype)
        given = reference.attention_forward(*inputs, call.problem, sinks)
        expected.append(
            reference.attention_backward(grad_out, call.grad_lse, *inputs, *given, call.problem, sinks)[1:3]
        )
    return list(found), *map(list, expected)


def assert_right_on_paper(call: samples.Call, sinks: Tensor | None = None) -> None:
    """Twice the error of the reference in the inputs' dtype, and a few roundings."""
    eps = torch.finfo(call.q.dtype).eps
    for name, ours, right, rounded in zip(("dk", "dv"), *on_paper(call, sinks), strict=True):
        assert ours.isfinite().all(), name
        error, allowed = ((x.double() - right).norm() for x in (ours, rounded))
        # a scale of 0 is 1e-30 in the kernel
        assert error <= 2 * allowed + eps * right.norm() + 1e-20, (name, error / right.norm(), allowed / right.norm())


@pytest.mark.parametrize("seed", range(16))
def test_any_call_equals_the_reference(seed: int) -> None:
    call = hopper_paper.drawn(seed, (0, 1, 5, 64, 129, 300))
    if call.k.shape[0] and call.q.shape[0]:
        assert_right_on_paper(call)


@pytest.mark.parametrize("seed", range(2))
def test_with_sinks_the_probabilities_are_smaller(seed: int) -> None:
    call = hopper_paper.drawn(seed, (1, 5, 64, 129, 300))
    sinks = torch.cat([torch.tensor([3.0, -200.0]), torch.randn(call.q.shape[1])])[: call.q.shape[1]]
    assert_right_on_paper(call, sinks.to(call.q.dtype))


def test_rows_that_see_no_key_may_hold_anything() -> None:
    torch.manual_seed(0)
    q, k, v, grad_out = (torch.randn(n, 1, 64, dtype=torch.bfloat16) for n in (300, 40, 40, 300))
    problem = one_sample(300, 40, right=200)
    q[:60] = grad_out[:60] = torch.nan
    used = torch.ones(300, dtype=torch.bool)
    assert_right_on_paper(samples.Call(q, k, v, grad_out, None, problem, used & (torch.arange(300) >= 60), used[:40]))


class Tile(NamedTuple):
    """``order``: of the blocks of rows as they come; ``cleaned``: which steps' blocks hold rows that see no key."""

    problem: AttentionProblem
    order: list[int]
    cleaned: set[int]
    group: int = 1


TILES = {
    "one block": Tile(one_sample(64, 128), [0], set()),
    "part of a block": Tile(one_sample(50, 100), [0], {0}),
    "no row": Tile(replace(one_sample(64, 128), hi=torch.zeros(64, dtype=torch.int32)), [0], {0}),
    "two blocks": Tile(one_sample(128, 128), [0, 1], set()),
    "two heads": Tile(one_sample(100, 128), [0, 0, 1, 1], {2, 3}, 2),
    "causal": Tile(one_sample(192, 128, right=0), [1, 2], set()),
    "causal after a cache": Tile(one_sample(150, 128, right=0), [0, 1, 2], {0, 2}),
    "edges with rows that see nothing at both ends": Tile(one_sample(300, 40, right=200), [2, 3, 0, 1, 4], {2, 4}),
}


def recorded(tile: Tile, stages: int) -> Record:
    """Of the only program of a tile."""
    torch.manual_seed(0)
    rows, keys = int(tile.problem.q_len), int(tile.problem.k_len)
    q, k = torch.randn(rows, tile.group, 64).bfloat16(), torch.randn(keys, 1, 64).bfloat16()
    statistics = torch.zeros(tile.group, rows, 4)
    (record,) = hopper_paper.backward_keys(q, k, k, q, statistics, tile.problem, stages)[2]
    return record


def fault(record: Record, tile: Tile) -> str:
    """Expects that products and loads read what belongs to their step."""

    def holds(name: str, step: int) -> tuple[Any, ...]:
        head = tile.order[:step].count(tile.order[step])
        return (name, tile.order[step] * BLOCK, head * 64, *(("clean",) if step in tile.cleaned else ()))

    expected = []
    for consumer, listed in enumerate(record.partitions[:2]):
        found: list[tuple[Any, ...]] = []
        step = -1
        for kind, *rest in listed:
            if kind == "load":
                found.append(((base_name(rest[0]), step),))
            elif kind == "multiply":
                read = tuple(map(base_name, rest[0]))
                step += read == ("k_tiles", "q_ring")
                found.append(
                    {
                        ("k_tiles", "q_ring"): (("k", consumer * 64, 0), holds("q", step)),
                        ("v_tiles", "do_ring"): (("v", consumer * 64, 0), holds("do", step)),
                        ("do_ring",): (holds("do", step),),
                        ("q_ring",): (holds("q", step),),
                    }[read]
                )
        expected.append(tuple(found))
    return Model(record, expected, turns=False).fault()


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("stages", [2, 3])
def test_every_order_of_the_partitions_reads_the_right_blocks_and_ends(name: str, stages: int) -> None:
    assert fault(recorded(TILES[name], stages), TILES[name]) == ""


def test_a_ring_of_one_place_is_too_small() -> None:
    """The rows of a step are read by the next one's first product, which waits for its own rows."""
    assert fault(recorded(TILES["two blocks"], 1), TILES["two blocks"]).startswith("deadlock")


@pytest.fixture(scope="module")
def protocol() -> tuple[Record, Tile]:
    """Of a tile that uses each place of its rings twice, and cleans twice."""
    tile = TILES["edges with rows that see nothing at both ends"]
    return recorded(tile, 2), tile


def test_the_model_finds_every_wrong_phase(protocol: Any) -> None:
    record, tile = protocol
    for who, place, (_, barrier, parity), _ in operations(record, "wait"):
        assert fault(changed(record, who, place, ("wait", barrier, 1 - parity)), tile), (who, place, barrier)


def test_the_model_finds_every_missing_wait(protocol: Any) -> None:
    record, tile = protocol
    for who, place, operation, phase in operations(record, "wait"):
        # what a new barrier has behind it need not be waited for
        assert bool(fault(changed(record, who, place, None), tile)) == (phase >= 0), (who, place, operation)


def test_the_model_finds_every_missing_arrival_that_is_waited_for(protocol: Any) -> None:
    record, tile = protocol
    awaited = {(operation[1], phase) for _, _, operation, phase in operations(record, "wait")}
    for who, place, operation, arrival in operations(record, "arrive", "expect"):
        phase = arrival // 2 if operation[1].startswith("rows_full") else arrival
        wrong = bool(fault(changed(record, who, place, None), tile))
        assert wrong == ((operation[1], phase) in awaited), (who, place, operation)


def test_the_model_finds_what_is_read_before_a_product_ends_or_not_cleaned_or_stored(protocol: Any) -> None:
    record, tile = protocol
    for kind in ("finish", "clean", "fence", "store"):
        found = [(who, i, op) for who, ops in enumerate(record.partitions) for i, op in enumerate(ops) if op[0] == kind]
        assert found
        for who, place, operation in found:
            # in the second step every row sees every key
            unread = operation[-1] in (("lo_ring", 1), ("hi_ring", 1))
            assert bool(fault(changed(record, who, place, None), tile)) != unread, (who, place, operation)


STEP = re.compile(r"\bHGMMA|\bWARPGROUP\.DEPBAR\S* \S+ 0x[01]|\bMUFU\.EX2|\bSYNCS\.PHASECHK|\bSYNCS\.ARRIVE|\bF2FP")


def machine_code_of_steps(code: list[str]) -> str:
    """A letter per instruction: product, wait for a barrier, arrival, exponential, packing, wait for products (but how many)."""
    letters = {"H": "h", "M": "e", "SYNCS.P": "b", "SYNCS.A": "a", "F": "p"}
    text = ""
    for match in filter(None, map(STEP.search, code)):
        text += next((letters[start] for start in letters if match[0].startswith(start)), match[0][-1])
    return text


def assert_resources(compiled: Compiled, copies: int) -> None:
    """No stack, rings that fit, and stores that all warps have done before one of them arrives."""
    code = [instruction for _, instruction in compiled.instructions()]
    assert compiled.spilled == 0 and not any(re.search(r"\b(?:LDL|STL)", x) for x in code)
    assert compiled.shared <= 227 << 10
    assert sum("UTMALDG" in x for x in code) == copies
    assert sum("USETMAXREG" in x for x in code) >= 3, "registers go from the producer to the consumers"
    stored = False
    for x in code:
        stored = (stored or "STS" in x) and "BAR.SYNC" not in x
        assert not (stored and "SYNCS.ARRIVE" in x), "an arrival before all warps have stored"


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("dtype", "flags"), [("bf16", False), ("bf16", True), ("fp16", False)])
def test_the_machine_code_of_dk_and_dv_overlaps_as_planned(dim: int, dtype: str, flags: bool) -> None:
    """``flags``: with upper bounds per token."""
    compiled = compile_hopper("hopper_keys", dtype, dim, hi=flags)
    # K and V twice; Q and dO into a block that needs cleaning or not
    assert_resources(compiled, copies=8)
    steps = [x for x in map(machine_code_of_steps, compiled.loops("HGMMA")) if x.count("0") == 1]
    sums, scores, pairs = "h" * (BLOCK // 16), "h" * (dim // 16), BLOCK // 4
    # of each consumer the blocks without and with a mask; P beside dP, dS beside the product that it does not wait for
    for text in steps:
        found = re.fullmatch(rf"{sums}{scores}1a{scores}1([ep]+){sums}1(p+)b0(p*)", text)
        assert found and found[1].count("e") == 2 * pairs, text
        # the assembler leaves a few of the last packings behind the wait
        assert found[1].count("p") == len(found[2] + found[3]) == pairs and len(found[3]) <= 4, text
    assert len(steps) == 4
