"""docs/reference/policies.md: the policies that come with fmsim, from their classes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from describe import item, one_line, section, wrapped

from fmsim.policies import registry
from fmsim.policies.base import PolicyParams

KINDS = {
    "exact": "Exact policies",
    "lossy": "Lossy policies",
    "bound": "Bounds",
}
TEXTS = {
    "exact": "What they lack is loaded from host memory, and the step waits. `full` lacks nothing.",
    "lossy": "What they lack is left out of attention, unless `on_miss` says otherwise.",
    "bound": "They read the future of the trace. They show what is possible, not what to deploy.",
}


def policies() -> str:
    """Three lists: exact, lossy, bounds."""
    parts = []
    for kind, title in KINDS.items():
        parts.append(section(title, TEXTS[kind], iter(())))
        parts += [one(name) for name in own() if kind_of(name) == kind]
    return "\n".join(parts)


def own() -> list[str]:
    """The policies that come with fmsim; plug-ins of this environment are left out."""
    return [name for name in registry.names() if registry.get(name).__module__.startswith("fmsim.")]


def kind_of(name: str) -> str:
    found = registry.get(name)
    if found.evidence == "future":
        return "bound"
    on_miss = found.Params.model_fields["on_miss"].default
    return "exact" if name == "full" or on_miss == "fetch" else "lossy"


def one(name: str) -> str:
    """A policy: its first paragraph, its own parameters, its changed defaults."""
    known = registry.info(name)
    first = one_line(known["doc"].partition("\n\n")[0])
    return f"### `{name}`\n\n{wrapped(first)}\n\n" + "".join(parameters(name))


def extends(name: str) -> str | None:
    """The policy of the list whose class this one's extends; None for none."""
    classes = {registry.get(other): other for other in own()}
    return next((classes[cls] for cls in registry.get(name).__mro__[1:] if cls in classes), None)


def parameters(name: str) -> Iterator[str]:
    """Its declarations, the switches whose default it changes, and its own parameters."""
    known = registry.info(name)
    yield item(f"`action` {known['action']}, `evidence` {known['evidence']}")
    common = {key: str(field.default) for key, field in PolicyParams.model_fields.items()}
    changed = [
        f"`{param['name']}` {param['default']}"
        for param in known["parameters"]
        if common.get(param["name"], param["default"]) != param["default"]
    ]
    if changed:
        yield item("defaults", ", ".join(changed))
    told: list[dict[str, str]] = []
    if parent := extends(name):
        told = registry.info(parent)["parameters"]
        yield item(f"and the parameters of [`{parent}`](#{parent})")
    for param in known["parameters"]:
        if param["name"] not in common and param not in told:
            text = re.sub(r"\s+", " ", param["description"] or "")
            yield item(f"`{param['name']}` ({param['type']}, default {param['default']})", text)
