"""A Ray cluster of a test's own."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# Ray reads them once in a process, when it is first imported, and keeps the token for all clusters: set before any test runs
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def own_cluster(**options: Any) -> Iterator[Any]:
    """Ray on this machine alone, on the loopback address and with a token that nobody else knows; yields the module.

    ``options``: of ``ray.init``. Processes started inside find the token in their environment.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # on a busy machine a proxy takes longer than Serve's 5 and 10 s to answer, and would be replaced
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        patch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
        import ray

        ray.init(
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            object_store_memory=100 << 20,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
            **options,
        )
        try:
            yield ray
        finally:
            ray.shutdown()
