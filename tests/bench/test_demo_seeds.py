"""The record of the demo over seeds, and when its goal is not reached."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from bench import common, demo
from python_model.train.config import TrainConfig


def found(ndcg: float, loss: float) -> dict[str, Any]:
    scores = {"ndcg_at_10": ndcg, "mrr_at_10": ndcg, "recall_at_10": ndcg, "queries": 96, "documents": 700}
    return {
        "before": {**scores, "ndcg_at_10": 0.05, "next_token_loss": 2.2},
        "after": {**scores, "next_token_loss": loss},
        "bm25": {**scores, "ndcg_at_10": 0.42},
    }


def test_the_goal_asks_for_the_mean_for_every_seed_and_for_the_loss() -> None:
    assert demo.shortfalls({0: found(0.55, 1.8), 1: found(0.47, 1.9)}) == []
    assert [text.split(":")[0] for text in demo.shortfalls({0: found(0.55, 1.8), 1: found(0.41, 2.1)})] == [
        "mean nDCG@10",
        "seed 1",
        "seed 1",
    ]


def test_rows_hold_every_seed_its_yardsticks_and_the_mean() -> None:
    rows = demo.rows_of({0: found(0.5, 1.8), 7: found(0.6, 1.6)}, steps=60)
    assert [(row["variant"], row.get("seed")) for row in rows] == [
        ("untrained", None),
        ("BM25, stemmed", None),
        ("trained", 0),
        ("trained", 7),
        ("mean of 2 seeds", None),
    ]
    assert rows[-1]["ndcg_at_10"] == 0.55 and "next_token_loss" not in rows[1]


def test_loading_and_saving_weights_draw_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []

    def result(config: TrainConfig) -> dict[str, Any]:
        shown.append(transformers_logging.is_progress_bar_enabled())
        return found(0.55, 1.8)

    monkeypatch.setattr(demo, "result", result)
    monkeypatch.setattr(common, "write_records", lambda path, rows: path)
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    demo.main(["--seeds", "0"])
    assert shown == [False]
