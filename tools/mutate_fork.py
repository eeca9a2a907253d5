"""Runs pytest in forks of a process that has imported the large packages, which take most of a short run's CPU time.

Nothing of the project is imported before the fork: every run has sources of its own. A process serves one run at a time; a
request is a line of JSON on its standard input, the answers are the run's process id and, when it has ended, its status.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

LARGE = (
    "torch",
    "torch.distributed",
    "triton",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
)


class Run:
    """A run of pytest, to be waited for as a ``subprocess.Popen``: the first process of a session of its own."""

    def __init__(self, server: subprocess.Popen[str], pid: int) -> None:
        self.pid = pid
        self._server, self._status = server, None

    _status: int | None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal; ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        if self._status is None:
            assert self._server.stdout is not None
            if timeout is not None and not select.select([self._server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("pytest", timeout)
            self._status = _number(self._server)
        return self._status


class Forks:
    """The process that forks, started with the first run.

    ``environment``: the variables that packages read when they are imported. ``packages``: what it imports.
    """

    def __init__(self, environment: Mapping[str, str], packages: Iterable[str] = LARGE) -> None:
        self._command = [sys.executable, __file__, *packages]
        self._environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
        self._server: subprocess.Popen[str] | None = None

    def start(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> Run:
        """Run ``pytest arguments`` in ``folder``, which comes first in the path of modules; all it prints goes to ``log``."""
        if self._server is None:
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(
                self._command, env=self._environment, stdin=pipe, stdout=pipe, text=True, bufsize=1
            )
        request = {
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": dict(environment),
            "log": str(log),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        return Run(self._server, _number(self._server))

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.communicate()
            self._server = None


def _number(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError(f"tools/mutate_fork.py ended with {server.wait()}")
    return int(line)


def _serve(packages: Iterable[str]) -> None:
    for name in packages:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    while line := sys.stdin.readline():
        run = os.fork()
        if run == 0:
            _become(**json.loads(line))
        print(run, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]), flush=True)


def _become(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, opened in enumerate((os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT))):
        os.dup2(opened, number)
    os.dup2(1, 2)
    sys.path.insert(0, folder)
    import pytest

    raise SystemExit(pytest.main(arguments))


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose modules are imported as tools.NAME
    _serve(sys.argv[1:])
