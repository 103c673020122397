"""Do the published tables still hold? Reruns each that needs no GPU, and says what disagrees.

    python benchmarks/answers.py                 # under 10 minutes on two idle cores
    python benchmarks/answers.py --only paper    # one of them; --list names them
    python benchmarks/answers.py --tables        # seconds: only the pages beside the result files
    python benchmarks/answers.py --update        # writes result files and tables

Each answer has one file in benchmarks/results. What is computed anew is compared with the file
(but for dates, machines and times). The marked parts of README, docs and results, tables and
sentences (`benchmarks/claims.py`), are compared with what the file renders to. Exit code 1: one
disagrees; each disagreement is a line with file, line, table and cell. What needs a GPU is not
computed here; its tables are compared.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # policies have a process each

import accuracy
import blind
import bursts
import claims
import foresight
import headline
import indexer
import lead
import leaderboard
import paper
import published_tables as tables
import quality
import regions
import serve
import served as served_file
import shares
import steps
import witness_tables

from fmsim.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
# Of a machine and a moment, not of what is asked.
APART = {"date", "seconds", "device", "command", "wall_s", "cpu_s", "fmsim", "sha256"}
CLOSE = 1e-6  # relative: another processor adds in another order
MOST_SHOWN = 20  # differences of one result file

Result = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """One result file, how it comes about, and where it is shown."""

    file: str  # in `folder`
    compute: Callable[[Tell], Result] | None = None  # None: not here
    # (page, name of the marked part) -> its text
    parts: Mapping[tuple[str, str], Callable[[Result], str]] = field(default_factory=dict)
    pictures: Mapping[str, Callable[[Result], str]] = field(default_factory=dict)
    folder: str = RESULTS

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return f"{self.folder}/{self.file}"

    @property
    def path(self) -> Path:
        return ROOT / self.name

    def stored(self) -> Result | None:
        """What the file holds; None where there is none yet."""
        if not self.path.is_file():
            return None
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix == ".jsonl":  # a log: rows with a command each
            return {"rows": [json.loads(line) for line in text.splitlines()]}
        found: Result = json.loads(text)
        return found


def default_scenario(tell: Tell) -> Result:
    """What `fmsim run scenarios/500k.yaml --json` prints."""
    from fmsim.experiments.run import run_scenario
    from fmsim.scenario import ScenarioFile

    with _in_root():
        report = run_scenario(ScenarioFile("scenarios/500k.yaml"))
    plain: Result = json.loads(json.dumps(report.as_json()))
    return {"command": "fmsim run scenarios/500k.yaml --json"} | plain


class _in_root:
    """Paths in the result are relative to the repository."""

    def __enter__(self) -> None:
        self.before = os.getcwd()
        os.chdir(ROOT)

    def __exit__(self, *args: object) -> None:
        os.chdir(self.before)


def _but_float8_rows(result: Result) -> str:
    return tables.kernels(result, elsewhere="float8 linear, float8 rows")


def picture(result: Result) -> str:
    from fmsim.report.tables import decode

    return decode.svg(result, "fmsim run scenarios/500k.yaml")


def published_paper(tell: Tell) -> Result:
    result = {"command": "python benchmarks/paper.py", "serving_constants_set_on": paper.SET_ON}
    return result | {"serving": paper.serving(), "footprints": paper.footprints()}


def published_steps(tell: Tell) -> Result:
    """The rows beside published servers; those that were left out need NVIDIA's wheel."""
    return {"published": steps.published()}


def served(tell: Tell) -> Result:
    """Sizes of the timed serving runs; each runs once."""
    return serve.measured(repeat=1)


ACCURACY = "benchmarks/results/accuracy.md"
_ANSWERS: dict[str, Answer] = {
    "500k": Answer(
        "500k.json",
        default_scenario,
        {("docs/tutorial/first-answer.md", "first table"): lead.first_table},
        {"docs/img/500k.svg": picture},
    ),
    "quality": Answer(
        "quality.json",
        lambda tell: quality.measured(),
        pictures={quality.PICTURE: quality.picture},
    ),
    "steps": Answer(
        "steps.json",
        published_steps,
        {("benchmarks/results/published.md", "step times"): tables.step_times},
    ),
    "paper": Answer(
        "paper.json",
        published_paper,
        {
            ("benchmarks/results/published.md", "paper serving"): tables.paper_serving,
            ("benchmarks/results/published.md", "paper footprints"): tables.paper_footprints,
        },
    ),
    "serve": Answer("serve.json", served),
    "served": Answer("served.json", None, served_file.PARTS),  # needs a file from elsewhere
    "indexer": Answer(
        "indexer.json",
        lambda tell: indexer.measured(progress=tell),
        {("benchmarks/results/indexer.md", indexer.PART): indexer.tables},
    ),
    "leaderboard": Answer(
        "leaderboard.json",
        lambda tell: leaderboard.measured(progress=tell),
        {("docs/leaderboard.md", leaderboard.PART): leaderboard.tables},
    ),
    "headline": Answer(
        "headline.json",
        None,
        {
            (page, part): lambda result, part=part: headline.tables(result)[part]
            for page, part in headline.PAGES.items()
        }
        | {("README.md", "agreement"): lead.agreement},
    ),
    "exec": Answer(
        "exec.json",
        None,
        {
            ("benchmarks/results/whole-steps.md", "synthetic weights"): tables.synthetic,
            ("README.md", "one gpu"): lead.one_gpu,
        },
    ),
    "kernels": Answer(
        "kernels.json", None, {("benchmarks/results/kernels.md", "kernels"): tables.kernels}
    ),
    "kernels-h200": Answer(
        "kernels-h200.json",
        None,
        {("benchmarks/results/kernels-h200.md", "kernels on an H200"): _but_float8_rows},
    ),
    "float8-products-h200": Answer(
        "float8-products-h200.json",
        None,
        {("benchmarks/results/kernels-h200.md", "float8 products"): tables.float8_products},
    ),
    "two-gpus-h200": Answer(
        "two-gpus-h200.json",
        None,
        {("benchmarks/results/engine-steps.md", "two GPUs"): tables.two_gpus},
    ),
    "batches-h200": Answer("batches-h200.json"),
    "nano": Answer("nano2-answers.jsonl"),
    "live-gap": Answer("live-gap.json"),
    "generate": Answer("generate.json"),
    "accuracy-fallback-8k": Answer(
        "accuracy-fallback-8k.json",
        None,
        {
            (ACCURACY, "fallback at 8K"): tables.fallback,
            (ACCURACY, "signals at 8K"): tables.signals,
        },
    ),
    "answers-kept": Answer(
        "answers_kept.json",
        None,
        {
            (ACCURACY, "answers kept"): tables.answers_kept,
            ("README.md", "accuracy"): tables.answers_kept_short,
        },
        folder="fmsim/experiments/accuracy",
    ),
    "accuracy": Answer(
        "accuracy.json",
        None,
        {
            ("benchmarks/results/accuracy-costs.md", "accuracy"): accuracy.tables,
            (ACCURACY, "families"): accuracy.families,
            (ACCURACY, "mass as a guide"): accuracy.guide,
            (ACCURACY, "shares"): lambda result: shares.table(result["shares"]),
        },
        {accuracy.PICTURE: accuracy.picture},
    ),
    "indexer-curve": Answer(
        "indexer-curve.json",
        None,
        {("benchmarks/results/indexer.md", indexer.CURVE): indexer.curve},
    ),
    "foresight-fit": Answer(
        "foresight-fit.json",
        None,
        {("benchmarks/results/foresight.md", foresight.FITTED): foresight.fitted},
    ),
    "ladder": Answer(
        "ladder.json",
        None,
        {("benchmarks/results/foresight.md", foresight.PART): foresight.tables},
    ),
    "witness": Answer("witness.json", None, witness_tables.PARTS),
    "step": Answer("step-h200.json"),
    "step-tries": Answer("step-tries-h200.json"),
    "bookkeeping": Answer("bookkeeping-h200.json"),
    "bursts": Answer("bursts.json", None, {(bursts.PAGE, "late pages"): bursts.table}),
    "bursts-h200": Answer("bursts-h200.json", None, {(bursts.PAGE, "bursts"): bursts.measured}),
    "burst-parts": Answer(
        "burst-parts-h200.json", None, {(bursts.PAGE, "parts of a burst"): bursts.parts}
    ),
    "bursts-tries": Answer(
        "bursts-tries-h200.json", None, {(bursts.PAGE, "bursts tried"): bursts.tried}
    ),
}
# one a card, of those that were measured
_ANSWERS |= {
    path.stem: Answer(path.name, None, {blind.part_of(path): blind.table})
    for path in sorted((ROOT / RESULTS).glob("blind-*.json"))
}
ANSWERS = {
    name: replace(answer, parts={**answer.parts, **claims.PARTS.get(answer.file, {})})
    for name, answer in _ANSWERS.items()
}


def disagreements(
    answer: Answer, page_of: Callable[[str], str], computed: Result | None = None
) -> Iterator[str]:
    """Where the file differs from what was computed, and pages from what the file renders to, or
    from what the computed result does.
    """
    stored = answer.stored()
    if computed is not None:
        if stored is None:
            yield f"{answer.name}: there is none; --update writes it"
        else:
            yield from _between(answer, stored, computed)
    shown = stored if computed is None else settled(stored, computed)
    for (page, part), render in answer.parts.items():
        made = tables.NOT_MEASURED if shown is None else render(shown)
        yield from _in_page(page, part, page_of(page), made)
    for path, draw in answer.pictures.items():
        if shown is not None and page_of(path) != draw(shown):
            yield f"{path}: the picture is not what {answer.name} gives"


def settled(stored: Result | None, computed: Result) -> Result:
    """What the file should hold: itself where nothing else than times and the like differs, so that
    figures of a machine stay those of one run; else what was computed, and what the old file has
    that needs more than this.
    """
    if stored is not None and not any(differences(stored, computed)):
        return stored
    return (stored or {}) | computed


def differences(
    stored: Result, computed: Result
) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """(path, old, new) of what was computed and differs."""
    return compare({key: stored.get(key) for key in computed}, computed)


def _between(answer: Answer, stored: Result, computed: Result) -> Iterator[str]:
    found = list(differences(stored, computed))
    for path, old, new in found[:MOST_SHOWN]:
        line = ".".join(map(str, path))
        yield f"{answer.name}: {line}: the file has {old!r}, computed is {new!r}"
    if len(found) > MOST_SHOWN:
        yield f"{answer.name}: and {len(found) - MOST_SHOWN} more"


def compare(
    old: Any, new: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """(path, old, new) of all that differs, but for what is APART and for rounding."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if key not in APART:
                yield from compare(old.get(key), new.get(key), (*path, key))
    elif isinstance(old, list) and isinstance(new, list | tuple) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from compare(a, b, (*path, index))
    elif isinstance(old, float | int) and isinstance(new, float | int):
        if not math.isclose(old, new, rel_tol=CLOSE, abs_tol=1e-9):
            yield path, old, new
    elif old != new:
        yield path, old, new


def _in_page(page: str, part: str, text: str, made: str) -> Iterator[str]:
    """Lines and cells of a page's part that are not what they should be."""
    try:
        found = regions.find(text)[part].splitlines()
        first = regions.line_of(text, part)
    except (KeyError, ValueError) as error:
        yield f"{page}: {error}"
        return
    head: list[str] = []
    for offset, (old, new) in enumerate(itertools.zip_longest(found, made.splitlines())):
        if new is not None and new.startswith("|---"):
            head = made.splitlines()[offset - 1].split("|")
        if old == new:
            continue
        where = f"{page}, line {first + offset}, table {part!r}"
        cells, wanted = ((line or "").split("|") for line in (old, new))
        if len(cells) != len(wanted) or len(cells) < 3:
            yield f"{where}: has {old!r}, should be {new!r}"
            continue
        for place, (a, b) in enumerate(zip(cells, wanted, strict=True)):
            if a != b:
                column = head[place].strip() if place < len(head) else place
                yield (
                    f"{where}, cell {cells[1].strip()!r} / {column!r}: has {a.strip()!r}, should be"
                    f" {b.strip()!r}"
                )


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def update(answer: Answer, computed: Result | None) -> None:
    """Write the result file, where it was computed, and every table and picture of it."""
    stored = answer.stored()
    if computed is not None:
        found = settled(stored, computed)
        if found is not stored:
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            stored = json.loads(json.dumps(found | {"date": date}))
            write_text(answer.path, json.dumps(stored, indent=1) + "\n")
    for (page, part), render in answer.parts.items():
        made = tables.NOT_MEASURED if stored is None else render(stored)
        write_text(ROOT / page, regions.replace(read_page(page), part, made))
    for path, draw in answer.pictures.items():
        if stored is not None:
            write_text(ROOT / path, draw(stored))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*ANSWERS], help="repeat for more")
    parser.add_argument("--tables", action="store_true", help="compute nothing; pages and files")
    parser.add_argument("--update", action="store_true", help="write what would disagree")
    parser.add_argument("--list", action="store_true", help="name the answers")
    given = parser.parse_args(arguments)
    if given.list:
        for name, answer in ANSWERS.items():
            how = "computed here" if answer.compute else "only its tables"
            print(f"{name:22} {answer.name}, {how}")
        return 0
    start = time.perf_counter()
    failed = False
    for name in given.only or ANSWERS:
        answer = ANSWERS[name]
        tell = partial(_tell, name)
        computed = answer.compute(tell) if answer.compute and not given.tables else None
        found = list(disagreements(answer, read_page, computed))
        if given.update:
            update(answer, computed)
        for line in found:
            print(line, flush=True)
        failed = failed or bool(found)
        said = "agrees" if not found else "updated" if given.update else "disagrees"
        tell(f"{said}, {time.perf_counter() - start:.0f} s gone")
    return int(failed and not given.update)


def _tell(name: str, text: str) -> None:
    print(f"{name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
