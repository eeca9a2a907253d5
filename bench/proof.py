"""Unified training against two specialists of the same length and the base model, on held-out rows (make proof).

    python -m bench.proof [--config configs/ablations/proof.yaml] [--steps N] [--data DATA] [--record proof_cpu.json]

DATA is a folder that `grit data` built (default: the bundled sample). Trains what has not been trained (an interrupted run goes
on), measures retrieval and next-token loss, writes the record that docs/benchmarks.md shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from bench import common
from python_model.train.ablation import COLUMNS, read_ablation, run, table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=common.ROOT / "configs" / "ablations" / "proof.yaml")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--data", type=Path, help="folder built by `grit data` (default: the bundled sample)")
    parser.add_argument("--record", default="proof_cpu.json", help="file in bench/results")
    arguments = parser.parse_args(argv)
    changes = {} if arguments.steps is None else {"steps": arguments.steps}
    if arguments.data is not None:
        settings = yaml.safe_load((arguments.data / "train.yaml").read_text(encoding="utf-8"))
        changes |= {**settings, "train_data": str(arguments.data / "train")}
    ablation = read_ablation(arguments.config, **changes)
    if arguments.data is not None:
        own_folder = f"{ablation.output_dir}-{arguments.data.name}"
        ablation = replace(ablation, evaluation=str(arguments.data), output_dir=own_folder)
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
