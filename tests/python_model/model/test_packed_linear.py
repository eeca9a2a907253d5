"""Packed linear layers compute what the plain ones do, from one copy of the weights."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from python_model import GritLM
from python_model.model import packed_linear
from python_model.model.identity import fingerprint
from python_model.model.packed_linear import PackedLinear, own_memory, pack_linear_layers

supported = [dtype for dtype in packed_linear.DTYPES if packed_linear._supported(dtype)]
if not supported:
    pytest.skip("oneDNN multiplies no 16-bit type on this CPU", allow_module_level=True)


@pytest.mark.parametrize("dtype", supported)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_packed_layer_keeps_the_accuracy_of_the_plain_one(dtype: torch.dtype, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias, dtype=dtype).eval()
    x = torch.randn(2, rows, 96, dtype=dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    packed = PackedLinear(layer)
    with torch.no_grad():
        got, plain = packed(x), layer(x)
    assert got.shape == plain.shape and got.dtype == dtype
    error = (plain.double() - exact).abs().max()
    assert (got.double() - exact).abs().max() <= 2 * error
    assert torch.equal(packed.weight.to_dense(), layer.weight)


def test_only_layers_of_their_own_are_packed() -> None:
    dtype = supported[0]

    class Other(nn.Linear):
        pass

    def layer(kind: type[nn.Linear] = nn.Linear, dtype: torch.dtype = dtype) -> nn.Linear:
        return kind(32, 32, dtype=dtype).eval()

    first, second = layer(), layer()
    second.weight = first.weight
    hooked, training = layer(), layer().train()
    hooked.register_forward_hook(lambda *inputs: None)
    parts = [layer(), layer(Other), layer(dtype=torch.float32), first, second, hooked, training, nn.Sequential(layer())]
    module = nn.Sequential(*parts)
    assert pack_linear_layers(module) == 2
    assert [type(part) is PackedLinear for part in module] == [True] + 7 * [False]
    assert isinstance(module[7][0], PackedLinear)


def results(model: GritLM) -> list[torch.Tensor]:
    """An embedding and logits."""
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([[1, 7, 30, 12]])).logits[0]
    return [model.encode(["a text about paper and light"], convert_to_tensor=True).double(), logits.double()]


def test_a_packed_model_keeps_its_accuracy_and_its_fingerprint(checkpoint: Path) -> None:
    model = GritLM(checkpoint, dtype=torch.bfloat16, device="cpu")
    exact = GritLM(checkpoint, dtype=torch.float32, device="cpu")
    exact.model.load_state_dict({name: x.float() for name, x in model.model.state_dict().items()})
    plain, print_of_plain = results(model), fingerprint(model)
    assert pack_linear_layers(model.decoder[0]) == 7 * model.model.config.num_hidden_layers
    assert fingerprint(model) == print_of_plain
    for got, before, truth in zip(results(model), plain, results(exact), strict=True):
        assert (got - truth).abs().max() <= 2 * (before - truth).abs().max()


def test_a_packed_model_lets_go_of_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list its mapped files")
    folder = tmp_path / "copied"
    shutil.copytree(checkpoint, folder)
    model = GritLM(folder, dtype=torch.bfloat16, device="cpu")
    pack_linear_layers(model.decoder[0])
    own_memory(model)
    gc.collect()
    assert str(folder) not in maps.read_text()
