"""The JSON schema of scenario files, which editors check and complete by."""

from __future__ import annotations

from typing import Any

from fmsim.policies import registry
from fmsim.scenario.spec import MOST_LABEL, Scenario

FILE = "fmsim.schema.json"  # beside scenarios, which name it in their first line


def of_scenarios() -> dict[str, Any]:
    """The schema of a whole file, with every installed policy's parameters."""
    schema: dict[str, Any] = Scenario.model_json_schema()
    parts: dict[str, Any] = schema["$defs"]
    names = registry.names()
    entries = [_entry(name, parts) for name in names]
    parts["PolicySpec"] = {
        "description": "A policy's name, or a mapping of it, a label and its parameters.",
        "anyOf": [{"enum": names}, *entries],
    }
    parts["Tokens"] = TOKENS
    for part in parts.values():
        for name, known in part.get("properties", {}).items():
            if "prefixItems" in known:
                part["properties"][name] = {"$ref": "#/$defs/Tokens"}
    one_or_more = schema["properties"]["budgets"]
    schema["properties"]["budgets"] = one_or_more | {
        "anyOf": [one_or_more.pop("items"), {"type": "array", "items": {"type": "string"}}]
    }
    schema["properties"]["budgets"].pop("type")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


# A length, or [low, high]: what `serving.spec` reads, whose validator pydantic does not look into.
TOKENS = {
    "description": "a number of tokens, or [low, high] to draw from",
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {
            "type": "array",
            "items": {"type": "integer", "minimum": 1},
            "minItems": 2,
            "maxItems": 2,
        },
    ],
}


def _entry(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """A mapping in `policies` with this policy; what its parameters refer to goes into `parts`."""
    found = registry.get(name)
    params = found.Params.model_json_schema(ref_template="#/$defs/{model}")
    parts.update(params.pop("$defs", {}))
    return {
        "type": "object",
        "description": registry.info(name)["summary"],
        "properties": {
            "policy": {"const": name},
            "label": {"type": "string", "minLength": 1, "maxLength": MOST_LABEL},
        }
        | params.get("properties", {}),
        "required": ["policy", *params.get("required", [])],
        "additionalProperties": False,
    }
