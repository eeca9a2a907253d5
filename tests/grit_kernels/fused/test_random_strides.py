"""The fused ops on layouts as hypothesis draws them, on every backend."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grit_kernels.fused import rms_norm, silu_mul
from tests.conftest import Backend


@settings(max_examples=25)
@given(st.data())
def test_any_strides_give_what_contiguous_tensors_give(backend: Backend, data: st.DataObject) -> None:
    """Slices of wide tensors that hold NaN elsewhere, and transposed ones."""
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)) + [draw(st.sampled_from([4, 16, 34]))]
    torch.manual_seed(draw(st.integers(0, 99)))

    def laid_out() -> tuple[Tensor, Tensor]:
        plain = torch.randn(shape)
        order = draw(st.permutations(range(len(shape))))
        wide = torch.full([shape[d] + draw(st.integers(0, 3)) for d in order], float("nan"))
        view = wide[tuple(slice(0, shape[d]) for d in order)].permute([order.index(d) for d in range(len(shape))])
        view.copy_(plain)
        return plain.to(backend.device), view.to(backend.device)

    (x, x_view), (y, y_view) = laid_out(), laid_out()
    weight = torch.randn(shape[-1]).to(backend.device)
    with backend():
        for name, a, b in (
            ("rms_norm", rms_norm(x, weight, residual=y), rms_norm(x_view, weight, residual=y_view)),
            ("silu_mul", (silu_mul(x, y),), (silu_mul(x_view, y_view),)),
        ):
            for one, other in zip(a, b, strict=True):
                assert other.is_contiguous(), name
                # torch's own functions round differently in the remainders of differently laid out rows
                torch.testing.assert_close(
                    one, other, rtol=0 if backend.is_op else 1e-6, atol=0 if backend.is_op else 1e-6
                )
