"""The search benchmark: every variant finds, reopens and takes additions; the true neighbours are true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import search
from bench.search import ADDED, RECALL, VARIANTS, Adjustable, clustered, measure, true_neighbours
from python_model.support.optional import find

pytest.importorskip("faiss", reason="FAISS is an extra (rag)")


def test_true_neighbours_are_those_of_the_whole_product_in_float64() -> None:
    vectors, queries = clustered(400, 16, 1), clustered(5, 16, 2)
    want = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1)[:, : search.NEIGHBOURS]
    np.testing.assert_array_equal(true_neighbours(vectors, queries), want)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert not np.array_equal(clustered(400, 16, 3), vectors)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_finds_the_neighbours_and_takes_additions(name: str, tmp_path: Path) -> None:
    package, make = VARIANTS[name]
    if package is not None and find(package) is None:
        pytest.skip(f"{package} is not installed")
    vectors, queries = clustered(2000, 32, 1), clustered(8, 32, 2)
    (row,) = measure(vectors, queries, tmp_path, [name])
    assert row["recall"] >= (1.0 if "exact" in name and "int8" not in name or name == "faiss flat" else 0.7)
    assert row["mib"] > 0 and row["query_ms"] > 0 and row["times_exact"] == 1
    (place,) = tmp_path.iterdir()
    again = make(place, None)
    found = again.search(-queries[0])
    again.close()
    assert len(set(found)) == search.NEIGHBOURS and min(found) >= 2000 and max(found) < 2000 + ADDED


class Sloppy(Adjustable):
    """Finds one more of the ten neighbours whenever its effort doubles."""

    def search(self, query: np.ndarray) -> list[int]:
        return list(range(min(self.effort.bit_length() + 4, 10)))


@pytest.mark.parametrize(("most", "effort"), [(1024, 32), (20, 16), (1, 1)])
def test_effort_doubles_until_the_recall_suffices_and_is_kept(tmp_path: Path, most: int, effort: int) -> None:
    assert RECALL == 0.98
    tuned = Sloppy(tmp_path, 1, most)
    tuned.tune(np.zeros((3, 4), np.float32), np.tile(np.arange(10), (3, 1)))
    assert tuned.effort == effort and Sloppy(tmp_path, 1, most).effort == effort


def test_the_command_names_what_is_missing_and_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "find", lambda module: None if module == "usearch" else find(module))
    monkeypatch.setattr(search.os, "sched_setaffinity", lambda *_: None, raising=False)
    np.save(tmp_path / "v.npy", clustered(600, 8, 1))
    record = tmp_path / "search_cpu.json"
    arguments = ["--vectors", str(tmp_path / "v.npy"), "--queries", "10", "--record", str(record)]
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--variants", "usearch int8", "faiss flat"])
    search.main()
    rows = json.loads(record.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["grit float32, exact", "faiss flat"]
    assert {row["documents"] for row in rows} == {590} and all(row["recall"] == 1 for row in rows)
    assert "left out usearch int8: usearch is not installed" in capsys.readouterr().out
