"""`fmsim validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fmsim.cli.extras import require
from fmsim.cli.options import (
    TIMEOUT_S,
    Columns,
    NoVerify,
    PolicyTimeout,
    Quiet,
    Verbose,
    Wide,
    end_with_failures,
)
from fmsim.cli.progress import Show, bar


def validate(
    scenario: Annotated[Path, typer.Argument(help="scenario file (.yaml)")],
    policy: Annotated[
        list[str], typer.Option("--policy", "-p", help="check only this one; repeat for more")
    ] = [],
    override: Annotated[
        list[str], typer.Option("--set", "-s", help="key=value, as in `fmsim run`")
    ] = [],
    whole_steps: Annotated[
        bool,
        typer.Option(
            "--whole-steps",
            help="decode with random weights of the scenario's model too, and compare step times",
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; cuda where there is one by default")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object instead of the table")
    ] = False,
    wide: Wide = False,
    columns: Columns = None,
    policy_timeout: PolicyTimeout = TIMEOUT_S,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run policies in both worlds on one trace: the replay in numpy, and the engine's loop in torch
    over a tiered cache whose bytes are really moved.

    Resident sets must be the same slot for slot at every step, and a request must take what is
    predicted of the GPU's memory, within 1%. The exit code is 1 where something differs.

    \b
    fmsim validate scenarios/32k.yaml
    fmsim validate scenarios/32k.yaml -p lru -p lsa --json
    fmsim hw calibrate --model scenarios/one-gpu --out mine.yaml
    fmsim validate scenarios/one-gpu/500k.yaml --set hardware=$PWD/mine.yaml --whole-steps
    """
    require("model", "validate")
    from fmsim.experiments.results import failed_altogether

    with bar("starting torch", quiet=quiet) as show:
        report = _validated(scenario, policy, override, device, whole_steps, policy_timeout, show)
    if as_json:
        import json

        typer.echo(json.dumps(report))
    else:
        from fmsim.report.grid import View
        from fmsim.report.tables import validation

        validation.show(report, View.of_terminal(wide, columns))
    end_with_failures(failed_altogether(report))
    if not all(row["identical"] and row["memory_holds"] for row in report["policies"]):
        raise typer.Exit(1)


def _validated(
    scenario: Path,
    policies: list[str],
    overrides: list[str],
    device: str | None,
    whole_steps: bool,
    timeout_s: float,
    show: Show,
) -> dict[str, Any]:
    """The report; torch, which takes seconds to import, comes after the bar."""
    import torch

    from fmsim.errors import FmsimError
    from fmsim.experiments.validate import validate_scenario
    from fmsim.scenario import ScenarioFile

    if device == "cuda" and not torch.cuda.is_available():
        raise FmsimError("--device cuda: torch finds no CUDA device here; use --device cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    file = ScenarioFile(scenario, overrides, policies)
    return validate_scenario(file, device, show, whole_steps, timeout_s)
