"""One model for both jobs against two specialists on the same budget, on held-out rows (make proof).

    python -m bench.proof --data DATA [--config configs/proof.yaml] [--output proof_output] [--only unified-0] [--table]

The runs are unified, embedding-only and generative-only per seed, and the specialists with twice the steps. All
start from the same base with the same settings, hence the same rows, tokens per objective and clipping. Each is measured on both
jobs at the end, and the base model and BM25 on the same rows. Each run writes its record with the scores of every query to
``bench/results/proof/NAME.json`` as soon as it ends, and a run that has a record is not run again; once the records are
committed, the checkpoints are not needed. An interrupted run resumes where it stopped. At the end (or with ``--table``) the
records become ``table.md`` and ``proof.png``.

DATA is a folder built by `grit data`; the plan is in configs/proof.yaml, and one of a third of its size in
configs/proof_short.yaml, whose records go into a folder of that name.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from bench import common
from bench.proof_table import mean_losses, plot, table
from python_model.corpora.small_model import resolve_model
from python_model.evaluation.answers import match, read_questions
from python_model.evaluation.held_out import HeldOut
from python_model.evaluation.language import conversation_losses
from python_model.evaluation.lexical import bm25_ranks
from python_model.evaluation.retrieval import embed_documents, retrieval_ranks
from python_model.generate.text import replies
from python_model.model.modeling import GritLM
from python_model.support.files import write_json, write_text
from python_model.support.precision import computing
from python_model.support.quiet import quiet
from python_model.train.config import TrainConfig, flatten
from python_model.train.distributed import Ranks
from python_model.train.trainer import Interrupted, Trainer


@dataclass(frozen=True)
class Plan:
    """What configs/proof.yaml says."""

    base: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    double_seeds: list[int] = field(default_factory=lambda: [0])
    max_length: int = 128
    queries: int = 4000
    curve_queries: int = 500
    curve_passages: int = 1000
    conversations: int = 600
    questions: int = 200
    curve: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])

    def runs(self) -> list[Run]:
        """All runs, the most informative first."""
        modes = ("unified", "embedding", "generative")
        single = [Run(f"{mode}-{seed}", mode, seed, 1) for seed in self.seeds for mode in modes]
        return single + [
            Run(f"{mode}-double-{seed}", mode, seed, 2) for seed in self.double_seeds for mode in modes[1:]
        ]


@dataclass(frozen=True)
class Run:
    """One training: its name, mode, seed, and steps as a multiple of the plan's."""

    name: str
    mode: str
    seed: int
    times: int

    def config(self, plan: Plan, data: Path, output: Path) -> TrainConfig:
        """Its settings: those of the plan, which override those that ``grit data`` wrote."""
        written = (
            yaml.safe_load((data / "train.yaml").read_text(encoding="utf-8")) if (data / "train.yaml").exists() else {}
        )
        values = {**flatten(written), **flatten(plan.base)}
        own = {"mode": self.mode, "seed": self.seed, "steps": self.times * values.get("steps", 40)}
        return TrainConfig.from_dict(
            {**values, **own, "data.train_data": str(data / "train"), "output_dir": str(output / self.name)}
        )


class Measure:
    """The held-out rows of a plan, chosen by a fixed seed: the same for every run."""

    def __init__(self, plan: Plan, data: Path) -> None:
        self.plan, self.held_out = plan, HeldOut(data)
        self.queries = _choice(len(self.held_out.rows), plan.queries)
        self.curve_queries = self.queries[: plan.curve_queries]
        self.curve_passages = self._passages(self.curve_queries, plan.curve_passages)
        self.conversations = [
            self.held_out.conversations[i] for i in _choice(len(self.held_out.conversations), plan.conversations)
        ]
        file = data / "test" / "questions.jsonl"
        questions = read_questions(file) if file.exists() else []
        self.questions = [questions[i] for i in _choice(len(questions), plan.questions)]

    def _passages(self, queries: Sequence[int], wanted: int) -> list[int]:
        """At least so many documents (as far as there are): those that answer the queries, and others by lot."""
        answers = {i for query in queries for i in (self.held_out.relevant[query], *self.held_out.also_relevant[query])}
        others = [i for i in _choice(len(self.held_out.documents), len(self.held_out.documents)) if i not in answers]
        return sorted(answers) + others[: max(0, wanted - len(answers))]

    @torch.no_grad()
    def ranks(self, model: GritLM, queries: Sequence[int], passages: Sequence[int] | None = None) -> list[int]:
        """Rank of each chosen query's passage among ``passages``, by default all of them."""
        held_out, length = self.held_out, self.plan.max_length
        if passages is None:
            passages = range(len(held_out.documents))
        place = {document: index for index, document in enumerate(passages)}
        with computing(model.device):
            corpus = embed_documents(model, [held_out.documents[i] for i in passages], max_length=length)
            found = retrieval_ranks(
                model,
                [held_out.queries[i] for i in queries],
                corpus,
                [place[held_out.relevant[i]] for i in queries],
                also_relevant=[[place[other] for other in held_out.also_relevant[i]] for i in queries],
                max_length=length,
            )
        return [int(rank) for rank in found]

    @torch.no_grad()
    def losses(self, model: GritLM) -> dict[str, list[tuple[float, int]]]:
        """By data set: the next-token losses of each conversation, summed over its reply tokens, and their number."""
        with computing(model.device):
            found = {
                name: conversation_losses(
                    model, [row for row in self.conversations if row.dataset == name], max_length=self.plan.max_length
                )
                for name in dict.fromkeys(row.dataset for row in self.conversations)
            }
        return {name: rows for name, rows in found.items() if rows}

    def everything(self, model: GritLM) -> dict[str, Any]:
        """What a record holds about a model: ranks per query, losses per conversation, matches per question."""
        model.eval()
        found: dict[str, Any] = {"ranks": self.ranks(model, self.queries), "conversation_losses": self.losses(model)}
        if self.questions:
            with torch.no_grad(), computing(model.device):
                texts = replies(model, [[q.question] for q in self.questions], max_new_tokens=24)
            found["matches"] = [match(t, q.answers) for t, q in zip(texts, self.questions, strict=True)]
        return found

    def described(self) -> dict[str, Any]:
        """What all records of a table must share."""
        names = [self.held_out.rows[i].dataset for i in self.queries]
        return {
            "sets": names,
            "documents": len(self.held_out.documents),
            "conversations": len(self.conversations),
            "max_length": self.plan.max_length,
        }


def _choice(count: int, wanted: int) -> list[int]:
    order = list(range(count))
    random.Random(0).shuffle(order)
    return order[:wanted]


def for_both_jobs(model: GritLM, config: TrainConfig) -> GritLM:
    """A specialist's weights in a model that also does the job it was not trained for.

    An embedding specialist has no language-model head: it gets that of the model it started from, or where that is tied to the
    input embeddings, its own embeddings.
    """
    if model.mode == "unified":
        return model
    whole = GritLM(resolve_model(config.model.name), dtype="float32", device=model.device, **config.settings_given)
    part = whole.decoder[0] if model.mode == "embedding" else whole.model
    part.load_state_dict((model.decoder[0] if model.mode == "embedding" else model.model).state_dict())
    return whole


def run_one(run: Run, plan: Plan, measure: Measure, data: Path, output: Path) -> dict[str, Any]:
    """Train (or resume), measuring at the points of the curve and at the end; returns the record."""
    config = run.config(plan, data, output)
    trainer = Trainer.from_config(config, Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    model = trainer.grit
    file = Path(config.output_dir) / "curve.json"
    curve: dict[str, Any] = json.loads(file.read_text()) if file.exists() and trainer.checkpointer.latest() else {}

    def point(done: int) -> None:
        shares = [share for share in plan.curve if round(share * config.steps) == done]
        if not shares or str(done) in curve:
            return
        model.eval()
        found: dict[str, Any] = {"share": shares[0]}
        if run.mode != "generative":
            found["ranks"] = measure.ranks(model, measure.curve_queries, measure.curve_passages)
        if run.mode != "embedding":
            found["losses"] = mean_losses(measure.losses(model))
        curve[str(done)] = found
        write_json(file, curve)

    trainer.after_step = point
    log = trainer.train()
    return {
        "name": run.name,
        "mode": run.mode,
        "seed": run.seed,
        "steps": config.steps,
        "config": _settings(config.to_dict()),
        "measured_on": measure.described(),
        **measure.everything(for_both_jobs(model, config)),
        "curve": curve,
        "log": [
            {key: r[key] for key in ("step", "contrastive_loss", "generative_loss", "tokens", "seconds")}
            | {key: r[key] for key in ("contrastive_grad_norm", "generative_grad_norm")}
            for r in log
        ],
    }


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, without where its data and states were."""
    del settings["output_dir"], settings["data"]["train_data"]
    return settings


def write_record(path: Path, record: dict[str, Any]) -> None:
    """JSON with a line per entry: thousands of ranks are no lines to read."""
    write_text(
        path, "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()) + "\n}\n"
    )


def baseline(plan: Plan, measure: Measure, data: Path, output: Path) -> dict[str, Any]:
    """The record of the model that the runs start from."""
    config = Run("base", "unified", 0, 1).config(plan, data, output)
    model = GritLM(resolve_model(config.model.name), dtype="float32", **config.settings_given)
    return {"name": "base", "mode": "unified", "seed": 0, "steps": 0, "measured_on": measure.described()} | (
        measure.everything(model)
    )


def lexical(measure: Measure) -> dict[str, Any]:
    """BM25 with stemming on the same queries."""
    held_out, chosen = measure.held_out, measure.queries
    ranks = bm25_ranks(
        [held_out.queries[i][1] for i in chosen], held_out.documents, [held_out.relevant[i] for i in chosen]
    )
    record = {"name": "BM25", "mode": "embedding", "seed": 0, "steps": 0, "measured_on": measure.described()}
    return record | {"ranks": [int(rank) for rank in ranks]}


def read_plan(path: Path) -> Plan:
    """The plan of a YAML file.

    Raises:
        ValueError: an unknown entry or setting.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        plan = Plan(**content)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
    flatten(plan.base)
    return plan


def records(folder: Path) -> list[dict[str, Any]]:
    """Those that are there."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=common.ROOT / "configs" / "proof.yaml")
    parser.add_argument("--data", type=Path, help="folder built by `grit data`")
    parser.add_argument("--output", type=Path, default=Path("proof_output"), help="states of the runs")
    parser.add_argument("--records", type=Path, help="where records, table and plot go: bench/results/NAME-OF-CONFIG")
    parser.add_argument(
        "--only", action="append", help="these runs (unified-0, embedding-double-0, base, BM25); default: all"
    )
    parser.add_argument("--table", action="store_true", help="only rewrite table and plot from the records")
    arguments = parser.parse_args(argv)
    quiet()
    plan = read_plan(arguments.config)
    if arguments.records is None:
        arguments.records = common.RESULTS / arguments.config.stem
    if not arguments.table:
        if arguments.data is None:
            parser.error("--data: expected a folder built by `grit data`")
        measure = Measure(plan, arguments.data)
        tasks: dict[str, Callable[[], dict[str, Any]]] = {
            "BM25": lambda: lexical(measure),
            "base": lambda: baseline(plan, measure, arguments.data, arguments.output),
        }
        for run in plan.runs():
            tasks[run.name] = lambda run=run: run_one(run, plan, measure, arguments.data, arguments.output)  # type: ignore[misc]
        if unknown := set(arguments.only or ()) - set(tasks):
            parser.error(f"--only: expected names out of {list(tasks)}, got {sorted(unknown)}")
        for name in arguments.only or tasks:
            file = arguments.records / f"{name}.json"
            if file.exists():
                if json.loads(file.read_text())["measured_on"] != measure.described():
                    parser.error(f"{file}: expected a record of this plan and data, got another; move it away")
                continue
            print(f"proof: {name}", flush=True)
            try:
                record = tasks[name]()
            except Interrupted as reason:
                print(f"proof: {reason}", file=sys.stderr)
                raise SystemExit(143) from None
            write_record(file, {"machine": common.machine(), **record})
    found = records(arguments.records)
    write_text(arguments.records / "table.md", table(found))
    plot(found, arguments.records / "proof.png")
    print((arguments.records / "table.md").read_text())


if __name__ == "__main__":
    main()
