"""The page of one run: `fmsim run --out`, without a workload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmsim.experiments.results.folder import Results, by_budget
from fmsim.report.pages import run_charts
from fmsim.report.pages.layout import Page, Section, Table
from fmsim.report.pages.marks import Marks, Spot, quality_against_bytes
from fmsim.report.tables import decode as table
from fmsim.report.tables import estimates, verdict

KNOWN = {  # fields of a row that the table shows, or that name it
    "policy",
    "gpu_bytes",
    "gpu_ratio",
    "kv_hbm_bytes",
    "kv_hbm_ratio",
    "entry_recall",
    "entry_recall_per_step",
    "mass_kept",
    "answers_kept",
    "set_overlap",
    "decode_tokens_per_s",
    "step_s",
    "h2d_bytes",
    "h2d_bytes_per_step",
    "stall_ratio",
    "max_requests",
    "at_max_requests",
    "hit_rate",
    "misses",
}
CHART_TEXT = (
    "Up is better, left is cheaper. Discs are exact: they lose nothing, and pay in stalls. Diamonds"
    " are lossy. Triangles (belady, oracle) see the future: bounds, not policies to deploy. The"
    " square is the full cache. A line joins one policy's budgets."
)


def page(results: Results, curves: dict[str, Any] | None, why_no_curves: str = "") -> Page:
    """The page. Without `curves` their sections say `why_no_curves`."""
    about = results.about
    entries = {row["policy"]: about["runs"][row["policy"]]["entry"] for row in results.rows}
    kinds = {entries[row["policy"]]: table.kind_of(row, about) for row in results.rows}
    full = [
        entries[row["policy"]]
        for row in results.rows
        if results.ledgers[row["policy"]].policy == "full"
    ]
    marks = Marks(kinds, full)
    quality, scores = _quality(results)
    spots = [
        Spot(
            entries[row["policy"]],
            row["gpu_bytes"],
            score,
            row["max_requests"],
            _tip(row, quality, score),
        )
        for row, score in zip(results.rows, scores)
    ]
    tokens, model = about["trace"]["prompt_tokens"], about["model"]["name"]
    heads = [str(line) for line in table.head(about)[1:]]
    return Page(
        name=about["name"],
        question=(
            f"How little of a request's {tokens:,} tokens can stay on the GPU,"
            f" {model} on {about['hardware']['title']}?"
        ),
        answer=verdict.answer(results.report),
        chart=quality_against_bytes(spots, marks, quality),
        chart_text=CHART_TEXT,
        table=_table(results),
        facts=_facts(about, heads),
        footer=(
            f"Made by fmsim {about['fmsim']} from {about['file']}. Kernel times:"
            f" {about['hardware']['kernel_source']}."
        ),
        sections=_sections(results, marks, entries, curves, why_no_curves),
    )


def _facts(about: Mapping[str, Any], heads: list[str]) -> dict[str, str]:
    """The terminal's head, as names and values."""
    facts = {"about": about["description"]} if about["description"] else {}
    if about.get("set"):
        facts["set"] = ", ".join(about["set"])
    name = "about"
    for line in heads:
        name = line[:10].strip() or name
        facts[name] = f"{facts[name]}; {line[10:]}" if name in facts else line[10:]
    return facts


def _quality(results: Results) -> tuple[str, list[float]]:
    """Accuracy where the rows have it, else attention mass kept, or hits where the trace has no
    masses.
    """
    rows = results.rows
    for name, title in (("accuracy", "accuracy"), ("mass_kept", "attention mass kept")):
        if all(row.get(name) is not None for row in rows):
            return title, [row[name] for row in rows]
    return "selected entries resident", [row["hit_rate"] for row in rows]


def _tip(row: Mapping[str, Any], quality: str, score: float) -> str:
    return (
        f"{row['policy']}: {quality} {score:.1%} with {row['gpu_bytes'] / 2**30:.3f} GiB,"
        f" {row['gpu_ratio']:.1%} of full; {row['max_requests']:,} requests fit;"
        f" {row['decode_tokens_per_s']:.1f} tokens/s*, stalled {row['stall_ratio']:.1%}*"
    )


def _table(results: Results) -> Table:
    """The terminal's table, with further figures that the rows may hold."""
    about, report = results.about, results.report
    further = list(
        dict.fromkeys(
            name
            for row in results.rows
            for name, value in row.items()
            if name not in KNOWN and isinstance(value, (int, float))
        )
    )
    columns = table.columns(about)
    headings = ["policy", "kind", *(column.heading for column in columns)]
    headings += [name.replace("_", " ") for name in further]
    groups = []
    bold = set()
    for group, (heading, rows, failed) in enumerate(table.groups(report)):
        cells = [_cells(row, about, further) for row in rows]
        empty = [""] * (len(headings) - 2)
        cells += [[verdict.name_of(one, about), "none", *empty] for one in failed]
        groups.append((heading, cells))
        for place, labels in enumerate(table.bests(rows, about)):
            bold |= {(group, n, place + 2) for n, row in enumerate(rows) if row["policy"] in labels}
    notes = [*table.notes(about), *estimates.notes(report)]
    return Table(headings, groups, notes, kind_at=1, bold=frozenset(bold))


def _cells(row: dict[str, Any], about: dict[str, Any], further: list[str]) -> list[str]:
    known = [verdict.name_of(row, about), table.kind_of(row, about), *table.cells(row, about)]
    return known + [f"{row[one]:.4g}" if one in row else "-" for one in further]


def _sections(
    results: Results,
    marks: Marks,
    entries: Mapping[str, str],
    curves: dict[str, Any] | None,
    why: str,
) -> list[Section]:
    groups = by_budget(results.about, [row["policy"] for row in results.rows])
    view = run_charts.RunView(results, marks, entries, _panels(groups))
    found = [
        Section(
            "time",
            "Over time",
            "Entries kept and hit rate over time",
            "counted",
            "KV of one request in the paper's accounting, and the share of the entries selected in"
            " a step that were resident when it began. Lossy policies are dashed, bounds dotted.",
            run_charts.over_time(view),
        )
    ]
    lossless = not table.has_mass(results.about)
    for id_, short, title, text, draw in CURVES:
        if id_ == "lost-mass" and lossless:
            found.append(Section(id_, short, title, "counted", text, missing=table.NO_MASS))
        elif curves is None:
            found.append(Section(id_, short, title, "counted", text, missing=why))
        else:
            found.append(Section(id_, short, title, "counted", text, draw(view, curves)))
    found.append(
        Section(
            "bound",
            "What bound it",
            "What bound the run",
            "simulated",
            "Where the time of a step goes; then how many requests fit, and which memory allows no"
            " more.",
            run_charts.what_bound(view),
        )
    )
    return found


def _panels(groups: Mapping[str | None, list[str]]) -> dict[str, list[str]]:
    """Policies that are drawn together: at each budget its own, beside those without one."""
    if set(groups) == {None}:
        return {"": groups[None]}
    common = groups.get(None, [])
    return {str(budget): common + labels for budget, labels in groups.items() if budget}


CURVES = (
    (
        "misses",
        "Misses",
        "Misses over budget",
        "LRU at every budget, from one pass by stack distance; below it belady, which no policy"
        " that loads on demand can beat. A line begins where a step's own pages just fit. Marked"
        " are this run's policies that fetch.",
        run_charts.misses_over_budget,
    ),
    (
        "lost-mass",
        "Lost mass",
        "Lost attention mass over budget",
        "Each lossy policy replayed at several budgets, all else as in the run. Attention mass on"
        " selected entries that were not attended to; lost mass is not yet a lost answer. The"
        " oracle is the bound of what is chosen once a window.",
        run_charts.lost_mass_over_budget,
    ),
    (
        "granularity",
        "Page size",
        "Over granularity",
        "Every policy at its own budget in bytes, with pages of 1 to 64 entries: a page is kept and"
        " moved whole. The first chart is of policies that fetch what they miss, the second of"
        " those that leave it out.",
        run_charts.over_granularity,
    ),
    (
        "regret",
        "Regret",
        "Regret by layer",
        "How far each policy is from its bound at the same budget, scope and page size, in"
        " percentage points. Dark layers are where a better choice would pay. A policy that decides"
        " more often than the oracle may go below its bound.",
        run_charts.regret,
    ),
)
