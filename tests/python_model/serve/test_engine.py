"""Every request's result equals its result alone, whatever shares the step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_model import GritLM
from python_model.generate.decode import Sampling
from python_model.model.packed_linear import pack_linear_layers
from python_model.serve.engine import Failure, Generation, TextWork, Token, Vector
from python_model.serve.scheduler import QueueFull
from python_model.serve.step import rounded
from tests.python_model.serve.conftest import SteppedEngine, collect
from tests.python_model.serve.schedules import alone, check, draw_works, ids, loaded, serve, tiny
from tests.python_model.serve.server import wait_until


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**20), arena=st.sampled_from([130, 260, 1000]), reuse=st.booleans(), rounds=st.booleans())
def test_results_equal_those_alone_over_random_schedules(
    served_model: GritLM, seed: int, arena: int, reuse: bool, rounds: bool
) -> None:
    source = random.Random(seed)
    engine = SteppedEngine(
        served_model, arena_rows=arena, max_step_tokens=96, max_sequences=source.choice([2, 5, 20]), reuse=reuse
    )
    engine.packed_step.rounds = rounds
    works = draw_works(source, 12)
    events = serve(engine, works, source)
    check(served_model, engine, works, events)
    held = sum(sequence.done for sequence in engine.scheduler.held)
    assert engine.arena.used == held, "memory is lost"


@pytest.fixture(scope="module", params=["Mistral", "Gemma2"])
def in_both_dtypes(
    request: pytest.FixtureRequest, checkpoint: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GritLM, GritLM]:
    """A model in bfloat16, and in float32 with the same weights; of a family with a step of its own, and of one without."""
    if request.param != "Mistral":
        loaded(tiny(request.param), tokenizer, checkpoint := tmp_path_factory.mktemp("family"))
    model, exact = GritLM(checkpoint, dtype=torch.bfloat16), GritLM(checkpoint, dtype=torch.float32)
    exact.model.load_state_dict({name: x.float() for name, x in model.model.state_dict().items()})
    pack_linear_layers(model.decoder[0])  # as `grit serve` does
    return model, exact


def vector_alone(model: GritLM, work: TextWork) -> torch.Tensor:
    pack = model.embedding_pack([len(work.tokens)], [work.instruction_len])
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor(work.tokens), pack)
        return model.pool(hidden, pack.cu_seqlens, pack.instruction_lens)[0].float()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**20), arena=st.sampled_from([130, 260, 1000]), reuse=st.booleans())
def test_bfloat16_results_keep_the_accuracy_rule_over_random_schedules(
    in_both_dtypes: tuple[GritLM, GritLM], seed: int, arena: int, reuse: bool
) -> None:
    """A request's logits are off by at most twice of what they are off alone in bfloat16, measured against float32; tokens are
    those of the model alone up to the first position where its two best logits are closer than that.

    The largest error of a request is meant: in a single row of logits, two ways of rounding give errors of one size but not the
    same ones, and of some 19,000 rows the largest error of 1 in 1,700 was more than twice that alone, up to 2.4 times. Over a
    whole schedule such differences average out: the norm of its errors was at most 1.08 times that alone in 320 schedules.
    """
    model, exact = in_both_dtypes
    source = random.Random(seed)
    engine = SteppedEngine(
        model, arena_rows=arena, max_step_tokens=96, max_sequences=source.choice([2, 5, 20]), reuse=reuse
    )
    works = draw_works(source, 12)
    events = serve(engine, works, source)
    squares = torch.zeros(2, dtype=torch.float64)
    for (_, work), found in zip(works, events, strict=True):
        if isinstance(work, TextWork):
            if isinstance(found[0], Vector):
                truth, by_itself = vector_alone(exact, work), vector_alone(model, work)
                error = (found[0].vector.float() - truth).abs().max()
                assert error <= 2 * (by_itself - truth).abs().max()
            continue
        new = [event.token for event in found if event.token is not None]
        if not new:
            continue
        prompt = work.tokens[: work.prompt]
        logits = torch.stack(engine.logits[id(work)])[: len(new)]
        truth, by_itself = alone(exact, prompt, new), alone(model, prompt, new)
        allowed = 2 * (by_itself - truth).abs().max()
        assert (logits - truth).abs().max() <= allowed
        squares += torch.stack([(logits - truth).double().square().sum(), (by_itself - truth).double().square().sum()])
        best = by_itself.topk(2).values
        sure = (best[:, 0] - best[:, 1] > allowed).tolist()
        first_unsure = sure.index(False) if False in sure else len(new)
        assert new[:first_unsure] == by_itself.argmax(dim=1).tolist()[:first_unsure]
    assert squares[0] <= 1.25**2 * squares[1]


def test_steps_of_16_bits_on_a_cpu_multiply_few_numbers_of_rows(checkpoint: Path) -> None:
    model = GritLM(checkpoint, dtype=torch.bfloat16, device="cpu")
    engine = SteppedEngine(model, arena_rows=400, max_step_tokens=96)
    seen: set[int] = set()
    for module in model.decoder[0].modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].flatten(0, -2).shape[0]))
    source = random.Random(4)
    events = serve(engine, draw_works(source, 12), source)
    assert all(events) and len(seen) > 5
    assert seen == {rounded(rows) for rows in seen}


def test_rounded_numbers_of_rows_are_few_and_close() -> None:
    found = [rounded(rows) for rows in range(1, 2049)]
    assert found == sorted(found) and len(set(found)) < 60
    for rows, chosen in enumerate(found, start=1):
        assert rows <= chosen < rows + max(4, rows / 8) and rounded(chosen) == chosen


def test_a_language_model_that_waits_for_a_call_as_a_whole_is_refused(checkpoint: Path) -> None:
    model = GritLM(checkpoint, dtype=torch.float32)
    model.model.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ValueError, match="^model: expected one whose decoder and head may be called separately, got"):
        SteppedEngine(model, arena_rows=300, max_step_tokens=96)


@pytest.mark.parametrize("part", ["model.model", "model.model.norm", "model.model.layers.0.mlp", "model.lm_head"])
@pytest.mark.parametrize("kind", ["hook", "own forward"])
def test_a_module_that_waits_for_a_call_is_called(checkpoint: Path, part: str, kind: str) -> None:
    model = GritLM(checkpoint, dtype=torch.float32)
    module, calls = model.get_submodule(part), []
    if kind == "hook":
        module.register_forward_hook(lambda module, inputs, output: calls.append(part))
    else:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(part)
            return own(*args, **kwargs)

        module.__dict__["forward"] = forward
    engine = SteppedEngine(model, arena_rows=300, max_step_tokens=96)
    events = collect(work := Generation(ids(random.Random(0), 20), max_tokens=4))
    engine.submit([work])
    engine.run()
    assert calls and len(events) == 4


@pytest.mark.parametrize("layers", ["alike", "mixed"])
@pytest.mark.parametrize("attn", ["bb", "cc", "cb"])
def test_embeddings_equal_encode_in_every_attention_variant(
    checkpoint: Path, tokenizer: Any, tmp_path: Path, attn: str, layers: str
) -> None:
    if layers == "mixed":  # one with a window, one without
        tiny("Qwen2").save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        checkpoint = tmp_path
    model = GritLM(checkpoint, dtype=torch.float32, attn=attn, pooling_method="lasttoken" if attn == "cc" else "mean")
    engine = SteppedEngine(model, arena_rows=200, max_step_tokens=128)
    engine.packed_step.rounds = True
    source = random.Random(0)
    works: list[Any] = [(0, Generation(ids(source, 20), max_tokens=8))]
    for length, skip in ((90, 5), (70, 0), (3, 1)):
        prefix = skip if attn == "cb" else None
        works.append(
            (1, TextWork(ids(source, length), causal=attn == "cc", causal_prefix=prefix, instruction_len=skip))
        )
    check(model, engine, works, serve(engine, works, source))


def test_rows_that_only_round_up_a_step_change_nothing(served_model: GritLM) -> None:
    source = random.Random(3)
    engine = SteppedEngine(served_model, arena_rows=600, max_step_tokens=96)
    engine.packed_step.rounds = True
    works = draw_works(source, 12)
    check(served_model, engine, works, serve(engine, works, source))


def sampled(engine: SteppedEngine, prompt: list[int], seed: int, beside: int = 0) -> list[int | None]:
    work = Generation(list(prompt), max_tokens=12, sampling=Sampling(1.0, 0, 0.9), seed=seed)
    events = collect(work)
    others = [Generation([*prompt, 7 + i], max_tokens=12, sampling=Sampling(1.0), seed=i) for i in range(beside)]
    engine.submit([*others, work])
    engine.run()
    return [event.token for event in events if isinstance(event, Token)]


def test_draws_of_a_seed_are_the_same_whatever_is_drawn_beside_them(served_model: GritLM) -> None:
    engine = SteppedEngine(served_model, arena_rows=400, max_step_tokens=96)
    prompt = ids(random.Random(1), 20)
    first = sampled(engine, prompt, seed=5)
    assert sampled(engine, prompt, seed=5, beside=4) == first
    assert any(sampled(engine, prompt, seed=seed) != first for seed in range(6, 10))


def test_an_equal_beginning_is_computed_once(served_model: GritLM) -> None:
    engine = SteppedEngine(served_model, arena_rows=1000, max_step_tokens=64)
    source = random.Random(1)
    system = ids(source, 50)
    works = [Generation([*system, *ids(source, 5)], max_tokens=3) for _ in range(4)]
    events = [collect(work) for work in works]
    engine.submit(works)  # together: three of them wait for the first
    engine.run()
    assert sorted(work.reused for work in works) == [0, 51, 51, 51]  # all start their own part with BOS
    later = Generation([*system, 9, 9], max_tokens=3)
    events.append(collect(later))
    engine.submit([later])
    engine.run()
    assert later.reused == 50
    check(served_model, engine, [(0, work) for work in [*works, later]], events)


def test_states_of_an_ended_sequence_give_way_to_a_prompt_that_needs_the_room(served_model: GritLM) -> None:
    engine = SteppedEngine(served_model, arena_rows=100, max_step_tokens=96)
    source = random.Random(1)
    first = ids(source, 60)
    for prompt, tokens, reused in ((first, 2, 0), (ids(source, 30), 5, 0), (first[:30] + ids(source, 60), 10, 0)):
        work = Generation(list(prompt), max_tokens=tokens)
        events = collect(work)
        engine.submit([work])
        engine.run()
        assert work.reused == reused
        check(served_model, engine, [(0, work)], [events])


def test_a_failing_work_fails_alone(served_model: GritLM) -> None:
    engine = SteppedEngine(served_model, arena_rows=400, max_step_tokens=96)
    source = random.Random(1)
    works: list[Any] = [
        (0, Generation(ids(source, 20), max_tokens=6)),
        (0, TextWork(ids(source, 20))),
        (0, Generation([1, 10**6, 5], max_tokens=6)),  # no such token
        (0, TextWork([1, 10**6])),
    ]
    events = serve(engine, works, source)
    for found in events[2:]:
        assert [type(event) for event in found] == [Failure] and found[0].kind == "error"
        assert "10" not in found[0].message
    check(served_model, engine, works[:2], events[:2])


def test_deadlines_and_cancelling_free_memory_and_queue(served_model: GritLM) -> None:
    engine = SteppedEngine(served_model, arena_rows=100, max_step_tokens=96, reuse=False)
    source = random.Random(1)
    late = Generation(ids(source, 20), max_tokens=60, deadline=1.0)
    gone, waits = Generation(ids(source, 20), max_tokens=60), Generation(ids(source, 20), max_tokens=60)
    events = [collect(work) for work in (late, gone, waits)]
    engine.submit([late, gone, waits])
    for _ in range(3):
        engine.step()
    assert engine.arena.used == 79 and not waits.done
    engine.now = 2.0
    engine.cancel([gone])
    engine.step()
    assert isinstance(events[0][-1], Failure) and events[0][-1].kind == "timeout"
    assert events[1] == [] and waits.done
    engine.run()
    assert engine.arena.used == 0


def test_too_much_in_the_queue_is_refused_with_a_time(served_model: GritLM) -> None:
    engine = SteppedEngine(served_model, arena_rows=100, max_step_tokens=96, max_queued_tokens=50)
    source = random.Random(1)
    engine.submit([TextWork(ids(source, 40))])
    with pytest.raises(QueueFull) as refused:
        engine.submit([TextWork(ids(source, 40))])
    assert refused.value.retry_after >= 1
    engine.run()
    engine.submit([TextWork(ids(source, 40))])
    with pytest.raises(ValueError, match="^max_tokens: expected prompt and reply within 100 tokens, got 40 \\+ 70"):
        engine.submit([Generation(ids(source, 40), max_tokens=70)])
    with pytest.raises(ValueError, match="^text: expected at most 96 tokens, got 97"):
        engine.submit([TextWork(ids(source, 97))])


def test_a_closed_engine_fails_what_is_left_and_takes_no_more(served_model: GritLM) -> None:
    engine = SteppedEngine(served_model, arena_rows=4000, max_step_tokens=96)
    work = Generation(ids(random.Random(0), 20), max_tokens=3000)
    events = collect(work)
    engine.start()
    engine.submit([work])
    engine.close(drain_seconds=0.05)
    assert isinstance(events[-1], Failure) and events[-1].kind == "stopped"
    assert not engine.accepts
    with pytest.raises(RuntimeError, match="is stopping"):
        engine.submit([work])


def test_a_closing_engine_finishes_what_it_has_begun(served_model: GritLM) -> None:
    engine = SteppedEngine(served_model, arena_rows=400, max_step_tokens=96)
    work = Generation(ids(random.Random(0), 20), max_tokens=20)
    events = collect(work)
    engine.start()
    engine.submit([work])
    engine.close(drain_seconds=60)
    assert isinstance(events[-1], Token) and events[-1].finish is not None


@pytest.mark.parametrize("sampling", [Sampling(5e-324), Sampling(1.0, 0, 5e-324), Sampling(2.0, 1)])
def test_draws_that_leave_one_token_are_greedy(served_model: GritLM, sampling: Sampling) -> None:
    engine = SteppedEngine(served_model, arena_rows=200, max_step_tokens=96)
    tokens = []
    for chosen in (sampling, Sampling()):
        work = Generation(ids(random.Random(1), 20), max_tokens=6, sampling=chosen)
        events = collect(work)
        engine.submit([work])
        engine.run()
        tokens.append([event.token for event in events if isinstance(event, Token)])
    assert tokens[0] == tokens[1]


def gauges(metrics: Any) -> dict[str, float]:
    """How much the metrics say is running, waiting, queued, and owned but not held for reuse."""
    names = ("running_sequences", "waiting_sequences", "queued_tokens", "arena_used_rows", "arena_held_rows")
    running, waiting, queued, used, held = (metrics.registry.get_sample_value(f"grit_{name}") for name in names)
    return {"running": running, "waiting": waiting, "queued": queued, "owned": used - held}


@pytest.mark.parametrize("end", ["cancelled", "late"])
def test_metrics_tell_that_works_have_ended_after_the_last_step(served_model: GritLM, end: str) -> None:
    pytest.importorskip("prometheus_client")
    from python_model.serve.metrics import Metrics

    metrics = Metrics()
    engine = SteppedEngine(served_model, arena_rows=100, max_step_tokens=96, metrics=metrics)
    source = random.Random(1)
    works = [Generation(ids(source, 20), max_tokens=60, deadline=1.0) for _ in range(2)]
    for work in works:
        collect(work)
    engine.submit(works)
    assert engine.step()
    assert gauges(metrics) == {"running": 1, "waiting": 1, "queued": 20, "owned": 79}
    if end == "cancelled":
        engine.cancel(works)
    else:
        engine.now = 2.0
    assert not engine.step() and engine.scheduler.idle
    assert gauges(metrics) == {"running": 0, "waiting": 0, "queued": 0, "owned": 0}


def test_an_error_outside_of_the_works_ends_them_and_tells_so(
    served_model: GritLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prometheus_client")
    from python_model.serve.metrics import Metrics

    metrics = Metrics()
    engine = SteppedEngine(served_model, arena_rows=100, max_step_tokens=96, metrics=metrics)
    source = random.Random(1)
    works = [Generation(ids(source, 20), max_tokens=60) for _ in range(2)]
    events = [collect(work) for work in works]
    engine.submit(works)
    assert engine.step() and gauges(metrics)["running"] == 1

    def fails(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(engine.scheduler, "report", fails)
    engine.start()
    ended = {"running": 0, "waiting": 0, "queued": 0, "owned": 0}
    wait_until(lambda: gauges(metrics) == ended)
    assert [[type(event) for event in found if not isinstance(event, Token)] for found in events] == [[Failure]] * 2
    assert engine.accepts
    engine.close()


def test_requests_that_come_while_numbers_are_told_fail_no_step(served_model: GritLM) -> None:
    """Metrics walk through the queues, which other threads append to."""
    pytest.importorskip("prometheus_client")
    from python_model.serve.metrics import Metrics

    class Watched(Metrics):
        def step(self, scheduler: Any, *numbers: Any) -> None:
            assert engine._changed._is_owned(), "the queues may change meanwhile"  # type: ignore[attr-defined]
            super().step(scheduler, *numbers)

    engine = SteppedEngine(served_model, arena_rows=200, max_step_tokens=96, metrics=Watched())
    work = TextWork(ids(random.Random(0), 20))
    events = collect(work)
    engine.submit([work])
    engine.run()
    assert isinstance(events[0], Vector)


def test_of_equal_logits_the_server_takes_the_token_that_is_greedy(checkpoint: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype=torch.bfloat16)
    model.model.get_input_embeddings().weight.data.zero_()  # which are the head's weights, so all logits are equal
    engine = SteppedEngine(model, arena_rows=130, max_step_tokens=96)
    chosen = []
    for sampling in (Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9)):
        work = Generation([5, 6, 7], max_tokens=3, deadline=60.0, sampling=sampling, seed=3)
        events = collect(work)
        engine.submit([work])
        engine.run()
        chosen.append([event.token for event in events if isinstance(event, Token)])
    assert chosen == [[0, 0, 0]] * 3
