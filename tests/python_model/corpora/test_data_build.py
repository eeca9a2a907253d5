"""grit data: mining negatives, keeping training and test apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from python_model.commands.data import COMMAND as grit_data
from python_model.corpora import build as build_module
from python_model.corpora import tasks
from python_model.corpora.build import Builder, build
from python_model.corpora.hard_negatives import BM25, SCORE_CAP, mine_negatives
from python_model.corpora.sources import packages
from python_model.corpora.split import held_out
from python_model.corpora.tasks import Dialogue, Material, Pair, QuestionRow, Source
from python_model.data.datasets import open_file
from python_model.evaluation.held_out import HeldOut

SIZES = {"negatives": 3, "percent": 20, "max_rows": 1000, "test_rows": 10, "corpus_rows": 30}


def mined(queries: list[str], passages: list[str], count: int, *allowed: Any, **options: Any) -> list[list[int]]:
    own = options.pop("positives", [[i] for i in range(len(queries))])
    rows = mine_negatives(BM25(queries, passages), own, len(passages), count, *allowed, **options)
    return [chosen for chosen, _ in rows]


words = st.lists(st.sampled_from("red green blue fast slow round flat".split()), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=6, max_size=20), st.integers(1, 4))
def test_negatives_are_other_passages_that_are_allowed(texts: list[tuple[str, str]], count: int) -> None:
    queries, passages = [q for q, _ in texts], [p for _, p in texts]

    def allowed(i: int, j: int) -> bool:
        return (i + j) % 5 != 0

    found = mined(queries, passages, count, allowed)
    assert found == mined(queries, passages, count, allowed)
    for i, chosen in enumerate(found):
        possible = [j for j in range(len(passages)) if j != i and allowed(i, j)]
        assert len(chosen) == len(set(chosen)) == min(count, len(possible))
        assert set(chosen) <= set(possible)


def test_negatives_share_words_but_score_below_the_answer() -> None:
    import bm25s

    passages = [f"kernel number {i} for " + "attention " * (i % 7 + 1) + f"on machine {i % 3}" for i in range(40)]
    queries = [f"attention kernel number {i} machine {i % 3}" for i in range(40)]
    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index([p.lower().split() for p in passages], show_progress=False)
    for i, chosen in enumerate(mined(queries, passages, 4)):
        scores = index.get_scores(queries[i].split())
        assert all(0 < scores[j] <= SCORE_CAP * scores[i] for j in chosen)


def test_missing_negatives_are_spread_over_the_passages() -> None:
    words = [f"word{n}" for n in range(13)]
    assert mined(words[:2], words, 2) == [[5, 10], [6, 11]]
    assert mined(["none"] * 2, words, 3, positives=[[12], [4]]) == [[3, 7, 11], [8, 12, 3]]


def test_too_few_passages_are_refused() -> None:
    with pytest.raises(ValueError, match="passages: expected .*got 3"):
        mined(["a"] * 3, ["a", "b", "c"], 3)


def material(neighbours: tasks.Neighbours | None = None) -> Material:
    pairs = [Pair(f"thing:{i}", f"query {i} word{i % 9}", f"passage {i} word{i % 9} text") for i in range(150)]
    pairs += [Pair("thing:0", "QUERY 0 word0", "another passage"), Pair("thing:1", "other", "PASSAGE 1 word1 text")]
    dialogues = [Dialogue(f"thing:{i}", (f"what is {i}?", f"answer {i}")) for i in range(150)]
    questions = [QuestionRow(f"thing:{i}", f"which {i}?", (f"answer {i}",)) for i in range(150)]
    return Material({"foldoc": pairs}, {"answers": dialogues}, questions, {"kit": "0" * 64}, neighbours)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build_module, "SOURCES", {"things": Source(lambda cache: material(), "free")})
    build(tmp_path / "data", ["things"], tmp_path / "cache", **SIZES)
    return tmp_path / "data"


def test_an_entity_is_on_one_side_of_the_split_in_every_file(built: Path) -> None:
    train = {row["key"] for path in (built / "train").glob("*.jsonl") for row in rows(path)}
    test = {row["key"] for path in (built / "test").glob("*.jsonl") for row in rows(path)}
    test |= {row["key"] for row in rows(built / "corpus.jsonl")}
    assert train and test and not train & test
    assert all(held_out(key, 20) for key in test) and not any(held_out(key, 20) for key in train)
    searched = {row["text"] for row in rows(built / "corpus.jsonl")}
    for row in rows(built / "train" / "foldoc.jsonl"):
        assert not searched & {text for _, text in (*row["pos"], *row["neg"])}


def test_a_repeated_query_or_passage_is_left_out_and_counted(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["repetitions_left_out"]["foldoc"] == 2
    files = [built / "train" / "foldoc.jsonl", built / "test" / "embedding.jsonl"]
    queries = [row["query"][1].lower() for path in files for row in rows(path)]
    assert len(queries) == len(set(queries))


def test_what_is_built_can_be_trained_on_and_evaluated(built: Path) -> None:
    for path in (built / "train").glob("*.jsonl"):
        datasets, report = open_file(path)
        assert [d.name for d in datasets] == [path.stem] and not report.left_out
    held = HeldOut(built)
    assert len(held.queries) == 10 and len(held.conversations) == 10 and len(held.documents) == 30
    for row in rows(built / "test" / "embedding.jsonl"):
        assert len(row["neg"]) == 3
        assert {text for _, text in row["neg"]} <= set(held.documents)


def test_the_same_sources_give_the_same_bytes(built: Path) -> None:
    again = built.with_name("again")
    build(again, ["things"], built, **SIZES)
    for path in built.rglob("*"):
        if path.is_file() and path.name != "train.yaml":  # it names its folder
            assert path.read_bytes() == (again / path.relative_to(built)).read_bytes()
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["sources"] == {"things": {"licence": "free", "sha256": {"kit": "0" * 64}}}
    for name, facts in manifest["files"].items():
        content = (built / name).read_bytes()
        assert facts == {"rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}


def test_negatives_that_a_source_knows_come_first_and_never_cross_the_split() -> None:
    def neighbours(keys: set[str]) -> Any:
        def near(pair: Pair) -> list[str]:
            number = int("".join(filter(str.isdigit, pair.key)))
            return [p.passage for p in material().pairs["foldoc"] if p.key in (f"thing:{number + 1}", "thing:7")]

        return near

    builder = Builder(**SIZES)
    builder.add(material(neighbours))
    train = builder.files["train/foldoc.jsonl"]
    passages = {row["key"]: row["pos"][0][1] for row in train}
    for row in train:
        following = f"thing:{int(''.join(filter(str.isdigit, row['key']))) + 1}"
        known = [passages[key] for key in sorted({following, "thing:7"}) if key in passages and key != row["key"]]
        negatives = [text for _, text in row["neg"]]
        assert set(known) <= set(negatives[: len(known)]) and set(negatives) <= set(passages.values())
        assert len(negatives) == 3 and row["pos"][0][1] not in negatives


def test_no_negative_is_of_the_answers_group() -> None:
    pairs = [Pair(f"thing:{i}", f"red {i}", f"red passage {i}", f"group {i % 2}" if i < 60 else "") for i in range(90)]
    builder = Builder(**SIZES)
    builder.add(Material({"foldoc": pairs}))
    groups = {pair.passage: pair.group for pair in pairs}
    rows = [row for name in ("train/foldoc.jsonl", "test/embedding.jsonl") for row in builder.files[name]]
    found = [(groups[row["pos"][0][1]], {groups[text] for _, text in row["neg"]}) for row in rows]
    assert len({own for own, _ in found}) == 3
    assert all(len(row["neg"]) == 3 for row in rows) and not any(own and own in others for own, others in found)


def test_weights_are_those_of_the_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"recipe": 40, "python_reply": 9, "foldoc_answer": 25}
    dialogues = {
        name: [Dialogue(f"{name}:{i}", (f"what is {i}?", "answer " * size)) for i in range(150)]
        for name, size in sizes.items()
    }
    monkeypatch.setattr(
        build_module, "SOURCES", {"things": Source(lambda cache: Material(dialogues=dialogues), "free")}
    )
    build(tmp_path / "data", ["things"], tmp_path / "cache", **SIZES)
    files = {path.stem: path.read_text() for path in (tmp_path / "data" / "train").glob("*.jsonl")}
    assert files.keys() == sizes.keys()
    weights = tasks.dataset_weights({name: len(text) for name, text in files.items()})
    settings = (tmp_path / "data" / "train.yaml").read_text().splitlines()
    assert all(f"    {name}: {weight}" in settings for name, weight in weights.items()) and len(weights) == 3


def test_weights_bring_the_shares_of_tokens() -> None:
    characters = {"wikipedia_answer": 9000, "recipe": 500, "debian_summary": 700, "wordnet_sentence": 300, "other": 5}
    weights = tasks.dataset_weights(characters)
    assert max(weights.values()) == 1.0 and "other" not in weights and "foldoc_answer" not in weights
    tokens = {name: weights[name] * characters[name] for name in weights}
    assert tokens["recipe"] / tokens["wikipedia_answer"] == pytest.approx(0.5, rel=0.01)
    lines = tokens["debian_summary"] + tokens["wordnet_sentence"]
    assert lines / tokens["wikipedia_answer"] == pytest.approx(1 / 6, rel=0.01)
    assert weights["wikipedia_answer"] == 0.1111 and weights["debian_summary"] == 0.1667, "four digits"


@pytest.mark.parametrize("name", ["negatives", "held-out", "max-rows", "test-rows", "corpus-rows"])
def test_the_numbers_of_the_command_begin_at_1(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit, match=f"{name}: expected 1 .*, got 0"):
        grit_data([str(tmp_path), f"--{name}", "0"])
    with pytest.raises(SystemExit, match="output: .* exists"):  # the next check
        grit_data([str(tmp_path), f"--{name}", "1"])
    with pytest.raises(SystemExit, match="held-out: expected 1 to 50, got 51"):
        grit_data([str(tmp_path), "--held-out", "51"])


def test_bad_options_and_missing_packages_are_named_and_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="negatives: expected .*, got 0"):
        grit_data([str(tmp_path / "data"), "--negatives", "0"])
    with pytest.raises(SystemExit, match="held-out: expected .*, got 60"):
        grit_data([str(tmp_path / "data"), "--held-out", "60"])
    with pytest.raises(SystemExit, match="exists; choose another folder or pass --overwrite"):
        grit_data([str(tmp_path)])
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="foldoc: it is a Debian package, and this machine has no apt-get"):
        grit_data([str(tmp_path / "data"), "--sources", "foldoc"])
    assert not (tmp_path / "data").exists()


def test_the_command_writes_settings_that_train(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from python_model.commands.train import COMMAND as grit_train

    target = built.with_name("written")
    grit_data([str(target), "--sources", "things", "--json", "--held-out", "20", "--negatives", "2"])
    assert json.loads(capsys.readouterr().out)["settings"]["percent"] == 20
    config = grit_train.arguments(["--config", str(target / "train.yaml")])
    assert config.data.train_data == str(target / "train") and config.data.dataset_weights == {}
