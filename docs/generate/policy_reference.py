"""docs/reference/policy.md, policy-context.md: what a policy may say and see, from docstrings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from describe import item, members, one_line, section, text_of

from fmsim.policies import base, registry
from fmsim.policies.base import PolicyParams
from fmsim.testing import rules

MEANINGS = {
    "visibility_only": "every page stays on the GPU; nothing is evicted or loaded",
    "evict": "what leaves is gone: no page comes back from the host",
    "hierarchical": "the host keeps a copy of all; pages are loaded back",
    "position": "where a page stands in the text; no attention mass, no index keys",
    "kv_derived": "the stored entries; no attention mass",
    "current_query": "the query of the step",
    "attention_history": "what past steps selected and attended to; no index keys",
    "predicted_future": "a model's guess at what comes, from hidden states and index keys",
    "future": "what will really come: a bound, not for an engine",
    "request": "for a whole request: once, or for all its layers together",
    "step": "at each step, by the same in all layers",
    "layer": "each layer by what it saw itself",
}


def policy() -> str:
    """What a policy declares and defines."""
    return "\n".join(
        [
            section(
                "Declarations",
                "Class attributes; each must be set. `decision_scope` is for the reader: nothing"
                " goes by it.",
                declarations(),
            ),
            section("Switches", text_of(PolicyParams), switches()),
            section("Methods", text_of(base.Policy), members(base.Policy)),
            section(
                "Of a LookaheadPolicy",
                text_of(base.LookaheadPolicy),
                members(base.LookaheadPolicy),
            ),
        ]
    )


def context() -> str:
    """What a policy is handed, and the rules that the conformance kit checks."""
    parts = [
        section("`ctx`, the context", text_of(base.Context), members(base.Context)),
        section("`obs`, an observation", text_of(base.Observation), members(base.Observation)),
        section("`Pins`", text_of(base.Pins), members(base.Pins)),
    ]
    for name, what in (
        ("LookaheadState", "`ctx.lookahead(window)`"),
        ("Residents", "`ctx.residents`"),
        ("Future", "`ctx.future`"),
    ):
        kind = getattr(base, name)
        parts.append(section(what, text_of(kind), members(kind)))
    parts.append(section("Rules", "What `fmsim.check_policy` runs.", checked_rules()))
    return "\n".join(parts)


def declarations() -> Iterator[str]:
    yield item("`name`", "what it is called; letters, digits and hyphens")
    for key, words in registry.DECLARATIONS.items():
        yield item(f"`{key}`", "one of")
        for word in get_args(words):
            yield item(f"`{word}`", MEANINGS[word], depth=1)


def switches() -> Iterator[str]:
    """`Params`, as `fmsim policy show` prints them."""
    for key, field in PolicyParams.model_fields.items():
        kind = registry.type_name(field.annotation)
        yield item(f"`{key}` ({kind}, default {field.default})", one_line(field.description or ""))


def checked_rules() -> Iterator[str]:
    for rule in (rules.declarations, rules.parameters, *rules.OF_REPLAYS):
        yield item(f"`{rule.__name__.replace('_', ' ')}`", text_of(rule))
