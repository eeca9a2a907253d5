"""Autocast is seen on every kind of device that has it, and no launch leaves its rounding to a compiler's default."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import grit_kernels
from grit_kernels.precision import autocast_dtype


@pytest.mark.parametrize("name", ["cpu", "cuda", "xpu", "mps", "mtia", "hpu", "ipu", "maia", "xla", "privateuseone"])
def test_the_dtype_that_autocast_asks_for_is_known_on_every_device(name: str) -> None:
    if name == "privateuseone":
        name = torch._C._get_privateuse1_backend_name()
    device = torch.device(name)
    assert autocast_dtype(device) is None
    torch.set_autocast_enabled(name, True)
    try:
        assert autocast_dtype(device) == torch.get_autocast_dtype(name)
    finally:
        torch.set_autocast_enabled(name, False)


def test_devices_without_autocast_have_none() -> None:
    assert autocast_dtype(torch.device("meta")) is None


def test_every_triton_launch_says_whether_multiplications_and_additions_fuse() -> None:
    """Triton means to change its default, which would change results and speed with an update of Triton."""
    launches = []
    for path in sorted(Path(grit_kernels.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                if name.endswith("_kernel"):
                    launches.append((f"{path.name}: {name}", {keyword.arg for keyword in node.keywords}))
    assert len(launches) > 15
    assert [where for where, keywords in launches if "enable_fp_fusion" not in keywords] == []
