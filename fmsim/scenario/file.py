"""A scenario: which trace drives which model on which hardware, under which policies.

One YAML file, checked key by key.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fmsim import strict_yaml
from fmsim.errors import FmsimError, short, shown
from fmsim.hw.deployment import Deployment
from fmsim.inputs import read_text
from fmsim.scenario.key_value import key_value
from fmsim.sim.serving import spec as serving
from fmsim.strict_yaml import MOST_DEPTH, Loc

MOST_LABEL = 200
MOST_POLICIES = 1000


class PolicySpec(BaseModel):
    """One entry of `policies`: a name, or a mapping of `policy`, an optional `label`, and the
    policy's parameters.
    """

    model_config = ConfigDict(frozen=True)

    policy: str
    label: str
    params: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {"policy": given}
        if not isinstance(given, Mapping) or not isinstance(given.get("policy"), str):
            raise ValueError(
                "give a policy's name, or a mapping such as {policy: lru, budget: 10%}"
            )
        label = given.get("label", given["policy"])
        if not isinstance(label, str) or not label.strip() or len(label) > MOST_LABEL:
            raise ValueError(f"a label is a text of 1 to {MOST_LABEL} characters")
        params = {key: value for key, value in given.items() if key not in ("policy", "label")}
        return {"policy": given["policy"], "label": label, "params": params}


class Scenario(BaseModel):
    """The keys of a scenario file. Paths are relative to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1)
    description: str = ""
    trace: Path
    model: str = "v4-flash"  # a preset, or the path of a config.json or of layer specs
    hardware: str = "h100"  # a preset, or the path of a file that `fmsim hw calibrate` wrote
    hardware_figures: dict[
        str, float
    ] = {}  # in place of the preset's, e.g. link_bytes_per_s, host_bytes
    deployment: Deployment = Deployment()  # how the model lies on the server's GPUs
    # equal requests that decode side by side
    batch: int = Field(1, ge=1, le=1_000_000)
    # for each layer of the model that pages the trace layer that drives it; or spread evenly
    layer_map: tuple[int, ...] | Literal["spread"] | None = None
    # of a trace of another family: each of its entries stands for one of so many tokens
    entry_tokens: int | None = Field(None, ge=1, le=1_000_000)
    beyond_positions: bool = False  # contexts longer than the model's positions
    policies: tuple[PolicySpec, ...] = Field(min_length=1, max_length=MOST_POLICIES)
    workload: serving.Workload | None = (
        None  # requests to serve: the run is then one of many requests on a server
    )
    server: serving.Server = serving.Server()

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


class ScenarioFile:
    """A scenario and where its keys stand, so that a later mistake can name the line."""

    def __init__(self, path: str | Path, overrides: Iterable[str] = ()) -> None:
        """Read and check `path`, with `overrides` such as "batch=8" or "policies.lsa.budget=20%"
        applied.

        Raises FmsimError that names file, line, key and fix.
        """
        self.path = Path(path)
        self._document = strict_yaml.YamlDocument(self._text(), str(self.path))
        raw = self._document.value
        if not isinstance(raw, dict):
            raise FmsimError(
                f"{shown(self.path)}: a scenario is a mapping of keys; it needs 'name', 'trace' and"
                " 'policies'"
            )
        self._overridden: dict[Loc, str] = {}
        for override in overrides:
            self._override(raw, override)
        try:
            self.scenario = Scenario.model_validate_json(json.dumps(raw), strict=True)
        except ValidationError as error:
            raise FmsimError(self._explain(error)) from None

    def file(self, name: str | Path) -> Path:
        """A path that the scenario names: relative to the scenario, or to the working directory
        where --set gave it.
        """
        given = [
            self._overridden.get(loc, "").partition("=")[2].strip()
            for loc in (("trace",), ("workload", "file"), ("deployment", "start_log"))
        ]
        return Path(name) if str(name) in given else Path(os.path.normpath(self.path.parent / name))

    def where(self, loc: Loc) -> str:
        """For a message: 'file, line N: key', or the --set that gave the key."""
        key = shown(".".join(map(str, loc)))
        for prefix in (loc[:n] for n in range(len(loc), 0, -1)):
            if prefix in self._overridden:
                return f"--set {shown(self._overridden[prefix])}: {key}"
        return f"{shown(self.path)}, line {self._document.line(loc)}: {key}"

    def _text(self) -> str:
        try:
            return read_text(self.path)
        except FileNotFoundError:
            near = difflib.get_close_matches(self.path.name, _yaml_names(self.path.parent), n=1)
            hint = f"; did you mean {self.path.parent / near[0]}?" if near else ""
            raise FmsimError(f"{shown(self.path)}: no such scenario file{hint}") from None

    def _override(self, raw: dict[str, Any], override: str) -> None:
        wrong = (
            f"--set {shown(override)}: write key=value, such as --set batch=8 or --set"
            " policies.lsa.budget=20%"
        )
        key, value = key_value(override, wrong)
        loc: list[str | int] = list(key.split("."))
        if not all(loc) or len(loc) > MOST_DEPTH:
            raise FmsimError(wrong)
        if loc[0] == "policies" and len(loc) > 1:
            for index in _policy_indices(raw, str(loc[1]), override):
                self._set(raw, ["policies", index, *loc[2:]], value, override)
        else:
            self._set(raw, loc, value, override)

    def _set(self, raw: dict[str, Any], loc: list[str | int], value: str, override: str) -> None:
        target: Any = raw
        where = f"--set {shown(override)}"
        for step in loc[:-1]:
            if isinstance(target, dict) and target.get(step) is None:
                target[step] = {}
            target = _inside(target, step, where)
            if not isinstance(target, (dict, list)):
                raise FmsimError(f"{where}: '{shown(step)}' is a value and has no keys")
        if isinstance(target, list):
            _inside(target, loc[-1], where)
            loc[-1] = int(loc[-1])
        target[loc[-1]] = strict_yaml.load(value, where)
        self._overridden[tuple(loc)] = override

    def _explain(self, error: ValidationError) -> str:
        """The first mistake, with what to do."""
        item = error.errors()[0]
        kinds = serving.WORKLOADS if item["loc"][:1] == ("workload",) else {}
        loc = tuple(
            part
            for part in item["loc"]
            if isinstance(part, int) or not (part.startswith("function-") or part in kinds)
        )
        if not loc:
            return f"{shown(self.path)}: {shown(item['msg'])}"
        if item["type"] == "extra_forbidden":
            known = _fields(item["loc"][:-1])
            near = difflib.get_close_matches(str(loc[-1]), known, n=1)
            fix = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            return f"{self.where(loc)}: unknown key; {fix}"
        if item["type"] == "missing":
            block = f"{self.where(loc[:-1])}" if loc[:-1] else f"{self.path}"
            return f"{block}: the key '{loc[-1]}' is missing"
        if item["type"].startswith("union_tag"):
            return f"{self.where(loc)}: give it a 'kind': {', '.join(kinds)}"
        return (
            f"{self.where(loc)}: {item['msg'].removeprefix('Value error, ')}, not"
            f" {short(item['input'])}"
        )


def _inside(target: dict[str, Any] | list[Any], step: str | int, where: str) -> Any:
    """What stands at `step` of a mapping, or of a list."""
    if isinstance(target, dict):
        return target[str(step)]
    if not str(step).isdecimal() or int(step) >= len(target):
        raise FmsimError(f"{where}: '{shown(step)}' is no place in a list of {len(target)}")
    return target[int(step)]


def _policy_indices(raw: dict[str, Any], label: str, override: str) -> list[int]:
    """Positions in `policies` of the entry with this label, or of all for "*"; a bare name becomes
    a mapping, to hold the new key.
    """
    policies = raw.get("policies")
    entries = policies if isinstance(policies, list) else []
    found = []
    for index, entry in enumerate(entries):
        entry = {"policy": entry} if isinstance(entry, str) else entry
        if isinstance(entry, dict) and label in (
            "*",
            str(index),
            entry.get("label", entry.get("policy")),
        ):
            entries[index] = entry
            found.append(index)
    if not found:
        raise FmsimError(f"--set {shown(override)}: the scenario has no policy '{shown(label)}'")
    return found if label == "*" else found[:1]


def _fields(loc: Loc) -> list[str]:
    """The keys that the block at `loc` (as pydantic names it) may have."""
    model: type[BaseModel] = Scenario
    for part in loc:
        if part in serving.WORKLOADS:
            model = serving.WORKLOADS[str(part)]
        elif isinstance(part, str) and part in model.model_fields and part != "workload":
            block = model.model_fields[part].annotation
            assert isinstance(block, type) and issubclass(block, BaseModel)
            model = block
    return list(model.model_fields)


def _yaml_names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.yaml")] if folder.is_dir() else []
