"""Families of decoders in packed steps: those that the step knows, and others through their own forward."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from python_model.rag.reading import read
from python_model.serve.engine import Generation, TextWork
from python_model.serve.own_forward import longest_text
from python_model.serve.step import unfit
from tests.python_model.serve.conftest import SteppedEngine, collect
from tests.python_model.serve.schedules import check, check_random_schedule, draw_works, ids, loaded, serve, tiny


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe"])
def test_families_of_the_step_equal_their_own_forward(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = loaded(tiny(family), tokenizer, tmp_path)
    assert unfit(model) is None
    check_random_schedule(model, 2)


OTHERS = (
    *("Cohere", "Cohere2", "Gemma", "Gemma2", "Gemma3", "Glm4", "GPT2", "GPTJ", "GPTNeoX", "GptOss", "Granite"),
    *("Olmo2", "Olmo3", "OPT", "Phi", "Starcoder2"),
)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_run_packed_steps_through_their_own_forward(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = loaded(tiny(family), tokenizer, tmp_path)
    assert unfit(model) is not None
    for seed in range(2):
        check_random_schedule(model, seed, reuse=bool(seed), max_sequences=(3, 20)[seed])


def test_steps_by_the_models_own_forward_may_have_spare_rows(tokenizer: Any, tmp_path: Path) -> None:
    model = loaded(tiny("Gemma2"), tokenizer, tmp_path)
    source = random.Random(2)
    engine = SteppedEngine(model, arena_rows=300, max_step_tokens=96)
    engine.packed_step.rounds = True
    works = draw_works(source, 10)
    check(model, engine, works, serve(engine, works, source))


def test_heads_of_a_size_that_no_kernel_serves_have_a_memory_of_a_larger_one(tokenizer: Any, tmp_path: Path) -> None:
    model = loaded(tiny("Llama", head_dim=20), tokenizer, tmp_path)
    check_random_schedule(model, 3)
    engine = SteppedEngine(model, arena_rows=60, max_step_tokens=64)
    assert engine.arena.head_dim == 20 and engine.arena.keys.shape[-1] == 32
    prompt = ids(random.Random(0), 20)
    (states,) = read(model, [prompt[:12]], causal=True)  # elsewhere, as those of a document in a store
    events = collect(work := Generation(list(prompt), max_tokens=6, states=states))
    engine.submit([work])
    engine.run()
    assert work.reused == 12
    check(model, engine, [(0, work)], [events])


def test_rotary_scaling_by_length_is_served_up_to_the_length_where_it_sets_in(tokenizer: Any, tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = loaded(tiny("Llama", rope_parameters=scaling), tokenizer, tmp_path)
    model.model.config.max_position_embeddings = 4096  # of which the frequencies of the first 256 are alike
    check_random_schedule(model, 5)
    engine = SteppedEngine(model, arena_rows=300, max_step_tokens=96)
    assert engine.positions == 256


def test_a_sequence_grows_up_to_the_models_positions_if_it_has_a_limit() -> None:
    from transformers import BloomConfig, BloomModel

    limited: Any = SimpleNamespace(model=tiny("Llama"))
    assert longest_text(limited) == 256
    unlimited: Any = SimpleNamespace(model=BloomModel(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1)))
    assert longest_text(unlimited) == 2**31 - 1


def test_an_embedder_without_a_head_reads_texts_through_its_own_forward(tokenizer: Any, tmp_path: Path) -> None:
    model = loaded(tiny("Gemma2"), tokenizer, tmp_path, mode="embedding", attn="cbcc")
    engine = SteppedEngine(model, arena_rows=60, max_step_tokens=96)
    source = random.Random(0)
    works = [
        (0, TextWork(ids(source, length), causal_prefix=skip, instruction_len=skip))
        for length, skip in ((50, 5), (30, 0), (3, 1))
    ]
    check(model, engine, works, serve_texts(engine, works))


def serve_texts(engine: SteppedEngine, works: list[tuple[int, TextWork]]) -> list[list[Any]]:
    events = [collect(work) for _, work in works]
    engine.submit([work for _, work in works])
    engine.run()
    return events


def test_layers_that_carry_a_state_are_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    model = loaded(tiny("Lfm2", layer_types=["conv", "full_attention"]), tokenizer, tmp_path)
    with pytest.raises(
        ValueError, match="^model: expected one that .* got a Lfm2Model: expected layers .* Lfm2ShortConv"
    ):
        SteppedEngine(model, arena_rows=300, max_step_tokens=96)
