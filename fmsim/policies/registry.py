"""Policies by name: fmsim's own from the list here, plug-ins from the entry point group
`fmsim.policies`.
"""

from __future__ import annotations

import inspect
import warnings
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from fmsim.errors import FmsimError, PolicyError
from fmsim.policies.base import Action, DecisionScope, Evidence, Policy, describe
from fmsim.policies.guard import called

GROUP = "fmsim.policies"
DECLARATIONS = {
    "action": get_args(Action),
    "evidence": get_args(Evidence),
    "decision_scope": get_args(DecisionScope),
}
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
    except (Exception, SystemExit) as error:  # whatever a plug-in's import raises
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
    fault = _undeclared(policy)
    if fault:
        warnings.warn(f"policy {name!r} ({point.value}) {fault}, and is left out", stacklevel=3)
        return None
    return policy


def _undeclared(policy: type[Policy]) -> str | None:
    """What the class does not declare, or declares in other words than the interface has."""
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not name.isprintable() or not name:
        return "has no class attribute `name`, a text"
    for key, words in DECLARATIONS.items():
        if getattr(policy, key, None) not in words:
            return f"has no class attribute `{key}`, one of {', '.join(words)}"
    return None


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
    known = policy.Params.model_fields
    for key, value in given.items():
        if isinstance(value, bool) and key in known and not takes_bool(known[key].annotation):
            raise FmsimError(f"policy {name}: {key}: {value} is no value of it; give a number")
    try:
        params = policy.Params.model_validate(given)
    except ValidationError as error:
        raise FmsimError(
            f"policy {name}: {describe(error)} (parameters: {', '.join(known)})"
        ) from None
    except FmsimError:
        raise
    except Exception as error:  # whatever a plug-in's validators raise
        raise PolicyError(
            f"policy {name}: its Params raised {type(error).__name__}: {error}"
        ) from error
    made: Policy = called(f"policy {name}: __init__", policy, params)
    return made


def takes_bool(annotation: Any) -> bool:
    """Whether true and false are values of a field's type; pydantic would read them as numbers."""
    members = get_args(annotation)
    if members:
        return any(member in (True, False) or takes_bool(member) for member in members)
    return annotation not in (int, float)


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
