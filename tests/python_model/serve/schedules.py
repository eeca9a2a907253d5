"""Random schedules of requests, tiny models of many families, and the check that every result equals the one alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.generate.decode import decode
from python_model.model.prompts import IGNORE_INDEX
from python_model.serve.engine import Generation, Score, TextWork, Token, Vector
from tests.python_model.serve.conftest import SteppedEngine, collect

WORDS = 300  # ids of the tiny vocabulary that are plain tokens: 3 .. WORDS


def ids(source: random.Random, length: int) -> list[int]:
    return [1] + [source.randrange(3, WORDS) for _ in range(length - 1)]


def alone(model: GritLM, prompt: list[int], new: list[int]) -> torch.Tensor:
    """Logits that each of ``new`` was chosen from, by the model's own forward over the whole sequence."""
    with torch.no_grad():
        whole = torch.tensor([prompt + new])
        return model.model(input_ids=whole).logits[0, len(prompt) - 1 : -1].float()


def draw_works(source: random.Random, count: int) -> list[tuple[int, TextWork | Generation]]:
    """(step of arrival, work): prompts, of which some share their beginning, and texts."""
    shared = ids(source, 40)
    works: list[tuple[int, TextWork | Generation]] = []
    for _ in range(count):
        when = source.randrange(12)
        kind = source.choice(["prompt", "prompt", "shared", "query", "bulk", "score"])
        if kind in ("prompt", "shared"):
            start = shared[: source.randrange(18, 40)] if kind == "shared" else []
            prompt = [*start, *ids(source, source.randrange(1, 70))]
            works.append((when, Generation(prompt, max_tokens=source.randrange(1, 20))))
        else:
            length = source.randrange(2, 60)
            text = TextWork(ids(source, length), bulk=kind == "bulk", causal=kind == "score")
            if kind == "score":
                first = source.randrange(length - 1)
                text.labels = [IGNORE_INDEX] * first + text.tokens[first + 1 :] + [2]
            text.instruction_len = source.randrange(0, length - 1)
            works.append((when, text))
    return works


def serve(engine: SteppedEngine, works: list[tuple[int, Any]], source: random.Random) -> list[list[Any]]:
    """Submit each work at its step, cancel some others on the way, run to the end."""
    events = [collect(work) for _, work in works]
    noise = [Generation(ids(source, 30), max_tokens=30) for _ in range(2)]
    for step in range(14):
        for when, work in works:
            if when == step:
                engine.submit([work])
        if step == 3:
            engine.submit(noise)
        if step == 6:
            engine.cancel(noise)
        engine.step()
        engine.scheduler.budget = source.choice([16, 32, 64, 96])
        engine.now += source.choice([0.01, 3.0])
    engine.run()
    return events


def check(model: GritLM, engine: SteppedEngine, works: list[tuple[int, Any]], events: list[list[Any]]) -> None:
    for (_, work), found in zip(works, events, strict=True):
        if isinstance(work, Generation):
            new = [event.token for event in found if isinstance(event, Token) and event.token is not None]
            assert len(new) == len(found) - (found[-1].token is None) and found[-1].finish is not None
            (expected,) = decode(
                model.model,
                [work.tokens[: work.prompt]],
                max_new_tokens=work.max_tokens,
                eos_token_ids=sorted(engine.ends),
            )
            assert new == expected
            logits = torch.stack(engine.logits[id(work)])[: len(new)]
            if new:
                reference = alone(model, work.tokens[: work.prompt], new)
                torch.testing.assert_close(logits, reference, rtol=0, atol=1e-5)
            continue
        (event,) = found
        pack = model.embedding_pack([len(work.tokens)], [work.instruction_len])
        if work.labels is None:
            with torch.no_grad():
                hidden = model.hidden_states(torch.tensor(work.tokens), pack)
                vector = model.pool(hidden, pack.cu_seqlens, pack.instruction_lens)[0]
            assert isinstance(event, Vector)
            torch.testing.assert_close(event.vector, vector, rtol=0, atol=1e-5)
        else:
            with torch.no_grad():
                logits = model.model(input_ids=torch.tensor([work.tokens])).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(work.labels), ignore_index=IGNORE_INDEX)
            assert isinstance(event, Score)
            assert event.score == pytest.approx(-float(loss), abs=1e-5)


def tiny(family: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    experts = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 48}
    windows = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
    extra: dict[str, Any] = {
        "Cohere": {"logit_scale": 0.3},
        "Cohere2": {**windows, "logit_scale": 0.3},
        "Gemma2": {**windows, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
        "Gemma3": windows,
        "Glm4": {"partial_rotary_factor": 0.5},
        "GptOss": {**experts, **windows, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "GPT2": {"attn_pdrop": 0.0},
        "GPTJ": {"rotary_dim": 16},
        "Granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
        "Mixtral": {**experts, "sliding_window": 20},
        "Olmo3": windows,
        "OPT": {"word_embed_proj_dim": 64, "ffn_dim": 96},
        "Phi": {"partial_rotary_factor": 0.5},
        "Phi3": {"sliding_window": 30, "partial_rotary_factor": 0.5},
        "Qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        "Qwen3Moe": {**experts, "mlp_only_layers": [1]},  # the other layer is a mixture
    }.get(family, {})
    if family in ("GPT2", "GPTJ", "GPTNeoX", "OPT"):  # whose heads share the hidden size
        sizes |= {"num_attention_heads": 2}
    if family in ("Olmo2", "Olmo3", "Phi"):
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    name = "Gemma3Text" if family == "Gemma3" else family
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**sizes, **extra, **options})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # norms, biases, sinks: as trained ones, all different
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def loaded(model: Any, tokenizer: Any, folder: Path, **options: Any) -> GritLM:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return GritLM(folder, dtype=torch.float32, **options)


def check_random_schedule(model: GritLM, seed: int, **options: Any) -> None:
    source = random.Random(seed)
    engine = SteppedEngine(model, **{"arena_rows": 300, "max_step_tokens": 96, **options})
    works = draw_works(source, 10)
    check(model, engine, works, serve(engine, works, source))
    assert engine.arena.used == sum(sequence.done for sequence in engine.scheduler.held), "memory is lost"
