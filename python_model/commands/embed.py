"""``grit embed``: vectors of texts, to a file or as JSON.

A file is written incrementally: run again after an interruption, the same command resumes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import (
    SMALL_MODEL,
    Command,
    add_chunks,
    add_truncation,
    chunks_of,
    documents_at,
    load,
    location,
    progress,
    refuse_both,
    refuse_without,
)
from python_model.rag.modes import Document
from python_model.support.files import new_file
from python_model.support.resume import ResumableArray

if TYPE_CHECKING:
    from python_model.model.modeling import GritLM

BLOCK = 2048
"""Texts per device that are embedded between two writes."""


def _key(model: GritLM, texts: Sequence[str], *settings: Any) -> str:
    """Distinguishes runs that give different vectors."""
    from python_model.model.identity import fingerprint
    from python_model.rag.fingerprint import embedding_settings

    digest = hashlib.sha256(json.dumps([fingerprint(model), embedding_settings(model), *settings]).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit embed``."""
    parser.add_argument(
        "--model", type=location, default=SMALL_MODEL, help="checkpoint folder or name; default: the small model"
    )
    parser.add_argument("--text", action="append", help="a text to embed, instead of standard input; may be repeated")
    parser.add_argument("--input", type=location, help="read a jsonl or text file, or a folder of documents, instead")
    parser.add_argument("--instruction", default="", help="instruction, such as 'Find the answer'")
    parser.add_argument(
        "--output",
        type=location,
        help=".npy file for the vectors (with --ray: folder of their shards); an interrupted run resumes",
    )
    parser.add_argument(
        "--max-length", type=int, default=512, help="maximum tokens per text; longer ones are truncated"
    )
    parser.add_argument("--batch-size", type=int, help="most texts in a forward pass; default: 256")
    add_truncation(parser)
    parser.add_argument("--device", action="append", help="may be repeated: the texts are distributed over the devices")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")
    add_chunks(parser, "split each text into chunks")
    parser.add_argument("--ray", action="store_true", help="embed .jsonl or .parquet files at any URL on a Ray cluster")
    parser.add_argument("--workers", type=int, help="with --ray: number of copies of the model; default: 1")
    parser.add_argument("--gpus", type=float, help="with --ray: GPUs per copy; default: 0")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        help="with --ray: dtype of the vectors in the shards; default: float32",
    )


def run(arguments: Namespace) -> None:
    """Embed the texts in blocks, or on Ray."""
    options_of = COMMAND.parser()
    refuse_without(arguments, options_of, "chunk_tokens", "overlap")
    refuse_without(arguments, options_of, "ray", "workers", "gpus", "dtype")
    if arguments.ray:
        _run_on_ray(arguments)
    else:
        _run_here(arguments)


def _run_on_ray(arguments: Namespace) -> None:
    from python_model.rag.corpus import Recipe, embed_corpus

    if arguments.input is None or arguments.output is None:
        raise ValueError("--ray: expected --input and --output, got only one of them, or neither")
    for name in ("text", "json", "device", "truncate_dim", "batch_size"):  # each would be ignored
        given = getattr(arguments, name)
        if given is not None and given is not False:  # a 0 was given, too
            raise ValueError(f"--ray: expected no --{name.replace('_', '-')}, got it")
    workers = 1 if arguments.workers is None else arguments.workers
    recipe = Recipe(
        arguments.model,
        arguments.instruction,
        arguments.max_length,
        arguments.chunk_tokens,
        arguments.overlap,
        arguments.dtype or "float32",
    )
    with progress("embed", "shard") as update:
        result = embed_corpus(
            arguments.input, arguments.output, recipe, workers=workers, gpus=arguments.gpus or 0, progress=update
        )
    if result.done_before:
        print(f"{result.done_before} of {result.units} shards were there already", file=sys.stderr)
    print(f"{result.rows} vectors in {result.units} shards at {arguments.output}")
    if result.rows_now:
        speed = result.rows_now / result.seconds
        print(f"{speed:.1f} documents/s with {workers} workers; {result.outside:.1%} of their time outside of encode()")
    _tell_cut(result.cut, result.rows, arguments.max_length)


def _run_here(arguments: Namespace) -> None:
    from tqdm.auto import tqdm

    if not arguments.json and arguments.output is None:
        raise ValueError("output: expected --output FILE.npy or --json, got neither")
    refuse_both(arguments, "text", "input")
    documents = _documents(arguments)
    devices = arguments.device or [None]
    first = Namespace(model=arguments.model, device=devices[0], truncate_dim=arguments.truncate_dim)
    model = load(first, mode="embedding")
    documents, _ = chunks_of(arguments, model, documents)
    texts = [document.content for document in documents]
    prefix = model.formatter.embed_instruction(arguments.instruction)
    batch_size = 256 if arguments.batch_size is None else arguments.batch_size
    file = None
    if arguments.output is not None:
        file = ResumableArray(Path(arguments.output), len(texts), _key(model, texts, prefix, arguments.max_length))
    start = 0 if file is None or arguments.json else file.done
    if start:
        print(f"resuming after {start} of {len(texts)} texts", file=sys.stderr)
    block = BLOCK * len(devices)
    with tqdm(total=len(texts), initial=start, unit="text", disable=len(texts) <= batch_size) as bar:
        for place in range(start, len(texts), block):
            part = texts[place : place + block]
            vectors = model.encode(
                part,
                instruction=prefix,
                max_length=arguments.max_length,
                batch_size=batch_size,
                devices=devices if len(devices) > 1 else None,
                show_progress_bar=False,
            )
            if file is not None and place >= file.done:
                file.append(vectors)
            if arguments.json:
                for document, vector in zip(documents[place : place + block], vectors.tolist(), strict=True):
                    row = {**_described(document, chunked=bool(arguments.chunk_tokens)), "embedding": vector}
                    print(json.dumps(row, ensure_ascii=False), flush=True)
            bar.update(len(part))
    if file is not None:
        if arguments.chunk_tokens:
            _write_chunks(Path(arguments.output), documents)
        rows, size = file.finish()
        if not arguments.json:
            print(f"{rows} vectors of size {size} in {arguments.output}")
    _tell_cut(model.texts_cut, len(texts) - start, arguments.max_length)


def _described(document: Document, *, chunked: bool) -> dict[str, Any]:
    """What is printed or written beside a vector: the text, and which chunk it is."""
    if not chunked:
        return {"text": document.content}
    return {"key": document.key, "place": document.place, "text": document.content}


def _write_chunks(output: Path, documents: Sequence[Document]) -> None:
    """``NAME.jsonl`` beside ``NAME.npy``: the chunk of each row."""
    path = output.with_suffix(".jsonl")
    with new_file(path) as file:
        for document in documents:
            file.write(json.dumps(_described(document, chunked=True), ensure_ascii=False).encode() + b"\n")
    print(f"the chunks of the rows are in {path}", file=sys.stderr)


def _tell_cut(cut: int, texts: int, max_length: int) -> None:
    if cut:
        what = f"{cut} of {texts} texts are longer than --max-length {max_length} tokens"
        print(f"grit embed: {what}; their ends are ignored (--chunk-tokens splits them instead)", file=sys.stderr)


def _documents(arguments: Namespace) -> list[Document]:
    """The texts to embed; those that come without a name are numbered."""
    if arguments.input is not None:
        documents = documents_at("embed", arguments.input)
    else:
        lines = arguments.text or (line.rstrip("\n") for line in sys.stdin if line.strip())
        documents = [Document(f"text {number}", text) for number, text in enumerate(lines, 1)]
    if not documents:
        raise ValueError("texts: expected at least one, got none")
    return documents


COMMAND = Command("embed", "Embed texts, one per line of standard input.", configure, run)
