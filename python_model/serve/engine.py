"""The engine: one thread that owns the model, its arena and its scheduler. Requests come in from any thread, results go out.

A request is a list of works (see scheduler.py), each with a ``sink`` that the engine's thread calls with events:

    Generation   Token, .., Token     the last one has ``finish`` set
    TextWork     Vector or Score
    either       Failure              in place of the rest

A step that fails is repeated work by work, so that a faulty request fails alone.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from python_model.generate.decode import Sampling
from python_model.generate.text import TextStream, eos_token_ids
from python_model.model.losses import sums_per_sample
from python_model.model.modeling import GritLM
from python_model.model.prompts import IGNORE_INDEX
from python_model.serve import scheduler as plans
from python_model.serve.graphs import DecodingGraphs
from python_model.serve.own_forward import longest_text, step_of
from python_model.serve.step import Item

if TYPE_CHECKING:
    from python_model.serve.metrics import Metrics

log = logging.getLogger("python_model.serve")

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A new token; ``text`` is what can be released since the previous one. At EOS ``token`` is None. ``top``: (token,
    logprob).
    """

    token: int | None
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Vector:
    """The embedding of a text: float32 (size), on the CPU."""

    vector: Tensor


@dataclass(frozen=True)
class Score:
    """The mean log-probability of a text's labels."""

    score: float


@dataclass(frozen=True)
class Failure:
    """A work that did not finish: it timed out, the server is stopping, or computing it failed."""

    kind: Literal["timeout", "stopped", "error"]
    message: str


Event = Token | Vector | Score | Failure
Sink = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The sink of a work whose results are not wanted."""


@dataclass(eq=False)
class TextWork(plans.Text):
    """A text to embed or to score."""

    sink: Sink = ignore


@dataclass(eq=False)
class Generation(plans.Sequence):
    """A prompt to continue.

    ``seed``: sampling seed, by default random. ``logprobs``: how many alternatives to report per token (0: only the token's own
    log-probability), None for none.
    """

    sink: Sink = ignore
    sampling: Sampling = Sampling()
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    generator: torch.Generator | None = None
    stream: TextStream | None = None
    pieces: list[str] = field(default_factory=list)
    last_token: float = 0.0


class Engine:
    """See the top of the file.

    Args:
        model: a GritLM in inference mode; ``mode="embedding"`` serves only texts.
        arena_rows: tokens of all sequences together, prompts and replies.
        max_step_tokens: the largest step, which is also the maximum length of a text to embed.
        metrics: receives figures about steps and tokens.
        cuda_graphs: capture decoding steps where the model allows it (graphs.py); default: on a GPU.
        options: of :class:`~python_model.serve.scheduler.Scheduler`.

    Raises:
        ValueError: a model that the packed step does not support, with the reason.
    """

    def __init__(
        self,
        model: GritLM,
        *,
        arena_rows: int,
        max_step_tokens: int,
        metrics: Metrics | None = None,
        cuda_graphs: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        self.model, self.metrics, self.clock = model, metrics, clock
        self.packed_step = step_of(model, arena_rows, max_step_tokens)
        self.arena = self.packed_step.arena
        self.scheduler = plans.Scheduler(self.arena, max_step_tokens=max_step_tokens, **options)
        self.ends = frozenset(eos_token_ids(model)) if self.generates else frozenset()
        self.positions = longest_text(model)
        captures = self.arena.keys.is_cuda if cuda_graphs is None else cuda_graphs
        if captures and self.generates and self.packed_step.can_be_captured:
            self.packed_step.graphs = DecodingGraphs(self.packed_step, self.scheduler.max_sequences)
        self._changed = threading.Condition()
        self._state: Literal["new", "running", "draining", "stopped"] = "new"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def generates(self) -> bool:
        """Whether the model continues prompts causally, with a language-model head."""
        return self.model.mode != "embedding" and self.model.attention.generates_causally

    @property
    def accepts(self) -> bool:
        """Whether new work is accepted."""
        return self._state == "running" and self.alive

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._state = "running"
        self._thread.start()

    def submit(self, works: Sequence[TextWork | Generation]) -> None:
        """Accept all works of a request, or none; their ``arrival`` is set here.

        Raises:
            QueueFull: too much is waiting. ValueError: a work that would never fit. RuntimeError: the engine is stopping.
        """
        if self._state in ("draining", "stopped"):
            raise RuntimeError("the server is stopping and accepts no more work")
        now = self.clock()
        for work in works:
            work.arrival = now
            if isinstance(work, Generation):
                work.last_token = now
                if not self.generates:
                    raise ValueError(
                        "model: expected one that generates (not an embedding model, nor one that reads prompts bidirectionally)"
                    )
                work.stream = TextStream(self.model.tokenizer, work.stop, work.pieces.append)
                if work.sampling.temperature > 0:
                    work.generator = torch.Generator(device=self.model.device)
                    work.generator.manual_seed(work.seed if work.seed is not None else secrets.randbits(63))
        with self._changed:
            self.scheduler.add(list(works))
            self._changed.notify_all()

    def cancel(self, works: Sequence[plans.Work]) -> None:
        """Cancel works whose results are no longer wanted; their memory is freed before the next step. Never blocks."""
        self.scheduler.cancel(works)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Accept no more work, give running work ``drain_seconds`` to finish, fail the rest, end the thread."""
        with self._changed:
            started, self._state = self._state == "running", "draining"
            self._changed.notify_all()
        if started:
            self._thread.join(drain_seconds)
        with self._changed:
            self._state = "stopped"
            self._changed.notify_all()
        if started:
            self._thread.join()
        self._fail(list(self.scheduler._all()), Failure("stopped", "the server was stopped"))

    def step(self) -> bool:
        """Run one step; False if there was nothing to do. Called by the engine's thread, or by a test without one."""
        with self._changed:
            now = self.clock()
            expired = self.scheduler.reap(now)
            plan = self.scheduler.plan(now)
            if not plan and self.metrics is not None:
                self.metrics.state(self.scheduler)  # no step follows that would tell what was dropped
        self._fail(expired, Failure("timeout", "the request took longer than the server allows"))
        if not plan:
            return False
        start = time.perf_counter()
        outcomes = self._isolated(plan)
        seconds = time.perf_counter() - start
        decoding = sum(isinstance(work, Generation) and work.decoding for work, _ in plan)
        told: list[tuple[Any, Event]] = []
        with self._changed:
            tokens = sum(count for _, count in plan)
            self.scheduler.report(tokens, seconds, decoding)
            for (work, count), outcome in zip(plan, outcomes, strict=True):
                told += [(work, event) for event in self._apply(work, count, outcome)]
            if self.metrics is not None:
                self.metrics.step(self.scheduler, tokens, decoding, seconds)
        for work, event in told:
            self._tell(work, event)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._state == "running" and self.scheduler.idle:
                    self._changed.wait()
                if self._state == "stopped" or (self._state == "draining" and self.scheduler.idle):
                    return
            try:
                if not self.step():
                    time.sleep(0.001)  # the remaining works wait for memory that a cancelled one frees
            except Exception as error:
                log.exception("a step failed outside of its works")
                with self._changed:
                    lost = list(self.scheduler._all())
                # first: a cancelled work is told nothing
                self._fail(lost, Failure("error", f"{type(error).__name__} in the server"))
                with self._changed:
                    self.scheduler.cancel(lost)
                    self.scheduler.reap(self.clock())
                    if self.metrics is not None:
                        self.metrics.state(self.scheduler)

    def _isolated(self, plan: list[tuple[plans.Work, int]]) -> list[Any]:
        try:
            return self._compute(plan)
        except Exception as error:
            if len(plan) == 1:
                log.exception("a work failed")
                return [Failure("error", f"{type(error).__name__} in the server")]
            return [self._isolated([entry])[0] for entry in plan]

    @torch.inference_mode()
    def _compute(self, plan: list[tuple[plans.Work, int]]) -> list[Any]:
        """Per work: a vector, a score, logits (vocabulary) of the next token, or None after a chunk of a prompt."""
        items = [_item(work, count) for work, count in plan]
        hidden, offsets = self.packed_step(items)
        outcomes: list[Any] = [None] * len(plan)
        embedded = [i for i, (work, _) in enumerate(plan) if isinstance(work, TextWork) and work.labels is None]
        if embedded:
            rows = torch.cat([hidden[offsets[i] : offsets[i + 1]] for i in embedded])
            lengths = torch.tensor([0] + [offsets[i + 1] - offsets[i] for i in embedded]).cumsum(0)
            skips = torch.tensor([plan[i][0].instruction_len for i in embedded], dtype=torch.int32)  # type: ignore[attr-defined]
            device = hidden.device
            pooled = self.model.pool(rows, lengths.to(device=device, dtype=torch.int32), skips.to(device)).cpu()
            for place, i in enumerate(embedded):
                outcomes[i] = pooled[place].clone()
        ending = [
            i
            for i, (work, count) in enumerate(plan)
            if isinstance(work, Generation) and work.done + count == len(work.tokens)
        ]
        if ending:
            last = torch.tensor([offsets[i + 1] - 1 for i in ending], device=hidden.device)
            logits = self.packed_step.logits(hidden[last])
            for place, i in enumerate(ending):
                outcomes[i] = logits[place]
        scored = [i for i, (work, _) in enumerate(plan) if isinstance(work, TextWork) and work.labels is not None]
        if scored:
            rows = torch.cat([hidden[offsets[i] : offsets[i + 1]] for i in scored])
            starts = torch.tensor([0] + [offsets[i + 1] - offsets[i] for i in scored], device=rows.device).cumsum(0)
            labels = torch.tensor([label for i in scored for label in plan[i][0].labels], device=rows.device)  # type: ignore[attr-defined]
            losses = sums_per_sample(self.packed_step.label_losses(rows, labels), starts)
            counts = sums_per_sample((labels != IGNORE_INDEX).to(losses.dtype), starts)
            for i, score in zip(scored, (-losses / counts).tolist(), strict=True):  # read back once
                outcomes[i] = score
        return outcomes

    def _apply(self, work: Any, count: int, outcome: Any) -> list[Event]:
        """Record a work's outcome; returns the events to send."""
        if isinstance(outcome, Failure):
            self._drop(work)
            return [outcome]
        if isinstance(work, TextWork):
            self.scheduler.remove(work)
            return [Vector(outcome) if work.labels is None else Score(outcome)]
        work.done += count
        if outcome is None or work.cancelled:
            return []
        try:
            return [self._next_token(work, outcome)]
        except Exception as error:
            log.exception("choosing a token failed")
            self._drop(work)
            return [Failure("error", f"{type(error).__name__} in the server")]

    def _next_token(self, work: Generation, logits: Tensor) -> Token:
        assert work.stream is not None
        replies = [work.tokens[work.prompt :]] if work.sampling.penalizes else ()
        token = int(work.sampling.choose(logits[None], work.generator, replies))
        logprob, top = _log_probabilities(logits, token, work.logprobs)
        now = self.clock()
        if self.metrics is not None:
            self.metrics.token(now - work.last_token, first=not work.decoding)
        work.last_token = now
        finish: Finish | None = None
        if token in self.ends:
            finish = "stop"
        else:
            work.tokens.append(token)
            if work.stream.push(token):
                finish = "stop"
            elif len(work.tokens) - work.prompt == work.max_tokens:
                finish = "length"
        if finish is not None:
            work.stream.finish()
            self.scheduler.finish(work)
        text = "".join(work.pieces)
        work.pieces.clear()
        return Token(None if token in self.ends else token, text, logprob, top, finish)

    def _drop(self, work: Any) -> None:
        if isinstance(work, Generation):
            work.shareable = False  # whatever its rows hold
            self.scheduler.finish(work)
        else:
            self.scheduler.remove(work)

    def _fail(self, works: Sequence[Any], failure: Failure) -> None:
        for work in works:
            self._tell(work, failure)

    def _tell(self, work: Any, event: Event) -> None:
        if work.cancelled:
            return
        try:
            work.sink(event)
        except Exception:
            # such as a closed event loop: nobody is waiting for this work
            log.exception("a result could not be delivered")
            self.cancel([work])


def _item(work: plans.Work, count: int) -> Item:
    if isinstance(work, TextWork):
        return Item(work.tokens, None, 0, work.causal, work.causal_prefix)
    assert isinstance(work, Generation)
    return Item(work.tokens[work.done : work.done + count], work.interval, work.done)


def _log_probabilities(
    logits: Tensor, token: int, alternatives: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-probabilities of the chosen token and of the most likely ones, before temperature."""
    if alternatives is None:
        return None, ()
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(alternatives) if alternatives else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return float(logprobs[token]), top
