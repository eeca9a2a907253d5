"""The samples of a step are a function of settings, data and step: for any workers, ranks and starting point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from python_model.data import sample_dir
from python_model.data.reading import read_rows
from python_model.data.stream import StepSamples, TrainingStream
from python_model.model.few_shot import few_shot_instruction
from python_model.model.prompts import IGNORE_INDEX, embed_instruction
from tests.python_model.data.streams import config_of, decoded, folder_of, query, stream_of


@pytest.fixture(scope="module")
def stream(tokenizer: Any) -> TrainingStream:
    return stream_of(config_of(), tokenizer)


def test_any_step_can_be_asked_for_first(stream: TrainingStream, tokenizer: Any) -> None:
    expected = list(stream.steps(0, 6))
    again = stream_of(config_of(), tokenizer)
    assert list(again.steps(4, 6)) == expected[4:]
    assert again[2] == expected[2]
    assert stream_of(config_of(seed=1), tokenizer)[0] != expected[0]


def test_workers_change_neither_samples_nor_the_random_state_and_fill_the_cache(
    stream: TrainingStream, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.sqlite"
    other = stream_of(config_of(data_workers=2, token_cache=str(file)), tokenizer)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = list(other.steps(1, 6))
    assert found == list(stream.steps(1, 6))
    assert torch.equal(torch.get_rng_state(), before)
    # what two processes wrote, a third finds
    third = stream_of(config_of(token_cache=str(file)), tokenizer)
    assert list(third.steps(1, 6)) == found
    assert third.encoder.cache is not None and third.encoder.cache.misses == 0 < third.encoder.cache.hits


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_step(stream: TrainingStream, tokenizer: Any, world: int) -> None:
    parts = [stream_of(config_of(), tokenizer, rank, world)[5] for rank in range(world)]
    together = StepSamples()
    for part in parts:
        for name, values in vars(part).items():
            getattr(together, name).extend(values)
    assert together == stream[5]


def test_only_rank_0_reports(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stream_of(config_of(), tokenizer, 1, 2)
    assert capsys.readouterr().out == ""
    stream_of(config_of(), tokenizer)
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
    mixed = stream_of(config_of(same_dataset=False), tokenizer)
    assert sum(len(_datasets(mixed, step)) > 1 for step in range(40)) > 20


def _datasets(stream: TrainingStream, step: int) -> set[int]:
    assert stream._embedding_order is not None
    return {dataset for dataset, _ in stream._embedding_order.batch(step)}


def test_passages_are_one_positive_and_different_negatives(tokenizer: Any, tmp_path: Path) -> None:
    data = folder_of(tmp_path, a=[query(n) for n in range(6)])
    config = config_of(train_data=data, mode="embedding", embedding_batch_size=6, train_group_size=4)
    stream = stream_of(config, tokenizer)
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
    texts = decoded(tokenizer, stream_of(config, tokenizer)[0].passages)
    assert len(texts) == 6 and len(set(texts[1:])) == 2 and texts[1:].count(texts[1]) in (2, 3)


def test_identical_positives_and_identical_queries_share_an_id(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"query": "same", "pos": ["one"], "neg": ["n"]},
        {"query": "same", "pos": ["two"], "neg": ["n"]},
        {"query": "third", "pos": ["two"], "neg": ["one"]},
        {"query": "fourth", "pos": ["four"], "neg": ["m"]},
    ]
    config = config_of(train_data=folder_of(tmp_path, a=rows), mode="embedding", embedding_batch_size=4)
    samples = stream_of(config, tokenizer)[0]
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
    stream = stream_of(
        config_of(train_data=data, mode="embedding", embedding_batch_size=5, positives="each"), tokenizer
    )
    steps = [stream[step] for step in range(2)]
    targets = [text for samples in steps for text in decoded(tokenizer, samples.passages)[::2]]
    assert sorted(text.split("\n")[-1] for text in targets) == sorted(text for row in rows for text in row["pos"])
    # another positive of the same query is no negative
    for samples in steps:
        ids = dict(zip(samples.query_origins, samples.query_ids, strict=True))
        assert [ids[origin] for origin in samples.query_origins] == samples.query_ids == samples.passage_ids[::2]
    drawn = stream_of(config_of(train_data=data, mode="embedding", embedding_batch_size=4), tokenizer)[0]
    assert len(set(drawn.query_origins)) == 4


def test_samples_say_which_data_set_they_are_of(tokenizer: Any, tmp_path: Path) -> None:
    talks = [{"text": [f"say {n}", "done"], "dataset": "chat"} for n in range(4)]
    data = folder_of(tmp_path, a=[query(n, "a") for n in range(4)], b=[query(n, "b") for n in range(4)], t=talks)
    stream = stream_of(config_of(train_data=data, embedding_batch_size=4, generative_batch_size=2), tokenizer)
    assert stream.datasets == ["a", "b", "chat"]
    for step in range(2):
        samples = stream[step]
        names = [Path(origin.split(":")[0]).stem for origin in samples.query_origins]
        assert [stream.datasets[number] for number in samples.query_datasets] == names
        assert samples.conversation_datasets == [2, 2]


def test_weights_and_limits_change_how_often_rows_come(tokenizer: Any, tmp_path: Path) -> None:
    data = folder_of(tmp_path, a=[query(n, "a") for n in range(8)], b=[query(n, "b") for n in range(8)])

    def counts(**changes: Any) -> dict[str, int]:
        stream = stream_of(config_of(train_data=data, mode="embedding", embedding_batch_size=4, **changes), tokenizer)
        rows = stream._embedding_order.rows if stream._embedding_order else 0
        origins = [origin for step in range(rows // 4) for origin in stream[step].query_origins]
        return {name: sum(f"{name}.jsonl" in origin for origin in origins) for name in "ab"}

    assert counts() == {"a": 8, "b": 8}
    assert counts(dataset_weights={"a": 2.0, "b": 0.5}) == {"a": 16, "b": 4}
    assert counts(dataset_weights={"a": 0}) == {"a": 0, "b": 8}
    assert counts(dataset_weights={"a": 0.01, "b": 0.375}) == {"a": 1, "b": 3}, "a data set with a weight has a row"
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
    samples = stream_of(config, tokenizer)[0]
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
    plain = stream_of(config_of(**{**options, "query_max_len": 64}), tokenizer)[0]
    assert all("For example" not in text for text in decoded(tokenizer, plain.queries))
    share = stream_of(config_of(**{**options, "few_shot": 0.5}), tokenizer)
    shown = ["For example" in text for step in range(25) for text in decoded(tokenizer, share[step].queries)]
    assert 30 <= sum(shown) <= 70


def test_no_few_shot_example_holds_the_querys_own_answer(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**query(0), "pos": [["", f"positive {n}"]]} for n in range(3)]
    options = {"mode": "embedding", "embedding_batch_size": 3, "few_shot": 1.0, "query_max_len": 512}
    stream = stream_of(config_of(train_data=folder_of(tmp_path, a=rows), **options), tokenizer)
    texts = decoded(tokenizer, [sample for step in range(4) for sample in stream[step].queries])
    assert set(texts) == {embed_instruction("Find the text") + " query 0"}


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

    ours = stream_of(config_of(**options), tokenizer)[0]
    assert ours.queries[0].input_ids == [bos, *ids("<|embed|>\na river"), *ids("</e>")]
    talk = ours.conversations[0]
    assert talk.input_ids == [bos, *ids("A river flows through the city."), eos]
    assert talk.labels == [*talk.input_ids[1:], IGNORE_INDEX]


def test_the_variant_reaches_the_conversations(tokenizer: Any) -> None:
    assert all(s.bidirectional is None for s in stream_of(config_of(), tokenizer)[0].conversations)
    for attn in ("bbbc", "bbil"):
        talks = stream_of(config_of(attn=attn), tokenizer)[0].conversations
        assert all(s.bidirectional is not None and any(s.bidirectional) for s in talks)
    zephyr = stream_of(config_of(format="zephyr"), tokenizer)[0]
    assert all(s.input_ids.count(tokenizer.eos_token_id) >= 2 for s in zephyr.conversations)
    assert all(s.input_ids.count(tokenizer.eos_token_id) == 1 for s in zephyr.queries)


def test_an_end_of_text_survives_truncation(tokenizer: Any, tmp_path: Path) -> None:
    row = {"query": ["Find", "river " * 200], "pos": [["", "city " * 600]], "neg": [["", "code"]]}
    config = config_of(
        train_data=folder_of(tmp_path, a=[row]), mode="embedding", embedding_batch_size=1, embed_eos="</e>"
    )
    samples = stream_of(config, tokenizer)[0]
    tail = tokenizer("</e>", add_special_tokens=False)["input_ids"]
    for sample in (*samples.queries, *samples.passages):
        assert sample.input_ids[-len(tail) :] == tail
    assert [s.truncated for s in (*samples.queries, *samples.passages)] == [True, True, False]


def test_a_digest_is_that_of_the_contents_wherever_the_files_are(tokenizer: Any, tmp_path: Path) -> None:
    digests = []
    for name, rows in (("one", [query(0)]), ("same", [query(0)]), ("other", [query(1)])):
        (tmp_path / name).mkdir()
        folder = folder_of(tmp_path / name, e=rows, g=[{"text": ["q", name]}])
        digests.append(stream_of(config_of(train_data=folder, mode="embedding"), tokenizer).digest)
    assert digests[0] == digests[1] != digests[2]  # the chats are not read in this mode


def test_a_teachers_scores_come_with_the_passages_they_belong_to(tokenizer: Any, tmp_path: Path) -> None:
    row = {**query(0), "pos_scores": [10.0, 11.0], "neg_scores": [0.0, 1.0, 2.0]}
    folder = folder_of(tmp_path, e=[row, query(1)])
    config = config_of(train_data=folder, mode="embedding", train_group_size=3, embedding_batch_size=2)
    for step in range(6):
        samples = stream_of(config, tokenizer)[step]
        texts = decoded(tokenizer, samples.passages)
        for text, score in zip(texts, samples.passage_scores, strict=True):
            kind, row_number, number = text.split()[-3:]
            expected = None if row_number == "1" else float(number) + 10 * (kind == "positive")
            assert score == expected


def test_a_rank_reads_its_own_rows_and_those_whose_query_is_repeated(tokenizer: Any, tmp_path: Path) -> None:
    rows = [query(n) for n in range(30)] + [{**query(3), "pos": [["", "another positive 3 9"]]}]
    config = config_of(train_data=folder_of(tmp_path, e=rows), mode="embedding", embedding_batch_size=31)
    whole = stream_of(config, tokenizer)[0]
    joined = [stream_of(config, tokenizer, rank, 4) for rank in range(4)]
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
