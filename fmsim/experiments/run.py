"""From a scenario to its report: trace x policies -> ledgers -> timelines -> rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmsim import __version__
from fmsim.errors import BadParameter, FmsimError
from fmsim.experiments.driving import layers_that_drive, stands_for
from fmsim.experiments.measured_answers import about_answers, answers_kept
from fmsim.experiments.results.folder import (
    REPORT_NAME,
    SCHEMA_VERSION,
    by_budget,
    files_of,
    ledger_path,
    timeline_path,
)
from fmsim.experiments.results.rows import flat
from fmsim.experiments.workers.failures import TIMEOUT_S, Failure, guarded, lost, raise_if_all
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.experiments.workers.progress import Progress, StepsTold, Tally, log, silent
from fmsim.files import strict_json, write_text
from fmsim.frames import frame, html_table
from fmsim.geometry import Geometry, geometry_named
from fmsim.hw import Hardware, load_hardware, replace_figure
from fmsim.hw.modules import stand_in
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.scenario import PolicySpec, ScenarioFile
from fmsim.sim import metrics
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import ModelMemory, check_layer_map, spread
from fmsim.sim.timeline import SimulatedTimeline, Timeline
from fmsim.sim.windows import differences, n_windows, steady_steps
from fmsim.trace import read

REPLAYED = 0.9  # of a policy's work is its replay, about; the rest is its times

# Columns of a report in a notebook.
SHOWN = {
    "policy": "policy",
    "gpu_bytes": "bytes on the GPU",
    "gpu_ratio": "of the full cache's",
    "mass_kept": "attention mass kept",
    "answers_kept_value": "of full's answers",
    "hit_rate": "hit rate",
    "misses": "misses",
    "h2d_bytes_per_step": "bytes to the GPU, a step",
    "decode_tokens_per_s": "tokens/s",
    "step_s_p50": "step, median s",
    "stall_ratio": "share of time stalled",
    "max_requests": "requests that fit",
    "at_max_requests_decode_tokens_per_s": "tokens/s with so many",
}


@dataclass(frozen=True)
class PolicyRun:
    """One policy's results."""

    label: str
    ledger: Ledger
    timeline: SimulatedTimeline
    row: dict[str, Any]
    details: dict[str, Any]

    def __repr__(self) -> str:
        return f"<PolicyRun of {self.label}>"


@dataclass(frozen=True)
class Report:
    """All rows of a scenario, and what they were made from."""

    scenario: dict[str, Any]
    runs: tuple[PolicyRun, ...]
    failures: tuple[Failure, ...] = ()

    def __repr__(self) -> str:
        return f"<Report of {self.scenario['name']}: {', '.join(run.label for run in self.runs)}>"

    def as_json(self) -> dict[str, Any]:
        """The object that `fmsim run --json` prints."""
        details = {run.label: run.details for run in self.runs}
        return {
            "scenario": self.scenario | {"details": details},
            "policies": [run.row for run in self.runs],
            "differences": self.differences(),
            "failed": [failure.row() for failure in self.failures],
        }

    def differences(self) -> list[dict[str, Any]]:
        """How policies differ, pair by pair, on the same windows: `sim.windows.differences`.

        Under several budgets of the scenario, policies at one of them.
        """
        found = []
        for labels in by_budget(self.scenario, [run.label for run in self.runs]).values():
            ledgers = {run.label: run.ledger for run in self.runs if run.label in labels}
            found += differences(ledgers, self.scenario["layer_map"])
        return found

    def to_frame(self) -> Any:
        """A row a policy, one column a figure (`step_s_p99`), what the row leaves out behind: a
        pandas DataFrame where pandas is installed, else a list of dicts.
        """
        return frame(self.flat_rows())

    def flat_rows(self) -> list[dict[str, Any]]:
        """The same as a list of dicts."""
        return [flat(run.row) | flat(run.details, leave=("params",)) for run in self.runs]

    def _repr_html_(self) -> str:
        trace, hw = self.scenario["trace"], self.scenario["hardware"]
        caption = (
            f"{self.scenario['name']}: {trace['steps']} steps after {trace['prompt_tokens']:,}"
            f" tokens, {self.scenario['model']['name']} on {hw['title']}. Speeds are simulated."
        )
        return html_table(caption, SHOWN, [flat(run.row) for run in self.runs])

    def save(self, folder: Path) -> None:
        """Write report.json, and each policy's ledger and timeline; every file appears whole or not
        at all.
        """
        try:
            for run in self.runs:
                run.ledger.save(ledger_path(folder, run.label))
                run.timeline.save(timeline_path(folder, run.label))
            written = self.as_json() | {"files": files_of(folder, [run.label for run in self.runs])}
            write_text(folder / REPORT_NAME, strict_json.dump(written, indent=1) + "\n")
        except OSError as error:
            raise FmsimError(
                f"--out {folder}: cannot be written ({error.strerror or error}); choose another"
                " folder"
            ) from None


class Setting:
    """What every policy of a scenario runs on: the trace, the model and the hardware."""

    def __init__(self, file: ScenarioFile) -> None:
        """Raises FmsimError for whatever the user can mend."""
        scenario = file.scenario
        self.file, self.batch = file, scenario.batch
        geometry = load_geometry(file)
        _located(file, ("model",), geometry.check_replayable)
        self.hw = load_scenario_hardware(file)
        self.kv_parts = geometry.kv_parts(self.hw.placed.tp)
        geometry = geometry.on_gpu(self.hw.placed.tp)
        self.geometry = geometry.beyond_positions() if scenario.beyond_positions else geometry
        self.trace = read(file.trace_file())
        steps, layers = self.trace.n_steps, self.trace.n_layers
        log.info("%s: %d steps of %d layers", self.trace.path, steps, layers)
        self.stands_for = stands_for(file, self.trace, self.geometry)
        given = scenario.layer_map
        if given is None:
            given = layers_that_drive(self.trace, self.geometry)
        elif given == "spread":
            given = spread(self.trace.n_layers, self.geometry.n_csa)
        self.layer_map = _located(
            file,
            ("layer_map",),
            lambda: check_layer_map(given, self.trace.n_layers, self.geometry.n_csa),
        )
        tokens = self.trace.header.prompt_tokens + self.trace.n_steps
        self.check_context(tokens // self.trace.header.entry_tokens * self.geometry.csa_rate)

    def check_context(self, tokens: int) -> None:
        """Refuse a context that the model has no positions for, unless the scenario wants it."""
        self.geometry.check_context(
            tokens, f"{self.file.path}: a context of {self.file.scenario.name}"
        )

    def replayer(self, policies: Sequence[tuple[str, Policy]] = ()) -> Replayer:
        """Of the trace; what `policies` need of it is read now, before processes part."""
        replayer = Replayer(self.trace, memory=ModelMemory(self.geometry, self.layer_map))
        for key in {
            (policy.params.granularity, policy.params.scope == "shared") for _, policy in policies
        }:
            replayer.paged(*key)
        return replayer

    def run(self, replayer: Replayer, label: str, policy: Policy) -> PolicyRun:
        """Replay one policy and time it."""
        ledger = replayer.run(policy, StepsTold(replayer.n_steps, end=REPLAYED).watch)
        timeline = simulate(ledger, self.geometry, self.hw, self.layer_map, self.batch)
        row = row_of(ledger, timeline, self.geometry, self.hw, self.layer_map)
        row["policy"] = label
        row["answers_kept"] = self.answers_kept(policy)
        return PolicyRun(
            label,
            ledger,
            timeline,
            row,
            metrics.details(ledger, self.geometry, self.hw, self.layer_map),
        )

    def answers_kept(self, policy: Policy) -> dict[str, Any] | None:
        """What was measured of answers under `policy`, by the trace's own model at about the
        trace's length: "value", the share of what the full cache answers, "half_width" of its 95%
        interval (None: one context), "contexts", and their "tokens". None where nothing was.
        """
        header = self.trace.header
        found = answers_kept(header.model.sha256, header.prompt_tokens, policy, self.geometry.name)
        if found is None:
            return None
        return {
            "value": found.kept,
            "half_width": found.half_width,
            "contexts": found.contexts,
            "tokens": found.tokens,
        }


def row_of(
    ledger: Ledger,
    timeline: Timeline,
    geometry: Geometry,
    hw: Hardware,
    layer_map: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """`fmsim.sim.metrics.row`, and `at_max_requests`: `decode_tokens_per_s`, `step_s`,
    `h2d_bytes` and `stall_ratio` with as many requests as fit; None where none does.
    """
    row = metrics.row(ledger, timeline, geometry, hw, layer_map)
    fit, steady = row["max_requests"], steady_steps(ledger.n_steps, ledger.tau)
    row["at_max_requests"] = (
        metrics.timed(simulate(ledger, geometry, hw, layer_map, fit), steady) if fit else None
    )
    return row


def run_scenario(
    file: ScenarioFile,
    progress: Progress = silent,
    timeout_s: float = TIMEOUT_S,
) -> Report:
    """Run the selected policies of `file`.

    `progress` is told (label, done, total) as they go on; half a policy is 0.5. A policy that
    fails, or takes longer than `timeout_s`, is among the report's failures. Raises FmsimError for
    whatever the user can mend, and where none succeeds.
    """
    setting = Setting(file)
    policies = build_policies(file)
    replayer = setting.replayer(policies)

    def work(index: int) -> PolicyRun | Failure:
        label, policy = policies[index]
        return guarded(label, lambda: setting.run(replayer, label, policy))

    runs: list[PolicyRun] = []
    failures: list[Failure] = []
    progress(policies[0][0], 0, len(policies))
    tally = Tally([label for label, _ in policies], len(policies), progress)
    gone = lambda index, why: lost(policies[index][0], why)
    for result in in_parallel(work, len(policies), gone, timeout_s, tally):
        (failures if isinstance(result, Failure) else runs).append(result)
    raise_if_all(tuple(failures), len(runs))
    head = about(setting) | {"runs": about_runs(setting.file, policies)}
    if any(run.row["answers_kept"] for run in runs):
        head["answers"] = about_answers()
    return Report(head, tuple(runs), tuple(failures))


def about_runs(file: ScenarioFile, policies: Sequence[tuple[str, Policy]]) -> dict[str, Any]:
    """By label: the scenario's entry that it is of, its budget, and what the policy knows."""
    return {
        label: {
            "entry": spec.entry,
            "budget": str(policy.params.budget),
            "evidence": policy.evidence,
        }
        for spec, (label, policy) in zip(file.selected, policies, strict=True)
    }


def build_policies(file: ScenarioFile) -> list[tuple[str, Policy]]:
    """(label, policy) of every selected entry of the scenario's `policies`."""
    return [(spec.label, build(file, spec)) for spec in file.selected]


def load_scenario_hardware(file: ScenarioFile) -> Hardware:
    """The scenario's preset, with the scenario's own figures in it."""
    scenario = file.scenario
    folder = file.file(scenario.hardware).parent
    named = Path(scenario.hardware).name if "/" in scenario.hardware else scenario.hardware
    hw = _located(file, ("hardware",), lambda: load_hardware(named, folder))
    for name in scenario.hardware_figures:
        hw = _located(
            file,
            ("hardware_figures", name),
            lambda: replace_figure(hw, name, scenario.hardware_figures[name]),
        )
    given = scenario.deployment
    if given.start_log is not None:
        given = given.model_copy(update={"start_log": file.file(given.start_log)})
    return _located(file, ("deployment",), lambda: hw.deployed(given))


def load_geometry(file: ScenarioFile) -> Geometry:
    """The scenario's model: a preset's name, or a file beside the scenario (see
    `geometry_named`).
    """
    return geometry_named(file.scenario.model, file.file, file.where(("model",)))


def build(file: ScenarioFile, spec: PolicySpec) -> Policy:
    """A new policy object for an entry of the scenario; FmsimError says where its parameters are
    wrong.
    """
    labels = [entry.label for entry in file.scenario.policies]
    loc: tuple[str | int, ...] = ("policies", labels.index(spec.entry))
    try:
        return registry.build({"policy": spec.policy} | spec.params)
    except BadParameter as error:
        if file.is_overridden((*loc, error.key)):
            loc = (*loc, error.key)
        raise FmsimError(f"{file.where(loc)}: {error}") from None
    except FmsimError as error:
        raise FmsimError(f"{file.where(loc)}: {error}") from None


def _located(file: ScenarioFile, loc: tuple[str | int, ...], make: Callable[[], Any]) -> Any:
    """`make()`, its FmsimError led by where the scenario says so."""
    try:
        return make()
    except FmsimError as error:
        raise FmsimError(f"{file.where(loc)}: {error}") from None


def about_deployment(hw: Hardware, geometry: Geometry, kv_parts: int = 1) -> dict[str, Any]:
    """How the model lies on the GPUs, and what they have left for KV.

    ``geometry`` is of what one GPU holds; ``kv_parts`` share out a request's KV heads.
    """
    placed = hw.placed
    pool = hw.kv_pool(geometry)
    scaled = stand_in(hw, geometry)
    return {
        **({"kernels_stand_in": scaled} if scaled else {}),
        **({"kv_parts": kv_parts} if kv_parts > 1 else {}),
        "tensor_parallel": placed.tp,
        "deployment": {"title": placed.title, **placed.model_dump()},
        "weight_bytes_per_gpu": round(hw.weight_bytes(geometry)),
        "kv_pool": pool
        and {
            "bytes_per_gpu": round(pool.value),
            "source": pool.source,
            "guess": pool.guess,
        },
    }


def about(setting: Setting) -> dict[str, Any]:
    """What the rows were made from, for the report's head."""
    foreign = {"stands_for": setting.stands_for} if setting.stands_for else {}
    file, trace, geometry, hw = setting.file, setting.trace, setting.geometry, setting.hw
    header, scenario = trace.header, file.scenario
    steady = steady_steps(trace.n_steps, header.tau)
    tokens = header.prompt_tokens // header.entry_tokens * geometry.csa_rate + trace.n_steps
    full_bytes = geometry.full_gpu_bytes(tokens)
    return {
        "name": scenario.name,
        # of the trace that the file names, so not of another
        "description": "" if file.is_overridden(("trace",)) else scenario.description,
        "set": list(file.overrides),
        "file": str(file.path),
        "schema_version": SCHEMA_VERSION,
        "fmsim": __version__,
        "trace": {
            "file": str(file.trace_file()),
            "model": header.model.name,
            "source": header.source,
            "prompt_kind": header.prompt_kind,
            "prompt_tokens": header.prompt_tokens,
            "steps": trace.n_steps,
            "csa_layers": trace.n_layers,
            "topk": trace.topk,
            "masses": trace.has_mass,
            "quality": header.quality,
            "window_steps": header.tau,
            "windows": n_windows(trace.n_steps, header.tau),
            "steady_steps": [steady.start, steady.stop],
            "content_sha256": header.content_sha256,
        },
        "model": {"name": geometry.name, "csa_layers": geometry.n_csa, "layers": geometry.n_layers},
        "layer_map": list(setting.layer_map),
        **foreign,
        "hardware": {
            "name": hw.name,
            "title": hw.title,
            **about_deployment(hw, geometry, setting.kv_parts),
            "kernel_source": hw.kernel_source,
            "figures": scenario.hardware_figures,
        },
        "batch": scenario.batch,
        "budgets": {
            str(budget): budget.gpu_bytes(full_bytes) if budget.on_gpu else None
            for budget in scenario.budgets
        },
        "full_gpu_bytes": full_bytes,
        "full_kv_bytes": geometry.full_kv_bytes(header.prompt_tokens),
        "simulated": [
            "decode_tokens_per_s",
            "step_s",
            "stall_ratio",
            "max_requests",
            "at_max_requests",
        ],
        "measured": ["answers_kept"],
        "replayed": [
            "gpu_bytes",
            "gpu_ratio",
            "kv_hbm_bytes",
            "kv_hbm_ratio",
            "entry_recall",
            "entry_recall_per_step",
            "mass_kept",
            "set_overlap",
            "h2d_bytes",
            "h2d_bytes_per_step",
            "hit_rate",
            "misses",
        ],
    }
