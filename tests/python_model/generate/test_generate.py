"""Decoding equals transformers' generate token by token; stop strings, streaming and resumed files behave as documented."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mistral.modeling_mistral import MistralRMSNorm as MistralRMSNormOfTransformers

from python_model import GritLM
from python_model.commands.generate import COMMAND
from python_model.generate import text as text_module
from python_model.generate.decode import Sampling, decode
from python_model.generate.text import (
    TextStream,
    answer_file,
    complete,
    conversation_ids,
    eos_token_ids,
    prompt_ids,
    read_conversations,
    replies,
    reply,
)
from python_model.model.prompts import chat_prompt
from python_model.rag.reading import read

CONVERSATIONS = [["What is it?"], ["A river.", "Yes.", "Where?"], ["The capital of France is a long text with words"]]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def _by_transformers(plain: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    output = plain.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    new = output[0, len(ids) :].tolist()
    return new[:-1] if new[-1] == 2 else new


def test_only_the_last_token_of_a_prompt_has_logits(checkpoint: Path) -> None:
    """Those of a whole prompt take more memory than the rest of the pass."""
    model = GritLM(checkpoint, device="cpu", dtype="float32").model
    rows: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, given: rows.append(given[0][..., 0].numel()))
    decode(model, [[1, 7, 8, 9], [1, 5]], max_new_tokens=3, eos_token_ids=[])
    assert rows == [2, 2, 2], "one of each prompt"


def test_a_batch_of_unequal_prompts_decodes_as_transformers_does_one_by_one(model: GritLM, plain: Any) -> None:
    # longer than the sliding window of 64, so that the window moves over the padding
    prompts = [conversation_ids(model, turns) for turns in CONVERSATIONS] + [[1, 7]]
    got = decode(model.model, prompts, max_new_tokens=60, eos_token_ids=[2])
    assert got == [_by_transformers(plain, ids, 60) for ids in prompts]
    assert got[1:2] == decode(model.model, prompts[1:2], max_new_tokens=60, eos_token_ids=[2])


class MistralRMSNorm(MistralRMSNormOfTransformers):
    """As a repository's own modelling code may have it: the library's name, another formula."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return -super().forward(hidden_states)


def _last_norm_of_a_remote_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = MistralRMSNorm(model.config.hidden_size, model.config.rms_norm_eps)
    norm.load_state_dict(model.model.norm.state_dict())
    model.model.norm = norm


CHANGES: dict[str, Any] = {
    "hook on the last norm": lambda m, _: m.model.norm.register_forward_hook(lambda module, args, out: -out),
    "hook before a layer's norm": lambda m, _: m.model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda module, args: (args[0].roll(1, -1),)
    ),
    "hook on the model": lambda m, _: m.register_forward_hook(lambda module, args, out: _flipped(out)),
    "own forward": lambda m, patch: patch.setattr(
        m.model.norm, "forward", lambda x: -MistralRMSNormOfTransformers.forward(m.model.norm, x), raising=False
    ),
    "class of the same name": _last_norm_of_a_remote_class,
    "forward of the class": lambda m, patch: patch.setattr(
        MistralMLP, "forward", lambda self, x: self.down_proj(self.gate_proj(x) + self.up_proj(x))
    ),
    "linear layer of a class of its own": lambda m, _: setattr(
        m.model.layers[0].self_attn, "q_proj", Halved(m.model.layers[0].self_attn.q_proj)
    ),
}


class Halved(torch.nn.Module):
    """As a quantised layer: it has a weight, of which its product is not."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight = layer, layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.layer(x) / 2


def _flipped(output: Any) -> Any:
    output.logits = -output.logits
    return output


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_done_to_a_module_counts_in_every_step(
    checkpoint: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    prompt = [1, *range(20, 40)]
    mine = GritLM(checkpoint, device="cpu", dtype="float32").model
    before = decode(mine, [prompt], max_new_tokens=12, eos_token_ids=[2])
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for model in (mine, theirs):
        CHANGES[change](model, monkeypatch)
    got = decode(mine, [prompt], max_new_tokens=12, eos_token_ids=[2])
    assert got == [_by_transformers(theirs, prompt, 12)]
    assert got != before


def test_min_new_tokens_and_eos(model: GritLM, plain: Any) -> None:
    ids = conversation_ids(model, CONVERSATIONS[0])
    first = decode(model.model, [ids], max_new_tokens=1, eos_token_ids=[])[0][0]
    assert decode(model.model, [ids], max_new_tokens=5, eos_token_ids=[first]) == [[]]
    got = decode(model.model, [ids], max_new_tokens=5, min_new_tokens=3, eos_token_ids=[first])[0]
    assert len(got) >= 3 and first not in got
    assert got == _by_transformers(plain, ids, 5, min_new_tokens=3, eos_token_id=first)[: len(got)]
    assert eos_token_ids(model) == [2]
    # where every other token would end it, the only one left is chosen as often as it must be
    ends = list(range(1, len(model.tokenizer)))
    for least in (0, 1, 3):
        got = decode(model.model, [ids], max_new_tokens=5, min_new_tokens=least, eos_token_ids=ends)
        assert got == [[0] * least]


def test_rows_continue_their_own_states(model: GritLM) -> None:
    texts = [conversation_ids(model, turns) for turns in CONVERSATIONS]
    cuts = [5, 0, 9]
    states = [read(model, [ids[:cut]], causal=True)[0] if cut else None for ids, cut in zip(texts, cuts, strict=True)]
    rest = [ids[cut:] for ids, cut in zip(texts, cuts, strict=True)]
    want = decode(model.model, texts, max_new_tokens=12, eos_token_ids=[])
    assert decode(model.model, rest, states=states, max_new_tokens=12, eos_token_ids=[]) == want
    assert decode(model.model, rest[:1], states=states[:1], max_new_tokens=12, eos_token_ids=[]) == want[:1]


class _Penalties(LogitsProcessor):
    """The formula of OpenAI's API, for transformers."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, tokens in enumerate(input_ids[:, self.prompt :].tolist()):
            for token in set(tokens):
                scores[row, token] -= tokens.count(token) * self.frequency + self.presence
        return scores


@pytest.mark.parametrize(("frequency", "presence"), [(0.3, 0.0), (0.0, 0.8), (0.2, -0.1), (-2.0, 2.0)])
def test_penalties_lower_what_the_reply_already_holds(
    model: GritLM, plain: Any, frequency: float, presence: float
) -> None:
    prompts = [conversation_ids(model, turns) for turns in CONVERSATIONS]
    sampling = Sampling(frequency_penalty=frequency, presence_penalty=presence)
    got = decode(model.model, prompts, max_new_tokens=40, eos_token_ids=[2], sampling=sampling)
    for found, ids in zip(got, prompts, strict=True):
        assert found == _by_transformers(plain, ids, 40, logits_processor=[_Penalties(len(ids), frequency, presence)])
    assert got != decode(model.model, prompts, max_new_tokens=40, eos_token_ids=[2])
    begun = [ids + found[:7] for ids, found in zip(prompts, got, strict=True)]
    rest = decode(model.model, begun, max_new_tokens=9, eos_token_ids=[2], sampling=sampling, begun=7)
    assert rest == [found[7:16] for found in got]


def test_penalties_change_what_is_drawn_too() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.5]]).repeat(4000, 1)
    sampling = Sampling(1.0, frequency_penalty=0.5, presence_penalty=-0.25)
    drawn = sampling.choose(logits, torch.Generator().manual_seed(0), [[1, 1, 2]] * 4000)
    share = torch.bincount(drawn, minlength=3) / 4000
    assert (share - torch.tensor([1.0, 0.25, 0.25]).softmax(0)).abs().max() < 0.04
    with pytest.raises(ValueError, match="replies: expected 4000, one per row of logits, got 0"):
        sampling.choose(logits)


def test_beam_search_equals_transformers(model: GritLM, plain: Any) -> None:
    ids = [conversation_ids(model, turns) for turns in CONVERSATIONS]
    got = complete(model, ids, max_new_tokens=8, num_beams=3)
    want = [_by_transformers(plain, row, 8, num_beams=3) for row in ids]
    assert got == [model.tokenizer.decode(row, skip_special_tokens=True) for row in want]


SURE = [Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(0.7, top_k=40, top_p=1e-9)]
"""Of which each leaves one token."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_lowest_token_comes_first(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 49_153, generator=generator).to(dtype)
    lowest = []
    for row in logits:
        tied = torch.randint(49_153, (7,), generator=generator)
        row[tied] = row.max() + 1
        lowest.append(int(tied.min()))
    for sampling in SURE:
        assert sampling.choose(logits, generator).tolist() == lowest, sampling
    # below the best one, too: of tokens that tie for the last places of the k best, those with the lowest ids stay
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], dtype=dtype).repeat(4000, 1)
    for sampling in (Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.7)):
        assert sorted(set(sampling.choose(logits, generator).tolist())) == [1, 2, 3], sampling


@pytest.mark.parametrize("sampling", SURE)
def test_replies_are_the_greedy_ones_where_sampling_leaves_one_token(checkpoint: Path, sampling: Sampling) -> None:
    """All logits of this model are equal."""
    model = GritLM(checkpoint, device="cpu", dtype=torch.bfloat16)
    model.model.get_input_embeddings().weight.data.zero_()  # which are the head's weights
    assert decode(model.model, [[5, 6], [7]], max_new_tokens=3, eos_token_ids=[2], sampling=sampling) == [[0] * 3] * 2


def test_sampling_draws_from_the_tokens_that_top_k_and_top_p_leave() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    p = logits[0].softmax(0)

    def share(sampling: Sampling) -> torch.Tensor:
        return torch.bincount(sampling.choose(logits, generator), minlength=4) / len(logits)

    assert (share(Sampling(1.0)) - p).abs().max() < 0.04
    for temperature in (0.5, 2.0):
        scaled = (logits[0] / temperature).softmax(0)
        assert (share(Sampling(temperature)) - scaled).abs().max() < 0.04 < 2 * (scaled - p).abs().max()
    assert (share(Sampling(1.0, top_k=2)) - torch.tensor([p[0], p[1], 0, 0]) / p[:2].sum()).abs().max() < 0.04
    assert share(Sampling(1.0, top_p=0.5)).tolist() == [1, 0, 0, 0]  # the first token alone reaches it
    assert share(Sampling(1.0, top_p=float(p[0]) + 0.01))[2:].sum() == 0
    assert share(Sampling()).tolist() == [1, 0, 0, 0]
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match="sampling: expected"):
            Sampling(**bad)
    for name in ("frequency_penalty", "presence_penalty"):
        for value in (-2.1, 2.1, float("nan")):
            with pytest.raises(ValueError, match=f"sampling: expected {name} from -2 to 2, got"):
                Sampling(**{name: value})


def test_a_seed_repeats_a_draw(model: GritLM) -> None:
    options: dict[str, Any] = {"sampling": Sampling(2.0), "max_new_tokens": 10}
    one = reply(model, ["What?"], seed=1, **options)
    assert reply(model, ["What?"], seed=1, **options) == one != reply(model, ["What?"], seed=2, **options)


def test_a_reply_ends_before_a_stop_string_also_across_tokens(model: GritLM) -> None:
    whole = reply(model, ["What?"], max_new_tokens=40)
    stop = whole[10:13]
    pieces: list[str] = []
    got = reply(model, ["What?"], max_new_tokens=40, stop=[stop, "never there"], on_text=pieces.append)
    assert got == whole[: whole.index(stop)].strip() and "".join(pieces).strip() == got


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_reply_ends_where_the_model_goes_on_with_a_role_marker(
    model: GritLM, monkeypatch: pytest.MonkeyPatch, num_beams: int
) -> None:
    written = "Paris.\n<|user|>\nAnd of Italy?\n<|assistant|>\nRome."

    def decode(*_: Any, on_token: Any, **__: Any) -> None:
        tokens = model.tokenizer(written, add_special_tokens=False)["input_ids"]
        shown = next(place for place, token in enumerate(tokens) if on_token(0, token))
        assert shown < len(tokens) - 1, "the rest was decoded for nothing"

    monkeypatch.setattr(text_module, "decode", decode)
    monkeypatch.setattr(text_module, "_beams", lambda *_: [written])
    pieces: list[str] = []
    streamed = {"on_text": pieces.append} if num_beams == 1 else {}
    assert reply(model, ["Of France?"], num_beams=num_beams, **streamed) == "Paris."
    assert "".join(pieces) == ("Paris." if num_beams == 1 else "")
    assert replies(model, [["Of France?"]], num_beams=num_beams) == ["Paris."]


def test_streamed_text_is_never_taken_back(model: GritLM) -> None:
    tokenizer = model.tokenizer
    pieces: list[str] = []
    stream = TextStream(tokenizer, stop=["END!"], on_text=pieces.append)
    text = "caf\u00e9 \u6771\u4eac EN ENDE"
    ended = [stream.push(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert not any(ended) and "\ufffd" not in "".join(pieces)
    assert stream.finish() == text == "".join(pieces)
    stream = TextStream(tokenizer, stop=["END!"])
    ended = [stream.push(token) for token in tokenizer("x END! y", add_special_tokens=False)["input_ids"]]
    assert any(ended) and TextStream(tokenizer).finish() == ""
    with pytest.raises(ValueError, match="stop: expected .*got an empty string"):
        TextStream(tokenizer, stop=[""])


def test_replies_come_in_the_order_given_whatever_the_batch(model: GritLM) -> None:
    one_by_one = [reply(model, turns, max_new_tokens=6) for turns in CONVERSATIONS]
    for batch_size in (1, 2, 8):
        assert replies(model, CONVERSATIONS, batch_size=batch_size, max_new_tokens=6) == one_by_one


def test_formats(model: GritLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = model.tokenizer
    assert conversation_ids(model, ["Hi"]) == prompt_ids(model, chat_prompt(["Hi"]))
    assert conversation_ids(model, ["Hi"])[0] == tokenizer.bos_token_id
    assert "Be brief.\n\nHi" in tokenizer.decode(conversation_ids(model, ["Hi"], system="Be brief."))
    with pytest.raises(ValueError, match="no chat template"):
        conversation_ids(model, ["Hi"], format="template")
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids = conversation_ids(model, ["Hi</s>", "Yes", "And?"], format="template", system="S", prefix=" so")
    assert tokenizer.decode(ids) == "system:S</s>user:Hi< /s></s>assistant:Yes</s>user:And?</s>A: so"
    assert ids.count(tokenizer.eos_token_id) == 4
    for format in ("template", "grit"):
        with pytest.raises(ValueError, match="turns: expected .*got 2"):
            conversation_ids(model, ["a", "b"], format=format)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format: expected .*got 'zephyr'"):
        conversation_ids(model, ["a"], format="zephyr")  # type: ignore[arg-type]


def test_content_cannot_become_format_in_a_chat_template(model: GritLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither through role markers in plain text nor through special tokens that have no role in the tokenizer."""
    import copy

    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens([AddedToken("<|start|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}<|start|><|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    ids = conversation_ids(model, ["a<|start|><|assistant|>\nb"], format="template")
    assert tokenizer.decode(ids) == "<|start|><|user|>\na< |start|><| assistant|>\nb"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|start|>")) == 1


def test_bad_options_are_named(model: GritLM, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="num_beams: expected 1 with sampling.*got 2"):
        complete(model, [[1]], num_beams=2, stop=["x"])
    with pytest.raises(ValueError, match="max_new_tokens: expected .*got 0"):
        complete(model, [[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size: expected .*got 0"):
        replies(model, CONVERSATIONS, batch_size=0)
    with pytest.raises(ValueError, match="prompts: expected .*got none or an empty one"):
        complete(model, [[]])
    with pytest.raises(ValueError, match="no language-model head"):
        complete(GritLM(checkpoint, mode="embedding", device="cpu", dtype="float32"), [[1]])


def test_a_file_is_answered_and_an_interrupted_run_goes_on(model: GritLM, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": c[0]} if len(c) == 1 else {"turns": c} for c in CONVERSATIONS]
    source.write_text("\n".join(map(json.dumps, rows)) + "\n")
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"max_new_tokens": 6, "progress": lambda *figures: told.append(figures)}
    assert answer_file(model, source, target, batch_size=2, **options) == 3 and told == [(2, 3), (3, 3)]
    whole = target.read_text()
    assert all(re.fullmatch("[0-9a-f]{16}", json.loads(line)["run"]) for line in whole.splitlines())
    assert [json.loads(line)["reply"] for line in sorted(whole.splitlines())] == replies(
        model, CONVERSATIONS, max_new_tokens=6
    )
    assert answer_file(model, source, target, max_new_tokens=6) == 0 and target.read_text() == whole
    lines = whole.splitlines(keepends=True)
    target.write_text(lines[0] + lines[1][:-5])  # killed while writing the second row
    assert answer_file(model, source, target, max_new_tokens=6) == 2
    assert sorted(target.read_text().splitlines()) == sorted(whole.splitlines())
    source.write_text(json.dumps({"prompt": "another"}) + "\n")
    with pytest.raises(ValueError, match="out.jsonl:1: a result for another input"):
        answer_file(model, source, target)
    source.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match="in.jsonl:2: not valid JSON"):
        answer_file(model, source, tmp_path / "x")
    for row in ('{"prompt": " "}', '{"turns": ["a", "b"]}', '{"turns": "abc"}', "{}"):
        source.write_text(row)
        with pytest.raises(ValueError, match="in.jsonl:1: expected a 'prompt', or 'turns'"):
            answer_file(model, source, tmp_path / "x")


def test_replies_to_a_file_are_those_of_one_model_and_its_options(
    model: GritLM, checkpoint: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "What is it?", "system": null}\n{"turns": ["Where?"], "id": 3}\n')
    assert answer_file(model, source, target, max_new_tokens=4) == 2
    first = target.read_text().splitlines(keepends=True)[0]
    other: Any = GritLM(checkpoint, device="cpu", dtype="float32")
    with torch.no_grad():
        other.model.get_output_embeddings().weight[7, 1] += 0.1
    changes: list[dict[str, Any]] = [
        {"max_new_tokens": 5},
        {"max_new_tokens": 4, "system": "Be brief"},
        {"max_new_tokens": 4, "sampling": Sampling(0.5)},
        {"max_new_tokens": 4, "stop": ["a"]},
    ]
    for answering, options in ((other, {"max_new_tokens": 4}), *((model, change) for change in changes)):
        target.write_text(first)
        with pytest.raises(ValueError, match=r"out.jsonl:1: a result of another model or other options \(row 0\)"):
            answer_file(answering, source, target, **options)
        target.write_text(first)
    assert answer_file(model, source, target, batch_size=1, max_new_tokens=4) == 1
    row = json.loads(first)
    del row["run"]  # as earlier versions wrote it
    target.write_text(json.dumps(row) + "\n")
    assert answer_file(model, source, target, max_new_tokens=4) == 1


def test_a_column_of_a_file_of_prompts_is_not_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    for extra in ('"system": "Be brief"', '"turns": ["a"]', '"messages": [{"role": "user", "content": "b"}]'):
        source.write_text('{"prompt": "a", ' + extra + "}")
        with pytest.raises(ValueError, match="in.jsonl:1: expected a row of 'prompt' or of 'turns' alone, got"):
            read_conversations(source)
    source.write_text('{"prompt": "a", "id": 1, "topic": "b"}')
    with pytest.warns(UserWarning, match="in.jsonl: ignored columns: topic"):
        assert read_conversations(source) == [["a"]]


def test_beams_do_not_depend_on_the_generation_config_of_a_checkpoint(checkpoint: Path) -> None:
    model: Any = GritLM(checkpoint, device="cpu", dtype="float32")
    ids = [conversation_ids(model, turns) for turns in CONVERSATIONS]
    want = complete(model, ids, num_beams=2, max_new_tokens=8)
    model.model.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, length_penalty=-3.0)
    assert complete(model, ids, num_beams=2, max_new_tokens=8) == want


def test_the_command_chats_answers_files_and_prints_json(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    base = ["--model", str(checkpoint), "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd?\n"))
    COMMAND([*base, "--json"])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert second["turns"] == ["Hello", first["reply"], "And?"]
    COMMAND([*base, "--prompt", "Hello"])
    assert capsys.readouterr().out.strip() == first["reply"]
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello"}\n')
    COMMAND([*base, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--json"])
    assert json.loads(capsys.readouterr().out)["answered"] == 1
    assert json.loads((tmp_path / "out.jsonl").read_text())["reply"] == first["reply"]
    with pytest.raises(SystemExit, match="--input, --output: expected both or none"):
        COMMAND([*base, "--input", "x"])
    with pytest.raises(SystemExit, match="top_p"):
        COMMAND([*base, "--prompt", "x", "--temperature", "1", "--top-p", "2"])


@pytest.mark.parametrize("attn", ["bbbc", "bbil"])
def test_a_prefix_lm_reads_its_prompt_as_training_showed_it(checkpoint: Path, attn: str) -> None:
    """Each new token is the likeliest one under the training pass of prompt and reply so far; not so under causal reading."""
    from python_model.model.chunks import build_chunk
    from python_model.model.prompts import encode_conversation

    model = GritLM(checkpoint, attn=attn, device="cpu", dtype="float32")
    causal = GritLM(checkpoint, device="cpu", dtype="float32")
    turns = ["What is the capital of France?"]
    prompt = conversation_ids(model, turns)
    sample = encode_conversation(model.tokenizer, [*turns, "x"], 256, attention=attn[2:])
    assert sample.bidirectional is not None and sample.bidirectional[: len(prompt) + 1] == [True] * len(prompt) + [
        False
    ]
    text = complete(model, [prompt, prompt[:5]], max_new_tokens=6)[0]
    new: list[int] = []
    for _ in range(6):
        ids = [*prompt, *new]
        run = [t < len(prompt) for t in range(len(ids))]
        chunk = build_chunk(
            [], [dataclasses.replace(sample, input_ids=ids, labels=None, bidirectional=run)], attention=model.attention
        )
        hidden = model.hidden_states(chunk.input_ids, chunk.pack)
        new.append(int((hidden[-1] @ model.model.get_output_embeddings().weight.T).argmax()))
    assert text == model.tokenizer.decode(new, skip_special_tokens=True)
    assert text != complete(causal, [prompt], max_new_tokens=6)[0]
    with pytest.raises(ValueError, match="num_beams"):
        complete(model, [prompt], num_beams=2)
