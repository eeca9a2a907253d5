"""``grit index``: make, extend, search and shrink an index of documents."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, add_json, add_model, load, progress, show


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit index``."""
    from python_model.rag.index import FORMATS

    parser.add_argument("index", help="the index's folder")
    add_model(parser)
    parser.add_argument("--add", action="append", default=[], help="jsonl or text file, or a folder; may be repeated")
    parser.add_argument("--delete", action="append", default=[], help="key of a document to remove; may be repeated")
    parser.add_argument("--search", help="a query")
    parser.add_argument("--instruction", default="", help="of the query")
    parser.add_argument("--k", type=int, default=5, help="documents to find")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="divide documents; 0 leaves them whole")
    parser.add_argument("--overlap", type=int, default=0, help="tokens that neighbouring chunks share")
    parser.add_argument("--format", choices=FORMATS, help="of the vectors in a new index; float32 unless given")
    parser.add_argument("--overwrite", action="store_true", help="replace documents whose key is there")
    parser.add_argument("--store", help="folder of a key-value store that keeps the documents' states as well")
    add_json(parser)


def run(arguments: Namespace) -> None:
    """Add, delete, search."""
    from python_model.rag.answer import RAG, open_store
    from python_model.rag.documents import chunk, read_documents
    from python_model.rag.index import add_documents, open_index

    model = load(arguments, mode="unified" if arguments.store else "embedding")
    index = open_index(arguments.index, model, format=arguments.format, create=bool(arguments.add))
    # before the work: a store that another model made is refused
    store = open_store(arguments.store, model) if arguments.store else None
    documents = [document for path in arguments.add for document in read_documents(path)]
    if arguments.chunk_tokens:
        parts = [chunk(d, model.tokenizer, arguments.chunk_tokens, arguments.overlap) for d in documents]
        documents = [document for part in parts for document in part]
    if documents:
        with progress("embed", "document") as update:
            add_documents(index, model, documents, overwrite=arguments.overwrite, progress=update)
        if store is not None:
            RAG(model, store=store).add_to_store(documents, overwrite=arguments.overwrite)
    if arguments.delete:
        index.delete(arguments.delete)
    result: dict[str, Any] = {"documents": len(index), "added": len(documents), "deleted": len(arguments.delete)}
    if arguments.search is not None:
        vector = model.encode([arguments.search], instruction=model.formatter.embed_instruction(arguments.instruction))
        hits = index.search(vector, arguments.k)[0]
        result["hits"] = [
            {"key": h.document.key, "score": h.score, "title": h.document.title, "text": h.document.text} for h in hits
        ]
    lines = [f"{result['documents']} documents in {arguments.index}"]
    for hit in result.get("hits", []):
        lines.append(f"{hit['score']:8.4f}  {hit['key']}  {hit['title']} {hit['text'][:80]}")
    show(arguments, result, "\n".join(lines))


COMMAND = Command("index", "Make, extend, search and shrink an index.", configure, run)
