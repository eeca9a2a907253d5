"""The proof: a tiny plan starts, goes on, and tabulates; the intervals are those of a paired bootstrap."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bench import proof
from bench.proof_table import mean_losses, ndcg, relative_difference, relative_loss_difference, table
from python_model import GritLM
from python_model.evaluation.retrieval import embed_documents, embed_queries
from python_model.train import TrainConfig
from tests.conftest import needs_source_tree
from tests.python_model.conftest import checkpoint, tokenizer  # noqa: F401  (fixtures)

WORDS = ("river", "city", "code", "word", "capital", "France", "space", "line")


def _data(folder: Path) -> Path:
    rows = [
        {"query": ["Find", f"where is {word}"], "pos": [["", f"{word} is here"]], "neg": [["", "nothing"]], "key": word}
        for word in WORDS
    ]
    talks = [{"text": [f"say {word}", f"{word} it is"]} for word in WORDS]
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        (folder / part / "embedding.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / part / "generative.jsonl").write_text("".join(json.dumps(r) + "\n" for r in talks))
    questions = [{"question": f"say {word}", "answers": [word]} for word in WORDS]
    (folder / "test" / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"key": r["key"], "text": r["pos"][0][1]}) + "\n" for r in rows)
    )
    return folder


def _plan(folder: Path, model: Path) -> Path:
    base = {
        "steps": 4,
        "model": {"name": str(model), "bf16": False},
        "batch": {"embedding_batch_size": 4, "generative_batch_size": 2},
        "logging": {"save_steps": 1},
    }
    plan = {"seeds": [0], "double_seeds": [0], "max_length": 64, "queries": 6, "curve_queries": 3, "curve_passages": 4}
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump({**plan, "base": base}))
    return file


def test_a_tiny_plan_runs_goes_on_and_tabulates(
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("bm25s")
    arguments = ["--config", str(_plan(tmp_path, checkpoint)), "--data", str(_data(tmp_path / "data"))]
    arguments += ["--output", str(tmp_path / "out"), "--records", str(tmp_path / "records")]
    searched: list[tuple[int, int | None]] = []
    ranks_of = proof.Measure.ranks

    def noted(
        measure: proof.Measure, model: GritLM, queries: list[int], passages: list[int] | None = None
    ) -> list[int]:
        searched.append((len(queries), passages and len(passages)))
        return ranks_of(measure, model, queries, passages)

    with monkeypatch.context() as patch:
        patch.setattr(proof.Measure, "ranks", noted)
        proof.main([*arguments, "--only", "unified-0", "--only", "base"])
    assert searched == [(3, 4)] * 4 + [(6, None)] * 2  # the points of the curve, then both ends
    assert {p.stem for p in (tmp_path / "records").glob("*.json")} == {"unified-0", "base"}
    # the record is what counts: a run that has one is not run again
    trained: list[str] = []
    run_one = proof.run_one
    monkeypatch.setattr(proof, "run_one", lambda run, *rest: trained.append(run.name) or run_one(run, *rest))
    proof.main(arguments)
    assert trained == ["embedding-0", "generative-0", "embedding-double-0", "generative-double-0"]
    for path in (tmp_path / "records").glob("*.json"):  # where data and states lay is nobody else's business
        assert not any(str(tmp_path / folder) in path.read_text() for folder in ("out", "data"))
    records = {record["name"]: record for record in proof.records(tmp_path / "records")}
    assert len(records["unified-0"]["ranks"]) == 6 and len(records["unified-0"]["matches"]) == 8
    assert sorted(map(int, records["unified-0"]["curve"])) == [1, 2, 3, 4]
    ranks = records["unified-0"]["curve"]["2"]["ranks"]
    assert len(ranks) == 3 and max(ranks) <= 4  # among few passages
    losses = records["unified-0"]["conversation_losses"]
    assert sum(map(len, losses.values())) == 8 and all(
        total > 0 < count for rows in losses.values() for total, count in rows
    )
    for name in ("embedding-0", "generative-0"):  # each does the other job as well, without having been trained for it
        assert len(records[name]["ranks"]) == 6 and len(records[name]["matches"]) == 8
        assert records[name]["conversation_losses"].keys() == losses.keys()
    assert records["embedding-double-0"]["steps"] == 8
    # specialists learn from the unified model's own rows: the same number of tokens over both objectives
    steps = zip(*(records[f"{mode}-0"]["log"] for mode in ("unified", "embedding", "generative")), strict=True)
    assert all(both["tokens"] == one["tokens"] + other["tokens"] for both, one, other in steps)
    assert all(r["contrastive_grad_norm"] and r["generative_grad_norm"] for r in records["unified-0"]["log"])
    written = (tmp_path / "records" / "table.md").read_text()
    assert "| BM25 | 0 |" in written and "| base | 0 |" in written and "| all | 6 |" in written
    assert "against the generative specialist of the same steps" in written and "| all | 8 |" in written
    assert (tmp_path / "records" / "proof.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit):
        proof.main([*arguments, "--only", "no-such-run"])


def test_the_curve_searches_the_answers_and_other_passages(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    plan = proof.Plan({}, queries=6, curve_queries=3, curve_passages=5)
    data = _data(tmp_path / "data")
    first = proof.Measure(plan, data).queries[0]
    with (data / "corpus.jsonl").open("a") as corpus:  # what answers the first query once more, as passage 8
        corpus.write(json.dumps({"key": "again", "text": f"{WORDS[first]} is here"}) + "\n")
    measure = proof.Measure(plan, data)
    held_out, chosen, queries = measure.held_out, measure.curve_passages, measure.curve_queries
    answers = {8, *(held_out.relevant[i] for i in queries)}
    assert answers <= set(chosen) and len(chosen) == len(set(chosen)) == 5 < len(held_out.documents)
    for wanted, count in ((1, 4), (99, len(held_out.documents))):
        assert len(proof.Measure(replace(plan, curve_passages=wanted), data).curve_passages) == count
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        vectors = embed_documents(model, held_out.documents, max_length=plan.max_length).float()
        asked = embed_queries(model, [held_out.queries[i] for i in queries], max_length=plan.max_length).float()
    scores = asked @ vectors.T
    scores[0, 8] = -torch.inf
    better = scores > scores.gather(1, torch.tensor([[held_out.relevant[i]] for i in queries]))
    assert measure.ranks(model, queries) == [1 + int(row.sum()) for row in better]
    assert measure.ranks(model, queries, chosen) == [1 + int(row[chosen].sum()) for row in better]


@pytest.mark.parametrize("mode", ["embedding", "generative"])
def test_a_specialist_does_both_jobs_with_the_weights_it_was_trained_to(checkpoint: Path, mode: str) -> None:  # noqa: F811
    config = TrainConfig.from_dict({"model.name": str(checkpoint), "dry_run": True})
    specialist = GritLM(checkpoint, mode=mode, device="cpu", dtype="float32")
    with torch.no_grad():
        for weight in specialist.model.parameters():
            weight.mul_(1.5)
    whole = proof.for_both_jobs(specialist, config)
    assert whole.mode == "unified" and proof.for_both_jobs(whole, config) is whole
    trained, untrained = dict(specialist.decoder[0].named_parameters()), GritLM(checkpoint, device="cpu").decoder[0]
    for (name, weight), before in zip(whole.decoder[0].named_parameters(), untrained.parameters(), strict=True):
        assert torch.equal(weight, trained[name]) and not torch.equal(weight, before), name
    assert torch.equal(whole.model.get_output_embeddings().weight, trained["embed_tokens.weight"])


def test_intervals_are_of_the_paired_relative_difference() -> None:
    draw = np.random.default_rng(1)
    theirs = draw.random(400)
    point, low, high = relative_difference(theirs * 1.1, theirs, rounds=200)
    assert point == low == pytest.approx(0.1) and high == pytest.approx(0.1)  # pairs move together
    mine = theirs + draw.normal(0, 0.1, 400)
    point, low, high = relative_difference(mine, theirs, rounds=2000)
    spread = (mine - theirs * (1 + point)).std() / theirs.mean() / 400**0.5
    assert low < point < high and (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.15)


def test_the_interval_of_losses_resamples_conversations_within_each_set() -> None:
    draw = np.random.default_rng(2)
    counts = draw.integers(5, 40, 300)
    theirs = [[(float(draw.gamma(9, 0.3) * n), int(n)) for n in counts], [(2.0 * n, int(n)) for n in counts[:50]]]
    same = [[(1.02 * loss, n) for loss, n in rows] for rows in theirs]
    assert relative_loss_difference(same, theirs, rounds=200) == pytest.approx((0.02, 0.02, 0.02))
    # sets count alike, whatever their sizes: 10 % more in one of two of mean 2.7 and 2
    half = [theirs[0], [(1.1 * loss, n) for loss, n in theirs[1]]]
    means = [sum(loss for loss, _ in rows) / sum(n for _, n in rows) for rows in theirs]
    point, low, high = relative_loss_difference(half, theirs, rounds=2000)
    assert point == pytest.approx(0.1 * means[1] / sum(means)) and low < point < high
    assert mean_losses({"a": theirs[0], "b": theirs[1]}) == pytest.approx({"a": means[0], "b": 2.0})


def test_the_table_sets_unified_against_the_specialist_per_set() -> None:
    described = {"sets": ["a", "a", "b"]}
    records: list[dict[str, Any]] = [
        {
            "name": "unified-0",
            "seed": 0,
            "steps": 5,
            "measured_on": described,
            "ranks": [1, 3, 20],
            "losses": {"x": 2.0},
        },
        {"name": "embedding-0", "seed": 0, "steps": 5, "measured_on": described, "ranks": [1, 1, 1]},
    ]
    assert ndcg([1, 3, 20]).tolist() == [1.0, 0.5, 0.0]
    lines = table(records).splitlines()
    assert "| unified-0 | 5 | 0.500 | 2.000 | - |" in lines
    assert next(line for line in lines if line.startswith("| a |")).startswith("| a | 2 | 0.750 | 1.000 | -25.0%")
    assert next(line for line in lines if line.startswith("| b |")).startswith("| b | 1 | 0.000 | 1.000 | -100.0%")


def test_each_seed_is_compared_with_the_specialist_of_the_same_seed() -> None:
    def record(name: str, seed: int, rank: int, loss: float) -> dict[str, Any]:
        mode = {"ranks": [rank]} if name != "generative" else {}
        losses = {"conversation_losses": {"x": [(loss, 1)]}} if name != "embedding" else {}
        described = {"sets": ["a"]}
        return {"name": f"{name}-{seed}", "seed": seed, "steps": 5, "measured_on": described, **mode, **losses}

    records = [record("unified", 0, 1, 2.0), record("unified", 1, 20, 4.0), record("unified", 2, 1, 9.0)]
    records += [record("embedding", seed, 1, 0.0) for seed in (0, 1)] + [
        record("generative", s, 0, 2.0) for s in (0, 1)
    ]
    written = table(records)
    assert (
        "(2 seed(s)): relative difference of nDCG" in written
        and "(2 seed(s)): relative difference of the next" in written
    )
    lines = [line for line in written.splitlines() if line.startswith("| all |")]
    assert lines[0].startswith("| all | 1 | 0.500 | 1.000 | -50.0%") and lines[1].startswith("| all | 1 | +50.0%")
    alone = [line for line in written.splitlines() if line.startswith("Each seed alone")]
    assert "seed 0 +0.0%" in alone[0] and "seed 1 -100.0%" in alone[0]
    assert "seed 0 +0.0%" in alone[1] and "seed 1 +100.0%" in alone[1]
    assert "Each seed" not in table(records[:1] + records[3:4])


def test_a_second_seed_with_the_same_losses_makes_no_interval_narrower() -> None:
    """Conversations are resampled, not their runs."""
    losses = np.random.default_rng(1).gamma(9.0, 0.3, (2, 50)).tolist()

    def record(name: str, seed: int, own: list[float]) -> dict[str, Any]:
        rows = {"x": [(loss, 1) for loss in own]}
        return {"name": f"{name}-{seed}", "seed": seed, "steps": 5, "conversation_losses": rows}

    one, two = (
        [record(name, seed, own) for seed in seeds for name, own in zip(("unified", "generative"), losses, strict=True)]
        for seeds in ((0,), (0, 1))
    )
    alone, both = (next(x for x in table(rows).splitlines() if x.startswith("| all |")) for rows in (one, two))
    assert alone == both and re.search(r"\[-.*, \+.*\]", alone)


@needs_source_tree
def test_no_committed_record_names_a_folder_of_a_machine() -> None:
    for path in proof.common.RESULTS.rglob("*.json"):
        found = re.findall(r'"(?:/|[A-Z]:\\\\)[^"]*"', path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found[0]}"


@needs_source_tree
def test_the_shipped_plan_is_accepted(tmp_path: Path) -> None:
    plan = proof.read_plan(proof.common.ROOT / "configs" / "proof.yaml")
    (tmp_path / "train").mkdir()
    configs = [run.config(plan, tmp_path, tmp_path / "out") for run in plan.runs()]
    assert [c.steps for c in configs] == [430] * 6 + [860] * 2
    assert len({str(c.optimizer) for c in configs}) == 1
