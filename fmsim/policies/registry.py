"""Policies by name: fmsim's own from the list here, plug-ins from the entry point group
`fmsim.policies`.
"""

from __future__ import annotations

import inspect
import warnings
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from fmsim.errors import FmsimError
from fmsim.policies.base import Policy, describe

GROUP = "fmsim.policies"
OWN = {  # name: module of fmsim.policies, class
    "full": "full:Full",
    "recency": "recency:Recency",
    "random": "random:Random",
    "fifo": "fifo:FIFO",
    "random-fetch": "random_fetch:RandomFetch",
    "clock": "clock:Clock",
    "sieve": "sieve:Sieve",
    "s3fifo": "s3fifo:S3FIFO",
    "lru": "lru:LRU",
    "lruk": "lruk:LRUK",
    "lfu": "lfu:LFU",
    "lru-prefetch": "lru_prefetch:LRUPrefetch",
    "hisparse": "hisparse:HiSparse",
    "h2o": "h2o:H2O",
    "snapkv": "snapkv:SnapKV",
    "pyramid": "pyramid:Pyramid",
    "lsa": "lsa:LSA",
    "lsa-history": "lsa_history:LSAHistory",
    "native": "native:Native",
    "oracle": "oracle:Oracle",
    "belady": "belady:Belady",
}


@cache
def _found() -> dict[str, EntryPoint]:
    """fmsim's own by name, then entry points as importlib sorts them; of two with one name the
    first wins, with a warning.
    """
    found = {
        name: EntryPoint(name, f"fmsim.policies.{place}", GROUP) for name, place in OWN.items()
    }
    for point in entry_points(group=GROUP):
        if point.name in found and point.value != found[point.name].value:
            warnings.warn(
                f"policy {point.name!r} is declared twice: {found[point.name].value} is used,"
                f" {point.value} is not",
                stacklevel=3,
            )
        found.setdefault(point.name, point)
    return found


def names() -> list[str]:
    """Names of all policies that can be imported.

    A plug-in that cannot gives a warning that names it.
    """
    return [name for name in _found() if _load(name) is not None]


@cache
def _load(name: str) -> type[Policy] | None:
    point = _found()[name]
    try:
        policy = point.load()
    except Exception as error:  # whatever a plug-in's import raises
        warnings.warn(
            f"policy {name!r} ({point.value}) could not be imported and is left out:"
            f" {type(error).__name__}: {error}",
            stacklevel=3,
        )
        return None
    if not (inspect.isclass(policy) and issubclass(policy, Policy)):
        warnings.warn(
            f"policy {name!r} ({point.value}) is not a subclass of fmsim.policies.base.Policy and"
            " is left out",
            stacklevel=3,
        )
        return None
    return policy


def get(name: str) -> type[Policy]:
    """The class of a policy. Raises FmsimError that lists what there is."""
    policy = _load(name) if name in _found() else None
    if policy is None:
        near = get_close_matches(name, _found(), n=1)
        hint = f"did you mean {near[0]!r}? " if near and near[0] != name else ""
        raise FmsimError(f"no policy named {name!r}; {hint}there are: {', '.join(names())}")
    return policy


def build(spec: str | dict[str, Any]) -> Policy:
    """A policy from its name, or from a mapping as in a scenario: {policy: lru, budget: 10%,
    granularity: 4}.
    """
    given = {"policy": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("policy", None)
    if not isinstance(name, str):
        raise FmsimError(
            f"policy {spec!r}: the key 'policy' must name one of: {', '.join(names())}"
        )
    policy = get(name)
    try:
        params = policy.Params.model_validate(given)
    except ValidationError as error:
        known = ", ".join(policy.Params.model_fields)
        raise FmsimError(f"policy {name}: {describe(error)} (parameters: {known})") from None
    return policy(params)


def info(name: str) -> dict[str, Any]:
    """What `fmsim policy show` prints: declarations, parameters (name, type, default, description),
    docstring.
    """
    policy = get(name)
    return {
        "name": name,
        "action": policy.action,
        "evidence": policy.evidence,
        "decision_scope": policy.decision_scope,
        "summary": _first_line(policy),
        "doc": inspect.cleandoc(policy.__doc__ or ""),
        "module": policy.__module__,
        "parameters": [
            {
                "name": key,
                "type": _type_name(field.annotation),
                "default": _default(field),
                "description": field.description or "",
            }
            for key, field in policy.Params.model_fields.items()
        ],
    }


def _default(field: Any) -> str:
    return "required" if field.default is PydanticUndefined else str(field.default)


def _first_line(policy: type[Policy]) -> str:
    return inspect.cleandoc(policy.__doc__ or "").partition("\n")[0]


def _type_name(annotation: Any) -> str:
    """int -> "int", Literal["a", "b"] -> "a | b", Path | None -> "Path | None"."""
    choices = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) in (tuple, list):
        items = ("..." if item is ... else _type_name(item) for item in choices)
        return f"{annotation.__origin__.__name__}[{', '.join(items)}]"
    if choices:
        return " | ".join(
            _type_name(item) if isinstance(item, type) or item is None else str(item)
            for item in choices
        )
    return (
        "None"
        if annotation in (None, type(None))
        else getattr(annotation, "__name__", str(annotation))
    )
