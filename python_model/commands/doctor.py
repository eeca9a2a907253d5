"""``grit doctor``: what is installed, which backend each device gets, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import grit_kernels as gk
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
        "backends": gk.describe_backends(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit doctor``."""
    parser = argparse.ArgumentParser(prog="grit doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"grit_kernels {found['grit_kernels']}, Python {found['python']}, {found['platform']}")
    for name, version in found["packages"].items():
        print(f"  {name:<14} {version or 'not installed'}")
    for package in found["outside_of_tested"]:
        print(f"outside of what was tested: {package}")
    print(f"devices: CPU with {found['cpu_threads']} threads" + "".join(f", {name}" for name in found["cuda_devices"]))
    print("backends:")
    for backend in found["backends"]["available"]:
        print(f"  {backend['name']:<10} {'yes' if backend['usable'] else 'no ':<4} {backend['reason']}")
    print("implementation of each op by device:")
    for op, devices in found["backends"]["ops"].items():
        print(f"  {op:<32} " + ", ".join(f"{device}: {choice}" for device, choice in devices.items()))


if __name__ == "__main__":
    main()
