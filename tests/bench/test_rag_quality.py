"""The quality benchmark asks what the right document answers, resumes, and judges by its own rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import charts, rag_quality, rag_questions
from bench.rag_quality import FULL, VARIANTS, WITHOUT, Asker, keeps_goal, measure, summary, verdict
from bench.rag_questions import Entry, Item, make_items, questions_about, read_entries, training_row
from python_model import GritLM
from python_model.evaluation.answers import normalize

pytest.importorskip("bm25s", reason="distractors need bm25s: pip install 'grit-kernels[data]'")

ENTRIES = [
    Entry("foldoc", "inode", "A data structure holding information about files in a Unix file system."),
    Entry(
        "foldoc",
        "daemon",
        "/dee'm*n/ (From the mythological meaning) A background program of Unix. Named in 1963 at MIT.",
    ),
    Entry(
        "wikipedia",
        "Giza",
        "Giza is the third-largest city in Egypt by area, after Cairo. Arabs occupied it in 642.",
    ),
    Entry(
        "wikipedia",
        "David Hume",
        "David Hume was a Scottish philosopher known for empiricism. He died in Edinburgh in 1776.",
    ),
    Entry(
        "wikipedia",
        "Tungsten",
        "Tungsten is a chemical element with the symbol W. It was found by two chemists in 1783.",
    ),
    Entry("wikipedia", "Dream", "A dream is a succession of images, ideas and emotions that occur in the mind."),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"key": f"{e.source}:{e.title}", "text": ["?", e.text], "dataset": f"{e.source}_answer"} for e in ENTRIES]
    rows.append({"key": "recipe:Soup", "text": ["?", "Water is a liquid."], "dataset": "recipe"})
    (folder / "test").mkdir()
    (folder / "train").mkdir()
    (folder / "test" / "generative.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in ("foldoc", "wikipedia"):
        own = [row for row in rows if row["key"].startswith(source)]
        (folder / "train" / f"{source}_answer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, device="cpu", dtype="float32", max_position_embeddings=2048, sliding_window=None)


def test_answers_are_spans_of_the_entry() -> None:
    found = [(e.title, kind, q.question, q.answers[0]) for e in ENTRIES for kind, q in questions_about(e)]
    assert [(title, kind, answer) for title, kind, _, answer in found] == [
        ("inode", "what", "data structure holding information about files"),
        ("daemon", "what", "background program of Unix"),
        ("Giza", "what", "third-largest city"),
        ("David Hume", "what", "Scottish philosopher"),
        ("David Hume", "year", "1776"),
        ("Tungsten", "what", "chemical element"),
        ("Tungsten", "year", "1783"),
        ("Dream", "what", "succession of images"),
    ]
    texts = {entry.title: entry.text for entry in ENTRIES}
    assert all(answer in texts[title] for title, *_, answer in found)
    assert not any(answer in question for _, kind, question, answer in found if kind == "year")


def test_only_the_right_document_has_the_answer_and_the_order_is_fixed(data: Path) -> None:
    entries = read_entries(data)
    items = make_items(entries)
    assert [e.title for e in entries] == [e.title for e in ENTRIES] and len(items) == 8
    for item in items:
        has = [normalize(item.question.answers[0]) in normalize(document.text) for document in item.documents]
        assert len(item.documents) == 4 and has == [place == item.right for place in range(4)]
    assert make_items(list(reversed(entries))) == items and make_items(entries, 3) == items[:3]
    assert len({item.right for item in items}) > 1
    with pytest.raises(ValueError, match="entries: expected more than 3, got 2"):
        make_items(entries[:2])
    with pytest.raises(ValueError, match="data: expected rows of foldoc_answer"):
        (data / "other" / "test").mkdir(parents=True)
        (data / "other" / "test" / "generative.jsonl").write_text('{"key": "a:b", "text": ["a", "b"]}\n')
        read_entries(data / "other")


def test_training_rows_are_read_like_full_prefill(data: Path, tmp_path: Path, model: GritLM, monkeypatch: Any) -> None:
    from python_model.rag.answer import RAG

    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["x", "--data", str(data), "--output", str(output), "--rows", "2"])
    rag_questions.main()
    items = make_items(read_entries(data, "train"))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [training_row(item) for item in items[:2]]
    item = items[0]
    sample = model.formatter.conversation(rows[0]["text"], 2048)
    _, prompt, _, _ = RAG(model).prepare(item.question.question, list(item.documents), "document_first")
    assert sample.input_ids[: len(prompt)] == prompt


def test_rows_that_follow_cached_documents_are_those_of_rag(
    data: Path, tmp_path: Path, model: GritLM, monkeypatch: Any
) -> None:
    from python_model.rag.answer import RAG

    output = tmp_path / "rows.jsonl"
    arguments = ["x", "--data", str(data), "--output", str(output), "--rows", "8", "--cached"]
    monkeypatch.setattr("sys.argv", [*arguments, "0.75"])
    rag_questions.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    items = make_items(read_entries(data, "train"), 8)
    assert ["documents" in row for row in rows] == [False, True, True, True] * 2
    assert rows[0] == training_row(items[0]) and rows[1] == training_row(items[1], cached=True)
    sample = model.formatter.conversation(rows[1]["text"], 2048, documents=rows[1]["documents"])
    states, prompt, _, _ = RAG(model).prepare(items[1].question.question, list(items[1].documents), "document_cache")
    assert states is not None and sample.documents is not None
    kept = [part[place > 0 :] for place, part in enumerate(split(sample.input_ids, sample.documents.lengths))]
    assert [token for part in kept for token in part] == states.input_ids.tolist()
    assert sample.input_ids[sum(sample.documents.lengths) :][: len(prompt)] == prompt
    monkeypatch.setattr("sys.argv", [*arguments, "1.5"])
    with pytest.raises(SystemExit):
        rag_questions.main()


def test_a_data_folder_without_entries_is_named_and_one_source_is_enough(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wordnet, output = tmp_path / "wordnet", tmp_path / "rows.jsonl"
    (wordnet / "train").mkdir(parents=True)
    (wordnet / "train" / "wordnet_definition.jsonl").write_text('{"query": ["", "a"], "pos": [["", "b"]]}\n')
    for module, more in ((rag_questions, ["--output"]), (rag_quality, ["--model", "m", "--timed", "0", "--output"])):
        monkeypatch.setattr("sys.argv", ["x", "--data", str(wordnet), *more, str(output)])
        with pytest.raises(SystemExit):
            module.main()
        message = f"data: expected rows of foldoc_answer or wikipedia_answer in {wordnet}, got none"
        assert message in capsys.readouterr().err
    assert not output.exists()
    shutil.copy(data / "train" / "wikipedia_answer.jsonl", wordnet / "train")
    monkeypatch.setattr("sys.argv", ["x", "--data", str(wordnet), "--output", str(output)])
    rag_questions.main()
    assert output.read_text()


def split(ids: list[int], lengths: tuple[int, ...]) -> list[list[int]]:
    return [ids[sum(lengths[:n]) : sum(lengths[: n + 1])] for n in range(len(lengths))]


def answers_of(model: GritLM, items: list[Item], log: Path) -> list[dict[str, Any]]:
    return measure(model, items, log, "int8", 2)


def test_an_interrupted_run_asks_only_what_is_missing(
    data: Path, model: GritLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = make_items(read_entries(data), 3)
    log = tmp_path / "answers.jsonl"
    whole = answers_of(model, items, tmp_path / "whole.jsonl")
    asked: list[str] = []
    ask = Asker.ask

    def noted(self: Asker, item: Item, turn: int) -> dict[str, Any]:
        if len(asked) == 3:  # the first is a warm-up
            raise KeyboardInterrupt
        asked.append(item.question.question)
        return ask(self, item, turn)

    with monkeypatch.context() as stopping:
        stopping.setattr(Asker, "ask", noted)
        with pytest.raises(KeyboardInterrupt):
            answers_of(model, items, log)
    assert len(log.read_text().splitlines()) == 1 + 2
    kept = answers_of(model, items, log)
    assert [[row[name]["reply"] for name in VARIANTS] for row in kept] == [
        [row[name]["reply"] for name in VARIANTS] for row in whole
    ]
    assert answers_of(model, items[:2], log) == kept[:2]
    for other, tokens in ((items[1:], 2), (items, 3)):
        with pytest.raises(ValueError, match="output: .* holds answers with another model, data or settings"):
            measure(model, other, log, "int8", tokens)
    for row in kept:
        assert row[WITHOUT]["cached"] == row[FULL]["cached"] == 0 < row["causal cache"]["cached"]
        assert row["causal cache"]["read"] < row[FULL]["read"] and row[FULL]["first_token_s"] > 0
        # int8: 2 layers of keys and values, one head of 32, and a scale per token or channel
        assert 128 <= row["causal cache"]["bytes"] / row["causal cache"]["cached"] < 200


def row(f1: float, seconds: float, **others: Any) -> dict[str, Any]:
    base = {
        "reply": "",
        "f1": f1,
        "match": f1,
        "first_token_s": seconds,
        "write_s": 0.0,
        "cached": 0,
        "read": 9,
        "bytes": 0,
    }
    return {**base, **others}


def made_up(item_count: int, of: Callable[[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: of(name, number) for name in VARIANTS} for number in range(item_count)]


def test_the_verdict_follows_validity_speed_and_loss(data: Path, tmp_path: Path) -> None:
    items = make_items(read_entries(data))

    def good(name: str, number: int) -> dict[str, Any]:
        cached = {"cached": 100, "bytes": 12800, "write_s": 4.0}
        made = {
            WITHOUT: row(0.2, 0.1),
            FULL: row(0.6 + 0.1 * (number % 2), 1.0),
            "bidirectional cache": row(0.3, 0.2, **cached),
            "causal cache": row(0.6 + 0.1 * (number % 2), 0.5, **cached),  # too slow
            "causal cache + first 16": row(0.6 + 0.1 * (number % 2), 0.25, **cached),
        }
        return made.get(name, row(0.5, 0.25, **cached))

    rows = summary("good", items, made_up(len(items), good))
    by_name = {r["variant"]: r for r in rows}
    assert by_name[FULL]["f1"] == pytest.approx(65) and by_name[FULL]["times_faster"] == 1
    same = by_name["causal cache + first 16"]
    assert same["times_faster"] == 4 and (same["f1_difference"], same["f1_low"], same["f1_high"]) == (0, 0, 0)
    assert same["bytes_per_token"] == 128 and same["break_even_reuses"] == pytest.approx(4 / 0.75)
    worse = by_name["bidirectional cache"]
    assert worse["f1_difference"] == pytest.approx(0.3 / 0.65 - 1)
    assert worse["f1_low"] < worse["f1_difference"] < worse["f1_high"] < 0
    assert [r["variant"] for r in rows if keeps_goal(r)] == ["causal cache + first 16"]
    assert verdict(rows).endswith("lower: causal cache + first 16")
    none = [r for r in rows if r["variant"] != "causal cache + first 16"]
    assert verdict(none).endswith("auto stays at full prefill")

    def slow(name: str, number: int) -> dict[str, Any]:
        return {**good(name, number), "f1": 0.0, "first_token_s": 2.0, "write_s": 8.0}

    retimed = {r["variant"]: r for r in summary("good", items, made_up(len(items), good), made_up(2, slow))}
    assert {r["timed"] for r in retimed.values()} == {2} and retimed["causal cache"]["first_token_s"] == 2
    assert [r["f1"] for r in retimed.values()] == [r["f1"] for r in rows] and rows[0]["timed"] == len(items)
    assert retimed["causal cache"]["break_even_reuses"] is None

    assert {r[field] for r in rows for field in rag_quality.TO_FIRST} == {None}
    better = made_up(len(items), lambda name, number: {**good(name, number), "f1": 0.8 if name == FULL else 0.6})
    second = {r["variant"]: r for r in summary("second", items, better, None, made_up(len(items), good))}
    assert second["causal cache"]["f1_to_first"] == pytest.approx(0.6 / 0.65 - 1)
    assert second["causal cache"]["f1_difference"] == pytest.approx(0.6 / 0.8 - 1)
    assert second[FULL]["f1_to_first_low"] < second[FULL]["f1_to_first"] == pytest.approx(0.8 / 0.65 - 1)

    untimed = summary("good", items, made_up(len(items), good), [])
    assert {r["timed"] for r in untimed} == {0} and [r["f1"] for r in untimed] == [r["f1"] for r in rows]
    assert {r[field] for r in untimed for field in ("first_token_s", "times_faster", "break_even_reuses")} == {None}
    assert not any(keeps_goal(r) for r in untimed)
    assert verdict(untimed).endswith("lower: causal cache, causal cache + first 16; times were not measured")
    assert verdict([r for r in untimed if r["f1_difference"] != 0 or r["variant"] == FULL]).endswith("full prefill")
    assert charts.draw(tmp_path / "rag_quality_cpu.json", untimed) is None

    def useless(name: str, number: int) -> dict[str, Any]:
        return row(0.3 if name == WITHOUT else 0.4, 0.1 if name == "causal cache" else 1.0)

    judged = summary("useless", items, made_up(len(items), useless))
    assert "not valid. Full prefill has F1 40.0 and no documents 30.0" in verdict(judged)
    assert not any(keeps_goal(r) for r in judged)
    drawn = charts.draw(tmp_path / "rag_quality_cpu.json", [*rows, *judged])
    assert drawn is not None and drawn.stat().st_size > 5000


def test_measured_variants_calibrate_the_checkpoint(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``auto`` uses the states whose F1 was kept, for as many documents, and no others."""
    import shutil

    from python_model.rag.answer import RAG

    own = shutil.copytree(checkpoint, tmp_path / "model")
    model = GritLM(own, device="cpu", dtype="float32", max_position_embeddings=2048, sliding_window=None)
    items = make_items(read_entries(data)) * 7

    def kept(name: str, number: int) -> dict[str, Any]:
        return row({WITHOUT: 0.2, FULL: 0.6, "bidirectional cache": 0.595}.get(name, 0.3), 1.0)

    rows = summary("kept", items, made_up(len(items), kept))
    assert rag_quality.calibrate(model, rows, items, "int8") == ["bidirectional cache"]
    asker = Asker(model, tmp_path, "int8", 1)
    assert {name for name, rag in asker.rags.items() if rag.trusted} == {"bidirectional cache"}
    documents = list(items[0].documents)
    asker.rags["bidirectional cache"].add_to_store(documents)
    assert asker.rags["bidirectional cache"].choose("a question", documents) == "document_cache"
    assert asker.rags["bidirectional cache"].choose("a question", [*documents, documents[0]]) == "document_first"
    assert asker.rags["causal cache"].choose("a question", documents) == "document_first"
    assert RAG(model).trusted == {}  # not states in another format
    asker.close()
    with pytest.raises(ValueError, match="questions: expected at least 50 to calibrate with, got 8"):
        rag_quality.calibrate(model, rows, items[:8], "int8")
    monkeypatch.setattr("sys.argv", ["x", *f"--data {data} --model {own} --output {tmp_path} --calibrate".split()])
    with pytest.raises(SystemExit):
        rag_quality.main()
    assert "--calibrate: expected at least 50 questions, got 8" in capsys.readouterr().err


def test_the_command_writes_a_record_and_resumes(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = GritLM

    def roomy(path: str, **options: Any) -> GritLM:
        return loaded(path, max_position_embeddings=2048, sliding_window=None, **options)

    monkeypatch.setattr(rag_quality, "GritLM", roomy)
    record = tmp_path / "rag_quality_cpu.json"
    arguments = ["--data", str(data), "--output", str(tmp_path / "out"), "--questions", "2", "--new", "2"]
    arguments += ["--model", f"tiny={checkpoint}", "--device", "cpu", "--record", str(record)]
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    rag_quality.main()
    printed = capsys.readouterr().out
    rows = json.loads(record.read_text())["rows"]
    assert [r["variant"] for r in rows] == list(VARIANTS) and {r["model"] for r in rows} == {"tiny"}
    assert "tiny: " in printed and "break_even_reuses" in printed
    monkeypatch.setattr(Asker, "ask", lambda *_: pytest.fail("asked again"))
    rag_quality.main()
    assert json.loads(record.read_text())["rows"] == rows
    monkeypatch.undo()
    monkeypatch.setattr(rag_quality, "GritLM", roomy)
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--timed", "1"])
    rag_quality.main()
    timed = json.loads(record.read_text())["rows"]
    assert {r["timed"] for r in timed} == {1} and [r["f1"] for r in timed] == [r["f1"] for r in rows]
    assert all(len(r["seconds"]) == 1 for r in timed) and (tmp_path / "out" / "tiny.timed.jsonl").exists()
