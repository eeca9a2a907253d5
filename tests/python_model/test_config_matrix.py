"""Every field of a checkpoint's config that changes vectors, and every option of patch(), reaches every consumer or is refused
there by name: field x consumer, texts longer than the window.

The right vector comes from transformers' own unpatched decoder with the same config, one text at a time, in float64.
"""

from __future__ import annotations

import copy
import functools
import importlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import grit_kernels as gk
from grit_kernels.hf.patch import FAMILIES
from python_model import GritLM

WINDOW = 20
QUESTION = "Where does a river flow through the city, and which one is it? " * 4 + "Which?"
DOCUMENT = "The capital of France is a city with a river in it. " * 6
INSTRUCTION = "Find the text"
LATER = 32  # the length from which scaled rotary embeddings differ

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
MOE = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}
GPT_J = {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 512}
GEMMA_3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}
BASE: dict[str, dict[str, Any]] = {
    "gemma2": {**ALTERNATING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**ALTERNATING, "query_pre_attn_scalar": 16, "rope_parameters": GEMMA_3_ROPE},
    "gpt_neox": {"intermediate_size": 96},
    "gptj": {**GPT_J, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, **MOE},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "head_dim": 32},
    # not among the tested families: patch() tries them on a tiny model
    "granite": {},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 32},
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LATER}
LONG = {
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + i for i in range(16)],
    "original_max_position_embeddings": LATER,
}
PARTIAL = {"partial_rotary_factor": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2 attn_logit_softcapping": ("gemma2", {"attn_logit_softcapping": 0.5}),
    "gemma2 no attn_logit_softcapping": ("gemma2", {"attn_logit_softcapping": None}),
    "gemma2 query_pre_attn_scalar": ("gemma2", {"query_pre_attn_scalar": 4}),
    "gemma2 hidden_activation": ("gemma2", {"hidden_activation": "relu"}),
    "gemma2 layer_types": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    "gemma2 head_dim": ("gemma2", {"head_dim": 16}),
    "gemma3_text sliding_window": ("gemma3_text", {"sliding_window": 7}),
    "gemma3_text rope_parameters": (
        "gemma3_text",
        {"rope_parameters": {**GEMMA_3_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}},
    ),
    "gemma3_text use_bidirectional_attention": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gpt_neox layer_norm_eps": ("gpt_neox", {"layer_norm_eps": 0.1}),
    "gpt_neox use_parallel_residual": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox partial_rotary_factor": ("gpt_neox", rope("default", **PARTIAL)),
    "gpt_neox attention_bias": ("gpt_neox", {"attention_bias": False}),
    "gpt_neox hidden_act": ("gpt_neox", {"hidden_act": "relu"}),
    "gptj rotary_dim": ("gptj", {"rotary_dim": 16}),
    "gptj activation_function": ("gptj", {"activation_function": "relu"}),
    "gptj layer_norm_epsilon": ("gptj", {"layer_norm_epsilon": 0.1}),
    "gptj n_head": ("gptj", {"n_head": 1}),
    "llama rms_norm_eps": ("llama", {"rms_norm_eps": 0.1}),
    "llama hidden_act": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama hidden_act without a fused op": ("llama", {"hidden_act": "relu"}),
    "llama attention_bias": ("llama", {"attention_bias": True}),
    "llama mlp_bias": ("llama", {"mlp_bias": True}),
    "llama num_attention_heads": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "llama rope_theta": ("llama", rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}),
    "llama rope linear": ("llama", rope("linear", factor=4.0)),
    "llama rope llama3": ("llama", rope("llama3", factor=8.0, **LLAMA_3)),
    "llama rope yarn": ("llama", rope("yarn", factor=8.0, original_max_position_embeddings=LATER)),
    "llama rope dynamic": ("llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": LATER}),
    "mistral sliding_window": ("mistral", {"sliding_window": 7}),
    "mistral no sliding_window": ("mistral", {"sliding_window": None}),
    "mixtral num_experts_per_tok": ("mixtral", {"num_experts_per_tok": 1}),
    "phi3 rope longrope": ("phi3", {**rope("longrope", **LONG), "original_max_position_embeddings": LATER}),
    "phi3 partial_rotary_factor": ("phi3", rope("default", **PARTIAL)),
    "qwen2 max_window_layers": ("qwen2", {"max_window_layers": 0}),
    "qwen2 use_sliding_window": ("qwen2", {"use_sliding_window": False}),
    "qwen3 rms_norm_eps": ("qwen3", {"rms_norm_eps": 0.1}),
    "granite embedding_multiplier": ("granite", {"embedding_multiplier": 3.0}),
    "granite attention_multiplier": ("granite", {"attention_multiplier": 0.03}),
    "granite residual_multiplier": ("granite", {"residual_multiplier": 0.3}),
    "qwen3_moe norm_topk_prob": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe mlp_only_layers": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "patch packing": ("mistral", {}),
    "patch fuse": ("mistral", {}),
    "patch deterministic": ("mistral", {}),
}
OPTIONS = {
    "patch packing": {"packing": False},
    "patch fuse": {"fuse": False},
    "patch deterministic": {"deterministic": False},
}

WITHOUT_EFFECT = {
    "of tokens": ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"),
    "seen in the shapes of weights": (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "n_embd", "n_inner", "n_layer"),
        "num_key_value_heads",  # changed beside num_attention_heads
    ),
    "of new weights and of training": (
        *("initializer_range", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"),
        *("classifier_dropout", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits"),
    ),
    "of the language-model head": ("tie_word_embeddings", "final_logit_softcapping"),
    "of how a pass is computed": ("use_cache", "pretraining_tp", "is_decoder"),
    "a limit that nothing computes with, but for scaled rotary embeddings": ("max_position_embeddings", "n_positions"),
}


def test_the_matrix_has_every_field_of_every_family() -> None:
    plain = set(transformers.PretrainedConfig().to_dict())
    known = {name for names in WITHOUT_EFFECT.values() for name in names}
    known |= {name for _, changes in CASES.values() for name in changes}
    for family in FAMILIES:
        fields = set(transformers.AutoConfig.for_model(family).to_dict())
        # the pattern is how older Gemma 3 configs say layer_types
        assert fields - plain - known - {"_sliding_window_pattern"} == set(), family


def config_of(family: str, changes: dict[str, Any], tokenizer: Any) -> Any:
    common = {} if family == "gptj" else COMMON
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.AutoConfig.for_model(family, **{**common, **ids, **BASE[family], **changes})


def save(family: str, changes: dict[str, Any], tokenizer: Any, folder: Path) -> Any:
    """Save a checkpoint whose weights do not depend on the config where their shapes do not; returns its model, with the only
    kind of attention that has softcaps."""
    config = config_of(family, changes, tokenizer)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator()
    with torch.no_grad():  # large enough that attention is far from uniform, and with biases that count
        for name, parameter in model.named_parameters():
            generator.manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * drawn) if parameter.ndim < 2 else parameter.copy_(
                1.5 * drawn * parameter.shape[-1] ** -0.5
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


Saved = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def saved(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The checkpoint of a case, or of a family as it is, and its unpatched model."""
    root = tmp_path_factory.mktemp("configs")

    @functools.cache
    def made(name: str) -> tuple[Path, Any]:
        family, changes = CASES.get(name, (name, {}))
        folder = root / name.replace(" ", "_")
        return folder, save(family, changes, tokenizer, folder)

    return made


def load(saved: Saved, name: str) -> GritLM:
    model = GritLM(saved(name)[0], device="cpu", dtype="float32")
    gk.patch(model.model, **OPTIONS.get(name, {}))
    return model


@pytest.fixture(scope="module")
def bases(saved: Saved) -> Callable[[str], GritLM]:
    return functools.cache(lambda family: load(saved, family))


@pytest.fixture(scope="module")
def right_of_family(saved: Saved, bases: Callable[[str], GritLM]) -> Callable[[str], dict[str, np.ndarray]]:
    return functools.cache(lambda family: Stock(saved(family)[1], bases(family)).right)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(case: str, saved: Saved) -> GritLM:
    return load(saved, case)


class Stock:
    """transformers' unpatched model of a checkpoint, in float64 but for experts, which transformers multiplies in at most
    float32."""

    def __init__(self, unpatched: Any, model: GritLM) -> None:
        self.model = unpatched if hasattr(unpatched.config, "num_experts_per_tok") else unpatched.double()
        self.formatter = model.formatter

    def states(self, ids: list[int]) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Of a text that sees both sides: (tokens, hidden), and keys and values of each layer."""
        # a copy, since "dynamic" rotary embeddings remember the longest text
        decoder, cache = copy.deepcopy(gk.hf.decoder_of(self.model)), gk.hf.new_cache()
        flag: dict[str, bool] = {}
        if not getattr(decoder.config, "use_bidirectional_attention", False):
            decoder.config.is_causal = False
            flag = {} if decoder.config.model_type == "gptj" else {"is_causal": False}
        with torch.no_grad():
            found = decoder(torch.tensor([ids]), **flag, **gk.hf.cache_keyword(self.model, cache))
        return found.last_hidden_state[0], gk.hf.cached_states(cache)

    def vector(self, instruction: str, text: str) -> np.ndarray:
        sample = self.formatter.text(self.formatter.embed_instruction(instruction), text, 512)
        assert len(sample) > 2 * LATER > 2 * WINDOW, "beyond the window, and where scaling begins"
        pooled = self.states(sample.input_ids)[0][sample.instruction_len :].mean(0)
        return (pooled / pooled.norm()).numpy()

    @functools.cached_property
    def right(self) -> dict[str, np.ndarray]:
        return {"query": self.vector(INSTRUCTION, QUESTION), "document": self.vector("", DOCUMENT)}


@pytest.fixture(scope="module")
def stock(case: str, model: GritLM, saved: Saved) -> Stock:
    return Stock(saved(case)[1], model)


def assert_right(got: Any, want: Any) -> None:
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want)
    assert np.abs(got.reshape(want.shape) - want).max() < 2e-5 * np.abs(want).max()


def test_each_field_changes_the_vector(
    case: str, stock: Stock, right_of_family: Callable[[str], dict[str, np.ndarray]]
) -> None:
    family, changes = CASES[case]
    if changes:
        base = right_of_family(family)
        assert any(np.abs(base[name] - stock.right[name]).max() > 1e-3 for name in base)


# ---- the consumers


def encode(model: GritLM, stock: Stock, folder: Path) -> None:
    instruction = model.formatter.embed_instruction(INSTRUCTION)
    assert_right(model.encode([QUESTION, "short"], instruction=instruction)[0], stock.right["query"])
    prefix = model.formatter.embed_instruction("")
    assert_right(model.encode(["short", DOCUMENT], instruction=prefix)[1], stock.right["document"])


def train(model: GritLM, stock: Stock, folder: Path) -> None:
    from tests.python_model.training_samples import step_vectors

    options = gk.hf.patch_options(model.model)
    assert options is not None
    checkpoint = Path(model.model.name_or_path)
    query, document = step_vectors(
        checkpoint, folder, INSTRUCTION, QUESTION, DOCUMENT, lambda trained: gk.patch(trained.model, **options)
    )
    assert_right(query, stock.right["query"])
    assert_right(document, stock.right["document"])


def index(model: GritLM, stock: Stock, folder: Path) -> None:
    from python_model.rag.index import add_documents, open_index
    from python_model.rag.modes import Document

    opened = open_index(folder / "index", model)
    add_documents(opened, model, [Document("d", DOCUMENT), Document("e", "short")])
    assert_right(opened.vectors()[1][0], stock.right["document"])


def rag(model: GritLM, stock: Stock, folder: Path) -> None:
    from python_model.rag.answer import RAG
    from python_model.rag.reading import read

    answering = RAG(model, query_prefix=model.formatter.embed_instruction(INSTRUCTION))
    assert_right(answering._embed_question(QUESTION)[0], stock.right["query"])
    ids = answering._ids(model.formatter.embed_instruction(""), DOCUMENT)
    states, _ = read(model, [ids, ids[:5]], causal=answering.causal)
    for (keys, values), layer in zip(stock.states(ids)[1], states.keys_values, strict=True):
        assert_right(layer[0], keys[0])
        assert_right(layer[1], values[0])


def evaluation(model: GritLM, stock: Stock, folder: Path) -> None:
    from python_model.evaluation.retrieval import embed_documents, embed_queries

    assert_right(embed_queries(model, [(INSTRUCTION, QUESTION), ("", "short")])[0], stock.right["query"])
    assert_right(embed_documents(model, [DOCUMENT, "short"])[0], stock.right["document"])


def export(model: GritLM, stock: Stock, folder: Path, packed: bool = False) -> None:
    library = pytest.importorskip("sentence_transformers")
    from python_model.model.export import export_sentence_transformers

    instructions = {"query": INSTRUCTION, "document": ""}
    target = export_sentence_transformers(model, folder / "st", instructions=instructions, packed=packed)
    loaded = library.SentenceTransformer(str(target), device="cpu", trust_remote_code=packed)
    assert_right(loaded.encode([QUESTION, "short"], prompt_name="query")[0], stock.right["query"])
    assert_right(loaded.encode(["short", DOCUMENT], prompt_name="document")[1], stock.right["document"])


def packed_export(model: GritLM, stock: Stock, folder: Path) -> None:
    export(model, stock, folder, packed=True)


def mteb(model: GritLM, stock: Stock, folder: Path, installed: bool = False) -> None:
    from types import SimpleNamespace

    from python_model.evaluation.mteb_adapter import GritEncoder, mteb_encoder

    encoder: Any = mteb_encoder(model) if installed else GritEncoder(model)
    encoder.get_instruction = lambda *given: INSTRUCTION
    task: dict[str, Any] = {
        "task_metadata": SimpleNamespace(type="Retrieval", name="x"),
        "hf_split": "test",
        "hf_subset": "default",
    }
    for name, text in (("query", QUESTION), ("document", DOCUMENT)):
        side: Any = importlib.import_module("mteb.types").PromptType(name) if installed else name
        got = encoder.encode([{"text": [text, "short"]}], prompt_type=side, **task)
        assert_right(got[0], stock.right[name])


def with_mteb(model: GritLM, stock: Stock, folder: Path) -> None:
    pytest.importorskip("mteb")
    mteb(model, stock, folder, installed=True)


def lm_eval(model: GritLM, stock: Stock, folder: Path) -> None:
    from python_model.evaluation.lm_eval_adapter import lm_eval_arguments

    ids = torch.tensor([model.tokenizer(DOCUMENT)["input_ids"]])
    with torch.no_grad():
        want = stock.model(ids, use_cache=False).logits
        assert_right(lm_eval_arguments(model)["pretrained"](ids).logits, want)


def with_lm_eval(model: GritLM, stock: Stock, folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from python_model.evaluation.lm_eval_adapter import lm_eval_model

    ids = torch.tensor([model.tokenizer(DOCUMENT)["input_ids"]])
    with torch.no_grad():
        want = stock.model(ids, use_cache=False).logits
    assert_right(lm_eval_model(model)._model_call(ids), want)


OF_TOOLS = (with_mteb, with_lm_eval)
"""`make test-tools` installs the packages; what the others of the name call is all that is this project's."""
CONSUMERS = tuple(
    pytest.param(consumer, id=consumer.__name__, marks=[pytest.mark.tools] if consumer in OF_TOOLS else [])
    for consumer in (encode, train, index, rag, evaluation, export, packed_export, mteb, lm_eval, *OF_TOOLS)
)
REFUSED = {
    # by the length of the text, which "dynamic" may exceed
    ("llama rope dynamic", "index"): "documents: 'd' has more than 32 tokens",
    ("llama rope dynamic", "rag"): "max_length: expected room for the whole text",
    ("llama rope dynamic", "export"): "max_length: expected at most the model's 32 positions",
    ("llama rope dynamic", "packed_export"): "max_length: expected at most the model's 32 positions",
    ("phi3 rope longrope", "export"): "rope_parameters: expected",
}
"""(case, consumer): how the error begins."""


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_field_reaches_every_consumer(
    case: str, consumer: Callable[..., None], model: GritLM, stock: Stock, tmp_path: Path
) -> None:
    if case == "gemma3_text use_bidirectional_attention" and consumer in (lm_eval, with_lm_eval):
        pytest.skip("such a model generates nothing in transformers")
    if (begin := REFUSED.get((case, consumer.__name__))) is not None:
        with pytest.raises(ValueError, match=f"^{begin}"):
            consumer(model, stock, tmp_path)
        return
    consumer(model, stock, tmp_path)


def test_an_index_of_another_config_is_refused(
    case: str, model: GritLM, bases: Callable[[str], GritLM], tmp_path: Path
) -> None:
    from python_model.model.identity import fingerprint

    family, changes = CASES[case]
    assert (fingerprint(model) == fingerprint(bases(family))) == (not changes)


@pytest.mark.parametrize(
    "consumer", [consumer for consumer in CONSUMERS if consumer.id not in ("lm_eval", "with_lm_eval")]
)
def test_a_decoder_that_attends_otherwise_than_the_settings_say_is_refused(
    consumer: Callable[..., None], saved: Saved, tmp_path: Path
) -> None:
    """Settings are what is saved and exported, so a window given to patch() afterwards would be lost there."""
    model = load(saved, "mistral")
    stock = Stock(saved("mistral")[1], model)
    gk.patch(model.model, bidirectional_window="full")
    with pytest.raises(
        ValueError, match=r"bidirectional_window: expected 'transformers' as in the settings, got .*'full'"
    ):
        consumer(model, stock, tmp_path)
    gk.unpatch(model.model)
    if consumer is not train:  # which loads and patches the model itself
        with pytest.raises(ValueError, match=r"model: expected a patched decoder, .*got one after unpatch\(\)"):
            consumer(model, stock, tmp_path)
