"""`fmsim report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmsim.cli.extras import require
from fmsim.cli.options import NoVerify, Quiet, Verbose, one_thread_a_process
from fmsim.cli.progress import bar

if TYPE_CHECKING:
    from fmsim.experiments.results import Results


def report(
    folder: Annotated[Path, typer.Argument(help="what `fmsim run --out` wrote")],
    out: Annotated[
        Path | None, typer.Option(help="the page; by default report.html in the folder")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="the run's trace, where it has moved; curves over budget and granularity need it"
        ),
    ] = None,
    perfetto: Annotated[
        Path | None, typer.Option(help="write the simulated timeline for ui.perfetto.dev here")
    ] = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """One HTML page of a run, which works offline; and its timeline for Perfetto.

    Of a workload: what was held and how fast, what was in use over time, each request's life.

    \b
    fmsim run scenarios/500k.yaml --out results && fmsim report results
    fmsim report results --out 500k.html --perfetto 500k.perfetto.json
    """
    one_thread_a_process()
    from fmsim.errors import FmsimError
    from fmsim.experiments.results import Results, ServingResults

    served = ServingResults.load(folder)
    if served is not None:
        if trace is not None or perfetto is not None:
            raise FmsimError("--trace and --perfetto: a run of a workload has neither on its page")
        require("report", "fmsim report")
        from fmsim.report import serving_page

        _write(out or folder / "report.html", serving_page.render(served), "--out")
        return
    results = Results.load(folder)
    require("report", "fmsim report")
    from fmsim.report import page

    curves, why = _curves(results, trace, quiet)
    _write(out or folder / "report.html", page.render(results, curves, why), "--out")
    if perfetto is not None:
        from fmsim.report.perfetto import trace_json

        shown = {
            label: f"{label} ({'exact' if results.exact(label) else 'lossy'})"
            for label in results.ledgers
        }
        _write(perfetto, trace_json(shown, results.ledgers, results.timelines), "--perfetto")


def _curves(results: Results, trace: Path | None, quiet: bool) -> tuple[dict[str, Any] | None, str]:
    """(curves, ""), or (None, why not) where the trace is not where the run found it."""
    from fmsim.errors import FmsimError
    from fmsim.experiments.curves import compute
    from fmsim.trace import read

    known = results.about["trace"]
    path = trace or Path(known["file"])
    if trace is None and not path.exists():
        why = (
            f"This needs the run's trace, {path}, which is not there. Say where it is:"
            " fmsim report ... --trace FILE."
        )
        return None, why
    source = read(path)
    if source.header.content_sha256 != known["content_sha256"]:
        raise FmsimError(
            f"{path}: not the trace of this run (its digest differs); give the right one with"
            " --trace, or run the scenario again"
        )
    with bar("curves", quiet=quiet) as show:
        layer_map = results.about["layer_map"]
        progress = lambda done, total: show("curves", done, total)
        return compute(source, results.ledgers, layer_map, progress), ""


def _write(path: Path, text: str, option: str) -> None:
    from fmsim.errors import FmsimError
    from fmsim.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise FmsimError(
            f"{option} {path}: cannot be written ({error.strerror}); choose another place"
        ) from None
    typer.echo(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
