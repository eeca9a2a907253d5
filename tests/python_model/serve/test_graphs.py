"""Captured decoding steps, replayed from a tape where there is no GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import grit_kernels as gk
from python_model import GritLM
from python_model.serve import graphs
from python_model.serve.arena import Arena
from python_model.serve.engine import Generation
from python_model.serve.graphs import DecodingGraphs, captured_rows
from python_model.serve.step import PackedStep
from tests.grit_kernels.hf.test_host_sync import READS
from tests.python_model.serve.conftest import SteppedEngine, collect
from tests.python_model.serve.schedules import check, draw_works, ids, loaded, serve, tiny

FROM_THE_HOST = {"aten::lift_fresh", "aten::lift_fresh_copy"}
"""What makes a tensor of numbers in Python: a copy from the host, which a capture does not allow."""


class Tape(TorchDispatchMode):
    """Records operations as a CUDA graph does: on these tensors, with these numbers, whatever Python decided at the time."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.name() not in READS, f"{function.name()} reads back"
        assert function.name() not in FROM_THE_HOST, "a copy from the host"
        output = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, tensors(output)))
        return output

    def replay(self) -> None:
        with torch.inference_mode():
            for function, args, kwargs, outputs in self.operations:
                for old, new in zip(outputs, tensors(function(*args, **kwargs)), strict=True):
                    assert old.shape == new.shape
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor)]


class TapeRecorder:
    """In the place of CudaRecorder."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        function()
        tape = Tape()
        with tape:
            output = function()
        self.tapes.append(tape)
        return lambda: self.replay(tape), output

    def replay(self, tape: Tape) -> None:
        self.replays += 1
        tape.replay()


def with_graphs(model: GritLM, most_rows: int, **options: Any) -> tuple[SteppedEngine, TapeRecorder]:
    engine, recorder = SteppedEngine(model, **options), TapeRecorder()
    assert engine.packed_step.graphs is None, "only a GPU captures by itself"
    engine.packed_step.graphs = DecodingGraphs(engine.packed_step, most_rows, recorder)
    return engine, recorder


def test_the_numbers_of_a_step_are_where_its_keys_are() -> None:
    step: Any = SimpleNamespace(arena=SimpleNamespace(keys=torch.empty(0, device="meta"), scratch=8))
    captured = DecodingGraphs(step, 4, lambda function: (lambda: None, torch.empty(0))).graphs
    assert captured.keys() == {1, 2, 4} and all(graph.numbers.device.type == "meta" for graph in captured.values())


def test_an_engine_captures_as_many_rows_as_sequences_where_it_is_told_to(
    served_model: GritLM, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CudaRecorder", TapeRecorder)
    options = {"arena_rows": 60, "max_step_tokens": 64, "max_sequences": 5, "cuda_graphs": True}
    captured = SteppedEngine(served_model, **options).packed_step.graphs
    assert captured is not None and sorted(captured.graphs) == [1, 2, 4, 8]
    embedder = loaded(tiny("Llama"), tokenizer, tmp_path / "embedder", mode="embedding")
    assert SteppedEngine(embedder, **options).packed_step.graphs is None, "it decodes nothing"
    other = loaded(tiny("Mixtral"), tokenizer, tmp_path / "other")
    assert SteppedEngine(other, **options).packed_step.graphs is None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["Mistral", "Llama", "Phi3", "Qwen3"])
def test_replayed_steps_equal_a_models_own_forward_over_random_schedules(
    family: str, seed: int, served_model: GritLM, tokenizer: Any, tmp_path: Path
) -> None:
    model = served_model if family == "Mistral" else loaded(tiny(family), tokenizer, tmp_path)
    source = random.Random(seed)
    # six at most, so that eight rows are replayed for five and six; small enough that intervals move
    engine, recorder = with_graphs(model, 6, arena_rows=260, max_step_tokens=96, max_sequences=6)
    works = draw_works(source, 14)
    check(model, engine, works, serve(engine, works, source))
    assert recorder.replays > 10 and len(recorder.tapes) == 4


def test_more_sequences_than_captured_rows_take_the_other_path(served_model: GritLM) -> None:
    engine, recorder = with_graphs(served_model, 2, arena_rows=600, max_step_tokens=96)
    source = random.Random(0)
    works = [Generation(ids(source, 10), max_tokens=4 + 3 * place) for place in range(4)]
    events = [collect(work) for work in works]
    engine.submit(works)
    engine.run()
    check(served_model, engine, [(0, work) for work in works], events)
    assert 0 < recorder.replays < max(len(found) for found in events)


def test_a_capture_writes_to_scratch_only(served_model: GritLM) -> None:
    engine, _ = with_graphs(served_model, 8, arena_rows=100, max_step_tokens=96)
    for memory in (engine.arena.keys, engine.arena.values):
        assert memory[: engine.arena.scratch_start].isnan().all()


def test_models_with_experts_or_steps_of_their_own_are_not_captured(tokenizer: Any, tmp_path: Path) -> None:
    for family, captured in (("Llama", True), ("Mixtral", False), ("Qwen3Moe", False), ("Gemma2", False)):
        model = loaded(tiny(family), tokenizer, tmp_path / family)
        assert SteppedEngine(model, arena_rows=60, max_step_tokens=64).packed_step.can_be_captured == captured


class Shapes:
    """What PackedStep asks of a GritLM, without a tokenizer and on the meta device, where there are no values."""

    def __init__(self, family: str) -> None:
        self.model = gk.patch(tiny(family).to("meta", torch.bfloat16))
        self.decoder = [self.model.get_decoder()]
        self.settings = SimpleNamespace(bidirectional_window="transformers")

    def decode(self, rows: int, arena_rows: int) -> Tensor:
        """The states of a captured step."""
        arena = Arena(2, 2, 32, arena_rows, 64, dtype=torch.bfloat16, device="meta")
        numbers = torch.zeros(4, rows, dtype=torch.int64, device="meta")
        causal = torch.ones(rows, dtype=torch.bool, device="meta")
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device="meta")
        with torch.inference_mode():
            return PackedStep(self, arena).decode(numbers, causal, cu_seqlens)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Qwen3"])
def test_a_captured_step_needs_no_values_on_the_host(family: str) -> None:
    assert Shapes(family).decode(8, 50).shape == (8, 64)


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Qwen3"])
def test_the_kernels_of_a_captured_step_are_launched_from_sizes_alone(family: str) -> None:
    pytest.importorskip("triton")
    from bench.launches import HOPPER, recorded

    model = Shapes(family)
    with recorded(HOPPER) as found:
        assert model.decode(8, 5000).shape == (8, 64)
    assert {"attention_decode_kernel", "merge_splits_kernel"} <= {launch.name for launch in found}


def test_captured_numbers_of_rows_reach_the_most_there_may_be() -> None:
    assert captured_rows(1) == [1] and captured_rows(3) == [1, 2, 3] and captured_rows(4) == [1, 2, 4]
    assert captured_rows(5) == [1, 2, 4, 8] and captured_rows(16) == [1, 2, 4, 8, 16]
    assert captured_rows(60) == [1, 2, 4, *range(8, 65, 8)]


def test_a_tape_refuses_what_a_capture_does_and_repeats_the_rest() -> None:
    x, recorder = torch.zeros(3), TapeRecorder()
    with pytest.raises(AssertionError, match="reads back"):
        recorder(lambda: x * x.sum().item())
    with pytest.raises(AssertionError, match="a copy from the host"):
        recorder(lambda: x + torch.tensor([1.0, 2.0, 3.0]))
    replay, output = recorder(lambda: (x.view(3, 1) + torch.ones(3)).sum(0))
    x.fill_(2.0)
    replay()
    assert output.tolist() == [9.0, 9.0, 9.0]


def test_the_recorder_runs_once_before_each_capture_and_all_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def noted(what: str) -> Iterator[None]:
        log.append(f"begin {what}")
        yield
        log.append(f"end {what}")

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: noted(f"capture into {pool}"))
    record = graphs.CudaRecorder()
    once = [
        *("side waits for main", "begin side", "run", "end side", "main waits for side"),
        *("begin capture into pool", "run", "end capture into pool"),
    ]
    for _ in range(2):
        replay, output = record(lambda: (log.append("run"), torch.ones(2))[1])
        assert log == once and output.tolist() == [1.0, 1.0]
        replay()
        assert log.pop() == "replay" and log == once
        log.clear()
