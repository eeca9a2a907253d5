"""No prompt and reply go beyond the positions that a model was made for: they are refused with their lengths and the limit."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MptConfig

from python_model import GritLM
from python_model.commands.generate import COMMAND
from python_model.data.rows import GenerativeRow
from python_model.evaluation.language import next_token_loss
from python_model.generate.rerank import rerank
from python_model.generate.text import answer_file, complete, conversation_ids, replies, reply
from python_model.model.limits import max_positions, stretched_positions, warn_beyond_positions

LIMIT = 512
TOO_MUCH = "river " * 1000
PROMPT = [[7] * (LIMIT - 9)]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, device="cpu", dtype="float32")


@pytest.mark.parametrize("beams", [1, 2])
def test_a_prompt_and_its_reply_fill_the_positions_and_no_more(model: GritLM, beams: int) -> None:
    complete(model, PROMPT, max_new_tokens=9, num_beams=beams)
    message = r"prompt: expected prompt and reply within the model's 512 tokens, got 503 and 10 new ones$"
    with pytest.raises(ValueError, match=message):
        complete(model, PROMPT, max_new_tokens=10, num_beams=beams)
    # and padding in front of a shorter prompt takes no position
    complete(model, [*PROMPT, [7]], max_new_tokens=9, num_beams=beams)


@pytest.mark.parametrize(
    "answer",
    [
        lambda model: reply(model, [TOO_MUCH]),
        lambda model: replies(model, [["What?"], [TOO_MUCH]], batch_size=1),
        lambda model: model.generate(torch.full((1, 510), 7), max_new_tokens=3),
        lambda model: model.generate(input_ids=torch.full((1, 513), 7)),
        lambda model: rerank(model, TOO_MUCH, ["a"], method="pointwise"),
        lambda model: rerank(model, TOO_MUCH, ["a", "b"], method="listwise"),
    ],
)
def test_what_writes_or_scores_replies_refuses_more(model: GritLM, answer: Callable[[GritLM], Any]) -> None:
    with pytest.raises(
        ValueError, match=r"prompt: expected prompt and reply within the model's 512 tokens, got \d+ and"
    ):
        answer(model)


def test_padding_is_no_position_for_generate(model: GritLM) -> None:
    ids = torch.full((1, 600), 7)
    mask = (torch.arange(600) >= 500).long()[None]
    assert model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0).shape[1] <= 602


def test_a_file_with_a_prompt_that_is_too_long_is_refused_before_the_first_answer(
    model: GritLM, tmp_path: Path
) -> None:
    rows, target = tmp_path / "rows.jsonl", tmp_path / "replies.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": text}) for text in ("What?", TOO_MUCH)))
    length = len(conversation_ids(model, [TOO_MUCH]))
    with pytest.raises(ValueError, match=rf"got {length} and 3 new ones \(prompt 1\)"):
        answer_file(model, rows, target, batch_size=1, max_new_tokens=3)
    assert not target.exists()


def test_the_command_names_prompt_reply_and_limit(checkpoint: Path) -> None:
    with pytest.raises(
        SystemExit, match="grit generate: prompt: expected prompt and reply within the model's 512 .*600 new"
    ):
        COMMAND(["--model", str(checkpoint), "--device", "cpu", "--prompt", "What?", "--max-new-tokens", "600"])


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 4.0}, 128),  # which says nothing of the positions before
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_the_limit_is_the_one_after_rotary_scaling(scaling: dict[str, Any], limit: int) -> None:
    config = LlamaConfig(max_position_embeddings=128, rope_parameters={"rope_theta": 10000.0, **scaling})
    assert stretched_positions(config) == limit


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_positions=128),  # attribute_map
        MptConfig(max_seq_len=128),  # none
        SimpleNamespace(max_position_embeddings=None, n_ctx=128),  # of a model's own code
    ],
)
def test_a_limit_may_have_another_name(config: Any) -> None:
    assert stretched_positions(config) == max_positions(config) == 128


def test_a_model_without_a_limit_has_none() -> None:
    assert stretched_positions(object()) == 2**31 - 1


def scaled(checkpoint: Path, folder: Path, positions: int | None, **scaling: Any) -> GritLM:
    """The tiny Mistral with another number of positions and another rotary scaling."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": positions, "rope_parameters": {"rope_theta": 10000.0, **scaling}}
    (folder / "config.json").write_text(json.dumps(config))
    return GritLM(folder, device="cpu", dtype="float32")


def test_a_text_beyond_the_positions_is_embedded_whole_with_one_warning_for_a_model(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = scaled(checkpoint, tmp_path / "a", 32, rope_type="default")
    long = "A river flows through the city. " * 10
    length = len(model.formatter.text("", long, 512))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode("A river.")
        model.encode(long, max_length=32)  # cut there
    with pytest.warns(UserWarning, match=f"max_length: a text of {length} tokens goes beyond the 32 positions") as told:
        model.encode([long, long])
        model.encode(long)
    assert len(told) == 1 and told[0].filename == __file__
    other = scaled(checkpoint, tmp_path / "b", 32, rope_type="default")
    with pytest.warns(UserWarning, match="goes beyond the 32 positions"):
        next_token_loss(other, [GenerativeRow(("What?", long))], max_length=512)


@pytest.mark.parametrize(
    ("positions", "scaling"),
    [
        (512, {"rope_type": "default"}),
        (32, {"rope_type": "yarn", "factor": 8.0}),
        (32, {"rope_type": "dynamic", "factor": 8.0}),
    ],
)
def test_there_is_no_warning_where_the_positions_reach(
    checkpoint: Path, tmp_path: Path, positions: int, scaling: dict[str, Any]
) -> None:
    model = scaled(checkpoint, tmp_path / "a", positions, **scaling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode("A river flows through the city. " * 10)
        without_limit = SimpleNamespace(model=SimpleNamespace(config=object()))
        warn_beyond_positions(without_limit, [2**30])
