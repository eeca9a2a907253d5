"""The ``grit`` command: a table of subcommands, each a module with a ``COMMAND``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "doctor": ("python_model.commands.doctor", "print versions, the backends found and chosen, and why"),
    "fetch-model": (
        "python_model.commands.fetch_model",
        "get the small model (SmolLM2-135M as a Mistral checkpoint) into the cache",
    ),
    "demo": ("python_model.commands.demo", "train, embed, retrieve and generate on the small model in a few minutes"),
    "data": (
        "python_model.commands.data",
        "training and held-out data: of real text from packages, or of your own rows",
    ),
    "convert": (
        "python_model.commands.convert",
        "show what training reads in a file of any tool, and write it as rows",
    ),
    "mine": ("python_model.commands.mine", "mine hard negatives for rows, by BM25 or a model"),
    "train": ("python_model.commands.train", "train a model: contrastive and next-token loss together"),
    "ablation": ("python_model.commands.ablation", "train variants one after another, measure each, write one table"),
    "eval": (
        "python_model.commands.evaluate",
        "measure checkpoints on held-out data: retrieval, next-token loss, answers",
    ),
    "generate": ("python_model.commands.generate", "ask a model: one question, a chat, or a file of them"),
    "embed": ("python_model.commands.embed", "embed texts"),
    "index": ("python_model.commands.index", "make, extend and search an index of documents"),
    "rag": ("python_model.commands.rag", "answer questions from an index, with cached states of its documents"),
    "serve": ("python_model.commands.serve", "serve chat, embeddings, reranking and answers over HTTP"),
    "export": (
        "python_model.commands.export",
        "write the embedding side for sentence-transformers, vLLM or llama.cpp",
    ),
    "completion": ("python_model.commands.completion", "print a completion script for bash or zsh"),
    "rerank": ("python_model.commands.rerank", "order passages by their relevance to a query"),
}

FIRST_STEPS = """first steps:
  grit doctor                                                what runs here, and why
  grit demo                                                  train, embed, retrieve and generate on a small model
  grit train --data.train_data rows.jsonl --output_dir my_run    train on your rows
  grit embed --model my_run/checkpoint --text "a text" --json
  grit index INDEX --model my_run/checkpoint --add docs/ && grit rag INDEX --model my_run/checkpoint --question "..."

`grit COMMAND --help` explains one; `eval "$(grit completion bash)"` completes them."""


def usage() -> str:
    """The list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: grit COMMAND [options]\n\ncommands:\n" + "\n".join(lines) + f"\n\n{FIRST_STEPS}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise SystemExit(f"grit: there is no command {name!r}\n\n{usage()}")
    if not {"-h", "--help"} & set(rest):
        from python_model.support.quiet import quiet

        quiet()
    importlib.import_module(COMMANDS[name][0]).COMMAND(rest)


if __name__ == "__main__":
    main()
