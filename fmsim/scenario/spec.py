"""The keys of a scenario: which trace drives which model on which hardware, under what policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fmsim.errors import FmsimError
from fmsim.hw.deployment import Deployment
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.policies.budget import Budget
from fmsim.sim.serving import spec as serving

MOST_LABEL = 200
MOST_POLICIES = 1000


class PolicySpec(BaseModel):
    """One entry of `policies`: a name, or a mapping of `policy`, an optional `label`, and the
    policy's parameters.

    In Python `policy` may be a class or an object too, and after `-p` it may be
    `path/file.py:Class`.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    policy: Any
    label: str
    params: dict[str, Any]
    entry: str  # the label in the scenario, of which `label` may be one at a budget

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            given = {"policy": given}
        named = given.get("policy")
        if not isinstance(named, (str, Policy, type)):
            raise ValueError(
                "give a policy's name, or a mapping such as {policy: lru, budget: 10%}"
            )
        label = given["label"] if "label" in given else registry.label_of(named)
        if not isinstance(label, str) or not label.strip() or len(label) > MOST_LABEL:
            raise ValueError(f"a label is a text of 1 to {MOST_LABEL} characters")
        params = {key: value for key, value in given.items() if key not in ("policy", "label")}
        return {"policy": named, "label": label, "params": params, "entry": label}

    def at(self, budgets: Sequence[Budget]) -> list[PolicySpec]:
        """This policy at each of `budgets`; as it is where it has a budget of its own, or takes
        none.
        """
        own = self.policy.params.model_fields_set if isinstance(self.policy, Policy) else set()
        if {"budget", "kmax"} & (set(self.params) | own) or not _takes_budget(self.policy):
            return [self]
        return [
            self.model_copy(
                update={
                    "label": f"{self.label} {budget}" if len(budgets) > 1 else self.label,
                    "params": self.params | {"budget": str(budget)},
                }
            )
            for budget in budgets
        ] or [self]


def _takes_budget(named: str | type[Policy] | Policy) -> bool:
    """Whether the policy has a budget that can be chosen; who is not known is told elsewhere."""
    try:
        return registry.get(named).Params.model_fields["budget"].annotation is Budget
    except FmsimError:
        return False


class Scenario(BaseModel):
    """The keys of a scenario file. Paths are relative to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1)  # what tables and results call it
    description: str = ""  # a line above the table
    trace: Path  # what a model selected; a file, or the name of a trace that fmsim carries
    model: str = "v4-flash"  # a preset, or the path of a config.json or of layer specs
    hardware: str = "h100"  # a preset, or the path of a file that `fmsim hw calibrate` wrote
    # figures in place of the preset's, such as link_bytes_per_s and host_bytes
    hardware_figures: dict[str, float] = {}
    deployment: Deployment = Deployment()  # how the model lies on the server's GPUs
    # equal requests that decode side by side
    batch: int = Field(1, ge=1, le=1_000_000)
    # for each layer of the model that pages the trace layer that drives it; or spread evenly
    layer_map: tuple[int, ...] | Literal["spread"] | None = None
    # of a trace of another family: each of its entries stands for one of so many tokens
    entry_tokens: int | None = Field(None, ge=1, le=1_000_000)
    beyond_positions: bool = False  # contexts longer than the model's positions
    # names, or mappings of a name and its parameters
    policies: tuple[PolicySpec, ...] = Field(min_length=1, max_length=MOST_POLICIES)
    # each policy without a budget of its own runs at each of these
    budgets: tuple[Budget, ...] = ()
    # requests to serve: the run is then one of many requests on a server
    workload: serving.Workload | None = None
    server: serving.Server = serving.Server()  # how requests are admitted and prefilled

    @field_validator("budgets", mode="before")
    @classmethod
    def _one_budget_is_a_list(cls, given: Any) -> Any:
        given = [given] if isinstance(given, str) else given
        return tuple(given) if isinstance(given, list) else given

    @field_validator("budgets")
    @classmethod
    def _budgets_differ(cls, budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
        if len(set(budgets)) < len(budgets):
            raise ValueError("a budget stands there twice")
        return budgets

    @field_validator("policies")
    @classmethod
    def _labels_differ(cls, policies: tuple[PolicySpec, ...]) -> tuple[PolicySpec, ...]:
        labels = [spec.label for spec in policies]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)} stands there twice; give each a 'label' of its own"
            )
        return policies
