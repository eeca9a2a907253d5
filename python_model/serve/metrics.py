"""What ``/metrics`` reports: queue, steps, tokens, times, memory. Only figures, never contents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from python_model.serve.scheduler import Scheduler

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("grit_requests", "Requests", ["endpoint", "status"], registry=registry)
        self.request_seconds = Histogram(
            "grit_request_seconds", "Duration of a request", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "grit_time_to_first_token_seconds",
            "Time from a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "grit_time_between_tokens_seconds",
            "Time between two tokens of a sequence",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("grit_tokens", "Tokens computed, by decoding or by reading", ["kind"], registry=registry)
        self.step_seconds = Histogram("grit_step_seconds", "Duration of a step", buckets=SECONDS, registry=registry)
        self.tokens_per_second = Gauge("grit_tokens_per_second", "Of recent steps", registry=registry)
        self.queued = Gauge("grit_queued_tokens", "Tokens waiting to be read", registry=registry)
        self.running = Gauge("grit_running_sequences", "Sequences with memory", registry=registry)
        self.waiting = Gauge("grit_waiting_sequences", "Sequences waiting for memory", registry=registry)
        self.budget = Gauge(
            "grit_step_budget_tokens", "Tokens of a step in addition to decoding rows", registry=registry
        )
        self.arena_rows = Gauge("grit_arena_rows", "Rows of the key-value memory", registry=registry)
        self.arena_used = Gauge("grit_arena_used_rows", "Rows owned by sequences", registry=registry)
        self.arena_held = Gauge(
            "grit_arena_held_rows", "Rows of ended sequences kept for reuse, included in those owned", registry=registry
        )

    def step(self, scheduler: Scheduler, tokens: int, decoded: int, seconds: float) -> None:
        """Called after each step, from the engine's thread."""
        self.step_seconds.observe(seconds)
        self.tokens.labels("decoded").inc(decoded)
        self.tokens.labels("read").inc(tokens - decoded)
        self.tokens_per_second.set(scheduler.tokens_per_second)
        self.state(scheduler)

    def state(self, scheduler: Scheduler) -> None:
        """Called when works have come to a step or have ended without one, from the engine's thread."""
        self.running.set(len(scheduler.running))
        self.waiting.set(len(scheduler.waiting))
        self.budget.set(scheduler.budget)
        self.arena_rows.set(scheduler.arena.rows)
        self.arena_used.set(scheduler.arena.used)
        self.arena_held.set(sum(sequence.done for sequence in scheduler.held))
        self.queued.set(scheduler.queued_tokens)

    def token(self, seconds: float, *, first: bool) -> None:
        """Called for a token, ``seconds`` after the previous one or after its request's arrival."""
        (self.first_token if first else self.between_tokens).observe(seconds)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Called when a request has ended."""
        self.requests.labels(endpoint, str(status)).inc()
        self.request_seconds.labels(endpoint).observe(seconds)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
