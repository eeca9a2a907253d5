"""Plans of a packed pass whose layers are compiled one by one.

Layers that run eagerly make a plan when the first of them needs it and hand it on in the :class:`AttentionPass`. A compiled graph
may not change what it is given, and one graph serves all layers, so their plans are made before the first layer runs. What the
layers ask for is found by reading one token with them once, without their graphs. (The graph of a whole model needs none of this:
it makes its own pass; and where it has gradients, so that the pass is not shared, the layers' calls of the op that makes a plan
are the same, and the compiler keeps one.)
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from grit_kernels.attention import plan_key
from grit_kernels.attention.problem import Shapes
from grit_kernels.backend import runs_triton
from grit_kernels.hf.attention_pass import AttentionPass
from grit_kernels.precision import autocast_dtype


class AttentionKind(NamedTuple):
    """What a kind of attention layer asks for: the heads of its states, and its options."""

    sliding_window: int | None
    options: tuple[float, float]
    """softmax_scale and softcap."""
    shapes: Shapes
    """Of one token."""


_kinds: weakref.WeakKeyDictionary[nn.Module, dict[Any, list[AttentionKind]]] = weakref.WeakKeyDictionary()


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` runs as a compiled graph of its own."""
    forward = module.__dict__.get("forward")
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


def want_plans(decoder: nn.Module, grit_pass: AttentionPass) -> bool:
    """Whether the layers of ``decoder``, about to run eagerly, are compiled and their kernels take a plan."""
    if torch.compiler.is_compiling() or not runs_triton("attention_plan", grit_pass.causal.device):
        return False
    layers = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return any(is_compiled(layer) for part in layers for layer in part)


def make_plans(decoder: nn.Module, grit_pass: AttentionPass, read_one_token: Callable[[], AttentionPass]) -> None:
    """Put the problems and plans of all kinds of layers into ``grit_pass``. ``read_one_token`` runs the decoder."""
    pack = grit_pass.pack
    assert pack is not None
    device = pack.device
    state = (autocast_dtype(device), next(decoder.parameters()).dtype)  # which the dtype of the states depends on
    found = _kinds.setdefault(decoder, {})
    if state not in found:
        found[state] = _read_kinds(read_one_token, device)
    backward = torch.is_grad_enabled()
    deterministic = grit_pass.deterministic or torch.are_deterministic_algorithms_enabled()
    contexts = pack.contexts
    tables = [(None, "")] if contexts is None else [(contexts.alone, "alone"), (contexts.after, "after")]
    for kind in found[state]:
        for table, name in tables:
            problem, plans = grit_pass.prepare(
                (name, kind.sliding_window, *kind.options),
                functools.partial(grit_pass.problem_of_pack, table, kind.sliding_window, kind.options),
            )
            rows, keys = (pack.tokens,) * 2 if table is None else (table.rows.shape[0], table.keys.shape[0])
            shapes = kind.shapes._replace(rows=rows, keys=keys)
            given = (*shapes, backward, deterministic, *problem.flat())
            plans[plan_key(shapes, deterministic)] = torch.ops.grit_kernels.attention_plan(*given)


def _read_kinds(read_one_token: Callable[[], AttentionPass], device: torch.device) -> list[AttentionKind]:
    generators = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(generators), torch.compiler.set_stance("force_eager"):
        prepared = read_one_token().prepared
    return [
        AttentionKind(window, tuple(options), shapes)
        for (_, window, *options), (_, plans, _) in prepared.items()
        for shapes in {key[0]: None for key in plans}
    ]
