"""The quality benchmark asks what the right document answers, resumes, and judges by its own rules."""

from __future__ import annotations

import json
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
