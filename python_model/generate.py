"""``python -m python_model.generate``: ask a model, in the GRIT format, streaming to the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from python_model.modeling import GritLM
from python_model.prompts import chat_prompt

ANSWER_PREFIX = "The answer is"


def rag_prompt(question: str, document: str) -> list[str]:
    """One user turn that shows a document before the question (the paper's document-first retrieval prompt)."""
    return [f"{document}\n\n{question}\n\nAnswer the prior query while optionally using the context prior to it"]


@torch.no_grad()
def reply(
    model: GritLM,
    turns: Sequence[str],
    *,
    prefix: str = "",
    max_new_tokens: int = 128,
    streamer: Any = None,
    **options: Any,
) -> str:
    """The assistant's next turn. ``turns`` alternates user, assistant, .., user; ``prefix`` starts the reply.

    ``options`` go to transformers' ``generate`` (default: greedy).
    """
    tokenizer = model.tokenizer
    text = chat_prompt(turns) + prefix
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    prompt = torch.tensor([ids], device=model.device)
    options.setdefault("do_sample", False)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **options,
    )
    return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)).strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit generate``."""
    parser = argparse.ArgumentParser(
        prog="grit generate", description="Ask a model; the reply streams to the terminal."
    )
    parser.add_argument("--model", default="smollm2-135m", help="checkpoint folder or name (default: the small model)")
    parser.add_argument("--prompt", help="the question; without it each line of standard input is one turn of a chat")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    arguments = parser.parse_args(argv)
    from transformers import TextStreamer

    from python_model.small_model import resolve_model

    try:
        model = GritLM(resolve_model(arguments.model), mode="generative")
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"grit generate: {error}") from error
    torch.manual_seed(arguments.seed)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.temperature > 0:
        options |= {"do_sample": True, "temperature": arguments.temperature}
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    turns: list[str] = []
    for line in [arguments.prompt] if arguments.prompt is not None else sys.stdin:
        if not line.strip():
            continue
        turns.append(line.strip())
        turns.append(reply(model, turns, streamer=streamer, **options))


if __name__ == "__main__":
    main()
