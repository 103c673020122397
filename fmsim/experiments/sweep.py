"""A scenario run over a grid of settings: which runs there are, what makes each one itself, and its
row of results.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fmsim import __version__
from fmsim.errors import DoesNotFit, FmsimError, short, shown
from fmsim.experiments.results.rows import Row, RowFile, flat, plain
from fmsim.experiments.run import Setting, build, build_policies
from fmsim.experiments.serve import serve_policy
from fmsim.experiments.workers.failures import TIMEOUT_S
from fmsim.experiments.workers.parallel import as_they_end, on_ray, one_by_one
from fmsim.experiments.workers.progress import Progress, Tally, silent
from fmsim.files import strict_yaml
from fmsim.indexer.checkpoint import SHIPPED
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.policies.sources import source_digest
from fmsim.replay.replayer import Replayer
from fmsim.scenario import NamedPolicy, ScenarioFile, Source
from fmsim.scenario.key_value import key_value
from fmsim.sim.serving.spec import RequestFile

MAX_RUNS = 10_000


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
        where = f"--grid {shown(text)}"
        key, values = key_value(text, f"{where}: {example}")
        if not values:
            raise FmsimError(f"{where}: {example}")
        try:
            texts = strict_yaml.list_texts(values)
        except FmsimError:
            raise FmsimError(f"{where}: the values are not a YAML list; {example}") from None
        if any("=" in value for value in texts):
            raise FmsimError(f"{where}: one key a --grid; repeat --grid for the next key")
        numbers = [_number(value) for value in texts]
        axis = cls(key, tuple(zip(texts, texts if None in numbers else numbers)))
        if len(set(texts)) < len(texts):
            raise FmsimError(f"{where}: a value stands there twice")
        return axis

    @classmethod
    def of(cls, key: str, values: Iterable[Any]) -> Axis:
        """An axis of values made in Python. Raises FmsimError where there are none."""
        if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
            raise FmsimError(f"grid: {shown(key)} needs a list of values, not {short(values)}")
        axis = cls(key, tuple((text_of(key, value), plain(value)) for value in values))
        if not axis.values:
            raise FmsimError(f"grid: {shown(key)} has no values; give one or more")
        return axis


def text_of(key: str, value: Any) -> str:
    """A key's value as `--set` writes it. Raises FmsimError for what no scenario can hold."""
    try:
        return str(value) if isinstance(value, (str, Path)) else json.dumps(value, default=plain)
    except (TypeError, ValueError):
        raise FmsimError(
            f"{shown(key)}: give a number, a text, a list or a mapping, not {short(value)}"
        ) from None


def _number(text: str) -> int | float | None:
    """The number that `text` says as YAML, or None."""
    value = strict_yaml.load(text, "--grid")
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class SweepRun:
    """One policy under one setting.

    All that a worker on another machine needs, where it sees the same files.
    """

    name: str  # the scenario's
    scenario: Source
    overrides: tuple[str, ...]
    policies: tuple[NamedPolicy, ...]  # what was chosen, as `ScenarioFile` takes it
    # the grid's keys that concern this policy, and their values
    settings: tuple[tuple[str, Any], ...]
    label: str
    key: str  # a digest of all that the result depends on

    def head(self) -> Row:
        """What tells the row from others."""
        settings = {f"set.{name}": value for name, value in self.settings}
        return {"scenario": self.name, "key": self.key, "policy": self.label} | settings

    def row(self) -> Row:
        """Run it. A run that cannot be gives a row with an `error`; where that is not only that its
        KV does not fit, it has `failed`.
        """
        head = self.head()
        try:
            file = ScenarioFile(self.scenario, self.overrides, self.policies)
            setting, policy = Setting(file), _policy(file, self.label)
            if file.scenario.workload is not None:
                served = serve_policy(setting, _replayer(setting), self.label, policy).row
                request_bytes = served["memory"]["request_bytes"]["gpu"]
                figures = flat(served, leave=("policy", "over_time", "memory"))
                return head | {"gpu_bytes": request_bytes} | figures
            run = setting.run(_replayer(setting), self.label, policy)
        except DoesNotFit as error:
            return head | {"error": str(error)}
        except FmsimError as error:
            return head | {"error": str(error), "failed": True}
        return head | flat(run.row | run.details, leave=("policy", "params"))


@dataclass(frozen=True)
class SweepGrid:
    """A scenario's runs under every combination of the axes' values.

    They are planned one by one, as they are asked for: a grid of ten thousand takes no longer to
    begin than one of ten.
    """

    scenario: Source
    overrides: tuple[str, ...]
    axes: tuple[Axis, ...]
    policies: tuple[NamedPolicy, ...]
    by_label: tuple[tuple[str, tuple[Axis, ...]], ...]  # each policy, and the axes it depends on

    @property
    def n_runs(self) -> int:
        """At most so many; settings that come to the same are one run."""
        return sum(math.prod(len(axis.values) for axis in axes) for _, axes in self.by_label)

    def runs(self) -> Iterator[SweepRun]:
        """In the order of the axes, the last one fastest, each once."""
        seen: set[str] = set()
        for label, axes in self.by_label:
            for point in itertools.product(*(axis.values for axis in axes)):
                run = self._run(label, {axis.key: value for axis, value in zip(axes, point)})
                if run.key not in seen:
                    seen.add(run.key)
                    yield run

    def _run(self, label: str, at_point: dict[str, tuple[str, Any]]) -> SweepRun:
        own = (*self.overrides, *_texts(at_point))
        file = ScenarioFile(self.scenario, own, self.policies)
        settings = tuple((key, shown_value) for key, (_, shown_value) in at_point.items())
        name = file.scenario.name
        scenario = self.scenario
        if isinstance(scenario, (str, Path)):
            scenario = str(file.path.absolute())
        key = digest_of(Setting(file), label, _policy(file, label))
        return SweepRun(name, scenario, own, self.policies, settings, label, key)


def sweep(
    scenario: Source,
    overrides: Sequence[str],
    axes: Sequence[Axis],
    policies: Sequence[NamedPolicy],
    out: str | Path | None = None,
    jobs: int | None = 1,
    ray: bool = False,
    max_runs: int = MAX_RUNS,
    timeout_s: float = TIMEOUT_S,
    progress: Progress = silent,
) -> list[Row]:
    """Run what has no row in `out` yet, or one that failed; -> the rows of the whole grid, in its
    order.

    In `jobs` processes, None for one a core, or with `ray` on a cluster. One process is this one
    where another could not be told of the runs. `progress` is told (label, done now, total).
    """
    grid = plan(scenario, overrides, axes, policies, max_runs)
    progress("", 0, grid.n_runs)
    if out is None:
        rows: list[Row] = []
        return _swept(grid, rows, rows.append, jobs, ray, timeout_s, progress)
    with RowFile(out) as file:
        return _swept(grid, file.rows, file.put, jobs, ray, timeout_s, progress)


def _swept(
    grid: SweepGrid,
    rows: list[Row],
    add: Callable[[Row], None],
    jobs: int | None,
    ray: bool,
    timeout_s: float,
    progress: Progress,
) -> list[Row]:
    """`add` puts a row among `rows`, in the place of one that failed."""
    place: dict[str, int] = {}  # keys of the runs, in their order

    def noted() -> Iterator[SweepRun]:
        for run in grid.runs():
            place[run.key] = len(place)
            yield run

    begun: list[str] = []  # labels of the runs

    def todo() -> Iterator[SweepRun]:
        for run in left(noted(), rows):
            begun.append(run.label)
            yield run

    tally = Tally(begun, grid.n_runs, progress)
    results: Iterable[Row]
    if ray:
        results = _told(on_ray(SweepRun.row, list(todo())), tally)
    elif jobs == 1 and not _can_be_sent(grid):
        results = one_by_one(SweepRun.row, todo(), tally)
    else:
        start = "fork" if jobs == 1 else None
        results = as_they_end(SweepRun.row, todo(), jobs, start, lost, timeout_s, tally)
    for row in results:
        add(row)
    return sorted((row for row in rows if row["key"] in place), key=lambda row: place[row["key"]])


def _told(rows: Iterable[Row], tally: Tally) -> Iterator[Row]:
    """`rows`, each told of as it comes: a cluster does not say how far a run is."""
    for index, row in enumerate(rows):
        tally(index, 1.0)
        yield row


def _can_be_sent(grid: SweepGrid) -> bool:
    """Whether another process can be told of the runs: of a class that was typed in by hand it
    cannot, and only Linux parts processes without a new start of the program.
    """
    if sys.platform != "linux":
        return False
    try:
        pickle.dumps((grid.scenario, grid.policies))
    except Exception:  # whatever an object's own pickling raises
        return False
    return True


def plan(
    scenario: Source,
    overrides: Sequence[str],
    axes: Sequence[Axis],
    policies: Sequence[NamedPolicy] = (),
    max_runs: int = MAX_RUNS,
) -> SweepGrid:
    """The grid of runs. A key `policies.<label>...` concerns that policy alone, so the others run
    once, not once a value.

    Raises FmsimError for a mistake in any value of an axis, or for more than `max_runs` runs,
    before anything has run.
    """
    keys = [axis.key for axis in axes]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise FmsimError(
            f"--grid {shown(twice[0])}: the key stands there twice; give all its values in one"
            " --grid"
        )
    n_points = math.prod(len(axis.values) for axis in axes)
    first = {axis.key: axis.values[0] for axis in axes}
    # a worker may stand in another folder
    chosen = tuple(registry.absolute(given) for given in policies)
    with _told_of_grid(_texts(first)):
        file = ScenarioFile(scenario, [*overrides, *_texts(first)], chosen)
    by_label = tuple(
        (spec.label, tuple(axis for axis in axes if _concerns(file, axis.key, spec.entry)))
        for spec in file.selected
    )
    grid = SweepGrid(scenario, tuple(overrides), tuple(axes), chosen, by_label)
    if grid.n_runs > max_runs:
        raise FmsimError(
            f"--grid: {n_points:,} combinations are {grid.n_runs:,} runs, more than the"
            f" {max_runs:,} that a sweep starts; give fewer values, or allow more with --max-runs"
        )
    for axis in axes:
        for value in axis.values:
            texts = _texts(first | {axis.key: value})
            with _told_of_grid(texts):
                changed = ScenarioFile(scenario, [*overrides, *texts], chosen)
                Setting(changed)
                build_policies(changed)
    return grid


@contextlib.contextmanager
def _told_of_grid(texts: Sequence[str]) -> Iterator[None]:
    """What is wrong with one of ``texts``, key=value, is told of the option that gave it."""
    try:
        yield
    except FmsimError as error:
        told = str(error)
        for text in texts:
            given = f"--set {shown(text)}"
            if told.startswith((f"{given}:", f"{given},")):
                raise FmsimError(f"--grid {told.removeprefix('--set ')}") from None
        raise


def _texts(point: dict[str, tuple[str, Any]]) -> list[str]:
    return [f"{key}={text}" for key, (text, _) in point.items()]


def _concerns(file: ScenarioFile, key: str, label: str) -> bool:
    """Whether the policy `label` depends on `key`."""
    parts = key.split(".")
    if parts[0] != "policies" or len(parts) < 2:
        return True
    labels = [spec.label for spec in file.scenario.policies]
    return parts[1] in ("*", label) or (label in labels and parts[1] == str(labels.index(label)))


def _policy(file: ScenarioFile, label: str) -> Policy:
    return build(file, next(spec for spec in file.selected if spec.label == label))


def digest_of(setting: Setting, label: str, policy: Policy) -> str:
    """What the result depends on: this policy, its code and its parameters, model, hardware, batch,
    layer map, and the trace's content. The policy need not stand in the scenario.
    """
    file = setting.file
    content = {
        "fmsim": __version__,
        "policy": [label, policy.name, _contents(policy)],
        "code": source_digest(type(policy)),
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


def _contents(policy: Policy) -> dict[str, Any]:
    """The policy's parameters, files among them by what they hold: a checkpoint that was trained
    anew is another one.
    """
    plain = policy.params.model_dump(mode="json")
    for name, value in policy.params:
        if name == "checkpoint" and value is None:
            value = getattr(policy, "default_checkpoint", SHIPPED)
        if isinstance(value, Path) and value.is_file():
            plain[name] = _file_digest(str(value))
    return plain


def _file_digest(path: str) -> str:
    found = os.stat(path)
    return _digest_of(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=64)
def _digest_of(path: str, *unchanged: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_kept: dict[
    tuple[str, str, str, tuple[int, ...]], Replayer
] = {}  # the last one, for the next run of this process on the same trace


def _replayer(setting: Setting) -> Replayer:
    path = str(setting.trace.path)
    key = (path, _file_digest(path), repr(setting.geometry), setting.layer_map)
    if key not in _kept:
        _kept.clear()
        _kept[key] = setting.replayer()
    return _kept[key]


def left(runs: Iterable[SweepRun], rows: Iterable[Row]) -> Iterator[SweepRun]:
    """The runs that have no row yet, or one that failed: a time limit and memory are no part of a
    run's key.
    """
    done = {row.get("key") for row in rows if not row.get("failed")}
    return (run for run in runs if run.key not in done)


def lost(run: SweepRun, why: str) -> Row:
    """The row of a run whose worker died, or took too long."""
    return run.head() | {"error": f"policy {run.label}: {why}", "failed": True}
