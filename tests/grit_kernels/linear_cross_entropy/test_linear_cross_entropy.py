"""gk.linear_cross_entropy against torch's cross entropy on materialised logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from grit_kernels import _library
from grit_kernels.linear_cross_entropy import chunked
from tests.conftest import assert_within_rule


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, dtype: torch.dtype) -> Tensor:
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")


def problem(dtype: torch.dtype, tokens: int = 37, vocabulary: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(tokens, 24).to(dtype), torch.randn(vocabulary, 24).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[::5] = -100
    return hidden, weight, labels


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(chunked, "_chunk_rows", lambda vocabulary: 16)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("backend_name", ["reference", None])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_equal_cross_entropy(
    backend_name: str | None, softcap: float | None, dtype: torch.dtype
) -> None:
    hidden, weight, labels = problem(dtype)
    grad = torch.rand(len(labels))

    def gradients(run: Callable[[Tensor, Tensor], Tensor], like: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(like).requires_grad_() for x in (hidden, weight)]
        losses = run(*leaves)
        return losses.detach(), *torch.autograd.grad(losses, leaves, grad.to(losses.dtype))

    def ours(h: Tensor, w: Tensor) -> Tensor:
        with gk.backend("reference") if backend_name else torch.enable_grad():
            return gk.linear_cross_entropy(h, w, labels, softcap=softcap)

    found = gradients(ours, dtype)
    truth = gradients(lambda h, w: plain(h, w, labels, softcap, torch.float64), torch.float64)
    eager = gradients(lambda h, w: plain(h, w, labels, softcap, dtype), dtype)
    assert found[0].dtype == torch.float32
    for name, a, b, c in zip(("loss", "dhidden", "dweight"), found, truth, eager, strict=True):
        assert_within_rule(a, b, c, name)
    ignored = labels == -100
    assert bool((found[0][ignored] == 0).all()) and bool((found[1][ignored] == 0).all())


def test_a_second_derivative_is_refused_with_what_to_do() -> None:
    hidden, weight, labels = problem(torch.float32)
    losses = gk.linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    (grad,) = torch.autograd.grad(losses.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*reference"):
        grad.sum().backward()


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, labels = problem(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = gk.linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(losses, gk.linear_cross_entropy(hidden, weight, labels)) and losses.dtype == torch.float64


def test_float64_passes_gradcheck() -> None:
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    labels = torch.tensor([0, 6, -100, 3, 3])
    assert torch.autograd.gradcheck(lambda h, w: gk.linear_cross_entropy(h, w, labels, softcap=3.0), (hidden, weight))


def test_another_ignore_index_and_all_tokens_ignored() -> None:
    hidden, weight, labels = problem(torch.float32)
    labels[labels == -100] = 7
    found = gk.linear_cross_entropy(hidden, weight, labels, ignore_index=7)
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=7, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    nothing = gk.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert bool((nothing == 0).all())
    assert gk.linear_cross_entropy(hidden[:0], weight, labels[:0]).shape == (0,)


def test_only_the_gradients_asked_for_are_computed() -> None:
    hidden, weight, labels = problem(torch.float32)
    for first, second in ((True, False), (False, True)):
        h, w = hidden.clone().requires_grad_(first), weight.clone().requires_grad_(second)
        gk.linear_cross_entropy(h, w, labels).sum().backward()
        assert (h.grad is not None, w.grad is not None) == (first, second)


def test_autocast_lowers_the_product_but_not_the_loss() -> None:
    hidden, weight, labels = problem(torch.float32)
    h = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = gk.linear_cross_entropy(h, weight, labels)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, gk.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels))
    losses.sum().backward()
    assert h.grad is not None and h.grad.dtype == torch.float32


@pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
def test_the_compiled_library_does_not_round_logits_of_16_bit_inputs() -> None:
    hidden, weight, labels = problem(torch.bfloat16, tokens=70, vocabulary=333)
    found = gk.linear_cross_entropy(hidden, weight, labels)
    truth = plain(hidden, weight, labels, None, torch.float64)
    # logits of order 10 rounded to bfloat16 would be wrong by 0.03
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_opcheck_accepts_the_backward_of_transposed_inputs(softcap: float | None) -> None:
    hidden, weight, labels = problem(torch.float32)
    transposed = [x.t().contiguous().t() for x in (hidden, weight)]
    _, *numbers = torch.ops.grit_kernels.linear_cross_entropy_forward(*transposed, labels, -100, softcap)
    arguments = (torch.ones(len(labels)), *transposed, labels, *numbers, -100, softcap, True, True)
    torch.library.opcheck(torch.ops.grit_kernels.linear_cross_entropy_backward.default, arguments)


def test_opcheck_and_fullgraph_compile() -> None:
    hidden, weight, labels = problem(torch.float32)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.grit_kernels.linear_cross_entropy_forward.default, (h, w, labels, -100, 2.0))

    def run(a: Tensor, b: Tensor) -> Tensor:
        return gk.linear_cross_entropy(a, b, labels).mean()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(h, w), (h, w)), torch.autograd.grad(run(h, w), (h, w)), strict=True):
        torch.testing.assert_close(a, b)


H, W, L = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
OUTSIDE = torch.tensor([0, 5, 1])
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "hidden shape": (ValueError, "hidden: expected", lambda: gk.linear_cross_entropy(H[0], W, L)),
    "hidden dtype": (ValueError, "hidden: expected .*got torch.int64", lambda: gk.linear_cross_entropy(H.long(), W, L)),
    "no columns": (ValueError, "hidden: expected .*column, got", lambda: gk.linear_cross_entropy(H[:, :0], W[:, :0], L)),
    "no vocabulary": (ValueError, "lm_head_weight: expected .*row, got", lambda: gk.linear_cross_entropy(H, W[:0], L)),
    "weight width": (ValueError, "lm_head_weight: expected", lambda: gk.linear_cross_entropy(H, W[:, :3], L)),
    "weight dtype": (TypeError, "lm_head_weight: .*got torch.bfloat16", lambda: gk.linear_cross_entropy(H, W.bfloat16(), L)),
    "labels shape": (ValueError, "labels: expected", lambda: gk.linear_cross_entropy(H, W, L[:2])),
    "labels dtype": (ValueError, "labels: expected .*got torch.int32", lambda: gk.linear_cross_entropy(H, W, L.int())),
    "labels no tensor": (ValueError, "labels: .*got list", lambda: gk.linear_cross_entropy(H, W, [0, 1, 2])),  # type: ignore[arg-type]
    "labels on another device": (ValueError, "labels: expected a tensor", lambda: gk.linear_cross_entropy(H, W, L.to("meta"))),
    "label outside": (ValueError, r"labels: expected .*got values in 0\.\.5", lambda: gk.linear_cross_entropy(H, W, OUTSIDE)),
    "negative softcap": (ValueError, "softcap: expected .*got -1", lambda: gk.linear_cross_entropy(H, W, L, softcap=-1.0)),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_by_name(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


def between(x: Tensor, rows: int, columns: int) -> Tensor:
    """``x`` with NaN between its rows and columns."""
    wide = torch.full((x.shape[0] * rows, x.shape[1] * columns), float("nan"), dtype=x.dtype)
    wide[::rows, ::columns] = x
    return wide[::rows, ::columns]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("need_weight", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (1, 2), (3, 2)])
def test_what_lies_between_strided_rows_changes_nothing(
    softcap: float | None, need_weight: bool, rows: int, columns: int
) -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    results = []
    for change in (lambda x: x, lambda x: between(x, rows, columns)):
        h, w = change(hidden).requires_grad_(), change(weight).requires_grad_(need_weight)
        losses = gk.linear_cross_entropy(h, w, labels, softcap=softcap)
        results.append((losses, *torch.autograd.grad(losses.sum(), [h, w] if need_weight else [h])))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


def test_a_hidden_size_of_one_may_have_any_stride() -> None:
    x = torch.randn(6, 8)[:, ::8]
    labels = torch.arange(6) % 2
    wanted = F.cross_entropy(x @ x[:2].T, labels, reduction="none")
    torch.testing.assert_close(gk.linear_cross_entropy(x, x[:2], labels), wanted)
    one = torch.randn(1, 1, 8)[:, 0, ::8]
    assert gk.linear_cross_entropy(one, one, torch.zeros(1, dtype=torch.int64)).item() == 0
    assert gk.contrastive_loss(one, one).item() == 0
    assert torch.equal(gk.pool(one[:, None], method="mean"), one)


@pytest.mark.parametrize("softcap", [None, 1e4])
def test_gradients_of_large_logits_keep_their_digits(softcap: float | None) -> None:
    """Logits up to 1e5: with one number for the highest logit and the log-sum-exp above it the softmax would be off by 5 %."""
    hidden = torch.randn(64, 48) * 10 ** (4 * torch.rand(64, 1))
    weight, labels = torch.randn(300, 48) * 10 ** torch.rand(300, 1), torch.randint(300, (64,))

    def gradients(run: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        return torch.autograd.grad(run(*leaves).sum(), leaves)

    found = gradients(lambda h, w: gk.linear_cross_entropy(h, w, labels, softcap=softcap), torch.float32)
    truth, eager = (
        gradients(lambda h, w, d=d: plain(h, w, labels, softcap, d), d) for d in (torch.float64, torch.float32)
    )
    for name, a, b, c in zip(("hidden", "weight"), found, truth, eager, strict=True):
        size = b.abs().max()
        assert_within_rule(a / size, b / size, c / size, name)
