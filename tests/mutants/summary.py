"""What became of a run's mutants, in short: counts by room, and each survivor with a verdict.

    python -m tests.mutants.summary out.jsonl verdicts.json --device "one core" \
        --out benchmarks/results/mutants.json

`out.jsonl` is the driver's. `verdicts.json` says of survivors that no test can tell why that is so:
{"path:line function: what: its first changed line": "reason"}. A survivor that it does not name is
one that a test should have noticed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fmsim.files import replacing

DIED = ("killed", "timed out")


def summary(rows: Iterable[dict[str, Any]], verdicts: dict[str, str]) -> dict[str, Any]:
    """Of outcomes, as the driver writes them after its first line; unfinished ones do not count.

    `died_share` is of all, `died_share_of_others` without those that `verdicts` call equivalent.
    """
    counts: dict[str, dict[str, Any]] = {}
    survivors = []
    for row in rows:
        if row["state"] == "unfinished":
            continue
        name = name_of(row["diff"])
        for room in (row["room"], "all"):
            count = counts.setdefault(room, {"mutants": 0, "died": 0, "equivalent": 0})
            count["mutants"] += 1
            count["died"] += row["state"] in DIED
            count["equivalent"] += row["state"] not in DIED and name in verdicts
        if row["state"] not in DIED:
            survivors.append({"mutant": name, "equivalent": verdicts.get(name)})
    for count in counts.values():
        others = count["mutants"] - count["equivalent"]
        count["died_share"] = round(count["died"] / count["mutants"], 4)
        count["died_share_of_others"] = round(count["died"] / others, 4) if others else 1.0
    return {"rooms": counts, "survivors": survivors}


def name_of(diff: str) -> str:
    """A mutant's place, what it is, and the first line that it changes."""
    where, *lines = diff.split("\n")
    changed = next(line for line in lines if line.startswith("+"))
    return f"{where}: {changed[1:].strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.summary")
    parser.add_argument("outcomes", type=Path)
    parser.add_argument("verdicts", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--date", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    first, *rows = map(json.loads, given.outcomes.read_text(encoding="utf-8").splitlines())
    verdicts = json.loads(given.verdicts.read_text(encoding="utf-8"))
    options = (f"--seed {first['seed']} --count {first['count']} -j {first['jobs']}", "--json FILE")
    found = {
        "date": given.date,
        "device": given.device,
        "command": " ".join(("python -m tests.mutants", *options)),
        "tests": len(first["tests"]),
        "tests_left_out": len(first["left_out"]),
        **summary(rows, verdicts),
    }
    with replacing(given.out) as beside:
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
