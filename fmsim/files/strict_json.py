"""JSON as RFC 8259 has it, in both directions: no NaN, no key twice, bounded depth."""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fmsim.errors import FmsimError, short, shown

MOST_DEPTH = 100
# A string, to its end where it has none: a capture's may be gigabytes, so no loop goes over it.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)

Model = TypeVar("Model", bound=BaseModel)


def parse(text: str, where: str) -> Any:
    """JSON as RFC 8259 has it: no NaN or Infinity, no key twice, numbers that a float can hold,
    and not nested deeper than `MOST_DEPTH`.

    Raises FmsimError that begins with `where`, with the line where the text has several.
    """
    try:
        _check_depth(text)
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.rstrip("\n") else ""
        raise FmsimError(
            f"{shown(where)}{line}: not valid JSON: {error.msg}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FmsimError(f"{shown(where)}: not valid JSON: {shown(error)}") from None


def check(model: type[Model], value: Any, where: str) -> Model:
    """`value`, as JSON has it, as a pydantic model, strictly: a bool is no number, a text no
    number, and numbers are finite.

    Raises FmsimError: `where`, the first wrong key, and what is wrong with it.
    """
    try:
        return model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(shown(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "missing" else f", not {short(first['input'])}"
        raise FmsimError(f"{shown(where)}: {f'{key}: ' if key else ''}{what}{given}") from None


def dump(value: Any, indent: int | None = None) -> str:
    """`value` as JSON. A NaN or an infinity is a bug of whoever computed it, and raises
    ValueError.
    """
    return json.dumps(value, indent=indent, allow_nan=False)


def _check_depth(text: str) -> None:
    """Brackets outside strings, before the parser recurses into them."""
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        if found[0] in ("[", "{"):
            depth += 1
            if depth > MOST_DEPTH:
                raise ValueError(f"nested deeper than {MOST_DEPTH} levels")
        elif found[0] in ("]", "}"):
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {short(twice)} stands there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{short(text)} is larger than any number here")
    return number
