"""`fmsim validate`: each policy of a scenario in both worlds on one trace, and what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from fmsim.exec.decode.trace_driven import TraceDrivenDecode, TraceDrivenRun, device_name
from fmsim.exec.kv.home import PER_PAGE
from fmsim.exec.runs import synthetic as synthetic_run
from fmsim.experiments.run import build, load_scenario_hardware, run_scenario
from fmsim.experiments.whole_steps import WholeSteps, errors
from fmsim.experiments.whole_steps import measured as measured_steps
from fmsim.experiments.whole_steps import simulated as simulated_steps
from fmsim.experiments.workers.failures import TIMEOUT_S, Failure, guarded, lost, raise_if_all
from fmsim.experiments.workers.parallel import alone, one_by_one
from fmsim.experiments.workers.progress import Progress, StepsTold, silent
from fmsim.geometry import Geometry, deepseek_v4_named
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.scenario import ScenarioFile
from fmsim.sim.footprint import (
    Footprint,
    ModelMemory,
    check_layer_map,
    footprint,
    keyed_layers,
)
from fmsim.trace import read

MEMORY_ERROR = 0.01  # of what is predicted
REPLAYED = 0.3  # of a policy's check is the replay, about; the rest is the engine


@dataclass(frozen=True)
class Memory:
    """What a request takes on the GPU under a policy: predicted, and as the engine has it."""

    label: str
    predicted_gpu_bytes: int  # of a request; the figure that leads `fmsim run`
    built_gpu_bytes: int  # what the engine's tensors for it take
    allocator_gpu_bytes: int | None  # what torch's allocator was asked for; on a GPU
    page_bytes: int  # by which pages of PER_PAGE entries may exceed what is predicted
    spare_bytes: int
    lists_bytes: int  # of lists of resident pages, beside all that

    @property
    def memory_error(self) -> float:
        """By which share a request takes more on the GPU than predicted: by torch's allocator,
        or by the tensors' sizes on a CPU.
        """
        found = self.allocator_gpu_bytes or self.built_gpu_bytes
        return found / self.predicted_gpu_bytes - 1

    @property
    def memory_holds(self) -> bool:
        """Predicted within MEMORY_ERROR, or within what whole pages round up."""
        allowed = max(MEMORY_ERROR * self.predicted_gpu_bytes, self.page_bytes)
        return abs(self.memory_error) * self.predicted_gpu_bytes <= allowed

    def row(self) -> dict[str, Any]:
        found = {
            "policy": self.label,
            "memory_holds": self.memory_holds,
            "memory_error": self.memory_error,
        }
        return found | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "label"}


@dataclass(frozen=True)
class Check(Memory):
    """One policy's comparison, its memory included.

    `first_difference` is the first step whose slots differ, None where none does.
    """

    first_difference: int | None
    differing_fields: list[str]  # of the ledgers
    replay_pages: int
    engine_pages: int
    replay_bytes: int
    engine_bytes: int
    measured_step_p50_s: float

    @property
    def identical(self) -> bool:
        """Slots at every step, all counts, and the bytes moved."""
        return (
            self.first_difference is None
            and not self.differing_fields
            and self.replay_bytes == self.engine_bytes
        )

    def row(self) -> dict[str, Any]:
        return super().row() | {"identical": self.identical}


def validate(
    policies: Sequence[tuple[str, Callable[[], Policy]]],
    replayer: Replayer,
    geometry: Geometry,
    layer_map: Sequence[int],
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Check]:
    """Run each of `policies` (label, a way to make it) as a replay in numpy and as a driven decode
    in torch.
    """
    checks = []
    for number, (label, make) in enumerate(policies):
        progress(label, number, len(policies))
        checks.append(check(label, make, replayer, geometry, layer_map, device))
    return checks


def check(
    label: str,
    make: Callable[[], Policy],
    replayer: Replayer,
    geometry: Geometry,
    layer_map: Sequence[int],
    device: str,
) -> Check:
    """One policy in both worlds."""
    slots: list[np.ndarray] = []
    replayed = StepsTold(replayer.n_steps, end=REPLAYED)

    def watch(manager: CacheManager) -> None:
        slots.append(manager.residency.slots.copy())
        replayed.advance()

    ledger = replayer.run(make(), watch)
    place = footprint(ledger, geometry, layer_map)
    decode = _driven(make(), ledger, place, replayer, geometry, device)
    outcome = decode.run(progress=StepsTold(replayer.n_steps, start=REPLAYED).advance)
    return compare(label, ledger, np.stack(slots), decode, outcome, place)


def _driven(
    policy: Policy,
    ledger: Ledger,
    place: Footprint,
    replayer: Replayer,
    geometry: Geometry,
    device: str,
) -> TraceDrivenDecode:
    """The engine's decode of what a replay's `ledger` and its `place` are of, built and not run."""
    keyed = keyed_layers(ledger, geometry)
    groups = place.groups.tolist()
    return TraceDrivenDecode(replayer, policy, geometry, groups, keyed, device)


class Worlds:
    """What the policies of a scenario are checked on, in both worlds."""

    def __init__(self, file: ScenarioFile, device: str, steps: int | None = None) -> None:
        """Of the trace only the first `steps`, all of them unless given."""
        scenario = file.scenario
        self.file = file
        self.device = device
        self.geometry = deepseek_v4_named(scenario.model, file.file, file.where(("model",)))
        self.trace = read(file.trace_file())
        self.layer_map = check_layer_map(
            None if scenario.layer_map == "spread" else scenario.layer_map,
            self.trace.n_layers,
            self.geometry.n_csa,
        )
        memory = ModelMemory(self.geometry, self.layer_map)
        self.replayer = Replayer(self.trace, memory=memory, max_steps=steps)

    def make(self, label: str) -> Callable[[], Policy]:
        spec = next(spec for spec in self.file.selected if spec.label == label)
        return partial(build, self.file, spec)

    def check(self, label: str) -> Check | Failure:
        """A policy in both worlds, or why it cannot run."""
        run = partial(
            check,
            label,
            self.make(label),
            self.replayer,
            self.geometry,
            self.layer_map,
            self.device,
        )
        return guarded(label, run)

    def memory(self, label: str) -> Memory | Failure:
        """What a policy's request takes on the GPU, without decoding there; or why it cannot."""

        def built() -> Memory:
            ledger = self.replayer.run(self.make(label)())
            place = footprint(ledger, self.geometry, self.layer_map)
            decode = _driven(
                self.make(label)(), ledger, place, self.replayer, self.geometry, self.device
            )
            return _memory(label, decode, place)

        return guarded(label, built)


def _check_alone(asked: tuple[ScenarioFile, str, str]) -> Check | Failure:
    """The same in a process of its own; `asked` are file, label and device."""
    file, label, device = asked
    return Worlds(file, device).check(label)


def _told(label: str, before: int, total: int, progress: Progress) -> Callable[[int, float], None]:
    """Of one piece of work, with `before` pieces done."""
    return lambda _, share: progress(label, before + share, total)


def validate_scenarios(
    files: Sequence[ScenarioFile],
    device: str,
    progress: Progress = silent,
    whole: WholeSteps | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """`validate_scenario` for a scenario on several traces, in one object."""
    reports = [validate_scenario(file, device, progress, whole, timeout_s) for file in files]
    traces = ", ".join(report["scenario"]["trace"] for report in reports)
    return {
        "scenario": reports[0]["scenario"] | {"trace": traces},
        "policies": [row for report in reports for row in report["policies"]],
        "failed": [row for report in reports for row in report["failed"]],
    }


def validate_scenario(
    file: ScenarioFile,
    device: str,
    progress: Progress = silent,
    whole: WholeSteps | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """`validate` for a scenario's selected policies: the object that `fmsim validate --json`
    prints, the simulation's step times beside the measured.

    With `whole` a model of random weights of the scenario's geometry decodes each policy's steps
    too, a row a batch, so that the times are of the same thing; the scenario's hardware should then
    be a preset that `fmsim hw calibrate` made here. A policy that fails, or takes longer than
    `timeout_s`, stands under "failed".
    """
    n = len(file.selected)
    batches = (whole.batches or (file.scenario.batch,)) if whole else ()
    total = n * (2 + len(batches))  # each simulated, checked, and decoded whole
    simulated = run_scenario(
        file, lambda label, done, _: progress(f"{label}: replay", done, total), timeout_s
    )
    scenario = file.scenario
    worlds = Worlds(file, device, whole.steps if whole else None)
    geometry, trace = worlds.geometry, worlds.trace
    rows: list[dict[str, Any]] = []
    failures = list(simulated.failures)
    for number, run in enumerate(simulated.runs, n):
        told = _told(f"{run.label}: engine", number, total, progress)
        told(0, 0.0)
        if registry.is_builtin(worlds.make(run.label)()):
            [found] = one_by_one(worlds.check, [run.label], told)
        else:
            gone = lambda asked, why: lost(asked[1], why)
            found = alone(_check_alone, (file, run.label, device), gone, timeout_s, told)
        if isinstance(found, Failure):
            failures.append(found)
            continue
        times = {
            "simulated_step_p50_s": run.row["step_s"]["p50"],
            "simulated_tokens_per_s": run.row["decode_tokens_per_s"],
        }
        context = {"context_tokens": trace.header.prompt_tokens}
        rows.append(context | found.row() | times)
    raise_if_all(tuple(failures), len(rows))
    measured = (
        f"the moves and their bookkeeping on this {device_name(device)}, without a model's compute;"
        " the two are not to be compared"
    )
    if whole:
        request_bytes = max(row["predicted_gpu_bytes"] for row in rows)
        weights, n_experts = synthetic_run.weights_for(
            geometry, device, max(batches) * request_bytes, seed=0
        )
        hw = load_scenario_hardware(file)
        asked = [(row, batch) for row in rows for batch in batches]
        rows = []
        for number, (row, batch) in enumerate(asked, 2 * n):
            label = row["policy"]
            told = _told(f"{label}, batch {batch}: whole steps", number, total, progress)
            told(0, 0.0)
            timed = partial(measured_steps, worlds, batch=batch, weights=weights)
            [times] = one_by_one(timed, [label], told)
            timed_row = row | times
            timed_row |= simulated_steps(worlds, label, hw, batch, times["warm_up_steps"])
            rows.append(timed_row | errors(timed_row))
        measured = (
            f"the same on this {device_name(device)}, batch {', '.join(map(str, batches))}, with"
            f" random {geometry.weight_type} weights and {n_experts} experts a layer; both after"
            " the first decision"
        )
    about = {
        "name": scenario.name,
        "trace": str(file.trace_file()),
        "steps": worlds.replayer.n_steps,
        "model": geometry.name,
        "csa_layers": geometry.n_csa,
        "device": device_name(device),
        "whole_steps": whole is not None,
        "simulated_hardware": scenario.hardware,
        "runs": simulated.scenario["runs"],
        "notes": [
            (
                f"simulated: a whole decode step of {geometry.name} on {scenario.hardware}. "
                f" measured: {measured}."
            ),
            (
                "on GPU: of one request: slots, spare pages (for misses, and for what is recalled"
                " ahead), index keys, HCA entries, windows.  built: by torch's allocator on a GPU,"
                " by the tensors' sizes on a CPU; whole pages may exceed what is predicted."
            ),
        ],
    }
    failed = [failure.row() for failure in failures]
    return {"scenario": about, "policies": rows, "failed": failed}


def compare(
    label: str,
    ledger: Ledger,
    slots: np.ndarray,
    decode: TraceDrivenDecode,
    outcome: TraceDrivenRun,
    place: Footprint,
) -> Check:
    """The replay's `ledger` and `slots` beside the `outcome` of the engine's `decode`."""
    geometry = decode.geometry
    differs = np.flatnonzero((slots != outcome.slots).any(axis=(1, 2)))
    fields_apart = [
        f.name
        for f in fields(Ledger)
        if not np.array_equal(getattr(ledger, f.name), getattr(outcome.ledger, f.name))
    ]
    loads, engine_loads = (
        (one.demand_loads + one.lookahead_loads).sum(axis=0, dtype=np.int64)
        for one in (ledger, outcome.ledger)
    )
    tiered_keys = place.groups[decode.keyed_layers :]
    entry_bytes, key_bytes = (
        ledger.granularity * size for size in (geometry.kv_entry_bytes, geometry.index_key_bytes)
    )
    return Check(
        **vars(_memory(label, decode, place)),
        first_difference=int(differs[0]) if len(differs) else None,
        differing_fields=fields_apart,
        replay_pages=int(loads[place.groups].sum()),
        engine_pages=int(engine_loads[place.groups].sum()),
        replay_bytes=int(
            loads[place.groups].sum() * entry_bytes + loads[tiered_keys].sum() * key_bytes
        ),
        engine_bytes=outcome.h2d_bytes,
        measured_step_p50_s=float(np.median(outcome.step_s)),
    )


def _memory(label: str, decode: TraceDrivenDecode, place: Footprint) -> Memory:
    """The bytes of the engine's `decode` beside those of the replay's `place`."""
    geometry = decode.geometry
    entry_bytes = geometry.kv_entry_bytes + geometry.index_key_bytes
    return Memory(
        label=label,
        predicted_gpu_bytes=place.allocated.total,
        built_gpu_bytes=decode.gpu_bytes,
        allocator_gpu_bytes=decode.allocator.n_bytes,
        page_bytes=PER_PAGE * geometry.n_layers * entry_bytes,
        spare_bytes=decode.spare_bytes,
        lists_bytes=decode.lists_bytes,
    )
