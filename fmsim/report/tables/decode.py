"""One run as one table: a row a policy, exact and lossy ones together, each with both of its
prices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from fmsim.experiments.results.folder import by_budget
from fmsim.report.console import estimate_text, kind_text, margin_text, share_text
from fmsim.report.grid import ALL, Field, Grid, View, check_columns, picture, show_parts
from fmsim.report.tables import estimates, verdict
from fmsim.report.tables.hardware import hardware_line
from fmsim.report.tables.verdict import name_of
from fmsim.units import GIB, MIB, gib, sized

Row = dict[str, Any]


@dataclass(frozen=True)
class RowColumn:
    """A figure of a row: its text, whether more of it is better (None: neither), and the rank of
    its column: the higher, the sooner a narrow terminal does without.
    """

    heading: str
    text: Callable[[Row], str]
    more_is_better: bool | None = None
    rank: int = 0


NAMES = (Field("policy", 0, "left"), Field("kind", 0, "left"))
ANSWERS = "answers\nkept"


def _at_most(row: Row, name: str) -> Any:
    found = row["at_max_requests"]
    return None if found is None else found[name]


def _estimate(name: str) -> Callable[[Row], str]:
    """A share with its interval."""
    return lambda row: estimate_text(row[name], estimates.half_width(row, name))


def _overlap(row: Row) -> str:
    if row["set_overlap"] is None:
        return "-"
    half_width = estimates.half_width(row, "set_overlap")
    return f"{row['set_overlap']:.2f}" + margin_text(half_width, 2)


def _answers(row: Row) -> str:
    """The share of full's answers, with its interval."""
    found = row["answers_kept"]
    return "-" if found is None else estimate_text(found["value"], found["half_width"])


# behind the policy and its kind; * = simulated
COLUMNS = (
    RowColumn("on GPU\nGiB", lambda row: f"{row['gpu_bytes'] / GIB:.3f}", None, 3),
    RowColumn("of\nfull", lambda row: f"{row['gpu_ratio']:.1%}", None, 7),
    RowColumn("requests\nfit*", lambda row: f"{row['max_requests']:,}", True, 2),
    RowColumn("bound\nby*", lambda row: row["bound"], None, 8),
    RowColumn(
        "tokens/s*\nthen",
        lambda row: _number(_at_most(row, "decode_tokens_per_s"), ",.0f"),
        True,
        4,
    ),
    RowColumn("mass\nkept", _estimate("mass_kept"), True, 1),
    RowColumn(ANSWERS, _answers, True, 4),
    RowColumn("PCIe\nMiB/step", lambda row: f"{row['h2d_bytes_per_step'] / MIB:.2f}", False, 8),
    RowColumn("stall*", lambda row: f"{row['stall_ratio']:.1%}", False, 6),
    RowColumn("golden\nkept", _estimate("entry_recall"), True, 9),
    RowColumn("per\nstep", lambda row: share_text(row["entry_recall_per_step"]), True, 12),
    RowColumn("set\noverlap", _overlap, None, 11),
    RowColumn("decode\ntokens/s*", lambda row: f"{row['decode_tokens_per_s']:.1f}", True, 5),
    RowColumn("p99 ms*\na step", lambda row: f"{row['step_s']['p99'] * 1e3:.2f}", False, 10),
    RowColumn("paper's\nof full", lambda row: f"{row['kv_hbm_ratio']:.1%}", None, 13),
)
HIT = RowColumn("hit", _estimate("hit_rate"), True, 9)
NO_MASS = (
    "golden kept, mass kept: the trace has no attention masses (engines capture what was selected,"
    " not how much), so these cannot be known.  hit: selected entries resident when their step"
    " began."
)
NOTES = (
    (
        "exact: every entry selected in this trace was attended to; a miss stalls its layer. "
        " lossy: what was not resident was left out.  bound: knows the future."
    ),
    (
        "on GPU: all that an engine allocates for one request: slots, spare pages for misses and"
        " recalls, index keys, HCA entries, windows."
    ),
    (
        "paper's: its accounting, the kept share of CSA entries, mean over steps.  golden kept:"
        " resident when needed, of all; per step: the mean of the steps' shares."
    ),
    (
        "then: with as many requests as fit.  bound by: which memory allows no more.  Other times"
        " are the batch's.  Bold: the best, bounds and full aside."
    ),
    (
        "* simulated from kernel tables and link curves, not measured; the rest is counted in the"
        " replay."
    ),
)
OF_COLUMNS = {  # a note that begins so is about these alone
    "on GPU": ("on-gpu-gib", "of-full"),
    "paper's": ("papers-of-full", "golden-kept", "per-step"),
    "then": ("tokens-s-then", "bound-by", "decode-tokens-s", "p99-ms-a-step"),
    "answers kept": ("answers-kept",),
    "golden kept": ("golden-kept", "mass-kept", "hit"),
    "±": ("mass-kept", "answers-kept", "golden-kept", "hit", "set-overlap"),
    "set overlap": ("set-overlap", "pcie-mib-step", "stall"),
    "most mass kept": ("mass-kept",),
    "mass kept if": ("mass-kept",),
}


def parts(report: dict[str, Any], view: View = ALL) -> list[Text | Grid]:
    """The head, the table, verdicts and notes, from the report's JSON object."""
    about, failed = report["scenario"], report.get("failed", [])
    why = (Text(text, style="yellow") for text in _reasons(failed, about))
    every = [*notes(about), *estimates.notes(report)]
    told = (Text(note, "dim") for note in every if _is_of(note, view.columns))
    verdicts = map(Text, verdict.lines(report))
    return [*head(about), _grid(report), *verdicts, *why, *told]


def _is_of(note: str, asked: Sequence[str]) -> bool:
    """Whether a note says something of the columns that were asked for; none: all were."""
    columns = [keys for begins, keys in OF_COLUMNS.items() if note.startswith(begins)]
    return not asked or not columns or not set(asked).isdisjoint(columns[0])


def check(view: View) -> None:
    """Refuse --columns that no table of a run has, before the run."""
    check_columns(view, [Grid([*NAMES, *map(_field, (*COLUMNS, HIT))])])


def has_mass(about: dict[str, Any]) -> bool:
    """Whether the trace of a report has attention masses; old reports are of such."""
    return bool(about["trace"].get("masses", True))


def columns(about: dict[str, Any]) -> tuple[RowColumn, ...]:
    """COLUMNS; without masses the share of hits stands in the place of golden entries kept, and
    without measured answers there is no column of them.
    """
    found = [column for column in COLUMNS if column.heading != ANSWERS or "answers" in about]
    if has_mass(about):
        return tuple(found)
    return tuple(HIT if column.heading == "golden\nkept" else column for column in found)


def notes(about: dict[str, Any]) -> tuple[str, ...]:
    found = NOTES if has_mass(about) else (*NOTES, NO_MASS)
    return (*found, _of_answers(about["answers"])) if "answers" in about else found


def _of_answers(answers: dict[str, Any]) -> str:
    day = answers["date"][:10]
    return (
        f"answers kept: of the questions that {answers['model']['name']} answers with the full"
        f" cache, the share that it answers under the policy (score over score, {day},"
        f" {answers['device']}); measured at the same budget, after about as many tokens; ±: over"
        " contexts, and where none of them lost an answer, what so few cannot exclude."
    )


def show(report: dict[str, Any], view: View = ALL) -> None:
    """Print to standard output."""
    show_parts(parts(report, view), view)


def markdown(report: dict[str, Any], view: View = ALL) -> str:
    """The table as Markdown."""
    return _grid(report).markdown(view)


def svg(report: dict[str, Any], title: str) -> str:
    """The same as a picture."""
    return picture(parts(report), title)


def head(about: dict[str, Any]) -> list[Text]:
    """Lines that say what the rows were made from."""
    trace, model, hardware = about["trace"], about["model"], about["hardware"]
    quality = ", ".join(_quality(trace["quality"]))
    lines = [
        title(about),
        Text(
            f"trace     {trace['file']}: {trace['model']}, {trace['prompt_kind']},"
            f" {trace['prompt_tokens']:,} tokens + {trace['steps']} steps, {trace['csa_layers']}"
            f" CSA layers, top-{trace['topk']}" + (f"; {quality}" if quality else "")
        ),
        Text(
            f"model     {model['name']}: {model['csa_layers']} of {model['layers']} layers CSA;"
            f" {_layer_map(about)}"
        ),
        Text(
            f"hardware  {hardware_line(hardware)}; batch"
            f" {about['batch']}; full cache {gib(about['full_gpu_bytes'])} a request"
            + _figures(hardware["figures"])
        ),
    ]
    if "stands_for" in about:
        lines.insert(2, Text(f"          {about['stands_for']}", style="yellow"))
    if trace["source"] == "dense_pooled":
        lines.insert(
            2,
            Text(
                "          dense attention, pooled over 4-token entries, then top-k: not a sparse"
                " model's own choice"
            ),
        )
    return lines


def _quality(found: dict[str, Any]) -> Iterator[str]:
    """How well the model answered while it was recorded, as the trace's header says."""
    told = {key: value for key, value in found.items() if isinstance(value, (int, float, str))}
    if {"asked", "exact"} <= told.keys():
        yield f"{told.pop('exact')} of {told.pop('asked')} questions answered"
    if isinstance(misses := told.pop("lru_misses", None), float):
        yield f"LRU with room for 2 x top-k misses {misses:.1%}"
    yield from (f"{key.replace('_', ' ')} {value}" for key, value in told.items())


def title(about: dict[str, Any]) -> Text:
    """The scenario's name, what it is about, and what --set changed."""
    changed = ", ".join(about.get("set", ()))
    told = [about["description"], f"with {changed}" if changed else ""]
    return Text.assemble((about["name"], "bold"), "  ", "; ".join(filter(None, told)))


def _figures(figures: dict[str, float]) -> str:
    return (
        f"; the scenario's own: {', '.join(f'{name} {value:g}' for name, value in figures.items())}"
        if figures
        else ""
    )


def _layer_map(about: dict[str, Any]) -> str:
    layers, driven = about["trace"]["csa_layers"], about["layer_map"]
    counts = sorted({driven.count(layer) for layer in range(layers)})
    if counts == [1]:
        return "each driven by a trace layer of its own"
    return f"layer map: each trace layer drives {' or '.join(map(str, counts))} of them"


def groups(report: dict[str, Any]) -> list[tuple[str, list[Row], list[Row]]]:
    """What stands together: a heading, rows, and policies that could not run. Under a scenario's
    budgets a group each, behind policies with a budget of their own, or none.
    """
    about, failed = report["scenario"], report.get("failed", [])
    every = [row["policy"] for row in [*report["policies"], *failed]]
    return [
        (
            _heading(about, budget),
            [row for row in report["policies"] if row["policy"] in labels],
            [row for row in failed if row["policy"] in labels],
        )
        for budget, labels in by_budget(about, every).items()
    ]


def _heading(about: dict[str, Any], budget: str | None) -> str:
    if budget is None:
        return ""
    n_bytes = about["budgets"][budget]
    return f"at {budget}" + ("" if n_bytes is None else f", {sized(n_bytes)}")


def _grid(report: dict[str, Any]) -> Grid:
    about = report["scenario"]
    grid = Grid([*NAMES, *map(_field, columns(about))])
    for heading, rows, failed in groups(report):
        if heading:
            grid.part()
            grid.add(Text(heading, "bold"))
        best = bests(rows, about)
        for row in rows:
            shown = [
                Text(text, "bold green" if row["policy"] in best[place] else "")
                for place, text in enumerate(cells(row, about))
            ]
            grid.add(name_of(row, about), kind_text(*_exact_and_bound(row, about)), *shown)
        for failure in failed:
            grid.add(name_of(failure, about), Text("none", "red"), *_least(failure))
    return grid


def _field(column: RowColumn) -> Field:
    return Field(column.heading, column.rank)


def kind_of(row: Row, about: dict[str, Any]) -> str:
    """Does it lose anything, and can it be had."""
    return str(kind_text(*_exact_and_bound(row, about)))


def _exact_and_bound(row: Row, about: dict[str, Any]) -> tuple[bool | None, bool]:
    label = row["policy"]
    return about["details"][label]["exact"], about["runs"][label]["evidence"] == "future"


def _least(failure: Row) -> list[Text]:
    """The bytes that a policy takes at the least, where a budget is below them."""
    least = failure.get("least_gpu_bytes")
    return [] if least is None else [Text(f">= {least / GIB:.3f}", "red")]


def _reasons(failed: Sequence[Row], about: dict[str, Any]) -> list[str]:
    """Why policies could not run, those with one reason together."""
    found: dict[str, list[str]] = {}
    for failure in failed:
        budget = re.escape(about["runs"][failure["policy"]]["budget"])
        reason = re.sub(
            rf"^.*?policy [^:]*: (budget {budget} is .*? [KMG]?i?B, and )?", "", failure["error"]
        )
        found.setdefault(reason, []).append(name_of(failure, about))
    return [f"none: {', '.join(labels)}: {reason}" for reason, labels in found.items()]


def bests(rows: Sequence[Row], about: dict[str, Any]) -> list[set[str]]:
    """By column, the policies with the best figure; none where all that compete are alike."""
    rivals = [
        row
        for row in rows
        if kind_of(row, about) != "bound" and about["runs"][row["policy"]]["budget"] != "all"
    ]
    found: list[set[str]] = []
    for place, column in enumerate(columns(about)):
        texts = {row["policy"]: cells(row, about)[place] for row in rivals}
        values = {label: _value(text) for label, text in texts.items()}
        known = [value for value in values.values() if value is not None]
        if column.more_is_better is None or len(set(known)) < 2:
            found.append(set())
            continue
        best = max(known) if column.more_is_better else min(known)
        found.append({label for label, value in values.items() if value == best})
    return found


def _value(text: str) -> float | None:
    """The figure that a cell shows, so that what looks alike is alike."""
    digits = re.match(r"[\d,]+(?:\.\d+)?", text)
    return None if digits is None else float(digits[0].replace(",", ""))


def cells(row: Row, about: dict[str, Any]) -> list[str]:
    """One policy's figures, beside `columns`."""
    bound = about["details"][row["policy"]]["max_requests_bound"]
    marked = row | {"bound": bound.removesuffix(" memory")}
    return [column.text(marked) for column in columns(about)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
