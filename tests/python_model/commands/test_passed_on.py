"""What a command's options set: each of them reaches the function that does the work, which is replaced here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from python_model.commands import evaluate, export, generate, index, mine, rag, rerank, serve
from python_model.generate.decode import Sampling
from python_model.generate.rerank import Ranked

Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
Replace = Callable[..., None]


@pytest.fixture
def calls() -> Calls:
    """The arguments of every replaced function that was called, by its name."""
    return {}


@pytest.fixture
def replace(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Replace ``module.function`` by one that notes its arguments and returns ``result``."""

    def replaced(path: str, result: Any = None) -> None:
        def note(*arguments: Any, **options: Any) -> Any:
            calls[path.rpartition(".")[2]] = arguments, options
            return result

        monkeypatch.setattr(path, note)

    return replaced


def run(command: Any, *words: str) -> None:
    command.run(command.arguments(words))


MODEL = SimpleNamespace(texts_cut=0, formatter=SimpleNamespace(embed_instruction=lambda text: f"<{text}>"))


def test_generate_answers_a_file_under_its_options(calls: Calls, replace: Replace, capsys: Any) -> None:
    replace("python_model.commands.generate.load", MODEL)
    replace("python_model.generate.text.answer_file", 3)
    sampling = ("--temperature", "0.5", "--top-k", "7", "--top-p", "0.9")
    sampling += ("--frequency-penalty", "0.25", "--presence-penalty=-1")
    reply = ("--max-new-tokens", "9", "--beams", "2", "--stop", "a", "--stop", "b", "--seed", "4")
    form = ("--format", "template", "--system", "Be brief", "--batch-size", "5")
    run(generate.COMMAND, "--input", "in.jsonl", "--output", "out.jsonl", *sampling, *reply, *form)
    (model, *files), options = calls["answer_file"]
    assert model is MODEL and [str(file) for file in files] == ["in.jsonl", "out.jsonl"]
    assert callable(options.pop("progress"))
    assert options == {
        "batch_size": 5,
        "max_new_tokens": 9,
        "sampling": Sampling(0.5, 7, 0.9, 0.25, -1.0),
        "num_beams": 2,
        "stop": ["a", "b"],
        "seed": 4,
        "format": "template",
        "system": "Be brief",
    }
    assert calls["load"][1] == {"mode": "generative"}
    assert capsys.readouterr().out == "3 rows answered in out.jsonl\n"


@pytest.mark.parametrize("option", ["--input", "--output"])
def test_generate_refuses_a_file_to_read_without_one_to_write_and_the_reverse(option: str) -> None:
    with pytest.raises(ValueError, match="--input, --output: expected both or none, got one"):
        run(generate.COMMAND, option, "rows.jsonl")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (
            generate,
            ["--prompt", "a", "--input", "b", "--output", "c"],
            "--prompt, --input: expected at most one of them",
        ),
        (
            rag,
            ["INDEX", "--question", "a", "--questions", "b"],
            "--question, --questions: expected at most one of them",
        ),
        (index, ["INDEX", "--delete", "*", "--where", "year<=2000"], "--where: expected --search beside it, got none"),
        (index, ["INDEX", "--add", "a", "--hybrid"], "--hybrid: expected --search beside it"),
        (index, ["INDEX", "--add", "a", "--instruction", "b"], "--instruction: expected --search beside it"),
        (index, ["INDEX", "--k", "3"], "--k: expected --search beside it"),
        (index, ["INDEX", "--search", "a", "--store", "b"], "--store: expected --add beside it"),
        (index, ["INDEX", "--search", "a", "--chunk-tokens", "64"], "--chunk-tokens: expected --add beside it"),
        (index, ["INDEX", "--shards", "a", "--overlap", "8"], "--overlap: expected --add beside it"),
        (mine, ["a", "b", "--max-length", "64"], "--max-length: expected --model beside it"),
        (generate, ["--prompt", "a", "--top-k", "7"], "--top-k: expected --temperature beside it"),
        (generate, ["--prompt", "a", "--top-p", "0.9"], "--top-p: expected --temperature beside it"),
        (
            rag,
            ["INDEX", "--questions", "a", "--calibrate", "--mode", "none"],
            "--mode: expected no --calibrate beside it",
        ),
        (rag, ["INDEX", "--mode", "none", "--hybrid"], "--hybrid: expected no --mode none beside it"),
        (rag, ["INDEX", "--mode", "none", "--where", "a=1"], "--where: expected no --mode none beside it"),
        (rag, ["INDEX", "--mode", "none", "--instruction", "a"], "--instruction: expected no --mode none beside it"),
        (rag, ["INDEX", "--mode", "none", "--k", "2"], "--k: expected no --mode none beside it"),
        (evaluate, ["--max-new-tokens", "8"], "--max-new-tokens: expected --questions beside it"),
        (index, ["INDEX", "--add", "a", "--store-format", "int8"], "--store-format: expected --store beside it"),
        (index, ["INDEX", "--add", "a", "--store-limit", "3"], "--store-limit: expected --store beside it"),
        (mine, ["a", "b", "--model", "c", "--overlap", "3"], "--overlap: expected --chunk-tokens beside it"),
        (mine, ["a", "b", "--chunk-tokens", "8"], "--chunk-tokens: expected --model beside it"),
        (serve, ["--replicas", "2"], "--replicas: expected --ray beside it"),
        (serve, ["--requests-per-replica", "3"], "--requests-per-replica: expected --ray beside it"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(command: Any, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        run(command.COMMAND, *words)


def test_two_indexes_of_one_name_are_refused() -> None:
    assert serve._by_name("--index", ["a/x", "y=b/x"]) == {"x": "a/x", "y": "b/x"}
    with pytest.raises(ValueError, match="^--index: expected a name for each, got 'x' for a/x and b/x"):
        serve.add_indexes(None, ["a/x", "b/x"], [], "")
    with pytest.raises(ValueError, match="^--store: expected a name for each, got 'x' for c and d"):
        serve.add_indexes(None, ["a/x"], ["x=c", "x=d"], "")


def test_rag_answers_under_its_options(calls: Calls, replace: Replace, capsys: Any) -> None:
    answers: list[Any] = []

    def answer(text: str, **options: Any) -> Any:
        answers.append((text, options))
        return SimpleNamespace(
            text="Paris", mode="query_first", documents=[SimpleNamespace(location=n) for n in ("a, 1", "b")]
        )

    replace("python_model.commands.rag.load", MODEL)
    replace("python_model.rag.answer.open_store", "store")
    replace("python_model.rag.index.open_index", "index")
    replace("python_model.rag.answer.RAG", SimpleNamespace(answer=answer))
    states = ("--store", "s", "--keep", "0.5", "--causal-states", "--recompute", "3", "--recompute-share", "0.25")
    search = ("--instruction", "Find", "--hybrid", "--where", "source=a", "--k", "2", "--mode", "query_first")
    run(rag.COMMAND, "i", *states, *search, "--max-new-tokens", "6", "--question", "Which?")
    (path, model), options = calls["open_store"]
    assert (str(path), model) == ("s", MODEL)
    assert options == {"causal_states": True, "max_bytes": 2**29, "when_full": "drop_unused"}
    (path, model), options = calls["open_index"]
    assert (str(path), model, options) == ("i", MODEL, {"create": False})
    (model,), options = calls["RAG"]
    assert model is MODEL and options.pop("where") is not None
    assert options == {
        "index": "index",
        "store": "store",
        "causal_states": True,
        "recompute": 3,
        "recompute_share": 0.25,
        "query_prefix": "<Find>",
        "keep_read": True,
        "hybrid": True,
    }
    assert answers == [("Which?", {"mode": "query_first", "k": 2, "max_new_tokens": 6})]
    assert capsys.readouterr().out == "Paris    [query_first] [1] a, 1  [2] b\n"


def test_rag_without_a_store_keeps_nothing(calls: Calls, replace: Replace) -> None:
    replace("python_model.commands.rag.load", MODEL)
    replace("python_model.rag.index.open_index", "index")
    answer = SimpleNamespace(text="", mode="none", documents=[])
    replace("python_model.rag.answer.RAG", SimpleNamespace(answer=lambda text, **options: answer))
    run(rag.COMMAND, "i", "--question", "Which?")
    options = calls["RAG"][1]
    assert options["store"] is None and options["keep_read"] is False and not options["causal_states"]
    for words in (("--keep", "1"), ("--keep", "0", "--store", "s")):
        with pytest.raises(ValueError, match="--keep: expected --store and a number of GiB above 0"):
            run(rag.COMMAND, "i", "--question", "Which?", *words)
    with pytest.raises(ValueError, match="--calibrate: expected --questions with answers, got none"):
        run(rag.COMMAND, "i", "--calibrate")


def test_rerank_ranks_under_its_options(calls: Calls, replace: Replace, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "passages.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n{"text": "third"}\n')
    replace("python_model.commands.rerank.load", MODEL)
    replace("python_model.generate.rerank.rerank", [Ranked(2, 0.5), Ranked(0, 0.25), Ranked(1, -1.0)])
    options = ("--method", "pointwise", "--passage-tokens", "8", "--top", "2")
    run(rerank.COMMAND, "--query", "q", "--passages", str(tmp_path / "passages.jsonl"), *options)
    given = (MODEL, "q", ["first", "second", "third"])
    assert calls["rerank"] == (given, {"method": "pointwise", "passage_tokens": 8})
    assert capsys.readouterr().out == "   0.500  [2] third\n   0.250  [0] first\n"


def test_export_writes_under_its_options(calls: Calls, replace: Replace, capsys: Any) -> None:
    replace("python_model.commands.export.load", MODEL)
    replace("python_model.model.export.export_sentence_transformers", "made")
    replace("python_model.model.server_export.export_for_server", "made")
    replace("python_model.model.server_export.commands", ["serve it"])
    run(export.COMMAND, "f", "--max-length", "8", "--packed")
    (model, folder), options = calls["export_sentence_transformers"]
    assert (model, str(folder), options) == (MODEL, "f", {"max_length": 8, "packed": True})
    assert calls["load"][1] == {"dtype": "auto"}, "an export changes no weight"
    assert "truncates texts to --max-length 8 tokens and does not say so" in (printed := capsys.readouterr()).err
    assert printed.out == "made\n"
    run(export.COMMAND, "f", "--for", "vllm", "--max-length", "8", "--pool-instruction")
    (model, folder, target), options = calls["export_for_server"]
    assert (model, str(folder), target, options) == (MODEL, "f", "vllm", {"max_length": 8, "pool_instruction": True})
    assert calls["commands"] == ((MODEL, "made", "vllm", 8), {})
    assert capsys.readouterr() == ("made\nserve it\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "gguf", "--packed"], "packed: expected with --for sentence-transformers, got --for gguf"),
        (["--pool-instruction"], "pool-instruction: expected with --for vllm or gguf, got --for sentence-transformers"),
    ],
)
def test_export_refuses_an_option_of_another_target(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(export.COMMAND, "f", *words)


def test_mine_chooses_under_its_options(calls: Calls, replace: Replace, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "pos": ["p"]}\n')
    replace("python_model.commands.mine.load", MODEL)
    replace("python_model.commands.mine.Embeddings", "scorer")
    replace("python_model.commands.mine.mined", [])
    options = ("--negatives", "3", "--margin", "0.5", "--skip", "1", "--scores", "--model", "m", "--max-length", "7")
    with pytest.raises(ValueError, match="zip"):  # a row is missing in what is made up here
        run(mine.COMMAND, str(rows), str(tmp_path / "out.jsonl"), *options)
    (given, scorer, _, count), options_given = calls["mined"]
    assert ([row.query.text for row in given], scorer, count) == (["q"], "scorer", 3)
    assert options_given == {"margin": 0.5, "skipped_ranks": 1, "scores": True}
    (model, _, passages), limit = calls["Embeddings"]
    assert (model, passages, limit) == (MODEL, ["p"], {"max_length": 7, "owners": None})
    assert calls["load"][1] == {"mode": "embedding"} and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("cut", [1, 3])
def test_eval_and_mine_say_how_many_texts_they_cut(
    calls: Calls, replace: Replace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, cut: int
) -> None:
    def computes(*arguments: Any, **options: Any) -> dict[str, Any]:
        model.texts_cut = cut
        return {}

    model = SimpleNamespace(texts_cut=0)
    said = "1 text is" if cut == 1 else "3 texts are"
    monkeypatch.setattr("python_model.commands.evaluate.load", lambda *arguments, **options: model)
    monkeypatch.setattr("python_model.commands.evaluate.measure", computes)
    run(evaluate.COMMAND, "--model", "m", "--max-length", "9")
    assert f"grit eval: {said} longer than --max-length 9 tokens" in (err := capsys.readouterr().err)
    assert "(--chunk-tokens splits documents instead)" in err
    model.texts_cut = 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "pos": ["p"]}\n')
    monkeypatch.setattr("python_model.commands.mine.load", lambda *arguments, **options: model)
    monkeypatch.setattr("python_model.commands.mine.Embeddings", computes)
    monkeypatch.setattr("python_model.commands.mine.mined", lambda rows, *arguments, **options: rows)
    run(mine.COMMAND, str(rows), str(tmp_path / "out.jsonl"), "--model", "m", "--max-length", "9")
    assert f"grit mine: {said} longer than --max-length 9 tokens" in (err := capsys.readouterr().err)
    assert "(--chunk-tokens splits passages instead)" in err


@pytest.mark.parametrize(
    ("option", "bad", "good"), [("--negatives", "0", "1"), ("--skip", "-1", "0"), ("--margin", "0", "1")]
)
def test_mine_refuses_numbers_outside_their_range(tmp_path: Path, option: str, bad: str, good: str) -> None:
    empty = tmp_path / "rows.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match=f"{option[2:]}: expected .* got {bad}"):
        run(mine.COMMAND, str(empty), "out.jsonl", option, bad)
    with pytest.raises(ValueError, match="input: expected rows with a query, got none"):
        run(mine.COMMAND, str(empty), "out.jsonl", option, good)
