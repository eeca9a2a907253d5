"""The Hopper forward in Gluon without a GPU: its arithmetic and its barriers on paper, its machine code, when it is chosen."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grit_kernels.attention import reference
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.backend import interpreting

if interpreting():
    pytest.skip("Gluon has no interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from grit_kernels.attention import hopper  # noqa: E402
from grit_kernels.attention.triton_common import positive_scale  # noqa: E402

hopper_forward = pytest.importorskip("grit_kernels.attention.hopper_forward", reason="this Triton has another Gluon")
from tests.grit_kernels.attention import hopper_paper, samples  # noqa: E402
from tests.grit_kernels.attention.barrier_model import Model, changed, operations  # noqa: E402
from tests.grit_kernels.attention.compiled import compile_hopper  # noqa: E402
from tests.grit_kernels.attention.hopper_paper import Record  # noqa: E402
from tests.grit_kernels.attention.samples import one_sample  # noqa: E402

BLOCK = hopper_forward.BLOCK
MANY = 16
"""Places of a ring that hold all blocks of a sample here: on paper the producer runs first."""


def assert_right_on_paper(call: samples.Call, sinks: Tensor | None = None) -> None:
    """Finite where the reference in float64 is; twice the error of the reference in the inputs' dtype, and a few roundings."""
    q, scale = positive_scale(call.q, call.problem.softmax_scale)
    problem = replace(call.problem, softmax_scale=scale)
    found = hopper_paper.forward(q, call.k, call.v, problem, MANY, sinks)[:2]
    truth, eager = (
        reference.attention_forward(*call.clean(dtype)[:3], call.problem, sinks=sinks)
        for dtype in (torch.float64, q.dtype)
    )
    roundings = torch.finfo(q.dtype).eps + 32 * torch.finfo(torch.float32).eps
    for name, ours, right, rounded in zip(("out", "lse"), found, truth, eager, strict=True):
        finite = right.isfinite()
        assert torch.equal(ours.isfinite(), finite), f"{name}: not finite in other places than the reference"
        assert torch.equal(ours[~finite].double(), right[~finite].double()), name
        norm = right[finite].norm()
        error, allowed = ((x.double()[finite] - right[finite]).norm() for x in (ours, rounded))
        assert error <= 2 * allowed + roundings * norm, (name, error / norm, allowed / norm)


@pytest.mark.parametrize("seed", range(16))
def test_any_call_equals_the_reference(seed: int) -> None:
    call = hopper_paper.drawn(seed)
    if call.k.shape[0]:
        assert_right_on_paper(call)


@pytest.mark.parametrize("seed", range(4))
def test_sinks_are_one_more_score(seed: int) -> None:
    call = hopper_paper.drawn(seed)
    # one that outweighs all keys, one that weighs nothing
    sinks = torch.cat([torch.tensor([30.0, -200.0]), torch.randn(call.q.shape[1])])[: call.q.shape[1]]
    assert_right_on_paper(call, sinks.to(call.q.dtype))


def on_paper(problem: AttentionProblem, stages: int, dim: int = 64) -> Record:
    """The record of the only program of a problem of one tile and one head."""
    torch.manual_seed(0)
    q, k = (torch.randn(int(n), 1, dim, dtype=torch.bfloat16) for n in (problem.q_len, problem.k_len))
    (record,) = hopper_paper.forward(q, k, k, problem, stages)[2]
    return record


def fault(record: Record, order: list[int], clean: bool) -> str:
    """Expects that every product reads its blocks, in ``order``; the last block of values is cleaned with ``clean``."""

    def holds(name: str, block: int) -> tuple[Any, ...]:
        last = clean and name == "v" and block == order[-1]
        return (name, block * BLOCK, 0) + (("clean",) if last else ())

    expected = []
    for consumer in range(2):
        q = ("q", consumer * hopper_forward.ROWS_EACH, 0)
        products: list[tuple[Any, ...]] = [(q, holds("k", order[0]))]
        for before, block in zip(order, order[1:], strict=False):
            products += [(q, holds("k", block)), (holds("v", before),)]
        expected.append((*products, (holds("v", order[-1]),)))
    return Model(record, expected, turns=True).fault()


# a tile -> order of its blocks, and whether the last one has keys of another sample
TILES = {
    "one block": (one_sample(128, 128), [0], False),
    "part of a block": (one_sample(128, 100), [0], True),
    "a block but for a key": (one_sample(128, 127), [0], True),
    "no key": (replace(one_sample(128, 128), hi=torch.zeros(128, dtype=torch.int32)), [0], True),
    "two blocks": (one_sample(128, 256), [0, 1], False),
    "three blocks and a part": (one_sample(128, 400), [0, 1, 2, 3], True),
    "causal after a cache": (one_sample(128, 600, right=0), [0, 1, 2, 3, 4], True),
    "a window's edges": (one_sample(128, 640, 300, 0), [3, 1, 2, 4], False),
}


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_order_of_the_partitions_reads_the_right_blocks_and_ends(name: str, stages: int) -> None:
    problem, order, clean = TILES[name]
    assert fault(on_paper(problem, stages), order, clean) == ""


@pytest.fixture(scope="module")
def protocol() -> tuple[Record, list[int], bool]:
    """Of a tile that uses each place of its rings twice, and cleans."""
    problem, order, clean = TILES["three blocks and a part"]
    return on_paper(problem, 2), order, clean


def test_the_model_finds_every_wrong_phase(protocol: Any) -> None:
    record, *expected = protocol
    for who, place, (_, barrier, parity), _ in operations(record, "wait"):
        wrong = changed(record, who, place, ("wait", barrier, 1 - parity))
        assert fault(wrong, *expected), (who, place, barrier)


def test_the_model_finds_every_missing_wait(protocol: Any) -> None:
    record, *expected = protocol
    waits = list(operations(record, "wait"))
    first = {(operation[1], phase): place for who, place, operation, phase in waits if who == 0}
    for who, place, operation, phase in waits:
        wrong = changed(record, who, place, None)
        found = fault(wrong, *expected)
        if who == 1 and not found:
            # the first consumer has waited for the same before it gave up its turn
            assert operation[1].startswith(("q_full", "k_full", "v_full"))
            found = fault(changed(wrong, 0, first[operation[1], phase], None), *expected)
        # what a new barrier has behind it need not be waited for
        assert bool(found) == (phase >= 0), (who, place, operation)


def test_the_model_finds_every_missing_arrival_that_is_waited_for(protocol: Any) -> None:
    record, *expected = protocol
    awaited = {(operation[1], phase) for _, _, operation, phase in operations(record, "wait")}
    found = 0
    for who, place, operation, phase in operations(record, "arrive", "expect"):
        wrong = bool(fault(changed(record, who, place, None), *expected))
        assert wrong == ((operation[1], phase) in awaited), (who, place, operation)
        found += wrong
    assert found > 20


def test_the_model_finds_what_is_read_before_a_product_ends_or_not_cleaned(protocol: Any) -> None:
    record, *expected = protocol
    for kind in ("finish", "clean", "fence"):
        places = [
            (who, i) for who, listed in enumerate(record.partitions) for i, op in enumerate(listed) if op[0] == kind
        ]
        assert places
        for who, place in places:
            assert fault(changed(record, who, place, None), *expected), (kind, who, place)


STEP = re.compile(r"\bHGMMA|\bWARPGROUP\.DEPBAR\S* \S+ 0x[01]|\bMUFU\.EX2|\bSYNCS\.PHASECHK|\bSYNCS\.ARRIVE")


def machine_code_of_steps(code: list[str]) -> str:
    """A letter per instruction: product, wait for a barrier, arrival, exponential, wait for all products or all but one."""
    found = [STEP.search(line) for line in code]
    letters = {"H": "h", "M": "e", "SYNCS.P": "b", "SYNCS.A": "a", "WARPGROUP": ""}
    text = ""
    for match in filter(None, found):
        letter = next(letters[start] for start in letters if match[0].startswith(start))
        text += letter or match[0][-1]
    return text


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("dtype", "flags"), [("bf16", False), ("bf16", True), ("fp16", False)])
def test_the_machine_code_copies_multiplies_and_overlaps_as_planned(dim: int, dtype: str, flags: bool) -> None:
    """``flags``: with upper bounds per token and sinks."""
    compiled = compile_hopper("hopper", dtype, dim, hi=flags, sinks=flags)
    everything = [code for _, code in compiled.instructions()]
    assert compiled.spilled == 0 and not any(re.search(r"\b(?:LDL|STL)", code) for code in everything)
    assert compiled.shared <= 227 << 10
    # q twice, k, and v into a block that needs cleaning or not
    assert sum("UTMALDG" in code for code in everything) == 5
    assert sum("USETMAXREG" in code for code in everything) >= 3, "registers go from the producer to the consumers"
    # jumps back from code out of line look like loops as well
    steps = [
        text for text in map(machine_code_of_steps, compiled.loops("HGMMA")) if text.count("1") == text.count("0") == 1
    ]
    wanted = f"b{'h' * (dim // 16)}b{'h' * (BLOCK // 16)}a1a{'e' * 66}b0a"
    # of each consumer the blocks without and with a mask
    assert steps == [wanted] * 4, "no wait inside a product, and all exponentials beside the second one"


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hopper, "architecture", lambda device: "sm90")
    monkeypatch.setenv(hopper.VARIABLE, "1")
    hopper._announce.cache_clear()
    yield
    hopper._announce.cache_clear()


def given(**changes: Any) -> dict[str, Any]:
    """Arguments of hopper_kernel that suit it, but for ``changes``."""
    q, k = torch.zeros(130, 8, 64, dtype=torch.bfloat16), torch.zeros(130, 2, 64, dtype=torch.bfloat16)
    suitable = {"name": "hopper_forward", "tile": 128, "problem": one_sample(130, 130), "q": q, "k": k, "v": k}
    assert set(changes) <= {*suitable, "deterministic"}
    return suitable | changes


def strided(offset: int, *strides: int) -> Tensor:
    rows = torch.empty(1 << 20, dtype=torch.bfloat16)
    return rows.as_strided((130, 2, 64), (*strides, 1), offset)


@pytest.mark.parametrize("value", ["", "0"])
def test_without_the_switch_the_triton_kernel_runs(
    value: str, on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hopper.hopper_kernel(**given()) is hopper_forward
    monkeypatch.setenv(hopper.VARIABLE, value)
    assert hopper.hopper_kernel(**given()) is None
    monkeypatch.delenv(hopper.VARIABLE)
    assert hopper.hopper_kernel(**given()) is None


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hopper.VARIABLE, "yes")
    with pytest.raises(ValueError, match="GRIT_KERNELS_HOPPER: expected 0 or 1, got 'yes'"):
        hopper.hopper_kernel(**given())


UNSUITABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "expected q of bfloat16 or float16, got float32": lambda: {"q": torch.zeros(130, 8, 64)},
    "expected a head dimension of 64 or 128, got 96": lambda: {"q": torch.zeros(9, 8, 96, dtype=torch.float16)},
    "expected no softcap, got 5.0": lambda: {"problem": replace(one_sample(130, 130), softcap=5.0)},
    "expected tiles of 128 rows or keys, got 64": lambda: {"tile": 64},
    "expected deterministic=True, got False": lambda: {"deterministic": False},
    "expected keys, got none": lambda: {"k": torch.zeros(0, 2, 64, dtype=torch.bfloat16)},
    "rows and heads of k at multiples of 16 bytes, got strides (204, 68, 1)": lambda: {"k": strided(0, 204, 68)},
    "rows and heads of v at multiples of 16 bytes": lambda: {"v": strided(4, 128, 64)},
    "rows of v one after the other, got strides (64, 8320, 1)": lambda: {"v": strided(0, 64, 8320)},
    "expected q of less than 2**31 rows and columns, got (1, 4294967360)": lambda: {
        "q": torch.empty(1, dtype=torch.bfloat16, device="meta")
        .expand(64)
        .as_strided((1, 3, 64), (1 << 33, 1 << 31, 1))
    },
}


@pytest.mark.parametrize("why", UNSUITABLE)
def test_a_call_that_does_not_suit_gets_the_triton_kernel_and_says_so_once(why: str, on_hopper: None) -> None:
    arguments = given(**UNSUITABLE[why]())
    with pytest.warns(UserWarning, match=re.escape(why)) as found:
        assert hopper.hopper_kernel(**arguments) is None
        assert hopper.hopper_kernel(**arguments) is None
    assert len(found) == 1 and "GRIT_KERNELS_HOPPER=1, but the Triton kernel runs: " in str(found[0].message)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("architecture", lambda device: "sm100", "expected a Hopper GPU (sm90), got sm100"),
        ("interpreting", lambda: True, "expected compiled kernels, got Triton's interpreter"),
        ("_missing", lambda name: "expected the Gluon of Triton 3.6 to 3.9", "expected the Gluon of Triton 3.6 to 3.9"),
    ],
)
def test_where_the_kernel_cannot_run_the_triton_kernel_does(
    name: str, value: Any, why: str, on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, name, value)
    with pytest.warns(UserWarning, match=re.escape(why)):
        assert hopper.hopper_kernel(**given()) is None


def test_a_suitable_call_warns_of_nothing(on_hopper: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper.hopper_kernel(**given(v=strided(8, 200, 72))) is hopper_forward
