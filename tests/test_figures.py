"""Figures that README.md and the pages state are those of the committed records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.common import RESULTS
from bench.proof_table import mean_losses, ndcg, relative_difference, relative_loss_difference
from python_model.cli import main
from tests.conftest import needs_source_tree

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROOF = README.partition("## Proved so far")[2].partition("\n## ")[0]
MACHINES = {"amd-avx512_bf16": "bfloat16", "intel-avx512": "float32"}
"""The columns of the README's table, and the dtype that models compute in on each machine."""
MIXED = "mixed 50% causal"
pytestmark = needs_source_tree


def rows(name: str, kind: str = "amd-avx512_bf16", **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a machine's record in which every value of ``wanted`` occurs."""
    found = records.read(RESULTS / kind / f"{name}_cpu.json")["rows"]
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


def value(name: str, measured: str, **wanted: Any) -> float:
    """One figure of a record; the first where a benchmark has several sizes."""
    return float(rows(name, **wanted)[0][measured])


def shown(figures: list[float]) -> str:
    """As the README writes them: one digit after the point, or two below 1."""
    return " / ".join(f"{x:.1f}" if x >= 1 else f"{x:.2f}".lstrip("0") for x in figures)


def kernels(kind: str) -> dict[str, str]:
    """By how the row of the README's table begins: the cell of this machine."""
    dtype = MACHINES[kind]

    def attention(regime: str, *peers: str) -> str:
        named = {"kind": kind, "dtype": f"torch.{dtype}", "regime": regime}
        return shown([value("attention", "times_grit", variant=peer, **named) for peer in peers])

    def losses(name: str, measure: str, *peers: str) -> str:
        return shown([value(name, measure, kind=kind, variant=peer, dtype=dtype) for peer in peers])

    def both(kind_of_pass: str, shape: str) -> str:
        forms = ("sdpa loop", "sdpa masked", "sdpa split")
        named = {"kind": kind, "dtype": f"torch.{dtype}"}
        return shown(
            [
                min(
                    value("attention", "times_grit", variant=form, regime=f"{kind_of_pass} {mode} {shape}", **named)
                    for form in forms
                )
                for mode in ("causal", "bidirectional")
            ]
        )

    peers = ("eager, FP32 scores" if dtype == "bfloat16" else "eager", "torch.compile")
    step, padded, unfused = (
        rows("train", kind, variant=name)[0] for name in ("packed", "three padded passes", "packed, not fused")
    )
    return {
        "attention, causal / bidirectional, N 1024": both("dense", "N1024 D64"),
        "attention, causal / bidirectional, N 4096": both("dense", "N4096 D128"),
        "attention, causal / bidirectional, N 256": both("dense", "N256 D128"),
        "backward, causal / bidirectional": both("backward", "N1024 D64"),
        "packed queries": attention(MIXED, "sdpa loop", "sdpa masked", "sdpa split"),
        "the same, backward": attention(f"backward {MIXED}", "sdpa loop", "sdpa split"),
        "contrastive loss": losses("contrastive", "forward_speedup", *peers),
        "the same, forward and backward": losses("contrastive", "step_speedup", *peers),
        "per-token loss": losses("generative_loss", "speedup", "eager", "torch.compile", "torch linear_cross_entropy"),
        "decoding": shown([value("generate", "speedup", kind=kind, variant="decode", batch=n) for n in (1, 16)]),
        "`encode()`": shown(
            [
                value("model", "time_over_first", kind=kind, variant=peer)
                for peer in ("encode, gritlm 1.0.2", "encode, not fused")
            ]
        ),
        "one unified training step": f"{shown([step['speedup']])}, at "
        f"{shown([step['memory_mib'] / padded['memory_mib']])} of the memory / "
        f"{shown([step['speedup'] / unfused['speedup']])}",
    }


def serving(kind: str) -> dict[str, str]:
    """The same of the server's row."""
    largest = {row["variant"]: row for row in rows("serve", kind) if row["load"].startswith("largest within")}
    ours, slowest = largest["one server"], largest["two processes"]["between_p99_ms"]
    return {
        "mixed load": f"{shown([ours[key] for key in ('times', 'tokens_times', 'texts_times')])}, at "
        f"{shown([ours['memory_share']])} of the memory and "
        f"{shown([ours['between_p99_ms'] / slowest])} of the p99 between tokens",
    }


def test_the_spread_of_encode_without_fused_ops_is_that_of_the_records() -> None:
    ranges = []
    for kind in MACHINES:
        fused, unfused = (rows("model", kind, variant=name)[0]["seconds"] for name in ("encode", "encode, not fused"))
        ratios = sorted(slow / fast for slow, fast in zip(unfused, fused, strict=True))
        assert len(ratios) == 3
        ranges.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}".removeprefix("0"))
    text = f"without fused ops the AMD needs {ranges[0]} times as long, the Intel {ranges[1]}."
    assert text in " ".join(README.split())


def measured() -> list[tuple[int, str, str]]:
    """Column, row and text of the cells that come from records."""
    cells = [(column, *cell) for column, kind in enumerate(MACHINES) for cell in kernels(kind).items()]
    return [*cells, *((0, *cell) for cell in serving("amd-avx512_bf16").items())]


@pytest.mark.parametrize(("column", "work", "cell"), measured(), ids=[f"{c}-{work}" for c, work, _ in measured()])
def test_a_cell_of_measured_is_that_of_the_record(column: int, work: str, cell: str) -> None:
    table = README.partition("## Measured")[2].partition("\n## ")[0]
    (line,) = re.findall(rf"^\| {re.escape(work)}[^|]*\|[^|]*\|(.*)\|$", table, flags=re.MULTILINE)
    assert line.split("|")[column].strip() == cell


def test_the_readme_shows_the_record_of_the_demo() -> None:
    before, bm25, after = (rows("demo_seeds", "intel-avx512")[index] for index in (0, 1, 2))
    output = README.partition("```text")[2].partition("```")[0]
    for name, key in (("nDCG@10", "ndcg_at_10"), ("MRR@10", "mrr_at_10"), ("recall@10", "recall_at_10")):
        assert re.search(rf"^{name} +{before[key]:.3f} +{after[key]:.3f} +{bm25[key]:.3f}$", output, flags=re.MULTILINE)
    assert f"{before['next_token_loss']:.3f}     {after['next_token_loss']:.3f}" in output
    seeds = rows("demo_seeds", "intel-avx512", variant="trained")
    text = " ".join(README.split())
    ndcgs = [f"{row['ndcg_at_10']:.3f}".lstrip("0") for row in seeds]
    losses = [f"{row['next_token_loss']:.2f}" for row in seeds]
    assert f"They reach {ndcgs[0]}, {ndcgs[1]} and {ndcgs[2]}" in text
    assert f"loss of {losses[0]}, {losses[1]} and {losses[2]} against {before['next_token_loss']:.2f}" in text
    (row,) = rows("demo_seeds_bf16", "intel-avx512", variant="trained")
    reached = f"{row['ndcg_at_10']:.3f} and {row['next_token_loss']:.2f}".removeprefix("0")
    assert f"in bfloat16, the first of them reaches {reached}." in text


PLANS = (("proof",), ("proof_rate", "proof_short"))
"""Folders of the README's plans: of 430 steps, and of 144; the first that has a kind of run is shown."""


def proof_cells(kind: str) -> list[str]:
    """The cells of a kind of run, a figure per seed: nDCG@10 by plan, then next-token losses; empty where none was measured."""
    scores, losses = [], []
    for folders in PLANS:
        found = [
            sorted(p for p in (RESULTS / f).glob("*.json") if re.fullmatch(rf"{kind}(-\d+)?", p.stem)) for f in folders
        ]
        runs = [records.read(path) for path in next(filter(None, found), [])]
        scores.append([float(ndcg(run["ranks"]).mean()) for run in runs if "ranks" in run])
        by_set = [
            mean_losses(run["conversation_losses"]) if "conversation_losses" in run else run.get("losses")
            for run in runs
        ]
        losses.append([sum(own.values()) / len(own) for own in by_set if own])
    return [", ".join(f"{x:.3f}".removeprefix("0") for x in cell) for cell in (*scores, *losses)]


@pytest.mark.parametrize(
    ("kind", "label"),
    {
        **{"base": "base model", "BM25": "BM25, stemmed", "unified": "unified"},
        **{"embedding": "embedding only", "generative": "generative only"},
        **{
            "embedding-double": "embedding only, twice the steps",
            "generative-double": "generative only, twice the steps",
        },
    }.items(),
)
def test_a_row_of_the_proof_is_that_of_its_records(kind: str, label: str) -> None:
    (line,) = re.findall(rf"^\| {label} \|(.*)\|$", PROOF, flags=re.MULTILINE)
    assert [cell.strip(" -") for cell in line.split("|")] == proof_cells(kind)


def differences(plan: str) -> list[tuple[str, str, str]]:
    """Of a plan's table: how far the unified model is from each specialist over all rows, and the interval, in per cent."""
    written = (RESULTS / plan / "table.md").read_text(encoding="utf-8")
    return re.findall(r"^\| all \|.* ([+-]\S+)% \[(\S+)%, (\S+)%\] \|$", written, flags=re.MULTILINE)


def test_the_differences_that_the_proof_names_are_those_of_its_tables() -> None:
    text = " ".join(PROOF.split())
    (score, low, high), (loss, loss_low, loss_high), (long, _, _), (long_loss, _, _) = differences("proof")
    assert f"its nDCG@10 is {score.strip('-')} % lower (95 % interval over queries {low} to {high} %)" in text
    assert f"its loss {loss.strip('+')} % higher ({loss_low} to {loss_high} %)" in text
    table = (RESULTS / "proof" / "table.md").read_text(encoding="utf-8")
    first, second = re.search(r"rows: seed 0 -(\S+)% .*; seed 1 -(\S+)% ", table).groups()  # type: ignore[union-attr]
    assert f"nDCG@10 is {first} and {second} % below after 430 steps" in text
    (score, low, high), (loss, _, _), (double, _, _), (double_loss, _, _) = differences("proof_rate")
    table = (RESULTS / "proof_rate" / "table.md").read_text(encoding="utf-8")
    first, second = re.search(r"rows: seed 0 \+(\S+)% .*; seed 1 -(\S+)% ", table).groups()  # type: ignore[union-attr]
    assert f"after 144 it is {first} % above with seed 0 and {second} % below with seed 1" in text
    assert f"(both: {score} %, {low} to {high} %), the loss {loss.strip('+')} % higher with either" in text
    assert f"by {long.strip('-')} % of nDCG@10 and {long_loss.strip('+')} % of the loss after 860 steps" in text
    assert f"by {double.strip('-')} % and {double_loss.strip('+')} % after 288" in text
    assert f"nDCG@10 was {differences('proof_short')[0][0].strip('-')} % below after 144 steps" in text
    at_rates = [
        f"{ndcg(records.read(RESULTS / plan / 'embedding-0.json')['ranks']).mean():.3f}".removeprefix("0")
        for plan in ("proof_short", "proof_rate")
    ]
    assert f"specialist (seed 0) has {at_rates[0]} at 1e-4 and {at_rates[1]} at 1.4e-4 after 144 steps" in text


def test_what_a_higher_rate_gives_the_unified_model_is_that_of_its_record() -> None:
    """Against the specialists of seed 0 at the other rate, on the same rows."""
    high, plain = (records.read(RESULTS / plan / "unified-0.json") for plan in ("proof_high_rate", "proof"))
    embedding, generative = (records.read(RESULTS / "proof" / f"{mode}-0.json") for mode in ("embedding", "generative"))
    assert high["measured_on"] == embedding["measured_on"] == generative["measured_on"]
    assert high["config"]["optimizer"]["lr"] == 2e-4 and embedding["config"]["optimizer"]["lr"] == 1.4e-4
    names = sorted(high["conversation_losses"])

    def losses(record: dict[str, Any]) -> list[Any]:
        return [record["conversation_losses"][name] for name in names]

    score, low, high_end = (
        f"{100 * x:+.1f}" for x in relative_difference(ndcg(high["ranks"]), ndcg(embedding["ranks"]))
    )
    before = 100 * relative_difference(ndcg(plain["ranks"]), ndcg(embedding["ranks"]))[0]
    loss, loss_low, loss_high = (f"{100 * x:+.1f}" for x in relative_loss_difference(losses(high), losses(generative)))
    loss_before = 100 * relative_loss_difference(losses(plain), losses(generative))[0]
    text = " ".join(PROOF.split())
    assert (
        f"at 2e-4 the unified model (seed 0) is {score.strip('+')} % above its specialist at 1.4e-4 ({low} to {high_end} %), "
        f"not {-before:.1f} % below, and its loss {loss.strip('+')} % higher ({loss_low} to {loss_high} %), "
        f"not {loss_before:.1f} %."
    ) in text
    (line,) = re.findall(r"^\| unified at 2e-4, seed 0 \|(.*)\|$", PROOF, flags=re.MULTILINE)
    mean = sum(mean_losses(high["conversation_losses"]).values()) / len(names)
    assert [cell.strip() for cell in line.split("|")] == [
        *(f"{ndcg(high['ranks']).mean():.3f}".removeprefix("0"), "", f"{mean:.3f}", "")
    ]


def test_the_tokens_of_twice_the_steps_are_those_of_their_logs() -> None:
    tokens = {
        name: sum(step["tokens"] for step in records.read(RESULTS / "proof_rate" / f"{name}.json")["log"])
        for name in ("unified-0", "embedding-double-0", "generative-double-0")
    }
    unified, embedding, generative = tokens.values()
    read = (
        f"embedding specialist has read {embedding / unified:.1f} times the unified model's tokens, "
        f"and the generative one {generative / unified:.1f} times"
    )
    assert read.replace(" 0.", " .") in " ".join(PROOF.split())


def test_the_cosine_of_the_proofs_gradients_is_that_of_its_record() -> None:
    (row,) = rows("gradient_cosine", run="proof-0")
    mean = f"{row['mean']:.3f}".replace("0.", ".", 1)
    stated = f"over the {row['steps']} steps their cosine is {mean} on average"
    assert f"({stated}, and within .1 in {100 * row['within_tenth']:.1f} % of them)" in " ".join(PROOF.split())


def test_the_page_on_training_states_what_the_balance_of_gradients_does_and_costs() -> None:
    page = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    first = rows("balance", work="norms", limit=0.0)[0]
    times = first["contrastive_grad_norm"][0] / first["generative_grad_norm"][0]
    larger = f"the contrastive gradient, {times:.0f} times the larger in the first step of the demo's recipe"
    assert f"{larger} at a temperature of .02" in page
    measured, limited = (
        f"{100 * (value('balance', 'time_over_first', variant=variant, work='step') - 1):.0f} %"
        for variant in ("norms only", "limited")
    )
    assert f"a step of the demo's recipe {measured} longer on two CPU cores" in page
    assert f"gradients unseen, and limiting them {limited}." in page


def test_the_page_on_rag_states_the_record_of_reranking() -> None:
    page = " ".join((ROOT / "docs" / "rag.md").read_text(encoding="utf-8").split())
    found, default, pointwise = (
        rows("rerank", dataset="all", variant=name)[0] for name in ("as found", "likelihood", "pointwise")
    )
    scores = [f"{row['ndcg_at_10']:.3f}"[1:] for row in (found, default, pointwise)]
    gain, low, high = (f"+{default[f'over_found{end}']:.3f}".replace("0.", ".") for end in ("", "_low", "_high"))
    assert f"{found['queries']} held-out queries" in page and f"({100 * found['found']:.0f} % of all are such)" in page
    assert (
        f"nDCG@10 is {scores[0]} in BM25's order, **{scores[1]} by likelihood** "
        f"({gain}, 95 % interval {low} to {high}) and {scores[2]} pointwise"
    ) in page
    assert f"+{value('rerank', 'over_found', dataset='wikipedia', variant='likelihood'):.3f}".replace("0.", ".") in page


def test_the_page_on_kernels_states_the_profile_of_the_record() -> None:
    page = " ".join((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split())
    parts = {row["part"]: row["share"] for row in rows("model", group="profile", variant="packed")}
    names = {
        **{"MLP": "MLP", "projections": "q, k, v, o projections", "the attention op": "attention op"},
        **{"residual adds": "residual adds", "rotary and head layout": "rotary, head layout", "norms": "norms"},
    }
    stated = ", ".join(f"{name} {parts[part]:.0%}".replace("%", " %") for name, part in names.items())
    assert f"{stated}, packing {100 * parts['pack, unpack, masks']:.1f} %." in page
    padded = {row["part"]: row["share"] for row in rows("model", group="profile", variant="sdpa, two padded passes")}
    times = value("model", "time_over_first", variant="sdpa, two padded passes")
    assert f"takes {padded['attention op']:.0%}".replace("%", " %") + f" of {times:.1f} times" in page


@pytest.mark.parametrize("recipe", ["gritlm-7b", "gritlm-8x7b", "embedding-7b", "generative-7b"])
def test_the_page_on_training_states_what_a_dry_run_estimates(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{recipe}\.yaml` \| (.*) \|$", page, flags=re.MULTILINE)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    totals = []
    for world in (1, 8, 16, 64):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        main(["train", "--config", f"configs/{recipe}.yaml", "--dry_run", "true"])
        printed = capsys.readouterr().out
        totals.append(f"{float(re.findall(r'total ([0-9.]+) GiB', printed)[0]):.0f}")
        if (recipe, world) == ("gritlm-7b", 8):
            assert printed.strip() in page
    assert row == " | ".join(totals)
