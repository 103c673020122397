"""`fmsim plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    scenario: Annotated[
        Path, typer.Argument(help="scenario file (.yaml): its trace, policies and server")
    ],
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            "-c",
            help="tokens of a prompt, e.g. 512K or 100000; by default the trace's",
        ),
    ] = None,
    output: Annotated[str, typer.Option("--output", help="tokens that a request makes")] = "1K",
    tpot_ms: Annotated[
        float,
        typer.Option("--tpot", min=0.001, help="longest time a token that is acceptable, in ms"),
    ] = 50.0,
    policy: Annotated[
        list[str], typer.Option("--policy", "-p", help="only this one; repeat for more")
    ] = [],
    model: Annotated[str | None, typer.Option(help="v4-flash, v4-pro, or a config.json")] = None,
    hardware: Annotated[str | None, typer.Option(help="h100, h200, h20 or b200")] = None,
    override: Annotated[
        list[str], typer.Option("--set", "-s", help="key=value, e.g. server.mirror=shared")
    ] = [],
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object instead of the tables")
    ] = False,
) -> None:
    """How many requests of one size a server takes at once, what the wall is, and what would move
    it.

    \b
    fmsim plan scenarios/500k.yaml --context 512K
    fmsim plan scenarios/500k.yaml -c 256K -p lsa -p full --hardware h200 --tpot 30
    fmsim plan scenarios/500k.yaml -c 1M --set server.mirror=shared --set policies.lsa.budget=5% \\
      --json

    Walls: GPU memory and host memory (their pools over one request's bytes), PCIe (recalls and
    misses of a step take as long as its computing), compute (a step takes --tpot), and the
    scenario's server.max_batch. The crossover is where the policy makes more tokens a second than
    the full cache on the same GPUs.
    """
    from fmsim.experiments.serve import plan_scenario
    from fmsim.report.tables import plan as plan_table
    from fmsim.scenario import ScenarioFile

    given = {"model": model, "hardware": hardware}
    overrides = [
        *override,
        *(f"{key}={value}" for key, value in given.items() if value is not None),
    ]
    tokens = None if context is None else _tokens("--context", context)
    report = plan_scenario(
        ScenarioFile(scenario, overrides),
        policy,
        tokens,
        _tokens("--output", output),
        tpot_ms / 1e3,
    )
    if as_json:
        import json

        typer.echo(json.dumps(report))
    else:
        plan_table.show(report)


def _tokens(option: str, text: str) -> int:
    """512K is 512 * 1024."""
    from fmsim.errors import FmsimError

    units = {"K": 2**10, "M": 2**20}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        tokens = round(float(number) * unit)
    except ValueError:
        tokens = 0
    if tokens < 1:
        raise FmsimError(f"{option} {text}: give a number of tokens, such as 512K, 1M or 100000")
    return tokens
