"""`fmsim sweep`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from fmsim.cli import deployment
from fmsim.cli.options import (
    TIMEOUT_S,
    Columns,
    Csv,
    NoVerify,
    PolicyTimeout,
    Quiet,
    Verbose,
    Wide,
    one_thread_a_process,
    print_found,
)
from fmsim.cli.progress import bar
from fmsim.errors import ExitCode


class Runner(enum.StrEnum):
    local = "local"
    ray = "ray"


def sweep(
    scenario: Annotated[Path, typer.Argument(help="scenario file (.yaml)")],
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            "-g",
            help="KEY=VALUE,VALUE,...: a key of --set, and a YAML list; repeat for more keys",
        ),
    ],
    policy: Annotated[
        list[str], typer.Option("--policy", "-p", help="run only this one; repeat for more")
    ] = [],
    override: Annotated[
        list[str], typer.Option("--set", "-s", help="key=value, the same in all runs")
    ] = [],
    out: Annotated[
        Path,
        typer.Option(
            help="file that gets one row a run: JSON lines, or Parquet if it ends in .parquet"
        ),
    ] = Path("sweep.jsonl"),
    max_runs: Annotated[
        int, typer.Option(min=1, help="refuse a grid of more runs than this")
    ] = 10_000,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="processes; by default one a core")
    ] = None,
    engine: Annotated[
        Runner, typer.Option(help="where to run: this machine's processes, or a Ray cluster")
    ] = Runner.local,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the sweep's rows as one JSON list")
    ] = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
    policy_timeout: PolicyTimeout = TIMEOUT_S,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    gpus: deployment.Gpus = None,
    tp: deployment.Tp = None,
    dp: deployment.Dp = None,
    ep: deployment.Ep = None,
    cp: deployment.Cp = None,
    servers: deployment.Servers = None,
    weights: deployment.Weights = None,
    serving_engine: deployment.Engine = None,
    kv_pool_tokens: deployment.PoolTokens = None,
    kv_pool_bytes: deployment.PoolBytes = None,
    mem_fraction: deployment.MemFraction = None,
    start_log: deployment.StartLog = None,
) -> None:
    """Run a scenario's policies under every combination of settings, and collect a row a run.

    \b
    fmsim sweep scenarios/500k.yaml --grid policies.lsa.budget=5%,10%,20% --grid hardware=h100,h200
    fmsim sweep scenarios/500k.yaml -p lru -p lfu --grid "policies.*.budget=2x topk,4x topk" \\
      --out lru.parquet
    fmsim sweep scenarios/500k.yaml --grid hardware_figures.link_bytes_per_s=27e9,55e9,110e9 \\
      --grid batch=1,16
    fmsim sweep scenarios/serve.yaml --grid workload.rate_per_s=1,2,4 \\
      --grid server.mirror=per_gpu,shared

    A key policies.LABEL.PARAMETER varies that policy alone; "*" is every policy. A value that holds
    a comma goes in brackets or quotes, as in YAML: layer_map=[0,0,1],[0,1,1].

    A row is written as its run ends. Killed and started again, the same command runs what is left
    or failed, and nothing else twice: a run is known by a digest of its policy, settings, hardware
    figures, workload and trace. A run that cannot be (its KV does not fit) gets a row with an
    "error". Where a policy failed, or nothing fits, the exit code is 1.

    --engine ray uses the cluster at RAY_ADDRESS, else one of its own on this machine; every node
    must see the scenario and its trace at the same paths.
    """
    import fmsim

    one_thread_a_process()
    from fmsim.experiments.workers.parallel import cores
    from fmsim.report.tables import sweep as rows_table

    placed = deployment.overrides(
        n_gpus=gpus,
        tp=tp,
        dp=dp,
        ep=ep,
        cp=cp,
        servers=servers,
        weights=weights,
        engine=serving_engine,
        kv_pool_tokens=kv_pool_tokens,
        kv_pool_bytes=kv_pool_bytes,
        mem_fraction=mem_fraction,
        start_log=start_log,
    )
    made = 0
    with bar("sweep", quiet=quiet) as show:

        def progress(label: str, done: float, total: int) -> None:
            nonlocal made
            made = int(done)
            show(label or "sweep", done, total)

        rows = fmsim.sweep_scenario(
            scenario,
            grid,
            policy,
            [*override, *placed],
            out=out,
            jobs=jobs or cores(),
            on_ray=engine is Runner.ray,
            max_runs=max_runs,
            timeout_s=policy_timeout,
            progress=progress,
        )
    note = f"{made} of {len(rows)} runs done now, the others before; rows in {out}"
    print_found(
        rows,
        rows,
        lambda: rows_table.parts(rows, note),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )
    if any(row.get("failed") for row in rows) or (rows and all("error" in row for row in rows)):
        raise typer.Exit(ExitCode.FAILED)
