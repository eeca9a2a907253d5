"""What a layer launches: plans are made once for all layers of a pass, and the counter of a persistent grid clears itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import grit_kernels as gk
from grit_kernels.attention import prepared_attention
from grit_kernels.attention.problem import AttentionProblem, Shapes
from grit_kernels.hf import compat
from grit_kernels.hf.attention_pass import AttentionPass
from grit_kernels.hf.interface import grit_attention, grit_mask
from grit_kernels.hf.padded_attention import NO_KEY
from tests.grit_kernels.hf.test_host_sync import CountReads

pytest.importorskip("triton", reason="the package triton is not installed")
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from grit_kernels.attention import triton_decode  # noqa: E402
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


def tensors(tokens: int, kv_heads: int = 2) -> list[Tensor]:
    return [torch.randn(tokens, heads, 32, requires_grad=True) for heads in (2 * kv_heads, kv_heads, kv_heads)]


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
    q, k, v = inputs = tensors(pack.tokens, kv_heads=1)
    plans: dict[Any, Tensor] = {}
    grad = torch.randn_like(q)
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
@pytest.mark.parametrize("sinks", [None, torch.zeros(2)], ids=["", "sinks"])
def test_opcheck_accepts_the_ops_that_take_a_plan(deterministic: bool, sinks: Tensor | None) -> None:
    pack, problem = pack_and_problem(upper_bounds=True)
    q, k, v = tensors(pack.tokens, kv_heads=1)
    ops, utils = torch.ops.grit_kernels, ("test_schema", "test_autograd_registration", "test_faketensor")
    plain = [x.detach() for x in (q, k, v)]
    given = (*Shapes.of(*plain[:2]), True, deterministic, *problem.flat())
    torch.library.opcheck(ops.attention_plan.default, given, test_utils=utils)
    plan = ops.attention_plan(*given)
    trained = (*problem.flat(), None if sinks is None else sinks.clone().requires_grad_(), plan, deterministic)
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, *trained), test_utils=utils)
    rest = (*problem.flat(), sinks, plan, deterministic)
    out, lse = ops.attention_forward(*plain, *rest)
    arguments = (torch.randn_like(out), None, *plain, out, lse, *rest)
    torch.library.opcheck(ops.attention_backward.default, arguments, test_utils=utils)


def test_a_plan_of_rows_without_any_key_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory comes as it is: what nobody writes must not be read as tiles."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(1))
    table, none = torch.tensor([0, 40, 43]), torch.zeros(3, dtype=torch.int64)
    lengths, anywhere = torch.tensor([40, 3, 61]), torch.full((3,), 2**31 - 1)
    problem = AttentionProblem(table, lengths, none, none, anywhere, anywhere, None, 0, 0, 61, 0, 0.2, 0.0)
    q, k, v = torch.randn(104, 4, 32), torch.randn(0, 2, 32), torch.randn(0, 2, 32)
    plan = torch.ops.grit_kernels.attention_plan(*Shapes.of(q, k), True, False, *problem.flat())
    out, lse = torch.ops.grit_kernels.attention_forward(q, k, v, *problem.flat(), None, plan, False)
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -torch.inf))


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


@pytest.mark.parametrize(
    ("dtype", "more"), [(torch.float32, {"fill_": 1}), (torch.bfloat16, {"fill_": 1, "copy_": 1})], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_sinks_add_one_small_sum_to_a_checkpointed_layer(
    launches: Counter[str], dtype: torch.dtype, more: dict[str, int], deterministic: bool
) -> None:
    """Of what the blocks of rows add to each sink's gradient, in order; and a cast. (A CPU's sum fills its result first.)"""
    pack, problem = pack_and_problem(upper_bounds=True)
    counted = []
    for sinks in (None, torch.zeros(4, dtype=dtype, requires_grad=True)):
        q, k, v = tensors(pack.tokens)
        launches.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = checkpoint(
                prepared_attention, q, k, v, problem, {}, sinks, deterministic=deterministic, use_reentrant=False
            )
            out.backward(torch.ones_like(out))
        assert sinks is None or sinks.grad is not None
        counted.append((Counter(launches), Counter(torch_launches(profile))))
        assert [event.name for event in profile.events()].count("aten::sum") == (sinks is not None)
    (plain, of_torch), (with_sinks, more_of_torch) = counted
    assert with_sinks == plain
    assert more_of_torch - of_torch == Counter(more)


def run_layers(
    launches: Counter[str], given: dict[str, Any], shapes: list[tuple[int, ...]], cache: Any = None
) -> list[Any]:
    """(launches of Triton, launches of torch) of two layers in a row; ``shapes`` of query, key and value, which ``cache`` keeps
    first."""
    counted = []
    for _ in range(2):
        query, key, value = (torch.empty(shape) for shape in shapes)
        if cache is not None:
            key, value = cache.layers[0].update(key, value)
        launches.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            grit_attention(torch.nn.Module(), query, key, value, scaling=0.2, **given)
        counted.append((dict(launches), torch_launches(profile)))
    return counted


def decoding(padding: str, batch: int = 2, slots: int = 300, spare: int = 0) -> dict[str, Any]:
    """Arguments of a layer that decodes; ``spare`` slots of the cache are not in use yet."""
    mask = torch.ones(batch, slots, dtype=torch.int64)
    mask[1, :7] = 0
    if padding == "holes":
        mask[0, [3, 40, slots - 2]] = mask[1, 20:70] = 0
        mask[-1, -1] = 0  # a sample whose own row is padding
    relative = grit_mask(batch, 1, slots + spare, slots - 1, attention_mask=mask if padding else None)
    return {"attention_mask": relative, "grit_pass": AttentionPass(torch.arange(batch) % 2 == 0)}


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("padding", ["", "left", "holes"])
@pytest.mark.parametrize("sinks", [None, torch.zeros(4, dtype=torch.bfloat16)], ids=["", "sinks"])
def test_a_layer_that_decodes_runs_its_kernels_and_nothing_else(
    launches: Counter[str], window: int | None, padding: str, sinks: Tensor | None
) -> None:
    given = decoding(padding) | {"sliding_window": window, "s_aux": sinks}
    with CountReads() as counted:
        (first, prepared), (second, more) = run_layers(
            launches, given, [(2, n, r, 32) for n, r in ((4, 1), (2, 300), (2, 300))]
        )
    assert prepared and first == second == {"attention_decode_kernel": 1, "merge_splits_kernel": 1}
    assert more == [] and not counted.reads


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)], ids=["", "sinks"])
def test_a_packed_layer_that_decodes_runs_its_kernels_and_nothing_else(
    launches: Counter[str], window: int | None, sinks: Tensor | None
) -> None:
    pack = gk.SamplePack.from_lengths([1, 1, 1], torch.tensor([True, True, False]))
    index, lengths = torch.arange(3), torch.tensor([300, 20, 299], dtype=torch.int32)
    cache = gk.hf.PackedCache(
        *torch.empty(2, 900, 2, 32),
        rows=(index * 300 + lengths - 1)[None],
        starts=[index.int() * 300],
        lengths=lengths,
        longest=300,
        positions=lengths - 1,
    )
    grit_pass = AttentionPass(pack.causal, pack=pack, keys=cache.packed_keys)
    given = {"attention_mask": None, "sliding_window": window, "grit_pass": grit_pass, "s_aux": sinks}
    shapes = [(1, heads, 3, 32) for heads in (4, 2, 2)]
    (first, _), (second, more) = run_layers(launches, given, shapes, cache)
    assert first == second == {"attention_decode_kernel": 1, "merge_splits_kernel": 1}
    assert more == []


@pytest.mark.parametrize("rows", [1, 32, 33])
def test_a_call_that_decodes_in_pages_launches_its_kernels_and_copies_no_page(
    launches: Counter[str], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of more than 64 pairs of a row and a head of a group has its pages gathered."""
    copied = []

    def gather(cache: Tensor, *_: Any) -> Tensor:
        copied.append(cache)
        return cache.new_empty(2, 320, 2, 32)

    monkeypatch.setattr("grit_kernels.attention.gather_pages", gather)
    monkeypatch.setattr(triton_decode, "choose_splits", lambda *_: 4)
    pages = [torch.empty(64, 16, 2, 32) for _ in "kv"]
    table = torch.randperm(64, dtype=torch.int32)[:40].view(2, 20)
    used, q, new = torch.tensor([280, 70]), torch.empty(2, rows, 4, 32), torch.empty(2, rows, 2, 32)
    gk.switch_attention_with_kvcache(q, *pages, used, k=new, v=new, block_table=table)
    assert len(copied) == (2 if rows == 33 else 0)
    if not copied:
        assert launches == {"attention_decode_kernel": 1, "merge_splits_kernel": 1}


@pytest.mark.parametrize(
    ("window", "padding", "spare", "static", "sinks"),
    [
        (None, "", 0, False, None),
        (None, "left", 30, True, None),
        (None, "holes", 0, True, torch.tensor([-1.0, 0.0, 1.0, 3.0])),
        (1, "holes", 20, False, torch.tensor([-1.0, 0.0, 1.0, 3.0])),
        (50, "holes", 0, False, None),
    ],
)
@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_decode_see_through_holes_what_they_see_when_keys_are_moved(
    window: int | None,
    padding: str,
    spare: int,
    static: bool,
    sinks: Tensor | None,
    splits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_decode, "choose_splits", lambda *_: splits)
    given = decoding(padding, 3, 100, spare) | {"sliding_window": window, "scaling": 0.2, "s_aux": sinks}
    # (B, H, K, D) as transformers' caches are stored, or a view of (B, K, H, D)
    key, value = (
        torch.randn(3, 100 + spare, 2, 40).transpose(1, 2) if static else torch.randn(3, 2, 100 + spare, 40)
        for _ in "kv"
    )
    query = torch.randn(3, 4, 1, 40)
    with gk.backend("reference"):
        expected, _ = grit_attention(torch.nn.Module(), query, key, value, **given)
    if padding:
        unused = given["attention_mask"].expand(3, -1, -1, -1)[:, 0, 0] >= NO_KEY
        for x in (key, value):
            x.masked_fill_(unused[:, None, :, None], float("nan"))
    found, _ = grit_attention(torch.nn.Module(), query, key, value, **given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert bool(found[-1].any()) == (padding != "holes")


@pytest.mark.parametrize("trained", ["query", "sinks"])
def test_a_row_with_gradients_takes_kernels_that_have_some(launches: Counter[str], trained: str) -> None:
    given = decoding("left") | {"s_aux": torch.zeros(4, requires_grad=trained == "sinks"), "scaling": 0.2}
    query = torch.randn(2, 4, 1, 32, requires_grad=trained == "query")
    out, _ = grit_attention(torch.nn.Module(), query, *torch.randn(2, 2, 2, 300, 32), **given)
    assert out.requires_grad


def test_opcheck_accepts_the_op_that_decodes_through_holes() -> None:
    q, k, v = (torch.randn(rows, heads, 32) for rows, heads in ((2, 4), (80, 2), (80, 2)))
    index, ones = torch.arange(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    tables = (index, ones, index * 40, ones * 40, ones * 39, ones * 0)
    problem = AttentionProblem(*tables, None, 1, 40, 1, 40, 0.2, 0.0)
    utils = ("test_schema", "test_faketensor")
    for used, sinks in ((None, None), (torch.rand(2, 40) < 0.5, torch.ones(4))):
        arguments = (q, k, v, used, sinks, *problem.flat())
        torch.library.opcheck(torch.ops.grit_kernels.attention_decode.default, arguments, test_utils=utils)


def test_a_compiled_step_that_decodes_moves_no_keys(launches: Counter[str]) -> None:
    from tests.grit_kernels.tiny_mistral import IDS, MASKS, tiny_model

    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = gk.patch(tiny_model(), fuse=False)
    torch._dynamo.reset()
    options = {
        **gk.hf.cache_keyword(model, transformers.StaticCache(model.config, max_cache_len=32)),
        "use_cache": True,
    }
    mask = torch.cat([MASKS["left"], MASKS["left"].new_ones(len(IDS), 1)], dim=1)
    with torch.no_grad():
        model(IDS, attention_mask=MASKS["left"], **options)
        torch.compile(model, backend=keep, fullgraph=True)(IDS[:, :1], attention_mask=mask, **options)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes]
    assert sum("attention_decode" in name for name in called) == 2
    assert not any("gather" in name or "sort" in name for name in called)


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
