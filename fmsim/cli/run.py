"""`fmsim run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmsim.cli import deployment
from fmsim.cli.options import (
    TIMEOUT_S,
    Columns,
    Csv,
    Lines,
    NoVerify,
    PolicyTimeout,
    Quiet,
    Verbose,
    Wide,
    echo_csv,
    end_with_failures,
    one_thread_a_process,
)
from fmsim.cli.progress import bar

OUTPUT_TOKENS = 1024  # of a request, and
TPOT_MS = 50.0  # a token, where there is no scenario: as `fmsim plan` asks by default

if TYPE_CHECKING:
    from fmsim.experiments.run import Report
    from fmsim.experiments.serve import ServingReport
    from fmsim.report.grid import View
    from fmsim.scenario import ScenarioFile


def run(
    scenario: Annotated[
        Path | None,
        typer.Argument(
            help="scenario file (.yaml), a trace, or with --format a capture; none: sizes, walls"
            " and the full cache's time of --model"
        ),
    ] = None,
    policy: Annotated[
        list[str], typer.Option("--policy", "-p", help="run only this one; repeat for more")
    ] = [],
    override: Annotated[
        list[str],
        typer.Option("--set", "-s", help="key=value, e.g. batch=8, policies.lsa.budget=20%"),
    ] = [],
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object instead of the table")
    ] = False,
    as_csv: Csv = False,
    as_lines: Lines = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="print the table as Markdown")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="folder for report.json, ledgers and timelines")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(help="with a workload: write a row a request here, .csv or .parquet"),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="write the table as a picture")] = None,
    wide: Wide = False,
    columns: Columns = None,
    policy_timeout: PolicyTimeout = TIMEOUT_S,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    model: Annotated[
        str | None, typer.Option(help="a preset (`fmsim model list`), a config.json or layer specs")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="h100, h200, h20, b200 or a file")] = None,
    capture: Annotated[
        str | None,
        typer.Option(
            "--format", help="SCENARIO is an engine's capture: sglang, vllm, miles, npy or csv"
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000_000, help="of a capture's prompt, where the file does not say"
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", "-c", help="without a scenario: prompt tokens, such as 512K"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="requests side by side; the scenario's by default")
    ] = None,
    beyond_positions: Annotated[
        bool,
        typer.Option("--beyond-positions", help="contexts longer than the model knows"),
    ] = False,
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
    """Replay a trace under policies and print what each keeps, moves and costs.

    A scenario with a `workload` block serves many requests instead, each of which replays the
    trace, and prints what the server holds, how fast it is, and what binds.

    \b
    fmsim run scenarios/500k.yaml
    fmsim run scenarios/500k.yaml -p lsa -p lru --set hardware=h200 --set batch=16
    fmsim run scenarios/500k.yaml --set "budgets=[8% gpu, 0.5 GiB gpu]"
    fmsim run scenarios/500k.yaml -p lru -p my_policy.py:MyPolicy:budget=10%
    fmsim run scenarios/500k.yaml --json --out results
    fmsim run scenarios/500k.yaml --dp 8 --set batch=64
    fmsim run scenarios/serve.yaml --set workload.duration_s=60 --set server.prefill=chunked
    fmsim run v3.2.safetensors --model v3.2 --hardware h200
    fmsim run response.json --format sglang --model v3.2 --hardware h200
    fmsim run --model v4.1-flash --hardware h200 --context 512K
    """
    one_thread_a_process()
    from fmsim.errors import FmsimError
    from fmsim.experiments.results.folder import failed_altogether, writing
    from fmsim.report.grid import View
    from fmsim.report.tables import decode as table
    from fmsim.report.tables import serving

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
    if scenario is None:
        given_in_vain = {"--policy": policy, "--set": override, "--out": out, "--format": capture}
        _without_trace(
            given_in_vain,
            model,
            hardware,
            context,
            batch,
            beyond_positions,
            placed,
            as_json,
            svg,
            (wide, columns),
        )
        return
    if context is not None:
        raise FmsimError("--context: a trace has its own; give it without a scenario")
    given = {"model": model, "hardware": hardware, "batch": batch}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    overrides += ["beyond_positions=true"] * beyond_positions
    overrides += [*override, *placed]
    file = _scenario(scenario, overrides, policy, capture, model, prompt_tokens, out)
    shown = table if file.scenario.workload is None else serving
    if requests is not None and file.scenario.workload is None:
        raise FmsimError("--requests: this scenario has no workload, so there are no requests")
    view = View.of_terminal(wide, columns)
    shown.check(view)
    with writing(out):
        report = _with_progress(file, quiet, policy_timeout)
        plain = report.as_json()
        try:
            if out is not None:
                report.save(out)
            if svg is not None:
                _write_svg(svg, shown.svg(plain, f"fmsim run {scenario}"))
            if requests is not None:
                _write_requests(requests, report)
        finally:  # a full disk loses files, not the table
            if as_json:
                from fmsim.files import strict_json

                typer.echo(strict_json.dump(plain))
            elif as_csv:
                echo_csv(report.flat_rows())
            elif as_lines:
                from fmsim.experiments.results.rows import json_lines

                typer.echo(json_lines(report.flat_rows()), nl=False)
            elif as_markdown:
                _told(
                    lambda view: typer.echo(shown.markdown(plain, view), nl=False),
                    View.of_terminal(True, columns),
                )
            else:
                _told(lambda view: shown.show(plain, view), view)
    end_with_failures(failed_altogether(plain))


def _told(tell: Callable[[View], object], view: View) -> None:
    """`tell` of the columns that were asked for; where this run's table lacks one that others have,
    of all, for it may have taken hours.
    """
    from fmsim.report.grid import UnknownColumn

    try:
        tell(view)
    except UnknownColumn:
        tell(replace(view, columns=()))
        raise


def _without_trace(
    in_vain: dict[str, Any],
    model: str | None,
    hardware: str | None,
    context: str | None,
    batch: int | None,
    beyond_positions: bool,
    placed: list[str],
    as_json: bool,
    svg: Path | None,
    shown: tuple[bool, str | None],
) -> None:
    """Sizes, walls and the full cache's time of a model, which need no selections."""
    from fmsim.cli.options import parse_tokens
    from fmsim.errors import FmsimError
    from fmsim.experiments.plan import Ask
    from fmsim.experiments.untraced import run_untraced
    from fmsim.hw import load_hardware
    from fmsim.report.grid import View
    from fmsim.report.tables import untraced

    if model is None:
        raise FmsimError(
            "run: give a scenario, a trace or a capture; or --model for sizes, walls and the"
            " full cache's time, which need none"
        )
    for option, value in in_vain.items():
        if value:
            raise FmsimError(
                f"{option}: needs a scenario, a trace or a capture, which `fmsim run` was not given"
            )
    hw = load_hardware(hardware or "h100").deployed(deployment.parsed(placed))
    ask = Ask(
        parse_tokens("--context", context or "128K"),
        output_tokens=OUTPUT_TOKENS,
        tpot_s=TPOT_MS / 1e3,
        beyond_positions=beyond_positions,
    )
    report = run_untraced(model, hw, ask, batch or 1)
    if svg is not None:
        _write_svg(svg, untraced.svg(report, f"fmsim run --model {model}"))
    if as_json:
        from fmsim.files import strict_json

        typer.echo(strict_json.dump(report))
    else:
        untraced.show(report, View.of_terminal(*shown))


def _scenario(
    path: Path,
    overrides: list[str],
    policies: list[str],
    capture: str | None,
    model: str | None,
    prompt_tokens: int | None,
    out: Path | None,
) -> ScenarioFile:
    """The scenario of a file; of a trace or a capture one with every policy that it can drive."""
    from fmsim.errors import FmsimError
    from fmsim.experiments.captures import captured
    from fmsim.scenario import ScenarioFile, shipped

    if capture is not None:
        return captured.of_capture(path, capture, model, prompt_tokens, overrides, policies, out)
    if prompt_tokens is not None:
        raise FmsimError("--prompt-tokens is about a capture; give --format as well")
    path = shipped.trace(path) or path
    if path.suffix == ".safetensors":
        return captured.of_trace(path, overrides, policies)
    return ScenarioFile(path, overrides, policies)


def _with_progress(file: ScenarioFile, quiet: bool, timeout_s: float) -> Report | ServingReport:
    with bar("reading the trace", quiet=quiet) as show:
        import fmsim

        run = fmsim.run_scenario if file.scenario.workload is None else fmsim.simulate_server
        return run(file, progress=show, timeout_s=timeout_s)


def _write_requests(path: Path, report: Report | ServingReport) -> None:
    from fmsim.errors import FmsimError
    from fmsim.experiments.results.rows import write_rows
    from fmsim.experiments.serve import ServingReport

    assert isinstance(report, ServingReport)  # there is a workload
    try:
        write_rows(path, report.request_rows)
    except OSError as error:
        raise FmsimError(
            f"--requests {path}: cannot be written ({error.strerror}); choose another place"
        ) from None


def _write_svg(path: Path, text: str) -> None:
    from fmsim.errors import FmsimError
    from fmsim.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise FmsimError(
            f"--svg {path}: cannot be written ({error.strerror}); choose another place"
        ) from None
