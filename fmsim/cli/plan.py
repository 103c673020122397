"""`fmsim plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fmsim.cli import deployment
from fmsim.cli.options import (
    TIMEOUT_S,
    Columns,
    Csv,
    NoVerify,
    PolicyTimeout,
    Wide,
    echo_csv,
    end_with_failures,
    one_thread_a_process,
    parse_tokens,
)


def plan(
    scenario: Annotated[
        Path | None,
        typer.Argument(
            help="scenario file (.yaml): its trace, policies and server; without one, policies as"
            " published figures have them"
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            "-c",
            help="tokens of a prompt, e.g. 512K or 100000; by default the trace's, or 128K",
        ),
    ] = None,
    output: Annotated[str, typer.Option("--output", help="tokens that a request makes")] = "1K",
    tpot: Annotated[
        str, typer.Option("--tpot", help="longest time a token that is acceptable: 50, 50ms, 0.05s")
    ] = "50ms",
    ttft: Annotated[
        str | None,
        typer.Option("--ttft", help="longest time to a first token: 20s, 20000ms; none asked"),
    ] = None,
    policy: Annotated[
        list[str], typer.Option("--policy", "-p", help="only this one; repeat for more")
    ] = [],
    model: Annotated[
        str | None, typer.Option(help="a preset (`fmsim model list`), a config.json or layer specs")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="one or more of fmsim hw list: h100,h200,b200")
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            "--deployment",
            "-d",
            help="one or more: tp8,dp8,tp2dp4; without a scenario, tensor- and data-parallel",
        ),
    ] = None,
    usd_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="price, for dollars a million tokens")
    ] = None,
    override: Annotated[
        list[str], typer.Option("--set", "-s", help="key=value, e.g. server.mirror=shared")
    ] = [],
    beyond_positions: Annotated[
        bool, typer.Option("--beyond-positions", help="contexts longer than the model knows")
    ] = False,
    wide: Wide = False,
    columns: Columns = None,
    policy_timeout: PolicyTimeout = TIMEOUT_S,
    no_verify: NoVerify = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object instead of the tables")
    ] = False,
    as_csv: Csv = False,
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
    """How many requests of one size servers take, how fast and at what price, what the wall is,
    what would move it, and whether KV on the host pays.

    \b
    fmsim plan --model v4-flash --hardware h100,h200,b200 --context 512K --tpot 50
    fmsim plan scenarios/500k.yaml --context 512K
    fmsim plan scenarios/500k.yaml -c 256K -p lsa -p full --hardware h200,b200 -d tp8,dp8
    fmsim plan scenarios/500k.yaml -c 1M --set server.mirror=shared --json

    Walls: GPU memory and host memory (their pools over one request's bytes), PCIe (recalls and
    misses of a step take as long as its computing), compute (a step takes --tpot), and the
    scenario's server.max_batch. Goodput: the most requests a second that keep --tpot and --ttft,
    prompts prefilled as server.prefill says. KV on the host pays where the policy makes more
    tokens a second than the full cache on the same GPUs.
    """
    import fmsim

    one_thread_a_process()
    from fmsim.errors import FmsimError
    from fmsim.experiments.plan import Ask, parse_deployment, plan_model
    from fmsim.experiments.results.folder import failed_altogether
    from fmsim.report.grid import View
    from fmsim.report.tables import plan as plan_table

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
    named, layouts_ = _list(hardware), _list(layouts)
    asked: dict[str, Any] = {
        "output_tokens": parse_tokens("--output", output),
        "tpot_s": _seconds("--tpot", tpot, "ms"),
        "usd_per_gpu_hour": usd_per_gpu_hour,
        "beyond_positions": beyond_positions,
    }
    if ttft is not None:
        asked["ttft_s"] = _seconds("--ttft", ttft, "s")
    if scenario is None:
        if policy or override:
            raise FmsimError(
                "plan: --policy and --set need a scenario; name one, such as scenarios/500k.yaml"
            )
        base = deployment.parsed(placed)
        ask = Ask(parse_tokens("--context", context or "128K"), **asked)
        layouts_given = [parse_deployment(text, base) for text in layouts_]
        report = plan_model(
            model or "v4-flash",
            named or ["h100", "h200", "b200"],
            layouts_given or ([base] if placed else []),
            ask,
        )
    else:
        given = {"model": model, "hardware": named[0] if len(named) == 1 else None}
        report = fmsim.plan_capacity(
            scenario,
            policy,
            [
                *override,
                *(f"{key}={value}" for key, value in given.items() if value is not None),
                *placed,
                *["beyond_positions=true"] * beyond_positions,
            ],
            context_tokens=None if context is None else parse_tokens("--context", context),
            hardware=named if len(named) > 1 else [],
            deployments=layouts_,
            timeout_s=policy_timeout,
            **asked,
        )
    if as_json:
        from fmsim.files import strict_json

        typer.echo(strict_json.dump(report))
    elif as_csv:
        from fmsim.experiments.results.rows import flat

        echo_csv([flat(row, leave=("moves", "crossover")) for row in report["policies"]])
    else:
        plan_table.show(report, View.of_terminal(wide, columns))
    end_with_failures(failed_altogether(report) if scenario is not None else [])


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _seconds(option: str, text: str, unit: str) -> float:
    """ "50" in `unit`, "50ms" or "0.05s"."""
    from fmsim.errors import FmsimError

    number, scale = text.strip().lower(), {"ms": 1e-3, "s": 1.0}[unit]
    for suffix, named in (("ms", 1e-3), ("s", 1.0)):
        if number.endswith(suffix):
            number, scale = number.removesuffix(suffix), named
            break
    try:
        seconds = float(number) * scale
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise FmsimError(f"{option} {text}: give a time above zero, such as 50ms or 0.05s")
    return seconds
