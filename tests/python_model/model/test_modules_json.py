"""Folders of sentence-transformers load with one line and give the vectors that sentence-transformers gives from them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_model import GritLM
from python_model.model.modules_json import head_of_modules, settings_of_modules

st = pytest.importorskip("sentence_transformers")

# the last one is longer than every window
TEXTS = ["A river flows.", "def add(first, second):", "x", "The capital of France is a city with a river in it. " * 4]
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def save_decoder(folder: Path, kind: str, tokenizer: Any, single: str, **config: Any) -> str:
    """A decoder without a language-model head, whose tokenizer adds what the template ``single`` says."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    torch.manual_seed(0)
    own = copy.deepcopy(tokenizer)
    special = [("<s>", 1), ("</s>", 2)]
    own.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    settings = getattr(transformers, f"{kind}Config")(**{**SMALL, "vocab_size": len(own), **config})
    getattr(transformers, f"{kind}Model")(settings).save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)


def modules_of(decoder: str, pooling: str, dense: list[tuple[int, int, bool, Any]] = [], **options: Any) -> list[Any]:  # noqa: B006
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    torch.manual_seed(1)
    text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    first = Transformer(decoder, modality_config=text, module_output_name="token_embeddings", max_seq_length=512)
    layers = [Dense(i, o, bias=bias, activation_function=activation) for i, o, bias, activation in dense]
    return [first, Pooling(64, pooling, **options), *layers, Normalize()]


def embedding_gemma(folder: Path, tokenizer: Any) -> None:
    """Bidirectional by its config, a window in five of six layers, mean pooling over the prompt too, two linear layers."""
    decoder = save_decoder(
        folder / "decoder",
        "Gemma3Text",
        tokenizer,
        "<s> $A </s>",
        num_hidden_layers=3,
        sliding_window=64,
        sliding_window_pattern=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=32,
        use_bidirectional_attention=True,
    )
    modules = modules_of(decoder, "mean", [(64, 96, False, torch.nn.Identity()), (96, 48, False, torch.nn.Identity())])
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    st.SentenceTransformer(modules=modules, prompts=prompts).save(str(folder / "model"))


def qwen3_embedding(folder: Path, tokenizer: Any) -> None:
    """Causal, last token, which is the end token that the tokenizer adds."""
    decoder = save_decoder(folder / "decoder", "Qwen3", tokenizer, "$A </s>", num_hidden_layers=2)
    prompts = {"query": "Instruct: Given a web search query, find the page\nQuery:", "document": ""}
    st.SentenceTransformer(modules=modules_of(decoder, "lasttoken"), prompts=prompts).save(str(folder / "model"))


def e5_mistral(folder: Path, tokenizer: Any) -> None:
    """As older versions wrote it: one flag per kind of pooling."""
    decoder = save_decoder(
        folder / "decoder", "Mistral", tokenizer, "<s> $A </s>", num_hidden_layers=2, sliding_window=64
    )
    prompts = {"web_search_query": "Instruct: Given a web search query, find the page\nQuery: "}
    st.SentenceTransformer(modules=modules_of(decoder, "lasttoken"), prompts=prompts).save(str(folder / "model"))
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling: dict[str, Any] = {f"pooling_mode_{flag}": flag == "lasttoken" for flag in flags}
    pooling |= {"word_embedding_dimension": 64, "include_prompt": True}
    (folder / "model" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def instructor_like(folder: Path, tokenizer: Any) -> None:
    """The prompt is left out of the pooling, a head with an activation, a prompt that stands there by default."""
    decoder = save_decoder(folder / "decoder", "Llama", tokenizer, "<s> $A", num_hidden_layers=2)
    modules = modules_of(decoder, "mean", [(64, 32, True, torch.nn.Tanh())], include_prompt=False)
    prompts = {"query": "Represent the question:\n", "document": "Represent the text:\n"}
    model = st.SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name="document")
    model.save(str(folder / "model"))


@pytest.mark.parametrize("mode", ["unified", "embedding"])
@pytest.mark.parametrize("layout", [embedding_gemma, qwen3_embedding, e5_mistral, instructor_like])
def test_vectors_are_those_of_sentence_transformers(
    layout: Callable[[Path, Any], None], mode: str, tokenizer: Any, tmp_path: Path
) -> None:
    layout(tmp_path, tokenizer)
    folder = tmp_path / "model"
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mode: .* has no lm_head")
        ours = GritLM(folder, mode=mode, device="cpu", dtype="float32")
    assert ours.settings.prompts == theirs.prompts
    for name in [None, *theirs.prompts]:
        want = np.concatenate([theirs.encode([text], prompt_name=name) for text in TEXTS])
        np.testing.assert_allclose(ours.encode(TEXTS, prompt_name=name), want, atol=1e-5)
    want = theirs.encode(TEXTS, prompt="find this: ")
    np.testing.assert_allclose(ours.encode(TEXTS, instruction="find this: "), want, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    again = GritLM(tmp_path / "again", mode=mode, device="cpu", dtype="float32")
    assert again.settings == ours.settings
    np.testing.assert_allclose(again.encode(TEXTS), ours.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("where", ["sentence_bert_config.json", "tokenizer_config.json", "config.json"])
def test_a_text_is_cut_where_sentence_transformers_cuts_it(where: str, tokenizer: Any, tmp_path: Path) -> None:
    """Older versions keep the limit in their own file, newer ones in the tokenizer's; both end at the decoder's positions."""
    limit = 60  # more than the prompt alone
    qwen3_embedding(tmp_path, tokenizer)
    folder = tmp_path / "model"
    for name, change in {
        "sentence_bert_config.json": {"max_seq_length": limit if where == "sentence_bert_config.json" else None},
        "tokenizer_config.json": {"model_max_length": limit if where == "tokenizer_config.json" else 10**30},
        "config.json": {"max_position_embeddings": limit if where == "config.json" else 512},
    }.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    ours = GritLM(folder, mode="embedding", device="cpu", dtype="float32")
    assert ours.max_length == theirs.max_seq_length == limit
    for name in (None, "query"):
        found, want = ours.encode(TEXTS, prompt_name=name), theirs.encode(TEXTS, prompt_name=name)
        np.testing.assert_allclose(found, want, atol=1e-5)
    assert ours.texts_cut > 0 and np.abs(ours.encode(TEXTS, max_length=512) - ours.encode(TEXTS)).max() > 1e-3


def test_texts_longer_than_gritlm_s_own_limit_are_read_whole(tokenizer: Any, tmp_path: Path) -> None:
    qwen3_embedding(tmp_path, tokenizer)
    folder = tmp_path / "model"
    for name, change in (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings")):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {change: 2048}))
    text = TEXTS[-1] * 20
    ours = GritLM(folder, mode="embedding", device="cpu", dtype="float32")
    want = st.SentenceTransformer(str(folder), device="cpu").encode([text])
    np.testing.assert_allclose(ours.encode([text]), want, atol=1e-5)
    assert len(ours.tokenizer(text)["input_ids"]) > 600 and ours.texts_cut == 0


@pytest.mark.parametrize("layout", [embedding_gemma, qwen3_embedding, e5_mistral, instructor_like])
def test_queries_and_documents_get_the_prompts_that_sentence_transformers_gives_them(
    layout: Callable[[Path, Any], None], tokenizer: Any, tmp_path: Path
) -> None:
    layout(tmp_path, tokenizer)
    folder = tmp_path / "model"
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    ours = GritLM(folder, mode="embedding", device="cpu", dtype="float32")
    np.testing.assert_allclose(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode_corpus(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)
    name = next(iter(theirs.prompts))
    want = theirs.encode(TEXTS, prompt_name=name)
    np.testing.assert_allclose(ours.encode_queries(TEXTS, prompt_name=name), want, atol=1e-5)
    found = ours.encode_corpus([{"title": "", "text": text} for text in TEXTS], instruction="find this: ")
    np.testing.assert_allclose(found, theirs.encode(TEXTS, prompt="find this: "), atol=1e-5)


@pytest.mark.parametrize(
    "texts",
    [
        {"prompts": {"corpus": "corpus: ", "passage": "passage: ", "document": "document: "}},
        {"prompts": {"corpus": "corpus: ", "passage": "passage: "}},
        {"prompts": {"search": "find: "}, "default_prompt_name": "search"},
    ],
    ids=["several", "others", "default"],
)
def test_prompts_are_chosen_as_sentence_transformers_chooses_them(
    texts: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """There, every model has a prompt for queries and one for documents, which are empty if the folder has none."""
    qwen3_embedding(tmp_path, tokenizer)
    file = tmp_path / "model" / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | texts))
    theirs = st.SentenceTransformer(str(file.parent), device="cpu")
    ours = GritLM(file.parent, mode="embedding", device="cpu", dtype="float32")
    assert ours.settings.prompts == theirs.prompts
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode_corpus(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)


def test_arguments_and_grit_json_go_before_modules_json(tokenizer: Any, tmp_path: Path) -> None:
    qwen3_embedding(tmp_path, tokenizer)
    folder = tmp_path / "model"
    model = GritLM(folder, mode="embedding", device="cpu", pooling_method="mean")
    assert (model.pooling_method, model.attn) == ("mean", "cccc")
    model.settings.changed(attn="bb").save(folder)
    assert GritLM(folder, mode="embedding", device="cpu").attn == "bbcc"


def test_a_checkpoint_without_a_language_model_head_says_so(tokenizer: Any, tmp_path: Path) -> None:
    qwen3_embedding(tmp_path, tokenizer)
    with pytest.warns(UserWarning, match="mode: .*has no lm_head.weight, .*mode='embedding'"):
        GritLM(tmp_path / "model", device="cpu")


def test_prompts_are_named_and_exclude_an_instruction(tokenizer: Any, tmp_path: Path) -> None:
    qwen3_embedding(tmp_path, tokenizer)
    model = GritLM(tmp_path / "model", mode="embedding", device="cpu")
    with pytest.raises(ValueError, match="prompt_name: expected one of 'document', 'query', got 'passage'"):
        model.encode("a", prompt_name="passage")
    with pytest.raises(ValueError, match="prompt_name: expected none beside an instruction, got 'query'"):
        model.encode("a", instruction="Find", prompt_name="query")


def test_what_says_how_a_decoder_is_loaded_is_accepted(tokenizer: Any, tmp_path: Path) -> None:
    qwen3_embedding(tmp_path, tokenizer)
    file = tmp_path / "model" / "sentence_bert_config.json"
    known = {
        "model_args": {"torch_dtype": "bfloat16"},
        "tokenizer_args": {"padding_side": "left"},
        "query_length": None,
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **known, "transformer_task": "feature-extraction"}))
    assert GritLM(tmp_path / "model", mode="embedding", device="cpu").pooling_method == "lasttoken"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("modules.json", {"append": "sentence_transformers.models.LayerNorm"}, "expected modules .*got LayerNorm"),
    ("modules.json", {"append": "sentence_transformers.models.Pooling"}, "in turn, got"),
    ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling: expected one of mean, .*got 'max'"),
    ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "pooling: expected one of"),
    ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case: expected none, got True"),
    ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "modality_config: expected an entry 'text'"),
    (
        "sentence_bert_config.json",
        {"processing_kwargs": {"text": {"max_length": 8}}},
        "processing_kwargs: expected none",
    ),
    ("sentence_bert_config.json", {"query_length": 8}, "query_length: expected none, got 8"),
    ("sentence_bert_config.json", {"document_length": 8}, "document_length: expected none, got 8"),
    ("sentence_bert_config.json", {"query_expansion": {"length": 8}}, "query_expansion: expected none"),
    ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "expected 'feature-extraction', got"),
    ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side: expected 'right' .*, got 'left'"),
    (
        "sentence_bert_config.json",
        {"model_args": {"num_hidden_layers": 1}},
        "model_args: expected .*'num_hidden_layers'",
    ),
    ("sentence_bert_config.json", {"something_new": 1}, "something_new: expected none, got 1"),
    ("1_Pooling/config.json", {"something_new": True}, "pooling: something_new: expected none, got True"),
    ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name: expected 'sentence_emb"),
    (
        "config_sentence_transformers.json",
        {"model_type": "SparseEncoder"},
        "model_type: expected 'SentenceTransformer'",
    ),
    ("config_sentence_transformers.json", {"something_new": "x"}, "something_new: expected none, got 'x'"),
    ("config_sentence_transformers.json", {"truncate_dim": 32}, "truncate_dim: expected none, got 32"),
    ("config_sentence_transformers.json", {"prompts": {"query": "<s>Find"}}, "special token '<s>' in 'query'"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_would_give_other_vectors_is_refused(
    name: str, change: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    qwen3_embedding(tmp_path, tokenizer)
    file = tmp_path / "model" / name
    content = json.loads(file.read_text()) if file.exists() else {}
    if isinstance(content, list):
        content.append({"idx": 9, "name": "9", "path": "9_More", "type": change["append"]})
    else:
        content |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        GritLM(tmp_path / "model", mode="embedding", device="cpu")


FOLDER: dict[str, Any] = {
    "modules.json": [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in (("", "Transformer"), ("1", "Pooling"), ("2", "Dense"), ("3", "Dense"), ("4", "Normalize"))
    ],
    "1/config.json": {"pooling_mode": "mean"},
    "2/config.json": {"out_features": 6, "activation_function": "torch.nn.modules.linear.Identity"},
    "3/config.json": {"out_features": 4, "activation_function": "torch.nn.modules.activation.Tanh"},
    "4/config.json": {},
    "config_sentence_transformers.json": {"prompts": {"query": "Find: "}},
    "config.json": {"is_causal": False},
}
OF_FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "a residual": ({"2/config.json": {"use_residual": True}}, "2: use_residual: expected none, got True"),
    **{
        f"another {side}": (
            {"3/config.json": {name: "token_embeddings"}},
            f"3: {name}: expected 'sentence_embedding', got 'token_embeddings'",
        )
        for side, name in (("input", "module_input_name"), ("output", "module_output_name"))
    },
    "an unknown option of the normalisation": ({"4/config.json": {"p": 1}}, "4: p: expected none, got 1"),
    "a layer after an activation": (
        {"2/config.json": {"activation_function": "torch.nn.Tanh"}},
        "3: expected no linear layer after an activation, got one",
    ),
    "an unknown activation": (
        {"3/config.json": {"activation_function": "torch.nn.SiLU"}},
        "activation_function: expected one of .*, got 'torch.nn.SiLU'",
    ),
    "a prompt that counts in part": (
        {"1/config.json": {"pooling_mode": "cls", "include_prompt": False}},
        "include_prompt: expected true with pooling 'cls' and prompts, got false",
    ),
}


def reader_of(folder: Path, changes: dict[str, Any]) -> Callable[[str], Path | None]:
    """Reads a written FOLDER whose objects have these changes, and whose lists are replaced."""
    for name, content in FOLDER.items():
        (folder / name).parent.mkdir(exist_ok=True)
        changed = changes.get(name, {})
        written = changed or content if isinstance(content, list) else {**content, **changed}
        (folder / name).write_text(json.dumps(written))
    return lambda name: folder / name if (folder / name).exists() else None


@pytest.mark.parametrize("name", OF_FOLDERS)
def test_an_option_of_a_module_that_is_not_supported_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = OF_FOLDERS[name]
    with pytest.raises(ValueError, match=message):
        settings_of_modules(reader_of(tmp_path, changes))


@pytest.mark.parametrize(
    "kinds",
    [
        "Pooling",
        "Transformer Normalize",
        "Transformer Dense Pooling",
        "Transformer Pooling Normalize Dense",
        "Transformer Pooling Normalize Normalize",
        "Transformer Transformer Pooling",
        "Pooling Transformer",
    ],
)
def test_modules_in_another_order_are_refused(kinds: str, tmp_path: Path) -> None:
    listed = [{"path": str(n) if n else "", "type": f"models.{kind}"} for n, kind in enumerate(kinds.split())]
    with pytest.raises(ValueError, match="in turn, got"):
        settings_of_modules(reader_of(tmp_path, {"modules.json": listed}))


def test_a_folders_modules_become_settings_and_one_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    read = reader_of(tmp_path, {"2/config.json": {"bias": False}})
    found = settings_of_modules(read)
    assert found is not None
    assert (found.pooling_method, found.normalized, found.attn, found.embed_instruction) == ("mean", True, "bbcc", True)
    assert (found.projection, found.projection_activation, found.format) == (4, "tanh", "plain")
    assert dict(found.prompts) == {"query": "Find: ", "document": ""} and found.default_prompt_name is None
    generator = torch.Generator().manual_seed(0)
    first, second, bias = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (4, 6), (4,)))
    with pytest.raises(FileNotFoundError, match="expected the weights 2/model.safetensors, got no such file"):
        head_of_modules(read)
    save_file({"linear.weight": first}, tmp_path / "2" / "model.safetensors")
    save_file({"linear.weight": second, "linear.bias": bias}, tmp_path / "3" / "model.safetensors")
    head = head_of_modules(read)
    assert head is not None
    x = torch.randn(5, generator=generator)
    torch.testing.assert_close(head["weight"] @ x + head["bias"], second @ (first @ x) + bias, rtol=1e-5, atol=1e-5)
    causal = reader_of(tmp_path, {"modules.json": FOLDER["modules.json"][:2], "config.json": {"is_causal": True}})
    found = settings_of_modules(causal)
    assert found is not None and head_of_modules(causal) is None
    assert (found.attn, found.normalized, found.projection) == ("cccc", False, None)
    assert settings_of_modules(lambda name: None) is None and head_of_modules(lambda name: None) is None
    moved = [{"path": "0_Transformer", "type": "models.Transformer"}, *FOLDER["modules.json"][1:]]
    with pytest.raises(ValueError, match="expected the decoder in the folder itself, got '0_Transformer'"):
        settings_of_modules(reader_of(tmp_path, {"modules.json": moved}))
