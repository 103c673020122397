"""From a scenario to what a server does with many requests: served one by one, or planned for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.experiments.parallel import in_parallel
from fmsim.experiments.run import Setting, about, build_policies
from fmsim.files import write_text
from fmsim.policies.base import Policy
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.scenario import ScenarioFile
from fmsim.sim import metrics
from fmsim.sim.serving.banner import banner
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.requests import repeated_share
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import RequestFile
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator

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


@dataclass(frozen=True)
class ServingReport:
    """All policies' rows, and what they were made from."""

    scenario: dict[str, Any]
    policies: tuple[dict[str, Any], ...]
    ledgers: dict[str, Ledger]

    def as_json(self) -> dict[str, Any]:
        """The object that `fmsim run --json` prints for a scenario with a workload."""
        return {"scenario": self.scenario, "serving": list(self.policies)}

    def save(self, folder: Path) -> None:
        """Write report.json and each policy's ledger; every file appears whole or not at all."""
        try:
            for label, ledger in self.ledgers.items():
                ledger.save(folder / "ledgers" / f"{re.sub(r'[^-.+0-9A-Za-z_]', '_', label)}.npz")
            write_text(folder / "report.json", json.dumps(self.as_json(), indent=1) + "\n")
        except OSError as error:
            raise FmsimError(
                f"--out {folder}: cannot be written ({error.strerror or error}); choose another"
                " folder"
            ) from None


def serve_scenario(
    file: ScenarioFile,
    selected: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> ServingReport:
    """Serve the scenario's workload under each of its policies, or those `selected` by label or
    name.

    `progress` is told (label, done, total) as they finish. Raises FmsimError for whatever the user
    can mend.
    """
    source = _source(file)  # so that a mistake in a request file is told first
    setting, policies = Setting(file), build_policies(file, selected)
    replayer = setting.replayer(policies)
    rows, ledgers = [], {}
    progress(policies[0][0], 0, len(policies))
    for row, ledger in in_parallel(
        lambda index: serve_policy(setting, replayer, *policies[index]), len(policies)
    ):
        rows.append(row)
        ledgers[row["policy"]] = ledger
        progress(row["policy"], len(rows), len(policies))
    head = about(setting) | {
        "workload": _about_workload(file, source),
        "simulated": SIMULATED,
        "replayed": ["mass_kept", "entry_recall"],
    }
    return ServingReport(head, tuple(rows), ledgers)


def serve_policy(
    setting: Setting, replayer: Replayer, label: str, policy: Policy
) -> tuple[dict[str, Any], Ledger]:
    """One policy's row of a report, and the ledger that its requests replay."""
    ledger = replayer.run(policy)
    demand = Demand(ledger, setting.geometry, setting.layer_map)
    options, source = setting.file.scenario.server, _source(setting.file)
    prompt, output = (
        round(float(np.mean(lengths))) for lengths in zip(*(row[1:] for row in source.first))
    )
    memory = banner(setting.hw, setting.geometry, demand, options, prompt, output)
    servers = setting.hw.placed.servers
    runs = [
        ServerRun(setting.hw, setting.geometry, demand, options, part)
        for part in source.dealt(servers)
    ]
    for run in runs:
        run.run()
    kept = {"exact": metrics.exact(ledger)} | metrics.kept(ledger, setting.layer_map)
    return {"policy": label} | kept | summary(*runs) | {"memory": memory}, ledger


def _source(file: ScenarioFile) -> RequestGenerator:
    workload = file.scenario.workload
    path = file.file(workload.file) if isinstance(workload, RequestFile) else None
    try:
        return RequestGenerator(workload, path)
    except FmsimError as error:
        raise FmsimError(f"{file.where(('workload',))}: {error}") from None


def _about_workload(file: ScenarioFile, source: RequestGenerator) -> dict[str, Any]:
    workload = file.scenario.workload
    prompts, outputs = (np.array(lengths) for lengths in zip(*(row[1:] for row in source.first)))
    about = workload.model_dump(mode="json") | {
        "first_requests": len(source.first),
        "prompt_tokens_mean": float(prompts.mean()),
        "output_tokens_mean": float(outputs.mean()),
        "server": file.scenario.server.model_dump(mode="json"),
    }
    if isinstance(workload, RequestFile):
        about["repeated_prompt_share"] = repeated_share(file.file(workload.file))
    return about
