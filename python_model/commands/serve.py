"""``grit serve``: one server for chat and embeddings, from one copy of the weights."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import ipaddress
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, add_model, load, location, path, refuse_without
from python_model.support.arguments import check_at_least
from python_model.support.optional import require

KEY_VARIABLE = "GRIT_API_KEY"

LEAST_ONE = ("kv_tokens", "max_step_tokens", "max_sequences", "max_queued_tokens", "max_tokens", "max_body_mb")

M_ARENA_MAX = -8
"""Of malloc.h."""

SWITCH_SECONDS = 5e-4
"""After this time a thread gives way to another one. A step gives way at each of its ops, and with Python's default of 5 ms it
would wait ten times as long while a request is parsed.
"""


def run(arguments: Namespace) -> None:
    """Serve until the process is asked to stop."""
    refuse_without(arguments, COMMAND.parser(), "ray", "replicas", "requests_per_replica")
    check_numbers(arguments)
    uvicorn = require("uvicorn", "serve")
    for module in ("fastapi", "prometheus_client"):
        require(module, "serve")
    keys = api_keys(arguments.api_key_file)
    check_address(arguments.host, keys)
    if arguments.ray:
        _serve_replicas(arguments, keys)
        return
    share_arena()
    leave_out_triton(arguments)
    app = build_app(arguments, keys)
    _set_up_logging()
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=arguments.drain_seconds,
    )
    uvicorn.Server(config).run()


def check_numbers(arguments: Namespace) -> None:
    """ValueError for a number with which no request could be served."""
    for name in LEAST_ONE:
        check_at_least(f"--{name.replace('_', '-')}", getattr(arguments, name), 1)
    if arguments.threads is not None:
        check_at_least("--threads", arguments.threads, 1)
    check_at_least("--drain-seconds", arguments.drain_seconds, 0)
    if not 0 <= arguments.port < 1 << 16:
        raise ValueError(f"--port: expected 0 to 65535, got {arguments.port}")
    for name in ("target_ms", "timeout"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number > 0, got {getattr(arguments, name)}")
    if arguments.ageing < 0:
        raise ValueError(f"--ageing: expected a number >= 0, got {arguments.ageing}")


def _serve_replicas(arguments: Namespace, keys: Sequence[str]) -> None:
    from python_model.serve.replicas import Replicas, start

    def build(remember: Any) -> Any:
        _set_up_logging()
        leave_out_triton(arguments)
        return build_app(arguments, keys, on_index=remember)

    start(
        build,
        Replicas.parse(arguments.replicas, arguments.requests_per_replica),
        host=arguments.host,
        port=arguments.port,
        cpus=arguments.threads or 1,
        gpus=1 if on_gpu(arguments) else 0,
        drain_seconds=arguments.drain_seconds,
    )


def build_app(arguments: Namespace, keys: Sequence[str], *, on_index: Any = None) -> Any:
    """The application described by the arguments; ``on_index``: see :func:`python_model.serve.app.create_app`."""
    import torch

    from python_model.model.packed_linear import own_memory, pack_linear_layers
    from python_model.serve.app import create_app
    from python_model.serve.engine import Engine
    from python_model.serve.service import Limits, Service

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = {} if arguments.dtype == "auto" else {"dtype": getattr(torch, arguments.dtype)}
    model = load(arguments, mode=arguments.mode, **options)
    if pack_linear_layers(model.decoder[0]):
        own_memory(model)
    engine = Engine(
        model,
        arena_rows=arguments.kv_tokens,
        max_step_tokens=arguments.max_step_tokens,
        target_seconds=arguments.target_ms / 1000,
        ageing=arguments.ageing,
        max_sequences=arguments.max_sequences,
        max_queued_tokens=arguments.max_queued_tokens,
        cuda_graphs=False if arguments.no_cuda_graphs else None,
    )
    service = Service(
        engine,
        name=arguments.served_model_name or _name_of(arguments.model),
        format=arguments.format,
        query_instruction=arguments.query_instruction,
        limits=Limits(
            reply_tokens=arguments.max_tokens, seconds=arguments.timeout, body_bytes=arguments.max_body_mb << 20
        ),
    )
    add_indexes(service, arguments.index, arguments.store, arguments.query_instruction)
    gc.collect()
    trim_memory()
    gc.freeze()  # what is loaded now stays: collections need not walk through it while requests wait
    sys.setswitchinterval(SWITCH_SECONDS)
    local = is_loopback(arguments.host) and not keys
    # DNS rebinding: otherwise another site's page could reach the server by a name that resolves to it
    hosts = ["localhost", "127.0.0.1", "[::1]", arguments.host] if local else []
    return create_app(service, api_keys=keys, hosts=hosts, on_index=on_index)


def add_indexes(service: Any, indexes: Sequence[str], stores: Sequence[str], query_instruction: str) -> None:
    """Open ``NAME=FOLDER`` indexes and the stores of the same names."""
    from python_model.rag.answer import RAG, open_store
    from python_model.rag.index import open_index
    from python_model.rag.reading import read
    from python_model.rag.rope import frequencies, join

    folders, stored = _by_name("--index", indexes), _by_name("--store", stores)
    unknown = sorted(set(stored) - set(folders))
    if unknown:
        raise ValueError(f"--store: expected the name of an --index, got {unknown[0]!r}")
    reader = service.reader
    for name, folder in folders.items():
        store = None
        if name in stored:
            store = open_store(stored[name], reader)
            frequencies(reader)
            # check once that cached keys can be moved; later the model belongs to the engine's thread
            join(read(reader, [[0, 1], [0, 1]], causal=True), reader)
        index = open_index(folder, reader, create=False)
        service.add_index(
            name,
            RAG(reader, index=index, store=store, query_prefix=reader.formatter.embed_instruction(query_instruction)),
        )


def api_keys(file: Path | None) -> list[str]:
    """The keys in a file (one per line) and in the environment."""
    keys = [] if file is None else [line.strip() for line in file.read_text().splitlines()]
    found = [key for key in [*keys, os.environ.get(KEY_VARIABLE, "")] if key]
    if file is not None and not any(keys):
        raise ValueError(f"--api-key-file: expected one key per line, got an empty file {file}")
    return found


def check_address(host: str, keys: Sequence[str]) -> None:
    """ValueError for an address that other machines can reach, unless there is a key."""
    if not keys and not is_loopback(host):
        raise ValueError(
            f"--host: expected 127.0.0.1 (or another loopback address) without an API key, got {host}; "
            f"give --api-key-file or set {KEY_VARIABLE}"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def on_gpu(arguments: Namespace) -> bool:
    """Whether the model computes on a GPU."""
    import torch

    return torch.cuda.is_available() if arguments.device is None else arguments.device.startswith("cuda")


def share_arena() -> None:
    """Let all threads allocate from one arena of the GNU C library, before there are any.

    By default each thread gets its own, whose free memory serves no other: those that tokenise and the one that computes would
    each keep what they held at their busiest.
    """
    _of_glibc("mallopt", M_ARENA_MAX, 1)


def trim_memory() -> None:
    """Return to the system the memory that loading has freed: the GNU C library keeps what lies between blocks in use."""
    _of_glibc("malloc_trim", 0)


def leave_out_triton(arguments: Namespace) -> None:
    """Let ``import triton`` fail in a process that computes on a CPU, as if it were not installed.

    No kernel of such a process needs it, but torch imports it with transformers' models, and it takes some 70 MiB.
    """
    from grit_kernels.backend import interpreting

    if not on_gpu(arguments) and not interpreting():
        modules: dict[str, Any] = sys.modules
        modules.setdefault("triton", None)


def _of_glibc(name: str, *numbers: int) -> None:
    """Call a function of the GNU C library, where that is this process's."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        if platform.libc_ver()[0] == "glibc":
            getattr(ctypes.CDLL(None), name)(*numbers)


def _by_name(option: str, texts: Sequence[str]) -> dict[str, str]:
    """The folders of ``NAME=FOLDER`` or ``FOLDER``, by name."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals:
            name, folder = _name_of(text), text
        if not name or not folder:
            raise ValueError(f"{option}: expected FOLDER or NAME=FOLDER, got {text!r}")
        if name in found:
            raise ValueError(f"{option}: expected a name for each, got {name!r} for {found[name]} and {folder}")
        found[name] = folder
    return found


def _name_of(location: str) -> str:
    """The last part of a path or of a hub's name; that of the folder itself for ``.`` and the like."""
    return Path(location).name.strip(".") or Path(location).resolve().name


def _set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    access = logging.getLogger("python_model.serve.access")
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(logging.Formatter("%(message)s"))
    access.handlers, access.propagate = [lines], False


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit serve``."""
    add_model(parser)
    add = parser.add_argument
    add("--mode", choices=("unified", "embedding", "generative"), default="unified", help="embedding: no chat")
    add("--served-model-name", help="model name for clients; default: the folder's name")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights; auto: as in the checkpoint, but float32 on a CPU that emulates products in 16 bits",
    )
    add("--threads", type=int, help="CPU threads of the model")
    add("--host", default="127.0.0.1", help="address to bind; any but a loopback address needs an API key")
    add("--port", type=int, default=8000)
    add("--api-key-file", type=path, help=f"file with one API key per line; {KEY_VARIABLE} adds one")
    add(
        "--format",
        choices=("grit", "template"),
        default="grit",
        help="format of chat prompts: the model's own, or the tokenizer's chat template",
    )
    add(
        "--query-instruction",
        default="",
        help="instruction for texts with input_type 'query', and for questions to an index",
    )
    add(
        "--index",
        type=location,
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="index to answer from; may be repeated",
    )
    add(
        "--store",
        type=location,
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="key-value store of that index",
    )
    add("--kv-tokens", type=int, default=16384, help="key-value memory for all chats, in tokens")
    add("--max-step-tokens", type=int, default=2048, help="maximum tokens of a step, and of a text to embed")
    add("--target-ms", type=float, default=100.0, help="target time between tokens in milliseconds")
    add("--ageing", type=float, default=5.0, help="seconds after which bulk texts are treated like interactive ones")
    add("--max-sequences", type=int, default=64, help="maximum number of concurrent chats")
    add(
        "--max-queued-tokens",
        type=int,
        default=1 << 18,
        help="waiting tokens above which requests are refused with 429",
    )
    add("--no-cuda-graphs", action="store_true", help="on a GPU, launch the kernels of decoding steps one by one")
    add("--max-tokens", type=int, default=256, help="maximum tokens of a reply if the request does not say")
    add("--timeout", type=float, default=600.0, help="seconds until a request fails")
    add("--max-body-mb", type=int, default=8, help="largest request")
    add("--ray", action="store_true", help="replicas on Ray Serve (extra ray); joins the cluster of RAY_ADDRESS")
    add(
        "--replicas",
        default="1",
        metavar="N|LEAST:MOST",
        help="with --ray: number of replicas, scaled with the number of open requests",
    )
    add(
        "--requests-per-replica",
        type=int,
        default=8,
        help="with --ray: open requests per replica, waiting ones included, that the number of replicas is scaled to",
    )
    add(
        "--drain-seconds",
        type=int,
        default=30,
        help="seconds that running requests have to finish when the server is stopped",
    )


COMMAND = Command("serve", "Serve chat and embeddings from one copy of the weights (docs/serving.md).", configure, run)
