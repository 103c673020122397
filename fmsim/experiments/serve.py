"""From a scenario to what a server does with many requests: served one by one, or planned for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.experiments.results.folder import REQUESTS_NAME, ledger_path
from fmsim.experiments.results.rows import flat, write_rows
from fmsim.experiments.run import Setting, about, build_policies
from fmsim.experiments.workers.failures import TIMEOUT_S, Failure, guarded, lost, raise_if_all
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.experiments.workers.progress import Progress, StepsTold, Tally, silent
from fmsim.files import strict_json, write_text
from fmsim.frames import frame, html_table
from fmsim.policies.base import Policy
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.scenario import ScenarioFile
from fmsim.sim import metrics
from fmsim.sim.serving.banner import banner
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.log import request_rows
from fmsim.sim.serving.requests import repeated_share
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import RequestFile
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.sim.windows import intervals

SIMULATED = [
    "requests",
    "held",
    "tokens_per_s",
    "ttft_s",
    "tpot_s",
    "goodput_per_s",
    "stall_share",
    "bound",
    "in_use",
]

REPLAYED = 0.3  # of a policy's work is its replay, about; the rest is the serving

# Columns of a report in a notebook.
SHOWN = {
    "policy": "policy",
    "tokens_per_s": "tokens/s",
    "held": "requests held",
    "ttft_s_p50": "first token, median s",
    "tpot_s_p50": "a token, median s",
    "goodput_per_s": "good requests/s",
    "stall_share": "share of time stalled",
    "bound": "what binds",
}


@dataclass(frozen=True)
class ServingReport:
    """All policies' rows, and what they were made from."""

    scenario: dict[str, Any]
    policies: tuple[dict[str, Any], ...]
    ledgers: dict[str, Ledger]
    requests: dict[str, list[dict[str, Any]]]  # by policy, a row each
    failures: tuple[Failure, ...] = ()

    def __repr__(self) -> str:
        return f"<ServingReport of {self.scenario['name']}: {', '.join(self.ledgers)}>"

    @property
    def request_rows(self) -> list[dict[str, Any]]:
        """Of all policies, a row a request (`fmsim.sim.serving.log.request_rows`)."""
        return [{"policy": label} | row for label, rows in self.requests.items() for row in rows]

    def as_json(self) -> dict[str, Any]:
        """The object that `fmsim run --json` prints for a scenario with a workload."""
        return {
            "scenario": self.scenario,
            "policies": list(self.policies),
            "failed": [failure.row() for failure in self.failures],
        }

    def to_frame(self) -> Any:
        """A row a policy, one column a figure: a pandas DataFrame where pandas is installed, else a
        list of dicts.
        """
        return frame(self.flat_rows())

    def flat_rows(self) -> list[dict[str, Any]]:
        """A row a policy, one column a figure."""
        return [flat(row, leave=("over_time", "memory")) for row in self.policies]

    def _repr_html_(self) -> str:
        hw, name = self.scenario["hardware"], self.scenario["name"]
        caption = f"{name}: {self.scenario['model']['name']} on {hw['title']}. Simulated."
        return html_table(caption, SHOWN, [flat(row) for row in self.policies])

    def save(self, folder: Path) -> None:
        """Write report.json and each policy's ledger; every file appears whole or not at all."""
        try:
            for label, ledger in self.ledgers.items():
                ledger.save(ledger_path(folder, label))
            write_rows(folder / REQUESTS_NAME, self.request_rows)
            write_text(folder / "report.json", strict_json.dump(self.as_json(), indent=1) + "\n")
        except OSError as error:
            raise FmsimError(
                f"--out {folder}: cannot be written ({error.strerror or error}); choose another"
                " folder"
            ) from None


def serve_scenario(
    file: ScenarioFile,
    progress: Progress = silent,
    timeout_s: float = TIMEOUT_S,
) -> ServingReport:
    """Serve the scenario's workload under each of its selected policies.

    `progress` is told (label, done, total) as they go on; half a policy is 0.5. A policy that
    fails, or takes longer than `timeout_s`, is among the report's failures. Raises FmsimError for
    whatever the user can mend, and where none succeeds.
    """
    source = _source(file)  # so that a mistake in a request file is told first
    setting, policies = Setting(file), build_policies(file)
    replayer = setting.replayer(policies)

    def work(index: int) -> ServedPolicy | Failure:
        label, policy = policies[index]
        return guarded(label, lambda: serve_policy(setting, replayer, label, policy))

    served: list[ServedPolicy] = []
    failures: list[Failure] = []
    progress(policies[0][0], 0, len(policies))
    tally = Tally([label for label, _ in policies], len(policies), progress)
    gone = lambda index, why: lost(policies[index][0], why)
    for result in in_parallel(work, len(policies), gone, timeout_s, tally):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            served.append(result)
    raise_if_all(tuple(failures), len(served))
    head = about(setting) | {
        "workload": _about_workload(file, source),
        "simulated": SIMULATED,
        "replayed": ["mass_kept", "entry_recall"],
    }
    return ServingReport(
        head,
        tuple(each.row for each in served),
        {each.row["policy"]: each.ledger for each in served},
        {each.row["policy"]: each.requests for each in served},
        tuple(failures),
    )


@dataclass(frozen=True)
class ServedPolicy:
    """One policy's row of a report, the ledger that its requests replay, and a row of each."""

    row: dict[str, Any]
    ledger: Ledger
    requests: list[dict[str, Any]]


def serve_policy(setting: Setting, replayer: Replayer, label: str, policy: Policy) -> ServedPolicy:
    """Serve the scenario's workload under one policy."""
    ledger = replayer.run(policy, StepsTold(replayer.n_steps, end=REPLAYED).watch)
    demand = Demand(ledger, setting.geometry, setting.layer_map)
    options, source = setting.file.scenario.server, _source(setting.file)
    prompt, output = (
        round(float(np.mean(lengths))) for lengths in zip(*(row[1:3] for row in source.first))
    )
    memory = banner(setting.hw, setting.geometry, demand, options, prompt, output)
    servers = setting.hw.placed.servers
    serving = StepsTold(len(source.first), start=REPLAYED)
    runs = [
        ServerRun(setting.hw, setting.geometry, demand, options, part, serving.advance)
        for part in source.dealt(servers)
    ]
    for run in runs:
        run.run()
    row: dict[str, Any] = {"policy": label, "exact": metrics.exact(ledger)}
    row["bound_policy"] = policy.evidence == "future"
    row |= metrics.kept(ledger, setting.layer_map) | summary(*runs)
    row |= {"ci95": intervals(ledger, setting.layer_map), "memory": memory}
    return ServedPolicy(row, ledger, request_rows([run.log for run in runs], source.workload.slo))


def _source(file: ScenarioFile) -> RequestGenerator:
    workload = file.scenario.workload
    path = file.file(workload.file) if isinstance(workload, RequestFile) else None
    try:
        return RequestGenerator(workload, path)
    except FmsimError as error:
        raise FmsimError(f"{file.where(('workload',))}: {error}") from None


def _about_workload(file: ScenarioFile, source: RequestGenerator) -> dict[str, Any]:
    workload = file.scenario.workload
    prompts, outputs = (np.array(lengths) for lengths in zip(*(row[1:3] for row in source.first)))
    about = workload.model_dump(mode="json") | {
        "first_requests": len(source.first),
        "prompt_tokens_mean": float(prompts.mean()),
        "output_tokens_mean": float(outputs.mean()),
        "server": file.scenario.server.model_dump(mode="json"),
    }
    if isinstance(workload, RequestFile):
        about["repeated_prompt_share"] = repeated_share(source.first)
    return about
