"""Where the time of a forward pass goes: exclusive seconds per group of modules.

Hooks around every module of a decoder, and a wrapper around its attention function, share one stack: a group is charged for
the time between its start and end that no group inside it takes, so the groups add up to the whole pass.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

ATTENTION, PROJECTIONS, MLP = "attention op", "q, k, v, o projections", "MLP"
NORMS, ROTARY, RESIDUALS = "norms", "rotary, head layout", "residual adds"
EMBEDDING, AROUND = "embedding", "pack, unpack, masks"
GROUPS = (MLP, PROJECTIONS, ATTENTION, NORMS, ROTARY, RESIDUALS, EMBEDDING, AROUND)


def _group(name: str, module: nn.Module) -> str | None:
    """The group of a module by its name inside the decoder; None: counted with what is around it."""
    last = name.rsplit(".", 1)[-1]
    if name == "":
        return AROUND
    if last in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return PROJECTIONS
    if last == "mlp":
        return MLP
    if "norm" in last:
        return NORMS
    if last in ("self_attn", "rotary_emb"):
        return ROTARY
    if last == "embed_tokens":
        return EMBEDDING
    return RESIDUALS if name.startswith("layers.") and last.isdigit() else None


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.last = 0.0

    def _charge(self) -> None:
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    def enter(self, group: str) -> None:
        self._charge()
        self.stack.append(group)

    def leave(self) -> None:
        self._charge()
        self.stack.pop()


@contextlib.contextmanager
def _timed(decoder: nn.Module, clock: _Clock) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    handles = []
    for name, module in decoder.named_modules():
        group = _group(name, module)
        if group is not None:
            handles.append(module.register_forward_pre_hook(lambda m, i, g=group: clock.enter(g)))
            handles.append(module.register_forward_hook(lambda m, i, o: clock.leave()))
    implementation = decoder.config._attn_implementation  # type: ignore[union-attr]
    attention = ALL_ATTENTION_FUNCTIONS[implementation]

    def timed(*args: Any, **kwargs: Any) -> Any:
        clock.enter(ATTENTION)
        out = attention(*args, **kwargs)
        clock.leave()
        return out

    ALL_ATTENTION_FUNCTIONS[implementation] = timed
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[implementation]  # uncovers the registered one
        for handle in handles:
            handle.remove()


def seconds_by_group(decoder: nn.Module, run: Callable[[], Any], repeats: int = 1) -> dict[str, float]:
    """Mean seconds of each of GROUPS over ``repeats`` runs; CPU only (it does not wait for a device)."""
    clock = _Clock()
    with _timed(decoder, clock):
        for _ in range(repeats):
            run()
    return {group: clock.seconds[group] / repeats for group in GROUPS}
