"""Unified training against two specialists of the same length and the base model, on held-out rows (make proof).

    python -m bench.proof [--config configs/ablations/proof.yaml] [--steps N] [--train-data DATA] [--record proof_cpu.json]

Trains what has not been trained (an interrupted run goes on), measures retrieval and next-token loss, writes the record that
docs/benchmarks.md shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import common
from python_model.ablation import COLUMNS, read_ablation, run, table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=common.ROOT / "configs" / "ablations" / "proof.yaml")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--train-data")
    parser.add_argument("--record", default="proof_cpu.json", help="file in bench/results")
    arguments = parser.parse_args(argv)
    changes = {"steps": arguments.steps, "train_data": arguments.train_data}
    ablation = read_ablation(arguments.config, **{k: v for k, v in changes.items() if v is not None})
    rows = run(ablation)
    print(table(rows))
    records = [
        {"variant": row["variant"], **{name: row["scores"][name] for name in COLUMNS}, "steps": row["steps"]}
        | {"queries": row["scores"]["queries"], "documents": row["scores"]["documents"]}
        for row in rows
    ]
    print(f"record: {common.write_records(arguments.record, records)}")


if __name__ == "__main__":
    main()
