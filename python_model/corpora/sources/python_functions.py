"""Functions of Python packages: the first paragraph of the docstring, and the code without the docstring.

Source: wheels, pinned by SHA-256 and so identical everywhere (the standard library changes with each patch release of Python).
"""

from __future__ import annotations

import ast
import io
import re
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from python_model.corpora.sources.packages import Wheel
from python_model.corpora.sources.wordnet import UNSUITABLE

_CP312 = ("--python-version", "3.12", "--implementation", "cp")
WHEELS = (
    Wheel("boltons==25.0.0", "dc9fb38bf28985715497d1b54d00b62ea866eca3938938ea9043e254a3a6ca62"),
    Wheel("networkx==3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
    Wheel("sympy==1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
    Wheel("toolz==1.1.0", "15ccc861ac51c53696de0a5d6d4607f99c210739caf987b5d2054f3efed429d8"),
)
"""Pure Python, BSD licensed: the source of the bundled sample."""
LARGE_WHEELS = (
    Wheel(
        "numpy==2.3.5",
        "0d8163f43acde9a73c2a33605353a4f1bc4798745a8b1d73183b28e5b435ae28",
        (*_CP312, "--platform", "manylinux_2_28_x86_64"),
    ),
    Wheel(
        "scipy==1.16.3",
        "72d1717fd3b5e6ec747327ce9bda32d5463f472c9dce9f54499e81fbd50245a1",
        (*_CP312, "--platform", "manylinux2014_x86_64"),
    ),
)
"""BSD licensed; only their Python files are read, so their platform does not matter."""


@dataclass(frozen=True)
class Function:
    """One function: the first paragraph of its docstring, and its code without the docstring."""

    key: str
    name: str
    description: str
    code: str


def _sources(wheel: bytes) -> Iterator[tuple[str, ast.Module, list[str]]]:
    """(path, syntax tree, lines) of a wheel's own modules."""
    archive = zipfile.ZipFile(io.BytesIO(wheel))
    for path in sorted(archive.namelist()):
        # sympy's parsing and multipledispatch come from other projects with their own licences
        if not path.endswith(".py") or re.search(r"/(tests?|testing|conftest|sandbox|parsing|multipledispatch)", path):
            continue
        source = archive.read(path).decode()
        yield path, ast.parse(source), source.split("\n")


def _described(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, list[str]]:
    """A function's first docstring paragraph, and its lines without the docstring."""
    first = re.split(r"\n\s*\n", (ast.get_docstring(node) or "").strip())[0]
    docstring = node.body[0]
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return re.sub(r"\s+", " ", first), kept


def _functions(body: list[ast.stmt], scope: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(qualified name, function) of a module's functions and its classes' methods."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield scope + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{scope}{node.name}.")


def read_functions(wheels: Iterable[bytes]) -> list[Function]:
    """Public top-level functions that are short and described in plain words; each key, description and code once."""

    def candidates() -> Iterator[Function]:
        for path, tree, lines in (module for wheel in wheels for module in _sources(wheel)):
            for node in tree.body:
                if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and not node.name.startswith("_"):
                    description, kept = _described(node, lines)
                    code = "\n".join(line.rstrip() for line in kept if line.strip())
                    yield Function(f"python:{path}:{node.name}", node.name, description, code)

    return _distinct(
        function
        for function in candidates()
        if 5 <= len(function.description.split()) <= 30
        and (function.description + function.code).isascii()
        and not re.search(r">>>|:math:|\$|\\|deprecat|[{}]", function.description)
        and 3 <= function.code.count("\n") + 1 <= 16
        and len(function.code) <= 360
    )


def read_all_functions(wheels: Iterable[bytes]) -> list[Function]:
    """Functions and methods with a description of 4 to 60 words and 3 to 60 lines; each key, description and code once."""

    def candidates() -> Iterator[Function]:
        for path, tree, lines in (module for wheel in wheels for module in _sources(wheel)):
            for name, node in _functions(tree.body):
                if len(node.body) > 1:
                    description, kept = _described(node, lines)
                    code = textwrap.dedent("\n".join(kept)).strip()
                    yield Function(f"python:{path}:{name}", node.name, description, code)

    return _distinct(
        function
        for function in candidates()
        if 4 <= len(function.description.split()) <= 60
        and function.description.isascii()
        and 3 <= function.code.count("\n") + 1 <= 60
    )


def _distinct(functions: Iterable[Function]) -> list[Function]:
    """The functions with a suitable description, each key, description and code once."""
    found: list[Function] = []
    seen: set[str] = set()
    for function in functions:
        marks = {function.key, function.description.lower(), function.code}
        if not UNSUITABLE.search(function.description) and not seen & marks:
            seen |= marks
            found.append(function)
    return found
