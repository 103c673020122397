"""Conformance kit: it tells the author of a policy plug-in whether fmsim can rely on it.

from fmsim import policy_checks

@pytest.mark.parametrize("check", policy_checks(MyPolicy), ids=str)
def test_my_policy(check):
    check()
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from fmsim.errors import FmsimError
from fmsim.policies.base import Policy, PolicyParams
from fmsim.testing import rules
from fmsim.testing.rules import Subject
from fmsim.testing.sample import sample_trace, shortened
from fmsim.trace import Trace

MOST_STEPS = 134  # of a trace that is given: two windows and a little
SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    {"scope": "shared"},
    {"granularity": 4},
    {"cadence": 16},
    {"on_miss": "fallback"},
    {"on_miss": "mask", "cadence": 16},
    {"on_miss": "mask", "sees": "all"},
    {"budget": "20 entries"},
)


@dataclass(frozen=True)
class PolicyCheck:
    """One rule, to be called: it raises AssertionError with a sentence where a policy breaks it."""

    name: str
    policy: str
    rule: Callable[[], None]

    def __call__(self) -> None:
        try:
            self.rule()
        except (AssertionError, FmsimError) as error:
            said = str(error)
            if not said.startswith("policy "):
                said = f"policy {self.policy}: {said or 'an assertion of its own does not hold'}"
            raise AssertionError(said) from error
        except (Exception, SystemExit) as error:  # whatever a policy raises
            raise AssertionError(
                f"policy {self.policy}: it raised {type(error).__name__}:"
                f" {str(error).strip().partition(chr(10))[0]}"
            ) from error

    def __str__(self) -> str:
        return self.name


def policy_checks(policy: type[Policy] | Policy, trace: Trace | None = None) -> list[PolicyCheck]:
    """The rules that a policy must keep, one check each, to be called.

    `policy` is a class, or an object where it needs parameters. Where a policy cannot read the
    kit's own small trace, give one of yours as `trace`: its first 134 steps are replayed.

    >>> from fmsim.policies.lru import LRU
    >>> [check.name for check in policy_checks(LRU)][:2]
    ['declarations', 'parameters']
    """
    return list(_checks(policy, trace))


def _checks(policy: type[Policy] | Policy, trace: Trace | None) -> Iterator[PolicyCheck]:
    cls = policy if inspect.isclass(policy) else type(policy)
    name = getattr(cls, "name", None) or getattr(cls, "__name__", repr(cls))
    yield PolicyCheck("declarations", str(name), partial(rules.declarations, cls))
    yield PolicyCheck("parameters", str(name), partial(rules.parameters, policy))
    params = _params(policy)
    if params is None:
        return  # the two checks above say why
    given = sample_trace() if trace is None else shortened(trace, MOST_STEPS)
    for switches in SWITCHES:
        accepted = _with(params, switches)
        if accepted is None or (given.mass is None and accepted.on_miss == "fallback"):
            continue
        subject = Subject(cls, accepted, given)
        if "budget" in switches and not subject.fits():
            continue
        how = ", ".join(f"{key} {value}" for key, value in switches.items()) or "as it is"
        for rule in rules.OF_REPLAYS:
            yield PolicyCheck(f"{_words(rule)}: {how}", str(name), partial(rule, subject))


def check_policy(policy: type[Policy] | Policy, trace: Trace | None = None) -> None:
    """Run every check of `policy_checks`; raises AssertionError, with a sentence, at the first that
    fails.

    >>> from fmsim.policies.recency import Recency
    >>> check_policy(Recency)
    """
    for check in policy_checks(policy, trace):
        check()


def _words(rule: Callable[[Subject], None]) -> str:
    return rule.__name__.replace("_", " ")


def _params(policy: type[Policy] | Policy) -> PolicyParams | None:
    """The parameters of the policy as it is given, or None where it cannot be made."""
    try:
        return (policy() if inspect.isclass(policy) else policy).params
    except (Exception, SystemExit):  # `parameters` tells
        return None


def _with(params: PolicyParams, switches: dict[str, Any]) -> PolicyParams | None:
    """The parameters with switches of the manager's set, or None where the policy fixes one."""
    try:
        return type(params).model_validate(params.model_dump() | switches)
    except ValidationError:
        return None
