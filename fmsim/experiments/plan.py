"""Which servers hold how many requests, at what speed and price, under which policy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fmsim.errors import FmsimError
from fmsim.experiments.run import (
    Setting,
    about,
    about_deployment,
    about_runs,
    build_policies,
    load_geometry,
)
from fmsim.experiments.workers.failures import TIMEOUT_S, Failure, guarded, lost, raise_if_all
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.geometry import Geometry, geometry_named
from fmsim.hw import Hardware, load_hardware
from fmsim.hw.deployment import Deployment
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.replay.ledger import Ledger
from fmsim.scenario import ScenarioFile
from fmsim.sim import metrics
from fmsim.sim.serving.capacity.behaviour import BEHAVIOURS, Behaviour
from fmsim.sim.serving.capacity.plan import CapacityQuestion, plan
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.spec import Server

MOST_USD = 1_000_000  # of an hour of a GPU
_DEPLOYMENT = re.compile(r"(tp|dp|cp|ep)(\d+)")


@dataclass(frozen=True)
class Ask:
    """What every server of a plan is asked for."""

    tokens: int  # of a prompt
    output_tokens: int
    tpot_s: float
    ttft_s: float = float("inf")
    usd_per_gpu_hour: float | None = None
    beyond_positions: bool = False  # contexts longer than the model's positions


@dataclass(frozen=True)
class Candidate:
    """One policy: what it asks of a server, and what it keeps."""

    label: str
    exact: bool | None
    mass_kept: float | None
    ledger: Ledger
    source: str
    layer_map: tuple[int, ...] | None = None
    bound: bool = False  # it knows the future, so nobody can deploy it

    def demand(self, geometry: Geometry) -> Demand:
        """Of a request, on one GPU of a rank."""
        return Demand(self.ledger, geometry, self.layer_map)


def plan_scenario(
    file: ScenarioFile,
    tokens: int | None,
    asked: dict[str, Any],
    hardware: Sequence[str] = (),
    deployments: Sequence[str] = (),
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """The scenario's selected policies on its hardware and deployment, or on each of those named,
    at a context of `tokens` (by default the trace's); `asked`: the rest of `Ask`.

    Raises FmsimError for whatever the user can mend.
    """
    setting, policies = Setting(file), build_policies(file)
    replayer = setting.replayer(policies)

    def candidate(label: str, policy: Policy) -> Candidate:
        ledger = replayer.run(policy)
        return Candidate(
            label,
            metrics.exact(ledger),
            metrics.kept(ledger, setting.layer_map)["mass_kept"],
            ledger,
            "replayed",
            setting.layer_map,
            policy.evidence == "future",
        )

    ask = Ask(tokens or setting.trace.header.prompt_tokens, **asked)
    full = candidate("full", registry.build("full"))
    given = file.scenario.deployment
    servers = [
        hw.deployed(spec)
        for hw in ([load_hardware(name) for name in hardware] or [setting.hw])
        for spec in ([parse_deployment(text, given) for text in deployments] or [given])
    ]
    results = list(
        in_parallel(
            lambda index: guarded(policies[index][0], lambda: candidate(*policies[index])),
            len(policies),
            lambda index, why: lost(policies[index][0], why),
            timeout_s,
        )
    )
    failures = tuple(result for result in results if isinstance(result, Failure))
    candidates = [result for result in results if isinstance(result, Candidate)]
    raise_if_all(failures, len(candidates))
    options = file.scenario.server
    head = about(setting) | {
        "server": options.model_dump(mode="json"),
        "runs": about_runs(file, policies),
    }
    geometry = load_geometry(file)
    if file.scenario.beyond_positions:
        geometry = geometry.beyond_positions()
    report = _report(head, geometry, servers, candidates, full, options, ask)
    return report | {"failed": [failure.row() for failure in failures]}


def plan_model(
    model: str, hardware: Sequence[str], deployments: Sequence[Deployment], ask: Ask
) -> dict[str, Any]:
    """Policies as published behaviour has them (`sim.serving.behaviour`), without a trace.

    Raises FmsimError for whatever the user can mend.
    """
    geometry = geometry_named(model)
    if ask.beyond_positions:
        geometry = geometry.beyond_positions()
    candidates = [
        Candidate(
            each.policy,
            each.exact,
            each.mass_kept,
            each.ledger(geometry),
            each.source + _for_each_selection(each, geometry),
        )
        for each in BEHAVIOURS
    ]
    servers = [
        load_hardware(name).deployed(spec)
        for name in hardware
        for spec in (deployments or usual_deployments(load_hardware(name)))
    ]
    head = {"model": {"name": geometry.name}, "server": Server().model_dump(mode="json")}
    return _report(head, geometry, servers, candidates, candidates[0], Server(), ask)


def _for_each_selection(each: Behaviour, geometry: Geometry) -> str:
    """What a figure of one selection is taken to mean where several read one layer's KV."""
    several = geometry.selections_of_a_store
    if several == 1 or not each.policy.startswith("lru"):
        return ""
    return (
        f"; here for each selection that reads a layer's KV ({several:g} of them, mean over layers"
        " with KV), as if none took another's entries"
    )


def usual_deployments(hw: Hardware) -> list[Deployment]:
    """All GPUs tensor-parallel, and all data-parallel in attention with experts over all."""
    return [Deployment(), Deployment(tp=1, dp=hw.n_gpus)]


def parse_deployment(text: str, base: Deployment | None = None) -> Deployment:
    """Such as 'tp8', 'dp8', 'tp2dp4' or 'dp8ep8': with the other fields of `base`."""
    found = _DEPLOYMENT.findall(text.lower().replace(" ", ""))
    if not found or "".join(map("".join, found)) != text.lower().replace(" ", ""):
        raise FmsimError(
            f"--deployment {text}: write the kinds of parallelism and their sizes, such as tp8,"
            " dp8, tp2dp4 or tp4cp2"
        )
    sizes = {name: int(size) for name, size in found}
    if 0 in sizes.values():
        raise FmsimError(f"--deployment {text}: a size is at least 1")
    given = base or Deployment()
    plain = given.model_dump() | {"n_gpus": None, "tp": 1, "dp": 1, "cp": 1, "ep": None}
    return Deployment(**(plain | sizes))


def _report(
    head: dict[str, Any],
    geometry: Geometry,
    servers: Sequence[Hardware],
    candidates: Sequence[Candidate],
    full: Candidate,
    options: Server,
    ask: Ask,
) -> dict[str, Any]:
    """A plan for each policy on each server; one that cannot be says why."""
    tokens = prompt_tokens(ask, geometry, "--context and --output")
    plans: list[dict[str, Any]] = []
    for hw in servers:
        placed = hw.placed
        on = {"hardware": hw.name, "title": hw.title, "deployment": placed.title}
        try:
            held = geometry.on_gpu(placed.tp)
            hw.kv_pool_bytes(held)
            full_demand = full.demand(held)
            on |= {"servers": placed.servers, "n_gpus": placed.n_gpus}
            on |= about_deployment(hw, held, geometry.kv_parts(placed.tp))
            on["deployment"] = placed.title
            for each in candidates:
                question = CapacityQuestion(
                    hw,
                    held,
                    each.demand(held),
                    options,
                    tokens,
                    ask.output_tokens,
                    ask.tpot_s,
                    ask.ttft_s,
                )
                found = plan(question, full_demand)
                kept = {
                    "policy": each.label,
                    "exact": each.exact,
                    "bound": each.bound,
                    "mass_kept": each.mass_kept,
                    "source": each.source,
                }
                price = _price(found, placed.n_gpus, placed.servers, ask.usd_per_gpu_hour)
                plans.append(on | kept | found | price)
        except FmsimError as error:
            plans.append(on | {"error": str(error)})
    if all("error" in row for row in plans):
        raise FmsimError(plans[0]["error"])
    return {"scenario": head, "policies": plans}


def prompt_tokens(ask: Ask, geometry: Geometry, options: str) -> int:
    """Tokens of a prompt: those asked for, or fewer, so that a prompt as long as the model reads
    leaves room for its answer. ``options`` are where they were asked for.

    Raises FmsimError where the model cannot read so many.
    """
    if geometry.max_positions is None:
        return ask.tokens
    geometry.check_context(max(ask.tokens, ask.output_tokens + 1), options)
    return min(ask.tokens, geometry.max_positions - ask.output_tokens)


def _price(
    found: dict[str, Any], n_gpus: int, servers: int, usd_per_gpu_hour: float | None
) -> dict[str, Any]:
    """Of all servers together, at the most requests."""
    speed = found["speed"]
    tokens_per_s = speed["tokens_per_s"] if speed else 0.0
    usd = None
    if usd_per_gpu_hour is not None and tokens_per_s:
        usd = usd_per_gpu_hour * n_gpus / 3600 / tokens_per_s * 1e6
    return {
        "all_requests": servers * found["max_requests"],
        "all_tokens_per_s": servers * tokens_per_s,
        "all_goodput_per_s": servers * found["goodput"]["requests_per_s"],
        "tokens_per_s_per_gpu": tokens_per_s / n_gpus,
        "usd_per_million_tokens": usd,
    }
