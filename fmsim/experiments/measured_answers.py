"""What `fmsim eval` measured of answers under policies, as it ships: `fmsim run` shows it.

The file lies with `experiments.accuracy`. This module does not, since that room loads what only the
`model` extra installs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from fmsim.policies.base import Policy

FILE = "answers_kept.json"
NEAR = 0.1  # a length within this of the one asked for stands for it
APART = ("budget", "checkpoint")  # params that do not tell one policy from another


@dataclass(frozen=True)
class AnswersKept:
    """The share of the full cache's score that a policy kept, and half of its 95% interval's width
    over `contexts` contexts of `tokens`; None where one context cannot tell.
    """

    kept: float
    half_width: float | None
    contexts: int
    tokens: int


def answers_kept(
    model_sha256: str | None, tokens: int, policy: Policy, geometry: str
) -> AnswersKept | None:
    """Of the model with these weights, after about `tokens`, under `policy` at its budget, which is
    of the bytes of the model called `geometry`; None where that was not measured.
    """
    table = _table()
    if not table["rows"] or model_sha256 != table["about"]["model"]["sha256"]:
        return None
    if geometry != table["about"]["geometry"]:
        return None
    rows = [row for row in table["rows"] if _same(row, policy)]
    nearest = min(rows, key=lambda row: abs(row["tokens"] - tokens), default=None)
    if nearest is None or abs(nearest["tokens"] - tokens) > NEAR * tokens:
        return None
    return AnswersKept(
        nearest["kept"], nearest["half_width"], nearest["contexts"], nearest["tokens"]
    )


def about_answers() -> dict[str, Any]:
    """How they were measured: "command", "date", "device", "geometry", "model", "families"."""
    found: dict[str, Any] = _table()["about"]
    return found


def identity(policy: Policy) -> dict[str, Any]:
    """What tells a measured policy from others: name, params and budget, as in the file."""
    params = policy.params.model_dump(mode="json")
    return {
        "policy": policy.name,
        "params": {key: value for key, value in params.items() if key not in APART},
        "budget": str(params["budget"]),
    }


def _same(row: dict[str, Any], policy: Policy) -> bool:
    return all(row[key] == value for key, value in identity(policy).items())


@cache
def _table() -> dict[str, Any]:
    text = files("fmsim.experiments").joinpath("accuracy", FILE).read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table
