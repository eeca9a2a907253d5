"""torch.library registration of switch attention: schema, fake, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import reference
from grit_kernels.attention.problem import AttentionProblem, Shapes
from grit_kernels.backend import declare_op, define_op, refuse_double_backward

_PROBLEM = f"{AttentionProblem.TENSORS}, {AttentionProblem.OPTIONS}"

_TRITON = "grit_kernels.attention.triton"
_TENSORS, _RESULTS = "Tensor q, Tensor k, Tensor v", "-> (Tensor out, Tensor lse)"
_GRADS = f"Tensor grad_out, Tensor? grad_lse, {_TENSORS}, Tensor out, Tensor lse"
_GRAD_RESULTS = "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
# sinks (Hq): a score per head that takes part in the softmax of every row, and in lse, and brings no value; dsinks is empty
# without them. The rest is for the Triton kernels: plan, the order of the tiles, which all layers of a pass share; deterministic,
# of the backward pass.
_MORE = "Tensor? sinks, Tensor? plan, bool deterministic"


def _reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference behind the op's arguments: it needs neither plan nor order."""
    return lambda *given: function(*given[:-2])


define_op(
    f"attention_forward({_TENSORS}, {_PROBLEM}, {_MORE}) {_RESULTS}",
    reference=_reference(reference.attention_forward),
    triton=f"{_TRITON}_forward:attention_forward",
    problem=AttentionProblem,
)
define_op(
    f"attention_backward({_GRADS}, {_PROBLEM}, {_MORE}) {_GRAD_RESULTS}",
    reference=_reference(reference.attention_backward),
    triton=f"{_TRITON}_backward:attention_backward",
    problem=AttentionProblem,
)
# Makes a plan. Takes Shapes rather than tensors: in a graph of several layers its calls are the same, and the compiler keeps one.
_SHAPES = "SymInt rows, SymInt heads, SymInt keys, SymInt heads_kv, SymInt dim, ScalarType dtype"
define_op(
    f"attention_plan({_SHAPES}, bool backward, bool deterministic, {_PROBLEM}) -> Tensor",
    reference=None,
    triton=f"{_TRITON}_forward:attention_plan",
    problem=AttentionProblem,
)
# few rows over a cache, whose keys may have unused slots between them; other kernels want those moved out of the way first
_DECODE = f"{_TENSORS}, Tensor? used, Tensor? sinks, {_PROBLEM}"
_PAGED = f"Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor? sinks, {_PROBLEM}"
declare_op(f"attention_decode_cuda({_DECODE}) {_RESULTS}")
declare_op(f"attention_decode_paged_cuda({_PAGED}) {_RESULTS}")
define_op(
    f"attention_decode({_DECODE}) {_RESULTS}",
    reference=None,
    triton=f"{_TRITON}_decode:attention_decode",
    cuda="attention_decode_cuda",
    problem=AttentionProblem,
)
# the same with keys in pages (num_blocks, block_size, Hkv, D), of which the problem counts slots; on CPUs for any number of rows
define_op(
    f"attention_decode_paged({_PAGED}) {_RESULTS}",
    reference=None,
    triton=f"{_TRITON}_decode:attention_decode_paged",
    cuda="attention_decode_paged_cuda",
    problem=AttentionProblem,
)


@torch.library.register_fake("grit_kernels::attention_forward")
@torch.library.register_fake("grit_kernels::attention_decode")
@torch.library.register_fake("grit_kernels::attention_decode_cuda")
@torch.library.register_fake("grit_kernels::attention_decode_paged")
@torch.library.register_fake("grit_kernels::attention_decode_paged_cuda")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("grit_kernels::attention_backward")
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, sinks, _plan, _deterministic = rest
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


@torch.library.register_fake("grit_kernels::attention_plan")
def _plan_fake(*given: Any) -> Tensor:
    from grit_kernels.attention.triton_forward import plan_size

    sizes = len(Shapes._fields)
    shapes, (backward, deterministic, *fields) = Shapes(*given[:sizes]), given[sizes:]
    problem = AttentionProblem(*fields)
    return problem.q_len.new_empty(plan_size(shapes, backward, deterministic, problem), dtype=torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    options, more = 3 + AttentionProblem.TENSOR_COUNT, 3 + len(AttentionProblem.NAMES)
    sinks, plan, ctx.deterministic = inputs[more:]
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:options], sinks, plan)
    ctx.options = inputs[options:more]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *saved, sinks, plan = ctx.saved_tensors  # first q, k, v, out, lse, the problem's
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    if grad_lse is not None:  # the -inf of a row without keys depends on nothing, and is where NaN comes from
        grad_lse = grad_lse.masked_fill(saved[4] == float("-inf"), 0.0)
    backward = torch.ops.grit_kernels.attention_backward
    dq, dk, dv, dsinks = backward(grad_out, grad_lse, *saved, *ctx.options, sinks, plan, ctx.deterministic)
    of_problem = [None] * len(AttentionProblem.NAMES)
    return dq, dk, dv, *of_problem, None if sinks is None else dsinks, None, None


torch.library.register_autograd("grit_kernels::attention_forward", _gradients, setup_context=_save)
refuse_double_backward("attention_backward", "switch attention")
