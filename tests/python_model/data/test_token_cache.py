"""The token cache gives what the tokenizer would, and belongs to what determines the ids."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from python_model.data.encoding import RowEncoder
from python_model.data.rows import GenerativeRow, PlainText
from python_model.data.token_cache import _encode, tokenizer_fingerprint
from python_model.settings import GritSettings
from tests.python_model.data.streams import config_of, stream_of


def test_cached_samples_are_those_that_were_encoded(tokenizer: Any, tmp_path: Path) -> None:
    for changes in (
        {},
        {"attn": "bbbc"},
        {"attn": "bbil", "format": "zephyr"},
        {"generative_max_len": 40, "max_left_out": 0.5},
    ):
        plain = stream_of(config_of(**changes), tokenizer)
        cached = stream_of(config_of(token_cache=str(tmp_path / "tokens"), **changes), tokenizer)
        again = stream_of(config_of(token_cache=str(tmp_path / "tokens"), **changes), tokenizer)
        expected = [plain[step] for step in range(3)]
        assert [cached[step] for step in range(3)] == expected == [again[step] for step in range(3)]
        first, second = cached.encoder.cache, again.encoder.cache
        assert first is not None and second is not None
        assert first.misses > 0 == second.misses and second.hits == first.hits + first.misses


def test_cached_documents_are_those_that_were_encoded(tokenizer: Any, tmp_path: Path) -> None:
    documents = ("A river flows.", "a city", "x")
    rows = [GenerativeRow(("say " * n, "hi"), documents=documents[: n % 4]) for n in range(1, 9)]
    file = str(tmp_path / "tokens")
    for attn, share in (("bbcc", 0.0), ("bbcc", 0.5), ("cccc", 0.0)):
        settings, changes = GritSettings(attn=attn), {"causal_documents": share}
        plain = [RowEncoder(tokenizer, config_of(**changes).data, settings).conversation(row) for row in rows]
        assert {len(s.documents.lengths) if s.documents else 0 for s in plain} == {0, 1, 2, 3}
        for _ in range(2):
            encoder = RowEncoder(tokenizer, config_of(token_cache=file, **changes).data, settings)
            assert [encoder.conversation(row) for row in rows] == plain
            encoder.flush()
            cache = encoder.cache
        assert cache is not None and (cache.hits, cache.misses) == (len(rows), 0)
        for broken in (_encode(plain[2])[:-4], _encode(plain[2])[4:]):
            cache._new[b"x"] = broken
            with pytest.raises(ValueError, match="token_cache: .*tokens holds a broken entry; delete the file"):
                cache.get(b"x")


def test_cached_texts_without_an_instruction_have_the_default_prompt_of_the_model(
    tokenizer: Any, tmp_path: Path
) -> None:
    config, text = config_of(token_cache=str(tmp_path / "tokens")).data, PlainText("", "a river")
    found = []
    for prompts in ({}, {"q": "query: "}, {"q": "passage: "}):
        settings = GritSettings(prompts=prompts, default_prompt_name="q" if prompts else None)
        encoder = RowEncoder(tokenizer, config, settings)
        found.append(encoder.text(text, 64))
        encoder.flush()
        assert found[-1] == RowEncoder(tokenizer, config_of().data, settings).text(text, 64)
    assert found[0] != found[1] != found[2]


def test_a_file_that_is_no_token_cache_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("something else" * 100)
    with pytest.raises(ValueError, match="token_cache: cannot use .*tokens .*delete it or name another"):
        stream_of(config_of(token_cache=str(file)), tokenizer)[0]


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
