"""`fmsim validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmsim.cli.extras import require
from fmsim.cli.given import device_given
from fmsim.cli.options import (
    TIMEOUT_S,
    Columns,
    Csv,
    NoVerify,
    PolicyTimeout,
    Quiet,
    Verbose,
    Wide,
    end_with_failures,
    print_found,
)
from fmsim.cli.progress import Show, bar

if TYPE_CHECKING:
    from fmsim.scenario import ScenarioFile


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
    batch: Annotated[
        list[int],
        typer.Option(min=1, help="whole steps of so many requests together; repeat for more"),
    ] = [],
    steps: Annotated[
        int | None, typer.Option(min=1, help="only so many steps of each trace, of whole steps")
    ] = None,
    trace: Annotated[
        list[str], typer.Option(help="another trace than the scenario's; repeat for more contexts")
    ] = [],
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; cuda where there is one by default")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object instead of the table")
    ] = False,
    as_csv: Csv = False,
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
    fmsim validate scenarios/one-gpu/500k.yaml --set hardware=$PWD/mine.yaml --whole-steps \\
        --batch 1 --batch 12 --steps 136 --trace traces/nano-32k-needles.safetensors
    """
    require("model", "validate")
    from fmsim.errors import FmsimError
    from fmsim.experiments.results.folder import failed_altogether
    from fmsim.scenario import ScenarioFile

    if (batch or steps) and not whole_steps:
        raise FmsimError("--batch and --steps are of whole steps; give --whole-steps too")
    other_traces = [[f"trace={Path(name).resolve()}"] for name in trace] or [[]]
    with bar("starting torch", quiet=quiet) as show:
        files = [ScenarioFile(scenario, override + other, policy) for other in other_traces]
        report = _validated(files, device, whole_steps, batch, steps, policy_timeout, show)
    from fmsim.report.tables import validation

    print_found(
        report,
        report["policies"],
        lambda: validation.parts(report),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )
    end_with_failures(failed_altogether(report))
    if not all(row["identical"] and row["memory_holds"] for row in report["policies"]):
        raise typer.Exit(1)


def _validated(
    files: list[ScenarioFile],
    device: str | None,
    whole_steps: bool,
    batches: list[int],
    steps: int | None,
    timeout_s: float,
    show: Show,
) -> dict[str, Any]:
    """The report; torch, which takes seconds to import, comes after the bar."""
    import torch

    from fmsim.experiments.validate import validate_scenarios
    from fmsim.experiments.whole_steps import WholeSteps

    device = device_given(device, torch.cuda.is_available())
    whole = WholeSteps(tuple(batches), steps) if whole_steps else None
    return validate_scenarios(files, device, show, whole, timeout_s)
