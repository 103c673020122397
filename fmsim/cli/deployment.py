"""Options of a deployment, the same on every command that takes a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fmsim.hw.deployment import Deployment

_PANEL = "Deployment"

Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="GPUs of a server", rich_help_panel=_PANEL),
]
Tp = Annotated[
    int | None,
    typer.Option("--tp", min=1, help="tensor-parallel GPUs of a rank", rich_help_panel=_PANEL),
]
Dp = Annotated[
    int | None,
    typer.Option("--dp", min=1, help="ranks of data-parallel attention", rich_help_panel=_PANEL),
]
Ep = Annotated[
    int | None,
    typer.Option("--ep", min=1, help="GPUs that share out whole experts", rich_help_panel=_PANEL),
]
Cp = Annotated[
    int | None,
    typer.Option("--cp", min=1, help="GPUs that share out a request's KV", rich_help_panel=_PANEL),
]
Servers = Annotated[
    int | None, typer.Option("--servers", min=1, help="servers alike", rich_help_panel=_PANEL)
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="fp8, fp4 or bf16", rich_help_panel=_PANEL)
]
Engine = Annotated[
    str | None,
    typer.Option("--serving-engine", help="whose kernels: sglang or vllm", rich_help_panel=_PANEL),
]
PoolTokens = Annotated[
    int | None,
    typer.Option(
        "--kv-pool-tokens", min=1, help="KV pool as an engine prints it", rich_help_panel=_PANEL
    ),
]
PoolBytes = Annotated[
    float | None,
    typer.Option(
        "--kv-pool-bytes", min=1, help="KV pool of each GPU, bytes", rich_help_panel=_PANEL
    ),
]
MemFraction = Annotated[
    float | None,
    typer.Option(
        "--mem-fraction",
        min=0,
        max=1,
        help="GPU memory for weights and KV, as SGLang's and vLLM's options",
        rich_help_panel=_PANEL,
    ),
]
StartLog = Annotated[
    Path | None,
    typer.Option(
        "--start-log",
        help="SGLang's or vLLM's log, which names the KV pool",
        rich_help_panel=_PANEL,
    ),
]
OPTIONS = {"n_gpus": "--gpus", "engine": "--serving-engine"}  # not called as their keys are


def overrides(**given: Any) -> list[str]:
    """What `--set` would say, of the options that were given."""
    return [f"deployment.{name}={value}" for name, value in given.items() if value is not None]


def parsed(given: list[str]) -> Deployment:
    """What `overrides` gave, as a deployment of its own."""
    from pydantic import ValidationError

    from fmsim.errors import FmsimError
    from fmsim.hw.deployment import Deployment

    fields = dict(text.removeprefix("deployment.").split("=", 1) for text in given)
    try:
        return Deployment.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        option = OPTIONS.get(key, f"--{key.replace('_', '-')}")
        raise FmsimError(f"{option} {first['input']}: {first['msg']}") from None
