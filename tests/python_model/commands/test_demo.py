"""The demo: what it draws, measures and prints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from python_model.commands import demo, demo_report
from python_model.commands.train import COMMAND as grit_train
from python_model.data import sample_dir
from python_model.evaluation.held_out import HeldOut
from tests.python_model.small_sample import write_small_sample

ROOT = Path(__file__).parents[3]


@pytest.fixture
def results() -> dict[str, Any]:
    """What a run found, with texts of every length."""
    scores = {"ndcg_at_10": 0.05, "mrr_at_10": 0.04, "recall_at_10": 0.1, "next_token_loss": 2.2, "documents": 700}
    better = {**scores, "ndcg_at_10": 0.57, "next_token_loss": 1.75}
    code = "def f(x):\n    return x\n" * 9
    search = {"kind": "a", "query": "word " * 40, "rank_before": 500, "rank_after": 1, "found": "x", "right": "x"}
    return {
        "before": scores,
        "after": better,
        "bm25": {**scores, "ndcg_at_10": 0.42},
        "searches": [search, {**search, "found": code, "right": "unbroken" * 30}],
        "chats": [{"question": "Who?", "before": "", "after": "reply " * 60}],
        "answer": {"question": "What?", "document": code, "is_right": False, "answer": "that"},
        "seconds": {"total": 245.0, "training": 160.0, "per_step_median": 2.6},
    }


def test_every_line_fits_80_columns(results: dict[str, Any]) -> None:
    printed = demo_report.lines(results, "demo_output", since=290.0)
    assert [line for line in printed if len(line) > 80] == []
    assert any(line.startswith("rank      500 before, 1 after") for line in printed)
    text = " ".join("\n".join(printed).split())
    assert "both jobs better" in text and "NOT" not in text and "4:50 minutes" in text and "BM25 0.420" in text
    assert printed[-4] == "What to do next:"


def test_an_empty_line_separates_the_examples_of_a_section(results: dict[str, Any]) -> None:
    """One before each, whether it stands below a heading or below another example."""
    results["chats"] *= 2
    printed = demo_report.lines(results, "demo_output")
    for first in ("search    word", "question  Who?"):
        places = [number for number, line in enumerate(printed) if line.startswith(first)]
        assert len(places) == 2
        assert all(printed[number - 1] == "" and printed[number - 2] for number in places)


def test_a_text_that_is_cut_fills_its_last_line(results: dict[str, Any]) -> None:
    """Of 80 columns 10 are the label's and 4 say that more follows: a word of 66 stays whole, one of 67 loses its end."""
    for length, kept in ((66, 66), (67, 66)):
        results["answer"]["answer"] = "\n".join(["one", "two", "x" * length, "four"])
        (line,) = (line for line in demo_report.lines(results, "demo_output") if "xxx" in line)
        assert line == " " * 10 + "x" * kept + " ..."


@pytest.mark.parametrize("key", ["ndcg_at_10", "next_token_loss"])
def test_one_job_alone_is_no_success(results: dict[str, Any], key: str) -> None:
    results["after"][key] = results["before"][key]
    assert not demo_report.both_better(results)
    assert "NOT both jobs better" in " ".join(" ".join(demo_report.lines(results, "demo_output")).split())


def test_without_bm25_the_rest_is_shown(results: dict[str, Any]) -> None:
    results["bm25"] = None
    text = "\n".join(demo_report.lines(results, "demo_output"))
    assert "grit-kernels[demo]" in text and "(BM25" not in text


def test_searches_are_drawn_from_every_kind_and_are_always_the_same() -> None:
    rows = HeldOut(sample_dir()).rows
    drawn = demo.draw_searches(rows, demo.SEARCHES)
    assert len(set(drawn)) == demo.SEARCHES == 5
    assert {rows[i].dataset for i in drawn} == {row.dataset for row in rows}
    assert drawn == demo.draw_searches(rows, demo.SEARCHES)


def test_a_search_finds_the_passage_with_the_highest_score() -> None:
    class Model:
        device = torch.device("cpu")
        formatter = SimpleNamespace(embed_instruction=lambda instruction: f"<{instruction}>")

        def encode(self, text: str, *, instruction: str, **options: Any) -> torch.Tensor:
            assert (text, instruction) == ("river", "<Find>")
            return torch.tensor([0.6, 0.8])

    corpus = torch.tensor([[0.6, -0.8], [0.8, 0.6], [-0.6, -0.8], [1.0, 0.0]])
    assert demo.find(Model(), corpus, ("Find", "river")) == 1  # type: ignore[arg-type]


def test_the_demo_measures_trains_and_writes_its_results(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sample = write_small_sample(tmp_path / "sample")
    monkeypatch.setattr(demo, "sample_dir", lambda: sample)
    monkeypatch.setattr(demo, "REPLY_TOKENS", 2)
    demo.run(demo.demo_config(str(tmp_path / "out"), steps=1, model=str(checkpoint)))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["searches"]) == 5 and len(results["chats"]) == 2 and results["answer"]["question"]
    assert results["bm25"]["queries"] == results["before"]["queries"] == 6
    assert all(1 <= row[rank] <= 12 for row in results["searches"] for rank in ("rank_before", "rank_after"))
    assert (tmp_path / "out" / "checkpoint" / "config.json").exists() and (tmp_path / "out" / "loss.png").exists()
    assert "\n".join(demo_report.lines(results, "out"))
    assert capsys.readouterr().out.count("nDCG@10") == 2


def test_the_recipe_in_configs_is_the_demos() -> None:
    data = demo.demo_config("demo_output").data.train_data
    written = grit_train.arguments(
        ["--config", str(ROOT / "configs" / "demo.yaml"), "--data.train_data", data, "--logging.resume", "false"]
    )
    assert written == demo.demo_config("demo_output")
