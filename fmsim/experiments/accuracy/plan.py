"""What `fmsim eval` asks of whom, and the contexts that are read for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.tasks import FAMILIES, in_contexts

POLICIES = ("full", "lsa", "lsa:on_miss=fallback", "recency", "random", "lru", "h2o", "oracle")


@dataclass(frozen=True)
class Item:
    """One context, read once: number ``sample`` of a seed and length, and the families asked about
    in it.
    """

    seed: int
    tokens: int
    sample: int
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens, seed {self.seed}, sample {self.sample + 1},"
            f" {', '.join(self.tasks)}"
        )


@dataclass(frozen=True)
class Plan:
    """What is asked of whom.

    ``policies`` are specs as `policy_of` reads them; ``budget`` is of all that do not name their
    own; ``model`` names the preset whose bytes, and ``hardware`` the one whose times, the answers'
    ledgers are turned into; a budget on the GPU is of that preset's bytes. ``fewer`` has (length,
    samples, seeds) of lengths that get fewer of them: the first ones.
    """

    tasks: tuple[str, ...] = FAMILIES
    lengths: tuple[int, ...] = (32_768,)
    samples: int = 10
    policies: tuple[str, ...] = POLICIES
    budget: str = "10%"
    checkpoint: str | None = None
    seeds: tuple[int, ...] = (42,)
    model: str = "v4-flash"
    hardware: str = "h100"
    fewer: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        for task in set(self.tasks) - set(FAMILIES):
            raise FmsimError(f"--task {task}: no such family; there are {', '.join(FAMILIES)}")
        if self.model not in PRESETS:
            raise FmsimError(
                f"--model {self.model}: no such preset; there are {', '.join(PRESETS)}"
            )
        if self.samples < 1 or min(self.lengths) < 1:
            raise FmsimError("eval: --samples and --length must be at least 1")
        if any(min(samples, seeds) < 1 for _, samples, seeds in self.fewer):
            raise FmsimError("eval: --length TOKENS:SAMPLES:SEEDS takes numbers of at least 1")
        if min(self.seeds) < 0:
            raise FmsimError("eval: --seed must be at least 0")

    def items(self) -> list[Item]:
        """Every context, each once."""
        fewer = {tokens: (samples, seeds) for tokens, samples, seeds in self.fewer}
        every = []
        for tokens in self.lengths:
            samples, seeds = fewer.get(tokens, (self.samples, len(self.seeds)))
            every += [
                Item(seed, tokens, sample, tasks)
                for seed in self.seeds[:seeds]
                for sample in range(samples)
                for tasks in in_contexts(self.tasks)
            ]
        return list(dict.fromkeys(every))


def at_budgets(policies: Sequence[str], budgets: Sequence[str]) -> list[str]:
    """`policies` as specs that name their budget, at each of `budgets`: all but `full`, and those
    that name one.
    """
    found = []
    for spec in policies:
        name, params = registry.split(spec)
        alone = name == "full" or "budget" in params
        between = "," if params else ":"
        found += [spec] if alone else [f"{spec}{between}budget={budget}" for budget in budgets]
    return list(dict.fromkeys(found))


def policy_of(spec: str, budget: str, checkpoint: str | None = None) -> Policy:
    """A policy from ``name`` or ``name:key=value,key=value``; FmsimError where it cannot be read or
    built.
    """
    name, params = registry.split(spec)
    fields = registry.get(name).Params.model_fields
    if name != "full":
        params.setdefault("budget", budget)
    if checkpoint is not None and "checkpoint" in fields:
        params.setdefault("checkpoint", checkpoint)
    return registry.build({"policy": name} | params)
