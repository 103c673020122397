"""The functions of `import fmsim`, made for a notebook: a path or a name is as good as an object.

A policy is given as its name (`"lru"`), a name with parameters (`"lru:budget=10%"`), a file and a
class (`"my_policy.py:MyPolicy"`), a class, an object, or a mapping as in a scenario
(`{"policy": "lru", "label": "small", "budget": "5%"}`). A mistake of the caller raises FmsimError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fmsim.errors import FmsimError, short, shown
from fmsim.experiments import plan as _plan
from fmsim.experiments import run as _run
from fmsim.experiments import serve as _serve
from fmsim.experiments import sweep as _sweep
from fmsim.experiments.plan import MOST_USD
from fmsim.experiments.results import saved as _saved
from fmsim.experiments.results.rows import write_rows
from fmsim.experiments.workers.failures import TIMEOUT_S
from fmsim.experiments.workers.progress import Progress, silent
from fmsim.geometry import Geometry, geometry_named
from fmsim.hw import Hardware, load_hardware
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.scenario import NamedPolicy, Scenario, ScenarioFile, Source, shipped
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import ModelMemory, check_layer_map
from fmsim.sim.timeline import SimulatedTimeline, Timeline
from fmsim.trace import Trace, read

Overrides = Mapping[str, Any] | Iterable[str]


def load_trace(path: str | Path, *, check: bool = False) -> Trace:
    """Open a trace: what a real model selected and attended to, step by step. `path` may be the
    name of one that fmsim carries.

    The file is mapped, not read: a column is read as it is indexed. With `check` every value is
    read and validated. Raises FmsimError for a file that is missing, truncated or foreign.

    >>> trace = load_trace("nano-32k-needles")
    >>> trace.n_layers, trace.topk, trace.header.prompt_tokens
    (6, 512, 32768)
    """
    return read(shipped.trace(path) or path, check)


def list_policies() -> list[str]:
    """Names of all installed policies, fmsim's own and plug-ins.

    A plug-in that cannot be used is left out, with a warning that names it.

    >>> "lru" in list_policies()
    True
    """
    return registry.names()


def build_policy(policy: NamedPolicy, **params: Any) -> Policy:
    """A new policy object. `params` are its parameters; `fmsim policy show NAME` lists them.

    >>> build_policy("lru", budget="10%", granularity=4).params.granularity
    4
    """
    given = policy if isinstance(policy, Mapping) else {"policy": policy}
    if isinstance(policy, str):
        name, written = registry.split(policy)
        given = {"policy": name} | written
    return registry.build(dict(given) | params)


def replay_trace(
    trace: Trace | str | Path,
    policy: NamedPolicy,
    *,
    model: str | Path | Geometry = "v4-flash",
    max_steps: int | None = None,
    cold: bool = False,
) -> Ledger:
    """Replay a trace against a policy: what is hit, what moves, what is kept. No clock.

    `model` says what a budget in bytes buys: a preset, a config.json, or a Geometry. Only the first
    `max_steps` are replayed. `cold` starts with nothing resident; otherwise the prefill leaves what
    the policy values most. An object is used as it is, so its tables can be looked at afterwards.

    >>> ledger = replay_trace(
    ...     "traces/nano-32k-needles.safetensors", "lru:budget=4x topk", max_steps=64
    ... )
    >>> bool((ledger.mass_kept == ledger.mass_total).all())  # lru loads what it misses
    True
    """
    _check_count("max_steps", max_steps)
    geometry = _geometry(model)
    replayer = Replayer(
        trace if isinstance(trace, Trace) else load_trace(trace),
        memory=ModelMemory(geometry),
        cold=cold,
        max_steps=max_steps,
    )
    return replayer.run(policy if isinstance(policy, Policy) else build_policy(policy))


def simulate_decode(
    ledger: Ledger,
    *,
    model: str | Path | Geometry = "v4-flash",
    hardware: str | Path | Hardware = "h100",
    layer_map: Sequence[int] | None = None,
    batch: int = 1,
) -> SimulatedTimeline:
    """The time that a ledger's decode takes on a GPU: `batch` equal requests side by side.

    `layer_map` says which layer of the ledger drives each CSA layer of the model; without it they
    are spread evenly. Raises FmsimError, with the figure that is short, where memory does not
    suffice.

    >>> ledger = replay_trace("traces/nano-32k-needles.safetensors", "lru", max_steps=64)
    >>> h100 = simulate_decode(ledger)
    >>> b200 = simulate_decode(ledger, hardware="b200")
    >>> bool(b200.end_s[-1] < h100.end_s[-1])
    True
    """
    _check_count("batch", batch)
    geometry = _geometry(model)
    layers = check_layer_map(layer_map, ledger.n_layers, geometry.n_csa)
    return simulate(ledger, geometry, _hardware(hardware), layers, batch)


def row(
    ledger: Ledger,
    timeline: Timeline,
    *,
    model: str | Path | Geometry = "v4-flash",
    hardware: str | Path | Hardware = "h100",
    layer_map: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One policy's figures, in the fields of `fmsim run --json`; `fmsim.sim.metrics.row` says what
    each is.

    >>> ledger = replay_trace("traces/nano-32k-needles.safetensors", "lru", max_steps=64)
    >>> row(ledger, simulate_decode(ledger))["mass_kept"]
    1.0
    """
    geometry, hw = _geometry(model), _hardware(hardware)
    layers = check_layer_map(layer_map, ledger.n_layers, geometry.n_csa)
    _check_pair(ledger, timeline, geometry, hw)
    return _run.row_of(ledger, timeline, geometry, hw, layers)


def run_scenario(
    scenario: Source | ScenarioFile,
    policies: Iterable[NamedPolicy] | NamedPolicy = (),
    overrides: Overrides = (),
    *,
    progress: Progress = silent,
    timeout_s: float = TIMEOUT_S,
) -> _run.Report:
    """Run a scenario's policies, or those of `policies`, on its trace, model and hardware.

    `scenario` is a file, a mapping with its keys, or a Scenario. `policies` are labels of the
    scenario, or any policies. `overrides` are such as {"batch": 8, "policies.lru.budget": "20%"}.
    The report shows itself in a notebook; `to_frame()` gives its rows, `runs` each policy's ledger
    and timeline. `progress` is told (label, done, total). A policy that fails, or runs for more
    than `timeout_s`, is among the report's `failures`.

    >>> report = run_scenario("scenarios/32k.yaml", ["full"], {"hardware": "h200"})
    >>> [run.row["mass_kept"] for run in report.runs]
    [1.0]
    """
    _check_seconds("timeout_s", timeout_s)
    return _run.run_scenario(_file(scenario, policies, overrides), progress, timeout_s)


def simulate_server(
    scenario: Source | ScenarioFile,
    policies: Iterable[NamedPolicy] | NamedPolicy = (),
    overrides: Overrides = (),
    *,
    progress: Progress = silent,
    timeout_s: float = TIMEOUT_S,
) -> _serve.ServingReport:
    """Serve a scenario's workload, many requests on one server, under each policy.

    The arguments are those of `run_scenario`; the scenario needs a `workload`.

    >>> report = simulate_server("scenarios/serve.yaml", ["full"], {"workload.duration_s": 5})
    >>> report.as_json()["policies"][0]["policy"]
    'full'
    """
    _check_seconds("timeout_s", timeout_s)
    file = _file(scenario, policies, overrides)
    if file.scenario.workload is None:
        raise FmsimError(
            f"{file.path}: simulate_server serves a workload, and the scenario has none; give it"
            " the key 'workload', or use run_scenario"
        )
    return _serve.serve_scenario(file, progress, timeout_s)


def plan_capacity(
    scenario: Source | ScenarioFile,
    policies: Iterable[NamedPolicy] | NamedPolicy = (),
    overrides: Overrides = (),
    *,
    context_tokens: int | None = None,
    output_tokens: int = 1024,
    tpot_s: float = 0.05,
    ttft_s: float = float("inf"),
    hardware: Sequence[str] | str = (),
    deployments: Sequence[str] | str = (),
    usd_per_gpu_hour: float | None = None,
    beyond_positions: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """How many requests of one size a server takes at once under each policy, and what binds.

    `context_tokens` is a prompt's length, the trace's by default; a request makes `output_tokens`,
    the first after at most `ttft_s` seconds, the others each in at most `tpot_s`. Servers are the
    scenario's, or one for each of `hardware` and `deployments` ("tp8", "dp8"). A context longer
    than the model knows is refused, but with `beyond_positions`. -> the object that `fmsim plan
    --json` prints.

    >>> plan = plan_capacity("scenarios/32k.yaml", ["full"], context_tokens=131_072)
    >>> plan["policies"][0]["policy"]
    'full'
    """
    _check_seconds("timeout_s", timeout_s)
    _check_count("context_tokens", context_tokens)
    _check_count("output_tokens", output_tokens)
    for name, seconds in (("tpot_s", tpot_s), ("ttft_s", ttft_s)):
        _check_seconds(name, seconds)
    priced = isinstance(usd_per_gpu_hour, Real) and 0 <= usd_per_gpu_hour <= MOST_USD
    if usd_per_gpu_hour is not None and not priced:
        raise FmsimError(
            f"usd_per_gpu_hour: give dollars from 0 to {MOST_USD:,}, not {short(usd_per_gpu_hour)}"
        )
    hardware = [hardware] if isinstance(hardware, str) else hardware
    deployments = [deployments] if isinstance(deployments, str) else deployments
    file = _file(scenario, policies, overrides)
    asked = {
        "output_tokens": output_tokens,
        "tpot_s": tpot_s,
        "ttft_s": ttft_s,
        "usd_per_gpu_hour": usd_per_gpu_hour,
        "beyond_positions": beyond_positions,
    }
    return _plan.plan_scenario(file, context_tokens, asked, hardware, deployments, timeout_s)


def sweep_scenario(
    scenario: Source,
    grid: Mapping[str, Iterable[Any]] | Iterable[str],
    policies: Iterable[NamedPolicy] | NamedPolicy = (),
    overrides: Overrides = (),
    *,
    out: str | Path | None = None,
    jobs: int | None = 1,
    on_ray: bool = False,
    max_runs: int = _sweep.MAX_RUNS,
    timeout_s: float = TIMEOUT_S,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Run a scenario's policies under every combination of settings; -> a row a run.

    `grid` maps keys to their values. With `out` (JSON lines, or .parquet) a row is written as its
    run ends. What stands there already is not run again, unless it failed. `jobs` are worker
    processes, None one a core, and `on_ray` a cluster: there a policy needs a name or a file.
    A grid of more than `max_runs` runs is refused.

    >>> rows = sweep_scenario("scenarios/32k.yaml", {"hardware": ["h100", "h200"]}, ["full"])
    >>> [row["set.hardware"] for row in rows]
    ['h100', 'h200']
    """
    _check_count("jobs", jobs)
    _check_count("max_runs", max_runs)
    _check_seconds("timeout_s", timeout_s)
    _check_source(scenario)
    if not isinstance(grid, Iterable):
        raise FmsimError(f"grid: give a mapping of keys to their values, not {short(grid)}")
    axes = (
        [_sweep.Axis.of(key, values) for key, values in grid.items()]
        if isinstance(grid, Mapping)
        else [_sweep.Axis.parse(text) for text in grid]
    )
    return _sweep.sweep(
        scenario,
        _texts(overrides),
        axes,
        _several(policies),
        out,
        jobs,
        on_ray,
        max_runs,
        timeout_s,
        progress,
    )


def load_rows(source: str | Path) -> list[dict[str, Any]]:
    """What a command wrote, as flat rows: a folder of `fmsim run --out` or `fmsim eval --out`, or
    the file of `fmsim sweep` or `fmsim tune`.

    Every value is a number, a text, true, false or None.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> run_scenario("scenarios/32k.yaml", ["full"]).save(folder)
    >>> [(row["policy"], row["mass_kept"]) for row in load_rows(folder)]
    [('full', 1.0)]
    """
    return _saved.rows_of(Path(source))


def load_frame(source: str | Path) -> Any:
    """The same as a pandas DataFrame, which needs an extra.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> run_scenario("scenarios/32k.yaml", ["full"]).save(folder)
    >>> load_frame(folder).policy[0]
    'full'
    """
    return _saved.frame_of(load_rows(source))


def save_rows(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as the path's name ends: .parquet (an extra), .jsonl, or else CSV.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "rows.csv"
    >>> save_rows([{"policy": "lru", "misses": 3}], place)
    >>> place.read_text()
    'policy,misses\\nlru,3\\n'
    """
    place = Path(path)
    try:
        write_rows(place, [dict(row) for row in rows])
    except OSError as error:
        raise FmsimError(
            f"{shown(place)}: cannot be written ({error.strerror or error}); choose another place"
        ) from None


def _file(
    scenario: Source | ScenarioFile,
    policies: Iterable[NamedPolicy] | NamedPolicy,
    overrides: Overrides,
) -> ScenarioFile:
    chosen, texts = _several(policies), _texts(overrides)
    if not isinstance(scenario, ScenarioFile):
        _check_source(scenario)
        return ScenarioFile(scenario, texts, chosen)
    if chosen or texts:
        raise FmsimError(
            "scenario: a ScenarioFile has its policies and overrides; give these when it is made,"
            f" or give {shown(scenario.path)} itself"
        )
    return scenario


def _check_source(scenario: Source) -> None:
    """Refuse what no scenario can be read from."""
    if not isinstance(scenario, (str, Path, Mapping, Scenario)):
        raise FmsimError(
            "scenario: give a file, a name of `fmsim scenario list`, or a mapping with its keys,"
            f" not {short(scenario)}"
        )


def _check_pair(ledger: Ledger, timeline: Timeline, geometry: Geometry, hw: Hardware) -> None:
    """Refuse a timeline that is not of the ledger's decode, as far as it knows.

    An engine's timeline knows no names, and may lack the first step, which captures a CUDA graph.
    """
    made = isinstance(timeline, SimulatedTimeline)
    if ledger.n_steps - len(timeline.start_s) not in ((0,) if made else (0, 1)):
        raise FmsimError(
            f"timeline: has {len(timeline.start_s)} steps, the ledger {ledger.n_steps}; give the"
            " ledger that it was made of"
        )
    if not isinstance(timeline, SimulatedTimeline):
        return
    for name, of_timeline, other in (
        ("policy", timeline.policy, ledger.policy),
        ("model", timeline.model, geometry.name),
        ("hardware", timeline.hardware, hw.name),
    ):
        if of_timeline != other:
            raise FmsimError(
                f"{name}: the timeline is of {shown(of_timeline)}, not {shown(other)}; give both"
                " the same"
            )


def _several(policies: Iterable[NamedPolicy] | NamedPolicy) -> list[NamedPolicy]:
    """One policy alone is a list of one."""
    if isinstance(policies, (str, Mapping, type, Policy)):
        return [policies]
    if not isinstance(policies, Iterable):
        raise FmsimError(f"policies: give a policy or several, not {short(policies)}")
    return list(policies)


def _check_count(name: str, value: int | None) -> None:
    """Refuse what is no whole number above zero; None is left to its default."""
    whole = isinstance(value, Integral) and not isinstance(value, bool) and value > 0
    if value is not None and not whole:
        raise FmsimError(f"{name}: give a whole number of at least 1, not {short(value)}")


def _check_seconds(name: str, value: float) -> None:
    """Refuse what is no time above zero; infinity is no limit."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not value > 0:  # NaN is not
        raise FmsimError(f"{name}: give seconds above zero, not {short(value)}")


def _texts(overrides: Overrides) -> list[str]:
    """Overrides as `--set` writes them."""
    if isinstance(overrides, Mapping):
        return [f"{key}={_sweep.text_of(key, value)}" for key, value in overrides.items()]
    texts = list(overrides) if isinstance(overrides, Iterable) else [overrides]
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in texts):
        raise FmsimError(
            f"overrides: give a mapping of keys to values, or texts, not {short(overrides)}"
        )
    return texts


def _geometry(model: str | Path | Geometry) -> Geometry:
    return model if isinstance(model, Geometry) else geometry_named(str(model), where="model")


def _hardware(hardware: str | Path | Hardware) -> Hardware:
    return hardware if isinstance(hardware, Hardware) else load_hardware(str(hardware))
