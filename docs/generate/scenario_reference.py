"""docs/reference/scenario.md: every key of a scenario file, from the classes that check it."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from describe import fields, item, section, text_of
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fmsim.hw.deployment import Deployment
from fmsim.scenario.file import Scenario
from fmsim.sim.serving import spec

WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    "Path": "path",
    "Tokens": "whole number, or [low, high]",
    "Budget": "budget",
    "PolicySpec": "policy",
    "Deployment": "block",
    "Server": "block",
    "Slo": "block",
}
NEAR = 1e-3  # a smaller one stands for 0
FAR = 1e5  # a larger bound protects the machine, and nobody meets it


def keys() -> str:
    """All blocks, the whole file's first."""
    parts = [
        section("The file", "Paths are relative to the scenario's own folder.", block(Scenario)),
        section("`deployment`", text_of(Deployment), block(Deployment)),
        section(
            "`workload`",
            "Requests to serve. `kind` says how they come; each kind has keys of its own. Times"
            " are in seconds, lengths in tokens.",
            block(spec._Workload),
        ),
    ]
    for kind, cls in spec.WORKLOADS.items():
        parts.append(section(f"`kind: {kind}`", text_of(cls), block(cls, *drawn(cls)), level=3))
    parts.append(section("`workload.slo`", text_of(spec.Slo), block(spec.Slo)))
    parts.append(section("`server`", text_of(spec.Server), block(spec.Server)))
    return "\n".join(parts)


def drawn(cls: type[BaseModel]) -> tuple[type[BaseModel], ...]:
    """The class with the keys that several kinds share, where this kind has them."""
    return (spec._Drawn,) if issubclass(cls, spec._Drawn) else ()


def block(*classes: type[BaseModel]) -> Iterator[str]:
    """A list item a key: its type, its bounds, its default, and what it is."""
    for cls in classes:
        for node, text in fields(cls):
            assert isinstance(node.target, ast.Name)
            name = node.target.id
            if name not in cls.model_fields or name == "kind":
                continue
            if not text:
                raise ValueError(f"{cls.__name__}.{name}: give it a comment that says what it is")
            yield item(f"`{name}` ({kind_of(cls.model_fields[name])})", text)


def kind_of(field: FieldInfo) -> str:
    """Type, bounds and default in words."""
    said = type_of(field.annotation, field.metadata)
    return f"{said}{bounds(field.metadata)}, {default_of(field)}"


def type_of(annotation: Any, metadata: list[Any]) -> str:
    if any(getattr(part, "func", None) is spec._as_range for part in metadata):
        return WORDS["Tokens"]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        named = [part for part in parts if part is not type(None)]
        return " or ".join(type_of(part, metadata) for part in named)
    if origin is tuple:
        return f"list of {type_of(parts[0], metadata)}s".replace("policys", "policies")
    if origin is dict:
        return "mapping of keys to numbers"
    if annotation in WORDS:
        return WORDS[annotation]
    name = getattr(annotation, "__name__", str(annotation))
    return WORDS.get(name, "block")


def bounds(metadata: list[Any]) -> str:
    """Where a number must lie; bounds that nobody meets are left out."""
    said = ""
    for part in metadata:
        for kind, word, value in (
            (Ge, "from", getattr(part, "ge", None)),
            (Gt, "above", getattr(part, "gt", None)),
            (Le, "to", getattr(part, "le", None)),
            (Lt, "below", getattr(part, "lt", None)),
        ):
            if isinstance(part, kind) and abs(value) <= FAR:
                tiny = 0 < abs(value) < NEAR
                said += " above 0" if tiny else f" {word} {value:g}"
    return said


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "default: as below"
    if value in ((), {}, ""):
        return "default: none"
    if isinstance(value, bool):
        return f"default {str(value).lower()}"
    if isinstance(value, tuple):
        return f"default {list(value)}"
    if value is None:
        return "default none"
    return f"default {value:g}" if isinstance(value, float) else f"default {value}"
