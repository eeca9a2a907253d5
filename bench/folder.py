"""Keeping an index of a folder and its states: the first run, killed on the way, and what later runs cost.

    python -m bench.folder FOLDER --record folder_cpu.json

FOLDER is copied. `grit index --add --store` then runs in processes of its own:

    killed      from the start until a third of the files is in the index, then kill -9
    resumed     the same command again: finishes what is missing
    unchanged   again: no file has changed
    synced      after one file was cut in half and another removed, with --sync

A row has `run_s`, the seconds of the process (the model is loaded each time), its counts, and the size of index and store. After
the last run every chunk in the index must be of a file that is there, and every state in the store that of a chunk in the index.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import ROOT, table, write_records
from python_model.corpora.small_model import resolve_model
from python_model.rag.documents import files_below
from python_model.rag.index import Index
from python_model.rag.store.kvstore import KVStore

SHARE = 1 / 3
POLL = 0.2
"""Seconds between two looks at the index of the run that will be killed."""


def trial(source: Path, model: str, folder: Path, device: str | None) -> list[dict[str, Any]]:
    """The rows of the record; everything is written below ``folder``.

    Raises:
        ValueError: fewer than three files, or stale text or states are left behind. RuntimeError: a run fails.
    """
    files, index, store = folder / "files", folder / "index", folder / "store"
    shutil.copytree(source, files)
    count = len(files_below(files))
    if count < 3:
        raise ValueError(f"folder: expected at least 3 files, got {count} in {source}")
    command = [sys.executable, "-m", "python_model.cli", "index", str(index), "--add", str(files), "--json"]
    command += ["--model", model, "--store", str(store), "--store-limit", "1000"]
    command += [] if device is None else ["--device", device]
    seconds = _run_until(command, index, count * SHARE)
    rows = [{"variant": "killed", "run_s": seconds, **_counts(index, store)}]
    for name in ("resumed", "unchanged", "synced"):
        if name == "synced":
            _change(files, index)
        start = time.perf_counter()
        run = subprocess.run(
            [*command, *(["--sync"] if name == "synced" else [])], cwd=ROOT, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        if run.returncode:
            raise RuntimeError(f"grit index ended with {run.returncode}: {run.stderr[-500:]}")
        told = json.loads(run.stdout)
        counts = {key: told[key] for key in ("files_added", "changed", "unchanged", "removed")}
        rows.append(
            {"variant": name, "run_s": seconds, **counts, "skipped": len(told["skipped"]), **_counts(index, store)}
        )
    check(files, index, store)
    bytes_read = sum(file.stat().st_size for file in files_below(source))
    return [{"variant": row["variant"], "files": count, "bytes": bytes_read, **row} for row in rows]


def check(files: Path, index: Path, store: Path) -> None:
    """Raise ValueError if the index has a file that is gone, or the store states of no chunk."""
    found = Index(index, create=False)
    documents = {key: found.document(key) for key in found.keys()}
    names = {file.relative_to(files).as_posix() for file in files_below(files)}
    stale = [key for key, document in documents.items() if document.source not in names]
    orphans = set(KVStore(store, create=False).keys()) - set(documents)
    found.close()
    if stale or orphans:
        raise ValueError(
            f"index: expected nothing stale, got chunks {stale[:3]} of files that are gone, states {sorted(orphans)[:3]}"
        )


def _run_until(command: list[str], index: Path, files: float) -> float:
    """Start ``command``, kill it once the index has that many files; returns its seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        if (index / "index.sqlite").exists() and _files(index) >= files:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(POLL)
    if process.returncode not in (0, -signal.SIGKILL):
        assert process.stderr is not None
        raise RuntimeError(f"grit index ended with {process.returncode}: {process.stderr.read().decode()[-500:]}")
    return time.perf_counter() - start


def _files(index: Path) -> int:
    found = Index(index, create=False)
    try:
        return len({found.document(key).source for key in found.keys()})
    finally:
        found.close()


def _counts(index: Path, store: Path) -> dict[str, Any]:
    found = Index(index, create=False)
    chunks = len(found)
    found.close()
    sizes = [
        sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) / 2**20 for place in (index, store)
    ]
    return {"chunks": chunks, "index_mib": sizes[0], "store_mib": sizes[1]}


def _change(files: Path, index: Path) -> None:
    """Cut the indexed file with most chunks in half, and remove another."""
    found = Index(index, create=False)
    sources = [found.document(key).source for key in found.keys()]
    found.close()
    largest, other = sorted(set(sources), key=lambda name: (-sources.count(name), name))[:2]
    content = (files / largest).read_bytes()
    (files / largest).write_bytes(content[: len(content) // 2].rpartition(b"\n")[0] or content[:1])
    (files / other).unlink()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.folder", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device")
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = trial(arguments.folder, str(resolve_model(arguments.model)), Path(folder), arguments.device)
    columns = ["variant", "run_s", "files_added", "changed", "unchanged", "removed", "skipped", "chunks"]
    print(table(rows, [*columns, "index_mib", "store_mib"]))
    if arguments.record:
        write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
