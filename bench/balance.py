"""What limiting each objective's gradient does to a run, and what it costs.

    python -m bench.balance [--steps 40] [--repeats 7] [--record balance_cpu.json]
    python -m bench.balance --log unified-0=proof_output/unified-0/log.jsonl --record gradient_cosine_cpu.json

Runs of the demo's recipe (configs/demo.yaml), at the paper's temperature of .02, from the same base, without a limit and with
``objective_grad_norm`` 1: the norms of both gradients in each step. Then losses, gradients and clipping of one step are timed,
interleaved, on the last run's model:

* ``one sum``: both objectives accumulate into one gradient; their norms are unknown
* ``norms only``: each gradient is kept apart and measured, as in every run (``objective_grad_norm`` 0)
* ``limited``: each is clipped to the limit before they are added

With ``--log`` nothing is run: the record holds the cosine of both gradients in each step of runs that were limited to norm 1, as
their logs, or the norms in them, say.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml

from bench import common
from python_model.support.quiet import quiet
from python_model.train.balance import ObjectiveGradients, cosine
from python_model.train.config import TrainConfig
from python_model.train.distributed import Ranks
from python_model.train.step import plan_step
from python_model.train.trainer import Trainer

TIMED = ("one sum", "norms only", "limited")
NORMS = ("contrastive_grad_norm", "generative_grad_norm")


class _OneSum(ObjectiveGradients):
    """Leaves the gradients where they accumulate."""

    def take(self, weight: float = 1.0) -> float:
        return 0.0

    def add(self) -> list[float]:
        return []


def cosines(run: str, log: Iterable[str], limit: float) -> dict[str, Any]:
    """A row on the cosine of both gradients in each step of a run that limited each to ``limit``, from its ``log.jsonl``.

    Raises:
        ValueError: a step has no such cosine, as in a run of one objective.
    """
    found = []
    for record in map(json.loads, log):
        if "gradient_cosine" not in record:
            added = [min(norm, limit or norm) for norm in (record[name] or 0.0 for name in NORMS)]
            record["gradient_cosine"] = cosine(added, record["gradient_norm"])
        found.append(record["gradient_cosine"])
    if not found or None in found:
        raise ValueError(f"log: expected gradients of both objectives in each step, got others in that of {run}")
    values = np.array(found)
    low, high = np.quantile(values, [0.05, 0.95])
    return {
        "work": "cosine",
        "run": run,
        "steps": len(found),
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "within_tenth": float((abs(values) <= 0.1).mean()),
        "cosines": [round(value, 4) for value in found],
    }


def measure(config: TrainConfig, limit: float, repeats: int) -> list[dict[str, Any]]:
    """Rows of the norms without and with ``limit``, then of the times; writes into ``config.output_dir``."""
    rows: list[dict[str, Any]] = []
    for objective_grad_norm in (0.0, limit):
        optimizer = replace(config.optimizer, objective_grad_norm=objective_grad_norm)
        ranks = Ranks(0, 1, torch.device("cpu"))
        trainer = Trainer.from_config(replace(config, optimizer=optimizer), ranks)
        records = trainer.train()
        rows.append(
            {
                "work": "norms",
                "variant": "limited" if objective_grad_norm else "norms only",
                "steps": len(records),
                "limit": float(objective_grad_norm),
                "last_loss": float(records[-1]["loss"]),
                **{name: [float(record[name]) for record in records] for name in NORMS},
            }
        )
    (samples,) = trainer.stream.steps(0, 1)
    batch = plan_step(
        samples.queries, samples.passages, samples.conversations, None, config.batch, config.losses, trainer.ranks
    )

    def step(variant: str) -> None:
        kind = _OneSum if variant == "one sum" else ObjectiveGradients
        trainer.gradients.objective_grad_norm = limit if variant == "limited" else 0.0
        with mock.patch("python_model.train.step.ObjectiveGradients", kind):
            trainer.gradients(batch, seed=0)
        trainer.optimizers.clip()
        trainer.model.zero_grad(set_to_none=True)

    seconds = common.interleave({name: lambda name=name: step(name) for name in TIMED}, repeats, warmup=1)
    over, middle = common.ratios(seconds, "one sum"), common.medians(seconds)
    return rows + [
        {
            "work": "step",
            "variant": name,
            "time_over_first": over[name],
            "seconds": middle[name],
            "all_seconds": seconds[name],
            "tokens": batch.tokens,
        }
        for name in TIMED
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.balance", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=1.0)
    parser.add_argument(
        "--record", default="balance_cpu.json", help="JSON file, a bare name goes into bench/results/KIND"
    )
    parser.add_argument("--log", action="append", metavar="NAME=LOG", help="only read the logs of these runs")
    arguments = parser.parse_args(argv)
    quiet()
    if arguments.log:
        rows = []
        for name, _, file in (given.partition("=") for given in arguments.log):
            rows.append(cosines(name, Path(file).read_text(encoding="utf-8").splitlines(), arguments.limit))
        print(common.table(rows, ["run", "steps", "mean", "low", "high", "within_tenth"]))
        print(f"record: {common.write_records(arguments.record, rows)}")
        return
    recipe = yaml.safe_load((common.ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    recipe["data"]["train_data"] = str(common.ROOT / recipe["data"]["train_data"])
    with tempfile.TemporaryDirectory() as folder:
        recipe |= {"steps": arguments.steps, "output_dir": folder}
        recipe["losses"]["temperature"] = 0.02
        recipe["logging"] = {"resume": False, "save_steps": 0, "peak_tflops": 1.0}
        rows = measure(TrainConfig.from_dict(recipe), arguments.limit, arguments.repeats)
    timed = [row for row in rows if row["work"] == "step"]
    print(common.table(timed, ["variant", "time_over_first", "seconds"]))
    print(f"record: {common.write_records(arguments.record, rows)}")


if __name__ == "__main__":
    main()
