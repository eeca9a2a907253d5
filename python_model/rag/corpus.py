"""Embeds a corpus on a Ray cluster: from rows at any URL that fsspec understands to Parquet shards that an index is built from.

The input is divided into units before the work: about ``UNIT_BYTES`` of a ``.jsonl`` file, or row groups of a ``.parquet`` file.
A unit is one task of Ray Data on an actor that holds the model; its rows are embedded in packs filled by tokens and
become one shard:

    OUTPUT/run.json             what the vectors depend on, and the units; another run is refused
    OUTPUT/part-000012.parquet  key, text, title, source, place, metadata (JSON), vector
    OUTPUT/part-000012.json     the commit marker: rows, bytes of the shard, seconds

A shard counts once its marker exists. So a killed run resumes with the units that have none, and a worker that dies costs only
its current unit, which Ray gives to another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from python_model.data.files import parse_line
from python_model.model.identity import fingerprint
from python_model.model.modeling import GritLM
from python_model.rag.documents import chunk
from python_model.rag.fingerprint import embedding_settings
from python_model.rag.formats import document_of_row
from python_model.rag.index import Index
from python_model.rag.modes import Document
from python_model.rag.sync import drop_states
from python_model.support.arguments import check_at_least, check_path
from python_model.support.optional import require

UNIT_BYTES = 8 << 20
"""Of a unit: so much of a file of lines, or row groups of about so many bytes."""
SUFFIXES = (".jsonl", ".parquet")
_STAMPS = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
"""Names under which file systems of fsspec give an object's tag, or the time of its last change, the surest first."""


@dataclass(frozen=True)
class Unit:
    """The input of one shard: bytes ``start`` to ``end`` of a file of lines (the lines that begin there), or row groups
    ``start`` to ``end`` of a Parquet file. ``number`` counts them, ``name`` is the file's path below the source."""

    number: int
    file: str
    name: str
    start: int
    end: int

    @property
    def shard(self) -> str:
        """The name of its shard, without suffix."""
        return f"part-{self.number:06d}"


@dataclass(frozen=True)
class Recipe:
    """How texts become vectors.

    Attributes:
        model: checkpoint folder or name; every node of the cluster must find it there.
        instruction: instruction of the texts; empty for documents of an index.
        max_length: maximum tokens of a text, including its prefix; longer ones are truncated and counted.
        chunk_tokens, overlap: split texts into chunks of this many tokens first; 0 leaves them whole.
        dtype: dtype of the vectors in the shards, ``"float32"`` or ``"float16"``.
    """

    model: str
    instruction: str = ""
    max_length: int = 512
    chunk_tokens: int = 0
    overlap: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Result:
    """What was done, in this run and earlier ones.

    Attributes:
        rows, cut: vectors in the shards, and how many of their texts were longer than ``max_length``.
        units, done_before: shards, and how many of them earlier runs had written.
        seconds: of this run, from the first unit to the last; ``rows_now``: vectors it computed.
        outside: the share of the workers' time in this run that was not spent in ``GritLM.encode`` (reading, writing).
    """

    rows: int
    cut: int
    units: int
    done_before: int
    seconds: float
    rows_now: int
    outside: float


def embed_corpus(
    source: str,
    output: str,
    recipe: Recipe,
    *,
    workers: int = 1,
    gpus: float = 0,
    cpus: float = 1,
    unit_bytes: int = UNIT_BYTES,
    progress: Any = None,
) -> Result:
    """Embed the rows at ``source`` into shards at ``output``; rows are ``{"text": .., "title"?: .., "id"?: ..}``.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file, or a folder of them at any depth, on a disk that all nodes share or at
            an address such as ``s3://bucket/folder``.
        output: a folder there; an interrupted run is resumed.
        workers: actors, each with a copy of the model, ``gpus`` GPUs and ``cpus`` CPUs.
        progress: called with the number of finished shards and of all shards.

    Raises:
        FileNotFoundError: there is no such file at ``source``. ImportError: Ray or pyarrow is missing.
        ValueError: ``output`` holds a run of other rows or settings, or a row is malformed (the message names its place).
    """
    check_path("source", source)
    check_path("output", output)
    ray = require("ray", "ray")
    require("ray.data", "ray")
    check_at_least("workers", workers, 1)
    units = plan(source, unit_bytes)
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    options = {"num_gpus": gpus, "num_cpus": cpus}
    made_by = ray.get(ray.remote(_describe).options(**options).remote(recipe))
    run = {"recipe": asdict(recipe), **made_by, "units": [asdict(unit) for unit in units]}
    _record(output, {**run, "input": versions(units)})
    before = {unit.number: marker for unit in units if (marker := committed(output, unit)) is not None}
    todo = [asdict(unit) for unit in units if unit.number not in before]
    markers = dict(before)
    start = time.perf_counter()
    if todo:
        from ray.data import ActorPoolStrategy, DataContext

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        DataContext.get_current().enable_progress_bars = False  # ``progress`` is told
        # Ray Data restarts dead actors and reassigns their units, without limit
        data = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            Embedder,
            batch_size=1,
            fn_constructor_kwargs={"recipe": recipe, "output": output, "expected": made_by["fingerprint"]},
            compute=ActorPoolStrategy(size=min(workers, len(todo))),
            **options,
        )
        for row in data.iter_rows():
            markers[int(row["number"])] = json.loads(row["marker"])
            if progress is not None:
                progress(len(markers), len(units))
    now = [marker for number, marker in markers.items() if number not in before]
    busy = sum(marker["seconds"] for marker in now)
    return Result(
        rows=sum(marker["rows"] for marker in markers.values()),
        cut=sum(marker["cut"] for marker in markers.values()),
        units=len(units),
        done_before=len(before),
        seconds=time.perf_counter() - start,
        rows_now=sum(marker["rows"] for marker in now),
        outside=1 - sum(marker["encode_seconds"] for marker in now) / busy if busy else 0.0,
    )


def plan(source: str, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of ``source``, file by file, sorted by name."""
    filesystem, root = _filesystem(source)
    if filesystem.isfile(root):
        names = [root]
    else:
        names = sorted(name for name in filesystem.find(root) if name.endswith(SUFFIXES))
    if not names:
        raise FileNotFoundError(f"input: there is no {' or '.join(SUFFIXES)} file at {source}")
    if not all(name.endswith(SUFFIXES) for name in names):
        raise ValueError(f"input: expected {' or '.join(SUFFIXES)}, got {source!r}")
    units: list[Unit] = []
    for name in names:
        address = filesystem.unstrip_protocol(name)
        if name.endswith(".parquet"):
            spans = _row_groups(filesystem, name, unit_bytes)
        else:
            size = filesystem.size(name)
            spans = [(start, min(start + unit_bytes, size)) for start in range(0, size, unit_bytes)]
        below = name.removeprefix(root).lstrip("/") or name.rpartition("/")[2]
        units += [Unit(len(units) + i, address, below, start, end) for i, (start, end) in enumerate(spans)]
    return units


def versions(units: Sequence[Unit]) -> dict[str, str]:
    """What tells the content of each file from another of its size: the file system's tag of it, or when it was written."""
    found = {}
    for address in dict.fromkeys(unit.file for unit in units):
        filesystem, path = _filesystem(address)
        info = filesystem.info(path)
        found[address] = str(next((info[name] for name in _STAMPS if info.get(name)), None))
    return found


def _row_groups(filesystem: Any, name: str, unit_bytes: int) -> list[tuple[int, int]]:
    parquet = require("pyarrow.parquet", "parquet")
    spans: list[tuple[int, int]] = []
    with filesystem.open(name, "rb") as file:
        metadata = parquet.ParquetFile(file).metadata
        filled = unit_bytes
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).total_byte_size
            if filled + size > unit_bytes:
                spans.append((group, group))
                filled = 0
            spans[-1] = (spans[-1][0], group + 1)
            filled += size
    return spans


def read_unit(unit: Unit) -> Iterator[Document]:
    """The documents of a unit; a row without an id is named by its file and its first byte or its number."""
    filesystem, path = _filesystem(unit.file)
    name = unit.name
    with filesystem.open(path, "rb") as file:
        if path.endswith(".parquet"):
            table = require("pyarrow.parquet", "parquet").ParquetFile(file)
            number = sum(table.metadata.row_group(group).num_rows for group in range(unit.start))
            for batch in table.iter_batches(1024, row_groups=range(unit.start, unit.end)):
                for row in batch.to_pylist():
                    yield document_of_row(row, f"{unit.file}, row {number}", f"{name}:{number}", name, f"row {number}")
                    number += 1
            return
        place = unit.start
        if unit.start:  # a line that began earlier belongs to the previous unit
            file.seek(unit.start - 1)
            place += len(file.readline()) - 1
        while place < unit.end and (line := file.readline()):
            origin = f"{unit.file}, byte {place}"
            row = parse_line(line, origin, first=place == 0)
            if row is not None:
                yield document_of_row(row, origin, f"{name}@{place}", name, f"byte {place}")
            place += len(line)


class Embedder:
    """What an actor of Ray Data runs: a model, and a call per unit."""

    def __init__(self, recipe: Recipe, output: str, expected: str) -> None:
        self.recipe, self.output = recipe, output
        self.model = _load(recipe.model)
        self.prefix = self.model.formatter.embed_instruction(recipe.instruction)
        found = fingerprint(self.model)
        if found != expected:
            raise ValueError(f"model: expected fingerprint {expected} as the first worker has, got {found}")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        columns = [batch[field.name].tolist() for field in fields(Unit)]
        units = [Unit(*row) for row in zip(*columns, strict=True)]
        return {"number": [u.number for u in units], "marker": [json.dumps(self.embed(u)) for u in units]}

    def embed(self, unit: Unit) -> dict[str, Any]:
        """Write the shard of a unit; returns its marker."""
        start = time.perf_counter()
        recipe, model = self.recipe, self.model
        documents = list(read_unit(unit))
        if recipe.chunk_tokens:
            documents = [
                part for d in documents for part in chunk(d, model.tokenizer, recipe.chunk_tokens, recipe.overlap)
            ]
        texts = [document.content for document in documents]
        before, cut_before = time.perf_counter(), model.texts_cut
        options: dict[str, Any] = {"instruction": self.prefix, "max_length": recipe.max_length}
        vectors = model.encode(texts, show_progress_bar=False, **options) if texts else None
        encode_seconds = time.perf_counter() - before
        filesystem, root = _filesystem(self.output)
        path = f"{root}/{unit.shard}.parquet"
        with filesystem.open(path, "wb") as file:
            _write_table(file, documents, vectors, recipe.dtype)
        marker = {
            "rows": len(documents),
            "cut": model.texts_cut - cut_before,
            "bytes": filesystem.size(path),
            "encode_seconds": encode_seconds,
            "seconds": time.perf_counter() - start,
        }
        with filesystem.open(f"{root}/{unit.shard}.json", "w") as file:
            file.write(json.dumps(marker))
        return marker


def committed(output: str, unit: Unit) -> dict[str, Any] | None:
    """The marker of a unit's shard; None if the shard is missing or incomplete."""
    filesystem, root = _filesystem(output)
    try:
        with filesystem.open(f"{root}/{unit.shard}.json", "r") as file:
            marker: dict[str, Any] = json.loads(file.read())
        whole = filesystem.size(f"{root}/{unit.shard}.parquet") == marker["bytes"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return marker if whole else None


def read_run(output: str) -> dict[str, Any]:
    """What a run recorded: ``recipe``, ``fingerprint`` and ``settings`` of the model, ``units``.

    Raises:
        FileNotFoundError: there is no run.
    """
    check_path("output", output)
    filesystem, root = _filesystem(output)
    try:
        with filesystem.open(f"{root}/run.json", "r") as file:
            return dict(json.loads(file.read()))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"shards: there is no run of `grit embed --ray` at {output}") from None


def open_index_of(path: str, output: str, **options: Any) -> Index:
    """The index at ``path`` for the model of a run, created if missing; no model is loaded. ``options``: see :class:`Index`."""
    run = read_run(output)
    return Index(path, fingerprint=run["fingerprint"], settings=run["settings"], **options)


def add_shards(index: Index, output: str, progress: Any = None) -> int:
    """Add the documents of a finished run to an index; returns how many were new or changed, or had vectors that a run with
    another ``max_length`` or ``dtype`` made.

    A shard is one transaction of the index, so an interrupted call can be resumed. States of changed documents are removed.

    Raises:
        ValueError: a shard is missing: the run is not finished; or two rows have one id, of which the second would replace the
            first.
    """
    run = read_run(output)
    units = [Unit(**unit) for unit in run["units"]]
    if missing := [unit.shard for unit in units if committed(output, unit) is None]:
        raise ValueError(
            f"shards: expected {len(units)} at {output}, got none for {len(missing)}, among them {missing[0]}"
        )
    _check_keys(output, units)
    added = 0
    names, how = {unit.name for unit in units}, [run["recipe"]["max_length"], run["recipe"]["dtype"]]
    other = index.made_otherwise(names, how)
    index.note_made(names - other, how)
    index.note_made(other, None)  # neither, until all of it is replaced
    for number, unit in enumerate(units, 1):
        documents, vectors = read_shard(output, unit)
        changed = [
            row
            for row, document in enumerate(documents)
            if document.key not in index or asdict(index.document(document.key)) != asdict(document)
        ]
        fresh = list(range(len(documents))) if unit.name in other else changed
        if fresh:
            drop_states(index, [documents[row].key for row in changed])
            index.replace([], [documents[row] for row in fresh], vectors[fresh])
        added += len(fresh)
        if progress is not None:
            progress(number, len(units))
    index.note_made(other, how)
    return added


def _check_keys(output: str, units: Sequence[Unit]) -> None:
    filesystem, root = _filesystem(output)

    def keys(unit: Unit) -> list[str]:
        with filesystem.open(f"{root}/{unit.shard}.parquet", "rb") as file:
            table = require("pyarrow.parquet", "parquet").read_table(file, columns=["key"])
        return [str(key) for key in table["key"].to_pylist()]

    def hashed(key: str) -> int:
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")

    # eight bytes per row; the rows of equal ones are compared by their ids
    hashes = np.concatenate([np.array([hashed(key) for key in keys(unit)], dtype=np.uint64) for unit in units])
    values, counts = np.unique(hashes, return_counts=True)
    doubtful = set(values[counts > 1].tolist())
    seen: dict[str, str] = {}
    for unit in units if doubtful else ():
        for key in (key for key in keys(unit) if hashed(key) in doubtful):
            if key in seen:
                raise ValueError(f"shards: expected different ids, got {key!r} in {seen[key]} and in {unit.file}")
            seen[key] = unit.file


def read_shard(output: str, unit: Unit) -> tuple[list[Document], torch.Tensor]:
    """The documents of a shard and their vectors, float32 (documents, size)."""
    filesystem, root = _filesystem(output)
    with filesystem.open(f"{root}/{unit.shard}.parquet", "rb") as file:
        table = require("pyarrow.parquet", "parquet").read_table(file)
    rows = table.drop_columns(["vector"]).to_pylist()
    documents = [Document(**{**row, "metadata": json.loads(row["metadata"])}) for row in rows]
    if not documents:
        return [], torch.zeros(0, 0)
    values = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return documents, torch.from_numpy(values.astype("float32")).view(len(documents), -1)


def _write_table(file: Any, documents: Sequence[Document], vectors: Any, dtype: str) -> None:
    arrow: Any = require("pyarrow", "parquet")
    names = ("key", "text", "title", "source", "place")
    columns: dict[str, Any] = {
        name: arrow.array([getattr(d, name) for d in documents], arrow.string()) for name in names
    }
    columns["metadata"] = arrow.array([json.dumps(dict(d.metadata)) for d in documents], arrow.string())
    size = 1 if vectors is None else vectors.shape[1]
    flat = [] if vectors is None else vectors.astype(dtype).reshape(-1)
    kind = arrow.float16() if dtype == "float16" else arrow.float32()
    columns["vector"] = arrow.FixedSizeListArray.from_arrays(arrow.array(flat, kind), size)
    require("pyarrow.parquet", "parquet").write_table(arrow.table(columns), file)


def _record(output: str, run: dict[str, Any]) -> None:
    filesystem, root = _filesystem(output)
    filesystem.makedirs(root, exist_ok=True)
    try:
        before = read_run(output)
    except FileNotFoundError:
        with filesystem.open(f"{root}/run.json", "w") as file:
            file.write(json.dumps(run))
        return
    before.setdefault("input", run.get("input"))  # which earlier versions did not record
    different = [name for name, value in run.items() if before.get(name) != json.loads(json.dumps(value))]
    if different:
        raise ValueError(
            f"output: {output} holds a run with another {', '.join(different)}; choose another folder, or delete it"
        )


def _describe(recipe: Recipe) -> dict[str, Any]:
    model = _load(recipe.model)
    settings = {**embedding_settings(model), "prefix": model.formatter.embed_instruction(recipe.instruction)}
    return {"fingerprint": fingerprint(model), "settings": settings}


def _load(name: str) -> GritLM:
    from python_model.corpora.small_model import resolve_model

    return GritLM(resolve_model(name), mode="embedding")


def _filesystem(address: str) -> tuple[Any, str]:
    filesystem, root = require("fsspec", "ray").core.url_to_fs(address)
    return filesystem, str(root).rstrip("/")
