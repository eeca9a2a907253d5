"""The fusing part of patch(): fused ops in place of what is between a decoder's matrix products.

A module is fused because it *behaves* like the formula: its class's own forward is run on a small stand-in with random weights
and compared. The replacement is bound per instance and inspects the module again in every call:

* norms: one op for RMSNorm, including Gemma's ``1 + weight``
* gated MLPs: ``down(act(gate(x)) * up(x))``, the product of the two branches being one op
* attention: the class's own forward, in which ``apply_rotary_pos_emb`` refers to the fused rotation, whose results have the
  layout that the attention kernels read

Linear layers, and everything else that has weights, are called as the modules they are at that time, so later additions and
replacements (hooks, LoRA, quantised layers) take effect. If a call does not fit the op, the class's own forward runs; inside
torch.compile it always does, because the compiler fuses these functions itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grit_kernels.backend import has_kernel
from grit_kernels.fused import DTYPES, gelu_tanh_mul, reference, rms_norm, rotary, silu_mul
from grit_kernels.precision import autocast_dtype

ROTARY = "apply_rotary_pos_emb"
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (nn.functional.silu, silu_mul),
    "gelu_tanh": (functools.partial(nn.functional.gelu, approximate="tanh"), gelu_tanh_mul),
}


@dataclass(frozen=True)
class Norm:
    """The properties found for a norm: the attribute that holds its epsilon, the offset of its weight, its result's dtype."""

    eps: str
    offset: float
    promotes: bool  # 16-bit input and float32 weight give float32, otherwise the input's dtype
    forward: Callable[..., Any]  # of the class at that time; it may be replaced since


@dataclass(frozen=True)
class GatedMlp:
    """The properties found for an MLP; ``gate`` and ``up`` are the same name if one product gives both halves."""

    gate: str
    up: str
    down: str
    activation: str
    activation_type: type
    kind: str
    forward: Callable[..., Any]  # as of a norm


def attach(decoder: nn.Module) -> None:
    """Fuse every module of ``decoder`` that behaves like one of the formulas."""
    found: dict[Any, Any] = {}
    for module in decoder.modules():
        forward = _fused_forward(module, found)
        if forward is not None:
            setattr(module, forward_slot(module), forward)


def detach(decoder: nn.Module) -> None:
    """Undo :func:`attach`."""
    for module, slot, _ in _fused(decoder):
        restore_forward(module, slot)


def kinds(decoder: nn.Module) -> dict[str, int]:
    """The number of modules that run fused: ``{"norm": .., "mlp": .., "rotary": ..}``."""
    names = {_norm_forward: "norm", _mlp_forward: "mlp", _attention_forward: "rotary"}
    found = dict.fromkeys(names.values(), 0)
    for _, _, forward in _fused(decoder):
        found[names[forward.func]] += 1
    return found


def forward_slot(module: nn.Module) -> str:
    """The attribute of a module that holds the forward to replace: accelerate's hooks move and wrap it."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def restore_forward(module: nn.Module, slot: str) -> None:
    """Put the class's own forward back into ``slot``, see :func:`forward_slot`."""
    if slot == "forward":
        del module.__dict__[slot]
    else:
        setattr(module, slot, types.MethodType(type(module).forward, module))


def _fused(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for module in decoder.modules():
        slot = forward_slot(module)
        forward = module.__dict__.get(slot)
        if isinstance(forward, functools.partial) and forward.func in (_norm_forward, _mlp_forward, _attention_forward):
            yield module, slot, forward


def _fused_forward(module: nn.Module, found: dict[Any, Any]) -> Any:
    """The forward to bind, or None. A partial, not a closure, so that deepcopy and pickle carry it over."""
    slot = forward_slot(module)
    bound = module.__dict__.get(slot)
    if bound is not None and not (slot == "_old_forward" and getattr(bound, "__func__", None) is type(module).forward):
        return None  # another library's forward
    facts = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))))
    shapes = tuple((name, p.shape) for name, p in module.named_parameters(recurse=False))
    children = tuple((name, type(child)) for name, child in module.named_children())
    key = (type(module), facts, shapes, children)
    if key not in found:
        found[key] = _recognised(module)
    what = found[key]
    if isinstance(what, Norm):
        return functools.partial(_norm_forward, module, what)
    if isinstance(what, GatedMlp):
        return functools.partial(_mlp_forward, module, what)
    return functools.partial(_attention_forward, module) if what is ROTARY else None


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """A trial neither depends on global settings nor changes them; this includes random numbers."""
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


@_apart()
def _recognised(module: nn.Module) -> Norm | GatedMlp | str | None:
    if _rebound(type(module)) is not None:
        return ROTARY
    children = dict(module.named_children())
    if not children and [name for name, _ in module.named_parameters()] == ["weight"]:
        return _as_norm(module)
    if 3 <= len(children) <= 4 and not dict(module.named_parameters(recurse=False)):
        return _as_mlp(module, children)
    return None


def _stand_in(module: nn.Module, **modules_or_parameters: nn.Module | nn.Parameter) -> Any:
    """An object of the module's class with its attributes, but with these parameters and children and without its own forward."""
    made = object.__new__(type(module))
    made.__dict__.update({k: v for k, v in vars(module).items() if k not in ("forward", "_old_forward", "_hf_hook")})
    given = modules_or_parameters
    made.__dict__["_parameters"] = {k: v for k, v in given.items() if isinstance(v, nn.Parameter)}
    children = {k: v for k, v in given.items() if isinstance(v, nn.Module)}
    made.__dict__["_modules"] = {k: children.get(k, v) for k, v in module._modules.items()}
    return made


def _same(module: Any, x: Tensor, expected: Tensor) -> bool:
    """Whether the class's forward of the stand-in gives ``expected`` for ``x``, training or not."""
    for training in (True, False):
        module.__dict__["training"] = training
        try:
            got = type(module).forward(module, x)
        except Exception:  # whatever it requires, it is not this formula
            return False
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            return False
        if not torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5):
            return False
    return True


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def _as_norm(module: nn.Module) -> Norm | None:
    shape = next(module.parameters()).shape
    if len(shape) != 1 or not shape[0]:
        return None
    weight, rows = _draw(2, *shape)[1], _draw(4, *shape)
    # rows of several magnitudes: where mean(x^2) is close to epsilon, its place and value show
    rows = rows * torch.tensor([1.0, 30.0, 1e-2, 1e-3], dtype=torch.float32)[:, None]
    stand_in = _stand_in(module, weight=nn.Parameter(weight))
    wide = rows.double()
    for eps, value in vars(module).items():
        if not isinstance(value, float) or not 0 < value < 1e-2:
            continue
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + value)
        for offset in (0.0, 1.0):
            if _same(stand_in, rows, normed * (weight.double() + offset)):
                dtypes = [type(module).forward(stand_in, rows.to(low)).dtype for low in DTYPES[1:]]
                if dtypes in ([torch.float32, torch.float32], list(DTYPES[1:])):
                    return Norm(eps, offset, dtypes[0] == torch.float32, type(module).forward)
    return None


def _as_mlp(module: nn.Module, children: dict[str, nn.Module]) -> GatedMlp | None:
    bare = [name for name, child in children.items() if not list(child.parameters())]
    names = next(
        (n for n in (("gate_proj", "up_proj"), ("gate_up_proj", "gate_up_proj")) if set(n) <= set(children)), None
    )
    if len(bare) != 1 or names is None or set(children) != {*names, "down_proj", *bare}:
        return None
    gate, up = names
    hidden, inner = 6, 10
    sizes = dict.fromkeys(names, (inner * (2 if gate == up else 1), hidden)) | {"down_proj": (hidden, inner)}
    layers = {name: _Product(_draw(*size, i + 1)[..., i]) for i, (name, size) in enumerate(sizes.items())}
    stand_in, x = _stand_in(module, **layers), 2 * _draw(2, 5, hidden)
    wide = x.double()
    parts = layers[gate](wide).chunk(2, dim=-1) if gate == up else (layers[gate](wide), layers[up](wide))
    for kind, (activation, _) in ACTIVATIONS.items():
        if _same(stand_in, x, layers["down_proj"](activation(parts[0]) * parts[1])):
            return GatedMlp(gate, up, "down_proj", bare[0], type(children[bare[0]]), kind, type(module).forward)
    return None


class _Product(nn.Module):
    """A linear layer of a stand-in, in the dtype of its input."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T.to(x.dtype)


@dataclass(frozen=True)
class _Rebound:
    """A class's attention forward in which :data:`ROTARY` is the fused rotation."""

    forward: Callable[..., Any]
    globals: dict[str, Any]  # of the forward that it was made from
    original: Callable[..., Any]  # what ROTARY referred to there
    renamed: frozenset[str]  # arguments renamed by a deprecation wrapper around that forward


_rebound_classes: dict[type, tuple[Any, _Rebound | None]] = {}
"""Per class: its forward at that time, and its replacement."""


def _rebound(cls: type) -> _Rebound | None:
    """The rebound forward of an attention class; None if it does not rotate by the formula."""
    forward = getattr(cls, "forward", None)
    known = _rebound_classes.get(cls)
    if known is None or known[0] is not forward:  # it may have been replaced since
        known = _rebound_classes[cls] = (forward, _rebind(cls))
    return known[1]


@_apart()
def _rebind(cls: type) -> _Rebound | None:
    forward: Any = getattr(cls, "forward", None)
    renamed = set()
    while hasattr(forward, "__wrapped__"):
        wrapper = inspect.getclosurevars(forward)
        if "old_name" not in wrapper.nonlocals or forward.__globals__["__name__"] != "transformers.utils.deprecation":
            return None
        renamed.add(wrapper.nonlocals["old_name"])
        forward = forward.__wrapped__
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(ROTARY)
    if not callable(original) or not _rotates(original, 8, 8):
        return None
    rotate = functools.partial(_rotate, original, _rotates(original, 8, 4))
    own = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTARY: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return _Rebound(own, forward.__globals__, original, frozenset(renamed))


def _rotates(function: Callable[..., Any], dim: int, rotated: int) -> bool:
    """Whether ``function(q, k, cos, sin)`` is the rotation of the first ``rotated`` values by halves."""
    q, k = _draw(2, 2, 3, 5, dim).unbind(0)
    cos, sin = _draw(2, 2, 5, rotated).unbind(0)
    try:
        given = function(q, k[:, :1], cos, sin)
    except Exception:  # whatever it requires, it is not this formula
        return False
    moved = reference.rotary(q.transpose(1, 2).double(), k[:, :1].transpose(1, 2).double(), cos, sin, False)
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and all(
            a.shape == b.transpose(1, 2).shape and torch.allclose(a.double(), b.transpose(1, 2), rtol=1e-4, atol=1e-5)
            for a, b in zip(given, moved, strict=True)
        )
    )


def _takes_part(x: object, op: str) -> bool:
    """Whether a fused op supports this tensor; subclasses (distributed or fake tensors) use the module's own forward."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype in DTYPES and has_kernel(op, x.device)  # type: ignore[attr-defined]


def _norm_forward(self: Any, what: Norm, *args: Any, **kwargs: Any) -> Any:
    weight = self.weight
    own = torch.compiler.is_compiling() or type(self).forward is not what.forward
    if own or kwargs or len(args) != 1 or type(weight) not in (Tensor, nn.Parameter):
        return type(self).forward(self, *args, **kwargs)
    x = args[0]
    if not _takes_part(x, "rms_norm_forward") or weight.dtype not in DTYPES or weight.device != x.device:
        return type(self).forward(self, x)
    dtype = torch.promote_types(x.dtype, weight.dtype) if what.promotes else x.dtype
    return rms_norm(x, weight, getattr(self, what.eps), offset=what.offset, dtype=dtype)


def _mlp_forward(self: Any, what: GatedMlp, *args: Any, **kwargs: Any) -> Any:
    own = torch.compiler.is_compiling() or type(self).forward is not what.forward
    if own or kwargs or len(args) != 1:
        return type(self).forward(self, *args, **kwargs)
    (x,) = args
    if what.gate == what.up:
        gate, up = getattr(self, what.gate)(x).chunk(2, dim=-1)
    else:
        gate, up = getattr(self, what.gate)(x), getattr(self, what.up)(x)
    activation: Any = getattr(self, what.activation)
    fits = _takes_part(gate, "gated_forward") and type(up) is Tensor and up.dtype == gate.dtype
    if fits and not is_watched(activation) and type(activation) is what.activation_type:
        inner = ACTIVATIONS[what.kind][1](gate, up)
    else:
        inner = activation(gate) * up
    return getattr(self, what.down)(inner)


def is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks (its own, or those of all modules), or its forward has been replaced by anything but patch():
    then it must be called."""
    forward = module.__dict__.get("forward")
    foreign = forward is not None and not getattr(forward, "func", forward).__module__.startswith("grit_kernels.")
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hasattr(module, "_hf_hook")
        or torch.nn.modules.module._has_any_global_hook()
        or foreign
    )


def _attention_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        rebound = _rebound(type(self))
        # a rotation replaced later in the model's own module takes precedence
        if (
            rebound is not None
            and rebound.globals.get(ROTARY) is rebound.original
            and not rebound.renamed & kwargs.keys()
        ):
            return rebound.forward(self, *args, **kwargs)
    return type(self).forward(self, *args, **kwargs)


def _rotate(original: Callable[..., Any], partly: bool, *args: Any, **kwargs: Any) -> Any:
    """Replaces ``apply_rotary_pos_emb(q, k, cos, sin)`` with q and k (B, heads, T, D)."""
    if kwargs or len(args) != 4 or not _takes_part(args[0], "rotary"):
        return original(*args, **kwargs)
    q, k, cos, sin = args
    narrow = q.dtype == cos.dtype or q.dtype == torch.float32
    # a 16-bit state and a float32 table give float32, which autocast converts back
    if not narrow and (cos.dtype != torch.float32 or autocast_dtype(q.device) != q.dtype):
        return original(*args)
    whole = cos.ndim == 3 and (cos.shape[-1] == q.shape[-1] or (partly and cos.shape[-1] < q.shape[-1]))
    if not whole or q.ndim != 4 or k.dtype != q.dtype or cos.requires_grad or sin.requires_grad:
        return original(*args)
    turned = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)
