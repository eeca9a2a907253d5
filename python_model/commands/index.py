"""``grit index``: make, extend, search and shrink an index of documents."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from python_model.model.modeling import GritLM
from python_model.model.prompts import embed_instruction
from python_model.rag.answer import RAG, open_store
from python_model.rag.documents import chunk, read_documents
from python_model.rag.index import FORMATS, add_documents, open_index


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit index``."""
    parser = argparse.ArgumentParser(prog="grit index", description="Make, extend, search and shrink an index.")
    parser.add_argument("index", help="the index's folder")
    parser.add_argument("--model", default="smollm2-135m", help="checkpoint folder or name (default: the small model)")
    parser.add_argument("--add", action="append", default=[], help="jsonl or text file, or a folder; may be repeated")
    parser.add_argument("--delete", action="append", default=[], help="key of a document to remove; may be repeated")
    parser.add_argument("--search", help="a query")
    parser.add_argument("--instruction", default="", help="of the query")
    parser.add_argument("--k", type=int, default=5, help="documents to find (default: 5)")
    parser.add_argument(
        "--chunk-tokens", type=int, default=256, help="divide documents; 0 leaves them whole (default: 256)"
    )
    parser.add_argument("--overlap", type=int, default=0, help="tokens that neighbouring chunks share")
    parser.add_argument("--format", choices=FORMATS, help="of the vectors in a new index (default: float32)")
    parser.add_argument("--overwrite", action="store_true", help="replace documents whose key is there")
    parser.add_argument("--store", help="folder of a key-value store that keeps the documents' states as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    from python_model.corpora.small_model import resolve_model

    try:
        mode = "unified" if arguments.store else "embedding"
        model = GritLM(resolve_model(arguments.model), mode=mode)
        index = open_index(arguments.index, model, format=arguments.format, create=bool(arguments.add))
        # before the work: a store that another model made is refused
        store = open_store(arguments.store, model) if arguments.store else None
        documents = [document for path in arguments.add for document in read_documents(path)]
        if arguments.chunk_tokens:
            parts = [chunk(d, model.tokenizer, arguments.chunk_tokens, arguments.overlap) for d in documents]
            documents = [document for part in parts for document in part]
        if documents:
            add_documents(
                index,
                model,
                documents,
                overwrite=arguments.overwrite,
                progress=lambda done, total: print(f"embedded {done}/{total}", file=sys.stderr),
            )
            if store is not None:
                RAG(model, store=store).add_to_store(documents, overwrite=arguments.overwrite)
        if arguments.delete:
            index.delete(arguments.delete)
        result: dict[str, Any] = {"documents": len(index), "added": len(documents), "deleted": len(arguments.delete)}
        if arguments.search is not None:
            vector = model.encode([arguments.search], instruction=embed_instruction(arguments.instruction))
            hits = index.search(vector, arguments.k)[0]
            result["hits"] = [
                {"key": h.document.key, "score": h.score, "title": h.document.title, "text": h.document.text}
                for h in hits
            ]
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise SystemExit(f"grit index: {error}") from error
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(f"{result['documents']} documents in {arguments.index}")
    for hit in result.get("hits", []):
        print(f"{hit['score']:8.4f}  {hit['key']}  {hit['title']} {hit['text'][:80]}")


if __name__ == "__main__":
    main()
