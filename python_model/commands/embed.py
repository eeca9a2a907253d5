"""``grit embed``: vectors of texts, to a file or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from python_model.model.modeling import GritLM
from python_model.model.prompts import embed_instruction
from python_model.support.files import new_file


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit embed``."""
    parser = argparse.ArgumentParser(prog="grit embed", description="Embed texts, one per line of standard input.")
    parser.add_argument("--model", default="smollm2-135m", help="checkpoint folder or name (default: the small model)")
    parser.add_argument("--text", action="append", help="a text to embed, instead of standard input; may be repeated")
    parser.add_argument("--input", type=Path, help="jsonl or text file, or a folder of documents, instead")
    parser.add_argument("--instruction", default="", help="what the embedding is for, e.g. 'Find the answer'")
    parser.add_argument("--output", type=Path, help=".npy file for the vectors (texts, size)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text; the rest is cut (default: 512)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", action="append", help="may be repeated: the texts are shared among the devices")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")
    arguments = parser.parse_args(argv)
    import numpy as np

    from python_model.corpora.small_model import resolve_model
    from python_model.rag.documents import read_documents

    if not arguments.json and arguments.output is None:
        parser.error("give --output FILE.npy or --json")
    try:
        if arguments.text is not None:
            texts = list(arguments.text)
        elif arguments.input is not None:
            texts = [document.content for document in read_documents(arguments.input)]
        else:
            texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        devices = arguments.device
        model = GritLM(resolve_model(arguments.model), mode="embedding", device=devices[0] if devices else None)
        vectors = model.encode(
            texts,
            instruction=embed_instruction(arguments.instruction),
            max_length=arguments.max_length,
            batch_size=arguments.batch_size,
            devices=devices if devices and len(devices) > 1 else None,
        )
        if arguments.output is not None:
            with new_file(arguments.output) as file:
                np.save(file, vectors)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"grit embed: {error}") from error
    if arguments.json:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            print(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False))
    else:
        print(f"{len(vectors)} vectors of size {vectors.shape[1]} in {arguments.output}")


if __name__ == "__main__":
    main()
