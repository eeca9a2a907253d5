"""``grit generate``: replies to one question, in a chat, or to a file of prompts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import (
    Command,
    add_json,
    add_model,
    load,
    path,
    progress,
    refuse_both,
    refuse_without,
    show,
)
from python_model.support.arguments import check_at_least

if TYPE_CHECKING:
    from python_model.model.modeling import GritLM


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit generate``."""
    from python_model.generate.text import FORMATS

    add_model(parser)
    parser.add_argument("--prompt", help="the question; without it, each line of standard input is a turn of a chat")
    parser.add_argument("--input", type=path, help='jsonl file of {"prompt": ..} or {"turns": [..]} rows to answer')
    parser.add_argument("--output", type=path, help="file for the replies to --input; an interrupted run resumes")
    parser.add_argument("--format", choices=FORMATS, default="grit", help="prompt format")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="maximum tokens of a reply")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens of this total probability"
    )
    parser.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="lower a token's logit by this for each time the reply has it",
    )
    parser.add_argument(
        "--presence-penalty", type=float, default=0.0, help="lower the logit of each token that the reply has by this"
    )
    parser.add_argument("--beams", type=int, default=1, help="number of beams of a beam search")
    parser.add_argument("--stop", action="append", default=[], help="string that ends the reply; may be repeated")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of --input per batch")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed")
    add_json(parser, "one JSON object per reply instead of streaming text")


def run(arguments: Namespace) -> None:
    """Generate the replies."""
    from python_model.generate.decode import Sampling
    from python_model.generate.text import answer_file

    if (arguments.input is None) != (arguments.output is None):
        raise ValueError("--input, --output: expected both or none, got one")
    refuse_both(arguments, "prompt", "input")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ValueError(f"--prompt: expected a non-empty text, got {arguments.prompt!r}")
    refuse_without(arguments, COMMAND.parser(), "temperature", "top_k", "top_p")
    check_at_least("--beams", arguments.beams, 1)
    model = load(arguments, mode="generative")
    options: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "sampling": Sampling(
            arguments.temperature,
            arguments.top_k,
            arguments.top_p,
            arguments.frequency_penalty,
            arguments.presence_penalty,
        ),
        "num_beams": arguments.beams,
        "stop": arguments.stop,
        "seed": arguments.seed,
        "format": arguments.format,
        "system": arguments.system,
    }
    if arguments.input is None:
        _chat(model, [arguments.prompt] if arguments.prompt is not None else sys.stdin, options, arguments.json)
        return
    with progress("answers", "row") as update:
        count = answer_file(
            model, arguments.input, arguments.output, batch_size=arguments.batch_size, progress=update, **options
        )
    result = {"answered": count, "output": str(arguments.output)}
    show(arguments, result, f"{count} rows answered in {arguments.output}")


def _chat(model: GritLM, lines: Any, options: dict[str, Any], as_json: bool) -> None:
    from python_model.generate.text import reply

    turns: list[str] = []
    streaming = not as_json and options["num_beams"] == 1
    for line in lines:
        if not line.strip():
            continue
        turns.append(line.strip())
        text = reply(model, turns, on_text=_print_piece if streaming else None, **options)
        turns.append(text)
        if as_json:
            row = {"turns": turns[:-1], "reply": text, "sampling": asdict(options["sampling"])}
            print(json.dumps(row, ensure_ascii=False))
        else:
            print("" if streaming else text, flush=True)


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


COMMAND = Command("generate", "Generate replies; they are streamed to the terminal.", configure, run)
