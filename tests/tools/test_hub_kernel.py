"""The layout for Hugging Face's kernel hub: loadable under any name, several at once, and the same functions."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels.backend import interpreting
from tests.conftest import needs_source_tree
from tools import hub_kernel

pytestmark = needs_source_tree
# what kernel-builder writes for a kernel that is not compiled ahead of time
OPS = "import torch\nops = torch.ops.{0}\ndef add_op_namespace_prefix(op_name):\n    return f'{0}::{{op_name}}'\n"
FLAGS = torch.tensor([True, False])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "project"
    hub_kernel.write(out, "someone/grit-kernels")
    return out


def built(project: Path, folder: Path, name: str) -> Path:
    """A build variant as kernel-builder lays it out: the package, its namespace of ops, its metadata."""
    source = project / "torch-ext" / "grit_kernels"
    for path in source.rglob("*.py"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "_ops.py").write_text(OPS.format(name))
    hashes = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in folder.rglob("*.py")
    }
    metadata = {
        "id": name,
        "name": "grit-kernels",
        "version": hub_kernel.VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def imported(folder: Path, name: str) -> ModuleType:
    """As the package ``kernels`` does it."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ModuleType]]:
    """Two versions in one process, beside the installed package."""
    names = ("_grit_kernels_first", "_grit_kernels_second")
    yield [imported(built(project, tmp_path_factory.mktemp(name), name), name) for name in names]
    for name in [module for module in sys.modules if module.startswith(names)]:
        del sys.modules[name]


def attention(package: ModuleType, x: Tensor) -> Tensor:
    q, k, v = x.view(2, 8, 2, 96).split(32, dim=-1)
    return package.switch_attention(q, k, v, FLAGS)


def pooling(package: ModuleType, x: Tensor) -> Tensor:
    return package.pool(x, attention_mask=torch.ones(2, 8, dtype=torch.int64), normalize=True)


def contrastive(package: ModuleType, x: Tensor) -> Tensor:
    return package.contrastive_loss(x[0], x[1], temperature=0.5)


def next_token(package: ModuleType, x: Tensor) -> Tensor:
    return package.linear_cross_entropy(x[0], x[1], torch.arange(8))


def fused(package: ModuleType, x: Tensor) -> Tensor:
    return package.silu_mul(package.rms_norm(x, torch.ones(192)), x)


@pytest.mark.parametrize("run", [attention, pooling, contrastive, next_token, fused])
@pytest.mark.parametrize(
    "plain", [pytest.param(False, marks=pytest.mark.interpret)] if interpreting() else [True], ids=["run"]
)
def test_every_copy_computes_what_the_package_computes(
    run: Callable[[ModuleType, Tensor], Tensor], plain: bool, loaded: list[ModuleType]
) -> None:
    """Triton kernels against Triton kernels in the interpreter, else plain torch against plain torch: equal to the bit."""
    given = torch.randn(2, 8, 192)
    results = []
    for package in (gk, *loaded):
        x = given.clone().requires_grad_()
        with warnings.catch_warnings(), package.backend("reference" if plain else "triton"):
            out = run(package, x)
            (grad,) = torch.autograd.grad(out.sum(), x)
        results.append((out, grad))
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1]) and grad.abs().max() > 0


def test_a_copy_has_ops_and_a_choice_of_backend_of_its_own(loaded: list[ModuleType]) -> None:
    first, second = loaded
    assert torch.ops._grit_kernels_first.pool_forward is not torch.ops._grit_kernels_second.pool_forward
    with first.backend("reference"):
        assert first.describe_backends()["forced"] == "reference" and second.describe_backends()["forced"] is None
    assert gk.describe_backends()["ops"].keys() == first.describe_backends()["ops"].keys()
    assert set(gk.__all__) - set(first.__all__) == {"patch", "patched", "unpatch", "is_patched"}
    assert all(hasattr(second, name) for name in second.__all__)


def test_a_copy_advises_no_build_of_a_library_that_it_never_has(loaded: list[ModuleType]) -> None:
    if not interpreting():
        (cpu,) = [found for found in loaded[0].describe_backends()["available"] if found["name"] == "cpu"]
        assert cpu["reason"] == "the compiled library is missing; a hub kernel has none, the package grit-kernels has"


def test_a_copy_imports_only_itself_torch_and_triton(project: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "__future__"}
    files = list((project / "torch-ext").rglob("*.py"))
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, (path, names)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # messages and docstrings name the package; no op and no module is looked up by its name
                assert (
                    " " in node.value
                    or not node.value.startswith(("grit_kernels::", "grit_kernels."))
                    or (
                        node.value == "grit_kernels::"  # begins a message
                    )
                ), (path, node.value)


def test_the_project_says_what_the_builder_needs(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of build.toml")
    build = tomllib.loads((project / "build.toml").read_text(encoding="utf-8"))
    general = build["general"]
    assert (general["name"], general["edition"], general["license"]) == ("grit-kernels", 5, "Apache-2.0")
    assert general["backends"] == ["cuda", "rocm"] and general["hub"] == {"repo-id": "someone/grit-kernels"}
    assert build["torch-noarch"] == {} and (project / "torch-ext" / general["name"].replace("-", "_")).is_dir()
    assert {"flake.nix", "CARD.md", "LICENSE"} <= {path.name for path in project.iterdir()}


def test_a_module_whose_ops_could_not_be_moved_is_an_error() -> None:
    with pytest.raises(ValueError, match="module: expected the line 'from __future__ import annotations'"):
        hub_kernel.moved("import torch\nx = torch.ops.grit_kernels.pool_forward\n", 0)


def test_the_package_kernels_loads_it(project: Path, tmp_path: Path) -> None:
    kernels = pytest.importorskip("kernels")
    built(project, tmp_path / "repository" / "build" / "torch-cpu", "_grit_kernels_by_kernels")
    module = kernels.get_local_kernel(tmp_path / "repository", backend="cpu")
    x = torch.randn(2, 8, 192)
    with gk.backend("reference"), module.backend("reference"):
        assert torch.equal(attention(module, x), attention(gk, x))
