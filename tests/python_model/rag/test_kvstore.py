"""A key-value store gives back what was written, and survives kills, full disks, damage and several processes."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from python_model.rag import KVStore, StoreBusyError, StoreCorruptError, StoreFullError, TextStates
from python_model.rag.store import shards
from python_model.rag.store.quantization import dequantize, quantize

ROOT = Path(__file__).parents[3]


def make_states(seed: int = 0, tokens: int = 5, start: int = 0) -> TextStates:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(3, 2, 2, tokens, 8, generator=generator)
    ids = torch.randint(0, 1000, (tokens,), generator=generator)
    return TextStates(data, ids, torch.arange(start, start + tokens), causal=bool(seed % 2))


def assert_same(got: TextStates, want: TextStates, dtype: torch.dtype) -> None:
    assert torch.equal(got.keys_values, want.keys_values.to(dtype)) and got.causal == want.causal
    assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.positions, want.positions)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_document_comes_back_as_written_also_after_reopening(tmp_path: Path, name: Any) -> None:
    store = KVStore(tmp_path / "s", fingerprint="m", format=name, settings={"causal": False})
    store.append("a", make_states(1, tokens=7, start=3), {"title": "A"})
    store.append_many([("b", make_states(2), {}), ("c", make_states(3, tokens=1), {})])
    for opened in (store, KVStore(tmp_path / "s", fingerprint="m", settings={"causal": False})):
        assert opened.keys() == ["a", "b", "c"] and len(opened) == 3 and "b" in opened and "z" not in opened
        assert_same(opened.load("a"), make_states(1, tokens=7, start=3), getattr(torch, name))
        assert_same(opened.load("c"), make_states(3, tokens=1), getattr(torch, name))
        assert opened.metadata("a") == {"title": "A"} and opened.verify() == []
    assert store.bytes_used == sum(f.stat().st_size for f in (tmp_path / "s" / "shards").iterdir())


def test_a_document_is_one_tensor_in_a_safetensors_file(tmp_path: Path) -> None:
    store = KVStore(tmp_path / "s")
    store.append("a", make_states())
    (file,) = (tmp_path / "s" / "shards").iterdir()
    with safe_open(str(file), "pt") as opened:
        assert list(opened.keys()) == ["0.data"]
        assert torch.equal(opened.get_tensor("0.data"), make_states().keys_values.bfloat16())


def test_int8_error_is_at_most_half_a_step_of_its_scale(tmp_path: Path) -> None:
    states = make_states(tokens=40)
    states.keys_values[:, 0, :, :, 3] *= 50  # keys have large channels; they must not spoil the others
    data, key_scales, value_scales = quantize(states.keys_values)
    back = dequantize(data, key_scales, value_scales, torch.float32)
    error = (back - states.keys_values).abs()
    assert bool((error[:, 0] <= key_scales * 0.5001).all()) and bool((error[:, 1] <= value_scales * 0.5001).all())
    store = KVStore(tmp_path / "s", format="int8")
    store.append("a", states)
    assert torch.equal(store.load("a", dtype=torch.float32).keys_values, back)
    assert store.load("a").keys_values.dtype == torch.bfloat16
    assert torch.equal(dequantize(*quantize(torch.zeros(1, 2, 1, 2, 4)), torch.float32), torch.zeros(1, 2, 1, 2, 4))


def test_deleting_overwriting_and_compacting_keep_the_other_documents(tmp_path: Path) -> None:
    store = KVStore(tmp_path / "s", format="float32")
    store.append_many([(str(i), make_states(i), {}) for i in range(4)])
    store.append("4", make_states(4))
    reader = KVStore(tmp_path / "s")
    mapped = reader.load("1").keys_values
    with pytest.raises(ValueError, match="'2' is in the store already"):
        store.append("2", make_states(9))
    store.append("2", make_states(9), overwrite=True)
    store.delete("0")
    before = store.bytes_used
    store.compact()
    assert store.bytes_used < before and len(list((tmp_path / "s" / "shards").iterdir())) == 1
    assert set(store.keys()) == {"1", "2", "3", "4"}
    for opened in (store, reader):  # the reader's shard is gone; it finds the new one
        assert_same(opened.load("2"), make_states(9), torch.float32)
        assert_same(opened.load("3"), make_states(3), torch.float32)
    assert torch.equal(mapped, make_states(1).keys_values)  # what was mapped before stays readable
    store.compact(shard_bytes=1)
    assert len(list((tmp_path / "s" / "shards").iterdir())) == 4 and store.verify() == []
    with pytest.raises(KeyError, match="'0' is not in"):
        store.load("0")
    with pytest.raises(KeyError, match="'0' is not in"):
        store.delete("0")


def test_a_store_refuses_another_model_another_format_and_other_shapes(tmp_path: Path) -> None:
    store = KVStore(tmp_path / "s", fingerprint="one", settings={"prefix": "x"})
    store.append("a", make_states())
    with pytest.raises(ValueError, match="fingerprint: .*'one'.*'two'"):
        KVStore(tmp_path / "s", fingerprint="two")
    with pytest.raises(ValueError, match="format: .*'bfloat16'.*'int8'"):
        KVStore(tmp_path / "s", format="int8")
    with pytest.raises(ValueError, match="settings: expected"):
        KVStore(tmp_path / "s", settings={"prefix": "y"})
    with pytest.raises(ValueError, match=r"kv_heads, head_dim\) \(3, 2, 8\) as this store has, got \(3, 2, 16\)"):
        store.append("b", TextStates(torch.zeros(3, 2, 2, 1, 16), torch.zeros(1), torch.zeros(1), True))
    with pytest.raises(ValueError, match="a duplicate key"):
        store.append_many([("b", make_states(), {}), ("b", make_states(), {})])
    with pytest.raises(ValueError, match="format: expected .*got 'int4'"):
        KVStore(tmp_path / "t", format="int4")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="no key-value store"):
        KVStore(tmp_path / "nowhere", create=False)
    assert store.keys() == ["a"] and store.verify() == []


def test_a_damaged_truncated_or_missing_shard_is_named_and_the_rest_is_readable(tmp_path: Path) -> None:
    store = KVStore(tmp_path / "s")
    for i in range(4):
        store.append(str(i), make_states(i))
    files = [row[0] for row in store._db.execute("SELECT file FROM shards ORDER BY id")]
    paths = [tmp_path / "s" / "shards" / name for name in files]
    content = bytearray(paths[0].read_bytes())
    content[-1] ^= 1
    paths[0].write_bytes(content)
    paths[1].write_bytes(paths[1].read_bytes()[:-10])
    paths[2].unlink()
    fresh = KVStore(tmp_path / "s")
    for key, problem in (("0", "checksum"), ("1", "cannot be read"), ("2", "is missing")):
        with pytest.raises(
            StoreCorruptError, match=f"{files[int(key)]}.*{problem}|{files[int(key)]}.*'{key}'.*{problem}"
        ):
            fresh.load(key)
    assert fresh.verify() == ["0", "1", "2"]
    with pytest.raises(StoreCorruptError):
        fresh.compact()
    for key in ("0", "1", "2"):
        fresh.delete(key)
    fresh.compact()
    assert_same(fresh.load("3"), make_states(3), torch.bfloat16)
    (tmp_path / "s" / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreCorruptError, match="index.sqlite"):
        KVStore(tmp_path / "s")


@pytest.mark.parametrize("where", ["write", "fsync", "index"])
def test_a_full_disk_is_an_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store = KVStore(tmp_path / "s")
    store.append("a", make_states())

    def fail(*arguments: Any) -> Any:
        raise (
            sqlite3.OperationalError("database or disk is full")
            if where == "index"
            else OSError(errno.ENOSPC, "No space left on device")
        )

    target = {"write": (shards, "raw_bytes"), "fsync": (os, "fsync"), "index": (KVStore, "_write_shard")}[where]
    states = make_states(1)
    with monkeypatch.context() as patch:
        if where == "write":  # fails while the file is half written, not while the checksum is computed
            patch.setattr(shards, "checksum", lambda tensors: 0)
        patch.setattr(*target, fail)
        with pytest.raises(StoreFullError, match="nothing changed"):
            store.append("b", states)
    assert store.keys() == ["a"] and len(list((tmp_path / "s" / "shards").iterdir())) == 1
    store.append("b", states)
    assert store.verify() == []


def test_the_size_limit_refuses_or_drops_the_oldest(tmp_path: Path) -> None:
    one = KVStore(tmp_path / "probe")
    one.append("a", make_states())
    limit = int(one.bytes_used * 2.5)
    store = KVStore(tmp_path / "error", max_bytes=limit)
    store.append("a", make_states(1))
    store.append("b", make_states(2))
    with pytest.raises(StoreFullError, match="max_bytes"):
        store.append("c", make_states(3))
    assert store.keys() == ["a", "b"]
    store = KVStore(tmp_path / "drop", max_bytes=limit, when_full="drop_oldest")
    for i in range(6):
        store.append(str(i), make_states(i))
        assert store.bytes_used <= limit
    assert store.keys() == ["4", "5"] and len(list((tmp_path / "drop" / "shards").iterdir())) == 2
    with pytest.raises(StoreFullError):
        store.append("big", make_states(tokens=50))
    assert store.keys() == ["4", "5"]


@pytest.mark.parametrize("when_full", ["error", "drop_oldest"])
def test_a_limit_is_reached_and_not_passed(tmp_path: Path, when_full: Any) -> None:
    one = KVStore(tmp_path / "probe")
    one.append("a", make_states())
    size = one.bytes_used
    store = KVStore(tmp_path / "s", max_bytes=2 * size, when_full=when_full)
    store.append("a", make_states(1))
    store.append("b", make_states(2))
    assert store.keys() == ["a", "b"] and store.bytes_used == 2 * size
    if when_full == "error":
        with pytest.raises(StoreFullError, match=f"max_bytes: {size} more bytes do not fit: {2 * size} of {2 * size}"):
            store.append("c", make_states(3))
    else:
        store.append("c", make_states(3))
        assert store.keys() == ["b", "c"] and store.bytes_used == 2 * size
        whole = KVStore(tmp_path / "t", max_bytes=size, when_full=when_full)
        whole.append("a", make_states(1))
        assert whole.keys() == ["a"]


def test_compacting_fills_shards_and_begins_another_when_one_is_full(tmp_path: Path) -> None:
    store = KVStore(tmp_path / "s", format="float32")
    store.append_many([(str(i), make_states(i), {}) for i in range(5)])
    states = make_states().keys_values
    store.compact(shard_bytes=states.numel() * states.element_size() + 1)
    counts = store._db.execute("SELECT COUNT(*) FROM documents GROUP BY shard ORDER BY shard").fetchall()
    assert [count for (count,) in counts] == [2, 2, 1] and store.keys() == list("01234") and store.verify() == []


def test_a_document_is_compared_with_its_checksum_when_it_is_asked_for(tmp_path: Path) -> None:
    store = KVStore(tmp_path / "s", format="float32")
    store.append("a", make_states())
    store.load("a")
    (file,) = (tmp_path / "s" / "shards").iterdir()
    with open(file, "r+b") as damaged:  # in place: mapped files change with it
        damaged.seek(-1, os.SEEK_END)
        last = damaged.read()[0]
        damaged.seek(-1, os.SEEK_END)
        damaged.write(bytes([last ^ 1]))
    assert len(store.load("a")) == len(store.load("a", verify="first")) == 5, "it was right when it was first loaded"
    with pytest.raises(StoreCorruptError, match="checksum"):
        store.load("a", verify="always")
    other = KVStore(tmp_path / "s")
    assert len(other.load("a", verify="never")) == 5
    with pytest.raises(StoreCorruptError, match="checksum"):
        other.load("a")


def test_few_shards_stay_mapped_those_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_model.rag.store.kvstore.OPEN_SHARDS", 2)
    store = KVStore(tmp_path / "s", format="float32")
    for i in range(4):
        store.append(str(i), make_states(i))
    files = [row[0] for row in store._db.execute("SELECT file FROM shards ORDER BY id")]
    for i in (0, 1, 0, 2, 3, 2):
        assert_same(store.load(str(i)), make_states(i), torch.float32)
    assert list(store._handles) == [files[3], files[2]]


def test_the_least_recently_used_make_room_whichever_process_used_them(tmp_path: Path) -> None:
    one = KVStore(tmp_path / "probe")
    one.append("a", make_states())
    options: dict[str, Any] = {"max_bytes": int(one.bytes_used * 3.5), "when_full": "drop_unused"}
    store = KVStore(tmp_path / "s", **options)
    for key in "abc":
        store.append(key, make_states())
        time.sleep(0.02)
    KVStore(tmp_path / "s").load("a")
    time.sleep(0.02)
    store.append("d", make_states())
    assert store.keys() == ["a", "c", "d"]
    time.sleep(0.02)
    store.load("c")
    store.load("c", verify="never")
    KVStore(tmp_path / "s", **options).append("e", make_states())
    assert store.keys() == ["c", "d", "e"] and store.verify() == []


def test_a_store_on_a_read_only_file_system_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KVStore(tmp_path / "s").append("a", make_states())

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert len(KVStore(tmp_path / "s").load("a")) == len(make_states())


def test_a_second_writer_waits_and_gives_up_with_an_error(tmp_path: Path) -> None:
    first = KVStore(tmp_path / "s")
    impatient = KVStore(tmp_path / "s", lock_timeout=0.05)
    patient = KVStore(tmp_path / "s", lock_timeout=30)
    with first._transaction():
        with pytest.raises(StoreBusyError, match="another process"):
            impatient.append("a", make_states(1))
        thread = threading.Thread(target=patient.append, args=("b", make_states(2)))
        thread.start()
        time.sleep(0.1)
        assert first.keys() == []  # readers do not wait
    thread.join()
    assert first.keys() == ["b"]
    first._db.execute("BEGIN")
    first._db.execute("SELECT * FROM documents").fetchall()  # a commit waits for a reader that is at it
    with pytest.raises(StoreBusyError, match="another process"):
        impatient.append("c", make_states(3))
    first._db.execute("ROLLBACK")
    assert first.keys() == ["b"] and len(list((tmp_path / "s" / "shards").iterdir())) == 1


WRITER = """
import sys, torch
from python_model.rag import KVStore, TextStates
store = KVStore(sys.argv[1], format="float32")
for i in range(int(sys.argv[3])):
    data = torch.full((2, 2, 2, 40, 16), float(i))
    store.append(f"{sys.argv[2]}{i}", TextStates(data, torch.arange(40), torch.arange(40), True))
    print(i, flush=True)
"""


def _writer(folder: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), name, str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("delay", [0.0, 0.003])
def test_a_killed_writer_loses_at_most_its_last_document(tmp_path: Path, delay: float) -> None:
    writer = _writer(tmp_path / "s", "k", 100000)
    assert writer.stdout is not None
    confirmed = -1
    while confirmed < 5:
        confirmed = int(writer.stdout.readline())
    time.sleep(delay)
    os.kill(writer.pid, signal.SIGKILL)
    confirmed = max([confirmed, *(int(line) for line in writer.stdout.read().split())])
    writer.wait()
    store = KVStore(tmp_path / "s")
    assert len(store) in (confirmed + 1, confirmed + 2) and store.verify() == []
    assert store.load(f"k{confirmed}").keys_values.eq(confirmed).all()
    (tmp_path / "s" / "shards" / ".x.partial").write_bytes(b"left by a writer that was killed")
    (tmp_path / "s" / "shards" / "orphan.safetensors").write_bytes(b"written, but not in the index")
    store.append("after", TextStates(torch.zeros(2, 2, 2, 1, 16), torch.zeros(1), torch.zeros(1), True))
    assert len(list((tmp_path / "s" / "shards").iterdir())) == len(store)


def test_two_processes_write_while_a_third_reads(tmp_path: Path) -> None:
    writers = [_writer(tmp_path / "s", name, 12) for name in "ab"]
    reader = KVStore(tmp_path / "s", format="float32")
    while any(writer.poll() is None for writer in writers):
        for key in reader.keys():
            assert reader.load(key).keys_values.eq(int(key[1:])).all()
        reader.compact()
    assert all(writer.wait() == 0 for writer in writers)
    assert sorted(reader.keys()) == sorted(f"{name}{i}" for name in "ab" for i in range(12)) and reader.verify() == []
