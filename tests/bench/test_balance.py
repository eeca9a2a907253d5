"""bench.balance: both runs share their first step, the limit changes the rest, and every variant is timed."""

from __future__ import annotations

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
