"""``grit index``: create, update and search an index of documents."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import (
    Command,
    add_json,
    add_model,
    add_search,
    add_truncation,
    load,
    location,
    progress,
    refuse_without,
    show,
    tell_cut,
)

if TYPE_CHECKING:
    from python_model.model.modeling import GritLM
    from python_model.rag.index import Hit, Index
    from python_model.rag.sync import Report

BYTES_PER_TOKEN = 4
"""Of English text, for estimates."""


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit index``."""
    from python_model.rag.store.approximate import KINDS
    from python_model.rag.store.kvstore import FORMATS as STORE_FORMATS
    from python_model.rag.store.vectors import FORMATS

    parser.add_argument("index", type=location, help="folder of the index")
    add_model(parser)
    add_truncation(parser)
    parser.add_argument(
        "--add",
        type=location,
        action="append",
        default=[],
        help="file or folder to add, or to update if it has changed; may be repeated",
    )
    parser.add_argument(
        "--shards", type=location, help="folder of `grit embed --ray` whose documents and vectors to add"
    )
    parser.add_argument(
        "--sync", action="store_true", help="with --add: drop documents of files that are no longer in the folder"
    )
    parser.add_argument(
        "--delete",
        type=location,
        action="append",
        default=[],
        help="remove a file, a pattern such as 'notes/*.md', or a key, with its states; may be repeated",
    )
    parser.add_argument("--search", help="query to search for")
    add_search(parser)
    parser.add_argument("--instruction", default="", help="instruction of the query")
    parser.add_argument("--k", type=int, default=5, help="number of documents to find")
    parser.add_argument(
        "--chunk-tokens", type=int, default=256, help="maximum tokens per chunk; 0 leaves documents whole"
    )
    parser.add_argument("--overlap", type=int, default=32, help="tokens shared by neighbouring chunks")
    parser.add_argument("--format", choices=FORMATS, help="format of the vectors in a new index; default: float32")
    parser.add_argument(
        "--vectors", help="where a new index keeps its vectors: folder (the default), or qdrant:URL of a Qdrant server"
    )
    parser.add_argument(
        "--approximate", choices=KINDS, help="build a FAISS index of the vectors and measure its recall"
    )
    parser.add_argument("--compact", action="store_true", help="merge files and free the space of removed documents")
    parser.add_argument(
        "--store", type=location, help="folder of a key-value store: keep the documents' states as well"
    )
    parser.add_argument(
        "--store-format", choices=STORE_FORMATS, help="format of the states in a new store; default: int8"
    )
    parser.add_argument(
        "--store-limit", type=float, default=20.0, help="do not start if the states would take more GiB"
    )
    add_json(parser)


def run(arguments: Namespace) -> None:
    """Add, delete, search."""
    from python_model.model.limits import max_positions
    from python_model.rag.filters import read_conditions
    from python_model.rag.index import Index, open_index
    from python_model.rag.sync import compact, delete, only_writer

    if arguments.sync and not arguments.add:
        raise ValueError("--sync: expected --add with the folder to synchronise with, got none")
    options_of = COMMAND.parser()
    refuse_without(arguments, options_of, "search", "where", "hybrid", "instruction", "k")
    refuse_without(arguments, options_of, "add", "store", "chunk_tokens", "overlap")
    refuse_without(arguments, options_of, "store", "store_format", "store_limit")
    if arguments.chunk_tokens and not 0 <= 2 * arguments.overlap < arguments.chunk_tokens:
        raise ValueError(
            "--chunk-tokens, --overlap: expected 0, or 1 and more with an overlap below half of it, got "
            f"{arguments.chunk_tokens}, {arguments.overlap}"
        )
    if arguments.shards and arguments.add:
        raise ValueError("--shards: expected no --add beside it, got both")
    for place in arguments.add:
        if not Path(place).exists():
            raise FileNotFoundError(f"--add: there is no file or folder {place}")
    model = None
    options = {"format": arguments.format, "vectors": arguments.vectors}
    if arguments.shards:
        from python_model.rag.corpus import open_index_of

        open_index_of(arguments.index, arguments.shards, **options).close()  # refuses an index of another model
    if arguments.add or arguments.search is not None:
        model = load(arguments, mode="unified" if arguments.store else "embedding")
        index = open_index(arguments.index, model, create=bool(arguments.add), **options)
    else:
        index = Index(arguments.index, create=False, **options)
    result: dict[str, Any] = {}
    lines = []
    # a search waits for nobody, and needs no permission to write
    writes = any((arguments.add, arguments.shards, arguments.delete, arguments.compact, arguments.approximate))
    lock = only_writer(index, lambda: _tell(f"another process is adding to {arguments.index}; waiting for it"))
    with lock if writes else contextlib.nullcontext():
        if model is not None and arguments.add:
            report = _add(arguments, index, model)
            result = {**asdict(report), "added": report.documents, "files_added": report.added}
            lines.append(str(report))
        if arguments.shards:
            from python_model.rag.corpus import add_shards

            with progress("index", "shard") as update:
                result["added"] = add_shards(index, arguments.shards, update)
            lines.append(f"{result['added']} documents added from {arguments.shards}")
        if arguments.delete:
            result["deleted"] = delete(index, arguments.delete)
            lines.append(f"{result['deleted']} documents deleted")
        if arguments.compact:
            compact(index)
        if arguments.approximate or (writes and index.extend_approximate()):
            record = index.build_approximate(arguments.approximate) if arguments.approximate else index.approximate
            assert record is not None
            result["approximate"] = asdict(record)
            lines.append(
                f"{record.kind} index of {record.documents} documents: finds {record.recall:.1%} of the 10 nearest"
            )
    result = {"added": 0, "deleted": 0, **result, "documents": len(index)}
    lines.append(f"{result['documents']} documents in {arguments.index}")
    if model is not None and arguments.search is not None:
        prefix = model.formatter.embed_instruction(arguments.instruction)
        limit = max_positions(model.model.config)
        vector = model.encode([arguments.search], instruction=prefix, max_length=limit)
        tell_cut("index", model, f"the model's {limit}")
        words = [arguments.search] if arguments.hybrid else None
        hits = index.search(vector, arguments.k, where=read_conditions(arguments.where), texts=words)[0]
        result["hits"] = [{**asdict(hit.document), "score": hit.score} for hit in hits]
        lines += [_line(hit) for hit in hits]
    show(arguments, result, "\n".join(lines))


def _add(arguments: Namespace, index: Index, model: GritLM) -> Report:
    from python_model.rag.answer import RAG, bytes_per_token, open_store
    from python_model.rag.sync import Report, add_files, bytes_to_read

    rag = None
    overlap = arguments.overlap if arguments.chunk_tokens else 0
    if arguments.store:
        store = open_store(arguments.store, model, format=arguments.store_format)  # refuses a store of another model
        rag = RAG(model, store=store)
        size = bytes_to_read(index, arguments.add, arguments.chunk_tokens, overlap, store)
        tokens = size / BYTES_PER_TOKEN * (1 + overlap / max(arguments.chunk_tokens, 1))
        states = tokens * bytes_per_token(model, store.format) / 2**30
        cost = f"about {tokens:,.0f} tokens; their states take about {states:.2f} GiB ({store.format})"
        _tell(f"{size / 2**20:.1f} MiB to read, {cost}")
        if states + store.bytes_used / 2**30 > arguments.store_limit:
            raise ValueError(
                f"--store-limit: expected at most {arguments.store_limit:g} GiB of states, got about {states:.2f} beside "
                f"{store.bytes_used / 2**30:.2f} in the store; nothing was read. Raise it, or omit --store"
            )
        index.note_store(arguments.store)
    report = Report()
    try:
        with progress("index", "file") as update:
            add_files(
                index,
                model,
                arguments.add,
                rag=rag,
                max_tokens=arguments.chunk_tokens,
                overlap=overlap,
                sync=arguments.sync,
                report=report,
                progress=update,
            )
    except KeyboardInterrupt:
        _tell(
            f"interrupted: of {report.files} files, {report}. All of that is kept; the same command resumes from here."
        )
        raise
    finally:
        for file, reason in report.skipped:
            _tell(f"skipped {file}: {reason}")
    return report


def _line(hit: Hit) -> str:
    """One line: score, file and location (or the key), and the beginning of the text."""
    document = hit.document
    title = f"{document.title}: " if document.title and document.title not in document.location else ""
    head = f"{hit.score:.4f}  {' '.join(document.location.split())}  "
    return head + shorten(title + document.text, max(160 - len(head), 40), placeholder=" ..")


def _tell(text: str) -> None:
    print(f"grit index: {text}", file=sys.stderr, flush=True)


COMMAND = Command("index", "Create, update and search an index of documents.", configure, run)
