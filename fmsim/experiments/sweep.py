"""A scenario run over a grid of settings: which runs there are, what makes each one itself, and its
row of results.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from fmsim import __version__
from fmsim.errors import FmsimError
from fmsim.experiments.rows import Row
from fmsim.experiments.run import Setting, build_policies
from fmsim.experiments.serve import serve_policy
from fmsim.replay.replayer import Replayer
from fmsim.scenario import ScenarioFile
from fmsim.scenario.key_value import key_value
from fmsim.sim.serving.spec import RequestFile


@dataclass(frozen=True)
class Axis:
    """One key of the grid, as `--set` spells it, and its values: (text, what the row shows)
    each.
    """

    key: str
    values: tuple[tuple[str, Any], ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """KEY=VALUE,VALUE,...: the values are a YAML list without its brackets.

        Raises FmsimError with an example.
        """
        example = (
            "write KEY=VALUE,VALUE,..., such as --grid hardware=h100,h200 or --grid"
            " policies.lsa.budget=5%,10%"
        )
        key, values = key_value(text, f"--grid {text}: {example}")
        if not values:
            raise FmsimError(f"--grid {text}: {example}")
        try:
            nodes = yaml.compose(f"[{values}]", yaml.SafeLoader).value
        except yaml.YAMLError:
            raise FmsimError(f"--grid {text}: the values are not a YAML list; {example}") from None
        texts = [
            values[node.start_mark.index - 1 : node.end_mark.index - 1].strip() for node in nodes
        ]
        if any("=" in value for value in texts):
            raise FmsimError(f"--grid {text}: one key a --grid; repeat --grid for the next key")
        numbers = [_number(value) for value in texts]
        axis = cls(key, tuple(zip(texts, texts if None in numbers else numbers)))
        if len(set(texts)) < len(texts):
            raise FmsimError(f"--grid {text}: a value stands there twice")
        return axis


def _number(text: str) -> int | float | None:
    """The number that `text` says (27.5e9 too, which YAML takes for a word), or None."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


@dataclass(frozen=True)
class SweepRun:
    """One policy under one setting.

    All that a worker on another machine needs, where it sees the same files.
    """

    scenario: str
    overrides: tuple[str, ...]
    # the grid's keys that concern this policy, and their values
    settings: tuple[tuple[str, Any], ...]
    label: str
    key: str  # a digest of all that the result depends on

    def row(self) -> Row:
        """Run it. A run that cannot be (its KV does not fit, say) gives a row with an `error`."""
        head = {"key": self.key, "policy": self.label} | {
            f"set.{name}": value for name, value in self.settings
        }
        file = ScenarioFile(self.scenario, self.overrides)
        head = {"scenario": file.scenario.name} | head
        try:
            setting, policy = Setting(file), dict(build_policies(file, [self.label]))[self.label]
            if file.scenario.workload is not None:
                return head | _flat(
                    serve_policy(setting, _replayer(setting), self.label, policy)[0],
                    leave=("policy", "over_time", "memory"),
                )
            run = setting.run(_replayer(setting), self.label, policy)
        except FmsimError as error:
            return head | {"error": str(error)}
        return head | _flat(run.row | run.details, leave=("policy", "params"))


def plan(
    scenario: str, overrides: Sequence[str], axes: Sequence[Axis], selected: Sequence[str] = ()
) -> list[SweepRun]:
    """All runs of the grid, in the order of the axes, the last one fastest, each once.

    A key `policies.<label>...` concerns that policy alone, so the others run once, not once a
    value. Raises FmsimError for a mistake in any setting, before anything has run.
    """
    keys = [axis.key for axis in axes]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise FmsimError(
            f"--grid {twice[0]}: the key stands there twice; give all its values in one --grid"
        )
    runs: dict[str, SweepRun] = {}
    for point in itertools.product(*(axis.values for axis in axes)):
        at_point = dict(zip(keys, point))
        file = ScenarioFile(scenario, [*overrides, *_texts(at_point)])
        for label in [label for label, _ in build_policies(file, selected)]:
            concerned = {
                key: value for key, value in at_point.items() if _concerns(file, key, label)
            }
            own = (*overrides, *_texts(concerned))
            settings = tuple((key, shown) for key, (_, shown) in concerned.items())
            run = SweepRun(
                str(file.path.absolute()),
                own,
                settings,
                label,
                _digest(ScenarioFile(scenario, own), label),
            )
            runs.setdefault(run.key, run)
    return list(runs.values())


def _texts(point: dict[str, tuple[str, Any]]) -> list[str]:
    return [f"{key}={text}" for key, (text, _) in point.items()]


def _concerns(file: ScenarioFile, key: str, label: str) -> bool:
    """Whether the policy `label` depends on `key`."""
    parts = key.split(".")
    if parts[0] != "policies" or len(parts) < 2:
        return True
    labels = [spec.label for spec in file.scenario.policies]
    return parts[1] in ("*", label) or (label in labels and parts[1] == str(labels.index(label)))


def _digest(file: ScenarioFile, label: str) -> str:
    """What the result depends on: this policy and its parameters, model, hardware, batch, layer
    map, and the trace's content.
    """
    setting = Setting(file)
    policy = dict(build_policies(file, [label]))[label]
    content = {
        "fmsim": __version__,
        "policy": [label, policy.name, policy.params.model_dump(mode="json")],
        "model": repr(setting.geometry),
        "hardware": setting.hw.model_dump(mode="json"),
        "batch": setting.batch,
        "layer_map": setting.layer_map,
        "trace": _file_digest(str(setting.trace.path)),
    }
    workload = file.scenario.workload
    if workload is not None:
        content["workload"], content["server"] = (
            workload.model_dump(mode="json"),
            file.scenario.server.model_dump(mode="json"),
        )
        if isinstance(workload, RequestFile):
            content["requests"] = _file_digest(str(file.file(workload.file)))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=8)
def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_kept: dict[
    tuple[str, float, int], Replayer
] = {}  # the last one, for the next run of this process on the same trace


def _replayer(setting: Setting) -> Replayer:
    key = (str(setting.trace.path), setting.geometry.kv_entry_bytes, setting.geometry.n_csa)
    if key not in _kept:
        _kept.clear()
        _kept[key] = setting.replayer()
    return _kept[key]


def _flat(row: Row, leave: Sequence[str]) -> Row:
    """A report's row without what it must leave, and with one column for each figure of a group:
    `step_s_p99`.
    """
    flat: Row = {}
    for name, value in row.items():
        if name not in leave:
            flat |= (
                {f"{name}_{part}": inner for part, inner in _flat(value, ()).items()}
                if isinstance(value, dict)
                else {name: value}
            )
    return flat


def left(runs: Iterable[SweepRun], rows: Iterable[Row]) -> list[SweepRun]:
    """The runs that have no row yet."""
    done = {row.get("key") for row in rows}
    return [run for run in runs if run.key not in done]
