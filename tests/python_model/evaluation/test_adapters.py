"""The adapters run local tasks of mteb and lm-eval offline, with the numbers that a computation by hand gives.

Runs where the extra ``eval`` is installed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.model.prompts import EMBED, embed_instruction

pytestmark = pytest.mark.tools
needs_mteb = pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="mteb is an extra")
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra")
INSTRUCTION = "Given a question, retrieve the passage"
QUERIES = [f"topic {i}" for i in range(5)]
DOCUMENTS = [("" if i % 2 else f"title {i}", f"document about topic {i} and the river") for i in range(12)]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "mteb"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def local_task() -> Any:
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalRetrieval",
            description="x",
            reference=None,
            dataset={"path": "local/none", "revision": "1"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation="",
            prompt=INSTRUCTION,
        )

        def load_data(self, *arguments: Any, **options: Any) -> None:
            corpus = [{"id": f"d{i}", "title": title, "text": text} for i, (title, text) in enumerate(DOCUMENTS)]
            queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)]
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": Dataset.from_list(corpus),
                        "queries": Dataset.from_list(queries),
                        "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(len(QUERIES))},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Local()


def mrr_by_hand(model: GritLM) -> float:
    queries = model.encode(QUERIES, instruction=embed_instruction(INSTRUCTION))
    texts = [f"{title} {text}" if title else text for title, text in DOCUMENTS]
    scores = queries @ model.encode(texts, instruction=EMBED).T
    ranks = [int((row >= row[i]).sum()) for i, row in enumerate(scores)]
    return sum(1 / rank for rank in ranks if rank <= 10) / len(ranks)


@needs_mteb
def test_mteb_gets_the_embeddings_of_the_paper_s_formats(model: GritLM) -> None:
    import mteb

    from python_model.evaluation.mteb_adapter import mteb_encoder

    (result,) = mteb.evaluate(mteb_encoder(model), local_task(), cache=None)
    scores = result.scores["test"][0]
    assert scores["mrr_at_10"] == pytest.approx(mrr_by_hand(model), abs=1e-4)


@needs_mteb
def test_mteb_search_reranks_the_best_of_the_embedding_search(model: GritLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import mteb

    from python_model.evaluation import mteb_adapter
    from python_model.generate.rerank import Ranked

    seen: list[int] = []

    def keep(model: GritLM, query: str, passages: list[str], **options: Any) -> list[Ranked]:
        seen.append(len(passages))
        return [Ranked(i, 0.0) for i in range(len(passages))]

    def relevant_first(model: GritLM, query: str, passages: list[str], **options: Any) -> list[Ranked]:
        order = sorted(range(len(passages)), key=lambda i: f"{query} " not in passages[i])
        return [Ranked(i, 0.0) for i in order]

    found = {}
    for name, function in (("kept", keep), ("perfect", relevant_first)):
        monkeypatch.setattr(mteb_adapter, "rerank", function)
        search = mteb_adapter.mteb_search(model, rerank_top=12)
        (result,) = mteb.evaluate(search, local_task(), cache=None)
        found[name] = result.scores["test"][0]["mrr_at_10"]
    assert found["kept"] == pytest.approx(mrr_by_hand(model), abs=1e-4)
    assert found["perfect"] == 1 and seen == [12] * len(QUERIES)


@pytest.mark.parametrize("normalized", [True, False])
def test_mteb_scores_by_the_dot_product(checkpoint: Path, normalized: bool) -> None:
    """As index and search do; of vectors of any length, the cosine is another order."""
    pytest.importorskip("mteb")
    from python_model.evaluation.mteb_adapter import mteb_encoder

    model = GritLM(checkpoint, normalized=normalized, device="cpu", dtype="float32")
    vectors = model.encode(["a river", "France"], convert_to_tensor=True)
    got = torch.as_tensor(mteb_encoder(model).similarity(vectors[:1], vectors))
    torch.testing.assert_close(got.float(), vectors[:1] @ vectors.T)


@needs_mteb
def test_mteb_search_ranks_by_the_instruction_of_each_query(model: GritLM) -> None:
    from types import SimpleNamespace

    from python_model.evaluation.mteb_adapter import mteb_search

    task: dict[str, Any] = {"task_metadata": SimpleNamespace(type="Retrieval", name="x", prompt="Find")}
    search = mteb_search(model, rerank_top=1)
    search.index([{"id": "a", "text": "river"}, {"id": "b", "text": "code"}], **task)
    split = search.search([{"id": "q", "text": "which", "instruction": "one"}], top_k=2, **task)
    whole = search.search([{"id": "q", "text": "which one"}], top_k=2, **task)
    bare = search.search([{"id": "q", "text": "which"}], top_k=2, **task)
    assert split == whole != bare


@needs_mteb
def test_mteb_search_runs_with_the_model_itself(model: GritLM) -> None:
    import mteb

    from python_model.evaluation.mteb_adapter import mteb_search

    (result,) = mteb.evaluate(mteb_search(model, rerank_top=3, method="pointwise"), local_task(), cache=None)
    assert 0 <= result.scores["test"][0]["ndcg_at_10"] <= 1


@needs_mteb
def test_mteb_search_says_how_many_texts_it_cuts(model: GritLM) -> None:
    from types import SimpleNamespace

    from python_model.evaluation.mteb_adapter import mteb_search

    task: dict[str, Any] = {"task_metadata": SimpleNamespace(type="Retrieval", name="x", prompt="Find")}
    search = mteb_search(model, rerank_top=3, passage_tokens=8, max_length=64)
    with pytest.warns(UserWarning, match="max_length: 1 of 2 texts are longer than 64 tokens; what follows is ignored"):
        search.index([{"id": "a", "text": "river " * 80}, {"id": "b", "text": "code"}], **task)
    with pytest.warns(UserWarning, match="passage_tokens: 2 of 4 texts are longer than 8 tokens"):
        search.search([{"id": "q", "text": "which"}, {"id": "r", "text": "what"}], top_k=2, **task)


@needs_lm_eval
def test_lm_eval_runs_choices_and_generation_on_local_files(model: GritLM, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from python_model.evaluation.lm_eval_adapter import lm_eval_model

    choices = [("The capital of France is", ["Paris", "London"], 0), ("A river", ["flows", "adds"], 0)]
    rows = [{"q": q, "choices": c, "answer": a} for q, c, a in choices]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "open.jsonl").write_text(json.dumps({"q": "What is it?", "a": "x"}))
    common = "dataset_path: json\ntest_split: test\n"
    (tmp_path / "choices.yaml").write_text(
        f"task: local_choices\n{common}dataset_kwargs: {{data_files: {{test: {tmp_path}/choices.jsonl}}}}\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "open.yaml").write_text(
        f"task: local_open\n{common}dataset_kwargs: {{data_files: {{test: {tmp_path}/open.jsonl}}}}\n"
        'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        "generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    )
    result = lm_eval.simple_evaluate(
        model=lm_eval_model(model, batch_size=2),
        tasks=["local_choices", "local_open"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = result["samples"]["local_choices"]
    for sample, row in zip(samples, rows, strict=True):
        got = [float(r[0][0]) for r in sample["resps"]]
        want = [_log_likelihood(model, str(row["q"]), f" {choice}") for choice in row["choices"]]  # type: ignore[attr-defined]
        assert got == pytest.approx(want, abs=1e-3)
    assert isinstance(result["samples"]["local_open"][0]["resps"][0][0], str)


def _log_likelihood(model: GritLM, context: str, continuation: str) -> float:
    before = model.tokenizer(context)["input_ids"]
    ids = model.tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(before), len(ids)))


@needs_lm_eval
def test_lm_eval_needs_a_language_model_head(checkpoint: Path) -> None:
    from python_model.evaluation.lm_eval_adapter import lm_eval_model

    with pytest.raises(ValueError, match="no language-model head"):
        lm_eval_model(GritLM(checkpoint, mode="embedding", device="cpu", dtype="float32"))


def test_the_adapters_import_without_their_packages() -> None:
    code = (
        "import sys, python_model.evaluation.mteb_adapter, python_model.evaluation.lm_eval_adapter\n"
        "assert not {'mteb', 'lm_eval', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
