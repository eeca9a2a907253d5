"""Linear layers whose weights lie in the order that oneDNN's products read.

A product in 16 bits reads pairs of rows of the weight side by side. PyTorch stores one after the other, so each call first copies
the weight into the other order, which for a few rows takes as long as the product. :func:`pack_linear_layers` does it once. There
is one copy of the weights as before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16)


class PackedLinear(nn.Module):
    """The layer ``x @ weight.T + bias`` for inference on a CPU; ``weight.to_dense()`` is the weight as it was."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return result

    def extra_repr(self) -> str:
        """What ``nn.Linear`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_linear_layers(module: nn.Module) -> int:
    """Replace the linear layers inside ``module`` whose products oneDNN computes in 16 bits on this CPU; returns how many.

    Only layers that are exactly ``nn.Linear``, in evaluation mode, without hooks, whose weights no other layer inside shares:
    packed weights have no gradient, and can neither be saved nor moved to another device.
    """
    shared = _shared(module)
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and id(child.weight) not in shared and _fits(child):
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count


def own_memory(module: nn.Module) -> None:
    """Copy the parameters out of a mapped checkpoint: its pages stay in memory as long as one parameter refers to the file, also
    those of weights that have been packed since.
    """
    for parameter in module.parameters():
        if not parameter.is_mkldnn:
            parameter.data = parameter.data.clone()


def _shared(module: nn.Module) -> set[int]:
    """The parameters that several modules own."""
    owned: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            owned[id(parameter)] = owned.get(id(parameter), 0) + 1
    return {identity for identity, count in owned.items() if count > 1}


def _fits(layer: nn.Linear) -> bool:
    weight = layer.weight
    touched = (
        layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__ or hasattr(layer, "_hf_hook")
    )
    return (
        weight.device.type == "cpu"
        and type(weight) is nn.Parameter
        and not layer.training
        and not touched
        and _supported(weight.dtype)
    )


def _supported(dtype: torch.dtype) -> bool:
    """Whether this CPU and this PyTorch multiply packed weights of ``dtype`` in oneDNN."""
    if dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        used = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise  # private: may go or move
        return all(used) and bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):
        return False
