"""Linear layers that are more than their weight (LoRA, DoRA, weights of torchao and bitsandbytes) count everywhere: what packed,
fused, decoded and served passes give is what transformers gives for the same layers without patch().
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import grit_kernels as gk
from python_model import GritLM
from python_model.generate.decode import decode
from python_model.model.chunks import build_chunk
from python_model.model.identity import fingerprint, weights_digest
from python_model.model.losses import next_token_losses
from python_model.model.server_export import export_for_server
from python_model.serve.engine import Generation, TextWork, Token, Vector
from tests.python_model.serve.conftest import SteppedEngine, collect
from tests.python_model.training_samples import ToyStream

TEXTS = ["The capital of France is a city with a river in it. " * 4, "A river flows."]
PROMPT = list(range(3, 60))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def untied(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint; or with a head of its own, which quantisation reaches."""
    if request.param:
        return checkpoint
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.detach() + 0.05 * torch.randn_like(model.lm_head.weight)
    )
    folder = tmp_path_factory.mktemp("untied")
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def adapters(dora: bool) -> Callable[[Any], Any]:
    def add(model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        settings: Any = {"target_modules": "all-linear", "use_dora": dora, "lora_dropout": 0.0}
        found = get_peft_model(model, LoraConfig(r=2, **settings))
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
                elif "magnitude" in name:
                    parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
        return found

    return add


def by_torchao(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def nothing(model: Any) -> Any:
    return model


def by_bitsandbytes(bits: int) -> dict[str, Any]:
    # without a threshold: which columns are outliers depends on all rows of a product
    options: dict[str, Any] = {"llm_int8_threshold": 0.0}
    if bits == 4:
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return {"quantization_config": transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)}


KINDS: dict[str, tuple[str, Callable[[Any], Any], Callable[[], dict[str, Any]]]] = {
    "lora": ("peft", adapters(dora=False), dict),
    "dora": ("peft", adapters(dora=True), dict),
    "int8 of torchao": ("torchao", by_torchao, dict),
    "nf4 of bitsandbytes": ("bitsandbytes", nothing, lambda: by_bitsandbytes(4)),
    "int8 of bitsandbytes": ("bitsandbytes", nothing, lambda: by_bitsandbytes(8)),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    package = KINDS[request.param][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return str(request.param)


def make(kind: str, folder: Path, *, training: bool) -> tuple[GritLM, Any]:
    """A GritLM with wrapped layers, and transformers' model with the same."""
    _, wrap, arguments = KINDS[kind]
    grit = GritLM(folder, device="cpu", dtype="float32", is_inference=not training, **arguments())
    grit.model = wrap(grit.model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments())
    plain = wrap(plain)
    for module in [*grit.modules(), *plain.modules()]:
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would compute in bfloat16
            module.support_avx512bf16_for_cpu = False
    return grit.train(training), plain.train(training)


@pytest.fixture(scope="module")
def pair(kind: str, untied: Path) -> tuple[GritLM, Any]:
    return make(kind, untied, training=False)


def allowed(kind: str, expected: torch.Tensor) -> float:
    """The difference that float32 explains. bitsandbytes' int8 rounds activations to 1/127 of the largest in a row, so its noise
    moves some of them to the next step."""
    return (1e-3 if kind == "int8 of bitsandbytes" else 2e-5) * float(expected.detach().abs().max())


def close(kind: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= allowed(kind, expected)


def test_the_layers_differ_from_their_weights(kind: str, pair: tuple[GritLM, Any], untied: Path) -> None:
    bare, wrapped = (torch.tensor(m.encode(TEXTS)) for m in (GritLM(untied, device="cpu", dtype="float32"), pair[0]))
    assert (bare - wrapped).abs().max() > 5 * allowed(kind, wrapped)


def test_embeddings(kind: str, pair: tuple[GritLM, Any]) -> None:
    grit, plain = pair
    for text in TEXTS:
        sample = grit.formatter.text("", text, 512)
        with torch.no_grad():
            decoder = gk.hf.decoder_of(plain)
            hidden = decoder(torch.tensor([sample.input_ids]), is_causal=False, use_cache=False).last_hidden_state[0]
        mean = hidden[sample.instruction_len :].mean(0)
        close(kind, torch.tensor(grit.encode([text])[0]), mean / mean.norm())


def test_logits_losses_and_their_gradients(kind: str, untied: Path) -> None:
    grit, plain = make(kind, untied, training=True)  # bitsandbytes' weights have no gradient after a pass for inference
    talks = ToyStream(grit.tokenizer, 0, 2)[0].conversations
    chunk = build_chunk([], talks)
    found = next_token_losses(grit, grit.hidden_states(chunk.input_ids, chunk.pack), chunk.labels).sum()
    expected = torch.zeros(())
    for talk in talks:
        logits = plain(torch.tensor([talk.input_ids])).logits[0].float()
        close(kind, grit.model(torch.tensor([talk.input_ids])).logits[0].float(), logits)
        expected = expected + torch.nn.functional.cross_entropy(
            logits, torch.tensor(talk.labels), ignore_index=-100, reduction="sum"
        )
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    trained = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (grit.model, plain)]
    assert trained[0].keys() == trained[1].keys() and trained[0]
    gradients = [
        torch.autograd.grad(loss, list(mine.values())) for loss, mine in zip((found, expected), trained, strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


def test_decoding_and_serving(kind: str, pair: tuple[GritLM, Any]) -> None:
    grit, plain = pair
    ids = torch.tensor([PROMPT])
    whole = plain.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=2)
    expected = [token for token in whole[0, len(PROMPT) :].tolist() if token != 2]
    (found,) = decode(grit.model, [PROMPT], max_new_tokens=8, eos_token_ids=[2])
    assert found == expected
    try:
        engine = SteppedEngine(grit, arena_rows=200, max_step_tokens=96)
    except ValueError as error:
        assert str(error).startswith("model: expected a plain one")
        return
    work, text = Generation(list(PROMPT), max_tokens=8), TextWork(list(PROMPT))
    events = collect(work), collect(text)
    engine.submit([work, text])
    engine.run()
    assert [e.token for e in events[0] if isinstance(e, Token) and e.token not in (None, 2)] == expected
    (vector,) = events[1]
    assert isinstance(vector, Vector)
    with torch.no_grad():
        hidden = gk.hf.decoder_of(plain)(ids, is_causal=False, use_cache=False).last_hidden_state[0].mean(0)
    close(kind, vector.vector, hidden / hidden.norm())


def test_an_index_knows_the_model_after_it_has_run(kind: str, untied: Path) -> None:
    _, wrap, arguments = KINDS[kind]
    grit = GritLM(untied, device="cpu", dtype="float32", **arguments())
    grit.model = wrap(grit.model)
    before = fingerprint(grit)
    grit.encode(TEXTS)
    # a pass on a CPU with bfloat16 has bitsandbytes store 4-bit weights in another order: an index made before is refused then
    assert fingerprint(grit) == before or kind == "nf4 of bitsandbytes"
    assert before != fingerprint(GritLM(untied, device="cpu", dtype="float32"))


def test_an_index_knows_how_adapters_and_parametrisations_are_applied(checkpoint: Path) -> None:
    from torch.nn.utils.parametrize import register_parametrization

    peft = pytest.importorskip("peft")

    def adapted(**settings: Any) -> GritLM:
        torch.manual_seed(0)
        grit = GritLM(checkpoint, device="cpu", dtype="float32")
        target = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "lora_alpha": 8}
        grit.model = peft.get_peft_model(grit.model, peft.LoraConfig(**{**target, **settings})).eval()
        return grit

    found = [fingerprint(adapted(**settings)) for settings in ({}, {"lora_alpha": 16}, {"use_rslora": True})]
    grit = adapted()
    assert fingerprint(grit) == found[0]
    with grit.model.disable_adapter():
        found.append(fingerprint(grit))
    for factor in (1.5, 2.0):
        grit = GritLM(checkpoint, device="cpu", dtype="float32")
        register_parametrization(grit.decoder[0].layers[0].self_attn.q_proj, "weight", Times(factor))
        found.append(fingerprint(grit))
    assert len(set(found)) == len(found)


class Times(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.factor * weight


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "aLoRA"])
def test_adapters_that_act_around_the_model_are_refused(checkpoint: Path, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from python_model.model.export import export_sentence_transformers

    adapters = {
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "aLoRA": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]
        ),
    }
    grit = GritLM(checkpoint, device="cpu", dtype="float32")
    grit.model = peft.get_peft_model(grit.model, adapters[kind]()).eval()
    uses: list[Callable[[], Any]] = [
        lambda: grit.encode(TEXTS),
        lambda: decode(grit.model, [PROMPT], max_new_tokens=2, eos_token_ids=[2]),
        lambda: SteppedEngine(grit, arena_rows=200, max_step_tokens=96),
        lambda: export_sentence_transformers(grit, tmp_path / "st"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=f"model: expected adapters that are part of the layers, .* got {kind}"):
            use()


class Codes(torch.nn.Parameter):
    """As the weights of bitsandbytes: codes, and what they stand for in attributes."""

    quant_state: Any = None
    SCB: Any = None


def four_bits(*, nested: bool, **changes: Any) -> torch.nn.Linear:
    """A layer of 4 bits, with the names that bitsandbytes saves."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "absmax": torch.arange(1.0, 9.0),
        "blocksize": 64,
        "quant_map": torch.linspace(-1, 1, 16),
        "dtype": "float32",
        "shape": (16, 32),
    }
    if nested:
        state |= {
            "absmax": torch.arange(8, dtype=torch.uint8),
            "nested_absmax": torch.ones(1),
            "nested_blocksize": 256,
            "nested_quant_map": torch.linspace(-1, 1, 256),
            "nested_dtype": "float32",
            "nested_offset": 0.5,
        }
    assert changes.keys() <= state.keys()
    layer = torch.nn.Linear(32, 16, bias=False)
    layer.weight = Codes(torch.arange(256, dtype=torch.uint8)[:, None], requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(as_dict=lambda: {**state, **changes})
    return layer


@pytest.mark.parametrize("nested", [False, True])
def test_what_the_codes_of_4_bits_stand_for_makes_another_model(nested: bool) -> None:
    def digest(**changes: Any) -> str:
        return weights_digest(torch.nn.Sequential(four_bits(nested=nested, **changes)), torch.bfloat16)

    changes: list[dict[str, Any]] = [
        {"quant_type": "fp4"},
        {"absmax": torch.arange(8).flip(0)},
        {"blocksize": 128},
        {"quant_map": torch.linspace(-1, 0.5, 16)},
    ]
    if nested:
        changes += [
            {"nested_absmax": torch.full((1,), 2.0)},
            {"nested_blocksize": 64},
            {"nested_quant_map": torch.linspace(-1, 0.5, 256)},
            {"nested_offset": 0.25},
        ]
    found = [digest(), *(digest(**change) for change in changes)]
    assert len(set(found)) == len(found)
    assert digest(dtype="bfloat16") == digest(), "in which dtype it is computed is no part of a model"


def test_the_scales_of_8_bits_make_another_model_wherever_they_are() -> None:
    def digest(scales: torch.Tensor, used: bool = False) -> str:
        layer = torch.nn.Linear(4, 4, bias=False)
        layer.weight = Codes(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        layer.state = SimpleNamespace(SCB=scales if used else None)
        layer.weight.SCB = None if used else scales
        return weights_digest(layer, torch.bfloat16)

    assert digest(torch.ones(4)) == digest(torch.ones(4), used=True) != digest(torch.arange(4.0), used=True)


def test_what_is_written_gives_the_same_vectors_or_is_refused(kind: str, untied: Path, tmp_path: Path) -> None:
    from python_model.model.export import export_sentence_transformers

    grit = make(kind, untied, training=False)[0]
    with pytest.raises(ValueError, match="^model: expected plain weights to export, got "):
        export_sentence_transformers(grit, tmp_path / "st")
    for server in ("vllm", "gguf"):
        with pytest.raises(ValueError, match="^model: expected plain weights to export, got "):
            export_for_server(grit, tmp_path / server, server, pool_instruction=True, max_length=64)  # type: ignore[arg-type]
    if "bitsandbytes" in kind:
        grit.save_pretrained(tmp_path / "saved")
        again = GritLM(tmp_path / "saved", device="cpu", dtype="float32")
        assert fingerprint(again) == fingerprint(grit)
        return
    with pytest.raises(ValueError, match="^model: expected plain weights to save, got "):
        grit.save_pretrained(tmp_path / "saved")
    if kind in ("lora", "dora"):
        expected = torch.tensor(grit.encode(TEXTS))
        grit.model = grit.model.merge_and_unload()
        grit.save_pretrained(tmp_path / "saved")
        saved = GritLM(tmp_path / "saved", device="cpu", dtype="float32").encode(TEXTS)
        assert (torch.tensor(saved) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert sorted(path.name for path in tmp_path.iterdir()) == (["saved"] if kind in ("lora", "dora") else [])
