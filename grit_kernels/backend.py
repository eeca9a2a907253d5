"""Which implementation of an op runs: ``reference`` (plain torch), ``cpu`` (C++) or ``triton``.

Every kernel is a ``torch.library`` op whose schema, fake and autograd are in the ``op.py`` of its folder. The dispatcher
picks the implementation by device: CPU tensors go to the C++ library, CUDA tensors to Triton. Where one of them is
missing, the reference takes its place, with one warning. ``with grit_kernels.backend(name)`` or the environment variable
GRIT_KERNELS_BACKEND overrides the choice and never falls back. GRIT_KERNELS_CUDA_CPP=1 at start-up lets kernels in CUDA C++
serve CUDA tensors instead of their Triton twins, until a GPU has said which are faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from grit_kernels import _library
from grit_kernels._library import interpreting
from grit_kernels.problem import Problem, gathering

BACKENDS = ("reference", "cpu", "triton")

_forced: str | None = None
_choices: dict[str, dict[str, str]] = {}
_library_handle = torch.library.Library("grit_kernels", "FRAGMENT")


@functools.cache
def triton_reason() -> str:
    """Empty when the Triton backend can run here, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def check_backend_name(name: str) -> str:
    """The name, or ValueError listing the accepted ones."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


def forced_backend() -> str | None:
    """The backend requested by the context manager or the environment, None when the device decides."""
    if _forced is not None:
        return _forced
    name = os.environ.get("GRIT_KERNELS_BACKEND")
    return check_backend_name(name) if name else None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every grit_kernels op inside the block on one backend: ``"reference"``, ``"cpu"`` or ``"triton"``.

    The setting is process-wide (backward passes may run on another thread). An op whose tensors do not fit the backend
    raises instead of falling back.
    """
    global _forced
    previous, _forced = _forced, check_backend_name(name)
    try:
        yield
    finally:
        _forced = previous


def use_reference(device: torch.device) -> bool:
    """True when a call on ``device`` must run the reference; raises when the forced backend cannot serve the device."""
    name = forced_backend()
    if name is None:
        return False
    if name == "reference":
        return True
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend 'cpu' was requested, but the tensors are on {device}")
        if not _library.status().loaded:
            raise RuntimeError(f"backend 'cpu' was requested, but {_library.status().reason}")
        return False
    if device.type == "cpu" and not interpreting():
        raise ValueError(
            "backend 'triton' was requested, but the tensors are on the CPU (TRITON_INTERPRET=1 at start-up allows it)"
        )
    if reason := triton_reason():
        raise RuntimeError(f"backend 'triton' was requested, but {reason}")
    return False


def has_kernel(op: str, device: torch.device) -> bool:
    """Whether something faster than the plain torch reference runs ``op`` on ``device`` now."""
    choice = _choices[op].get(device.type, "none")
    return forced_backend() != "reference" and not choice.startswith(("reference", "none"))


def runs_triton(op: str, device: torch.device) -> bool:
    """Whether a call of ``op`` on ``device`` would run its Triton kernel now."""
    return forced_backend() != "reference" and _choices[op].get(device.type, "").startswith("triton")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _announced(function: Callable[..., Any], message: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _warn_once(message)
        return function(*args, **kwargs)

    return run


def _lazy(path: str) -> Callable[..., Any]:
    module, name = path.split(":")

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return run


def declare_op(schema: str) -> None:
    """Define op ``grit_kernels::<schema>`` that only a compiled library implements."""
    _library_handle.define(schema)
    _library.check_signature(schema)


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any] | None,
    triton: str | None = None,
    cuda: str | None = None,
    problem: type[Problem] | None = None,
    composite: bool = False,
) -> None:
    """Define op ``grit_kernels::<schema>`` and register what implements it on this machine.

    ``reference``: plain torch function with the schema's arguments, None for an op that only Triton needs. ``triton``:
    ``"module:function"`` of a launcher with the same arguments, imported at the first call (so importing the package never
    imports Triton), or None. ``cuda``: the op of :func:`declare_op` that holds a CUDA C++ kernel with the same arguments, used
    where Triton is not installed, or instead of Triton where GRIT_KERNELS_CUDA_CPP asks for it.
    ``problem``: reference and launcher take its fields as one object, see :func:`gathering`. ``composite``: the plain torch
    function calls whichever kernels exist; it is the implementation everywhere, not a fallback.
    """
    _library_handle.define(schema)
    _library.check_signature(schema)
    name = schema.split("(")[0]
    library = _library.status()
    triton_found = importlib.util.find_spec("triton") is not None
    chosen = _choices[name] = {"cpu": "cpu (C++)", "cuda": "triton"}
    if problem is not None and reference is not None:
        reference = gathering(problem, schema, reference)
    launcher = None if triton is None else _lazy(triton)
    if launcher is not None and problem is not None:
        launcher = gathering(problem, schema, launcher)

    def use(key: str, choice: str, function: Callable[..., Any]) -> None:
        chosen[key.lower()] = choice
        _library_handle.impl(name, function, key)

    if composite:
        assert reference is not None
        chosen.update(cpu="torch and kernels", cuda="torch and kernels")
        _library_handle.impl(name, reference, "CompositeExplicitAutograd")
        return

    def fall_back(key: str, why: str) -> None:
        if reference is None:
            chosen[key.lower()] = "none (only the Triton kernels need it)"
            return
        message = f"grit_kernels::{name} runs its plain torch reference, which is slow: {why}"
        use(key, f"reference ({why})", _announced(reference, message))

    if interpreting() and launcher is not None:
        use("CPU", "triton (interpreter)", launcher)
    elif not _has_kernel(name, "CPU"):
        fall_back("CPU", "the compiled library does not implement it" if library.loaded else library.reason)
    compiled = cuda is not None and _has_kernel(cuda, "CUDA")
    if launcher is not None and triton_found and not (compiled and _prefers_cuda_cpp()):
        use("CUDA", "triton", launcher)
    elif compiled:
        use("CUDA", "cuda (C++)", getattr(torch.ops.grit_kernels, str(cuda)))
    else:
        fall_back("CUDA", "it has no Triton kernel" if triton is None else "the package triton is not installed")


def _prefers_cuda_cpp() -> bool:
    value = os.environ.get("GRIT_KERNELS_CUDA_CPP", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"GRIT_KERNELS_CUDA_CPP: expected 0 or 1, got {value!r}")
    return value == "1"


def refuse_double_backward(op: str, what: str) -> None:
    """Make a second derivative through the backward op an error that says what to do."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{what} has no second derivative on the compiled backends; "
            "use `with grit_kernels.backend('reference')` for double backward"
        )

    torch.library.register_autograd(f"grit_kernels::{op}", refuse)


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"grit_kernels::{name}", key)


def describe_backends() -> dict[str, Any]:
    """What can run here and what each op uses: ``{"available": [{name, usable, reason}], "ops": {op: {device: choice}}}``.

    ``"cpu_sets"``: the instruction sets that the C++ kernels use on this CPU, and why not AMX; None without the library.
    """
    library = _library.status()
    triton = triton_reason()
    return {
        "forced": forced_backend(),
        "available": [
            {"name": "reference", "usable": True, "reason": "plain torch, float64-capable"},
            {"name": "cpu", "usable": library.loaded, "reason": library.reason or f"compiled library {library.path}"},
            {"name": "triton", "usable": not triton, "reason": triton or "CUDA tensors"},
        ],
        "cpu_sets": dataclasses.asdict(_library.cpu_choice()) if library.loaded else None,
        "ops": {name: dict(choices) for name, choices in sorted(_choices.items())},
    }
