"""YAML as its version 1.2 reads it, bounded before anything is built, with the line of every key.

Bounds on depth and on what aliases expand to are checked on the stream of events: a few hundred
bytes can otherwise stand for gigabytes, and deep nesting exhausts the interpreter's stack.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from fmsim.errors import FmsimError, short, shown

MOST_DEPTH = 50
MOST_NODES = 100_000  # after aliases are expanded

Loc = tuple[str | int, ...]

_CORE = "tag:yaml.org,2002:"
# The core schema's scalars, https://yaml.org/spec/1.2.2/#103-core-schema.
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_KINDS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}


# the base is the C loader where libyaml is
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The parser, without any of YAML 1.1's implicit types."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class YamlDocument:
    """A YAML text's value, and where its keys stand."""

    def __init__(self, text: str, where: str) -> None:
        """Parse `text`. Raises FmsimError that begins with `where` and names the line."""
        self.where = where
        try:
            _check_bounds(text, where)
            self.root: yaml.Node | None = yaml.compose(text, _Loader)
        except UnicodeEncodeError:
            raise FmsimError(f"{shown(where)}: not valid YAML: holds a lone surrogate") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
            raise FmsimError(f"{shown(where)}{line}: not valid YAML: {shown(problem)}") from None
        self.value: Any = None if self.root is None else self._build(self.root)

    def line(self, loc: Loc) -> int:
        """The line of the deepest node on the way to `loc`, from 1."""
        node, line = self.root, 1
        for part in loc:
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == str(part)), None)
            elif isinstance(node, yaml.SequenceNode):
                inside = isinstance(part, int) and part < len(node.value)
                found = (node.value[part], node.value[part]) if inside else None
            if found is None:
                break
            line, node = _line(found[0]), found[1]
        return line

    def _build(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq")
            return [self._build(item) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, "map")
            return self._mapping(node)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        built: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._fail(key_node, "a key must be a word, not a list or a mapping")
            key = self._build(key_node)
            if key in lines:
                self._fail(
                    key_node,
                    f"the key {short(key)} stands there twice, first in line {lines[key]};"
                    " remove one",
                )
            lines[key] = _line(key_node)
            built[key] = self._build(value_node)
        return built

    def _check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != _CORE + kind:
            self._fail(node, f"the tag {short(node.tag)} is not allowed here; remove it")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = str(node.value)
        if node.tag != _CORE + "str":
            return self._tagged(node, text)
        if node.style:  # quoted, or a block
            return text
        if _NOT_FINITE.fullmatch(text):
            self._fail(node, f"{text} is not a finite number")
        kind = next((name for name, form in _KINDS.items() if form.fullmatch(text)), "str")
        return self._number(node, text, kind)

    def _tagged(self, node: yaml.ScalarNode, text: str) -> Any:
        kind = node.tag.removeprefix(_CORE)
        if kind not in _KINDS:
            self._fail(node, f"the tag {short(node.tag)} is not allowed here; remove it")
        if not _KINDS[kind].fullmatch(text):
            self._fail(node, f"{short(text)} is no {kind}, as its tag says")
        return self._number(node, text, kind)

    def _number(self, node: yaml.ScalarNode, text: str, kind: str) -> Any:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            if len(text) > 300:
                self._fail(node, f"a number of {len(text)} digits is too large")
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            number = float(text)
            if not math.isfinite(number):
                self._fail(node, f"{short(text)} is not a finite number")
            return number
        return text

    def _fail(self, node: yaml.Node, what: str) -> None:
        raise FmsimError(f"{shown(self.where)}, line {_line(node)}: {what}")


def load(text: str, where: str) -> Any:
    """The value of a YAML text. Raises FmsimError that begins with `where`."""
    return YamlDocument(text, where).value


def list_texts(items: str) -> list[str]:
    """The texts of a YAML list's items, given without its brackets: "5%,[0,1]" -> ["5%", "[0,1]"].

    Raises FmsimError where it is no list.
    """
    text = f"[{items}\n]"
    root = YamlDocument(text, "list").root
    if not isinstance(root, yaml.SequenceNode) or root.end_mark.index != len(text):
        raise FmsimError("list: not one YAML list")
    return [text[node.start_mark.index : node.end_mark.index].strip() for node in root.value]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _check_bounds(text: str, where: str) -> None:
    """Refuse what nests too deep, or expands to too many nodes; reads events only."""
    sizes: dict[str, int] = {}  # nodes below each anchor
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes counted when it began
    count = documents = 0
    for event in yaml.parse(text, _Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise FmsimError(f"{shown(where)}, line {line}: holds more than one document")
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise FmsimError(
                    f"{shown(where)}, line {line}: the alias *{shown(event.anchor)} stands inside"
                    " what it names, or names nothing"
                )
            count += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            count += 1
        if count > MOST_NODES:
            raise FmsimError(
                f"{shown(where)}, line {line}: expands to more than {MOST_NODES:,} values; write"
                " fewer aliases, or a smaller file"
            )
        if isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
            sizes[event.anchor] = 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count - 1))
            if len(open_nodes) > MOST_DEPTH:
                raise FmsimError(
                    f"{shown(where)}, line {line}: is nested deeper than {MOST_DEPTH} levels"
                )
