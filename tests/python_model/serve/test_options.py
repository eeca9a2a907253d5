"""What the options of ``grit serve`` set: every one reaches the engine, the service or the server."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from python_model.commands import serve
from python_model.serve import replicas

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")


def built(monkeypatch: pytest.MonkeyPatch, *options: str, keys: tuple[str, ...] = ()) -> Any:
    """The service that ``grit serve`` makes, and what it gives to the application."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        "python_model.serve.app.create_app", lambda service, **rest: found.update(rest, service=service)
    )
    interval = sys.getswitchinterval()
    try:
        serve.build_app(serve.COMMAND.arguments([*options, "--device", "cpu"]), keys, on_index=found)
        assert sys.getswitchinterval() == pytest.approx(serve.SWITCH_SECONDS)
    finally:  # what suits a server's process
        sys.setswitchinterval(interval)
        gc.unfreeze()
    assert found["on_index"] is found
    return SimpleNamespace(**found)


def test_every_option_reaches_what_it_sets(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, restore_threads: None
) -> None:
    options = {
        "kv-tokens": "300",
        "max-step-tokens": "96",
        "target-ms": "250",
        "ageing": "2.5",
        "max-sequences": "3",
        "max-queued-tokens": "5000",
        "max-tokens": "17",
        "timeout": "12.5",
        "max-body-mb": "2",
        "threads": "2",
        "dtype": "bfloat16",
        "served-model-name": "tiny",
        "format": "template",
        "query-instruction": "Find it",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    app = built(monkeypatch, "--model", str(checkpoint), *flags, keys=("secret",))
    service, engine, scheduler = app.service, app.service.engine, app.service.engine.scheduler
    assert engine.arena.rows == 300 and engine.arena.scratch == 96
    assert (scheduler.max_step_tokens, scheduler.target_seconds, scheduler.ageing) == (96, 0.25, 2.5)
    assert (scheduler.max_sequences, scheduler.max_queued_tokens) == (3, 5000)
    limits = service.limits
    assert (limits.reply_tokens, limits.seconds, limits.body_bytes) == (17, 12.5, 2 << 20)
    assert engine.model.model.dtype == torch.bfloat16 and torch.get_num_threads() == 2
    assert service.name == "tiny" and service.format == "template" and engine.generates
    assert service.query_prefix == service.reader.formatter.embed_instruction("Find it")
    assert app.api_keys == ("secret",) and app.hosts == []


def test_without_options_the_model_is_as_saved_and_only_this_machine_is_answered(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    app = built(monkeypatch, "--model", str(checkpoint))
    engine, scheduler = app.service.engine, app.service.engine.scheduler
    assert engine.model.model.dtype == torch.float32 and torch.get_num_threads() == threads
    assert engine.arena.rows == 16384 and app.service.name == checkpoint.name and app.service.format == "grit"
    assert (scheduler.max_step_tokens, scheduler.target_seconds, scheduler.ageing) == (2048, 0.1, 5.0)
    assert (scheduler.max_sequences, scheduler.max_queued_tokens) == (64, 1 << 18)
    assert app.service.query_prefix == app.service.reader.formatter.embed_instruction("")
    assert app.api_keys == () and app.hosts == ["localhost", "127.0.0.1", "[::1]", "127.0.0.1"]


def test_the_mode_decides_whether_there_is_chat(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = built(monkeypatch, "--model", str(checkpoint), "--mode", "embedding")
    assert not app.service.engine.generates


@pytest.mark.parametrize(("flags", "told"), [((), None), (("--no-cuda-graphs",), False)])
def test_graphs_are_captured_where_there_is_a_gpu_unless_told_otherwise(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], told: bool | None
) -> None:
    from python_model.serve.engine import Engine

    class Noted(Engine):
        def __init__(self, model: Any, **options: Any) -> None:
            self.told = options["cuda_graphs"]
            super().__init__(model, **options)

    monkeypatch.setattr("python_model.serve.engine.Engine", Noted)
    assert built(monkeypatch, "--model", str(checkpoint), *flags).service.engine.told is told


def test_the_server_listens_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(serve, "build_app", lambda arguments, keys: ("app", keys))
    monkeypatch.setattr(serve, "leave_out_triton", lambda arguments: None)
    monkeypatch.setattr(serve, "_set_up_logging", lambda: None)
    started: list[Any] = []
    uvicorn = SimpleNamespace(
        Config=lambda app, **options: (app, options),
        Server=lambda config: SimpleNamespace(run=lambda: started.append(config)),
    )
    monkeypatch.setitem(sys.modules, "uvicorn", uvicorn)
    serve.COMMAND.run(serve.COMMAND.arguments(["--host", "::1", "--port", "81", "--drain-seconds", "4"]))
    ((app, options),) = started
    assert app == ("app", [])
    assert options == {
        "host": "::1",
        "port": 81,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": 4,
    }


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda:1", 1)])
def test_replicas_get_the_options_of_one_server(monkeypatch: pytest.MonkeyPatch, device: str, gpus: int) -> None:
    monkeypatch.setenv(serve.KEY_VARIABLE, "secret")
    started: list[Any] = []
    monkeypatch.setattr(replicas, "start", lambda *arguments, **options: started.append((arguments, options)))
    words = ["--ray", "--replicas", "2:3", "--requests-per-replica", "6", "--threads", "5", "--drain-seconds", "4"]
    words += ["--host", "::1", "--port", "81"]
    serve.COMMAND.run(serve.COMMAND.arguments([*words, "--device", device]))
    (((build, count), options),) = started
    assert count == replicas.Replicas(2, 3, 6)
    assert options == {"host": "::1", "port": 81, "cpus": 5, "gpus": gpus, "drain_seconds": 4}
    monkeypatch.setattr(serve, "build_app", lambda arguments, keys, on_index: (arguments.device, keys, on_index))
    monkeypatch.setattr(serve, "leave_out_triton", lambda arguments: started.append(arguments.device))
    with no_logging():
        assert build("remember") == (device, ["secret"], "remember")
    assert started[1:] == [device]


def test_replicas_scale_with_the_number_of_open_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def note(**options: Any) -> Any:
        told.update(options)
        return lambda application: SimpleNamespace(bind=lambda: application)

    ray_serve = SimpleNamespace(
        multiplexed=lambda **options: lambda function: function,
        deployment=note,
        ingress=lambda application: lambda: "app",
        start=told.update,
        run=lambda application, **options: told.update(options, application=application),
    )
    monkeypatch.setattr(replicas, "require", lambda module, extra: ray_serve)
    count = replicas.Replicas.parse("2:5", 6)
    with pytest.raises(ValueError, match="requests_per_replica: expected .* got 0"):
        replicas.Replicas.parse("2:5", 0)
    replicas.start(lambda remember: None, count, host="::1", port=81, cpus=3, drain_seconds=4, max_requests=7)
    assert told["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 6}
    assert told["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 0} and told["max_ongoing_requests"] == 7
    assert told["graceful_shutdown_timeout_s"] == 4 and told["http_options"] == {"host": "::1", "port": 81}
    assert told["application"] == "app" and told["blocking"]


@contextmanager
def no_logging() -> Iterator[None]:
    """As in a new process: neither logger has handlers. (pytest's own are there in a test's body, not in its fixtures.)"""
    root, access = logging.getLogger(), logging.getLogger("python_model.serve.access")
    kept = root.level, root.handlers[:], access.handlers[:], access.propagate
    root.handlers.clear()
    try:
        yield
    finally:
        root.setLevel(kept[0])
        root.handlers[:], access.handlers[:], access.propagate = kept[1:]


def test_the_server_writes_its_log_to_standard_error_and_requests_to_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with no_logging():
        serve._set_up_logging()
        logging.getLogger("python_model.serve").info("starting")
        logging.getLogger("python_model.serve.access").info("a request")
    printed = capsys.readouterr()
    assert printed.err.endswith(" INFO python_model.serve: starting\n") and printed.err.count("\n") == 1
    assert printed.out == "a request\n"
