"""Every setting reaches every consumer, or is refused there by name: setting x consumer, texts longer than the window.

The right vector comes from a computation by hand: tokens put together from pieces, unpatched transformers under a dense mask,
pooling and head in float64.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_model import GritLM
from python_model.settings import NAMES

INSTRUCTION = "Find the text"
# with the format more than twice the window of 64 tokens; it merges with the newline in front of it
TEXT = "  Leading spaces and\n\nblank lines; " + "a river flows through the city, " * 20 + "code"
DOCUMENT = "The capital of France is a city with a river in it. " * 14

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "pooling_method": {"pooling_method": "weightedmean"},
    "pooling_method lasttoken": {"pooling_method": "lasttoken"},
    "pooling_method cls": {"pooling_method": "cls"},
    "normalized": {"normalized": False},
    "attn": {"attn": "cccc"},
    "attn cb": {"attn": "cbcc"},
    "attn of conversations": {"attn": "bbbc"},
    "embed_eos": {"pooling_method": "lasttoken", "embed_eos": "</e>"},
    "embed_eos of a mean": {"embed_eos": "</e>"},
    "instruction_count": {"instruction_count": "reference"},
    "embed_instruction": {"embed_instruction": True},
    "bidirectional_window": {"bidirectional_window": "full"},
    "projection": {"projection": 16},
    "projection_activation": {"projection": 16, "projection_activation": "gelu"},
    "truncate_dim": {"truncate_dim": 24},
    "truncate_dim of a projection": {"projection": 16, "projection_activation": "gelu", "truncate_dim": 7},
    "special_tokens": {"special_tokens": "bos"},
    "format": {"format": "zephyr"},
    "prompts, default_prompt_name": {
        "format": "plain",
        "prompts": {"any": "Find: "},
        "default_prompt_name": "any",
        "instruction_count": "reference",
    },
}


def needs(package: str, name: str) -> Any:
    """The cell with the package itself."""
    missing = pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{name} is an extra")
    return pytest.param(True, marks=[pytest.mark.tools, missing], id=name)


def test_the_matrix_has_every_setting() -> None:
    assert {name for case in CASES.values() for name in case} == set(NAMES)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def saved(case: str, checkpoint_without_bos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the settings in its grit.json; consumers get nothing but its folder."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("matrix") / "saved"
    options = {"device": "cpu", "dtype": "float32", **CASES[case]}
    GritLM(checkpoint_without_bos, is_inference=False, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved: Path) -> GritLM:
    return GritLM(saved, device="cpu", dtype="float32")


def tokens_by_hand(folder: Path, settings: dict[str, Any], instruction: str, text: str) -> tuple[list[int], int]:
    """Token ids, and how many in front are not pooled."""
    tokenizer = tokenizer_by_hand(folder)
    start = [tokenizer.bos_token_id] if settings.get("special_tokens") == "bos" else []
    end_of_turn: list[int] = []
    if settings.get("format") == "plain":
        head, prefix = "", settings["prompts"][settings["default_prompt_name"]] if not instruction else instruction
    elif settings.get("format") == "zephyr" and instruction:
        head, prefix, end_of_turn = f"<|user|>\n{instruction}", "\n<|embed|>\n", [tokenizer.eos_token_id]
    else:
        head, prefix = "", f"<|user|>\n{instruction}\n<|embed|>\n" if instruction else "<|embed|>\n"
    before = [*start, *tokenizer(head, add_special_tokens=False)["input_ids"], *end_of_turn]
    encoded = tokenizer(prefix + text, add_special_tokens=False, return_offsets_mapping=True)
    skip = sum(stop <= len(prefix) for _, stop in encoded["offset_mapping"])
    if settings.get("instruction_count") == "reference":
        skip = len(tokenizer(prefix, add_special_tokens=False)["input_ids"])
    suffix = tokenizer(settings.get("embed_eos", ""), add_special_tokens=False)["input_ids"]
    return [*before, *encoded["input_ids"], *suffix], 0 if settings.get("embed_instruction") else len(before) + skip


@functools.lru_cache(maxsize=2)
def decoder_by_hand(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()


@functools.lru_cache(maxsize=2)
def tokenizer_by_hand(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def states_by_hand(folder: Path, ids: list[int], skip: int, settings: dict[str, Any]) -> torch.Tensor:
    decoder = decoder_by_hand(folder)
    window, attn = decoder.config.sliding_window, settings.get("attn", "bbcc")
    row, column = torch.arange(len(ids))[:, None], torch.arange(len(ids))[None]
    bidirectional = torch.full((len(ids), 1), attn[1] == "b")
    bidirectional[:skip] = attn[0] == "b"
    # a token that sees only its past sees itself and W - 1 before it, the others |i - j| <= W
    near = (row - column).abs() <= window
    if settings.get("bidirectional_window") == "full":
        near = torch.ones_like(near)
    past = (column <= row) & (row - column < window)
    if attn[:2] == "cb":  # the window to the left follows the flag of the sample, which is bidirectional
        past = (column <= row) & near
    visible = torch.where(bidirectional, near, past)
    assert len(ids) > 2 * window
    with torch.no_grad():
        return decoder(torch.tensor([ids]), attention_mask=visible[None, None]).last_hidden_state[0]


def vector_by_hand(folder: Path, settings: dict[str, Any], instruction: str, text: str) -> np.ndarray:
    from safetensors.torch import load_file

    ids, skip = tokens_by_hand(folder, settings, instruction, text)
    states = states_by_hand(folder, ids, skip, settings)
    pooled = states[skip:]
    weights = torch.arange(1, len(pooled) + 1, dtype=torch.float64)
    vector = {
        "mean": pooled.mean(0),
        "weightedmean": weights @ pooled / weights.sum(),
        "lasttoken": pooled[-1],
        "cls": states[0],
    }[settings.get("pooling_method", "mean")]
    if "projection" in settings:
        head = load_file(folder / "embedding_head.safetensors")
        vector = head["weight"].double() @ vector + head["bias"].double()
        if settings.get("projection_activation") == "gelu":
            vector = vector * 0.5 * (1 + torch.erf(vector / 2**0.5))
    vector = vector[: settings.get("truncate_dim")]
    return (vector / vector.norm() if settings.get("normalized", True) else vector).numpy()


@pytest.fixture(scope="module")
def right(case: str, saved: Path) -> dict[str, np.ndarray]:
    """The vectors of the text with an instruction and of the document without one."""
    settings = CASES[case]
    return {
        "query": vector_by_hand(saved, settings, INSTRUCTION, TEXT),
        "document": vector_by_hand(saved, settings, "", DOCUMENT),
    }


def assert_right(got: Any, want: np.ndarray) -> None:
    got = np.asarray(got, dtype=np.float64).reshape(-1)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


TEXTS = {"query": (INSTRUCTION, TEXT), "document": ("", DOCUMENT)}
BESIDE = {"projection_activation": "projection", "embed_eos": "pooling_method lasttoken"}
OF_ANOTHER_SIZE = ("projection", "truncate_dim", "truncate_dim of a projection")
"""Cases that another one is compared with; the others are compared with the defaults."""


def test_each_case_changes_the_vector(case: str, saved: Path, right: dict[str, np.ndarray]) -> None:
    if case in ("defaults", "attn of conversations"):
        return
    settings = CASES[BESIDE.get(case, "defaults")]
    others = [vector_by_hand(saved, settings, *pair) for pair in TEXTS.values()]
    pairs = list(zip(right.values(), others, strict=True))
    assert any(a.shape != b.shape or np.abs(a - b).max() > 1e-4 for a, b in pairs)
    assert case in OF_ANOTHER_SIZE or all(a.shape == b.shape for a, b in pairs)


def test_encode(model: GritLM, right: dict[str, np.ndarray]) -> None:
    for name, (instruction, text) in TEXTS.items():
        assert_right(model.encode(text, instruction=model.formatter.embed_instruction(instruction)), right[name])


def test_train(saved: Path, right: dict[str, np.ndarray], tmp_path: Path) -> None:
    from tests.python_model.training_samples import step_vectors

    query, document = step_vectors(saved, tmp_path, INSTRUCTION, TEXT, DOCUMENT)
    assert_right(query, right["query"])
    assert_right(document, right["document"])


def test_index(model: GritLM, right: dict[str, np.ndarray], tmp_path: Path) -> None:
    from python_model.rag.index import add_documents, open_index
    from python_model.rag.modes import Document

    index = open_index(tmp_path / "index", model)
    add_documents(index, model, [Document("d", DOCUMENT)])
    assert_right(index.vectors()[1], right["document"])
    (hit,) = index.search(model.encode([TEXT], instruction=model.formatter.embed_instruction(INSTRUCTION)))[0]
    assert hit.score == pytest.approx(float(right["query"] @ right["document"]), rel=1e-4)


@pytest.fixture(scope="module")
def defaults(checkpoint_without_bos: Path) -> GritLM:
    return GritLM(checkpoint_without_bos, device="cpu", dtype="float32")


def test_an_index_of_other_settings_is_refused(case: str, model: GritLM, defaults: GritLM) -> None:
    from python_model.rag.fingerprint import embedding_settings

    same = embedding_settings(model) == embedding_settings(defaults)
    # generation and format are not the index's business: the prefix it records is
    assert same == (case in ("defaults", "attn of conversations", "format"))


def test_rag(case: str, saved: Path, model: GritLM, right: dict[str, np.ndarray]) -> None:
    from python_model.rag.answer import RAG
    from python_model.rag.reading import read

    name, settings = case.split()[0], CASES[case]
    if case in ("attn cb", "attn of conversations") or settings.get("format") == "plain":
        with pytest.raises(ValueError, match=f"{'format' if 'format' in settings else name}: "):
            RAG(model)
        return
    rag = RAG(model, query_prefix=model.formatter.embed_instruction(INSTRUCTION))
    assert_right(rag._embed_question(TEXT)[0], right["query"])
    bare = {**settings, "embed_eos": ""}  # what is kept of a document goes on, so it has no end
    ids, skip = tokens_by_hand(saved, bare, "", DOCUMENT)
    assert rag._ids(rag.model.formatter.embed_instruction(""), DOCUMENT) == ids
    (states,) = read(model, [ids], causal=rag.causal)
    # the keys of the second layer depend on everything the first one saw
    hidden = states_by_hand(saved, ids, skip, settings)
    assert len(states) == len(hidden)
    _, prompt, _, _ = rag.prepare("Why?", [], "none", "It", None)
    end = "</s>" if settings.get("format") == "zephyr" else ""
    start = "<s>" if settings.get("special_tokens") == "bos" else ""
    assert model.tokenizer.decode(prompt) == f"{start}<|user|>\nWhy?{end}\n<|assistant|>\nIt"


def test_evaluation(model: GritLM, right: dict[str, np.ndarray]) -> None:
    from python_model.evaluation.retrieval import embed_documents, embed_queries

    assert_right(embed_queries(model, [(INSTRUCTION, TEXT)]), right["query"])
    assert_right(embed_documents(model, [DOCUMENT]), right["document"])


@pytest.mark.parametrize("packed", [False, True])
def test_export(case: str, model: GritLM, right: dict[str, np.ndarray], packed: bool, tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from python_model.model.export import export_sentence_transformers

    options: dict[str, Any] = {"instructions": {"query": INSTRUCTION, "document": ""}, "packed": packed}
    if case in ("pooling_method", "attn cb", "embed_eos of a mean"):
        with pytest.raises(ValueError, match=f"{case.split()[0]}: expected"):
            export_sentence_transformers(model, tmp_path / "st", **options)
        return
    folder = export_sentence_transformers(model, tmp_path / "st", **options)
    loaded = st.SentenceTransformer(str(folder), device="cpu", trust_remote_code=packed)
    # its prompts are counted alone, so this text must not merge with one
    text = TEXT.strip()
    want = vector_by_hand(Path(model.model.name_or_path), CASES[case], INSTRUCTION, text)
    assert_right(loaded.encode([text], prompt_name="query"), want)
    assert_right(loaded.encode([DOCUMENT], prompt_name="document"), right["document"])
    np.testing.assert_allclose(loaded.encode([DOCUMENT]), model.encode([DOCUMENT]), atol=2e-5)


@pytest.mark.parametrize("installed", [False, needs("mteb", "mteb")])
def test_mteb(model: GritLM, right: dict[str, np.ndarray], installed: bool) -> None:
    """What encodes is this project's; mteb's base class, where it is installed, adds nothing to it."""
    from types import SimpleNamespace

    from python_model.evaluation.mteb_adapter import GritEncoder, mteb_encoder

    encoder: Any = mteb_encoder(model) if installed else GritEncoder(model)
    encoder.get_instruction = lambda *given: INSTRUCTION
    task: dict[str, Any] = {
        "task_metadata": SimpleNamespace(type="Retrieval", name="x"),
        "hf_split": "test",
        "hf_subset": "default",
    }
    for name, text in (("query", TEXT), ("document", DOCUMENT)):
        side: Any = importlib.import_module("mteb.types").PromptType(name) if installed else name
        assert_right(encoder.encode([{"text": [text]}], prompt_type=side, **task), right[name])


@pytest.mark.parametrize("installed", [False, needs("lm_eval", "lm-eval")])
def test_lm_eval(case: str, saved: Path, model: GritLM, installed: bool) -> None:
    """What lm-eval is given; where it is installed, what it makes of that."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from python_model.evaluation.lm_eval_adapter import lm_eval_arguments, lm_eval_model

    if not model.attention.generates_causally:
        for function in (lm_eval_arguments, lm_eval_model):
            with pytest.raises(ValueError, match="attn: expected"):
                function(model)
        return
    tokenizer = AutoTokenizer.from_pretrained(saved)
    start = [tokenizer.bos_token_id] if CASES[case].get("special_tokens") == "bos" else []
    ids = [*start, *tokenizer(DOCUMENT.strip(), add_special_tokens=False)["input_ids"]]
    given = lm_eval_arguments(model)
    assert given["tokenizer"](DOCUMENT.strip())["input_ids"] == ids
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    with torch.no_grad():
        want = plain(torch.tensor([ids])).logits
        got = given["pretrained"](torch.tensor([ids])).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    if installed:
        wrapped = lm_eval_model(model)
        assert wrapped.tok_encode(DOCUMENT.strip()) == ids
        torch.testing.assert_close(wrapped._model_call(torch.tensor([ids])), want, atol=1e-4, rtol=1e-4)
