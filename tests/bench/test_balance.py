"""bench.balance: both runs share their first step, the limit changes the rest, and every variant is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import balance, charts
from tests.python_model.training_samples import data_folder, toy_config


def test_norms_with_and_without_the_limit_and_times_of_a_step(checkpoint: Path, tmp_path: Path) -> None:
    changes = {"steps": 3, "train_data": str(data_folder(tmp_path / "data")), "lr": 1e-2, "warmup_ratio": 0.0}
    changes |= {"resume": False, "save_steps": 0, "peak_tflops": 1.0, "max_grad_norm": 1e3}
    rows = balance.measure(toy_config(checkpoint, tmp_path, **changes), 0.1, 2)
    free, limited, *timed = rows
    assert [(row["limit"], row["steps"]) for row in (free, limited)] == [(0.0, 3), (0.1, 3)]
    for name in balance.NORMS:
        assert free[name][0] == pytest.approx(limited[name][0], rel=1e-5) and free[name][0] > 0.1
        assert free[name][1:] != limited[name][1:]
    assert [row["variant"] for row in timed] == list(balance.TIMED)
    assert all(len(row["all_seconds"]) == 2 and row["tokens"] == timed[0]["tokens"] > 0 for row in timed)
    drawn = charts.draw(tmp_path / "balance_cpu.json", rows)
    assert drawn is not None and drawn.read_bytes().startswith(b"\x89PNG")


def test_cosines_come_from_a_log_or_from_its_norms(tmp_path: Path) -> None:
    """Two gradients that are limited to norm 1 each: at right angles, alike, and one below the limit at right angles."""
    norms = [(700.0, 3.0, math.sqrt(2.0)), (5.0, 4.0, 2.0), (0.5, 9.0, math.sqrt(1.25))]
    lines = [
        {"contrastive_grad_norm": first, "generative_grad_norm": second, "gradient_norm": total}
        for first, second, total in norms
    ]
    lines.append({**lines[0], "gradient_cosine": -0.25})
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)))
    balance.main(["--log", f"mine={log}", "--record", str(tmp_path / "record.json")])
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert row["cosines"] == pytest.approx([0.0, 1.0, 0.0, -0.25], abs=1e-4)
    assert (row["run"], row["steps"], row["within_tenth"]) == ("mine", 4, 0.5)
    for one in ({**lines[0], "generative_grad_norm": None}, {**lines[0], "gradient_cosine": None}):
        with pytest.raises(
            ValueError, match="log: expected gradients of both objectives in each step, .* that of mine"
        ):
            balance.cosines("mine", [json.dumps(one)], 1.0)
    assert row["mean"] == pytest.approx(0.1875, abs=1e-4) and row["low"] < row["mean"] < row["high"]
