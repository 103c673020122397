"""`fmsim tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmsim.cli.options import (
    MOST_SEED,
    TIMEOUT_S,
    Columns,
    Csv,
    NoVerify,
    PolicyTimeout,
    Quiet,
    Verbose,
    Wide,
    finite,
    print_found,
)
from fmsim.cli.progress import bar

if TYPE_CHECKING:
    from fmsim.experiments.tune import Trial, Tuning
    from fmsim.scenario import ScenarioFile


def tune(
    scenario: Annotated[Path, typer.Argument(help="scenario file (.yaml)")],
    policy: Annotated[
        str,
        typer.Option(
            "--policy", "-p", help="the policy to tune: an entry's label, or a policy's name"
        ),
    ],
    range_: Annotated[
        list[str],
        typer.Option(
            "--range", "-r", help="KEY=LOW..HIGH, KEY=VALUE,VALUE,... or KEY; repeat for more"
        ),
    ] = [],
    floor: Annotated[
        float,
        typer.Option(
            min=0, max=1, callback=finite, help="least share of the attention mass to keep"
        ),
    ] = 0.95,
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="settings to try")] = 50,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="the same seed tries the same settings")
    ] = 0,
    override: Annotated[
        list[str], typer.Option("--set", "-s", help="key=value, e.g. batch=8, hardware=h200")
    ] = [],
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object: best, pareto, trials, failed")
    ] = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
    study: Annotated[
        Path, typer.Option(help="file of JSON lines that keeps trials, so that a search goes on")
    ] = Path("tune.jsonl"),
    policy_timeout: PolicyTimeout = TIMEOUT_S,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search a policy's parameters for the most tokens/s with the attention mass kept above a
    floor.

    \b
    fmsim tune scenarios/500k.yaml -p lsa --floor 0.9
    fmsim tune scenarios/500k.yaml -p lsa --range budget=2%..30% --range threshold=0.1..0.9 \\
      --trials 100
    fmsim tune scenarios/500k.yaml -p lru --range "budget=1x topk..8x topk" --range granularity \\
      --set batch=16

    Of a scenario with a workload the most requests a second that keep its slo are searched for.

    Without --range, all parameters are searched whose schema says what they may be (see `fmsim
    policy show`), and the budget from 1% to 50%. Shown is the Pareto front of speed and mass
    kept; the best at or above the floor is marked.
    """
    from fmsim.experiments.tune import ranges_of
    from fmsim.report.tables import sweep as rows_table
    from fmsim.scenario import ScenarioFile

    file = ScenarioFile(scenario, override, [policy])
    label, named = file.selected[0].label, file.selected[0].policy
    ranges = ranges_of(named, range_)
    found = _with_progress(file, label, ranges, trials, floor, seed, quiet, study, policy_timeout)
    print_found(
        _whole(found),
        _rows(found, label),
        lambda: rows_table.parts(_rows(found, label), _note(found)),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


def _whole(found: Tuning) -> dict[str, Any]:
    """The best setting, the Pareto front, all trials, and what could not run."""
    return {
        "best": _plain(found.best) if found.best else None,
        "pareto": [*map(_plain, found.front)],
        "trials": [*map(_plain, found.trials)],
        "failed": [{"values": values, "error": error} for values, error in found.failed],
    }


def _with_progress(
    file: ScenarioFile,
    policy: str,
    ranges: list,
    trials: int,
    floor: float,
    seed: int,
    quiet: bool,
    study: Path,
    timeout_s: float,
) -> Tuning:
    from fmsim.experiments.results.rows import RowFile
    from fmsim.experiments.tune import tune as search

    with bar(policy, total=trials, quiet=quiet) as show:

        def progress(done: int, tuning: Tuning) -> None:
            best = "none above the floor yet"
            if tuning.best:
                speed = tuning.best.objectives[0]
                served = "goodput_per_s" in tuning.best.figures
                best = f"{speed:.3f} good requests/s" if served else f"{speed:.1f} tokens/s"
            show(f"{policy}: {best}", done, trials)

        with RowFile(study, "--study") as kept:
            return search(file, ranges, trials, floor, seed, progress, kept, timeout_s)


def _plain(trial: Trial) -> dict[str, Any]:
    return {"values": trial.values, "exact": trial.exact} | {
        name: value for name, value in trial.figures.items() if name != "policy"
    }


def _rows(found: Tuning, policy: str) -> list[dict[str, Any]]:
    """The Pareto front, a row a setting."""
    from fmsim.experiments.results.rows import flat

    return [
        flat(trial.figures)
        | {"policy": f"{policy}, best" if trial is found.best else policy}
        | {f"set.{name}": value for name, value in trial.values.items()}
        for trial in found.front
    ]


def _note(found: Tuning) -> str:
    above = (
        f"the best that keeps {found.floor:.0%} of the mass is marked"
        if found.best
        else f"none keeps {found.floor:.0%} of the mass"
    )
    failed = f", {len(found.failed)} could not run" if found.failed else ""
    return f"Pareto front of {len(found.trials)} settings{failed}; {above}"
