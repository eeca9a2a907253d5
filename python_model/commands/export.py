"""``grit export``: a checkpoint's embedding side for sentence-transformers, vLLM or llama.cpp.

grit export ST --model my_run/checkpoint                          # SentenceTransformer("ST")
grit export VLLM --model my_run/checkpoint --for vllm
grit export HF --model my_run/checkpoint --for gguf               # then convert_hf_to_gguf.py HF
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, add_model, add_truncation, load, path
from python_model.support.files import make_folder

TARGETS = ("sentence-transformers", "vllm", "gguf")


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit export``."""
    parser.add_argument("folder", type=path, help="what to write; an earlier export in it is replaced")
    add_model(parser)
    parser.add_argument("--for", dest="target", choices=TARGETS, default=TARGETS[0], help="what will load the folder")
    add_truncation(parser)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of the longest text")
    parser.add_argument(
        "--packed", action="store_true", help="sentence-transformers: compute no padding; needs this package"
    )
    parser.add_argument(
        "--pool-instruction", action="store_true", help="vllm, gguf: accept vectors that pool the instruction as well"
    )


def check_replaceable(folder: Path, model: str) -> None:
    """ValueError for a folder with anything but an earlier export: it would be lost, and the model with it if it is there."""
    make_folder(folder.parent)
    if folder.exists() and folder == Path(model).resolve():
        raise ValueError(f"folder: expected another one than the model's, got {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "modules.json").exists():
        raise ValueError(
            f"folder: expected a new one or that of an earlier export, got {folder}, which holds other files"
        )


def run(arguments: Namespace) -> None:
    """Write the folder; print it, and how to serve it."""
    import torch

    target = arguments.target
    if arguments.packed and target != TARGETS[0]:
        raise ValueError(f"packed: expected with --for {TARGETS[0]}, got --for {target}")
    if arguments.pool_instruction and target == TARGETS[0]:
        raise ValueError(f"pool-instruction: expected with --for vllm or gguf, got --for {target}")
    check_replaceable(arguments.folder.resolve(), arguments.model)
    # in the dtype of the checkpoint's files: an export must not change a weight
    model = load(arguments, dtype="auto")
    if target == TARGETS[0]:
        from python_model.model.export import export_sentence_transformers

        with torch.no_grad():
            folder = export_sentence_transformers(
                model, arguments.folder, max_length=arguments.max_length, packed=arguments.packed
            )
        print(folder)
        limit = f"truncates texts to --max-length {arguments.max_length} tokens and does not say so"
        print(f"grit export: sentence-transformers {limit}", file=sys.stderr)
        return
    from python_model.model.server_export import commands, export_for_server

    options = {"max_length": arguments.max_length, "pool_instruction": arguments.pool_instruction}
    folder = export_for_server(model, arguments.folder, target, **options)
    print("\n".join([str(folder), *commands(model, folder, target, arguments.max_length)]))


COMMAND = Command(
    "export", "Write a checkpoint's embedding side for sentence-transformers, vLLM or llama.cpp.", configure, run
)
