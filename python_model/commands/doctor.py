"""``grit doctor``: what is installed, which backend each device uses, and why."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

import grit_kernels as gk
from python_model.commands.runner import Command, add_json, show
from python_model.support.precision import INSTRUCTIONS, is_emulated
from python_model.support.tested import outside_of_tested

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "jsonargparse",
    "gguf",
    "matplotlib",
)


def report() -> dict[str, Any]:
    """Versions, devices and backends as one dictionary."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    return {
        "grit_kernels": gk.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions,
        "outside_of_tested": [str(package) for package in outside_of_tested()],
        "cpu_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "emulated_products": [
            str(dtype).removeprefix("torch.") for dtype in INSTRUCTIONS if is_emulated(dtype, torch.device("cpu"))
        ],
        "backends": gk.describe_backends(),
    }


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit doctor``."""
    add_json(parser)


def run(arguments: Namespace) -> None:
    """Print the report."""
    found = report()
    show(arguments, found, "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"grit_kernels {found['grit_kernels']}, Python {found['python']}, {found['platform']}"
    for name, version in found["packages"].items():
        yield f"  {name:<14} {version or 'not installed'}"
    for package in found["outside_of_tested"]:
        yield f"outside the tested range: {package}"
    yield f"devices: CPU with {found['cpu_threads']} threads" + "".join(f", {name}" for name in found["cuda_devices"])
    if emulated := found["emulated_products"]:
        yield f"  this CPU emulates products in {' and '.join(emulated)}, so models compute in float32 here by default"
    yield "backends:"
    for backend in found["backends"]["available"]:
        yield f"  {backend['name']:<10} {'yes' if backend['usable'] else 'no ':<4} {backend['reason']}"
    if sets := found["backends"]["cpu_sets"]:
        products, others = sets["bfloat16_products"], sets["others"]
        yield f"CPU instruction sets: {products} for attention and losses in bfloat16, {others} for the rest"
        yield f"AMX: {sets['amx_reason'] or 'available'}"
    yield "implementation of each op by device:"
    for op, devices in found["backends"]["ops"].items():
        yield f"  {op:<32} " + ", ".join(f"{device}: {choice}" for device, choice in devices.items())


COMMAND = Command("doctor", "What is installed, which backend each device uses, and why.", configure, run)
