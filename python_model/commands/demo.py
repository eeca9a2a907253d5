"""``make demo``: the main job on a real small model, in minutes on a laptop CPU.

Trains SmolLM2-135M jointly (contrastive and next-token loss, one packed forward per step) on the bundled sample, then on rows
held out from training: retrieval and next-token loss before and after, a small search, an answer from a retrieved document.
Writes ``results.json``, ``loss.png``, ``log.jsonl`` and the trained checkpoint to the output folder.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_model.corpora.small_model import fetch_small_model
from python_model.data import sample_dir
from python_model.data.stream import open_stream
from python_model.evaluation.held_out import HeldOut, evaluate
from python_model.generate.text import rag_prompt, reply
from python_model.model.modeling import GritLM
from python_model.model.prompts import embed_instruction
from python_model.support.files import write_json
from python_model.train.config import TrainConfig
from python_model.train.plot import plot_losses
from python_model.train.trainer import Trainer

MAX_LENGTH = 192
ALLOWED_LOSS_INCREASE = 1.05
QUESTIONS = 3


def answer_questions(model: GritLM, sample: HeldOut, corpus: Tensor, count: int) -> list[dict[str, Any]]:
    """The first ``count`` held-out words: embed the query, take the best passage, let the same weights answer with it."""
    chosen = [row for row in sample.rows if row.dataset == "wordnet_definition"][:count]
    found = []
    with torch.autocast(model.device.type, torch.bfloat16):
        for row in chosen:
            instruction, text = row.query
            query = model.encode(
                text, instruction=embed_instruction(instruction), max_length=MAX_LENGTH, convert_to_tensor=True
            )
            best = int((corpus @ query).argmax())
            question = f'What does the word "{re.split(r", | [(]", text)[0]}" mean?'
            found.append(
                {
                    "query": text,
                    "retrieved": sample.documents[best],
                    "is_right": best == sample.place[str(row.key)],
                    "question": question,
                    "answer": reply(model, rag_prompt(question, sample.documents[best]), max_new_tokens=48),
                }
            )
    return found


def run(config: TrainConfig) -> dict[str, Any]:
    """The whole demo; returns what results.json holds."""
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    sample = HeldOut(sample_dir())
    model = GritLM(fetch_small_model(), attn=config.attn, is_inference=True, device="cpu", dtype="float32")
    print("measuring the untrained model on held-out rows ...", flush=True)
    before, _ = evaluate(model, sample, max_length=MAX_LENGTH)
    print(f"  nDCG@10 {before['ndcg_at_10']:.3f}   next-token loss {before['next_token_loss']:.3f}", flush=True)
    trainer = Trainer(model, config, open_stream(config, model.tokenizer))
    records = trainer.train()
    after, corpus = evaluate(model, sample, max_length=MAX_LENGTH)
    print(f"  nDCG@10 {after['ndcg_at_10']:.3f}   next-token loss {after['next_token_loss']:.3f}", flush=True)
    answers = answer_questions(model, sample, corpus, QUESTIONS)
    checkpoint = trainer.save()
    output = Path(config.output_dir)
    plot_losses(records, output / "loss.png")
    seconds = [record["seconds"] for record in records]
    results = {
        "before": before,
        "after": after,
        "retrieval_improved": after["ndcg_at_10"] > before["ndcg_at_10"],
        "next_token_loss_kept": after["next_token_loss"] <= ALLOWED_LOSS_INCREASE * before["next_token_loss"],
        "answers": answers,
        "config": asdict(config),
        "seconds": {"total": time.perf_counter() - start, "per_step_median": sorted(seconds)[len(seconds) // 2]},
        "tokens_per_second": sum(r["tokens"] for r in records) / sum(seconds),
        "checkpoint": str(checkpoint),
    }
    write_json(output / "results.json", results)
    return results


def demo_config(output_dir: str, steps: int = 40, seed: int = 0) -> TrainConfig:
    """The demo's recipe."""
    return TrainConfig(
        train_data=str(sample_dir() / "train"),
        output_dir=output_dir,
        steps=steps,
        seed=seed,
        query_max_len=MAX_LENGTH,
        passage_max_len=MAX_LENGTH,
        generative_max_len=MAX_LENGTH,
        resume=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit demo``."""
    parser = argparse.ArgumentParser(prog="grit demo", description="The main job on a real small model.")
    parser.add_argument("--output-dir", default="demo_output")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        results = run(demo_config(arguments.output_dir, arguments.steps, arguments.seed))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"grit demo: {error}") from error
    before, after = results["before"], results["after"]
    print(f"\n{'held-out rows':<18}{'before':>10}{'after':>10}")
    for name, key in (("nDCG@10", "ndcg_at_10"), ("MRR@10", "mrr_at_10"), ("recall@10", "recall_at_10")):
        print(f"{name:<18}{before[key]:>10.3f}{after[key]:>10.3f}")
    print(f"{'next-token loss':<18}{before['next_token_loss']:>10.3f}{after['next_token_loss']:>10.3f}")
    for answer in results["answers"]:
        verdict = "the right passage" if answer["is_right"] else "not the passage it should be"
        print(f"\nsearch     {answer['query']}\nretrieved  {answer['retrieved']}   ({verdict})")
        print(f"question   {answer['question']}\nanswer     {answer['answer']}")
    total, step = results["seconds"]["total"], results["seconds"]["per_step_median"]
    print(f"\n{total:.0f} s in all, {step:.2f} s per training step; everything is in {arguments.output_dir}/")
    if not results["retrieval_improved"]:
        raise SystemExit("grit demo: retrieval did not improve")
    if not results["next_token_loss_kept"]:
        raise SystemExit("grit demo: the next-token loss rose by more than 5 %")


if __name__ == "__main__":
    main()
