"""What a compiled training step launches: the plans of the pass are made once, as in an eager step, and no bit changes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import grit_kernels as gk
from grit_kernels.attention import prepared_attention
from grit_kernels.hf import compiled_layers
from tests.grit_kernels.attention.test_launches import PLAN, WITH_ATOMICS, WITHOUT_ATOMICS, pack_and_problem, tensors
from tests.grit_kernels.tiny_mistral import IDS, MASKS, tiny_model

pytest.importorskip("triton", reason="the package triton is not installed")
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

pytestmark = pytest.mark.interpret

LAYERS = 2


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Launches of Triton kernels by name."""
    counted: Counter[str] = Counter()
    run = InterpretedFunction.run

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", count)
    torch._dynamo.reset()
    yield counted


def packed(lengths: list[int], **options: Any) -> dict[str, Any]:
    """Arguments of a decoder's packed pass."""
    pack = gk.SamplePack.from_lengths(lengths, [i % 2 == 0 for i in range(len(lengths))], **options)
    return {"input_ids": torch.arange(pack.tokens)[None] * 7 % 94 + 3, "sample_pack": pack}


def padded(name: str) -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": MASKS[name], "is_causal": torch.arange(len(IDS)) % 2 == 0}


def gradients(model: Any, given: dict[str, Any]) -> list[Tensor]:
    """The states of a pass, and what they give every weight."""
    states = model.model(**given, use_cache=False).last_hidden_state
    weights = [p for p in model.model.parameters() if p.requires_grad]
    return [states, *torch.autograd.grad(states.square().mean(), weights)]


def compiled_copy(model: Any, what: str, backend: Any) -> Any:
    model = copy.deepcopy(model)
    if what == "model":
        model.model.forward = torch.compile(model.model.forward, fullgraph=True, dynamic=True, backend=backend)
    for layer in gk.hf.layers_of(model.model) if what == "layers" else ():
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend=backend)
    return model


def split(launches: Counter[str]) -> tuple[Counter[str], Counter[str]]:
    """Those that make plans, and the layers' own."""
    plans = Counter({name: n for name, n in launches.items() if name in PLAN})
    return plans, launches - plans


@pytest.mark.parametrize(
    ("what", "checkpointing", "deterministic"),
    [
        ("layers", True, True),
        pytest.param("layers", False, False, marks=pytest.mark.slow),
        pytest.param("model", True, False, marks=pytest.mark.slow),
        pytest.param("model", False, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_launch_what_eager_ones_do(
    launches: Counter[str], what: str, checkpointing: bool, deterministic: bool, compiler: str
) -> None:
    model = gk.patch(tiny_model(num_hidden_layers=LAYERS), fuse=False, deterministic=deterministic)
    if checkpointing:
        gk.hf.checkpoint_activations(model.train())
    counter = CompileCounterWithBackend(compiler)
    compiled = compiled_copy(model, what, counter)
    per_layer = Counter(dict.fromkeys(WITHOUT_ATOMICS if deterministic else WITH_ATOMICS, LAYERS))
    per_layer["attention_forward_kernel"] *= 2 if checkpointing else 1
    hi = torch.cat([torch.arange(n) + 1 for n in (9, 11, 20)])
    gradients(compiled, packed([20, 23]))  # which also reads a token
    graphs = counter.frame_count
    for given in (packed([7, 30]), packed([9, 11, 20], hi=hi)):
        found = []
        for run in (model, compiled):
            launches.clear()
            found.append((gradients(run, given), *split(launches)))
        (expected, plans, _), (results, again, layers) = found
        assert again == plans and layers == per_layer
        assert counter.frame_count == graphs or given["sample_pack"].hi is not None, "sizes share their graphs"
        for a, b in zip(results, expected, strict=True):
            if compiler == "inductor":
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_model_without_gradients_makes_each_plan_once(launches: Counter[str], training: bool) -> None:
    model = gk.patch(tiny_model(num_hidden_layers=3), fuse=False)
    compiled = compiled_copy(model, "model", counter := CompileCounterWithBackend("aot_eager"))
    if training:  # checkpointed layers would be graphs of their own and share nothing
        gk.hf.checkpoint_activations(compiled.train())
    graphs = set()
    for lengths in ([20, 23], [7, 30, 4]):
        found = []
        for run in (model, compiled):
            launches.clear()
            with torch.no_grad():
                found.append((run.model(**packed(lengths)).last_hidden_state, *split(launches)))
        (expected, plans, layers), (states, again, own) = found
        assert torch.equal(states, expected) and own == layers == Counter(attention_forward_kernel=3)
        assert again == Counter({name: (3 if training else 1) * n for name, n in plans.items()})
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "sizes share their graphs"


@pytest.mark.slow
def test_plans_of_a_padded_batch_are_made_once_in_a_compiled_step(launches: Counter[str]) -> None:
    model = gk.patch(tiny_model(num_hidden_layers=LAYERS), fuse=False, packing=False)
    compiled = compiled_copy(model, "model", "aot_eager")
    real = MASKS["holes"].bool()
    given = padded("holes")
    expected = model.model(**given).last_hidden_state
    launches.clear()
    found = compiled.model(**given).last_hidden_state
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=2e-5)
    found.sum().backward()
    plans, layers = split(launches)
    assert plans["list_tiles_kernel"] == 3 and layers == Counter(dict.fromkeys(WITHOUT_ATOMICS, LAYERS))


def kinds_of_layers() -> Any:
    """A model whose layers differ in window, with a softcap."""
    config = transformers.Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=6,
    )
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("contexts", [None, [None, None, [0, 1, 2], None]])
def test_each_kind_of_layer_has_its_plan(launches: Counter[str], contexts: Any) -> None:
    model = gk.patch(kinds_of_layers(), fuse=False)
    compiled = compiled_copy(model, "layers", "aot_eager")
    given = packed([9, 20, 5, 3], contexts=contexts)
    gradients(compiled, packed([4], contexts=contexts and [None]))  # which also reads a token
    launches.clear()
    expected, plans, layers = gradients(model, given), *split(launches)
    launches.clear()
    assert all(map(torch.equal, gradients(compiled, given), expected))
    assert split(launches) == (plans, layers)
    with torch.no_grad():  # plans for the forward alone
        launches.clear()
        states = compiled.model(**given).last_hidden_state
    assert torch.equal(states, expected[0])
    calls = 1 if contexts is None else 2
    assert launches["list_tiles_kernel"] == 2 * calls and launches["attention_forward_kernel"] == 4 * calls


def test_what_layers_ask_for_is_read_once_and_leaves_no_trace(
    launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled_copy(gk.patch(tiny_model(), fuse=False), "layers", "eager")
    calls = []
    read = compiled_layers._read_kinds
    monkeypatch.setattr(compiled_layers, "_read_kinds", lambda *given: calls.append(given) or read(*given))
    state = torch.get_rng_state()
    for lengths in ([5, 9], [7, 30]):
        gradients(model, packed(lengths))
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), state)
    model.model.to(torch.bfloat16)  # other states, other plans
    launches.clear()
    with torch.no_grad():
        model.model(**packed([7, 30]))
    assert len(calls) == 2 and launches["attention_forward_kernel"] == 2 + 2


def test_a_layer_whose_plan_is_missing_makes_its_own(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = gk.patch(tiny_model(), fuse=False)
    compiled = compiled_copy(model, "layers", "aot_eager")
    monkeypatch.setattr(compiled_layers, "want_plans", lambda *_: False)
    given = packed([20, 33])
    found = gradients(compiled, given)
    assert launches["list_tiles_kernel"] == 6
    assert all(map(torch.equal, found, gradients(model, given)))


def test_sinks_are_part_of_a_compiled_layers_kernels(launches: Counter[str]) -> None:
    pack, problem = pack_and_problem(upper_bounds=True)
    inputs = [*tensors(pack.tokens), torch.randn(4, requires_grad=True)]
    compiled = torch.compile(prepared_attention, fullgraph=True, backend="aot_eager")
    found = []
    for run in (prepared_attention, compiled):
        launches.clear()
        out = run(*inputs[:3], problem, {}, inputs[3])
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        assert split(launches)[1] == Counter(dict.fromkeys(WITHOUT_ATOMICS, 1))
    assert all(map(torch.equal, *found))
