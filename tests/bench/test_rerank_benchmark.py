"""The reranking benchmark asks held-out queries, resumes, compares on the same queries, and judges by its own rules."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import rerank as bench_rerank
from bench.rerank import DEFAULT, EVERYTHING, FOUND, Item, make_items, measure, paired_difference, summary, verdict
from python_model import GritLM
from python_model.evaluation.held_out import HeldOut
from python_model.generate.rerank import Ranked

pytest.importorskip("bm25s", reason="passages are found by bm25s: pip install 'grit-kernels[data]'")

WORDS = ("river", "city", "word", "code", "capital", "text")
PASSAGES = {f"{kind}:{word}": f"The {word} is a {kind} thing." for kind in ("good", "plain") for word in WORDS}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """Twelve queries of two data sets; the first passage of the corpus stands in it under two keys."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "test").mkdir()
    corpus = [{"key": key, "text": text} for key, text in [*PASSAGES.items(), ("again", PASSAGES["good:river"])]]
    rows = [
        {
            "query": ["", f"a {word} that is a {kind} one" if word != "text" else "nothing alike"],
            "pos": [["", PASSAGES[f"{kind}:{word}"]]],
            "neg": [["", PASSAGES["plain:code" if word != "code" else "plain:city"]]],
            "key": f"{kind}:{word}",
            "dataset": kind,
        }
        for kind in ("good", "plain")
        for word in WORDS
    ]
    for name, given in (("corpus", corpus), ("test/embedding", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return HeldOut(folder)


def test_items_take_data_sets_in_turn_and_leave_out_other_answers(held_out: HeldOut) -> None:
    items, found = make_items(held_out, 4)
    assert [item.dataset for item in items] == ["good", "plain"] * (len(items) // 2) and 6 <= len(items) < 12
    assert make_items(held_out, 4, 5) == (items[:5], found)
    assert found == {EVERYTHING: len(items) / 12, "good": len(items) / 12, "plain": len(items) / 12}
    assert all(item.passages[item.right].split()[1] in item.query for item in items)
    other = copy.copy(held_out)
    other.rows, other.relevant, other.also_relevant = (
        each[::-1] for each in (held_out.rows, held_out.relevant, held_out.also_relevant)
    )
    assert make_items(other, 4)[0] == items, "the order of the file does not count"
    places = {item.query: item for item in items}
    river = places["a river that is a good one"]
    assert river.right == 0 and river.passages.count(PASSAGES["good:river"]) == 1, "its copy would be right as well"
    with pytest.raises(ValueError, match="data: expected at least 99 passages, got 13"):
        make_items(held_out, 99)
    with pytest.raises(ValueError, match="queries: expected .*got 0"):
        make_items(held_out, 4, 0)
    other.rows = [replace(row, dataset=EVERYTHING) for row in other.rows]
    with pytest.raises(ValueError, match="dataset: expected a name other than 'all'"):
        make_items(other, 4)


def test_orders_are_those_of_the_library_and_are_kept(held_out: HeldOut, checkpoint: Path, tmp_path: Path) -> None:
    model, items = GritLM(checkpoint, device="cpu"), make_items(held_out, 3, 4)[0]
    arguments = (tmp_path / "tiny", 20, float("inf"))
    orders = measure(model, items, ["likelihood", "listwise"], *arguments)
    for method, found in orders.items():
        ranked = [bench_rerank.rerank(model, i.query, i.passages, method=method, passage_tokens=20) for i in items]  # type: ignore[arg-type]
        assert found == [[row.index for row in rows] for rows in ranked]


class Counted:
    """In the place of rerank(): the last passage first. Counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, model: Any, query: str, passages: Sequence[str], *, method: str, **options: Any) -> list[Ranked]:
        self.calls.append((method, query))
        return [Ranked(index, 0.0) for index in reversed(range(len(passages)))]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()
    monkeypatch.setattr(bench_rerank, "rerank", found)
    monkeypatch.setattr(bench_rerank, "fingerprint", lambda model: model)
    return found


def test_a_run_resumes_query_by_query_and_refuses_other_orders(
    held_out: HeldOut, counted: Counted, tmp_path: Path
) -> None:
    items, _ = make_items(held_out, 3)
    model: Any = "one"
    assert measure(model, items[:2], ["likelihood"], tmp_path, 20, 60.0) == {"likelihood": [[2, 1, 0]] * 2}
    measure(model, items[:4], ["likelihood", "pointwise"], tmp_path, 20, 60.0)
    asked = [(method, item.query) for item in items[:2] for method in ("pointwise",)]
    asked += [(method, item.query) for item in items[2:4] for method in ("likelihood", "pointwise")]
    assert counted.calls[2:] == asked
    assert measure(model, items[:3], ["pointwise"], tmp_path, 20, 0.0) == {"pointwise": [[2, 1, 0]] * 3}
    assert measure(model, items, ["pointwise"], tmp_path, 20, 0.0) == {"pointwise": [[2, 1, 0]] * 4}, "no time is left"
    assert len(counted.calls) == 2 + len(asked)
    for other in (("two", items, 20), (model, items[::-1], 20), (model, items, 21)):
        with pytest.raises(ValueError, match="output: .* holds answers with another model, data or settings"):
            measure(other[0], other[1], ["pointwise"], tmp_path, other[2], 60.0)


SHARES = {EVERYTHING: 0.5, "x": 0.25, "y": 0.75}


def item(dataset: str, right: int) -> Item:
    return Item(dataset, "q", ("a", "b", "c"), right)


def test_the_table_has_for_each_method_the_queries_it_has_finished() -> None:
    items = [item("x", 0), item("y", 1), item("x", 2), item("y", 2)]
    reversed_, same = [2, 1, 0], [0, 1, 2]
    orders = {DEFAULT: [same, [1, 0, 2], same, same], "pointwise": [reversed_] * 3, "listwise": [same]}
    rows = {(row["dataset"], row["variant"]): row for row in summary("tiny", items, SHARES, orders)}
    names = (FOUND, *orders)
    assert list(rows) == [(d, n) for d in (EVERYTHING, "x", "y") for n in names if (d, n) != ("y", "listwise")]
    found, default, pointwise, listwise = (rows[EVERYTHING, name] for name in names)
    second, third = 1 / np.log2(3), 1 / np.log2(4)
    assert [row["queries"] for row in (found, default, pointwise, listwise)] == [4, 4, 3, 1]
    assert [rows[dataset, FOUND]["found"] for dataset in SHARES] == list(SHARES.values())
    assert found["ndcg_at_10"] == pytest.approx((1 + second + 2 * third) / 4)
    assert default["ndcg_at_10"] == pytest.approx((2 + 2 * third) / 4) and default["moved"] == pytest.approx(1 / 4)
    assert pointwise["ndcg_at_10"] == pytest.approx((third + second + 1) / 3) and pointwise["moved"] == 1
    assert listwise["ndcg_at_10"] == 1 and listwise["moved"] == 0
    assert default["over_found"] == pytest.approx((1 - second) / 4) and "over_default" not in default
    assert found["over_default"] == -default["over_found"] and "over_found" not in found
    assert pointwise["over_found"] == pytest.approx(0), "right first, then last: the mean of three is the same"
    assert pointwise["over_default"] == pytest.approx((second - 1) / 3), "of the three that both have finished"
    assert pointwise["over_default_low"] <= pointwise["over_default"] <= pointwise["over_default_high"]
    assert listwise["over_default"] == listwise["over_found"] == 0
    assert [(rows["x", name]["queries"], rows["y", name]["queries"]) for name in names[:3]] == [(2, 2), (2, 2), (2, 1)]
    few = {DEFAULT: [same], "listwise": [same, same]}
    later = summary("tiny", items[:2], SHARES, few)[-1]
    assert later["variant"] == "listwise" and later["dataset"] == "y" and "over_default" not in later
    with pytest.raises(ValueError, match="minutes: expected time for a query by each method, got none"):
        summary("tiny", items, SHARES, {**orders, "listwise": []})


def test_a_difference_beyond_chance_is_told_from_one_within() -> None:
    draw = np.random.default_rng(1)
    base = draw.random(300)
    value, low, high = paired_difference(base + 0.1 + 0.1 * draw.standard_normal(300), base)
    assert low < 0.1 < high and value == pytest.approx((low + high) / 2, abs=0.005)
    # the queries differ by more than the methods do, which a paired interval does not see
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 300**0.5, rel=0.2)
    _, low, high = paired_difference(base + 0.1 * draw.standard_normal(300), base)
    assert low < 0 < high
    rows = summary("tiny", [item("x", 2)] * 40, SHARES, {DEFAULT: [[0, 1, 2]] * 40, "pointwise": [[2, 1, 0]] * 40})
    assert verdict(rows) == (
        f"tiny, 40 queries: best is pointwise (1.000); better than the default ({DEFAULT}) beyond chance: pointwise"
    )
    rows = summary("tiny", [item("x", 0)] * 40, SHARES, {DEFAULT: [[0, 1, 2]] * 40, "pointwise": [[2, 1, 0]] * 40})
    assert verdict(rows).endswith(f"nothing is better than the default ({DEFAULT}) beyond chance")
    better, worse = [item("x", 2)] * 21, [item("x", 0)] * 19
    rows = summary("tiny", better + worse, SHARES, {DEFAULT: [[0, 1, 2]] * 40, "pointwise": [[2, 1, 0]] * 40})
    assert "best is pointwise" in verdict(rows) and verdict(rows).endswith("beyond chance")
    assert "nothing is better" in verdict(rows), "21 of 40 may be chance"
    few = {"listwise": [[0, 1, 2]] * 20, DEFAULT: [[0, 1, 2]] * 20 + [[2, 1, 0]] * 20}
    rows = summary("tiny", [item("x", 0)] * 20 + [item("x", 2)] * 20, SHARES, few)
    assert f"best is {DEFAULT} (1.000)" in verdict(rows), "listwise improves none of its queries"
    assert verdict(summary("tiny", [item("x", 0)], SHARES, {"pointwise": [[0, 1, 2]]})).endswith("was not measured")
