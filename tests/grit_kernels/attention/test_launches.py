"""What a layer launches: plans are made once for all layers of a pass, and the counter of a persistent grid clears itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import grit_kernels as gk
from grit_kernels.attention import prepared_attention
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.hf import compat
from grit_kernels.hf.attention_pass import AttentionPass
from grit_kernels.hf.interface import grit_attention, grit_mask

pytest.importorskip("triton", reason="the package triton is not installed")
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from grit_kernels.attention.triton_configs import Config, override_config  # noqa: E402

pytestmark = pytest.mark.interpret

LENGTHS, CAUSAL = [40, 3, 0, 61], torch.tensor([True, False, True, False])
PLAN = {"list_tiles_kernel", "sort_tiles_kernel", "transpose_hi_kernel"}
WITHOUT_ATOMICS = {"attention_forward_kernel", "row_statistics_kernel", "backward_keys_kernel", "backward_rows_kernel"}
NO_COPY = {"to", "contiguous"}  # with nothing inside: the tensor already was what is needed
METADATA = (
    "empty",
    "view",
    "reshape",
    "_reshape_alias",
    "as_strided",
    "transpose",
    "slice",
    "select",
    "detach",
    "expand",
    "unflatten",
    "flatten",
)


WITH_ATOMICS = WITHOUT_ATOMICS - {"backward_rows_kernel"}


def pack_and_problem(upper_bounds: bool) -> tuple[gk.SamplePack, AttentionProblem]:
    hi = None
    if upper_bounds:
        hi = torch.cat([torch.randint(0, n + 1, (n,), dtype=torch.int32).sort().values for n in LENGTHS])
    pack = gk.SamplePack.from_lengths(LENGTHS, CAUSAL, hi=hi)
    bounds = AttentionPass(pack.causal, pack=pack).window_bounds(20, 61, 61)
    ranges = (pack.starts, pack.lengths, pack.starts, pack.lengths)
    return pack, AttentionProblem(*ranges, *bounds, pack.hi, 0, 0, 61, 61, 0.2, 0.0)


def tensors(tokens: int) -> list[Tensor]:
    return [torch.randn(tokens, heads, 32, requires_grad=True) for heads in (4, 2, 2)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Launches of Triton kernels by name; the kernels themselves do not run."""
    counted: Counter[str] = Counter()

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        counted[self.fn.__name__] += 1

    monkeypatch.setattr(InterpretedFunction, "run", count)
    yield counted


def torch_launches(profile: Any) -> list[str]:
    """Operators of torch that would launch a kernel or a memset on a GPU: those that call no other, less pure metadata."""
    names = []
    for event in profile.events():
        inner = [child.name for child in event.cpu_children if child.name.startswith("aten::")]
        name = event.name.removeprefix("aten::")
        if event.name.startswith("aten::") and not inner and name not in NO_COPY and not name.startswith(METADATA):
            names.append(name)
    return names


@pytest.mark.parametrize("upper_bounds", [False, True])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_shared_plan_changes_no_bit(upper_bounds: bool, deterministic: bool) -> None:
    pack, problem = pack_and_problem(upper_bounds)
    q, k, v = inputs = tensors(pack.tokens)
    plans: dict[Any, Tensor] = {}
    grad = torch.randn(pack.tokens, 4, 32)
    expected: list[Tensor] = []
    # the second layer finds the plan and a counter that is 0 again; in the interpreter programs, and so atomics, run in order
    for given in (None, plans, plans):
        with override_config("backward_keys", Config(16, 32, 4, 1)):  # unlike backward_rows, so their tables differ
            out = prepared_attention(q, k, v, problem, given, deterministic=deterministic)
            found = [out, *torch.autograd.grad(out, inputs, grad)]
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(plans) == 1
    with torch.no_grad():  # plans for the forward alone
        assert torch.equal(prepared_attention(q, k, v, problem, plans), expected[0])
    assert len(plans) == 2


@pytest.mark.parametrize("deterministic", [True, False])
def test_opcheck_accepts_the_ops_that_take_a_plan(deterministic: bool) -> None:
    pack, problem = pack_and_problem(upper_bounds=True)
    q, k, v = tensors(pack.tokens)
    ops, utils = torch.ops.grit_kernels, ("test_schema", "test_autograd_registration", "test_faketensor")
    plain = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(
        ops.attention_plan.default, (*plain[:2], True, deterministic, *problem.flat()), test_utils=utils
    )
    plan = ops.attention_plan(*plain[:2], True, deterministic, *problem.flat())
    rest = (*problem.flat(), plan, deterministic)
    torch.library.opcheck(ops.attention_forward_planned.default, (q, k, v, *rest), test_utils=utils)
    out, lse = ops.attention_forward_planned(*plain, *rest)
    arguments = (torch.randn_like(out), None, *plain, out, lse, *rest)
    torch.library.opcheck(ops.attention_backward_planned.default, arguments, test_utils=utils)


@pytest.mark.parametrize("upper_bounds", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_checkpointed_layer_launches_five_kernels_and_no_memset(
    launches: Counter[str], upper_bounds: bool, use_reentrant: bool, deterministic: bool
) -> None:
    layer_kernels, others = (WITHOUT_ATOMICS, 0) if deterministic else (WITH_ATOMICS, 1)  # torch rounds dQ
    pack, problem = pack_and_problem(upper_bounds)
    found = {}
    for layers in (1, 3):
        q, k, v = tensors(pack.tokens)
        plans: dict[Any, Tensor] = {}

        def layer(x: Tensor, k: Tensor = k, v: Tensor = v, plans: dict[Any, Tensor] = plans) -> Tensor:
            return prepared_attention(x, k, v, problem, plans, deterministic=deterministic)

        launches.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            x = q
            for _ in range(layers):
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            x.backward(torch.ones_like(x))
        assert set(launches) <= PLAN | layer_kernels
        memsets = [name for name in torch_launches(profile) if name in ("zero_", "fill_")]
        assert [event.name for event in profile.events()].count("aten::mul") == others * layers
        in_layers = sum(launches[name] for name in layer_kernels) + others * layers
        found[layers] = (in_layers, sum(launches[name] for name in PLAN), len(memsets))
    assert found[1][0] == 5 and found[3][0] == 15
    assert found[1][1:] == found[3][1:], "plans and memsets do not grow with the layers"


def test_checkpoints_that_keep_attention_do_not_launch_it_again(launches: Counter[str]) -> None:
    pack, problem = pack_and_problem(upper_bounds=True)
    q, k, v = tensors(pack.tokens)
    plans: dict[Any, Tensor] = {}
    for keep, times in ((False, 2), (True, 1)):
        options: dict[str, Any] = {"context_fn": compat._keeping_attention} if keep else {}
        launches.clear()
        out = checkpoint(prepared_attention, q, k, v, problem, plans, use_reentrant=False, **options)
        out.sum().backward()
        assert launches["attention_forward_kernel"] == times
        assert launches["backward_keys_kernel"] == launches["backward_rows_kernel"] == 1


def run_layers(launches: Counter[str], given: dict[str, Any], shapes: list[tuple[int, ...]]) -> list[Any]:
    """(launches of Triton, launches of torch) of two layers in a row; ``shapes`` of query, key and value."""
    counted = []
    for _ in range(2):
        query, key, value = (torch.empty(shape) for shape in shapes)
        launches.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            grit_attention(torch.nn.Module(), query, key, value, scaling=0.2, **given)
        counted.append((dict(launches), torch_launches(profile)))
    return counted


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_that_decodes_runs_its_kernels_and_nothing_else(
    launches: Counter[str], window: int | None, padded: bool
) -> None:
    batch, slots = 2, 300
    mask = torch.ones(batch, slots, dtype=torch.int64)
    mask[1, :7] = 0
    relative = grit_mask(batch, 1, slots, q_offset=slots - 1, attention_mask=mask if padded else None)
    grit_pass = AttentionPass(torch.ones(batch, dtype=torch.bool))
    given = {"attention_mask": relative, "sliding_window": window, "grit_pass": grit_pass}
    (first, prepared), (second, more) = run_layers(
        launches, given, [(batch, n, r, 32) for n, r in ((4, 1), (2, slots), (2, slots))]
    )
    assert prepared and set(first) == set(second) == {"attention_decode_kernel", "merge_splits_kernel"}
    assert more == []


@pytest.mark.parametrize("window", [None, 20])
def test_a_packed_layer_launches_one_kernel_forward(launches: Counter[str], window: int | None) -> None:
    pack, _ = pack_and_problem(upper_bounds=True)
    given = {"attention_mask": None, "sliding_window": window, "grit_pass": AttentionPass(pack.causal, pack=pack)}
    (first, prepared), (second, more) = run_layers(launches, given, [(1, n, pack.tokens, 32) for n in (4, 2, 2)])
    assert prepared and set(first) == PLAN - {"transpose_hi_kernel"} | {"attention_forward_kernel"}
    assert (second, more) == ({"attention_forward_kernel": 1}, [])


def test_a_step_of_a_server_launches_three_kernels_however_many_samples_decode(launches: Counter[str]) -> None:
    q_len, k_len = [1, 1, 200, 1], [5000, 300, 700, 9000]
    q, k = (torch.empty(sum(lens), heads, 32) for lens, heads in ((q_len, 4), (k_len, 2)))
    starts = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (q_len, k_len)]
    with gk.backend("triton"):
        gk.switch_attention_varlen(q, k, k, True, *starts, max(q_len), max(k_len))
    layer = {"attention_forward_kernel": 1, "attention_decode_kernel": 1, "merge_splits_kernel": 1}
    assert {name: n for name, n in launches.items() if name not in PLAN} == layer


@pytest.mark.parametrize(
    ("asked", "required", "atomics"), [(True, False, False), (False, False, True), (False, True, False)]
)
def test_atomics_run_only_where_they_are_allowed(
    launches: Counter[str], asked: bool, required: bool, atomics: bool
) -> None:
    q, k, v = (x[None] for x in tensors(40))
    torch.use_deterministic_algorithms(required)
    try:
        gk.switch_attention(q, k, v, True, deterministic=asked).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(launches) - PLAN == (WITH_ATOMICS if atomics else WITHOUT_ATOMICS)


def test_a_patched_model_passes_on_whether_gradients_must_repeat(launches: Counter[str]) -> None:
    from tests.grit_kernels.tiny_mistral import tiny_model

    ids = torch.arange(10)[None]
    stock = tiny_model()
    for deterministic in (True, False):
        model = gk.patch(stock, deterministic=deterministic, fuse=False)
        launches.clear()
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        assert ("backward_rows_kernel" in launches) == deterministic
