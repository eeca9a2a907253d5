"""Replicas of the server on Ray Serve: several copies of the same application, on one machine or many.

Each replica is a process with its own copy of the weights; Ray's proxies route each request to the replica
with fewer open ones, scale the number of replicas with the load, and restart a replica that has died; only the requests it was
computing are lost.

A client that queries one index repeatedly sends the header ``serve_multiplexed_model_id`` with the index's name: Ray then prefers
a replica that has answered from that index before and so has the states of its documents in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from python_model.support.arguments import check_at_least
from python_model.support.optional import require

INDEXES_PER_REPLICA = 8
"""Number of indexes that a replica is remembered for."""


@dataclass(frozen=True)
class Replicas:
    """The number of replicas: between ``least`` and ``most``, enough for ``requests_per_replica`` open requests each, those that
    wait included.
    """

    least: int
    most: int
    requests_per_replica: int

    def __post_init__(self) -> None:
        check_at_least("least", self.least, 1)
        check_at_least("most", self.most, self.least)
        check_at_least("requests_per_replica", self.requests_per_replica, 1)

    @classmethod
    def parse(cls, text: str, requests_per_replica: int) -> Replicas:
        """Parse ``"2"`` (two) or ``"1:8"`` (one to eight)."""
        least, _, most = text.partition(":")
        if not least.isdigit() or (most and not most.isdigit()):
            raise ValueError(f"replicas: expected a number, or LEAST:MOST, got {text!r}")
        return cls(int(least), int(most or least), requests_per_replica)


def start(
    build: Callable[[Callable[[str], Any]], Any],
    replicas: Replicas,
    *,
    host: str,
    port: int,
    cpus: float = 1,
    gpus: float = 0,
    max_requests: int = 512,
    drain_seconds: float = 30,
    blocking: bool = True,
) -> None:
    """Serve until the process is asked to stop (or, if not ``blocking``, in the background).

    Args:
        build: creates the application in a replica; called with a coroutine function that the application awaits with the
            name of each index it answers from.
        cpus, gpus: per replica.
        max_requests: open requests per replica; further ones wait at the proxy.
    """
    serve = require("ray.serve", "ray")

    def application() -> Any:
        @serve.multiplexed(max_num_models_per_replica=INDEXES_PER_REPLICA)
        async def remember(index: str) -> str:
            return index

        return build(remember)

    deployment = serve.deployment(
        name="grit",
        max_ongoing_requests=max_requests,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=drain_seconds,
        autoscaling_config={
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": replicas.requests_per_replica,
        },
    )(serve.ingress(application)())
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployment.bind(), name="grit", blocking=blocking)
