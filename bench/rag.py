"""Latency of answering from a document in each mode of the GRIT paper's table, over the lengths of its figure.

    python -m bench.rag --lengths 250 1000 4000 --record rag.json
    python -m bench.rag --shape mistral-7b --lengths 250 4000 --repeats 3 --dtype bfloat16     # random weights

Two samples: a 1-token question with a document of ``length`` tokens, and the reverse. Timed: embedding the question,
the search, loading or reading states, and 16 new tokens. Documents are stored beforehand; nothing is truncated. (The public
implementation truncates what it caches to 512 tokens, which flatters it at long lengths.)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from bench.common import interleave, medians, model_dtype, ratios, table, write_records
from bench.random_model import SHAPES, set_shape
from python_model.corpora.small_model import resolve_model
from python_model.model.modeling import GritLM
from python_model.rag.answer import RAG, open_store
from python_model.rag.index import add_documents, open_index
from python_model.rag.modes import MODES, Document
from python_model.support.quiet import quiet

BASE = "document_first"
"""What the others are compared with: plain retrieval."""


def text_of(model: GritLM, tokens: int) -> str:
    """A text of ``tokens`` tokens."""
    text = " the" * tokens
    while len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) > tokens:
        text = text[: -len(" the")]
    return text.strip()


def load(model: str, shape: str | None, dtype: str, folder: str) -> GritLM:
    """The checkpoint, or random weights of a larger shape with its tokenizer."""
    path = str(resolve_model(model))
    if shape is None:
        return GritLM(path, dtype=dtype)
    from transformers import AutoConfig, AutoTokenizer, MistralForCausalLM

    config = AutoConfig.from_pretrained(path)
    set_shape(config, shape)
    torch.set_default_dtype(getattr(torch, dtype))
    MistralForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return GritLM(folder, dtype=dtype)


def cell(model: GritLM, sample: str, length: int, modes: list[str], new: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one sample at one length."""
    question, content = text_of(model, 1), text_of(model, length)
    if sample == "long question":
        question, content = content, question
    limit = 2 * length + 1024
    with tempfile.TemporaryDirectory() as folder:
        document = Document("d", content)
        index = open_index(f"{folder}/index", model)
        add_documents(index, model, [document], max_length=limit)
        store = open_store(f"{folder}/store", model)
        rag = RAG(model, index=index, store=store, max_length=limit)
        rag.add_to_store([document])
        options = {"max_new_tokens": new, "min_new_tokens": new}

        def run(mode: str) -> Callable[[], Any]:
            return lambda: rag.answer(question, mode=mode, **options)

        seconds = interleave({mode: run(mode) for mode in modes}, repeats=repeats, warmup=1)
        answers = {mode: run(mode)() for mode in modes}
        ratio = ratios(seconds, BASE)
        store.close()
    middle = medians(seconds)
    return [
        {
            "sample": sample,
            "length": length,
            "variant": mode,
            "median_s": middle[mode],
            "spread_s": statistics.stdev(seconds[mode]) if repeats > 1 else 0.0,
            "of_plain_rag": ratio[mode],
            "cached": answers[mode].cached_tokens,
            "read": answers[mode].read_tokens,
            "seconds": seconds[mode],
        }
        for mode in modes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rag", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--dtype", default=model_dtype())
    parser.add_argument("--lengths", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000])
    parser.add_argument("--samples", nargs="+", default=["long document", "long question"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args()
    quiet()
    modes = list(dict.fromkeys([BASE, *arguments.modes]))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = load(arguments.model, arguments.shape, arguments.dtype, folder)
        for sample in arguments.samples:
            for length in arguments.lengths:
                found = cell(model, sample, length, modes, arguments.new, arguments.repeats)
                rows += [
                    {**row, "dtype": arguments.dtype, "shape": arguments.shape or arguments.model} for row in found
                ]
                columns = ["sample", "length", "variant", "median_s", "spread_s", "of_plain_rag", "cached", "read"]
                print(table(found, columns), flush=True)
                if arguments.record:  # after each cell: an interrupted run keeps its rows
                    write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
