"""Rows that a run cannot train on are found before it starts, and are reported by file and line."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from python_model.data import sample_dir
from python_model.data.encoding import RowEncoder
from python_model.data.index import _facts
from python_model.data.rows import DataError, EmbeddingRow, GenerativeRow, InstructedText, PlainText
from python_model.data.stream import TrainingStream, open_stream
from python_model.model.prompts import EncodedSample, Formatter, TooLong, encode_text
from python_model.settings import GritSettings
from python_model.train.distributed import Ranks
from python_model.train.trainer import Trainer
from tests.python_model.data.streams import check, config_of, folder_of, query, stream_of

TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(
    lambda s: s.strip() != ""
)
RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_teacher_without_scores_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    config = config_of(train_data=folder_of(tmp_path, a=[query(n) for n in range(4)]), mode="embedding")
    options: dict[str, Any] = {"settings": GritSettings(), "mode": "embedding", "teacher": True}
    with pytest.raises(ValueError, match="losses.distillation_weight: expected 0, for no row of .* has pos_scores"):
        open_stream(config.data, config.batch, tokenizer, **options)
    rows = [query(0), {**query(1), "pos_scores": [2.0, 2.5], "neg_scores": [0.5, 1.0, 1.5]}]
    config = config_of(train_data=folder_of(tmp_path, a=rows), mode="embedding", embedding_batch_size=2)
    stream = open_stream(config.data, config.batch, tokenizer, **options)
    assert "1 rows have a teacher's scores" in stream.report.notes
    unused = open_stream(config.data, config.batch, tokenizer, **{**options, "teacher": False})
    note = "1 rows have a teacher's scores, which are not used: losses.distillation_weight is 0"
    assert note in unused.report.notes
    samples = stream[0]
    place = next(i for i, origin in enumerate(samples.query_origins) if origin.endswith(":2"))
    assert samples.passage_scores[2 * place] in (2.0, 2.5) and samples.passage_scores[2 * place + 1] in (0.5, 1.0, 1.5)
    assert samples.passage_scores[2 * (1 - place)] is None


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
    stream = stream_of(config, tokenizer)
    assert stream.report.used == {"e": 1, "g": 1}
    assert stream.report.left_out == {"too long": 3, "no negatives": 1, "empty": 1, "broken": 1}
    too_long = stream.report.examples["too long"]
    assert [what.split(": ")[0] for what in too_long] == [f"{data}/e.jsonl:2", f"{data}/e.jsonl:3", f"{data}/g.jsonl:1"]
    assert "max_length: expected" in too_long[0] and "got 48" in too_long[0]
    printed = capsys.readouterr().out
    assert "left out, no negatives: 1 row(s)" in printed and f"{data}/e.jsonl:4: neg" in printed
    assert stream[0].conversations[0].truncated
    # without hard negatives the row without them is fine
    pairs = stream_of(
        config_of(train_data=data, train_group_size=1, mode="embedding", max_left_out=0.9, **options), tokenizer
    )
    assert pairs.report.used == {"e": 3} and len(pairs[0].passages) == len(pairs[0].queries)


@pytest.mark.parametrize("count", [5, 7])
def test_five_examples_of_a_reason_are_shown_and_the_others_counted(tokenizer: Any, tmp_path: Path, count: int) -> None:
    wrong: dict[str, Any] = {
        "broken": {"query": "q"},
        "empty": {**query(0), "query": ["i", " "]},
        "another kind": {"text": ["q", "r"]},
    }
    data = folder_of(tmp_path, e=[*map(query, range(4)), *(row for row in wrong.values() for _ in range(count))])
    report = stream_of(config_of(train_data=data, mode="embedding", max_left_out=0.9), tokenizer).report
    assert report.left_out == dict.fromkeys(wrong, count)
    for place, reason in enumerate(wrong):
        first = 5 + place * count
        shown = [what.split(": ")[0] for what in report.examples[reason]]
        assert shown == [f"{data}/e.jsonl:{line}" for line in range(first, first + 5)]
    assert [line for line in report.lines() if "more" in line] == (["  and 2 more"] * 3 if count == 7 else [])


@pytest.mark.parametrize(("mode", "missing"), [("embedding", "generative"), ("generative", "embedding")])
def test_a_mode_reads_only_its_kind(tokenizer: Any, mode: str, missing: str) -> None:
    stream = stream_of(config_of(mode=mode), tokenizer)
    samples = stream[0]
    assert bool(samples.queries) == (mode == "embedding") and bool(samples.conversations) == (mode == "generative")
    file = str(sample_dir() / "train" / f"{missing}.jsonl")
    with pytest.raises(ValueError, match=f"has no {mode} rows, which mode '{mode}' needs"):
        stream_of(config_of(mode=mode, train_data=file), tokenizer)


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


@pytest.mark.parametrize("instruction", ["", "Find it"])
def test_short_limits_need_no_text_but_one_for_each_instruction(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, instruction: str
) -> None:
    """As short as other tools' 32 tokens for a query, where an index of 100 million rows was tokenised whole."""
    read: list[str] = []
    text = Formatter.text

    def counted(self: Formatter, prefix: str, *arguments: Any) -> EncodedSample:
        read.append(prefix)
        return text(self, prefix, *arguments)

    monkeypatch.setattr(Formatter, "text", counted)
    limits = dict.fromkeys(("query_max_len", "passage_max_len"), 48)
    encoder = RowEncoder(tokenizer, config_of(**limits).data)
    rows = [EmbeddingRow(InstructedText(instruction, f"q {n}"), (InstructedText("", f"p {n}"),) * 2) for n in range(9)]
    facts = {name: np.full(9, len(instruction) * (name == "first")) for name in ("first", "passage")}
    assert encoder.doubtful(facts, generative=False).all() == bool(instruction)
    assert [encoder.problem(row) for row in rows] == [None] * 9
    assert len(read) == 1 + bool(instruction)
    few = RowEncoder(tokenizer, config_of(**dict.fromkeys(limits, 12)).data)
    assert few.doubtful(facts, generative=False).all()


@pytest.mark.parametrize(("query_max_len", "passage_max_len", "left_out"), [(96, 96, 2), (96, 2000, 1), (2000, 96, 1)])
def test_a_default_prompt_counts_as_the_instruction_of_a_text_without_one(
    tokenizer: Any, tmp_path: Path, query_max_len: int, passage_max_len: int, left_out: int
) -> None:
    rows = [{"query": ["i", "q"], "pos": [["i", "p"]]}, {"query": "q", "pos": [["i", "p"]]}]
    rows += [{"query": ["i", "q"], "pos": ["p"]}]
    options: dict[str, Any] = {"query_max_len": query_max_len, "passage_max_len": passage_max_len}
    options |= {"max_left_out": 0.9, "train_group_size": 1, "mode": "embedding", "embedding_batch_size": 1}
    config = config_of(train_data=folder_of(tmp_path, e=rows), **options)
    settings = GritSettings(prompts={"q": "word " * 120}, default_prompt_name="q")
    stream = open_stream(config.data, config.batch, tokenizer, settings=settings, mode="embedding")
    assert stream.report.left_out == {"too long": left_out} and stream.report.used == {"e": 3 - left_out}
    assert len(stream[0].queries) == 1


def test_rows_whose_documents_leave_no_room_are_reported(tokenizer: Any, tmp_path: Path) -> None:
    digits = "0123456789"  # a token each
    rows = [{"documents": [digits] * n, "text": ["q", "reply"]} for n in (1, 2, 6)]
    rows.append({"text": ["q", "reply"]})
    options: dict[str, Any] = {"generative_max_len": 96, "mode": "generative", "generative_batch_size": 4}
    config = config_of(train_data=folder_of(tmp_path, g=rows), max_left_out=0.5, **options)
    stream = stream_of(config, tokenizer)
    samples = stream[0].conversations
    assert stream.report.used == {"g": 3} and stream.report.left_out == {"too long": 1}
    assert "g.jsonl:3: max_length: expected room" in stream.report.examples["too long"][0]
    assert {len(s.documents.lengths) if s.documents else 0 for s in samples} == {0, 1, 2}
    encoder = RowEncoder(tokenizer, config.data, GritSettings())
    for size in range(1, 60):  # a row that its size clears can be encoded
        for count in (1, 2, 3):
            talk = GenerativeRow((digits[:1] * size, "a"), documents=(digits * 2,) * count)
            first = _facts(talk)[1]
            if not encoder.doubtful({"first": np.array([first])}, generative=True)[0]:
                encoder.conversation(talk)
    config = config_of(train_data=config.data.train_data, attn="bbil", max_left_out=0.5, **options)
    with pytest.raises(ValueError, match="documents: expected a model that reads them with one flag .* got bbil"):
        stream_of(config, tokenizer)


@pytest.mark.parametrize("part", ["start", "end", "embed_eos"])
def test_a_row_that_its_size_clears_can_be_encoded_also_beside_a_long_part(tokenizer: Any, part: str) -> None:
    limits = {"query_max_len": 200, "passage_max_len": 240, "generative_max_len": 64}
    long = "</e>" * 20
    if part != "embed_eos":
        tokenizer, long = copy.deepcopy(tokenizer), ""
        single = ["<s>"] * 60 + ["$A"] if part == "start" else ["<s>", "$A", *["</s>"] * 60]
        ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    encoder = RowEncoder(tokenizer, config_of(**limits).data, GritSettings(embed_eos=long))
    lengths = range(1, 200)
    cleared = {"query": 0, "passage": 0}
    for length in lengths:
        digits = ("0123456789" * 20)[:length]
        assert len(tokenizer(digits, add_special_tokens=False)["input_ids"]) == length
        texts = {
            "query": (InstructedText(digits, "t"), InstructedText("", "p")),
            "passage": (InstructedText("", "t"), InstructedText(digits, "p")),
        }
        for side, (asked, passage) in texts.items():
            sizes = {"first": len(asked.instruction), "passage": len(passage.instruction)}
            if not encoder.doubtful({name: np.array([size]) for name, size in sizes.items()}, generative=False)[0]:
                assert encoder.problem(EmbeddingRow(asked, (passage,), (passage,))) is None, (side, length)
                cleared[side] += 1
    assert 0 < cleared["query"] < cleared["passage"] < len(lengths)


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
    folders = {name: tmp_path / name for name in ("chats", "broken", "edge", "few", "kind", "typo")}
    for folder in folders.values():
        folder.mkdir()
    folder_of(folders["chats"], e=[good])
    with pytest.raises(
        ValueError, match="no generative rows, which mode 'unified' needs; mode 'embedding' trains without"
    ):
        check(config_of(train_data=str(folders["chats"])))
    folder_of(folders["broken"], e=[*many, {"query": "q", "pos": "p"}, {"query": "q"}], g=[chat])
    with pytest.raises(
        DataError, match=r"e.jsonl: 2 of 11 rows cannot be used, more than max_left_out \(0.1\)(.|\n)*:10: pos"
    ):
        check(config_of(train_data=str(folders["broken"])))
    check(config_of(train_data=str(folders["broken"]), max_left_out=0.2))
    folder_of(folders["edge"], e=[*many, {"query": "q"}], g=[chat])
    check(config_of(train_data=str(folders["edge"])))  # a tenth is allowed
    with pytest.raises(DataError, match=r"e.jsonl: 1 of 10 rows cannot be used, more than max_left_out \(0.09\)"):
        check(config_of(train_data=str(folders["edge"]), max_left_out=0.09))
    check(config_of(train_data=str(folders["broken"]), mode="generative"))  # the file is not read then
    folder_of(folders["few"], e_no_in_batch_neg=[good], g=[chat])
    with pytest.raises(DataError, match="no_in_batch_neg"):
        check(config_of(train_data=str(folders["few"])))
    check(config_of(train_data=str(folders["few"]), in_batch_negatives=False))
    (named := tmp_path / "sts_no_in_batch_neg").mkdir()
    folder_of(named, e=[good], g=[chat])
    with pytest.raises(DataError, match="e.jsonl: its name, or that of its folder, says no_in_batch_neg"):
        check(config_of(train_data=str(named)))
    check(config_of(train_data=str(named), in_batch_negatives=False))
    folder_of(folders["typo"], wikipedia=[good], g=[chat])
    with pytest.raises(ValueError, match="got 'wikipdia'; did you mean 'wikipedia'"):
        check(config_of(train_data=str(folders["typo"]), dataset_weights={"wikipdia": 1.0}))
    folder_of(folders["kind"], e=[bare], g=[chat])
    check(config_of(train_data=str(folders["kind"]), train_group_size=1))


def test_rows_without_negatives_name_the_setting_and_the_command(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, e=[{"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["s"], "neg": None}], empty=[])
    with pytest.raises(DataError, match=r"train_group_size 1 (.|\n)*grit mine .*e.jsonl"):
        stream_of(config_of(train_data=folder, mode="embedding"), tokenizer)
    stream = stream_of(config_of(train_data=folder, mode="embedding", train_group_size=1), tokenizer)
    assert len(stream[0].passages) == 8
    printed = capsys.readouterr().out
    assert "empty.jsonl: no rows" in printed and "2 embedding rows are fewer than a batch of 8" in printed


@pytest.mark.parametrize("rank", [0, 1])
def test_odd_data_are_named_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    folder = folder_of(tmp_path, e=[{"query": "q", "pos": ["p", "s"]}], empty=[])
    for positives, size, few in (
        ("draw", 2, True),
        ("draw", 1, False),
        ("each", 2, False),  # two positives are two rows of a batch of two
    ):
        config = config_of(
            train_data=folder, mode="embedding", train_group_size=1, positives=positives, embedding_batch_size=size
        )
        config = replace(config, model=replace(config.model, name=str(tmp_path / "missing")))
        with pytest.raises(FileNotFoundError, match="missing"):
            Trainer.from_config(config, Ranks(rank, size, torch.device("cpu")))
        printed = capsys.readouterr().out
        assert ("empty.jsonl: no rows" in printed) == (rank == 0)
        assert ("1 embedding rows are fewer than a batch of 2" in printed) == (few and rank == 0)
        assert few or "fewer than a batch" not in printed
