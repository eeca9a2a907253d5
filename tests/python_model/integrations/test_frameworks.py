"""LangChain and LlamaIndex over the OpenAI-compatible server and over the sentence-transformers export: GritLM's own results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_model import GritLM
from python_model.model.prompts import embed_instruction

pytestmark = pytest.mark.tools
DOCUMENTS = ["A river flows through the city.", "Paris is the capital of France."]
QUESTION = "Where is the government of France?"
TASK = "Find the answer"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def url(model: GritLM) -> Iterator[str]:
    """Address of a live server."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from tests.python_model.serve.server import serving

    with serving(model, query_instruction=TASK) as running:
        yield f"{running.url}/v1"


@pytest.fixture(scope="module")
def exported(model: GritLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("sentence_transformers")
    from python_model.model.export import export_sentence_transformers

    folder = tmp_path_factory.mktemp("export") / "st"
    return str(export_sentence_transformers(model, folder, instructions={"query": TASK, "document": ""}))


@pytest.fixture(scope="module")
def expected(model: GritLM) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the documents and of the question."""
    documents = model.encode(DOCUMENTS, instruction=embed_instruction(""))
    return documents, model.encode(QUESTION, instruction=embed_instruction(TASK))


def close(found: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(found), want, atol=2e-5)


# ---- LangChain


def test_langchain_over_the_server(url: str, model: GritLM, expected: tuple[np.ndarray, np.ndarray]) -> None:
    openai = pytest.importorskip("langchain_openai")
    where = {"base_url": url, "api_key": "none", "model": "tiny"}
    plain = {"check_embedding_ctx_length": False}  # else it sends token numbers of OpenAI's own vocabulary
    documents = openai.OpenAIEmbeddings(**where, **plain, model_kwargs={"extra_body": {"input_type": "document"}})
    queries = openai.OpenAIEmbeddings(**where, **plain, model_kwargs={"extra_body": {"input_type": "query"}})
    close(documents.embed_documents(DOCUMENTS), expected[0])
    close(queries.embed_query(QUESTION), expected[1])
    from python_model.generate import reply

    chat = openai.ChatOpenAI(**where, temperature=0, max_completion_tokens=8)
    assert chat.invoke(QUESTION).content == reply(model, [QUESTION], max_new_tokens=8, format="grit")
    assert "".join(str(part.content) for part in chat.stream(QUESTION)) == chat.invoke(QUESTION).content


def test_langchain_over_sentence_transformers(exported: str, expected: tuple[np.ndarray, np.ndarray]) -> None:
    huggingface = pytest.importorskip("langchain_huggingface")
    embeddings = huggingface.HuggingFaceEmbeddings(
        model_name=exported,
        model_kwargs={"device": "cpu"},
        encode_kwargs={"prompt_name": "document"},
        query_encode_kwargs={"prompt_name": "query"},
    )
    close(embeddings.embed_documents(DOCUMENTS), expected[0])
    close(embeddings.embed_query(QUESTION), expected[1])


def test_a_langchain_store_finds_the_passage_that_gritlm_finds(
    exported: str, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    huggingface = pytest.importorskip("langchain_huggingface")
    from langchain_core.vectorstores import InMemoryVectorStore

    embeddings = huggingface.HuggingFaceEmbeddings(
        model_name=exported, encode_kwargs={"prompt_name": "document"}, query_encode_kwargs={"prompt_name": "query"}
    )
    store = InMemoryVectorStore.from_texts(DOCUMENTS, embeddings)
    ((found, score),) = store.similarity_search_with_score(QUESTION, k=1)
    scores = expected[0] @ expected[1]
    assert found.page_content == DOCUMENTS[int(scores.argmax())]
    assert score == pytest.approx(float(scores.max()), abs=1e-4)


# ---- LlamaIndex


def test_llama_index_over_the_server(url: str, model: GritLM, expected: tuple[np.ndarray, np.ndarray]) -> None:
    pytest.importorskip("llama_index.embeddings.openai_like")
    pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.llms.openai_like import OpenAILike

    where = {"api_base": url, "api_key": "none"}
    documents = OpenAILikeEmbedding(
        model_name="tiny", **where, additional_kwargs={"extra_body": {"input_type": "document"}}
    )
    queries = OpenAILikeEmbedding(model_name="tiny", **where, additional_kwargs={"extra_body": {"input_type": "query"}})
    close(documents.get_text_embedding_batch(DOCUMENTS), expected[0])
    close(queries.get_query_embedding(QUESTION), expected[1])
    from python_model.generate import reply

    llm = OpenAILike(model="tiny", **where, is_chat_model=True, temperature=0.0, max_tokens=8)
    answer = llm.chat([ChatMessage(role="user", content=QUESTION)]).message.content
    assert answer == reply(model, [QUESTION], max_new_tokens=8, format="grit")


def test_llama_index_over_sentence_transformers(exported: str, expected: tuple[np.ndarray, np.ndarray]) -> None:
    pytest.importorskip("llama_index.embeddings.huggingface")
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    # its prompts are called query and text, and replace those of the folder
    embeddings = HuggingFaceEmbedding(
        model_name=exported,
        device="cpu",
        query_instruction=embed_instruction(TASK),
        text_instruction=embed_instruction(""),
    )
    close(embeddings.get_text_embedding_batch(DOCUMENTS), expected[0])
    close(embeddings.get_query_embedding(QUESTION), expected[1])


# ---- both, without a word about prompts


def test_defaults_embed_as_gritlm_does_without_an_instruction(exported: str, model: GritLM) -> None:
    langchain = pytest.importorskip("langchain_huggingface").HuggingFaceEmbeddings(
        model_name=exported, model_kwargs={"device": "cpu"}
    )
    want = model.encode([*DOCUMENTS, QUESTION])
    close([*langchain.embed_documents(DOCUMENTS), langchain.embed_query(QUESTION)], want)
    llama_index = pytest.importorskip("llama_index.embeddings.huggingface").HuggingFaceEmbedding(
        model_name=exported, device="cpu"
    )
    close([*llama_index.get_text_embedding_batch(DOCUMENTS), llama_index.get_query_embedding(QUESTION)], want)
