"""Shards of a key-value store: safetensors files, written atomically, with a checksum per document.

The writer streams tensors to a temporary file, syncs it to disk and renames it. (safetensors' own ``save_file`` does
neither of the last two.) Reading is ``safetensors.safe_open``, which maps the file into memory.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_model.support.files import new_file

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, row-major."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the concatenated bytes of the tensors."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(raw_bytes(tensor), value)
    return value


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    """Total bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def new_name() -> str:
    """A file name that no other process uses."""
    return f"{uuid.uuid4().hex}.safetensors"


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        size = size_in_bytes([tensor])
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # data starts aligned, so that a mapped tensor can be viewed in its dtype
    return text + b" " * (-len(text) % 8)


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that :func:`write_shard` writes for ``tensors``."""
    return 8 + len(_header(tensors)) + size_in_bytes(tensors.values())


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a safetensors file atomically and durably; returns its size in bytes."""
    text = _header(tensors)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(raw_bytes(tensor))
    sync_folder(path.parent)
    return path.stat().st_size


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut (not available, and not needed, on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
