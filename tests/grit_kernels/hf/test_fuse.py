"""The fuse half of patch(): which modules take part, accuracy, and that nothing added to a module later is skipped."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import grit_kernels as gk
from grit_kernels.hf import compat, fuse
from tests.conftest import assert_within_rule
from tests.grit_kernels.tiny_mistral import FLAGS, IDS, MASKS, close, tiny_model

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 1}
GEMMA = {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
GPTJ = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "gemma2": (GEMMA, {"norm": 9, "mlp": 2, "rotary": 2}),
    "gemma3_text": (GEMMA, {"norm": 13, "mlp": 2, "rotary": 2}),
    "gpt_neox": (COMMON | PARTIAL, {"norm": 0, "mlp": 0, "rotary": 2}),
    "gptj": (GPTJ, {"norm": 0, "mlp": 0, "rotary": 0}),
    "llama": (GROUPED, {"norm": 5, "mlp": 2, "rotary": 2}),
    "mistral": (GROUPED, {"norm": 5, "mlp": 2, "rotary": 2}),
    "mixtral": (GROUPED | {"num_local_experts": 3}, {"norm": 5, "mlp": 0, "rotary": 2}),
    "phi3": (GROUPED | PARTIAL, {"norm": 5, "mlp": 2, "rotary": 2}),
    "qwen2": (GROUPED, {"norm": 5, "mlp": 2, "rotary": 2}),
    "qwen3": (GROUPED | {"head_dim": 32}, {"norm": 9, "mlp": 2, "rotary": 2}),
}  # fmt: skip


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family][0])
    config._experts_implementation = "eager"  # the others do not support float64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.08 if parameter.ndim > 1 else 0.3))
    return model


def decoder_of(model: Any) -> nn.Module:
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def run(model: Any) -> Tensor:
    return model(IDS, attention_mask=MASKS["left"], is_causal=FLAGS, use_cache=False).logits[MASKS["left"].bool()]


def output_and_gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    out = run(model)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.detach(), **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fused_families_keep_the_accuracy_rule(family: str, dtype: torch.dtype) -> None:
    model = random_model(family).to(dtype)
    with gk.patched(copy.deepcopy(model).double(), fuse=False) as oracle, gk.backend("reference"):
        truth = output_and_gradients(oracle)
    with gk.patched(model, fuse=False):
        eager = output_and_gradients(model)
    with gk.patched(model):
        assert fuse.kinds(decoder_of(model)) == FAMILIES[family][1]
        fused = output_and_gradients(model)
    assert fused.keys() == eager.keys()
    for name, value in fused.items():
        # the weights' gradients are sums over all tokens: compared on the scale of the rule, which is 1
        scale = max(truth[name].abs().max().item(), 1.0)
        assert_within_rule(value.double() / scale, truth[name] / scale, (eager[name].double() / scale).to(dtype), name)


@pytest.mark.parametrize("family", sorted(name for name, (_, kinds) in FAMILIES.items() if kinds["rotary"]))
def test_every_attention_of_a_fused_family_rotates_in_one_op(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[torch.Size] = []
    rotary = fuse.rotary
    monkeypatch.setattr(fuse, "rotary", lambda q, *rest: turned.append(q.shape) or rotary(q, *rest))
    with torch.no_grad(), gk.patched(random_model(family)) as model:
        run(model)
    assert len(turned) == FAMILIES[family][1]["rotary"]


def test_unpatch_restores_every_module(stock: Any) -> None:
    model = copy.deepcopy(stock)
    before = model(IDS).logits
    gk.unpatch(gk.patch(model))
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert torch.equal(model(IDS).logits, before)


def test_patching_again_turns_it_on_and_off(model: Any) -> None:
    assert fuse.kinds(model.model)["norm"]
    with torch.no_grad():
        fused = run(model)
        gk.patch(model, fuse=False)
        assert not any(fuse.kinds(model.model).values())
        assert not torch.equal(run(model), fused)
        gk.patch(model, fuse=True)
        assert torch.equal(run(model), fused)


def test_copies_and_pickles_run_their_own_weights(model: Any) -> None:
    with torch.no_grad():
        before = run(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert fuse.kinds(other.model) == fuse.kinds(model.model)
            assert torch.equal(run(other), before)
            for parameter in other.parameters():
                parameter.zero_()
            assert torch.equal(run(model), before) and not run(other).any()
            gk.unpatch(other)
            assert "forward" not in vars(other.model.norm)


@pytest.mark.parametrize(
    "where", ["input_layernorm", "self_attn", "mlp", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj"]
)
def test_hooks_that_come_later_are_called(model: Any, where: str) -> None:
    calls: list[str] = []
    module = model.model.layers[0].get_submodule(where)
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    run(model).sum().backward()
    assert calls == ["before", "after"]


class Adapter(nn.Module):
    """As LoRA wraps a linear layer."""

    def __init__(self, base: nn.Module, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale


@pytest.mark.parametrize(
    "where", ["self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn", "input_layernorm", "mlp"]
)
def test_modules_that_are_replaced_later_take_part(stock: Any, where: str) -> None:
    models = gk.patch(copy.deepcopy(stock)), gk.patch(copy.deepcopy(stock), fuse=False)
    for model in models:
        parent, _, name = where.rpartition(".")
        owner = model.model.layers[1].get_submodule(parent)
        setattr(owner, name, Adapter(getattr(owner, name), 1.7))
    with torch.no_grad():
        given, expected = map(run, models)
    close(given, expected)


def test_a_rotation_that_is_replaced_later_takes_part(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.models.mistral.modeling_mistral
    with torch.no_grad():
        before = run(model)
        monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
        assert not torch.allclose(run(model), before)
        monkeypatch.undo()
        assert torch.equal(run(model), before)


class Foreign(nn.Module):
    """Norms and MLPs under names of their own, or that are nearly the formula."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.tiny = kind, 1e-5
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, states: Tensor) -> Tensor:
        mean = states.pow(2).mean(-1, keepdim=True)
        if self.kind == "epsilon outside":
            return states / (mean.sqrt() + self.tiny) * self.weight
        if self.kind == "centred":
            states = states - states.mean(-1, keepdim=True)
        if self.kind == "dropout" and self.training:
            states = nn.functional.dropout(states, 0.5)
        return states * torch.rsqrt(mean + self.tiny) * self.weight + ROUNDING.get(self.kind, 0.0)


ROUNDING = {"rounded": 5e-6, "shifted": 5e-5}
"""What is added to results, some of which are near 0: a rounding of the others, or more."""


class ForeignMlp(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.act_fn = nn.Linear(16, 8), nn.GELU() if kind == "gelu" else nn.SiLU()
        if kind == "dropout":
            self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = self.act_fn(up) * gate if self.kind == "crossed" else self.act_fn(gate) * up
        if self.kind == "clamped":
            inner = inner.clamp(-1, 1)
        return self.down_proj(self.dropout(inner) if self.kind == "dropout" else inner)


@pytest.mark.parametrize("kind", ["plain", "rounded", "shifted", "epsilon outside", "centred", "dropout"])
def test_a_norm_takes_part_by_what_it_computes(kind: str) -> None:
    module = nn.Sequential(Foreign(kind))
    fuse.attach(module)
    assert fuse.kinds(module)["norm"] == (kind in ("plain", "rounded"))
    x = torch.randn(3, 16)
    module.eval()
    torch.testing.assert_close(module(x), Foreign.forward(module[0], x))


@pytest.mark.parametrize("kind", ["plain", "crossed", "clamped", "gelu", "dropout"])
def test_an_mlp_takes_part_by_what_it_computes(kind: str) -> None:
    module = nn.Sequential(ForeignMlp(kind)).eval()
    fuse.attach(module)
    assert fuse.kinds(module)["mlp"] == (kind == "plain")
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), ForeignMlp.forward(module[0], x))


def test_a_forward_that_somebody_else_bound_is_left_alone(stock: Any) -> None:
    model = copy.deepcopy(stock)
    mine = lambda states: states  # noqa: E731
    model.model.norm.forward = mine
    gk.unpatch(gk.patch(model))
    assert model.model.norm.forward is mine


def test_patching_neither_draws_random_numbers_nor_touches_weights(stock: Any) -> None:
    model = copy.deepcopy(stock)
    weights = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    gk.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_recognition_depends_on_nothing_that_is_set_around_it(stock: Any) -> None:
    model = copy.deepcopy(stock)
    fuse._rebound_classes.clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            gk.patch(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert fuse.kinds(model.model) == {"norm": 5, "mlp": 2, "rotary": 2}


def test_models_without_weights_yet_are_recognised() -> None:
    with torch.device("meta"):
        model = tiny_model()
    assert fuse.kinds(gk.patch(model).model) == {"norm": 5, "mlp": 2, "rotary": 2}


def test_the_reference_backend_runs_the_models_own_code(model: Any) -> None:
    with torch.no_grad(), gk.backend("reference"):
        fused = run(model)
        gk.patch(model, fuse=False)
        assert torch.equal(run(model), fused)


def test_gradient_checkpointing_changes_no_gradient(model: Any) -> None:
    model.train()
    plain = output_and_gradients(model)
    compat.checkpoint_activations(model, {"use_reentrant": False})
    for name, value in output_and_gradients(model).items():
        assert torch.equal(value, plain[name]), name


def test_attention_that_is_kept_is_not_computed_again(model: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += function is torch.ops.grit_kernels.attention_forward.default
            return function(*args, **(kwargs or {}))

    model.train()
    plain = output_and_gradients(model)
    for keep, times in ((False, 2), (True, 1)):
        compat.checkpoint_activations(model, {"use_reentrant": False}, keep_attention=keep)
        with Counter() as counter:
            found = output_and_gradients(model)
        assert counter.calls == times * model.config.num_hidden_layers
        for name, value in found.items():
            assert torch.equal(value, plain[name]), name


def test_an_autocast_step_keeps_the_accuracy_rule(model: Any) -> None:
    with gk.backend("reference"):
        truth = output_and_gradients(gk.patch(copy.deepcopy(model).double(), fuse=False))
    with torch.autocast("cpu", torch.bfloat16):
        fused = output_and_gradients(model)
        eager = output_and_gradients(gk.patch(model, fuse=False))
    for name, value in fused.items():
        assert value.dtype == eager[name].dtype, name
        scale = max(truth[name].abs().max().item(), 1.0)
        assert_within_rule(value.double() / scale, truth[name] / scale, (eager[name] / scale).bfloat16(), name)


def test_a_compiled_model_gives_the_same(model: Any) -> None:
    with torch.no_grad():
        expected = model(IDS, is_causal=FLAGS, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(compiled(IDS, is_causal=FLAGS, use_cache=False).logits, expected)


def test_generation_with_a_cache_gives_the_same_tokens(stock: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": MASKS["left"], "pad_token_id": 0}
    expected = copy.deepcopy(stock).generate(IDS, **options)
    assert torch.equal(gk.patch(copy.deepcopy(stock)).generate(IDS, **options), expected)
