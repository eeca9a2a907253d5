"""Lays the Triton kernels out for Hugging Face's kernel hub: the project that ``kernel-builder build`` turns into a hub kernel.

    python -m tools.hub_kernel build/hub --repo-id ORGANISATION/grit-kernels

A hub kernel may be loaded under any name and in several versions at once. So the copy imports itself by relative paths, and its
ops have the namespace that the builder gives it, in the ``_ops.py`` that it writes; nothing else differs from grit_kernels. Left
out are ``patch()``, which registers with transformers (a hub kernel imports torch and Triton only), and the C++ library: CPU
tensors run the plain torch definitions.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from python_model.support.files import new_folder

ROOT = Path(__file__).parent.parent
PACKAGE = "grit_kernels"
LEFT_OUT = ("hf",)
"""Folders of the package that the copy lacks, with what ``__init__.py`` takes from them."""
NO_LIBRARY = "a hub kernel has none, the package grit-kernels has"
"""What a message says about the C++ library, instead of how to build it."""
VERSION = 0
"""Of the hub kernel; 0 says that no GPU has run it yet, and that its functions may still change."""

BUILD = """[general]
name = "grit-kernels"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cuda", "rocm"]
{hub}
[torch-noarch]
"""
FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
CARD = """---
library_name: kernels
license: apache-2.0
---

Attention that is causal or bidirectional per sample, pooling that skips instructions, contrastive and per-token losses, and fused
ops, in Triton. The functions are those of the package grit-kernels.

```python
from kernels import get_kernel

gk = get_kernel("{{ repo_id }}", version={{ version }}, trust_remote_code=True)
out = gk.switch_attention(q, k, v, is_causal)  # (B, T, heads, D), and one flag per sample
```
"""


def moved(source: str, depth: int) -> str:
    """The text of a module ``depth`` folders below the package, with relative imports and the builder's namespace of ops."""
    dots = "." * (depth + 1)
    text = re.sub(
        rf"^(\s*)from {PACKAGE}(?:\.([\w.]+))? import ", rf"\1from {dots}\2 import ", source, flags=re.MULTILINE
    )
    text = re.sub(rf'(f?)"{PACKAGE}::([^\s"]+)"', r'_ops.add_op_namespace_prefix(\1"\2")', text)  # not in a message
    text = text.replace(f'Library("{PACKAGE}", ', 'Library(_ops.add_op_namespace_prefix("").rstrip(":"), ')
    text = text.replace(f"torch.ops.{PACKAGE}", "_ops.ops")
    # a launcher that is imported at its first call
    text = re.sub(rf'"{PACKAGE}\.\w+\.(\w+)"', r'f"{__package__}.\1"', text)
    if "_ops." in text:
        first = "from __future__ import annotations\n"
        if first not in text:
            raise ValueError(f"module: expected the line {first.strip()!r}, after which the ops are imported")
        text = text.replace(first, f"{first}\nfrom {dots} import _ops", 1)
    return text


def without_left_out(source: str) -> str:
    """The package's ``__init__.py`` without what it takes from the folders that are left out."""
    for folder in LEFT_OUT:
        for line in re.findall(rf"^from {PACKAGE}\.{folder}\b.*\n", source, flags=re.MULTILINE):
            source = source.replace(line, "")
            for name in line.split(" import ")[1].strip().split(", "):
                source = re.sub(rf'^ +"{name}",\n|^{name}\(\)\n', "", source, flags=re.MULTILINE)
    return source


def write(out: Path, repo_id: str | None = None) -> None:
    """Write the project into the new folder ``out``, whole or not at all.

    repo_id: the hub repository to upload to, None where that is chosen later.
    """
    with new_folder(out) as folder:
        package = folder / "torch-ext" / PACKAGE
        for path in sorted((ROOT / PACKAGE).rglob("*.py")):
            inside = path.relative_to(ROOT / PACKAGE)
            if inside.parts[0] in LEFT_OUT:
                continue
            text = path.read_text(encoding="utf-8")
            if inside.name == "__init__.py" and len(inside.parts) == 1:
                text = without_left_out(text)
            text = re.sub(r'^_BUILD = ".*"$', f'_BUILD = "{NO_LIBRARY}"', text, flags=re.MULTILINE)
            (package / inside).parent.mkdir(parents=True, exist_ok=True)
            (package / inside).write_text(moved(text, len(inside.parts) - 1), encoding="utf-8")
        hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else ""
        (folder / "build.toml").write_text(BUILD.format(version=VERSION, hub=hub), encoding="utf-8")
        (folder / "flake.nix").write_text(FLAKE, encoding="utf-8")
        (folder / "CARD.md").write_text(CARD, encoding="utf-8")
        shutil.copy(ROOT / "LICENSE", folder / "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.hub_kernel", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--repo-id", help="the hub repository to upload to")
    arguments = parser.parse_args()
    write(arguments.out, arguments.repo_id)


if __name__ == "__main__":
    main()
