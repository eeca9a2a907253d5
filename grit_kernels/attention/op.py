"""torch.library registration of switch attention: schema, fake, autograd."""

from __future__ import annotations

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
_GRAD_RESULTS = "-> (Tensor dq, Tensor dk, Tensor dv)"
# sinks: a score per head that takes part in the softmax of every row, and in lse, and brings no value
_PLANNED = "Tensor plan, bool deterministic, Tensor? sinks"
_PLANNED_GRAD_RESULTS = "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"

define_op(
    f"attention_forward({_TENSORS}, {_PROBLEM}) {_RESULTS}",
    reference=reference.attention_forward,
    triton=f"{_TRITON}_forward:attention_forward",
    problem=AttentionProblem,
)
define_op(
    f"attention_backward({_GRADS}, {_PROBLEM}) {_GRAD_RESULTS}",
    reference=reference.attention_backward,
    triton=f"{_TRITON}_backward:attention_backward",
    problem=AttentionProblem,
)
# The same with the order of the tiles given, which all layers of a pass share; only the Triton kernels have one. The op that
# makes it takes Shapes rather than tensors: in a graph of several layers its calls are the same, and the compiler keeps one.
_SHAPES = "SymInt rows, SymInt heads, SymInt keys, SymInt heads_kv, SymInt dim, ScalarType dtype"
define_op(
    f"attention_plan({_SHAPES}, bool backward, bool deterministic, {_PROBLEM}) -> Tensor",
    reference=None,
    triton=f"{_TRITON}_forward:attention_plan",
    problem=AttentionProblem,
)
define_op(
    f"attention_forward_planned({_TENSORS}, {_PROBLEM}, {_PLANNED}) {_RESULTS}",
    reference=None,
    triton=f"{_TRITON}_forward:attention_forward",
    problem=AttentionProblem,
)
define_op(
    f"attention_backward_planned({_GRADS}, {_PROBLEM}, {_PLANNED}) {_PLANNED_GRAD_RESULTS}",
    reference=None,
    triton=f"{_TRITON}_backward:attention_backward_planned",
    problem=AttentionProblem,
)
# few rows over a cache, whose keys may have unused slots between them; other kernels want those moved out of the way first
_DECODE = f"{_TENSORS}, Tensor? used, Tensor? sinks, {_PROBLEM}"
declare_op(f"attention_decode_cuda({_DECODE}) {_RESULTS}")
define_op(
    f"attention_decode({_DECODE}) {_RESULTS}",
    reference=None,
    triton=f"{_TRITON}_decode:attention_decode",
    cuda="attention_decode_cuda",
    problem=AttentionProblem,
)
# the same with keys in pages (num_blocks, block_size, Hkv, D), of which the problem counts slots; others want them side by side
define_op(
    f"attention_decode_paged(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor? sinks, {_PROBLEM}) {_RESULTS}",
    reference=None,
    triton=f"{_TRITON}_decode:attention_decode_paged",
    problem=AttentionProblem,
)


@torch.library.register_fake("grit_kernels::attention_forward")
@torch.library.register_fake("grit_kernels::attention_forward_planned")
@torch.library.register_fake("grit_kernels::attention_decode")
@torch.library.register_fake("grit_kernels::attention_decode_cuda")
@torch.library.register_fake("grit_kernels::attention_decode_paged")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("grit_kernels::attention_backward")
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("grit_kernels::attention_backward_planned")
def _backward_planned_fake(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads, sinks = _backward_fake(*given), given[-1]
    return *grads, given[2].new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


@torch.library.register_fake("grit_kernels::attention_plan")
def _plan_fake(*given: Any) -> Tensor:
    from grit_kernels.attention.triton_forward import plan_size

    sizes = len(Shapes._fields)
    shapes, (backward, deterministic, *fields) = Shapes(*given[:sizes]), given[sizes:]
    problem = AttentionProblem(*fields)
    return problem.q_len.new_empty(plan_size(shapes, backward, deterministic, problem), dtype=torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    options, planned = 3 + AttentionProblem.TENSOR_COUNT, 3 + len(AttentionProblem.NAMES)
    plan, ctx.deterministic, sinks = inputs[planned:] or (None, True, None)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:options], plan, sinks)
    ctx.options = inputs[options:planned]
    ctx.set_materialize_grads(False)


def _gradients(backward: Any, planned: bool) -> Any:
    def run(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *saved, plan, sinks = ctx.saved_tensors  # first q, k, v, out, lse, the problem's
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        if grad_lse is not None:  # the -inf of a row without keys depends on nothing, and is where NaN comes from
            grad_lse = grad_lse.masked_fill(saved[4] == float("-inf"), 0.0)
        extra = (plan, ctx.deterministic, sinks) if planned else ()
        dq, dk, dv, *dsinks = backward(grad_out, grad_lse, *saved, *ctx.options, *extra)
        of_problem = [None] * len(AttentionProblem.NAMES)
        of_extra = (None, None, None if sinks is None else dsinks[0]) if planned else ()
        return dq, dk, dv, *of_problem, *of_extra

    return run


for _suffix in ("", "_planned"):
    torch.library.register_autograd(
        f"grit_kernels::attention_forward{_suffix}",
        _gradients(getattr(torch.ops.grit_kernels, f"attention_backward{_suffix}"), _suffix != ""),
        setup_context=_save,
    )
    refuse_double_backward(f"attention_backward{_suffix}", "switch attention")
