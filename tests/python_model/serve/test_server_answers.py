"""Reranking and answers from an index are the library's, and an embedding model serves texts alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from python_model import GritLM  # noqa: E402
from python_model.generate.text import TextStream  # noqa: E402
from python_model.model.prompts import EMBED, embed_instruction  # noqa: E402
from python_model.rag.answer import RAG, open_store  # noqa: E402
from python_model.rag.index import open_index  # noqa: E402
from python_model.serve.protocol import RagRequest  # noqa: E402
from tests.python_model.serve.server import CHAT, Server, error_of, post, question, serving  # noqa: E402


def test_reranking_is_the_librarys_and_cohere_reads_it(server: Server, served_model: GritLM) -> None:
    import math

    from python_model.generate.rerank import rerank

    documents = ["Paris is a city.", "A river flows.", "def add(first, second)"]
    ranked = rerank(served_model, "What flows?", documents, passage_tokens=512)
    expected = {row.index: math.exp(row.score) for row in ranked}
    body = {"query": "What flows?", "documents": documents, "return_documents": True, "top_n": 2}
    found = post(server, "/v1/rerank", body).json()["results"]
    order = [row.index for row in ranked[:2]]
    assert [row["index"] for row in found] == order
    assert [row["relevance_score"] for row in found] == pytest.approx([expected[i] for i in order], abs=1e-5)
    assert [row["document"]["text"] for row in found] == [documents[i] for i in order]
    cohere = pytest.importorskip("cohere")
    for client in (cohere.Client("none", base_url=server.url), cohere.ClientV2("none", base_url=server.url)):
        rows = client.rerank(model="tiny", query="What flows?", documents=documents, top_n=2).results
        assert [row.index for row in rows] == order
        assert [row.relevance_score for row in rows] == pytest.approx([expected[i] for i in order], abs=1e-5)


def test_documents_that_reranking_truncates_are_reported(server: Server) -> None:
    documents = ["A river flows.", "a river " * 30, "Paris  is\na city. " * 400]
    body = {"query": "What flows?", "documents": documents, "max_tokens_per_doc": 20}
    reply = post(server, "/v1/rerank", body).json()
    assert {row["index"]: row["truncated"] for row in reply["results"]} == {0: False, 1: True, 2: True}
    (warning,) = reply["meta"]["warnings"]
    assert warning == "2 of 3 documents are longer than max_tokens_per_doc (20 tokens); what follows is ignored"
    few = post(server, "/v1/rerank", {**body, "top_n": 1}).json()
    assert few["meta"] == reply["meta"], "also those that are not returned"
    whole = post(server, "/v1/rerank", {"query": "What flows?", "documents": ["A  river\nflows.\n"]}).json()
    assert [row["truncated"] for row in whole["results"]] == [False] and "warnings" not in whole["meta"]
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2("none", base_url=server.url)
    found = client.rerank(model="tiny", query="What flows?", documents=documents, max_tokens_per_doc=20)
    assert found.meta.warnings == [warning]


def test_an_answer_ends_where_the_model_goes_on_with_a_role_marker(
    served_model: GritLM, documents: tuple[Path, Path]
) -> None:
    from python_model.commands.serve import add_indexes

    services: list[Any] = []

    def prepare(service: Any) -> None:
        add_indexes(service, [f"docs={documents[0]}"], [], "")
        services.append(service)

    with serving(served_model, prepare=prepare):
        work, _ = services[0].answer(RagRequest(question="What is a river?"), services[0].searchable("docs"), [])
    stream = TextStream(served_model.tokenizer, work.stop)
    written = served_model.tokenizer("A river flows.\n<|user|>\nAnd a sea?", add_special_tokens=False)["input_ids"]
    assert any(stream.push(token) for token in written) and stream.finish() == "A river flows."


@pytest.mark.parametrize("with_store", [True, False])
def test_answers_are_the_librarys_with_their_sources(
    served_model: GritLM, documents: tuple[Path, Path], with_store: bool
) -> None:
    from python_model.commands.serve import add_indexes

    index, store = documents
    stores = [f"docs={store}"] if with_store else []
    rag = RAG(
        served_model,
        index=open_index(str(index), served_model, create=False),
        store=open_store(str(store), served_model) if with_store else None,
        query_prefix=EMBED,
    )
    text = "What is the capital of France?"
    with serving(served_model, prepare=lambda s: add_indexes(s, [f"docs={index}"], stores, "")) as running:
        assert httpx.get(f"{running.url}/v1/models").json()["data"][0]["indexes"] == ["docs"]
        for mode in ("none", "document_first", "query_first", *(["document_cache", "auto"] if with_store else [])):
            expected = rag.answer(text, mode=mode, k=2, max_new_tokens=10, min_new_tokens=0)
            body = {"question": text, "k": 2, "mode": mode, "max_tokens": 10, "index": "docs"}
            found = post(running, "/v1/rag", body).json()
            assert found["answer"] == expected.text and found["mode"] == expected.mode
            assert [s["id"] for s in found["sources"]] == [d.key for d in expected.documents]
            assert [s["score"] for s in found["sources"]] == pytest.approx(expected.scores, abs=1e-5)
            if mode == "document_cache":
                states = rag.prepare(text, expected.documents, mode)[0]
                assert states is not None and len(states) > 60
                assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == len(states)
            lines = post(running, "/v1/rag", {**body, "stream": True}).text.strip().split("\n\n")
            pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            assert lines[-1] == "data: [DONE]" and pieces[0]["object"] == "rag.sources"
            assert "".join(piece.get("delta", "") for piece in pieces) == expected.text
        if not with_store:
            refused = post(running, "/v1/rag", {"question": text, "mode": "document_cache"})
            assert refused.status_code == 400 and error_of(refused)["param"] == "mode"
        assert post(running, "/v1/rag", {"question": text, "index": "../docs"}).status_code == 404


def test_an_index_is_searched_as_its_rag_says(served_model: GritLM, documents: tuple[Path, Path]) -> None:
    """By words as well, among some documents, and within fewer tokens than the model's."""
    text, k = "What is the capital of France?", {"k": 3}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "hybrid": {"hybrid": True},
        "where": {"where": {"source": "no such file"}},
        "short": {"max_length": 60},
    }
    expected = {}

    def prepare(service: Any) -> None:
        index = open_index(str(documents[0]), service.reader, create=False)
        for name, given in options.items():
            rag = RAG(service.reader, index=index, query_prefix=EMBED, **given)
            service.add_index(name, rag)
            expected[name] = rag.search(text, served_model.encode([text], instruction=EMBED, convert_to_tensor=True), 3)
        store = open_store(str(documents[1]), service.reader)
        with pytest.raises(ValueError, match="keep_read: expected False in a server"):
            service.add_index("keeping", RAG(service.reader, index=index, store=store, keep_read=True))
        with pytest.raises(ValueError, match="rag: expected one with an index to serve as 'none'"):
            service.add_index("none", RAG(service.reader))

    with serving(served_model, prepare=prepare) as running:
        for name in ("plain", "hybrid", "where"):
            found = post(running, "/v1/rag", {"question": text, "index": name, "max_tokens": 2, **k}).json()["sources"]
            assert [s["id"] for s in found] == [hit.document.key for hit in expected[name]]
            assert [s["score"] for s in found] == pytest.approx([hit.score for hit in expected[name]], abs=1e-5)
        refused = post(running, "/v1/rag", {"question": text, "index": "short", **k})
    assert len(expected["plain"]) == 3 and not expected["where"]
    assert max(hit.score for hit in expected["hybrid"]) < 0.1, "sums of reciprocal ranks"
    message = "question: expected prompt and reply within 60 tokens"
    assert refused.status_code == 400 and error_of(refused)["message"].startswith(message)


def test_an_embedding_model_serves_texts_alone(checkpoint: Path) -> None:
    import torch

    model = GritLM(checkpoint, mode="embedding", dtype=torch.float32)
    with serving(model) as running:
        vector = post(running, "/v1/embeddings", {"input": "a city"}).json()["data"][0]["embedding"]
        assert vector == pytest.approx(model.encode("a city", instruction=embed_instruction("")), abs=1e-5)
        for path, body in ((CHAT, question()), ("/v1/rerank", {"query": "x", "documents": ["y"]})):
            found = post(running, path, body)
            assert found.status_code == 400 and "expected one that generates" in error_of(found)["message"]
