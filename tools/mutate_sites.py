"""What can be changed in a source file: small edits that a test should notice (see tools/mutate.py).

Python is edited through its syntax tree, leaving out what no result depends on: types, decorators, docstrings, the texts of
messages, imports, ``__main__`` blocks. C++ is edited token by token, in the lines that the preprocessor keeps.
"""

from __future__ import annotations

import ast
import copy
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Edit:
    """Replace ``before``, at character ``start`` of ``file``, with ``after``."""

    file: str
    line: int
    """From 1."""
    start: int
    before: str
    after: str
    operator: str
    scope: tuple[int, int] | None
    """First and last line of the innermost function around it; None at module or class level."""
    on_import: bool
    """Runs when the module is imported or the function is defined, not when it is called."""

    def apply(self, source: str) -> str:
        """The changed source."""
        end = self.start + len(self.before)
        if source[self.start : end] != self.before:
            raise ValueError(f"source: expected {self.before!r} at {self.file}:{self.line}")
        return source[: self.start] + self.after + source[end:]


COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "minimum": "maximum",
    "maximum": "minimum",
    "amin": "amax",
    "amax": "amin",
    "argmax": "argmin",
    "floor": "ceil",
    "ceil": "floor",
}
MESSAGES = {
    "print",
    "warn",
    "info",
    "warning",
    "debug",
    "error",
    "exception",
    "stop",
    "add_argument",
    "field",
    "TypeVar",
    "cast",
}
"""Calls whose arguments are texts for readers, or declarations."""
TEXTS = {"desc", "unit"}
"""Keywords whose values are texts for readers: those of a progress bar."""
TYPES = {"int", "float", "str", "bool", "bytes", "list", "dict", "tuple", "set", "object"}


def python_edits(file: str, source: str) -> list[Edit]:
    """Every edit of a Python source, in the order of the source."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def position(line: int, column: int) -> int:
        # the tree counts columns in UTF-8 bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    edits = []
    for node, after, operator, scope, on_import in _changes(tree):
        start = position(node.lineno, node.col_offset)
        before = source[start : position(node.end_lineno, node.end_col_offset)]
        edits.append(Edit(file, node.lineno, start, before, after, operator, scope, on_import))
    return sorted(set(edits), key=lambda edit: (edit.start, edit.before, edit.after))


Change = tuple[ast.AST, str, str, "tuple[int, int] | None", bool]


def _changes(tree: ast.Module) -> Iterator[Change]:
    def walk(node: ast.AST, scope: tuple[int, int] | None, on_import: bool) -> Iterator[Change]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = (node.body[0].lineno, node.end_lineno or node.lineno)
            for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
                yield from walk(default, inner, True)
            for statement in node.body:
                yield from walk(statement, inner, False)
            return
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                yield from walk(statement, None, True)
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield from walk(node.value, scope, on_import)
            return
        if isinstance(node, (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)) or _left_out(node):
            return
        for after, operator in _replacements(node):
            yield node, after, operator, scope, on_import
        for condition in [node.test] if isinstance(node, ast.If) else getattr(node, "ifs", []):
            if not isinstance(condition, (ast.Compare, ast.UnaryOp)):  # these have opposites of their own
                yield condition, f"(not ({ast.unparse(condition)}))", "condition negated", scope, on_import
        if isinstance(node, ast.Raise):
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, scope, on_import)

    for statement in tree.body:
        yield from walk(statement, None, True)


def _left_out(node: ast.AST) -> bool:
    match node:
        case ast.Expr(ast.Constant()):  # a docstring, or an ellipsis
            return True
        case ast.Expr(ast.Call() as call):
            return _left_out(call)
        case ast.If(ast.Name("TYPE_CHECKING")) | ast.If(ast.Compare(ast.Name("__name__"))):
            return True
        case ast.Assign([ast.Name(name)]) if name.startswith("__"):
            return True
        case ast.BinOp(op=ast.BitOr()) if _is_type(node):
            return True
        case ast.Call(ast.Name(name)) | ast.Call(ast.Attribute(attr=name)):
            return name in MESSAGES
    return False


def _replacements(node: ast.AST) -> Iterator[tuple[str, str]]:
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            yield _text(node, ops=[COMPARISONS[type(operator)]()]), "comparison"
        case ast.BoolOp():
            yield _text(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And()), "and/or"
        case ast.BinOp() if not _is_text(node.left) and not _is_text(node.right):
            if type(node.op) in ARITHMETIC:
                yield _text(node, op=ARITHMETIC[type(node.op)]()), "arithmetic"
            if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
                yield f"({ast.unparse(node.left)})", "operand dropped"
        case ast.UnaryOp(ast.Not() | ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield f"({ast.unparse(node.operand)})", "sign dropped"
        case ast.IfExp():
            yield f"({ast.unparse(node.body)})", "condition dropped"
            yield f"({ast.unparse(node.orelse)})", "condition dropped"
        case ast.Constant(bool() as value):
            yield str(not value), "constant"
        case ast.Constant(int() as value):
            yield str(value + 1), "constant"
        case ast.Constant(float() as value):
            yield repr(value * 2 if value else 1.0), "constant"
        case ast.Name(name, ast.Load()) if name in NAMES:
            yield NAMES[name], "name"
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in NAMES:
            yield ast.unparse(_copy(node, attr=NAMES[name])), "name"
        case ast.Call() if any(keyword.arg for keyword in node.keywords):
            for dropped in node.keywords:
                if dropped.arg and dropped.arg not in TEXTS:
                    kept = [keyword for keyword in node.keywords if keyword is not dropped]
                    yield ast.unparse(_copy(node, keywords=kept)), "keyword dropped"
        case ast.AugAssign():
            yield "pass", "statement dropped"
            if type(node.op) in ARITHMETIC:
                yield ast.unparse(_copy(node, op=ARITHMETIC[type(node.op)]())), "arithmetic"
        case ast.Raise() | ast.Expr(ast.Call()):
            yield "pass", "statement dropped"
        case ast.Assign([ast.Name(name)]) if any(
            isinstance(n, ast.Name) and n.id == name for n in ast.walk(node.value)
        ):
            yield "pass", "statement dropped"


def _copy(node: ast.AST, **changed: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in changed.items():
        setattr(other, name, value)
    return other


def _text(node: ast.AST, **changed: object) -> str:
    return f"({ast.unparse(_copy(node, **changed))})"


def _is_type(node: ast.AST) -> bool:
    """Whether an expression can only be a type, such as ``int | None`` or ``Token | Vector``."""
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            return _is_type(left) and _is_type(right)
        case ast.Name(name) | ast.Subscript(ast.Name(name)):
            return name in TYPES or (name[0].isupper() and not name.isupper())
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


CPP = (
    (r" < ", " <= ", "comparison"),
    (r" <= ", " < ", "comparison"),
    (r" > ", " >= ", "comparison"),
    (r" >= ", " > ", "comparison"),
    (r" == ", " != ", "comparison"),
    (r" != ", " == ", "comparison"),
    (r" \+ ", " - ", "arithmetic"),
    (r" - ", " + ", "arithmetic"),
    (r" \* ", " / ", "arithmetic"),
    (r" / ", " * ", "arithmetic"),
    (r" % ", " / ", "arithmetic"),
    (r" && ", " || ", "and/or"),
    (r" \|\| ", " && ", "and/or"),
    (r" \+= ", " -= ", "arithmetic"),
    (r"\btrue\b", "false", "constant"),
    (r"\bfalse\b", "true", "constant"),
    (r"\bsmaller(?=[<(])", "larger", "name"),
    (r"\blarger(?=[<(])", "smaller", "name"),
)
NUMBER = re.compile(r"(?<![\w.'])(\d+)(?![\w.'])|(?<![\w.'])(\d+\.\d+)f(?!\w)")
UNCHANGED = re.compile(r"^\s*(#|using |namespace |template |static_assert|extern |\}|//)")


def cpp_edits(file: str, source: str, live: set[int]) -> list[Edit]:
    """Every edit of a C++ source in the lines ``live``, in the order of the source."""
    edits = []
    start = 0
    for number, line in enumerate(source.splitlines(keepends=True), 1):
        code = _blank(line)
        if number in live and not UNCHANGED.match(line):
            for pattern, after, operator in CPP:
                for found in re.finditer(pattern, code):
                    edits.append(_cpp(file, number, start + found.start(), found.group(), after, operator))
            for found in NUMBER.finditer(code):
                text = found.group()
                after = f"{float(found[2]) * 2 or 1.0}f" if found[2] else str(int(text) + 1)
                edits.append(_cpp(file, number, start + found.start(), text, after, "constant"))
        start += len(line)
    return sorted(edits, key=lambda edit: (edit.start, edit.before, edit.after))


def _cpp(file: str, line: int, start: int, before: str, after: str, operator: str) -> Edit:
    return Edit(file, line, start, before, after, operator, None, False)


def _blank(line: str) -> str:
    """The line with comments and literal texts blanked, of the same length."""
    line = re.sub(r'"(?:\\.|[^"\\])*"', lambda found: '"' + "_" * (len(found.group()) - 2) + '"', line)
    return re.sub(r"//.*", lambda found: " " * len(found.group()), line)


def live_lines(preprocessed: str, root: Path) -> dict[str, set[int]]:
    """Lines of each file below ``root`` that ``g++ -E`` kept, by the line markers of its output."""
    kept: dict[str, set[int]] = {}
    file: str | None = None
    number = 0
    for text in preprocessed.splitlines():
        if found := re.match(r'# (\d+) "([^"]*)"', text):
            number = int(found[1])
            path = Path(os.path.normpath(found[2]))  # a header's path is that of its source and what the #include says
            file = str(path.relative_to(root)) if path.is_relative_to(root) else None
            continue
        if file and text.strip():
            kept.setdefault(file, set()).add(number)
        number += 1
    return kept
