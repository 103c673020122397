"""`fmsim report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmsim.cli.options import NoVerify, Quiet, Verbose, one_thread_a_process, write_page
from fmsim.cli.progress import bar

if TYPE_CHECKING:
    from fmsim.experiments.results.folder import Results
    from fmsim.report.pages.layout import Page


def report(
    source: Annotated[
        Path,
        typer.Argument(
            help="what `fmsim run --out` or `fmsim eval --out` wrote, the rows of `fmsim sweep` or"
            " `fmsim tune`, or a trace"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="the page; by default report.html in or beside it")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="folder that gets each chart as an SVG file")
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
    """One HTML page of results: the question, its answer, a chart, the table, and the rest. It
    works offline.

    \b
    fmsim run 500k --out results && fmsim report results
    fmsim report results --out 500k.html --perfetto 500k.perfetto.json --figures charts
    fmsim report sweep.jsonl
    fmsim report traces/nano-32k-needles.safetensors
    """
    one_thread_a_process()
    from fmsim.report.pages import layout

    with bar("reading the results", quiet=quiet) as show:
        progress = lambda done, total: show("curves", done, total)
        page, results = _page(source, trace, progress)
    if results is None and (trace is not None or perfetto is not None):
        from fmsim.errors import FmsimError

        raise FmsimError("--trace and --perfetto: only a run without a workload has them")
    _write(out or _beside(source), layout.render(page), "--out")
    if figures is not None:
        for name, text in layout.figures(page).items():
            write_page(figures / f"{name}.svg", text, "--figures")
        typer.echo(f"{figures}  {len(page.charts)} charts")
    if perfetto is not None and results is not None:
        from fmsim.report.perfetto import trace_json
        from fmsim.report.tables.decode import kind_of

        rows = {row["policy"]: row for row in results.rows}
        shown = {
            label: f"{label} ({kind_of(rows[label], results.about)})" for label in results.ledgers
        }
        _write(perfetto, trace_json(shown, results.ledgers, results.timelines), "--perfetto")


def _beside(source: Path) -> Path:
    return source / "report.html" if source.is_dir() else source.with_suffix(".html")


def _page(source: Path, trace: Path | None, progress: Any) -> tuple[Page, Results | None]:
    """The page of whatever `source` is; and a run's results, where it is one without a workload."""
    from fmsim.errors import FmsimError

    if source.suffix == ".safetensors":
        return _of_trace(source), None
    if source.suffix in (".jsonl", ".parquet"):
        return _of_rows(source), None
    if source.is_file():
        raise FmsimError(
            f"{source}: give a folder of `fmsim run --out` or `fmsim eval --out`, rows (.jsonl,"
            " .parquet) of `fmsim sweep` or `fmsim tune`, or a trace (.safetensors)"
        )
    from fmsim.experiments.results.folder import Results, ServingResults, evaluated

    served = ServingResults.load(source)
    if served is not None:
        from fmsim.report.pages import serving

        return serving.page(served), None
    answers = evaluated(source)
    if answers is not None:
        from fmsim.report.pages import accuracy

        return accuracy.page(answers, source.name), None
    from fmsim.report.pages import run

    results = Results.load(source)
    curves, why = _curves(results, trace, progress)
    return run.page(results, curves, why), results


def _of_trace(source: Path) -> Page:
    from fmsim.experiments.captures.trace_stats import stats
    from fmsim.report.pages import trace as page
    from fmsim.trace import read

    return page.page(stats(read(source)))


def _of_rows(source: Path) -> Page:
    from fmsim.experiments.results.rows import read_rows
    from fmsim.report.pages import sweep

    rows = read_rows(source)
    tuned = any("figures" in row for row in rows)
    return (sweep.tune_page if tuned else sweep.sweep_page)(rows, source.name)


def _curves(
    results: Results, trace: Path | None, progress: Any
) -> tuple[dict[str, Any] | None, str]:
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
    found = read(path)
    if found.header.content_sha256 != known["content_sha256"]:
        raise FmsimError(
            f"{path}: not the trace of this run (its digest differs); give the right one with"
            " --trace, or run the scenario again"
        )
    return compute(found, results.ledgers, results.about["layer_map"], progress), ""


def _write(path: Path, text: str, option: str) -> None:
    write_page(path, text, option)
    from fmsim.units import sized

    typer.echo(f"{path}  {sized(path.stat().st_size)}")
