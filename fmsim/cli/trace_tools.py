"""`fmsim trace cut`, `fmsim trace pack` and `fmsim trace stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmsim.cli.options import Columns, Csv, Json, TraceFile, Wide, print_found, write_page


def cut(
    file: TraceFile,
    out: Annotated[Path, typer.Option(help="trace to write (.safetensors)")],
    steps: Annotated[
        str, typer.Option(help="decode steps as first:end; those before join the prompt")
    ] = "0:",
    layers: Annotated[
        str | None, typer.Option(help="layers of the trace, e.g. 0,3,8-11; all by default")
    ] = None,
) -> None:
    """Write a part of a trace as a trace of its own.

    \b
    fmsim trace cut long.safetensors --steps 0:256 --out short.safetensors
    """
    from fmsim import trace
    from fmsim.files import check_apart
    from fmsim.trace import cut as cutting

    check_apart(file, out)
    found = trace.read(file)
    first, end = cutting.parse_range(steps, "--steps")
    chosen = None if layers is None else cutting.parse_numbers(layers, "--layers")
    part = cutting.cut(found, first, found.n_steps if end is None else end, chosen)
    trace.write(out, part)
    typer.echo(
        f"{out}: {part.n_steps} steps after {part.header.prompt_tokens:,} tokens,"
        f" {part.n_layers} layers, {out.stat().st_size / 1e6:.1f} MB"
    )


def pack(
    files: Annotated[list[Path], typer.Argument(help="traces (.safetensors) of one prompt")],
    out: Annotated[Path, typer.Option(help="folder to write them to, under their names")],
    keyed: Annotated[
        str | None,
        typer.Option(help="layers whose index keys stay, e.g. 0,2; all that have them by default"),
    ] = None,
    mass_bits: Annotated[
        int, typer.Option(min=1, max=10, help="mantissa bits of a mass; 10 keep it as it is")
    ] = 5,
) -> None:
    """Write traces of one prompt small: packed, and what they share once, beside them.

    \b
    fmsim trace pack new/nano-500k-*.safetensors --keyed 0,2,4 --out traces
    """
    from fmsim import trace
    from fmsim.errors import FmsimError
    from fmsim.files import check_apart
    from fmsim.trace import cut as cutting

    chosen = None if keyed is None else cutting.parse_numbers(keyed, "--keyed")
    places = [out / file.name for file in files]
    if len(set(places)) < len(places):
        raise FmsimError("trace pack: two files have one name; rename one of them")
    for file in files:
        for place in places:
            check_apart(file, place)
    light = [trace.lightened(trace.read(file), chosen, mass_bits) for file in files]
    shared = trace.write_shared(places, light)
    for place in [*places, shared]:
        typer.echo(f"{place}: {place.stat().st_size / 1e6:.1f} MB")


def stats(
    file: TraceFile,
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
    html: Annotated[Path | None, typer.Option(help="write one HTML page as well")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="only the first steps")] = None,
) -> None:
    """How selections repeat: unions, overlaps, reuse distances, and misses of lru and belady.

    \b
    fmsim trace stats nano-32k-needles
    fmsim trace stats capture.safetensors --json --html capture.html
    """
    from fmsim import trace
    from fmsim.experiments.captures.trace_stats import stats as measured
    from fmsim.report.tables import trace_stats as table

    found = measured(trace.read(file), steps)
    if html is not None:
        from fmsim.report.pages import trace as page
        from fmsim.report.pages.layout import render

        write_page(html, render(page.page(found)), "--html")
    print_found(
        found,
        [row | {"layer": label} for label, row in table.rows(found)],
        lambda: table.parts(found),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )
