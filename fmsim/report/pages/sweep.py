"""The pages of a sweep's rows, and of a search's trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmsim import __version__
from fmsim.report.charts.chart import AnyChart, Chart, Series
from fmsim.report.charts.scale import ChartAxis
from fmsim.report.pages.layout import Page, Section, Table
from fmsim.report.pages.marks import Marks, Spot, kind_of, quality_against_bytes
from fmsim.report.tables import sweep as table

Row = Mapping[str, Any]
FLOOR = 0.95  # of the attention mass: what `fmsim tune` asks for unless it is told
CHART_TEXT = (
    "A mark a run: up is better, left is cheaper. Discs are exact, diamonds lossy, triangles"
    " bounds. Lines join the runs of one policy in a sweep. Point at a mark to see its setting."
)


def sweep_page(rows: Sequence[dict[str, Any]], name: str) -> Page:
    """The rows of `fmsim sweep`."""
    varied = _varied(rows)
    done = [row for row in rows if "error" not in row]
    keys = ", ".join(key.removeprefix("set.") for key in varied) or "nothing"
    best = max(done, key=_speed, default=None)
    answer = "None of the runs could be."
    if best is not None:
        answer = (
            f"Fastest is {_named(best, varied)}: {_speed_text(best)}, with"
            f" {_share(best.get('mass_kept'))} of the attention mass kept."
        )
    return _page(
        rows,
        name,
        f"What do {keys} change, over {len(rows)} runs?",
        answer,
        varied,
        f"Made by fmsim {__version__} from {name}.",
    )


def tune_page(rows: Sequence[dict[str, Any]], name: str) -> Page:
    """The trials that `fmsim tune` kept, each with its setting."""
    flat = []
    for row in rows:
        settings = {f"set.{key}": value for key, value in row.get("values", {}).items()}
        found = {"error": row["error"]} if "figures" not in row else dict(row["figures"])
        flat.append(found | settings | {"policy": row["policy"], "exact": row.get("exact", False)})
    flat = [_flat(row) for row in flat]
    varied = _varied(flat)
    done = [row for row in flat if "error" not in row]
    policy = str(rows[0]["policy"]) if rows else ""
    kept = [row for row in done if (row.get("mass_kept") or 0.0) >= FLOOR]
    best = max(kept, key=_speed, default=None)
    answer = f"None of the settings keeps {FLOOR:.0%} of the attention mass."
    if best is not None:
        answer = (
            f"Of the {len(kept)} that keep {FLOOR:.0%} of the attention mass the fastest makes"
            f" {_speed_text(best)} and keeps {_share(best.get('mass_kept'))}:"
            f" {_setting(best, varied)}."
        )
    return _page(
        flat,
        name,
        f"Which setting of {policy} is fastest for what it keeps, of {len(flat)} that were tried?",
        answer,
        varied,
        f"Made by fmsim {__version__} from {name}.",
        joined=False,
    )


def _page(
    rows: Sequence[dict[str, Any]],
    name: str,
    question: str,
    answer: str,
    varied: Sequence[str],
    footer: str,
    joined: bool = True,
) -> Page:
    done = [row for row in rows if "error" not in row]
    names = _names(done)
    kinds = {name: kind_of(row) for name, row in zip(names, done)} or {"none": "lossy"}
    marks = Marks(kinds, [label for label in kinds if label == "full"])
    known = all(row.get("mass_kept") is not None for row in done)
    quality = "mass_kept" if known else "hit_rate"
    spots = [
        Spot(
            name_,
            _gpu_bytes(row),
            float(row.get(quality) or 0.0),
            row.get("max_requests", row.get("held")),
            f"{_named(row, varied)}: {_share(row.get(quality))} kept, {_speed_text(row)}",
        )
        for name_, row in zip(names, done)
        if _gpu_bytes(row)
    ]
    title = "attention mass kept" if known else "selected entries resident"
    grid = table.table(list(rows))
    texts = [[str(cell).strip() for cell in row] for row in grid.rows if row is not None]
    cells = [row + [""] * (len(grid.fields) - len(row)) for row in texts]
    errors = [f"{_named(row, varied)}: {row['error']}" for row in rows if "error" in row]
    headings = [one.heading for one in grid.fields]
    return Page(
        name=name,
        question=question,
        answer=answer,
        chart=quality_against_bytes(spots, marks, title, joined=joined),
        chart_text=CHART_TEXT,
        table=Table(headings, [("", cells)], ["* simulated, not measured.", *errors]),
        facts={"rows": f"{len(rows)}, of which {len(errors)} could not run"},
        footer=footer,
        table_kind="simulated",
        sections=_by_key(done, varied, marks, joined),
    )


def _names(rows: Sequence[Row]) -> list[str]:
    """Each row's policy; with its kind where some of its settings are exact and others lossy."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        kinds.setdefault(str(row["policy"]), set()).add(kind_of(row))
    found = []
    for row in rows:
        label = str(row["policy"])
        found.append(f"{label}, {kind_of(row)}" if len(kinds[label]) > 1 else label)
    return found


def _by_key(
    rows: Sequence[Row], varied: Sequence[str], marks: Marks, joined: bool
) -> list[Section]:
    """Of each varied key that is a number: speed and quality over it, the mean where a value came
    several times.
    """
    found: list[Section] = []
    rows = [{**row, "policy": name} for row, name in zip(rows, _names(rows))]
    for key in varied:
        numbers = [row for row in rows if _number(row.get(key)) is not None]
        if len({_number(row[key]) for row in numbers}) < 2:
            continue
        short = key.removeprefix("set.")
        charts: list[AnyChart] = []
        for id_, title, figure in (
            ("speed", "Speed", _speed),
            ("kept", "Attention mass kept", lambda row: float(row.get("mass_kept") or 0.0)),
        ):
            series = [
                _means(numbers, key, label, figure, marks, joined) for label in _labels(numbers)
            ]
            series = [one for one in series if len(one.x) > 1]
            says = f"{title.lower()} over {short}"
            unit = _speed_unit(rows) if id_ == "speed" else "share kept"
            x, y = ChartAxis(short), ChartAxis(unit)
            if series:
                name = f"{id_}-{short.replace('.', '-').replace('*', 'all')}"
                charts.append(Chart(name, f"{title} over {short}", says, x, y, series, height=320))
        if charts:
            text = "The mean where a value came with several others." if joined else ""
            id_ = f"key-{len(found)}"
            found.append(Section(id_, short, f"Over {short}", "simulated", text, charts))
    return found


def _means(
    rows: Sequence[Row], key: str, label: str, figure: Any, marks: Marks, joined: bool
) -> Series:
    by_value: dict[float, list[float]] = {}
    for row in rows:
        if row["policy"] == label:
            by_value.setdefault(float(_number(row[key]) or 0.0), []).append(figure(row))
    x = sorted(by_value)
    mark = marks[label]
    y = [sum(by_value[value]) / len(by_value[value]) for value in x]
    names = () if joined else [*[""] * (len(x) - 1), label]
    return Series(
        label, x, y, mark.color, mark.kind, mark.dash, curve=joined, points=True, names=names
    )


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["policy"]) for row in rows))


def _varied(rows: Sequence[Row]) -> list[str]:
    """Keys of settings with more than one value, or all where none has."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key.startswith("set.")))
    return [key for key in keys if len({str(row.get(key)) for row in rows}) > 1] or keys


def _number(value: Any) -> float | None:
    """A number, or a percentage as one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    try:
        return float(str(value).removesuffix("%")) / (100 if str(value).endswith("%") else 1)
    except ValueError:
        return None


def _gpu_bytes(row: Row) -> float:
    """Of one request; 0 where the row does not say it."""
    return float(row.get("gpu_bytes") or row.get("memory_request_bytes_gpu") or 0.0)


def _speed(row: Row) -> float:
    """Requests a second within the service level, or tokens a second."""
    return float(row.get("goodput_per_s") or row.get("decode_tokens_per_s") or 0.0)


def _speed_unit(rows: Sequence[Row]) -> str:
    served = any("goodput_per_s" in row for row in rows)
    return "good requests/s*" if served else "tokens/s*"


def _speed_text(row: Row) -> str:
    return f"{_speed(row):,.4g} {_speed_unit([row])}"


def _named(row: Row, varied: Sequence[str]) -> str:
    setting = _setting(row, varied)
    return f"{row['policy']}, {setting}" if setting else str(row["policy"])


def _setting(row: Row, varied: Sequence[str]) -> str:
    told = [f"{key.removeprefix('set.')} {row[key]}" for key in varied if row.get(key) is not None]
    return ", ".join(told)


def _share(value: Any) -> str:
    return "an unknown share" if value is None else f"{value:.1%}"


def _flat(row: Row) -> dict[str, Any]:
    """One column a figure."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{key}_{part}": inner for part, inner in _flat(value).items()}
        else:
            found[key] = value
    return found
