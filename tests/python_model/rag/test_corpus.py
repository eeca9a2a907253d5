"""A corpus on Ray: every row becomes one vector, the vector that encode() gives, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_model import GritLM
from python_model.rag import KVStore, TextStates, corpus
from python_model.rag.corpus import Embedder, Recipe, Unit, add_shards, open_index_of, plan, read_shard, read_unit
from python_model.rag.formats import UnreadableFileError
from tests.python_model.ray_cluster import own_cluster

if importlib.util.find_spec("pyarrow") is None:
    pytest.skip("shards need pyarrow: pip install 'grit-kernels[ray]'", allow_module_level=True)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is an extra (ray)")


LINES = st.text(alphabet="ab\u00e9 ", min_size=1, max_size=30).filter(str.strip)


def write_rows(path: Path, count: int, start: int = 0) -> list[str]:
    texts = [f"river number {n} " + "flows " * (n % 9) for n in range(start, start + count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "lang": "en"}) + "\n" for text in texts))
    return texts


@given(st.lists(LINES, min_size=1, max_size=30), st.integers(1, 200), st.booleans())
def test_every_line_belongs_to_exactly_one_unit(texts: list[str], size: int, last: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        file.write_bytes("\n".join(lines).encode() + b"\n" * last)
        units = plan(str(folder), size)
        found = [document for unit in units for document in read_unit(unit)]
        assert [d.text for d in found] == texts and len({d.key for d in found}) == len(texts)
        assert [u.number for u in units] == list(range(len(units)))
        places = [int(d.place.removeprefix("byte ")) for d in found]
        assert all(file.read_bytes()[place:].startswith(b"{") for place in places)


def test_units_of_parquet_are_row_groups_at_any_address(tmp_path: Path) -> None:
    import fsspec
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": n, "text": f"text {n}", "title": None if n % 2 else "T", "year": 1.5} for n in range(100)]
    with fsspec.open("memory://corpus/sub/a.parquet", "wb") as file:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
    with fsspec.open("memory://corpus/b.txt", "wb") as file:
        file.write(b"not a row")
    for size, count in ((1, 15), (1 << 20, 1)):
        units = plan("memory://corpus", size)
        found = [document for unit in units for document in read_unit(unit)]
        assert len(units) == count and [d.key for d in found] == [str(n) for n in range(100)]
        assert found[99].place == "row 99" and found[99].source == "sub/a.parquet" and found[98].title == "T"
        assert found[0].metadata == {"year": 1.5}


def test_bad_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"title": "x"}\n')
    with pytest.raises(UnreadableFileError, match="a.jsonl, byte 16: not a document row"):
        list(read_unit(plan(str(tmp_path))[0]))
    with pytest.raises(FileNotFoundError, match="input: there is no .jsonl or .parquet file at"):
        plan(str(tmp_path / "nowhere"))
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ValueError, match="input: expected .jsonl or .parquet, got"):
        plan(str(tmp_path / "b.txt"))
    (alone,) = plan(str(tmp_path / "a.jsonl"))
    assert alone.name == "a.jsonl", "a file is named as in its folder"
    with pytest.raises(FileNotFoundError, match="shards: there is no run"):
        corpus.read_run(str(tmp_path))


class FakeRay(ModuleType):
    """Runs in this process what Ray would give to its workers, and notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.asked: list[dict[str, Any]] = []
        self.data = ModuleType("ray.data")
        self.context = SimpleNamespace(enable_progress_bars=True)
        contents = {
            "from_items": self.from_items,
            "ActorPoolStrategy": lambda size: size,
            "DataContext": SimpleNamespace(get_current=lambda: self.context),
        }
        for name, value in contents.items():
            setattr(self.data, name, value)

    def is_initialized(self) -> bool:
        return True

    def get(self, found: Any) -> Any:
        return found

    def remote(self, function: Any) -> Any:
        def options(**asked: Any) -> Any:
            self.asked.append(asked)
            return SimpleNamespace(remote=function)

        return SimpleNamespace(options=options)

    def from_items(self, items: list[dict[str, Any]], override_num_blocks: int) -> Any:
        assert override_num_blocks == len(items)

        def map_batches(kind: Any, *, batch_size: int, fn_constructor_kwargs: Any, compute: int, **asked: Any) -> Any:
            self.asked.append({**asked, "workers": compute})
            worker = kind(**fn_constructor_kwargs)

            def iter_rows() -> Iterator[dict[str, Any]]:
                for start in range(0, len(items), batch_size):
                    batch = items[start : start + batch_size]
                    found = worker({name: np.array([item[name] for item in batch]) for name in batch[0]})
                    for values in zip(*found.values(), strict=True):
                        yield dict(zip(found, values, strict=True))

            return SimpleNamespace(iter_rows=iter_rows)

        return SimpleNamespace(map_batches=map_batches)


def test_a_corpus_is_embedded_once_with_what_was_asked_of_ray(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    logger = logging.getLogger("ray.data")
    monkeypatch.setattr(logger, "level", logging.INFO)
    write_rows(tmp_path / "in" / "a.jsonl", 20)
    arguments = (str(tmp_path / "in"), str(tmp_path / "out"), Recipe(str(checkpoint), max_length=20))
    told: list[tuple[int, int]] = []
    run = corpus.embed_corpus(*arguments, unit_bytes=400, progress=lambda *figures: told.append(figures))
    assert (run.rows, run.rows_now, run.done_before) == (20, 20, 0) and run.cut > 0 and 0 <= run.outside < 1
    assert run.units > 2 and told == [(done, run.units) for done in range(1, run.units + 1)]
    assert ray.asked == [{"num_gpus": 0, "num_cpus": 1}, {"num_gpus": 0, "num_cpus": 1, "workers": 1}]
    assert logger.level == logging.WARNING and not ray.context.enable_progress_bars, "the progress is told once"
    again = corpus.embed_corpus(*arguments, unit_bytes=400, workers=3, gpus=0.5, cpus=2)
    assert (again.rows, again.rows_now, again.done_before, again.outside) == (20, 0, run.units, 0.0)
    assert again.cut == run.cut and ray.asked[2:] == [{"num_gpus": 0.5, "num_cpus": 2}], "there is nothing to do"
    first = min((tmp_path / "out").glob("*.parquet"))
    first.with_suffix(".json").unlink()
    last = corpus.embed_corpus(*arguments, unit_bytes=400, workers=3, gpus=0.5, cpus=2)
    assert last.done_before == run.units - 1 and 0 < last.rows_now < 20
    assert ray.asked[-1] == {"num_gpus": 0.5, "num_cpus": 2, "workers": 1}, "no more workers than shards"


def run_of(checkpoint: Path, source: Path, output: Path, **options: Any) -> tuple[Embedder, list[Unit], Recipe]:
    """What embed_corpus does before it asks Ray."""
    recipe = Recipe(str(checkpoint), **options)
    made_by = corpus._describe(recipe)
    units = plan(str(source), 400)
    run = {"recipe": corpus.asdict(recipe), **made_by, "units": [corpus.asdict(u) for u in units]}
    corpus._record(str(output), {**run, "input": corpus.versions(units)})
    return Embedder(recipe, str(output), made_by["fingerprint"]), units, recipe


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shards_hold_what_encode_gives_and_become_an_index(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    texts = write_rows(tmp_path / "in" / "a.jsonl", 40)
    (tmp_path / "in" / "empty.jsonl").write_text("\n" * 500)
    worker, units, _ = run_of(checkpoint, tmp_path / "in", tmp_path / "out", max_length=20, dtype=dtype)
    assert len(units) > 5 and all(corpus.committed(str(tmp_path / "out"), unit) is None for unit in units)
    with pytest.raises(ValueError, match=f"shards: expected {len(units)} .*got none for {len(units)}"):
        add_shards(open_index_of(str(tmp_path / "i"), str(tmp_path / "out")), str(tmp_path / "out"))
    markers = [worker.embed(unit) for unit in units]
    assert sum(marker["rows"] for marker in markers) == 40 and sum(marker["cut"] for marker in markers) > 0
    model = GritLM(checkpoint, mode="embedding")
    want = model.encode(texts, instruction=model.formatter.embed_instruction(""), max_length=20)
    found = [read_shard(str(tmp_path / "out"), unit) for unit in units]
    got = np.concatenate([vectors.numpy() for documents, vectors in found if documents])
    np.testing.assert_allclose(got, want, atol=1e-3 if dtype == "float16" else 1e-6)
    index = open_index_of(str(tmp_path / "i"), str(tmp_path / "out"))
    assert add_shards(index, str(tmp_path / "out")) == 40 and add_shards(index, str(tmp_path / "out")) == 0
    hit = index.search(want[7:8], 1, where={"lang": "en"})[0][0]
    assert hit.document.text == texts[7]
    store = KVStore(tmp_path / "s")
    store.append(hit.document.key, TextStates(torch.zeros(1, 2, 1, 1, 2), torch.tensor([1]), torch.tensor([0]), True))
    index.note_store(store.path)
    index.add([replace(hit.document, text="as it was before")], want[7:8], overwrite=True)
    assert add_shards(index, str(tmp_path / "out")) == 1 and index.document(hit.document.key) == hit.document
    assert store.keys() == []  # of the text before
    # the same texts, cut later: other vectors
    longer, units, _ = run_of(checkpoint, tmp_path / "in", tmp_path / "longer", max_length=40, dtype=dtype)
    for unit in units:
        longer.embed(unit)
    store.append(hit.document.key, TextStates(torch.zeros(1, 2, 1, 1, 2), torch.tensor([1]), torch.tensor([0]), True))
    assert [add_shards(index, str(tmp_path / "longer")) for _ in range(2)] == [40, 0]
    keys, vectors = index.vectors()
    want = model.encode(texts, instruction=model.formatter.embed_instruction(""), max_length=40)
    np.testing.assert_allclose(vectors, want[[texts.index(index.document(key).text) for key in keys]], atol=1e-3)
    assert store.keys() == [hit.document.key], "states are those of the whole text"
    part = tmp_path / "longer" / f"{units[0].shard}.parquet"
    part.write_bytes(part.read_bytes()[:-1])  # a marker does not make half a shard whole
    assert corpus.committed(str(tmp_path / "longer"), units[0]) is None


def test_two_rows_of_one_id_are_refused_wherever_they_lie(checkpoint: Path, tmp_path: Path) -> None:
    """Each shard is a transaction of its own, so the second would replace the first."""
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        rows = [{"id": number, "text": f"{name} river {number}"} for number in ({"a": (1, 2), "b": (3, 2)}[name])]
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    worker, units, _ = run_of(checkpoint, tmp_path / "in", tmp_path / "out")
    for unit in units:
        worker.embed(unit)
    index = open_index_of(str(tmp_path / "i"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"shards: expected different ids, got '2' in .*a\.jsonl and in .*b\.jsonl"):
        add_shards(index, str(tmp_path / "out"))
    assert len(index) == 0


def test_a_run_of_other_settings_is_refused_and_long_texts_may_be_divided(checkpoint: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", 20)
    worker, units, _ = run_of(checkpoint, tmp_path / "in", tmp_path / "out", chunk_tokens=12)
    worker.embed(units[0])
    documents, _ = read_shard(str(tmp_path / "out"), units[0])
    assert any(document.key.endswith("#1") for document in documents)
    run = corpus.read_run(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="model: expected fingerprint other as the first worker has, got"):
        Embedder(Recipe(str(checkpoint)), str(tmp_path / "out"), "other")
    corpus._record(str(tmp_path / "out"), run)
    with pytest.raises(ValueError, match="output: .* holds a run with another input"):  # of the same sizes
        file = tmp_path / "in" / "a.jsonl"
        file.write_text(file.read_text().replace("flows", "falls"))
        run_of(checkpoint, tmp_path / "in", tmp_path / "out", chunk_tokens=12)
    with pytest.raises(ValueError, match="output: .* holds a run with another recipe"):
        corpus._record(str(tmp_path / "out"), {**run, "recipe": {**run["recipe"], "max_length": 3}})


# ---- the cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with own_cluster(num_cpus=3, log_to_driver=False):
        yield


@needs_ray
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, of its settings
def test_two_workers_of_whom_one_is_killed_embed_every_row_once(
    cluster: None, checkpoint: Path, tmp_path: Path
) -> None:
    texts = write_rows(tmp_path / "in" / "a.jsonl", 3000) + write_rows(tmp_path / "in" / "sub" / "b.jsonl", 1000, 3000)
    recipe, output = Recipe(str(checkpoint), max_length=64), tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        import psutil

        while not killed:
            if len(list(output.glob("*.json"))) > 3:  # some shards are there
                for process in psutil.Process().children(recursive=True):  # this test's cluster, and no other
                    with contextlib.suppress(psutil.Error):  # it may end meanwhile
                        if any("MapWorker" in part for part in process.cmdline()):
                            process.kill()
                            killed.append(process.pid)
                            break
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = corpus.embed_corpus(str(tmp_path / "in"), str(output), recipe, workers=2, unit_bytes=4000)
    assert killed and result.rows == 4000 == result.rows_now and result.done_before == 0
    index = open_index_of(str(tmp_path / "i"), str(output))
    assert add_shards(index, str(output)) == 4000 == len(index)
    model = GritLM(checkpoint, mode="embedding")
    want = model.encode(texts, instruction=model.formatter.embed_instruction(""), max_length=64)
    np.testing.assert_allclose(index.vectors()[1], want, atol=1e-5)
    for shard in ("part-000003.json", "part-000007.json"):
        (output / shard).unlink()
    again = corpus.embed_corpus(str(tmp_path / "in"), str(output), recipe, workers=2, unit_bytes=4000)
    assert (again.rows, again.units - again.done_before) == (4000, 2) and 0 < again.rows_now < 4000
    with pytest.raises(ValueError, match="holds a run with another recipe"):
        corpus.embed_corpus(str(tmp_path / "in"), str(output), Recipe(str(checkpoint), max_length=9), unit_bytes=4000)
