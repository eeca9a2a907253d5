"""The demo's claim over several seeds (make demo-seeds).

    python -m bench.demo [--seeds 0 1 2] [--steps 60] [--bf16 | --no-bf16] [--record demo_seeds_cpu.json]

Runs `grit demo` once per seed, writes the record and reports whether the goal is met: mean nDCG@10 of at least .50 with every
seed above BM25, and a next-token loss at least .2 below the untrained model's. A seed whose results are already in its folder,
from the same recipe, is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import common
from python_model.commands import demo
from python_model.support.precision import computes_in_bfloat16
from python_model.support.quiet import quiet
from python_model.train.config import TrainConfig

MEAN_NDCG = 0.50
LOSS_DROP = 0.2
COLUMNS = ["variant", "seed", "ndcg_at_10", "mrr_at_10", "recall_at_10", "next_token_loss"]


def result(config: TrainConfig) -> dict[str, Any]:
    """The results of a seed's demo, run now or read from an earlier run of the same recipe."""
    file = Path(config.output_dir) / "results.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["config"] == json.loads(json.dumps(asdict(config))):
            return dict(found)
    return demo.run(config)


def rows_of(results: dict[int, dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """A record's rows: the untrained model and BM25, the same for every seed, then one row per seed, then their mean."""
    first = next(iter(results.values()))
    size = {"queries": first["before"]["queries"], "documents": first["before"]["documents"]}

    def row(variant: str, scores: dict[str, Any], **more: Any) -> dict[str, Any]:
        shown = {key: scores[key] for key in COLUMNS[2:] if key in scores}
        return {"variant": variant, **more, **shown, **size}

    trained = [row("trained", found["after"], seed=seed, steps=steps) for seed, found in results.items()]
    mean = {key: statistics.fmean(found[key] for found in trained) for key in COLUMNS[2:]}
    rows = [row("untrained", first["before"])]
    if first["bm25"]:
        rows.append(row("BM25, stemmed", first["bm25"]))
    return [*rows, *trained, row(f"mean of {len(trained)} seeds", mean, steps=steps)]


def shortfalls(results: dict[int, dict[str, Any]]) -> list[str]:
    """The parts of the goal that were not met."""
    found = []
    mean = statistics.fmean(result["after"]["ndcg_at_10"] for result in results.values())
    if mean < MEAN_NDCG:
        found.append(f"mean nDCG@10: expected at least {MEAN_NDCG}, got {mean:.3f}")
    for seed, result in results.items():
        ndcg, lexical = result["after"]["ndcg_at_10"], result["bm25"]
        if lexical and ndcg <= lexical["ndcg_at_10"]:
            found.append(f"seed {seed}: expected nDCG@10 above BM25's {lexical['ndcg_at_10']:.3f}, got {ndcg:.3f}")
        drop = result["before"]["next_token_loss"] - result["after"]["next_token_loss"]
        if drop < LOSS_DROP:
            found.append(f"seed {seed}: expected a next-token loss at least {LOSS_DROP} lower, got {drop:.3f}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=demo.STEPS)
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"))
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16; default: unless the CPU emulates its products",
    )
    parser.add_argument(
        "--record", default="demo_seeds_cpu.json", help="JSON file, a bare name goes into bench/results/KIND"
    )
    arguments = parser.parse_args(argv)
    quiet()
    bf16 = computes_in_bfloat16(arguments.bf16, torch.device("cpu"))
    dtype = "bfloat16" if bf16 else "float32"
    results = {
        seed: result(demo.demo_config(str(arguments.output_dir / f"{dtype}-{seed}"), arguments.steps, seed, bf16=bf16))
        for seed in arguments.seeds
    }
    rows = [{**row, "dtype": dtype} for row in rows_of(results, arguments.steps)]
    print(common.table(rows, COLUMNS))
    print(f"record: {common.write_records(arguments.record, rows)}")
    if missing := shortfalls(results):
        raise SystemExit("\n".join(missing))


if __name__ == "__main__":
    main()
