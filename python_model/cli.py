"""The ``grit`` command: a table of subcommands, each a module with a ``COMMAND``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "doctor": ("python_model.commands.doctor", "print versions, the backends found, which are used, and why"),
    "fetch-model": (
        "python_model.commands.fetch_model",
        "download the small model (SmolLM2-135M-Instruct as a Mistral checkpoint) into the cache",
    ),
    "demo": ("python_model.commands.demo", "train, embed, retrieve and generate on the small model in a few minutes"),
    "data": (
        "python_model.commands.data",
        "build training and held-out data from real text in packages, or from your own rows",
    ),
    "convert": (
        "python_model.commands.convert",
        "show how training reads a file in any supported format, and convert it to rows",
    ),
    "mine": ("python_model.commands.mine", "mine hard negatives for rows, by BM25 or a model"),
    "train": ("python_model.commands.train", "train a model: contrastive and next-token loss together"),
    "ablation": ("python_model.commands.ablation", "train variants one after another, evaluate each, write one table"),
    "eval": (
        "python_model.commands.evaluate",
        "evaluate checkpoints on held-out data: retrieval, next-token loss, answers",
    ),
    "generate": (
        "python_model.commands.generate",
        "generate replies: to one question, in a chat, or for a file of prompts",
    ),
    "embed": ("python_model.commands.embed", "embed texts"),
    "index": ("python_model.commands.index", "create, update and search an index of documents"),
    "rerank": ("python_model.commands.rerank", "rank passages by their relevance to a query"),
    "rag": ("python_model.commands.rag", "answer questions from an index, using cached states of its documents"),
    "serve": ("python_model.commands.serve", "serve chat, embeddings, reranking and answers over HTTP"),
    "export": (
        "python_model.commands.export",
        "write the embedding side for sentence-transformers, vLLM or llama.cpp",
    ),
    "completion": ("python_model.commands.completion", "print a completion script for bash or zsh"),
}

FIRST_STEPS = """first steps:
  grit doctor                                                which backends this machine uses, and why
  grit demo                                                  train, embed, retrieve and generate on a small model
  grit train --data.train_data rows.jsonl --output_dir my_run    train on your rows
  grit embed --model my_run/checkpoint --text "a text" --json
  grit index INDEX --model my_run/checkpoint --add docs/ && grit rag INDEX --model my_run/checkpoint --question "..."

`grit COMMAND --help` explains a command; `eval "$(grit completion bash)"` enables completion."""


def usage() -> str:
    """The usage message with all subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: grit COMMAND [options]\n\ncommands:\n" + "\n".join(lines) + f"\n\n{FIRST_STEPS}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] in ("-V", "--version"):
        from grit_kernels._version import __version__

        print(f"grit_kernels {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise SystemExit(f"grit: unknown command {name!r}\n\n{usage()}")
    if not {"-h", "--help"} & set(rest):
        from python_model.support.quiet import quiet

        quiet()
    importlib.import_module(COMMANDS[name][0]).COMMAND(rest)


if __name__ == "__main__":
    main()
