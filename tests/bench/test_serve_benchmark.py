"""The serving benchmark's load and its figures, against a tiny live server."""

from __future__ import annotations

import argparse
import asyncio
import math
from typing import Any

import pytest
import torch

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from bench import serve  # noqa: E402
from tests.python_model.conftest import checkpoint, tokenizer  # noqa: E402, F401  (fixtures)
from tests.python_model.serve.server import serving  # noqa: E402


def test_a_load_counts_what_it_sent_and_what_came_back(checkpoint: Any) -> None:  # noqa: F811
    from python_model import GritLM

    options = {"chats": 8.0, "texts": 24.0, "texts_per_request": 2, "reply_tokens": 5, "patience": 30.0}
    arguments = argparse.Namespace(**options, words=[3, 9], dtype="float32", threads=1)
    with serving(GritLM(checkpoint, dtype=torch.float32), arena_rows=4000, max_step_tokens=512) as running:
        system = serve.Running(running.url, running.url, "", [])
        found = asyncio.run(serve.load(system, arguments, 100, 1.0, seed=3))
        again = asyncio.run(serve.load(system, arguments, 100, 1.0, seed=3))
    chats = len(found.first)
    assert chats > 2 and len(found.texts) > 2 and found.failed == 0
    assert found.finished_texts == 2 * len(found.texts)
    assert (len(again.first), len(again.texts)) == (chats, len(found.texts)), "a seed repeats a load"
    row = serve.row("one server", 100, found, 1.0, arguments)
    assert row["failed_share"] == 0 and row["texts_per_s"] > 0
    assert row["first_token_p50_ms"] <= row["first_token_p99_ms"]
    assert math.isnan(serve.percentile([], 0.5)) and serve.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
