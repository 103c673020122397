"""A scenario's YAML file, checked key by key, and what `--set` and `-p` change in it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fmsim.errors import FmsimError, short, shown
from fmsim.files import strict_yaml
from fmsim.files.inputs import read_text
from fmsim.files.strict_yaml import MOST_DEPTH, Loc
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.scenario import shipped
from fmsim.scenario.key_value import key_value
from fmsim.scenario.spec import PolicySpec, Scenario
from fmsim.sim.serving import spec as serving

PATHS: tuple[Loc, ...] = (  # keys whose values may be files
    ("trace",),
    ("model",),
    ("hardware",),
    ("workload", "file"),
    ("deployment", "start_log"),
)
IN_YAML = {"tuple_type": "give a list, such as [a, b]", "too_short": "give one or more"}
NamedPolicy = str | type[Policy] | Policy | Mapping[str, Any]
Source = str | Path | Mapping[str, Any] | Scenario


class ScenarioFile:
    """A scenario and where its keys stand, so that a later mistake can name the line."""

    def __init__(
        self,
        source: Source,
        overrides: Iterable[str] = (),
        policies: Iterable[NamedPolicy] = (),
    ) -> None:
        """Read and check a file, one that fmsim carries by its name (`fmsim scenario list`), a
        mapping with its keys, or a scenario made in Python.

        `overrides` are such as "batch=8" or "policies.lsa.budget=20%". `policies` choose which
        entries are `selected`, by label or by name, each at every one of the scenario's budgets;
        what the scenario lacks is added to it: a
        policy's name, `path/file.py:Class`, either with `:key=value` behind, a class, an object, or
        a mapping as in the file. Raises FmsimError that names file, line, key and fix.
        """
        self._overridden: dict[Loc, str] = {}
        self._document: strict_yaml.YamlDocument | None
        self._added: dict[int, str] = {}  # entries of `policies` that `policies` added
        raw = self._read(source)
        overrides = list(overrides)
        self.overrides = tuple(overrides)
        naming = [text for text in overrides if _names_a_policy(text.partition("=")[0])]
        for override in naming:
            self._override(raw, override)
        chosen = self._choose(raw, policies)
        for override in overrides:
            if override not in naming:
                self._override(raw, override)
        try:
            self.scenario = _checked(raw)
        except ValidationError as error:
            raise FmsimError(self._explain(error)) from None
        every = self.scenario.policies
        entries = [every[i] for i in chosen] or every
        budgets = self.scenario.budgets
        # all at the first budget, then all at the next
        runs = [spec.at(budgets) for spec in entries]
        self.selected: tuple[PolicySpec, ...] = tuple(
            found[number]
            for number in range(max(map(len, runs)))
            for found in runs
            if number < len(found)
        )

    def _read(self, source: Source) -> dict[str, Any]:
        """The scenario's keys; also sets where they stand."""
        if not isinstance(source, (str, Path)):
            self.path = Path("scenario")
            self._document = None
            return _raw(source)
        self.path = shipped.scenario(source)
        self._document = strict_yaml.YamlDocument(self._text(), str(self.path))
        raw = self._document.value
        if not isinstance(raw, dict):
            raise FmsimError(
                f"{shown(self.path)}: a scenario is a mapping of keys; it needs 'name', 'trace' and"
                " 'policies'"
            )
        for index, entry in enumerate(_entries(raw)):
            named = entry.get("policy") if isinstance(entry, dict) else entry
            if isinstance(named, str) and ".py" in named:
                raise FmsimError(
                    f"{self.where(('policies', index))}: a scenario names installed policies, so"
                    f" that reading it runs no code; name the file with --policy {named}"
                )
        return raw

    def _choose(self, raw: dict[str, Any], policies: Iterable[NamedPolicy]) -> list[int]:
        """Which entries of `policies` are meant; those that the scenario lacks are added."""
        chosen: list[int] = []
        for given in policies:
            entries = _entries(raw)
            found = [index for index, entry in enumerate(entries) if _is_called(entry, given)]
            if not found:
                raw["policies"] = [*entries, _entry(given)]
                found = [len(entries)]
                self._added[len(entries)] = given if isinstance(given, str) else "policies"
            chosen += [index for index in found if index not in chosen]
        return chosen

    def trace_file(self) -> Path:
        """The trace: one that fmsim carries, by its name, or else a path as `file` reads it."""
        name = self.scenario.trace
        path = shipped.trace(name) or self.file(name)
        near = difflib.get_close_matches(name.stem, shipped.traces(), n=1)
        if near and not path.exists():
            raise FmsimError(
                f"{self.where(('trace',))}: {shown(path)} is not there; did you mean {near[0]},"
                " which fmsim carries?"
            )
        return path

    def file(self, name: str | Path) -> Path:
        """A path that the scenario names: relative to the scenario, or to the working directory
        where --set gave it, by itself or in its block.
        """
        given = filter(None, map(self._set_to, PATHS))
        if any(Path(name) == Path(text) for text in given):
            return Path(name)
        return Path(os.path.normpath(self.path.parent / name))

    def _set_to(self, loc: Loc) -> str:
        """What --set gave for a key; "" where it gave nothing."""
        for end in range(len(loc), 0, -1):
            if loc[:end] in self._overridden:
                text = self._overridden[loc[:end]].partition("=")[2]
                value = strict_yaml.load(text, "--set")
                for step in loc[end:]:
                    value = value.get(step) if isinstance(value, dict) else None
                return value if isinstance(value, str) else ""
        return ""

    def is_overridden(self, loc: Loc) -> bool:
        """Whether --set gave just this key."""
        return loc in self._overridden

    def where(self, loc: Loc) -> str:
        """For a message: 'file, line N: key', or the --set that gave the key."""
        key = shown(".".join(map(str, loc)))
        if len(loc) > 1 and loc[0] == "policies" and loc[1] in self._added:
            given = f"--policy {shown(self._added[int(loc[1])])}"
            return ".".join([given, *map(str, loc[2:])])
        for prefix in (loc[:n] for n in range(len(loc), 0, -1)):
            if prefix in self._overridden:
                return f"--set {shown(self._overridden[prefix])}: {key}"
        line = f", line {self._document.line(loc)}" if self._document is not None else ""
        return f"{shown(self.path)}{line}: {key}"

    def _text(self) -> str:
        try:
            return read_text(self.path)
        except FileNotFoundError:
            raise FmsimError(
                f"{shown(self.path)}: no such scenario file{_meant(self.path)}"
            ) from None

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
            for index in _policy_indices(raw, str(loc[1]), override, self._added):
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
            said = f"{block}: the key '{loc[-1]}' is missing"
            without = "; without a trace there is `fmsim run --model NAME --hardware NAME`"
            return said + (without if loc == ("trace",) else "")
        if item["type"].startswith("union_tag"):
            given = item["input"].get("kind") if isinstance(item["input"], dict) else None
            near = difflib.get_close_matches(str(given), kinds, n=1)
            hint = f"did you mean '{near[0]}'? there are" if near else "give it a 'kind':"
            if given is not None:
                loc = (*loc, "kind")
            return f"{self.where(loc)}: {hint} {', '.join(kinds)}"
        said = IN_YAML.get(item["type"], item["msg"].removeprefix("Value error, "))
        return f"{self.where(loc)}: {said}, not {short(item['input'])}"


def _inside(target: dict[str, Any] | list[Any], step: str | int, where: str) -> Any:
    """What stands at `step` of a mapping, or of a list."""
    if isinstance(target, dict):
        return target[str(step)]
    if not str(step).isdecimal() or int(step) >= len(target):
        raise FmsimError(f"{where}: '{shown(step)}' is no place in a list of {len(target)}")
    return target[int(step)]


def _checked(raw: dict[str, Any]) -> Scenario:
    """The scenario of `raw`, strictly read as JSON; Python's policies take no part in that."""
    objects: dict[str, Any] = {}

    def plain(entry: Any) -> Any:
        given = dict(entry) if isinstance(entry, Mapping) else {"policy": entry}
        named = given.get("policy")
        if not isinstance(named, (type, Policy)):
            return entry
        place = f"object {len(objects)}"
        objects[place] = named
        return {"label": registry.label_of(named)} | given | {"policy": place}

    entries = raw.get("policies")
    if isinstance(entries, list):
        raw = raw | {"policies": [plain(entry) for entry in entries]}
    text = json.dumps(raw, default=str)
    scenario = Scenario.model_validate_json(text, strict=True)
    policies = tuple(
        spec.model_copy(update={"policy": objects.get(spec.policy, spec.policy)})
        for spec in scenario.policies
    )
    return scenario.model_copy(update={"policies": policies})


def _raw(source: Mapping[str, Any] | Scenario) -> dict[str, Any]:
    """The keys of a scenario that was made in Python, as a file would hold them."""
    if not isinstance(source, Scenario):
        entries = source.get("policies", ())
        if isinstance(entries, (str, Mapping)) or not isinstance(entries, Iterable):
            return dict(source)  # what is wrong is told as of a file
        copies = [dict(entry) if isinstance(entry, Mapping) else entry for entry in entries]
        return dict(source) | {"policies": copies}
    policies = [{"policy": s.policy, "label": s.label} | s.params for s in source.policies]
    return source.model_dump(exclude_unset=True) | {"policies": policies}


def _entries(raw: dict[str, Any]) -> list[Any]:
    policies = raw.get("policies")
    return policies if isinstance(policies, list) else []


def _entry(given: NamedPolicy) -> Any:
    """An entry of `policies` for what the scenario lacks; its label tells its parameters."""
    if not isinstance(given, str):
        return dict(given) if isinstance(given, Mapping) else given
    name, params = registry.split(given)
    label = registry.get(name).name
    if params:
        label += given.removeprefix(name)
    return {"policy": name, "label": label} | params


def _is_called(entry: Any, given: NamedPolicy) -> bool:
    """Whether `given` is the label or the policy of an entry."""
    entry = entry if isinstance(entry, Mapping) else {"policy": entry}
    return isinstance(given, str) and given in (entry.get("label"), entry.get("policy"))


def _names_a_policy(key: str) -> bool:
    """Whether an override decides what an entry is called."""
    parts = key.strip().split(".")
    return parts[0] == "policies" and (len(parts) == 1 or parts[-1] in ("policy", "label"))


def _policy_indices(
    raw: dict[str, Any], label: str, override: str, added: Container[int]
) -> list[int]:
    """Positions in `policies` of the entry with this label, or of all for "*"; a bare name becomes
    a mapping, to hold the new key. One that was added is found by its policy's name too.
    """
    entries = _entries(raw)
    found = []
    for index, entry in enumerate(entries):
        entry = {"policy": entry} if not isinstance(entry, dict) else entry
        named = entry.get("policy")
        names = ["*", str(index), entry.get("label", named)]
        if isinstance(named, (type, Policy)) or (isinstance(named, str) and index in added):
            names.append(registry.label_of(named))
        if label in names:
            entries[index] = entry
            found.append(index)
    if not found:
        labels = [
            str(entry.get("label", entry.get("policy"))) if isinstance(entry, dict) else str(entry)
            for entry in entries
        ]
        near = difflib.get_close_matches(label.lower(), labels, n=1)
        fix = f"did you mean '{shown(near[0])}'?" if near else f"it has {shown(', '.join(labels))}"
        raise FmsimError(
            f"--set {shown(override)}: the scenario has no policy '{shown(label)}'; {fix}"
        )
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


def _meant(path: Path) -> str:
    """Which scenario was meant by a file that is not there: one beside it, or one of fmsim's."""
    near = difflib.get_close_matches(path.name, _yaml_names(path.parent), n=1)
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    asked = path.with_suffix("").as_posix().removeprefix("scenarios/")
    near = difflib.get_close_matches(asked, shipped.scenarios(), n=1)
    if near:
        return f"; did you mean {near[0]}, which fmsim carries?"
    return "; `fmsim scenario list` says which there are, `fmsim init` writes one"


def _yaml_names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.yaml")] if folder.is_dir() else []
