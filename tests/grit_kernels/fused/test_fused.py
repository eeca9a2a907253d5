"""rms_norm, rotary and the gated activations on every backend: the accuracy rule, any layout, registration, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grit_kernels import _library
from grit_kernels.fused import gelu_tanh_mul, reference, rms_norm, rotary, silu_mul
from tests.conftest import Backend, assert_within_rule
from tests.grit_kernels.fused.problems import (
    DTYPES,
    eager_gelu_mul,
    eager_norm,
    eager_rotary,
    eager_silu_mul,
    in_float64,
    results,
)


def compare(
    backend: Backend, ours: Callable[..., Any], eager: Callable[..., Any], inputs: list[Tensor | None], leaves: int
) -> None:
    """Outputs and gradients of both against float64."""
    truths_in = in_float64(inputs)
    outputs = eager(*truths_in)
    grads = [torch.randn(o.shape, dtype=torch.float64) for o in outputs]
    truths = results(eager, truths_in, grads, leaves)
    eagers = results(eager, inputs, grads, leaves)
    on_device = [None if x is None else x.to(backend.device) for x in inputs]
    with backend():
        actual = results(ours, on_device, [g.to(backend.device) for g in grads], leaves)
    for i, (a, t, e) in enumerate(zip(actual, truths, eagers, strict=True)):
        assert a.dtype == e.dtype, f"result {i}"
        assert_within_rule(a.cpu(), t, e, f"result {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 576), (70, 33), (130, 8), (3, 1), (0, 16)])
def test_rms_norm_and_its_gradients_keep_the_accuracy_rule(
    backend: Backend, dtype: torch.dtype, offset: float, added: bool, rows: int, columns: int
) -> None:
    x, residual = torch.randn(2, rows, columns).to(dtype)
    inputs = [x, torch.randn(columns).to(dtype)] + ([residual] if added else [])

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return rms_norm(x, weight, 1e-5, residual=residual, offset=offset)  # type: ignore[call-overload]

    def eager(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return eager_norm(x, weight, residual, 1e-5, offset)

    compare(backend, ours, eager, inputs, len(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_dtype", ["same", "float32"])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "dim", "rotated"),
    [(2, 7, 3, 64, 64), (1, 33, 2, 80, 32), (3, 2, 1, 6, 4), (2, 0, 1, 8, 8)],
)
def test_rotary_and_its_gradients_keep_the_accuracy_rule(
    backend: Backend, dtype: torch.dtype, table_dtype: str, batch: int, length: int, heads: int, dim: int, rotated: int
) -> None:
    q, k = torch.randn(batch, length, 2 * heads, dim).to(dtype), torch.randn(batch, length, heads, dim).to(dtype)
    # the two halves of a table differ, unlike a model's: nothing relies on it
    tables = torch.randn(2, 1 if heads == 3 else batch, length, rotated)
    tables = tables.to(dtype if table_dtype == "same" else torch.float32)

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return tuple(x.to(q.dtype) for x in eager_rotary(q, k, cos, sin))

    compare(backend, rotary, eager, [q, k, *tables], 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ours", [silu_mul, gelu_tanh_mul])
@pytest.mark.parametrize("shape", [(5, 1536), (2, 3, 37), (1,), (0, 8)])
def test_gated_activations_and_their_gradients_keep_the_accuracy_rule(
    backend: Backend, dtype: torch.dtype, ours: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    inputs: list[Tensor | None] = [2 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]
    compare(backend, ours, eager_silu_mul if ours is silu_mul else eager_gelu_mul, inputs, 2)


@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_takes_tables_whose_rows_lie_apart(backend: Backend, batch: int) -> None:
    q, k = (torch.randn(2, 5, heads, 16, device=backend.device) for heads in (4, 2))
    cos, sin = (torch.randn(batch, 5, 16, device=backend.device) for _ in range(2))

    def apart(x: Tensor) -> Tensor:
        return torch.cat((x, torch.full_like(x, float("nan"))), dim=2)[..., :16]

    with backend():
        expected = rotary(q, k, cos, sin)
        for tables in ((apart(cos), sin), (cos, apart(sin)), (apart(cos), apart(sin))):
            for found, want in zip(rotary(q, k, *tables), expected, strict=True):
                assert torch.equal(found, want)


def test_rotary_reads_any_layout_and_writes_the_one_of_attention(backend: Backend) -> None:
    """As a model passes its states: (B, heads, T, D), or thirds of one product."""
    states = torch.randn(2, 5, 3, 3 * 16, device=backend.device)
    cos, sin = torch.randn(2, 1, 5, 16, device=backend.device)
    q, k, _ = states.chunk(3, dim=-1)
    with backend():
        expected = rotary(q.contiguous(), k.contiguous(), cos, sin)
        given = rotary(q, k, cos, sin)
        moved = rotary(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)), cos, sin)
    for one, two, three in zip(expected, given, moved, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        assert two.is_contiguous() and three.is_contiguous()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_joins_16_bit_and_float32(backend: Backend, low: torch.dtype) -> None:
    """An autocast step adds a 16-bit branch to a float32 stream, and its products read 16 bits."""
    x, residual, weight = torch.randn(9, 40).to(low), torch.randn(9, 40), torch.randn(40)

    def eager(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
        out, total = eager_norm(x, weight, residual, 1e-6, 0.0)
        return out if x.dtype == torch.float64 else out.to(low), total

    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
        return rms_norm(x, weight, 1e-6, residual=residual, dtype=low)

    compare(backend, ours, eager, [x, weight, residual], 3)
    with backend():
        mixed = rms_norm(residual.to(backend.device), weight.to(backend.device), residual=x.to(backend.device))
        wide = rms_norm(x.to(backend.device), weight.to(backend.device), dtype=torch.float32)
    assert mixed[0].dtype == mixed[1].dtype == wide.dtype == torch.float32
    truth = eager_norm(x.double(), weight.double(), None, 1e-6, 0.0)[0]
    torch.testing.assert_close(wide.cpu().double(), truth, rtol=1e-5, atol=1e-5)


def test_only_asked_gradients_are_made_and_either_output_may_be_unused(backend: Backend) -> None:
    x, residual = torch.randn(2, 4, 24, device=backend.device)
    weight = torch.randn(24, device=backend.device)
    with backend():
        for used in (0, 1):
            a, b, w = (t.clone().requires_grad_() for t in (x, residual, weight))
            rms_norm(a, w, residual=b)[used].sum().backward()
            assert a.grad is not None and torch.equal(a.grad, b.grad)
            assert (w.grad is not None and bool(w.grad.any())) == (used == 0)
        frozen = x.clone().requires_grad_()
        rms_norm(frozen, weight).sum().backward()
        assert frozen.grad is not None


def test_a_nan_stays_a_nan_and_touches_its_own_row_only(backend: Backend) -> None:
    x, up = torch.randn(2, 3, 20, device=backend.device)
    x[1, 7] = float("nan")
    with backend():
        normed = rms_norm(x, torch.ones(20, device=backend.device))
        gated = silu_mul(x, up)
    assert bool(normed[1].isnan().all()) and bool(normed[[0, 2]].isfinite().all())
    assert bool(gated[1, 7].isnan()) and int(gated.isnan().sum()) == 1


def test_huge_gates_neither_overflow_nor_turn_into_nan(backend: Backend) -> None:
    gate = torch.tensor([-3e38, -1e4, -200.0, -90.0, 90.0, 200.0, 1e4, 3e38], device=backend.device)
    for function, eager in ((silu_mul, eager_silu_mul), (gelu_tanh_mul, eager_gelu_mul)):
        with backend():
            leaf = gate.clone().requires_grad_()
            out = function(leaf, torch.ones_like(gate))
            out.sum().backward()
        assert leaf.grad is not None
        expected = eager(gate.double().cpu(), torch.ones(8).double())[0]
        torch.testing.assert_close(out.detach().cpu().double(), expected, rtol=1e-6, atol=1e-30)
        if backend.is_op:  # torch's own derivative of GELU is NaN at 3e38
            assert torch.equal(leaf.grad.cpu(), (gate > 0).float().cpu())


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_residual", "rotary", "gated"])
def test_opcheck(backend: Backend, op: str) -> None:
    if not backend.is_op:
        pytest.skip("the reference is no op")
    x, y = (torch.randn(2, 3, 8, device=backend.device, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, device=backend.device, requires_grad=True)
    heads = torch.randn(1, 3, 2, 8, device=backend.device, requires_grad=True)
    table = torch.randn(1, 3, 8, device=backend.device)
    ops = torch.ops.grit_kernels
    with backend():
        if op == "rotary":
            torch.library.opcheck(ops.rotary, (heads, heads.detach()[:, :, :1].clone(), table, table, False))
        elif op == "gated":
            torch.library.opcheck(ops.gated_forward, (x, y, 1))
            torch.library.opcheck(ops.gated_backward, (x.detach(), x.detach(), y.detach(), 0))
        else:
            residual = y if op == "rms_norm_residual" else None
            torch.library.opcheck(ops.rms_norm_forward, (x, weight, residual, 1e-6, 0.0, torch.float32))
            given = (x.detach(), None if residual is None else y.detach(), x.detach(), weight.detach(), 1e-6, 0.0, True)
            torch.library.opcheck(ops.rms_norm_backward, given)


def test_a_compiled_function_gives_the_same_with_any_number_of_rows() -> None:
    def layer(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        normed, total = rms_norm(x, weight, residual=residual)
        return silu_mul(normed, total)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(16, requires_grad=True)
    for rows in (3, 8):
        x, residual = torch.randn(2, rows, 16, requires_grad=True)
        expected, actual = layer(x, weight, residual), compiled(x, weight, residual)
        assert torch.equal(expected, actual)
        for a, b in zip(*(torch.autograd.grad(out.sum(), [weight]) for out in (expected, actual)), strict=True):
            assert torch.equal(a, b)


def test_the_closed_forms_of_the_references_are_their_derivatives() -> None:
    """float64, by finite differences."""
    x, y = torch.randn(2, 3, 6, dtype=torch.float64)
    weight = torch.randn(6, dtype=torch.float64)
    grad, grad_total = torch.randn(2, 3, 6, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, y, weight)]
    outs = reference.rms_norm_forward(leaves[0], leaves[2], leaves[1], 1e-3, 1.0, torch.float64)
    torch.autograd.backward(outs, [grad, grad_total])
    closed = reference.rms_norm_backward(grad, grad_total, outs[1].detach(), weight, 1e-3, 1.0, True)
    torch.testing.assert_close(closed[0], leaves[0].grad)
    torch.testing.assert_close(closed[0], leaves[1].grad)
    torch.testing.assert_close(closed[1], leaves[2].grad)
    for kind in range(len(reference.KINDS)):
        gate, up = (t.clone().requires_grad_() for t in (x, y))
        reference.gated_forward(gate, up, kind).backward(grad)
        for a, b in zip(reference.gated_backward(grad, x, y, kind), (gate.grad, up.grad), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(not _library.status().loaded, reason="without the compiled library")
@pytest.mark.parametrize("dimensions", [0, 9])
def test_a_tensor_has_one_to_eight_dimensions(dimensions: int) -> None:
    x = torch.ones([1] * dimensions)
    with pytest.raises(RuntimeError, match=f"expected 1 to 8 dimensions, got {dimensions}"):
        torch.ops.grit_kernels.gated_forward(x, x, 0)


OPS = torch.ops.grit_kernels
ROWS, GAIN = torch.ones(2, 3, 8), torch.ones(8)
ANGLES = torch.ones(1, 3, 4)
HEADS = torch.ones(2, 3, 1, 8)


def norm(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "x": ROWS, "weight": GAIN, "residual": ROWS, "eps": 1e-6, "offset": 0.0, "out_dtype": torch.float32, **changes,
    }  # fmt: skip
    return lambda: OPS.rms_norm_forward(**arguments)


def norm_backward(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "grad_out": ROWS, "grad_total": ROWS, "total": ROWS, "weight": GAIN, "eps": 1e-6, "offset": 0.0, "need_weight": True,
        **changes,
    }  # fmt: skip
    return lambda: OPS.rms_norm_backward(**arguments)


def turned(**changes: Any) -> Callable[[], Any]:
    return lambda: OPS.rotary(**{"q": HEADS, "k": HEADS, "cos": ANGLES, "sin": ANGLES, "transposed": False, **changes})


def gated(**changes: Any) -> Callable[[], Any]:
    return lambda: OPS.gated_forward(**{"gate": ROWS, "up": ROWS, "kind": 0, **changes})


def gated_backward(**changes: Any) -> Callable[[], Any]:
    return lambda: OPS.gated_backward(**{"grad": ROWS, "gate": ROWS, "up": ROWS, "kind": 0, **changes})


REFUSED_BY_OPS: dict[str, tuple[Callable[[], Any], str]] = {
    "fewer rows of a residual": (norm(residual=ROWS[:1]), "residual: expected the shape of x"),
    "a residual of fewer dimensions": (norm(residual=ROWS[0]), "residual: expected the shape of x"),
    "a gain of another size": (norm(weight=GAIN[:7]), "weight: expected a contiguous tensor of 8 elements"),
    "strided columns": (norm(x=torch.ones(2, 3, 16)[..., ::2]), "x: the last dimension must be contiguous"),
    "two narrow dtypes": (
        norm(x=ROWS.bfloat16(), residual=None, out_dtype=torch.float16),
        "out_dtype: expected float32 or the dtype of x",
    ),
    "a gradient of another shape": (norm_backward(grad_out=ROWS[:, :2]), "grad_out: expected the shape of x"),
    "a second gradient of another shape": (norm_backward(grad_total=ROWS[:1]), "grad_total: expected the shape of x"),
    "a second gradient of another dtype": (
        norm_backward(grad_total=ROWS.bfloat16()),
        "grad_out, grad_total: expected the dtypes of out and total",
    ),
    "gradients of two narrow dtypes": (
        norm_backward(grad_out=ROWS.half(), grad_total=None, total=ROWS.bfloat16()),
        "grad_out, grad_total: expected the dtypes of out and total",
    ),
    "queries of three dimensions": (turned(q=ROWS), "q, k, cos: expected"),
    "keys of three dimensions": (turned(k=ROWS), "q, k, cos: expected"),
    "a table of four dimensions": (turned(cos=HEADS, sin=HEADS), "q, k, cos: expected"),
    "sines of another shape": (turned(sin=ANGLES[:, :2]), "sin: expected the shape of cos"),
    "keys of another batch": (turned(k=HEADS[:1]), "k: expected batch, tokens and dim of q"),
    "keys of other tokens": (turned(k=HEADS[:, :2]), "k: expected batch, tokens and dim of q"),
    "keys of another dim": (turned(k=HEADS[..., :6]), "k: expected batch, tokens and dim of q"),
    "tables of another batch": (turned(cos=ANGLES.repeat(3, 1, 1), sin=ANGLES.repeat(3, 1, 1)), "cos: expected"),
    "tables of other tokens": (turned(cos=ANGLES[:, :2], sin=ANGLES[:, :2]), "cos: expected"),
    "an odd number of channels": (turned(cos=ANGLES[..., :3], sin=ANGLES[..., :3]), "cos: expected"),
    "more channels than there are": (turned(cos=torch.ones(1, 3, 10), sin=torch.ones(1, 3, 10)), "cos: expected"),
    "keys of another dtype": (turned(k=HEADS.half()), "q, k, cos, sin: their dtypes do not fit"),
    "sines of another dtype": (turned(sin=ANGLES.half()), "q, k, cos, sin: their dtypes do not fit"),
    "tables of another narrow dtype": (
        turned(q=HEADS.half(), k=HEADS.half(), cos=ANGLES.bfloat16(), sin=ANGLES.bfloat16()),
        "q, k, cos, sin: their dtypes do not fit",
    ),
    "an up of another shape": (gated(up=ROWS[:1]), "up: expected the shape of gate"),
    "an up of another dtype": (gated(up=ROWS.half()), "up: expected the dtype of gate"),
    "a gradient of another shape than the gate's": (gated_backward(grad=ROWS[:1]), "grad: expected the shape of gate"),
    "an up of another shape in the backward": (gated_backward(up=ROWS[:1]), "up: expected the shape of gate"),
    "a gradient of another dtype than the gate's": (
        gated_backward(grad=ROWS.half()),
        "grad, up: expected the dtype of gate",
    ),
    "an up of another dtype in the backward": (
        gated_backward(up=ROWS.half()),
        "grad, up: expected the dtype of gate",
    ),
}


@pytest.mark.skipif(
    not _library.status().loaded or _library.interpreting(), reason="the checks are those of the compiled library"
)
def test_the_ops_refuse_what_they_would_read_or_write_beyond_its_end() -> None:
    """Whoever calls them; what goes together to the last value is computed."""
    for accepted in (
        norm(),
        norm(x=ROWS.half(), residual=ROWS.bfloat16()),
        norm(x=ROWS.half(), residual=None, out_dtype=torch.float16),
        norm(x=torch.ones(2, 1), weight=GAIN[:1], residual=None),
        norm_backward(grad_out=ROWS.half()),
        norm_backward(grad_total=None, total=ROWS.half()),
        turned(),
        turned(q=HEADS.repeat(1, 1, 4, 1), cos=torch.ones(2, 3, 8), sin=torch.ones(2, 3, 8)),
        turned(q=HEADS.half(), k=HEADS.half()),
        gated(),
        gated_backward(),
    ):
        accepted()
    for name, (call, message) in REFUSED_BY_OPS.items():
        with pytest.raises(RuntimeError) as caught:
            call()
        assert message in str(caught.value), name


@pytest.mark.skipif(not _library.status().loaded, reason="without the compiled library")
def test_every_instruction_set_gives_nearly_the_same() -> None:
    x, residual = torch.randn(2, 67, 83).bfloat16()
    weight, grad = torch.randn(83), torch.randn(67, 83)
    q, k = torch.randn(1, 9, 4, 70), torch.randn(1, 9, 2, 70)
    cos, sin = torch.randn(2, 1, 9, 44)
    found = []
    for isa in _library.cpu_isas():
        with _library.cpu_isa(isa):
            norm = torch.ops.grit_kernels.rms_norm_forward(x, weight, residual, 1e-6, 0.0, torch.bfloat16)
            back = torch.ops.grit_kernels.rms_norm_backward(grad, None, norm[1].float(), weight, 1e-6, 0.0, True)
            gated = torch.ops.grit_kernels.gated_backward(grad, grad * 3, grad, 1)
            found.append([*norm, *back, *gated, *rotary(q, k, cos, sin)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(
                a.float(), b.float(), rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-4
            )


@pytest.mark.skipif(not _library.status().loaded, reason="without the compiled library")
@pytest.mark.usefixtures("restore_threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    x = torch.randn(700, 256)
    weight = torch.randn(256)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(
            [
                rms_norm(x, weight),
                *torch.ops.grit_kernels.rms_norm_backward(x, x, x, weight, 1e-6, 0.0, True),
                silu_mul(x, x),
            ]
        )
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


X, Q, TABLE = torch.zeros(2, 4), torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: rms_norm([1.0], torch.ones(1)),
            TypeError,
            "x: expected a float32, bfloat16 or float16 tensor, got list",
        ),
        (lambda: rms_norm(X.long(), torch.ones(4)), TypeError, "x: expected"),
        (lambda: rms_norm(X.double(), torch.ones(4)), TypeError, "x: got torch.float64"),
        (lambda: rms_norm(X, torch.ones(3)), ValueError, "weight: expected"),
        (lambda: rms_norm(X, None), TypeError, "weight: expected a float32, bfloat16 or float16 tensor, got NoneType"),
        (lambda: rms_norm(X, torch.ones(4).double()), TypeError, "weight: got torch.float64"),
        (lambda: rms_norm(X, torch.ones(4), residual=X.double()), TypeError, "residual: got torch.float64"),
        (
            lambda: rms_norm(X, torch.ones(4, device="meta")),
            ValueError,
            "weight: expected a tensor on cpu, got .* meta",
        ),
        (lambda: rotary(Q, Q, TABLE.double(), TABLE.double()), TypeError, "cos: got torch.float64"),
        (lambda: silu_mul(X[0, 0], X[0, 0]), ValueError, "gate: expected at least one dimension"),
        (lambda: rms_norm(X, torch.ones(4), -1.0), ValueError, "eps: expected a number >= 0"),
        (lambda: rms_norm(X, torch.ones(4), float("nan")), ValueError, "eps"),
        (lambda: rms_norm(X, torch.ones(4), residual=torch.zeros(4)), ValueError, "residual: expected"),
        (lambda: rms_norm(X.half(), torch.ones(4), residual=X.bfloat16()), TypeError, "residual: expected"),
        (lambda: rms_norm(X.half(), torch.ones(4), dtype=torch.bfloat16), TypeError, "dtype: expected"),
        (lambda: rotary(Q, Q[:, :2], TABLE, TABLE), ValueError, "q, k: expected"),
        (lambda: rotary(Q, Q.half(), TABLE, TABLE), ValueError, "q, k: expected"),
        (lambda: rotary(Q, Q, TABLE[..., :3], TABLE[..., :3]), ValueError, "cos: expected"),
        (lambda: rotary(Q, Q, TABLE, TABLE[:, :2]), ValueError, "sin: expected"),
        (lambda: rotary(Q.half(), Q.half(), TABLE.bfloat16(), TABLE), TypeError, "cos: expected"),
        (lambda: rotary(Q, Q, TABLE.clone().requires_grad_(), TABLE), ValueError, "cos: expected a constant table"),
        (lambda: silu_mul(X, X[:1]), ValueError, "up: expected"),
        (lambda: silu_mul(X, X.half()), TypeError, "up: expected"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_second_derivative_is_refused_with_what_to_do() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    for out in (rms_norm(x, torch.ones(8)), silu_mul(x, x)):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="backend\\('reference'\\)"):
            grad.sum().backward()
    # the rotation is linear, and its gradient is a rotation too
    q = torch.randn(1, 2, 1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(rotary(q, q, *torch.randn(2, 1, 2, 4))[0].square().sum(), q, create_graph=True)
    grad.sum().backward()
    assert q.grad is not None
