"""docs/: what code writes is what is committed, links lead somewhere, and every public name is explained."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import grit_kernels
import python_model
from python_model.support.optional import find
from tests.conftest import needs_source_tree
from tools.pages import visibility_page

ROOT = Path(__file__).parent.parent
_SHOWN_INSIDE = ("csrc", "grit_kernels", "python_model")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_drawn_masks_are_those_of_the_rule() -> None:
    page = (ROOT / "docs" / "visibility.md").read_text(encoding="utf-8")
    assert visibility_page(page) == page, "run python -m tools.pages"


def test_the_api_reference_lists_every_public_name_once_and_nothing_that_is_not_there() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name in listed:
        module, _, attribute = name.rpartition(".")
        if name != "python_model.model.export.export_sentence_transformers" or find("sentence_transformers"):
            assert hasattr(importlib.import_module(module), attribute), name
    # a function with the name of its module is listed inside it: the page would show the module otherwise
    public = [
        f"grit_kernels.{name}.{name}" if f"grit_kernels.{name}" in sys.modules else f"grit_kernels.{name}"
        for name in grit_kernels.__all__
        if not name.startswith("_")
    ]
    public += [f"python_model.{name}" for name in python_model.__all__]
    assert len(set(listed)) == len(listed) and set(public) <= set(listed)


def test_the_site_shows_names_that_docstrings_mark_for_sphinx_as_code() -> None:
    griffe = pytest.importorskip("griffe")
    roles = importlib.import_module("tools.site").Roles
    written, shown = (
        griffe.load("grit_kernels.packing", search_paths=[ROOT], extensions=griffe.load_extensions(*extensions))[
            "SamplePack.from_lengths"
        ].docstring.value
        for extensions in ((), (roles,))
    )
    assert ":func:`grit_kernels.pool`" in written
    assert "`grit_kernels.pool`" in shown and ":func:" not in shown


@needs_source_tree
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            # as GitHub and the site form them
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
    for name in re.findall(r"`((?:bench|configs|docs|grit_kernels|python_model|tests|csrc)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def _public(package: Any) -> list[tuple[str, Any]]:
    """(name, object) of the modules, functions, classes and methods without a leading underscore."""
    found: list[tuple[str, Any]] = []
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        module = importlib.import_module(info.name)
        found.append((info.name, module))
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != info.name:
                continue
            if inspect.isfunction(thing) or inspect.isclass(thing):
                found.append((f"{info.name}.{name}", thing))
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                    if not method.startswith("_") and inspect.isfunction(function):
                        found.append((f"{info.name}.{name}.{method}", function))
    return found


@pytest.mark.parametrize("package", [grit_kernels, python_model], ids=lambda package: package.__name__)
def test_every_public_name_is_explained(package: Any) -> None:
    missing = [
        name
        for name, thing in _public(package)
        # a dataclass without a docstring gets its signature as one
        if not thing.__doc__ or thing.__doc__.startswith(f"{getattr(thing, '__name__', '')}(")
    ]
    assert not missing, f"{len(missing)} without a docstring: {missing}"


@needs_source_tree
def test_the_tree_in_contributing_is_the_real_one() -> None:
    """Every folder at the top and every package is named, and nothing else is."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout: git does not know which files belong to the project")
    folders = {Path(name).parent for name in listed.stdout.splitlines() if not name.startswith(".")}
    top = {folder.parts[0] for folder in folders if folder.parts}
    packages = {"/".join(f.parts[:2]) for f in folders if len(f.parts) > 1 and f.parts[0] in _SHOWN_INSIDE}
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    named, parent = set(), ""
    for line in tree.splitlines():
        names = re.match(r" *((?:\w+/ ?)+)", line)
        if names and not line.startswith("   "):
            parent = "" if not line.startswith(" ") else parent
            named |= {parent + name.rstrip("/") for name in names[1].split()}
            parent = parent or names[1].split()[0]
    assert named == top | packages


def _literals() -> list[str]:
    """Every text in the packages' code; where an f-string has a value, NUL."""
    found = []
    for package in (grit_kernels, python_model):
        for path in Path(package.__path__[0]).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@needs_source_tree
def test_errors_that_are_explained_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]*expected[^`]*)`", page, flags=re.MULTILINE)
    literals = _literals()
    for message in rows:
        # after the argument's name; what stands for a value is a capital or "..", a figure, or quoted
        said = "expected " + message.rpartition("expected ")[2]
        parts = [part.strip(" ,(") for part in re.split(r"\.\.+\S*|\b[A-Z]\b|\d[\d.]*|''", said)]
        assert any(all(part in text for part in parts) for text in literals), message
    assert len(rows) >= 7


@needs_source_tree
def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """``make docs`` builds the site; this needs no mkdocs."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    assert sorted(pages(settings["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
