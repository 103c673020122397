"""What classes say of themselves, as Markdown: fields with their comments, methods, docstrings."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

WIDTH = 100


def section(title: str, text: str, items: Iterator[str], level: int = 2) -> str:
    """A heading, a paragraph, and a list."""
    paragraph = f"{wrapped(text)}\n\n" if text else ""
    return f"{'#' * level} {title}\n\n{paragraph}" + "".join(items)


def item(head: str, text: str = "", depth: int = 0) -> str:
    """A list item, its text behind its head."""
    body = f"{'  ' * depth}- {head}" + (f": {text}" if text else "")
    return wrapped(body, indent="  " * (depth + 1)) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    """The text in lines of at most 100 columns; no code span is cut at a blank."""
    whole = re.sub(r"`[^`]+`", lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.fill(
        whole,
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace("\0", " ")


def members(kind: type) -> Iterator[str]:
    """Fields and methods of a class, in the order of its source."""
    for node, text in fields(kind):
        annotation = ast.unparse(node.annotation)
        declared = node.value is None and "ClassVar" in annotation  # listed by hand elsewhere
        if declared:
            continue
        annotation = re.sub(r"ClassVar\[(.*)\]", r"\1", annotation)
        default = "" if node.value is None else f", default {default_of(node.value)}"
        assert isinstance(node.target, ast.Name)
        yield item(f"`{node.target.id}` ({annotation}{default})", text)
    for node in _tree(kind).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = one_line(ast.get_docstring(node) or "")
            if text:  # else as in the class that it extends
                # a method that raises it is abstract
                must = " (must be defined)" if "NotImplementedError" in ast.unparse(node) else ""
                yield item(f"`{head_of(node)}`{must}", text)


def default_of(value: ast.expr) -> str:
    """A field's default as it is written, or what its factory makes."""
    text = ast.unparse(value)
    factory = re.match(r"field\(default_factory=(\w+)", text)
    return f"{factory[1]}()" if factory else text


def fields(kind: type) -> Iterator[tuple[ast.AnnAssign, str]]:
    """A class's own fields, and what the comments beside or above each say."""
    source = textwrap.dedent(inspect.getsource(kind))
    comments = comments_of(source)
    lines = source.splitlines()
    for node in _tree(kind).body:
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if named and not node.target.id.startswith("_"):
            yield node, comment_at(node, comments, lines)


def _tree(kind: type) -> ast.ClassDef:
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    return tree


def head_of(node: ast.FunctionDef) -> str:
    """A method as it is called, or a property's name."""
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        return node.name
    names = [arg.arg for arg in node.args.args if arg.arg != "self"]
    defaults = [ast.unparse(default) for default in node.args.defaults]
    for place, default in enumerate(defaults, len(names) - len(defaults)):
        names[place] += f"={default}"
    if node.args.kwarg:
        names.append(f"**{node.args.kwarg.arg}")
    return f"{node.name}({', '.join(names)})"


def comments_of(source: str) -> dict[int, str]:
    """By line; what a comment tells a type checker is left out."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    told = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    return {line: re.sub(r"^# (type: ignore\S*)?", "", text) for line, text in told.items()}


def comment_at(node: ast.AnnAssign, comments: dict[int, str], lines: list[str]) -> str:
    """The comments on the field's own lines, or on the lines above it."""
    last = node.end_lineno or node.lineno
    while last < len(lines) and lines[last].strip().partition("#")[0].strip() == ")":
        last += 1
    found = [comments[line] for line in range(node.lineno, last + 1) if line in comments]
    line = node.lineno - 1
    while not found or line in comments:
        if line not in comments or not lines[line - 1].strip().startswith("#"):
            break
        found.insert(0, comments[line])
        line -= 1
    return one_line(" ".join(found))


def text_of(thing: Any) -> str:
    """A docstring in one line."""
    return one_line(inspect.cleandoc(thing.__doc__ or ""))


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
