"""grit eval: per data set and overall, several checkpoints, once each."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.commands import evaluate as command
from python_model.commands.evaluate import COMMAND as main
from python_model.data.rows import GenerativeRow
from python_model.evaluation import next_token_loss
from python_model.evaluation.held_out import HeldOut
from python_model.evaluation.language import conversation_losses
from python_model.evaluation.mteb_adapter import GritEncoder, prefix_for, query_text
from python_model.evaluation.retrieval import (
    best_chunks,
    embed_documents,
    embed_queries,
    ranks_of_relevant,
    retrieval_ranks,
    scores_from_ranks,
)
from python_model.model.prompts import TooLong, encode_conversation
from python_model.rag.documents import chunk
from python_model.rag.modes import Document

WORDS = ("river", "city", "code", "word")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "test").mkdir(parents=True)
    rows = [
        {
            "query": ["Find", f"where is {w}"],
            "pos": [["", f"{w} is here"]],
            "neg": [],
            "key": w,
            "dataset": f"set{i % 2}",
        }
        for i, w in enumerate(WORDS)
    ]
    talks = [{"text": [f"say {w}", f"{w} it is"], "dataset": f"talk{i % 2}"} for i, w in enumerate(WORDS)]
    corpus = [{"key": w, "text": f"{w} is here"} for w in WORDS]
    for name, lines in (("test/embedding", rows), ("test/generative", talks), ("corpus", corpus)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "questions.jsonl").write_text(json.dumps({"question": "say river", "answers": ["e"]}) + "\n")
    return folder


def test_recall_counts_ranks_within_the_cut() -> None:
    scores = scores_from_ranks(torch.tensor([1, 2, 10, 11, 100, 101]), 500)
    assert (scores.recall_at_1, scores.recall_at_10, scores.recall_at_100) == (1 / 6, 3 / 6, 5 / 6)


def test_ndcg_discounts_by_the_logarithm_of_one_more_than_the_rank() -> None:
    """nDCG = 1 / log2(1 + rank) with one relevant document (Jarvelin and Kekalainen 2002), 0 beyond rank 10; MRR = 1 / rank."""
    by_hand = {1: 1.0, 2: 0.6309297535714574, 3: 0.5, 7: 1 / 3, 10: 0.2890648263178879, 11: 0.0}
    for rank, expected in by_hand.items():
        scores = scores_from_ranks(torch.tensor([rank]), 500)
        assert scores.ndcg_at_10 == pytest.approx(expected, abs=1e-12)
        assert scores.mrr_at_10 == pytest.approx(1 / rank if rank <= 10 else 0.0, abs=1e-12)
    both = scores_from_ranks(torch.tensor([3, 11]), 500)
    assert both.ndcg_at_10 == pytest.approx(0.25) and both.mrr_at_10 == pytest.approx(1 / 6)


def test_the_rank_leaves_out_what_answers_the_query_too(checkpoint: Path) -> None:
    model = GritLM(checkpoint, device="cpu")
    texts = [f"where is {w}" for w in WORDS]
    corpus = embed_documents(model, [*texts, texts[0]])
    queries = [("", texts[0])]
    assert retrieval_ranks(model, queries, corpus, [0]).tolist() == [2]  # the same text stands twice: a tie
    assert retrieval_ranks(model, queries, corpus, [0], also_relevant=[[4]]).tolist() == [1]


def test_documents_are_ranked_by_float32_scores_under_autocast(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cosines 0.9992 and 0.9988 are one number in BF16."""
    model = GritLM(checkpoint, device="cpu")
    query, right, wrong = (torch.tensor([[math.cos(angle), math.sin(angle)]]) for angle in (0.0, 0.04, 0.05))
    monkeypatch.setattr(model, "encode", lambda *_, **__: query)
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval_ranks(model, [("", "river")], torch.cat([wrong, right]), [1]).tolist() == [1]


def test_a_document_scores_what_its_best_chunk_does() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, -0.3], [0.2, 0.1, -0.5, -0.4]])
    assert best_chunks(scores, [0, 0, 2, 1]).equal(torch.tensor([[0.9, -0.3, 0.5], [0.2, -0.4, -0.5]]))


def test_long_documents_are_cut_or_found_by_their_chunks(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    texts = [f"{other} is code. " * 12 + f"{w} is here" for w, other in zip(WORDS, reversed(WORDS), strict=True)]
    lines = [json.dumps({"key": w, "text": text}) + "\n" for w, text in zip(WORDS, texts, strict=True)]
    (data / "corpus.jsonl").write_text("".join(lines))
    output = tmp_path / "results.json"
    base = [
        "--model",
        str(checkpoint),
        "--data",
        str(data),
        "--output",
        str(output),
        "--no-bf16",
        "--mode",
        "embedding",
    ]
    main([*base, "--max-length", "32"])
    assert "4 texts are longer than --max-length 32 tokens" in (said := capsys.readouterr().err)
    assert "(--chunk-tokens splits documents instead)" in said
    main([*base, "--max-length", "32", "--chunk-tokens", "20", "--overlap", "3"])
    assert "longer than" not in capsys.readouterr().err
    whole, chunked = json.loads(output.read_text())  # neither is taken for the other
    assert chunked["options"] == {**whole["options"], "chunks": [20, 3]}
    model = GritLM(checkpoint, device="cpu", mode="embedding")
    pieces = [chunk(Document("d", text), model.tokenizer, 20, 3) for text in texts]
    assert min(map(len, pieces)) > 2
    queries = embed_queries(model, [("Find", f"where is {w}") for w in WORDS])
    best = [(queries @ embed_documents(model, [piece.text for piece in part]).T).amax(1) for part in pieces]
    ranks = ranks_of_relevant(torch.stack(best, dim=1), torch.arange(4))
    expected = scores_from_ranks(ranks, 4)
    assert chunked["scores"]["all"]["mrr_at_10"] == pytest.approx(expected.mrr_at_10)
    assert chunked["scores"]["all"]["documents"] == 4
    with pytest.raises(SystemExit, match="--overlap: expected --chunk-tokens beside it, got none"):
        main([*base, "--overlap", "3"])


def test_ties_and_vectors_that_are_not_finite_count_against_the_relevant_document() -> None:
    nan = float("nan")
    scores = torch.tensor([[0.5, 0.5, 0.1], [nan, nan, nan], [0.3, nan, 0.2]])
    assert ranks_of_relevant(scores, torch.tensor([0, 1, 0])).tolist() == [2, 3, 2]


def test_checkpoints_are_measured_per_data_set_and_once(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "results.json"
    arguments = ["--model", str(checkpoint), "--data", str(data), "--output", str(output), "--no-bf16"]
    arguments += ["--questions", str(data / "questions.jsonl"), "--max-new-tokens", "4"]
    main(arguments)
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())[0]
    assert list(result["scores"]) == ["set0", "set1", "all", "talk0", "talk1"]
    assert all(name in printed for name in ("set0", "talk1", "answers to 1 questions: match"))
    every, parts = result["scores"]["all"], [result["scores"][f"set{i}"] for i in (0, 1)]
    assert every["queries"] == 4 and every["mrr_at_10"] == pytest.approx(sum(p["mrr_at_10"] for p in parts) / 2)
    model = GritLM(checkpoint, device="cpu")
    expected = next_token_loss(model, HeldOut(data).conversations, max_length=512)
    assert every["next_token_loss"] == pytest.approx(expected, rel=1e-5) and every["conversations"] == 4

    monkeypatch.setattr(command, "measure", lambda *a, **k: pytest.fail("measured again"))
    main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)[0] == result


def test_scores_of_another_content_under_the_same_name_are_measured_again(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    """A checkpoint that was trained anew in its folder, a changed corpus, other answers."""
    folder, output, questions = tmp_path / "run", tmp_path / "results.json", data / "questions.jsonl"
    shutil.copytree(checkpoint, folder)
    arguments = ["--model", str(folder), "--data", str(data), "--output", str(output), "--no-bf16"]
    arguments += ["--questions", str(questions), "--max-new-tokens", "4"]

    def measured() -> Any:
        main(arguments)
        (result,) = json.loads(output.read_text())
        return result

    first = measured()
    assert measured() == first and "changed" not in capsys.readouterr().err
    model: Any = GritLM(folder, device="cpu", dtype="float32")
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(3)
    model.save_pretrained(folder)
    second = measured()
    assert second["scores"]["all"]["next_token_loss"] != first["scores"]["all"]["next_token_loss"]
    assert "run or the data have changed" in capsys.readouterr().err
    lines = (data / "corpus.jsonl").read_text().replace("city is here", "another text")
    (data / "corpus.jsonl").write_text(lines)
    third = measured()
    assert third["scores"]["all"]["mrr_at_10"] != second["scores"]["all"]["mrr_at_10"]
    questions.write_text(questions.read_text() * 2)
    assert (third["answers"]["questions"], measured()["answers"]["questions"]) == (1, 2)
    results = json.loads(output.read_text())
    del results[0]["content"]  # as earlier versions wrote it
    output.write_text(json.dumps(results))
    assert measured()["content"]


def test_conversations_without_a_reply_within_the_limit_are_left_out(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = GritLM(checkpoint, device="cpu")
    short = GenerativeRow(("say river", "river it is"))
    long = GenerativeRow(("say river " * 40, "river it is"))
    assert next_token_loss(model, [long, short], max_length=24) == next_token_loss(model, [short], max_length=24)
    assert "skipping 1 of 2 conversations, which have no reply within 24 tokens" in caplog.text
    with pytest.raises(TooLong, match="max_length: .*got 24, which every first turn fills"):
        next_token_loss(model, [long], max_length=24)


@pytest.mark.parametrize("attn", ["bbcc", "bbbc", "bbil"])
def test_the_loss_is_that_of_the_attention_the_model_was_trained_with(checkpoint: Path, attn: str) -> None:
    """Against transformers with a dense mask of that attention."""
    from transformers import AutoModelForCausalLM

    turns = ("say river", "river it is", "and?", "done")
    model = GritLM(checkpoint, attn=attn, device="cpu", dtype="float32")
    sample = encode_conversation(model.tokenizer, turns, 64, attention=attn[2:])  # type: ignore[arg-type]
    runs = torch.tensor(sample.bidirectional or [False] * len(sample))
    number = (runs[1:] != runs[:-1]).cumsum(0)
    number = torch.cat([torch.zeros(1, dtype=torch.int64), number])
    same_run = runs[:, None] & runs & (number[:, None] == number)
    visible = torch.ones(len(sample), len(sample)).tril().bool() | same_run
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = plain(torch.tensor([sample.input_ids]), attention_mask=visible[None, None]).logits[0]
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(sample.labels), ignore_index=-100)
    assert next_token_loss(model, [GenerativeRow(turns)], max_length=64) == pytest.approx(float(want), rel=1e-4)


def test_a_data_set_of_long_questions_has_no_loss(checkpoint: Path, data: Path) -> None:
    with (data / "test" / "generative.jsonl").open("a") as file:
        file.write(json.dumps({"text": ["say river " * 40, "river it is"], "dataset": "long"}) + "\n")
    scores = command.measure(GritLM(checkpoint, device="cpu"), HeldOut(data), max_length=24, bf16=False)
    assert scores["long"] == {"next_token_loss": None, "conversations": 1} and scores["all"]["next_token_loss"] > 0


def test_the_encoder_for_mteb_says_how_many_texts_it_cuts(checkpoint: Path) -> None:
    encoder: Any = GritEncoder(GritLM(checkpoint, device="cpu", mode="embedding"), max_length=64)
    encoder.get_instruction = lambda *given: "Find"
    task: dict[str, Any] = {"task_metadata": SimpleNamespace(type="Retrieval"), "hf_split": "", "hf_subset": ""}
    with pytest.warns(UserWarning, match="max_length: 2 of 3 texts are longer than 64 tokens; what follows is ignored"):
        encoder.encode([{"text": ["river " * 80, "code"]}, {"text": ["city " * 80]}], **task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([{"text": ["river"]}], **task)


def test_the_instruction_of_a_query_is_read_as_mteb_s_own_models_read_it() -> None:
    assert query_text({"id": "1", "text": "a river"}) == query_text({"id": "1", "text": "a river", "instruction": None})
    assert query_text({"id": "1", "text": "a river", "instruction": "in France"}) == "a river in France"
    with pytest.raises(ValueError, match="queries: expected texts, got a conversation"):
        query_text({"id": "1", "text": [{"role": "user", "content": "a"}]})


def test_of_mteb_s_tasks_only_the_documents_of_retrieval_have_no_instruction(checkpoint: Path) -> None:
    model = GritLM(checkpoint, device="cpu", mode="embedding")
    encoder = SimpleNamespace(get_instruction=lambda *given: "Find")
    for kind in ("Retrieval", "InstructionRetrieval", "STS"):
        for side in ("query", "document", None):
            wanted = "" if kind != "STS" and side == "document" else "Find"
            found = prefix_for(model, encoder, SimpleNamespace(type=kind), side)
            assert found == model.formatter.embed_instruction(wanted), (kind, side)


@pytest.mark.parametrize("kind", ["embedding", "generative"])
def test_a_data_set_cannot_have_the_name_of_all(checkpoint: Path, data: Path, kind: str) -> None:
    path = data / "test" / f"{kind}.jsonl"
    path.write_text(path.read_text().replace('"set1"', '"all"').replace('"talk1"', '"all"'))
    with pytest.raises(
        SystemExit, match=rf"{kind}.jsonl:2: dataset: expected a name other than 'all', which stands for"
    ):
        main(["--model", str(checkpoint), "--data", str(data)])


def test_mistakes_are_named(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="corpus.jsonl"):
        main(["--model", str(checkpoint), "--data", str(tmp_path)])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="does not hold results"):
        main(["--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "other.json")])
    with (data / "test" / "embedding.jsonl").open("a") as file:
        file.write(json.dumps({"query": "q", "pos": ["p"], "neg": [], "key": "nowhere"}) + "\n")
    with pytest.raises(SystemExit, match=r"embedding.jsonl:5: no passage of the corpus has the key 'nowhere'"):
        main(["--model", str(checkpoint), "--data", str(data)])


def test_questions_need_a_model_that_generates(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded for nothing")

    monkeypatch.setattr(command, "load", load)
    options = ["--model", "nowhere", "--data", str(data), "--questions", str(data / "questions.jsonl")]
    with pytest.raises(SystemExit, match="questions: expected a model that generates, got one in mode 'embedding'"):
        main([*options, "--mode", "embedding"])


def test_each_conversation_has_its_own_sum_of_losses(checkpoint: Path) -> None:
    model = GritLM(str(checkpoint), torch_dtype="float32")
    rows = [GenerativeRow(tuple(f"turn {i} {'word ' * n}" for i in range(2))) for n in (1, 9, 4)]
    for row, (total, count) in zip(rows, conversation_losses(model, rows, max_length=64, rows_per_pack=2), strict=True):
        assert count > 0 and total / count == pytest.approx(next_token_loss(model, [row], max_length=64), rel=1e-5)
