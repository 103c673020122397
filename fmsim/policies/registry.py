"""Policies by name: fmsim's own from the list here, plug-ins from the entry point group
`fmsim.policies`.

One that is not installed is named by its file, `path/file.py:Class`, or given as a class.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from fmsim.errors import BadParameter, FmsimError, FmsimWarning, PolicyError, short, shown
from fmsim.files import strict_yaml
from fmsim.policies.base import Action, DecisionScope, Evidence, Policy, PolicyParams, describe
from fmsim.policies.guard import called, line_in

GROUP = "fmsim.policies"
FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)(?::(?P<given>.+))?", re.DOTALL)
DECLARATIONS = {"action": Action, "evidence": Evidence, "decision_scope": DecisionScope}
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
    "foresight": "foresight:Foresight",
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
                FmsimWarning,
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
    fault: str | None
    policy: type[Policy] | None = None
    try:
        policy = point.load()
    except (Exception, SystemExit) as error:  # whatever a plug-in's import raises
        fault = f"could not be imported: {type(error).__name__}: {error}"
    else:
        fault = fault_of(policy)
    if fault:
        warnings.warn(
            f"policy {name!r} ({point.value}) is left out: it {fault}", FmsimWarning, stacklevel=3
        )
        return None
    return policy


def fault_of(policy: Any) -> str | None:
    """What keeps an object from being a policy class that fmsim can use, or None."""
    if not (inspect.isclass(policy) and issubclass(policy, Policy)):
        return "is not a subclass of fmsim.Policy"
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not name or not name.isprintable():
        return "has no `name`; set it in the class"
    for key, words in DECLARATIONS.items():
        if not hasattr(policy, key):
            return f"has no `{key}`; it must be one of {', '.join(get_args(words))}"
        value = getattr(policy, key)
        if value not in get_args(words):
            return f"says `{key}` is {value!r}; it must be one of {', '.join(get_args(words))}"
    if not (inspect.isclass(policy.Params) and issubclass(policy.Params, PolicyParams)):
        return "has `Params` that do not extend fmsim.PolicyParams"
    if policy.worth is Policy.worth:
        return "defines no `worth`"
    return None


def get(named: str | type[Policy] | Policy) -> type[Policy]:
    """The class of a policy: by its name, by `path/file.py:Class`, or the class or object itself.

    Raises FmsimError that lists what there is.
    """
    if not isinstance(named, str):
        policy = named if inspect.isclass(named) else type(named)
        fault = fault_of(policy)
        if fault:
            raise FmsimError(f"policy {policy.__name__}: it {fault}")
        return policy
    if ".py" in named:
        return _from_file(named)
    found = _load(named) if named in _found() else None
    if found is None:
        near = get_close_matches(named.lower(), _found(), n=1)
        hint = f"did you mean {near[0]!r}? " if near and near[0] != named else ""
        raise BadParameter(
            f"no policy named {named!r}; {hint}there are: {', '.join(names())}", "policy"
        )
    return found


def _from_file(named: str) -> type[Policy]:
    """The class that `path/file.py:Class` names."""
    match = FILE.fullmatch(named)
    path = Path(match["path"] if match else named)
    if not path.is_file():
        raise FmsimError(f"policy {named}: no such file: {path}")
    module = _module(path.resolve(), path.stat().st_mtime_ns)
    found = [name for name, value in vars(module).items() if _is_own(value, module.__name__)]
    if match is None or match["name"] not in vars(module):
        there = ", ".join(f"{path}:{name}" for name in found) or "no policy in it"
        raise FmsimError(f"policy {named}: write {path}:CLASS; there is {there}")
    policy: type[Policy] = vars(module)[match["name"]]
    fault = fault_of(policy)
    if fault:
        raise FmsimError(f"policy {named}: it {fault}")
    return policy


def _is_own(value: Any, module: str) -> bool:
    return inspect.isclass(value) and issubclass(value, Policy) and value.__module__ == module


@cache
def _module(path: Path, changed: int) -> Any:
    """The module in a file as it was `changed`; it can be pickled by reference in this process."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"fmsim_policy_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file raises
        del sys.modules[name]
        raise FmsimError(
            f"{path}: could not be imported: {type(error).__name__}: {error}{line_in(name, error)}"
        ) from error
    return module


def split(text: str) -> tuple[str, dict[str, Any]]:
    """A policy as `-p` takes it: `NAME`, `path/file.py:Class`, either with `:key=value,key=value`.

    -> its name (or file and class), and the parameters given.
    """
    match = FILE.fullmatch(text)
    if match:
        name, given = f"{match['path']}:{match['name']}", match["given"] or ""
    else:
        name, _, given = (text, "", "") if ".py" in text else text.partition(":")
    params: dict[str, Any] = {}
    for pair in re.split(r",(?=\s*\w+\s*=)", given) if given else []:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise FmsimError(
                f"--policy {text}: {pair!r} is no key=value; write e.g."
                " lsa:on_miss=fallback,budget=20%"
            )
        params[key] = strict_yaml.load(value, f"--policy {shown(text)}: {key}")
    return name, params


def absolute(named: Any) -> Any:
    """The same policy, its file named from the root; what names no file as it is."""
    match = FILE.fullmatch(named) if isinstance(named, str) else None
    return f"{Path(match['path']).resolve()}{named[match.end('path') :]}" if match else named


def is_builtin(policy: type[Policy] | Policy) -> bool:
    """Whether a policy is one of fmsim's own."""
    kind = policy if inspect.isclass(policy) else type(policy)
    return kind.__module__.startswith("fmsim.policies.")


def label_of(named: str | type[Policy] | Policy) -> str:
    """What a policy is called in a table: its name, also where a file or a class names it."""
    return named if isinstance(named, str) and ".py" not in named else get(named).name


def build(spec: str | type[Policy] | Policy | Mapping[str, Any]) -> Policy:
    """A new policy object.

    `spec` is a name, `path/file.py:Class`, either with parameters behind (`lru:budget=10%`); a
    class; an object, for one more with its parameters; or a mapping as in a scenario, {policy: lru,
    budget: 10%, granularity: 4}.
    """
    if isinstance(spec, str):
        name, params = split(spec)
        return build({"policy": name} | params)
    if not isinstance(spec, Mapping):
        return build({"policy": spec})
    given = dict(spec)
    named = given.pop("policy", None)
    if not isinstance(named, (str, Policy, type)):
        raise FmsimError(
            f"policy {spec!r}: the key 'policy' must name one of: {', '.join(names())}"
        )
    policy = get(named)
    if isinstance(named, Policy):
        given = named.params.model_dump(exclude_unset=True) | given
    known = policy.Params.model_fields
    for key, value in given.items():
        if _has_bool(value) and key in known and not takes_bool(known[key].annotation):
            raise BadParameter(
                f"policy {policy.name}: {key}: {short(value)} is no value of it; give a number", key
            )
    try:
        checked = policy.Params.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise BadParameter(
                f"policy {policy.name}: no parameter {shown(repr(key))}; {hint}", key
            ) from None
        raise BadParameter(
            f"policy {policy.name}: {describe(error)} (parameters: {', '.join(known)})", key
        ) from None
    except FmsimError:
        raise
    except Exception as error:  # whatever a plug-in's validators raise
        raise PolicyError(
            f"policy {policy.name}: its Params raised {type(error).__name__}: {error}"
        ) from error
    made: Policy = called(f"policy {policy.name}: __init__", policy, checked)
    return made


def _has_bool(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, (list, tuple)) and any(map(_has_bool, value))
    )


def takes_bool(annotation: Any) -> bool:
    """Whether true and false are values of a field's type; pydantic would read them as numbers."""
    members = get_args(annotation)
    if get_origin(annotation) is Literal:
        return any(isinstance(member, bool) for member in members)
    if members:
        return any(takes_bool(member) for member in members if member is not ...)
    return annotation not in (int, float, type(None))


def info(name: str | type[Policy]) -> dict[str, Any]:
    """What `fmsim policy show` prints: declarations, parameters (name, type, default, description),
    docstring.
    """
    policy = get(name)
    return {
        "name": policy.name,
        "action": policy.action,
        "evidence": policy.evidence,
        "decision_scope": policy.decision_scope,
        "summary": _first_paragraph(policy),
        "doc": inspect.cleandoc(policy.__doc__ or ""),
        "module": name if isinstance(name, str) and ".py" in name else policy.__module__,
        "parameters": [
            {
                "name": key,
                "type": type_name(field.annotation),
                "default": _default(field),
                "description": field.description or "",
            }
            for key, field in policy.Params.model_fields.items()
        ],
    }


def _default(field: Any) -> str:
    return "required" if field.default is PydanticUndefined else str(field.default)


def _first_paragraph(policy: type[Policy]) -> str:
    return " ".join(inspect.cleandoc(policy.__doc__ or "").partition("\n\n")[0].split())


def type_name(annotation: Any) -> str:
    """int -> "int", Literal["a", "b"] -> "a | b", Path | None -> "Path | None"."""
    choices = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) in (tuple, list):
        items = ("..." if item is ... else type_name(item) for item in choices)
        return f"{annotation.__origin__.__name__}[{', '.join(items)}]"
    if choices:
        return " | ".join(
            type_name(item) if isinstance(item, type) or item is None else str(item)
            for item in choices
        )
    return (
        "None"
        if annotation in (None, type(None))
        else getattr(annotation, "__name__", str(annotation))
    )
