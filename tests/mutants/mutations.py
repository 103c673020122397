"""Small mutations of a source file: an operator turned, a constant moved, a statement dropped.

What only words an error, names a type or decorates is left alone, and so are a reshape's -1 and
zip's `strict`: no test of behaviour could tell.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
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
    ast.And: ast.Or,
    ast.Or: ast.And,
}
PAIRS = [
    ("min", "max"),
    ("any", "all"),
    ("minimum", "maximum"),
    ("floor", "ceil"),
    ("argmin", "argmax"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
]
NAMES = dict(PAIRS) | {right: left for left, right in PAIRS}
# Keywords whose value is shown to people alone; stacklevel: the line that a warning names.
WORDS_ONLY = {"description", "help", "title", "repr", "stacklevel"}


@dataclass(frozen=True)
class Mutation:
    """One change of one file: bytes `start` to `end` become `new`."""

    path: str
    line: int
    lines: tuple[int, int]  # first and last of its statement, without a body
    function: str  # outermost, with its class: "Residency.admit"; "" at a module's or class's level
    what: str
    start: int
    end: int
    new: str

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()

    def diff(self, source: str) -> str:
        """What it changes, as a unified diff below a line that says where."""
        changed = self.apply(source)
        lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=1)
        head = f"{self.path}:{self.line} {self.function}: {self.what}"
        return "\n".join([head, *list(lines)[2:]])


def mutations_of(path: str, source: str) -> list[Mutation]:
    """All of a file, in its order."""
    found = _Finder(path, source)
    found.visit(ast.parse(source))
    unique = {(one.start, one.end, one.new): one for one in found.mutations}
    return sorted(unique.values(), key=lambda one: (one.start, one.end, one.what))


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: str) -> None:
        self.path = path
        self.mutations: list[Mutation] = []
        self._starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scopes: list[str] = []
        self._in_function = False
        self._statement = (1, 1)

    def visit(self, node: ast.AST) -> None:
        outer = self._statement
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            self._statement = (node.lineno, last or node.lineno)
        super().visit(node)
        self._statement = outer

    def _add(self, node: Any, what: str, new: str) -> None:
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        function = ".".join(self._scopes) if self._in_function else ""
        found = Mutation(self.path, node.lineno, self._statement, function, what, start, end, new)
        self.mutations.append(found)

    def _add_tree(self, node: ast.AST, what: str, mutated: ast.AST) -> None:
        self._add(node, what, f"({ast.unparse(mutated)})")

    # What is left alone.

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    visit_Assert = visit_Import = visit_ImportFrom = visit_JoinedStr = visit_Raise  # type: ignore

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in WORDS_ONLY:
            self.visit(node.value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if self._in_function:
            return self._visit_all(node.body)
        self._scopes.append(node.name)
        self._visit_all(node.body)
        self._scopes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outermost = not self._in_function
        if outermost:
            self._scopes.append(node.name)
            self._in_function = True
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        self._visit_all(node.body)
        if outermost:
            self._in_function = False
            self._scopes.pop()

    def _visit_all(self, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            self.visit(node)

    # Statements.

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call) and self._in_function:
            self._add(node, "statement dropped", "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self._add(node, "statement dropped", "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add(node, "statement dropped", "pass")
        other = OPERATORS.get(type(node.op))
        if other:
            turned = ast.AugAssign(node.target, other(), node.value)  # type: ignore[arg-type]
            self._add(node, "operator turned", ast.unparse(turned))
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._add(node, "continue for break", "break")

    def visit_Break(self, node: ast.Break) -> None:
        self._add(node, "break for continue", "continue")

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test) or "__name__" in ast.unparse(node.test):
            return
        self._turn(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._turn(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._turn(test)
        self.generic_visit(node)

    def _turn(self, test: ast.expr) -> None:
        self._add_tree(test, "condition turned", ast.UnaryOp(ast.Not(), test))

    # Expressions.

    def visit_BinOp(self, node: ast.BinOp) -> None:
        types = not self._in_function and isinstance(node.op, ast.BitOr)
        texts = any(_is_text(side) for side in (node.left, node.right))
        other = OPERATORS.get(type(node.op))
        if other and not types and not texts:
            turned = ast.BinOp(node.left, other(), node.right)  # type: ignore[arg-type]
            self._add_tree(node, "operator turned", turned)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for at, op in enumerate(node.ops):
            other = OPERATORS.get(type(op))
            if other:
                ops: Any = [*node.ops[:at], other(), *node.ops[at + 1 :]]
                self._add_tree(node, "comparison", ast.Compare(node.left, ops, node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        op: Any = OPERATORS[type(node.op)]()
        self._add_tree(node, "and for or", ast.BoolOp(op, node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not isinstance(node.op, ast.UAdd):
            self._add_tree(node, "sign or not dropped", node.operand)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr == "reshape":
            node = _without_minus_one(node)
        elif isinstance(called, ast.Name) and called.id == "zip":
            kept = [each for each in node.keywords if each.arg != "strict"]
            node = _like(node, node.args, kept)
        if isinstance(called, ast.Name) and called.id in NAMES:
            self._add(called, "another function", NAMES[called.id])
        if isinstance(called, ast.Attribute) and called.attr in NAMES:
            turned = ast.Attribute(called.value, NAMES[called.attr], ast.Load())
            self._add(called, "another function", ast.unparse(turned))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add(node, "constant turned", str(not value))
        elif isinstance(value, int):
            self._add(node, "constant moved", str(value + 1))
        elif isinstance(value, float):
            self._add(node, "constant moved", repr(value * 2 if value else 1.0))


def _without_minus_one(node: ast.Call) -> ast.Call:
    """A reshape's arguments but for -1: numpy takes every negative number for it."""
    kept = [each for each in node.args if ast.unparse(each) != "-1"]
    return _like(node, kept, node.keywords)


def _like(node: ast.Call, args: list[ast.expr], keywords: list[ast.keyword]) -> ast.Call:
    return ast.copy_location(ast.Call(node.func, args, keywords), node)


def _is_text(node: ast.expr) -> bool:
    plain = isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    return plain or isinstance(node, ast.JoinedStr)


def every(sources: dict[str, str]) -> Iterator[Mutation]:
    """Of all files, in the order of their names."""
    for path in sorted(sources):
        yield from mutations_of(path, sources[path])
