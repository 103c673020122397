"""Search one policy's parameters for the most tokens/s, or, of a scenario with a workload, the most
requests a second that keep its service level, with the attention mass kept above a floor (Optuna,
TPE).
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fmsim.errors import DoesNotFit, FmsimError
from fmsim.experiments.results.rows import Row, RowFile
from fmsim.experiments.run import Setting, build_policies
from fmsim.experiments.serve import serve_policy
from fmsim.experiments.sweep import digest_of
from fmsim.experiments.workers.failures import TIMEOUT_S, Failure, guarded, lost
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.policies.budget import Budget
from fmsim.replay.replayer import Replayer
from fmsim.scenario import ScenarioFile

NUMBER = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)(?P<unit>\s*[a-zA-Z%].*)?")
BUDGET_RANGE = "1%..50%"  # where none is given
WIDE = 10  # a range whose ends differ by this factor is searched on a logarithmic scale


@dataclass(frozen=True)
class Range:
    """What one parameter may be: `choices`, or numbers from `low` to `high` (whole ones if
    `integer`) with a `unit` behind.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    integer: bool = False
    unit: str = ""

    @classmethod
    def parse(cls, text: str, fields: dict[str, Any], policy: str) -> Range:
        """KEY=LOW..HIGH, KEY=VALUE,VALUE,..., or KEY alone for what its schema allows.

        Raises FmsimError with the fix.
        """
        name, equals, values = text.partition("=")
        if name not in fields:
            raise FmsimError(
                f"--range {text}: policy {policy} has no parameter '{name}'; it has"
                f" {', '.join(fields)}"
            )
        if not equals:
            found = cls.of_schema(name, fields[name])
            if found is None:
                raise FmsimError(
                    f"--range {text}: its schema has no bounds; write {name}=LOW..HIGH or"
                    f" {name}=VALUE,VALUE,..."
                )
            return found
        if ".." not in values:
            return cls(name, tuple(value.strip() for value in values.split(",")))
        ends = [NUMBER.fullmatch(end.strip()) for end in values.split("..")]
        if (
            len(ends) != 2
            or None in ends
            or (ends[0]["unit"] or ends[1]["unit"]) != ends[1]["unit"]
        ):
            raise FmsimError(
                f"--range {text}: write {name}=LOW..HIGH with one unit, such as budget=2%..30% or"
                " threshold=0.1..0.9"
            )
        low, high = (float(end["number"]) for end in ends)
        if not low < high:
            raise FmsimError(f"--range {text}: {low:g} is not below {high:g}")
        return cls(
            name,
            low=low,
            high=high,
            integer=int in _types(fields[name]),
            unit=ends[1]["unit"] or "",
        )

    @classmethod
    def of_schema(cls, name: str, field: Any) -> Range | None:
        """From a pydantic field: the choices of a Literal or a bool, the bounds of a number, 1% to
        50% for a budget; or None.
        """
        types = _types(field)
        choices = tuple(
            choice
            for one in types
            if typing.get_origin(one) is Literal
            for choice in typing.get_args(one)
        )
        if types == [bool]:
            choices = (False, True)
        if types == [Budget]:
            return cls.parse(f"{name}={BUDGET_RANGE}", {name: field}, "")
        if len(choices) > 1:
            return cls(name, choices)
        bounds = {
            key: getattr(item, key)
            for item in field.metadata
            for key in ("ge", "gt", "le", "lt")
            if hasattr(item, key)
        }
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        if low is None or high is None or not {int, float} & set(types):
            return None
        margin = 0 if int in types else (high - low) / 100  # open ends are left out
        return cls(
            name,
            low=low + margin * ("gt" in bounds),
            high=high - margin * ("lt" in bounds),
            integer=int in types,
        )

    def suggest(self, trial: Any) -> Any:
        """A value, as `registry.build` takes it."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        log = self.low > 0 and self.high / self.low >= WIDE
        if self.integer:
            number = trial.suggest_int(self.name, int(self.low), int(self.high), log=log)
        else:
            number = float(f"{trial.suggest_float(self.name, self.low, self.high, log=log):.3g}")
        return f"{number:g}{self.unit}" if self.unit else number


def _types(field: Any) -> list[Any]:
    """The field's type, or the members of its union less None."""
    union = (
        typing.get_args(field.annotation)
        if typing.get_origin(field.annotation) is not Literal
        else ()
    )
    return [one for one in union if one is not type(None)] or [field.annotation]


def ranges_of(policy: str | type[Policy], given: Sequence[str] = ()) -> list[Range]:
    """The `given` ranges, or all that the policy's schema bounds."""
    found_class = registry.get(policy)
    fields = found_class.Params.model_fields
    if given:
        return [Range.parse(text, fields, found_class.name) for text in given]
    found = [
        range_
        for name, field in fields.items()
        if (range_ := Range.of_schema(name, field)) is not None
    ]
    falls_back = any(range_.name == "on_miss" and "fallback" in range_.choices for range_ in found)
    return [range_ for range_ in found if falls_back or not range_.name.startswith("fallback_")]


def speed_of(figures: dict[str, Any]) -> str:
    """The name of the figure that is searched for."""
    return "goodput_per_s" if "goodput_per_s" in figures else "decode_tokens_per_s"


@dataclass(frozen=True)
class Trial:
    """One setting that ran.

    `figures` are the fields of a report's row, `exact` whether it lost nothing.
    """

    values: dict[str, Any]
    figures: dict[str, Any]
    exact: bool

    @property
    def objectives(self) -> tuple[float, float]:
        return self.figures[speed_of(self.figures)], self.figures["mass_kept"]

    @property
    def gpu_bytes(self) -> int:
        """Of one request."""
        if "memory" in self.figures:
            return int(self.figures["memory"]["request_bytes"]["gpu"])
        return int(self.figures["gpu_bytes"])


@dataclass(frozen=True)
class Tuning:
    """All trials, in order; `failed` are settings that could not run, with why."""

    policy: str
    floor: float
    trials: list[Trial]
    failed: list[tuple[dict[str, Any], str]]

    @property
    def best(self) -> Trial | None:
        """Of the front the fastest with the mass kept at or above the floor."""
        return next(
            (trial for trial in self.front if trial.figures["mass_kept"] >= self.floor), None
        )

    @property
    def front(self) -> list[Trial]:
        """The Pareto front of tokens/s and mass kept, fastest first: no trial is better in one and
        as good in the other.
        """
        front: list[Trial] = []
        for trial in sorted(
            self.trials,
            key=lambda trial: (*trial.objectives, -trial.gpu_bytes),
            reverse=True,
        ):
            if not front or trial.figures["mass_kept"] > front[-1].figures["mass_kept"]:
                front.append(trial)
        return front


def tune(
    file: ScenarioFile,
    ranges: Sequence[Range],
    n_trials: int,
    floor: float,
    seed: int = 0,
    progress: Callable[[int, Tuning], None] = lambda done, tuning: None,
    study_file: RowFile | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Tuning:
    """Search `n_trials` settings of the scenario's one selected policy.

    The same seed gives the same trials. Those that `study_file` holds are not run again, unless
    they failed, so that an interrupted search goes on as if nothing had been. (Optuna's own storage
    keeps the trials but not the sampler's state, and a resumed search would try other settings.)
    Raises FmsimError where no setting can run, or Optuna is missing.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise FmsimError("fmsim tune needs optuna; pip install 'fmsim[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    setting = Setting(file)
    if len(file.selected) > 1:
        labels = ", ".join(spec.label for spec in file.selected)
        raise FmsimError(f"--policy: tune looks at one policy; give one entry's label: {labels}")
    [(label, base)] = build_policies(file)
    replayer = setting.replayer()
    own = base.params.model_dump(mode="json", exclude_unset=True)
    study = optuna.create_study(
        directions=["maximize", "maximize"], sampler=optuna.samplers.TPESampler(seed=seed)
    )
    tuning = Tuning(label, floor, [], [])
    seen: dict[str, Trial | None] = {}
    known = _Known(study_file)
    for done in range(1, n_trials + 1):
        trial = study.ask()
        values = {range_.name: range_.suggest(trial) for range_ in ranges}
        key = json.dumps(values, sort_keys=True)
        if key not in seen:
            # a wrong value of a range is the user's to mend
            policy = registry.build({"policy": type(base)} | own | values)
            seen[key] = _kept(tuning, setting, replayer, label, policy, values, known, timeout_s)
        found = seen[key]
        objectives = found.objectives if found else (0.0, 0.0)
        trial.set_constraint("mass kept", floor - objectives[1])
        study.tell(trial, objectives)
        progress(done, tuning)
    if not tuning.trials:
        raise DoesNotFit(
            f"policy {label}: none of {n_trials} settings could run; the last:"
            f" {tuning.failed[-1][1]}"
        )
    return tuning


class _Known:
    """Trials that a study's file holds, by what their results depend on; what failed is tried
    again.
    """

    def __init__(self, file: RowFile | None) -> None:
        self.file = file
        rows = file.rows if file else []
        self.rows = {row["key"]: row for row in rows if not row.get("failed")}

    def add(self, row: Row) -> None:
        self.rows[row["key"]] = row
        if self.file:
            self.file.put(row)


def _kept(
    tuning: Tuning,
    setting: Setting,
    replayer: Replayer,
    label: str,
    policy: Policy,
    values: dict[str, Any],
    known: _Known,
    timeout_s: float,
) -> Trial | None:
    """One setting's trial: from the study's file, or run now and put there."""
    key = digest_of(setting, label, policy)
    if key not in known.rows:
        [result] = in_parallel(
            lambda _: guarded(label, lambda: _figures(setting, replayer, label, policy)),
            1,
            lambda _, why: lost(label, why),
            timeout_s,
        )
        row: Row = {"key": key, "policy": label, "scenario": setting.file.scenario.name}
        row["values"] = values
        if isinstance(result, Failure):
            row |= {"error": result.error} | ({"failed": True} if result.fits else {})
        else:
            figures, exact = result
            row |= {"exact": exact, "figures": figures}
        known.add(row)
    found = known.rows[key]
    figures = found.get("figures")
    if not isinstance(figures, dict):
        tuning.failed.append((values, str(found.get("error"))))
        return None
    tuning.trials.append(Trial(values, figures, bool(found.get("exact"))))
    return tuning.trials[-1]


def _figures(
    setting: Setting, replayer: Replayer, label: str, policy: Policy
) -> tuple[dict[str, Any], bool | None]:
    """A report's row, of a decode or of the scenario's workload, and whether it lost nothing."""
    if setting.file.scenario.workload is None:
        run = setting.run(replayer, label, policy)
        return run.row, run.details["exact"]
    served = serve_policy(setting, replayer, label, policy).row
    del served["over_time"]
    return served, served["exact"]
