"""`fmsim hw`: hardware presets, fmsim's own and measured ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmsim.cli.extras import require
from fmsim.cli.options import MOST_SEED, Columns, Csv, Json, Wide, print_found

app = typer.Typer(
    help="List hardware presets, or measure one on this machine's GPU.", no_args_is_help=True
)


@app.command("list")
def list_hardware(
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
) -> None:
    """All presets, one a line."""
    from fmsim.experiments.models import hardware_listed
    from fmsim.report.tables import hardware

    rows = hardware_listed()
    print_found(
        {"hardware": rows},
        rows,
        lambda: hardware.listed(rows),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


@app.command()
def calibrate(
    out: Annotated[
        Path, typer.Option(help="preset to write (.yaml); its link and every timing come beside it")
    ] = Path("calibrated.yaml"),
    model: Annotated[
        str,
        typer.Option(
            help="whose decode modules to time: v4-flash, v4-pro, or a folder with a config.json"
        ),
    ] = "v4-flash",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="decides the made-up inputs")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress lines")] = False,
) -> None:
    """Measure this machine's GPU and write a preset that scenarios read (needs a CUDA device and
    torch).

    Copies, gathers from pinned host memory by row size and count, kernels by shape, launches, a
    decode step's modules, alone and in a row, and what the engine does beside them. Weights are
    float8 where the model's config has a quantization_config, as both presets' have.

    It says first what it will take: a few minutes on an H200. One that was killed goes on
    from NAME.part.json when it is called again.

    \b
    fmsim hw calibrate --out my-h100.yaml
    fmsim run scenarios/500k.yaml --set hardware=$PWD/my-h100.yaml
    """
    from fmsim.errors import FmsimError

    require("model", "hw calibrate")
    import torch

    if not torch.cuda.is_available():
        raise FmsimError(
            "hw calibrate measures a GPU, and torch finds no CUDA device here; run it on the"
            " machine to be simulated"
        )
    from fmsim.exec.measure.calibrate import calibrate as measure
    from fmsim.geometry import deepseek_v4_named
    from fmsim.hw.calibration import check_out, write_preset

    check_out(out)
    part = out.with_suffix(".part.json")
    calibration = measure(
        deepseek_v4_named(model),
        "cuda",
        seed,
        report=lambda line: quiet or typer.echo(line, err=True),
        part=part,
    )
    written = write_preset(calibration, out)
    part.unlink()
    typer.echo("written: " + ", ".join(map(str, written)))
