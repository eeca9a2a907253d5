"""The corpus benchmark embeds the same texts both ways and reports what Ray adds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bench import corpus
from tests.python_model.ray_cluster import own_cluster

pytest.importorskip("pyarrow", reason="shards need pyarrow: pip install 'grit-kernels[ray]'")


def test_texts_start_again_where_there_are_too_few(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in "abc"))
    assert corpus.rows_of(file, 7) == list("abcabca")
    file.write_text("")
    with pytest.raises(ValueError, match="input: expected rows with a text, got none"):
        corpus.rows_of(file, 7)


@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is an extra (ray)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, of its settings
def test_both_ways_are_measured_on_the_same_rows(checkpoint: Path) -> None:
    texts = [f"river number {number} " + "flows " * (number % 9) for number in range(200)]
    with own_cluster(num_cpus=2, log_to_driver=False):
        plain, ray = corpus.measure(str(checkpoint), texts, repeats=2)
    assert plain["rows"] == ray["rows"] == 200 and len(plain["seconds"]) == len(ray["seconds"]) == 2
    assert 0 < ray["outside"] < 1 and ray["start_s"] > 0
    ratios = sorted(b / a - 1 for a, b in zip(plain["seconds"], ray["seconds"], strict=True))
    assert ray["overhead"] == pytest.approx(sum(ratios) / 2)
