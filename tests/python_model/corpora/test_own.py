"""Data folders of one's own rows, and negatives mined for them: no test is in training, and nothing right is a negative."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_model import GritLM
from python_model.commands.data import COMMAND as data
from python_model.commands.mine import COMMAND as mine
from python_model.commands.mine import Pool, mined
from python_model.corpora.hard_negatives import Embeddings, mine_negatives
from python_model.corpora.own import own_files, split_rows
from python_model.data.reading import read_embedding, read_rows
from python_model.data.rows import EmbeddingRow, GenerativeRow, PlainText, to_object
from python_model.evaluation.held_out import HeldOut
from python_model.evaluation.language import conversation_losses
from python_model.evaluation.retrieval import embed_documents, embed_queries
from python_model.rag.documents import chunk
from python_model.rag.modes import Document
from tests.python_model.data.test_data import write


def text(value: str) -> PlainText:
    return PlainText("", value)


def rows_of_one_project() -> list[Any]:
    """Queries in pairs that share a passage, every passage someone's negative; chats about them."""
    rows: list[Any] = [
        EmbeddingRow(
            text(f"Question {n}"), (text(f"passage {n // 2}"),), tuple(text(f"Passage {k % 100}") for k in (n, n + 7))
        )
        for n in range(200)
    ]
    return rows + [GenerativeRow((f"say {n // 2}", f"reply {n}")) for n in range(100)]


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_about_one_thing_are_on_one_side_and_answers_of_tests_in_no_training_row(seed: int) -> None:
    rows = rows_of_one_project()
    train, test = split_rows(rows, 20)
    assert len(train) + len(test) == 300 and 20 < len(test) < 110
    shown = {
        text.text.lower() for row in train if isinstance(row, EmbeddingRow) for text in (row.query, *row.pos, *row.neg)
    }
    asked = {text.text.lower() for row in test if isinstance(row, EmbeddingRow) for text in (row.query, *row.pos)}
    assert not shown & asked
    chats = [{row.turns[0] for row in side if isinstance(row, GenerativeRow)} for side in (train, test)]
    assert all(chats) and not chats[0] & chats[1]
    assert any(len(row.neg) < 2 for row in train if isinstance(row, EmbeddingRow))
    random.Random(seed).shuffle(rows)
    assert {id_of(row) for row in split_rows(rows, 20)[1]} == {id_of(row) for row in test}  # whatever the order
    larger = {id_of(row) for row in split_rows(rows, 40)[1]}
    assert larger > {id_of(row) for row in test}


def id_of(row: Any) -> Any:
    return row.query if isinstance(row, EmbeddingRow) else row.turns


def test_chains_of_shared_texts_stay_together() -> None:
    chain = [EmbeddingRow(text(f"q{n}"), (text(f"p{n}"), text(f"p{n + 1}"))) for n in range(30)]
    for percent in (10, 50):
        assert 0 in map(len, split_rows(chain, percent))
    keyed = [EmbeddingRow(text(f"q{n}"), (text(f"p{n}"),), key="one") for n in range(30)]
    assert 0 in map(len, split_rows(keyed, 50))


def test_a_folder_of_own_rows_can_be_trained_on_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"anchor": f"question {n}", "positive": f"passage {n}", "negative": f"passage {n + 1}"} for n in range(300)
    ]
    chats = [
        {"messages": [{"role": "user", "content": f"u {n}"}, {"role": "assistant", "content": "a"}]} for n in range(200)
    ]
    files = [str(write(tmp_path / "pairs.jsonl", *pairs, "{")), str(write(tmp_path / "chats.jsonl", *chats))]
    folder = tmp_path / "DATA"
    data([str(folder), "--from", *files, "--held-out", "10", "--test-rows", "20"])
    printed = capsys.readouterr().out
    assert "left out, broken: 1 row(s)" in printed and f"grit train --config {folder / 'train.yaml'}" in printed
    embedding, generative = read_rows(folder / "train")
    held = HeldOut(folder)
    assert len(held.rows) == 20 and 0 < len(held.conversations) <= 20 and len(embedding) > 230 and len(generative) > 150
    trained = {t.text for row in embedding for t in (row.query, *row.pos, *row.neg)}
    for row, place in zip(held.rows, held.relevant, strict=True):
        assert held.documents[place] == row.pos[0].text not in trained and row.query.text not in trained
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["train/pairs.jsonl"]["rows"] == len(embedding)
    with pytest.raises(SystemExit, match="exists; choose another folder"):
        data([str(folder), "--from", *files])
    with pytest.raises(SystemExit, match="expected rows of each kind to hold out"):
        data([str(tmp_path / "few"), "--from", str(write(tmp_path / "few.jsonl", pairs[0]))])


@pytest.mark.parametrize(
    "option", [["--sources", "foldoc"], ["--negatives", "3"], ["--max-rows", "5"], ["--corpus-rows", "5"]]
)
def test_an_option_that_own_rows_would_ignore_is_refused(tmp_path: Path, option: list[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", *({"text": f"text {n}"} for n in range(40)))
    with pytest.raises(SystemExit, match=f"{option[0]}: expected none beside --from, got it"):
        data([str(tmp_path / "DATA"), "--from", str(rows), *option])
    assert not (tmp_path / "DATA").exists()


def test_a_data_set_is_one_file_or_one_for_each_kind_it_has(tmp_path: Path) -> None:
    rows = rows_of_one_project()
    for folder, kind in (("a", EmbeddingRow), ("b", GenerativeRow)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "same.jsonl", *(to_object(row) for row in rows if isinstance(row, kind)))
    write(tmp_path / "b" / "chats.jsonl", *(to_object(GenerativeRow((f"ask {n}", "reply"))) for n in range(50)))
    files, _ = own_files([str(tmp_path / "a"), str(tmp_path / "b")], percent=20, max_queries=5)
    names = {name: {"query" in row for row in files[name]} for name in files if name.startswith("train/")}
    assert names == {"train/same.jsonl": {True}, "train/same_generative.jsonl": {False}, "train/chats.jsonl": {False}}


def test_data_sets_may_be_named_like_paths(tmp_path: Path) -> None:
    rows = [to_object(row) | {"dataset": f"../hub/{n % 2}"} for n, row in enumerate(rows_of_one_project()[:200])]
    folder = tmp_path / "DATA"
    data([str(folder), "--from", str(write(tmp_path / "rows.jsonl", *rows)), "--held-out", "10"])
    assert {file.name for file in (folder / "train").iterdir()} == {".._hub_0.jsonl", ".._hub_1.jsonl"}
    assert {row.dataset for row in read_embedding(folder / "train")} == {"../hub/0", "../hub/1"}


def test_texts_without_roles_can_be_held_out(checkpoint: Path, tmp_path: Path) -> None:
    texts = [f"text {n} of a river" for n in range(40)]
    folder = tmp_path / "DATA"
    data([str(folder), "--from", str(write(tmp_path / "rows.jsonl", *({"text": t} for t in texts)))])
    held = HeldOut(folder).conversations
    assert held and {row.turns[0] for row in held} < set(texts)
    model = GritLM(checkpoint, device="cpu")
    samples = [model.formatter.conversation(row.turns, 64) for row in held]
    counts = [count for _, count in conversation_losses(model, held, max_length=64)]
    assert counts == [len(sample) - 1 for sample in samples]  # every token but the first is predicted


def test_further_positives_of_a_query_do_not_count_against_it(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "embedding.jsonl", {"query": "q", "pos": ["one", "two"], "neg": ["n"], "key": "k1"})
    write(tmp_path / "corpus.jsonl", *({"key": f"k{i}", "text": t} for i, t in enumerate(("n", "one", "two", "x"))))
    held = HeldOut(tmp_path)
    assert (held.relevant, held.also_relevant, held.conversations) == ([1], [[2]], [])


class Fixed:
    def __init__(self, *scores: list[float]) -> None:
        self.scores = scores

    def rows(self) -> Any:
        return (np.array(row, dtype=np.float32) for row in self.scores)


def test_negatives_are_below_the_margin_and_never_an_answer() -> None:
    scores = Fixed([1.0, 0.97, 0.94, 0.8, 0.5, 0.4, 0.3, 0.2])
    ((chosen, _),) = mine_negatives(scores, [[0]], 8, 3, skipped_ranks=0, margin=0.95)
    assert chosen == [2, 5, 3]  # 0.97 is above 0.95; then every third, and what is left in order
    ((chosen, _),) = mine_negatives(scores, [[3, 0]], 8, 6, skipped_ranks=0, margin=0.95)
    assert sorted(chosen) == [1, 2, 4, 5, 6, 7]  # five below the margin, and one to fill up; never an answer
    ((chosen, _),) = mine_negatives(scores, [[0]], 8, 2, skipped_ranks=0, margin=0.45)
    assert chosen[0] == 5 and not {1, 2, 3, 4} & set(chosen)
    ((chosen, _),) = mine_negatives(Fixed([-0.2, -0.1, -0.3, -0.9]), [[0]], 4, 1, skipped_ranks=0)
    assert chosen[0] != 0  # a similarity below 0 has a margin too


def test_the_best_wrong_passages_are_skipped_and_every_third_of_the_next_is_taken() -> None:
    """However many passages there are, and also where they tie: the order of the passages decides."""
    falling = [1.0 - n / 100 for n in range(100)]
    ((chosen, scores),) = mine_negatives(Fixed(falling), [[0]], 100, 3, margin=0.99)
    assert chosen == [3, 6, 9] and len(scores) == 100
    ((chosen, _),) = mine_negatives(Fixed([1.0, *[0.5] * 99]), [[0]], 100, 3)
    assert chosen == [3, 6, 9]
    ((chosen, _),) = mine_negatives(Fixed(falling), [[4, 0]], 100, 2, lambda query, passage: passage != 5, margin=0.99)
    assert chosen == [3, 8], "3, 6, 7 and 8 are left of the best wrong ones"


def test_a_query_whose_answer_ranks_low_gets_the_best_passages_below_it() -> None:
    """Its top ranks all score above the limit; what fills up scores no higher either, unless nothing else is left."""
    scores = [0.9 - n / 1000 for n in range(300)]  # the answer is the 200th, the limit the 232nd
    found = {
        top_only: next(mine_negatives(Fixed(scores), [[200]], 300, 4, top_only=top_only, margin=0.955))[0]
        for top_only in (False, True)
    }
    assert found[False] == [232, 235, 238, 241]
    assert any(scores[j] > 0.955 * scores[200] for j in found[True]), "the rows of `grit data` stay as they were"
    # below the limit: one with a score above 0, which ranks after those to be skipped, and four without
    few = [0.0, 0.9, 0.8, 0.7, 0.0, 1.0, 0.3, 0.0, 0.0]
    ((chosen, _),) = mine_negatives(Fixed(few), [[6]], 9, 3)
    assert len(chosen) == 3 and all(few[j] == 0 for j in chosen)
    ((chosen, _),) = mine_negatives(Fixed([0.2, 0.3, 0.9, 0.8, 0.7, 0.6]), [[0]], 6, 3)
    assert chosen == [1, 5, 4], "no passage is below the answer: those that score least"


@pytest.mark.parametrize("skipped", [0, 1, 2, 5])
def test_ranks_to_be_skipped_are_counted_from_the_first_wrong_passage(skipped: int) -> None:
    """Also where some of them score above the limit."""
    scores = [1.0, *(0.97 - n / 10_000 for n in range(2)), *(0.9 - n / 1000 for n in range(200))]
    ((deep, _),) = mine_negatives(Fixed(scores), [[0]], 203, 40, skipped_ranks=skipped)
    ((chosen, _),) = mine_negatives(Fixed(scores), [[0]], 203, 3, skipped_ranks=skipped)
    assert chosen == deep[:3] == [max(3, 1 + skipped) + 3 * n for n in range(3)]


@pytest.mark.parametrize("owners", [None, [0, 0, 1]])
def test_similarities_of_many_queries_come_one_by_one(owners: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    scorer = Embeddings.__new__(Embeddings)
    scorer._queries, scorer._passages = torch.randn(600, 4, generator=generator), torch.randn(3, 4, generator=generator)
    scorer._owners = owners
    expected = scorer._queries @ scorer._passages.T
    if owners is not None:
        expected = torch.stack([expected[:, :2].amax(1), expected[:, 2]], dim=1)
    np.testing.assert_allclose(np.stack(list(scorer.rows())), expected, rtol=1e-5, atol=1e-6)


def test_own_negatives_and_positives_are_kept_and_scores_belong_to_their_passages() -> None:
    rows = [
        EmbeddingRow(text("a"), (text("p0"), text("p1")), (text("n0"),), pos_scores=(9, 9), neg_scores=(1,)),
        EmbeddingRow(text("b"), (text("p2"),)),
        # the query of the first row: p3 is no negative there, p0 none here
        EmbeddingRow(text("a"), (text("p3"),)),
    ]
    pool = Pool(rows, ["x0", "x1", "x2"])
    order = [t.text for t in pool.texts]
    assert order == ["p0", "p1", "n0", "p2", "p3", "x0", "x1", "x2"]
    assert pool.positives[0] == [0, 1, 4] == pool.positives[2]
    scores = Fixed(*[[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]] * 3)
    found = list(mined(rows, scores, pool, 3, skipped_ranks=0, scores=True))
    assert found[0].pos == rows[0].pos and found[0].neg[0] == text("n0") and len(found[0].neg) == 3
    for row in found:
        assert not {t.text for t in row.neg} & {order[j] for j in pool.positives[found.index(row)]}
        assert row.pos_scores == pytest.approx([scores.scores[0][order.index(t.text)] for t in row.pos])
        assert row.neg_scores == pytest.approx([scores.scores[0][order.index(t.text)] for t in row.neg])
    assert (
        list(mined(rows, scores, pool, 3, skipped_ranks=0))[0].neg_scores == ()
    )  # the new ones have none of that kind
    assert list(mined(rows, scores, pool, 1, skipped_ranks=0))[0] == rows[0]


def test_the_command_mines_by_bm25_and_by_a_model(checkpoint: Path, tmp_path: Path) -> None:
    words = ("river", "city", "code", "word", "capital", "France")
    rows = [
        {"query": ["find", f"the {w} {n}"], "pos": [f"the {w} number {n} is here"]} for n, w in enumerate(words * 3)
    ]
    file = write(tmp_path / "rows.jsonl", *rows)
    mine([str(file), str(tmp_path / "bm25.jsonl"), "--negatives", "2"])
    options = ["--negatives", "2", "--model", str(checkpoint), "--scores", "--max-length", "32"]
    mine([str(file), str(tmp_path / "model.jsonl"), *options])
    more = write(tmp_path / "more.jsonl", {"title": "the river", "text": "and more 1"})
    mine([str(file), str(tmp_path / "more_rows.jsonl"), "--negatives", "9", "--corpus", str(more), "--skip", "0"])
    assert '"the river and more 1"' in (tmp_path / "more_rows.jsonl").read_text()
    for name in ("bm25", "model"):
        found = read_embedding(tmp_path / f"{name}.jsonl")
        assert [row.query for row in found] == [row.query for row in read_embedding(file)]
        assert all(len(row.neg) == 2 and not set(row.neg) & set(row.pos) for row in found)
        assert all(len(row.neg_scores) == (2 if name == "model" else 0) for row in found)
    # a passage is as similar as its best chunk
    mine([str(file), str(tmp_path / "chunks.jsonl"), *options, "--chunk-tokens", "4"])
    model = GritLM(checkpoint, device="cpu", mode="embedding")
    for row in read_embedding(tmp_path / "chunks.jsonl"):
        query = embed_queries(model, [row.query])
        for passage, score in zip([*row.pos, *row.neg], [*row.pos_scores, *row.neg_scores], strict=True):
            parts = chunk(Document("p", passage.text), model.tokenizer, 4)
            similar = query @ embed_documents(model, [part.text for part in parts]).T
            assert len(parts) > 1 and score == pytest.approx(float(similar.max()), abs=1e-5)
    with pytest.raises(SystemExit, match="--chunk-tokens: expected --model beside it, got none"):
        mine([str(file), str(tmp_path / "x.jsonl"), "--chunk-tokens", "4"])
    with pytest.raises(SystemExit, match="margin: expected a number > 0"):
        mine([str(file), str(tmp_path / "x.jsonl"), "--margin", "1.5"])
