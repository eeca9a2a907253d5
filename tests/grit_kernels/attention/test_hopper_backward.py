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

common = pytest.importorskip("grit_kernels.attention.hopper_common", reason="this Triton has another Gluon")
from grit_kernels.attention import hopper_backward_keys  # noqa: E402
from tests.grit_kernels.ahead_of_time import Compiled  # noqa: E402
from tests.grit_kernels.attention import hopper_paper, samples  # noqa: E402
from tests.grit_kernels.attention.barrier_model import Model, changed, operations  # noqa: E402
from tests.grit_kernels.attention.compiled import compile_hopper  # noqa: E402
from tests.grit_kernels.attention.hopper_paper import Record, base_name  # noqa: E402
from tests.grit_kernels.attention.samples import one_sample  # noqa: E402

BLOCK = hopper_backward_keys.BLOCK
"""Rows of a step, or keys."""
MANY = 64
"""Places of a ring that hold all blocks of a sample here: on paper the producer runs first."""


def on_paper(call: samples.Call, sinks: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """dq, dk and dv of the kernels, of the reference in float64, and of the reference in the inputs' dtype."""
    q, scale = positive_scale(call.q, call.problem.softmax_scale)
    out, lse = reference.attention_forward(*call.clean(torch.float64)[:3], call.problem, sinks)
    statistics = hopper_paper.row_statistics(call.grad_out, call.grad_lse, out.to(q.dtype), lse)
    given = q, call.k, call.v, call.grad_out, statistics, replace(call.problem, softmax_scale=scale), MANY
    dq = hopper_paper.backward_rows(*given)[0] * (-1 if call.problem.softmax_scale < 0 else 1)
    expected = []
    for dtype in (torch.float64, q.dtype):
        *inputs, grad_out = call.clean(dtype)
        results = reference.attention_forward(*inputs, call.problem, sinks)
        gradients = reference.attention_backward(grad_out, call.grad_lse, *inputs, *results, call.problem, sinks)
        expected.append(list(gradients[:3]))
    return [dq, *hopper_paper.backward_keys(*given)[:2]], expected[0], expected[1]


def assert_right_on_paper(call: samples.Call, sinks: Tensor | None = None) -> None:
    """Twice the error of the reference in the inputs' dtype, and a few roundings."""
    eps = torch.finfo(call.q.dtype).eps
    for name, ours, right, rounded in zip(("dq", "dk", "dv"), *on_paper(call, sinks), strict=True):
        assert ours.isfinite().all(), name
        error, allowed = ((x.double() - right).norm() for x in (ours, rounded))
        # a scale of 0 is 1e-30 in the kernels
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
    """Of the plan's tiles one. ``order``: of the blocks as they come; ``cleaned``: which steps' blocks hold what adds nothing."""

    kernel: str
    problem: AttentionProblem
    order: list[int]
    cleaned: set[int]
    group: int = 1


def unseen(problem: AttentionProblem) -> AttentionProblem:
    return replace(problem, hi=torch.zeros(int(problem.q_len), dtype=torch.int32))


TILES = {
    "keys, one block": Tile("keys", one_sample(64, 128), [0], set()),
    "keys, part of a block": Tile("keys", one_sample(50, 100), [0], {0}),
    "keys, no row": Tile("keys", unseen(one_sample(64, 128)), [0], {0}),
    "keys, two blocks": Tile("keys", one_sample(128, 128), [0, 1], set()),
    "keys, two heads": Tile("keys", one_sample(100, 128), [0, 0, 1, 1], {2, 3}, 2),
    "keys, causal": Tile("keys", one_sample(192, 128, right=0), [1, 2], set()),
    "keys, causal after a cache": Tile("keys", one_sample(150, 128, right=0), [0, 1, 2], {0, 2}),
    "keys, both edges": Tile("keys", one_sample(300, 40, right=200), [2, 3, 0, 1, 4], {2, 4}),
    "rows, one block": Tile("rows", one_sample(128, 64), [0], set()),
    "rows, part of a block": Tile("rows", one_sample(128, 50), [0], {0}),
    "rows, no key": Tile("rows", unseen(one_sample(128, 64)), [0], {0}),
    "rows, two blocks": Tile("rows", one_sample(128, 128), [0, 1], set()),
    "rows, causal after a cache": Tile("rows", one_sample(128, 250, right=0), [0, 1, 2, 3], {3}),
    "rows, both edges": Tile("rows", one_sample(128, 320, 192, 0), [2, 0, 1, 3, 4], set()),
}
SMALLEST_RING = {"keys": 2, "rows": 3}
"""Rows are read into the next step; keys as well, whose end waits for the keys of the one after."""


def recorded(tile: Tile, stages: int) -> Record:
    """Of the only program of a tile."""
    torch.manual_seed(0)
    rows, keys = int(tile.problem.q_len), int(tile.problem.k_len)
    q, k = torch.randn(rows, tile.group, 64).bfloat16(), torch.randn(keys, 1, 64).bfloat16()
    statistics = torch.zeros(tile.group, rows, 4)
    run = {"keys": hopper_paper.backward_keys, "rows": hopper_paper.backward_rows}[tile.kernel]
    (record,) = run(q, k, k, q, statistics, tile.problem, stages)[-1]
    return record


def fault(record: Record, tile: Tile) -> str:
    """Expects that products and loads read what belongs to their step."""

    def holds(name: str, step: int) -> tuple[Any, ...]:
        head = tile.order[:step].count(tile.order[step])
        return (name, tile.order[step] * BLOCK, head * 64, *(("clean",) if step in tile.cleaned else ()))

    expected = []
    for consumer, listed in enumerate(record.partitions[:2]):
        found: list[tuple[Any, ...]] = []
        products: list[tuple[str, ...]] = []
        for kind, *rest in listed:
            if kind == "load":
                # each step begins with a product of the tile and a block
                found.append(((base_name(rest[0]), products.count(products[0]) - 1),))
            elif kind == "multiply":
                read = tuple(map(base_name, rest[0]))
                products.append(read)
                step = products.count(read) - 1
                names = [(name.removesuffix("_tiles"), name.removesuffix("_ring")) for name in read]
                found.append(
                    tuple(
                        (of, consumer * 64, 0) if of != name else holds(ring, step)
                        for (of, ring), name in zip(names, read, strict=True)
                    )
                )
        expected.append(tuple(found))
    return Model(record, expected, turns=False).fault()


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("more", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_order_of_the_partitions_reads_the_right_blocks_and_ends(name: str, more: int) -> None:
    tile = TILES[name]
    assert fault(recorded(tile, SMALLEST_RING[tile.kernel] + more), tile) == ""


@pytest.mark.parametrize(("name", "places"), [("keys, two blocks", 1), ("rows, causal after a cache", 2)])
def test_a_smaller_ring_is_too_small(name: str, places: int) -> None:
    assert SMALLEST_RING[TILES[name].kernel] == places + 1
    assert fault(recorded(TILES[name], places), TILES[name]).startswith("deadlock")


@pytest.fixture(scope="module", params=["keys, both edges", "rows, causal after a cache"])
def protocol(request: pytest.FixtureRequest) -> tuple[Record, Tile]:
    """Of a tile that uses places of its rings twice, and cleans."""
    tile = TILES[request.param]
    return recorded(tile, SMALLEST_RING[tile.kernel]), tile


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
    for kind in ("finish", "clean", "fence", *(["store"] if tile.kernel == "keys" else [])):
        found = [(who, i, op) for who, ops in enumerate(record.partitions) for i, op in enumerate(ops) if op[0] == kind]
        assert found
        for who, place, operation in found:
            # in the second step every row sees every key
            unread = operation[-1] in (("lo_ring", 1), ("hi_ring", 1))
            assert bool(fault(changed(record, who, place, None), tile)) != unread, (who, place, operation)


STEP = re.compile(r"\bHGMMA|\bWARPGROUP\.DEPBAR\S* \S+ 0x[0-2]|\bMUFU\.EX2|\bSYNCS\.PHASECHK|\bSYNCS\.ARRIVE|\bF2FP")


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


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("dtype", "flags"), [("bf16", False), ("bf16", True), ("fp16", False)])
def test_the_machine_code_of_dq_overlaps_as_planned(dim: int, dtype: str, flags: bool) -> None:
    """``flags``: with upper bounds per token."""
    compiled = compile_hopper("hopper_rows", dtype, dim, hi=flags)
    # Q and dO twice; K and V into a block that needs cleaning or not
    assert_resources(compiled, copies=8)
    loops = [x for x in map(machine_code_of_steps, compiled.loops("HGMMA")) if x.count("2") == x.count("0") == 1]
    # of each consumer the blocks without and with a mask; dS while S runs, P beside the other two products
    for text in loops:
        found = re.fullmatch(r"(h[hp]*)b(h+)2(e+)b0a", text)
        assert found and len(found[2]) == dim // 16 and len(found[3]) == BLOCK // 2, text
        assert found[1].count("h") == dim // 16 + BLOCK // 16 and found[1].count("p") == BLOCK // 4, text
        assert re.match(r"h(?:p+h?)+p", found[1]), text
    assert len(loops) == 4
