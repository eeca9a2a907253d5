"""The samples of a step are a function of settings, data and step: for any workers, ranks and starting point."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_model.data import sample_dir
from python_model.data.encoding import RowEncoder
from python_model.data.reading import read_rows
from python_model.data.rows import DataError, EmbeddingRow, GenerativeRow, InstructedText, PlainText
from python_model.data.stream import StepSamples, TrainingStream, check_data, open_stream
from python_model.data.token_cache import tokenizer_fingerprint
from python_model.model.few_shot import few_shot_instruction
from python_model.model.prompts import IGNORE_INDEX, TooLong, embed_instruction, encode_text
from python_model.settings import GritSettings
from python_model.train.config import TrainConfig
from tests.python_model.training_config import make_config

WORDS = ["river", "city", "code", "word", "capital", "France", "space", "line"]
TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(
    lambda s: s.strip() != ""
)
RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def config_of(**changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "train_data": str(sample_dir() / "train"),
        "embedding_batch_size": 8,
        "generative_batch_size": 3,
        "query_max_len": 192,
        "passage_max_len": 256,
        "generative_max_len": 256,
    }
    return make_config(**{**options, **changes})


def _open(config: TrainConfig, tokenizer: Any, rank: int = 0, world: int = 1) -> TrainingStream:
    return open_stream(
        config.data,
        config.batch,
        tokenizer,
        settings=GritSettings().changed(**config.settings_given),
        mode=config.mode,
        in_batch_negatives=config.losses.in_batch_negatives,
        seed=config.seed,
        rank=rank,
        world=world,
    )


def _check(config: TrainConfig) -> None:
    check_data(config.data, config.mode, in_batch_negatives=config.losses.in_batch_negatives)


def folder_of(folder: Path, **files: list[dict[str, Any]]) -> str:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def query(number: int, dataset: str = "", negatives: int = 3) -> dict[str, Any]:
    return {
        "query": ["Find the text", f"{dataset} query {number}"],
        "pos": [["", f"{dataset} positive {number} {n}"] for n in range(2)],
        "neg": [["", f"{dataset} negative {number} {n}"] for n in range(negatives)],
    }


def decoded(tokenizer: Any, samples: list[Any]) -> list[str]:
    return [tokenizer.decode(s.input_ids[1:], clean_up_tokenization_spaces=False) for s in samples]


@pytest.fixture(scope="module")
def stream(tokenizer: Any) -> TrainingStream:
    return _open(config_of(), tokenizer)


def test_any_step_can_be_asked_for_first(stream: TrainingStream, tokenizer: Any) -> None:
    expected = list(stream.steps(0, 6))
    again = _open(config_of(), tokenizer)
    assert list(again.steps(4, 6)) == expected[4:]
    assert again[2] == expected[2]
    assert _open(config_of(seed=1), tokenizer)[0] != expected[0]


def test_workers_change_neither_samples_nor_the_random_state_and_fill_the_cache(
    stream: TrainingStream, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.sqlite"
    other = _open(config_of(data_workers=2, token_cache=str(file)), tokenizer)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = list(other.steps(1, 6))
    assert found == list(stream.steps(1, 6))
    assert torch.equal(torch.get_rng_state(), before)
    # what two processes wrote, a third finds
    third = _open(config_of(token_cache=str(file)), tokenizer)
    assert list(third.steps(1, 6)) == found
    assert third.encoder.cache is not None and third.encoder.cache.misses == 0 < third.encoder.cache.hits


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_step(stream: TrainingStream, tokenizer: Any, world: int) -> None:
    parts = [_open(config_of(), tokenizer, rank, world)[5] for rank in range(world)]
    together = StepSamples()
    for part in parts:
        for name, values in vars(part).items():
            getattr(together, name).extend(values)
    assert together == stream[5]


def test_only_rank_0_reports(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _open(config_of(), tokenizer, 1, 2)
    assert capsys.readouterr().out == ""
    _open(config_of(), tokenizer)
    assert capsys.readouterr().out.startswith("data: 930 rows (")


def test_texts_of_a_step_are_those_of_its_rows(stream: TrainingStream, tokenizer: Any) -> None:
    embedding, generative = read_rows(sample_dir() / "train")
    rows = {row.origin: row for row in (*embedding, *generative)}
    samples = stream[3]
    assert len(samples.queries) == 8 and len(samples.passages) == 16 and len(samples.conversations) == 3
    for place, origin in enumerate(samples.query_origins):
        row: Any = rows[origin]
        texts = decoded(tokenizer, [samples.queries[place], *samples.passages[2 * place : 2 * place + 2]])
        assert (embed_instruction(row.query.instruction) + row.query.text).startswith(texts[0])
        for text, accepted in ((texts[1], row.pos), (texts[2], row.neg)):
            assert any((embed_instruction(i) + t).startswith(text) for i, t in accepted)
    for sample, origin in zip(samples.conversations, samples.conversation_origins, strict=True):
        assert decoded(tokenizer, [sample])[0].startswith(f"<|user|>\n{rows[origin].turns[0][:40]}")  # type: ignore[union-attr]


def test_batches_of_texts_to_embed_keep_to_a_data_set(stream: TrainingStream, tokenizer: Any) -> None:
    steps = [_datasets(stream, step) for step in range(40)]
    assert len(set().union(*steps)) > 1
    assert sum(len(datasets) > 1 for datasets in steps) <= 3  # the left-overs
    mixed = _open(config_of(same_dataset=False), tokenizer)
    assert sum(len(_datasets(mixed, step)) > 1 for step in range(40)) > 20


def _datasets(stream: TrainingStream, step: int) -> set[int]:
    assert stream._embedding_order is not None
    return {dataset for dataset, _ in stream._embedding_order.batch(step)}


def test_passages_are_one_positive_and_different_negatives(tokenizer: Any, tmp_path: Path) -> None:
    data = folder_of(tmp_path, a=[query(n) for n in range(6)])
    config = config_of(train_data=data, mode="embedding", embedding_batch_size=6, train_group_size=4)
    stream = _open(config, tokenizer)
    positives = set()
    for step in range(12):
        samples = stream[step]
        texts = [text.removeprefix("<|embed|>\n").split() for text in decoded(tokenizer, samples.passages)]
        for place, origin in enumerate(samples.query_origins):
            group = texts[4 * place : 4 * place + 4]
            number = str(int(origin.split(":")[-1]) - 1)
            assert [kind for kind, _, _ in group] == ["positive", "negative", "negative", "negative"]
            assert {n for _, n, _ in group} == {number}
            assert {last for kind, _, last in group[1:]} == {"0", "1", "2"}
            positives.add((number, group[0][2]))
        assert len(set(samples.passage_ids)) == 24 and samples.query_ids == samples.passage_ids[::4]
    assert len(positives) == 12  # both positives of every row are drawn


def test_a_short_list_of_negatives_is_repeated(tokenizer: Any, tmp_path: Path) -> None:
    data = folder_of(tmp_path, a=[query(0, negatives=2)])
    config = config_of(train_data=data, mode="embedding", embedding_batch_size=1, train_group_size=6)
    texts = decoded(tokenizer, _open(config, tokenizer)[0].passages)
    assert len(texts) == 6 and len(set(texts[1:])) == 2 and texts[1:].count(texts[1]) in (2, 3)


def test_identical_positives_and_identical_queries_share_an_id(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"query": "same", "pos": ["one"], "neg": ["n"]},
        {"query": "same", "pos": ["two"], "neg": ["n"]},
        {"query": "third", "pos": ["two"], "neg": ["one"]},
        {"query": "fourth", "pos": ["four"], "neg": ["m"]},
    ]
    config = config_of(train_data=folder_of(tmp_path, a=rows), mode="embedding", embedding_batch_size=4)
    samples = _open(config, tokenizer)[0]
    by_line = {
        int(origin.split(":")[-1]): (samples.query_ids[i], *samples.passage_ids[2 * i : 2 * i + 2])
        for i, origin in enumerate(samples.query_origins)
    }
    shared = by_line[1][0]
    assert by_line[1][:2] == by_line[2][:2] == by_line[3][:2] == (shared, shared)
    assert by_line[3][2] == shared  # the text of a positive, drawn as a negative
    assert by_line[1][2] == by_line[2][2] != shared
    assert len({shared, by_line[1][2], by_line[4][0], by_line[4][2]}) == 4


def test_with_each_every_positive_is_the_target_once_per_epoch(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "pos": [f"p{n}.{k}" for k in range(n)], "neg": [f"n{n}"]} for n in range(1, 5)]
    data = folder_of(tmp_path, a=rows)
    stream = _open(config_of(train_data=data, mode="embedding", embedding_batch_size=5, positives="each"), tokenizer)
    steps = [stream[step] for step in range(2)]
    targets = [text for samples in steps for text in decoded(tokenizer, samples.passages)[::2]]
    assert sorted(text.split("\n")[-1] for text in targets) == sorted(text for row in rows for text in row["pos"])
    # another positive of the same query is no negative
    for samples in steps:
        ids = dict(zip(samples.query_origins, samples.query_ids, strict=True))
        assert [ids[origin] for origin in samples.query_origins] == samples.query_ids == samples.passage_ids[::2]
    drawn = _open(config_of(train_data=data, mode="embedding", embedding_batch_size=4), tokenizer)[0]
    assert len(set(drawn.query_origins)) == 4


def test_samples_say_which_data_set_they_are_of(tokenizer: Any, tmp_path: Path) -> None:
    talks = [{"text": [f"say {n}", "done"], "dataset": "chat"} for n in range(4)]
    data = folder_of(tmp_path, a=[query(n, "a") for n in range(4)], b=[query(n, "b") for n in range(4)], t=talks)
    stream = _open(config_of(train_data=data, embedding_batch_size=4, generative_batch_size=2), tokenizer)
    assert stream.datasets == ["a", "b", "chat"]
    for step in range(2):
        samples = stream[step]
        names = [Path(origin.split(":")[0]).stem for origin in samples.query_origins]
        assert [stream.datasets[number] for number in samples.query_datasets] == names
        assert samples.conversation_datasets == [2, 2]


def test_a_teacher_without_scores_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    config = config_of(train_data=folder_of(tmp_path, a=[query(n) for n in range(4)]), mode="embedding")
    options: dict[str, Any] = {"settings": GritSettings(), "mode": "embedding", "teacher": True}
    with pytest.raises(ValueError, match="losses.distillation_weight: expected 0, for no row of .* has pos_scores"):
        open_stream(config.data, config.batch, tokenizer, **options)
    rows = [query(0), {**query(1), "pos_scores": [2.0, 2.5], "neg_scores": [0.5, 1.0, 1.5]}]
    config = config_of(train_data=folder_of(tmp_path, a=rows), mode="embedding", embedding_batch_size=2)
    stream = open_stream(config.data, config.batch, tokenizer, **options)
    assert "1 rows have a teacher's scores" in stream.report.notes
    samples = stream[0]
    place = next(i for i, origin in enumerate(samples.query_origins) if origin.endswith(":2"))
    assert samples.passage_scores[2 * place] in (2.0, 2.5) and samples.passage_scores[2 * place + 1] in (0.5, 1.0, 1.5)
    assert samples.passage_scores[2 * (1 - place)] is None


def test_weights_and_limits_change_how_often_rows_come(tokenizer: Any, tmp_path: Path) -> None:
    data = folder_of(tmp_path, a=[query(n, "a") for n in range(8)], b=[query(n, "b") for n in range(8)])

    def counts(**changes: Any) -> dict[str, int]:
        stream = _open(config_of(train_data=data, mode="embedding", embedding_batch_size=4, **changes), tokenizer)
        rows = stream._embedding_order.rows if stream._embedding_order else 0
        origins = [origin for step in range(rows // 4) for origin in stream[step].query_origins]
        return {name: sum(f"{name}.jsonl" in origin for origin in origins) for name in "ab"}

    assert counts() == {"a": 8, "b": 8}
    assert counts(dataset_weights={"a": 2.0, "b": 0.5}) == {"a": 16, "b": 4}
    assert counts(dataset_weights={"a": 0}) == {"a": 0, "b": 8}
    assert counts(max_rows_per_dataset=4) == {"a": 4, "b": 4}
    with pytest.raises(ValueError, match="dataset_weights: expected names from .*, got 'c'"):
        counts(dataset_weights={"c": 1.0})
    with pytest.raises(ValueError, match="which leave no embedding rows"):
        counts(dataset_weights={"a": 0, "b": 0})


def test_a_few_shot_instruction_shows_another_row_of_the_data_set(tokenizer: Any, tmp_path: Path) -> None:
    data = folder_of(tmp_path, a=[query(n) for n in range(4)])
    options = {
        "train_data": data,
        "mode": "embedding",
        "embedding_batch_size": 4,
        "few_shot": 1.0,
        "query_max_len": 512,
    }
    config = config_of(**options)
    samples = _open(config, tokenizer)[0]
    for text, origin in zip(decoded(tokenizer, samples.queries), samples.query_origins, strict=True):
        mine = int(origin.split(":")[-1]) - 1
        accepted = [
            embed_instruction(few_shot_instruction("Find the text", f" query {n}", f" positive {n} {p}"))
            for n in range(4)
            for p in range(2)
            if n != mine
        ]
        assert text.removesuffix(f" query {mine}") in accepted
    assert all(text.startswith("<|embed|>\n") for text in decoded(tokenizer, samples.passages))  # empty ones stay empty
    # where the example does not fit, the row goes without
    plain = _open(config_of(**{**options, "query_max_len": 64}), tokenizer)[0]
    assert all("For example" not in text for text in decoded(tokenizer, plain.queries))
    share = _open(config_of(**{**options, "few_shot": 0.5}), tokenizer)
    shown = ["For example" in text for step in range(25) for text in decoded(tokenizer, share[step].queries)]
    assert 30 <= sum(shown) <= 70


def test_bare_strings_have_the_format_without_an_instruction(tokenizer: Any, tmp_path: Path) -> None:
    data = folder_of(
        tmp_path,
        e=[{"query": "a river", "pos": ["the city"], "neg": [["", "code"]]}],
        g=[{"text": "A river flows through the city."}],
    )
    options = {"train_data": data, "embedding_batch_size": 1, "generative_batch_size": 1, "embed_eos": "</e>"}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ours = _open(config_of(**options), tokenizer)[0]
    assert ours.queries[0].input_ids == [bos, *ids("<|embed|>\na river"), *ids("</e>")]
    talk = ours.conversations[0]
    assert talk.input_ids == [bos, *ids("A river flows through the city."), eos]
    assert talk.labels == [*talk.input_ids[1:], IGNORE_INDEX]


def test_rows_that_cannot_be_trained_on_are_reported(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {**query(0), "query": ["word " * 60, "text"]}
    long_passage = {**query(0), "neg": [["word " * 80, "text"]]}
    data = folder_of(
        tmp_path,
        e=[query(0), long, long_passage, {**query(0), "neg": []}, {**query(0), "query": ["i", " "]}],
        g=[{"text": ["word " * 80, "reply"]}, {"text": ["q", "word " * 200]}, {"text": ["only a question"]}],
    )
    options = {"query_max_len": 48, "passage_max_len": 64, "generative_max_len": 64}
    config = config_of(train_data=data, embedding_batch_size=1, generative_batch_size=1, max_left_out=0.9, **options)
    stream = _open(config, tokenizer)
    assert stream.report.used == {"e": 1, "g": 1}
    assert stream.report.left_out == {"too long": 3, "no negatives": 1, "empty": 1, "broken": 1}
    too_long = stream.report.examples["too long"]
    assert [what.split(": ")[0] for what in too_long] == [f"{data}/e.jsonl:2", f"{data}/e.jsonl:3", f"{data}/g.jsonl:1"]
    assert "max_length: expected" in too_long[0] and "got 48" in too_long[0]
    printed = capsys.readouterr().out
    assert "left out, no negatives: 1 row(s)" in printed and f"{data}/e.jsonl:4: neg" in printed
    assert stream[0].conversations[0].truncated
    # without hard negatives the row without them is fine
    pairs = _open(
        config_of(train_data=data, train_group_size=1, mode="embedding", max_left_out=0.9, **options), tokenizer
    )
    assert pairs.report.used == {"e": 3} and len(pairs[0].passages) == len(pairs[0].queries)


@pytest.mark.parametrize(("mode", "missing"), [("embedding", "generative"), ("generative", "embedding")])
def test_a_mode_reads_only_its_kind(tokenizer: Any, mode: str, missing: str) -> None:
    stream = _open(config_of(mode=mode), tokenizer)
    samples = stream[0]
    assert bool(samples.queries) == (mode == "embedding") and bool(samples.conversations) == (mode == "generative")
    file = str(sample_dir() / "train" / f"{missing}.jsonl")
    with pytest.raises(ValueError, match=f"has no {mode} rows, which mode '{mode}' needs"):
        _open(config_of(mode=mode, train_data=file), tokenizer)


def test_the_variant_reaches_the_conversations(tokenizer: Any) -> None:
    assert all(s.bidirectional is None for s in _open(config_of(), tokenizer)[0].conversations)
    for attn in ("bbbc", "bbil"):
        talks = _open(config_of(attn=attn), tokenizer)[0].conversations
        assert all(s.bidirectional is not None and any(s.bidirectional) for s in talks)
    zephyr = _open(config_of(format="zephyr"), tokenizer)[0]
    assert all(s.input_ids.count(tokenizer.eos_token_id) >= 2 for s in zephyr.conversations)
    assert all(s.input_ids.count(tokenizer.eos_token_id) == 1 for s in zephyr.queries)


@RELAXED
@given(
    instruction=st.one_of(st.just(""), TEXTS, st.just("<|user|>" * 7)),
    text=TEXTS,
    first=TEXTS,
    limit=st.integers(20, 90),
    zephyr=st.booleans(),
)
def test_a_row_without_a_problem_can_be_encoded_and_one_with_cannot(
    tokenizer: Any, instruction: str, text: str, first: str, limit: int, zephyr: bool
) -> None:
    """The check may stop at the length in bytes, so it must never let a row through that fails later."""
    limits = dict.fromkeys(("query_max_len", "passage_max_len", "generative_max_len"), limit)
    encoder = RowEncoder(tokenizer, config_of(**limits).data, GritSettings(format="zephyr" if zephyr else "grit"))
    row = EmbeddingRow(InstructedText(instruction, text), (PlainText("", text),), (PlainText("", text),))
    talk = GenerativeRow((first * 2, text))
    for problem, encode in (
        (encoder.problem(row), lambda: (encoder.text(row.query, limit), encoder.text(row.pos[0], limit))),
        (encoder.problem(talk), lambda: encoder.conversation(talk)),
    ):
        if problem is None:
            encode()
        else:
            assert problem[0] == "too long"
            with pytest.raises(TooLong):
                encode()


def test_an_end_of_text_survives_truncation(tokenizer: Any, tmp_path: Path) -> None:
    row = {"query": ["Find", "river " * 200], "pos": [["", "city " * 600]], "neg": [["", "code"]]}
    config = config_of(
        train_data=folder_of(tmp_path, a=[row]), mode="embedding", embedding_batch_size=1, embed_eos="</e>"
    )
    samples = _open(config, tokenizer)[0]
    tail = tokenizer("</e>", add_special_tokens=False)["input_ids"]
    for sample in (*samples.queries, *samples.passages):
        assert sample.input_ids[-len(tail) :] == tail
    assert [s.truncated for s in (*samples.queries, *samples.passages)] == [True, True, False]


def test_cached_samples_are_those_that_were_encoded(tokenizer: Any, tmp_path: Path) -> None:
    for changes in (
        {},
        {"attn": "bbbc"},
        {"attn": "bbil", "format": "zephyr"},
        {"generative_max_len": 40, "max_left_out": 0.5},
    ):
        plain = _open(config_of(**changes), tokenizer)
        cached = _open(config_of(token_cache=str(tmp_path / "tokens"), **changes), tokenizer)
        again = _open(config_of(token_cache=str(tmp_path / "tokens"), **changes), tokenizer)
        expected = [plain[step] for step in range(3)]
        assert [cached[step] for step in range(3)] == expected == [again[step] for step in range(3)]
        first, second = cached.encoder.cache, again.encoder.cache
        assert first is not None and second is not None
        assert first.misses > 0 == second.misses and second.hits == first.hits + first.misses


def test_a_file_that_is_no_token_cache_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("something else" * 100)
    with pytest.raises(ValueError, match="token_cache: cannot use .*tokens .*delete it or name another"):
        _open(config_of(token_cache=str(file)), tokenizer)[0]


def test_errors_about_a_row_name_its_line(tokenizer: Any, tmp_path: Path) -> None:
    rows = [EmbeddingRow(InstructedText("word " * 100, "t"), (PlainText("", "p"),), origin="memory:7")]
    config = config_of(mode="embedding", train_group_size=1, embedding_batch_size=1, query_max_len=32)
    with pytest.raises(ValueError, match="memory:7: max_length: expected .*got 32"):
        TrainingStream([rows], RowEncoder(tokenizer, config.data), config.data, config.batch, mode=config.mode)[0]
    assert encode_text(tokenizer, "", "t", 8).instruction_len == 0


def test_a_run_stops_before_a_model_is_loaded_where_its_rows_cannot_be_used(tmp_path: Path) -> None:
    good, chat = query(0), {"text": ["q", "a"]}
    bare = {"query": "q", "pos": ["p"]}
    many = [query(n) for n in range(9)]
    folders = {name: tmp_path / name for name in ("chats", "broken", "few", "kind", "typo")}
    for folder in folders.values():
        folder.mkdir()
    folder_of(folders["chats"], e=[good])
    with pytest.raises(
        ValueError, match="no generative rows, which mode 'unified' needs; mode 'embedding' trains without"
    ):
        _check(config_of(train_data=str(folders["chats"])))
    folder_of(folders["broken"], e=[*many, {"query": "q", "pos": "p"}, {"query": "q"}], g=[chat])
    with pytest.raises(
        DataError, match=r"e.jsonl: 2 of 11 rows cannot be used, more than max_left_out \(0.1\)(.|\n)*:10: pos"
    ):
        _check(config_of(train_data=str(folders["broken"])))
    _check(config_of(train_data=str(folders["broken"]), max_left_out=0.2))
    _check(config_of(train_data=str(folders["broken"]), mode="generative"))  # the file is not read then
    folder_of(folders["few"], e_no_in_batch_neg=[good], g=[chat])
    with pytest.raises(DataError, match="no_in_batch_neg"):
        _check(config_of(train_data=str(folders["few"])))
    _check(config_of(train_data=str(folders["few"]), in_batch_negatives=False))
    folder_of(folders["typo"], wikipedia=[good], g=[chat])
    with pytest.raises(ValueError, match="got 'wikipdia'; did you mean 'wikipedia'"):
        _check(config_of(train_data=str(folders["typo"]), dataset_weights={"wikipdia": 1.0}))
    folder_of(folders["kind"], e=[bare], g=[chat])
    _check(config_of(train_data=str(folders["kind"]), train_group_size=1))


def test_rows_without_negatives_name_the_setting_and_the_command(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, e=[{"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["s"], "neg": None}], empty=[])
    with pytest.raises(DataError, match=r"train_group_size 1 (.|\n)*grit mine .*e.jsonl"):
        _open(config_of(train_data=folder, mode="embedding"), tokenizer)
    stream = _open(config_of(train_data=folder, mode="embedding", train_group_size=1), tokenizer)
    assert len(stream[0].passages) == 8
    printed = capsys.readouterr().out
    assert "empty.jsonl: no rows" in printed and "2 embedding rows are fewer than a batch of 8" in printed


def test_a_digest_is_that_of_the_contents_wherever_the_files_are(tokenizer: Any, tmp_path: Path) -> None:
    digests = []
    for name, rows in (("one", [query(0)]), ("same", [query(0)]), ("other", [query(1)])):
        (tmp_path / name).mkdir()
        folder = folder_of(tmp_path / name, e=rows, g=[{"text": ["q", name]}])
        digests.append(_open(config_of(train_data=folder, mode="embedding"), tokenizer).digest)
    assert digests[0] == digests[1] != digests[2]  # the chats are not read in this mode


def test_a_teachers_scores_come_with_the_passages_they_belong_to(tokenizer: Any, tmp_path: Path) -> None:
    row = {**query(0), "pos_scores": [10.0, 11.0], "neg_scores": [0.0, 1.0, 2.0]}
    folder = folder_of(tmp_path, e=[row, query(1)])
    config = config_of(train_data=folder, mode="embedding", train_group_size=3, embedding_batch_size=2)
    for step in range(6):
        samples = _open(config, tokenizer)[step]
        texts = decoded(tokenizer, samples.passages)
        for text, score in zip(texts, samples.passage_scores, strict=True):
            kind, row_number, number = text.split()[-3:]
            expected = None if row_number == "1" else float(number) + 10 * (kind == "positive")
            assert score == expected


def test_a_rank_reads_its_own_rows_and_those_whose_query_is_repeated(tokenizer: Any, tmp_path: Path) -> None:
    rows = [query(n) for n in range(30)] + [{**query(3), "pos": [["", "another positive 3 9"]]}]
    config = config_of(train_data=folder_of(tmp_path, e=rows), mode="embedding", embedding_batch_size=31)
    whole = _open(config, tokenizer)[0]
    joined = [_open(config, tokenizer, rank, 4) for rank in range(4)]
    for stream in joined:
        read: list[int] = []
        (data,) = stream._embedding
        load = data.__class__.__getitem__
        data.__class__ = type(
            "Counted", (data.__class__,), {"__getitem__": lambda s, i, r=read, load=load: r.append(i) or load(s, i)}
        )
        stream[0]
        assert len(set(read)) <= 8 + 2 < 31
    parts = [stream[0] for stream in joined]
    assert [n for part in parts for n in part.passage_ids] == whole.passage_ids
    assert [n for part in parts for n in part.query_ids] == whole.query_ids
    ids = {origin: number for origin, number in zip(whole.query_origins, whole.query_ids, strict=True)}
    assert len(set(ids.values())) == 30 and ids[f"{tmp_path}/e.jsonl:4"] == ids[f"{tmp_path}/e.jsonl:31"]


def test_cached_tokens_belong_to_what_determines_the_ids_and_to_nothing_else(tokenizer: Any) -> None:
    """A call with padding and truncation leaves both in the tokenizer's state; the next run must find its texts all the same."""
    other = copy.deepcopy(tokenizer)
    before = tokenizer_fingerprint(other)
    other(["a text", "a text that is longer"], padding="max_length", truncation=True, max_length=5)
    assert json.loads(other.backend_tokenizer.to_str())["truncation"] is not None
    assert tokenizer_fingerprint(other) == before
    other.bos_token = "</s>"
    assert tokenizer_fingerprint(other) != before
    other.bos_token = "<s>"
    assert tokenizer_fingerprint(other) == before
    other.add_tokens(["capital of"])
    assert tokenizer_fingerprint(other) != before
