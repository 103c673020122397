"""The simulator's step times beside a GPU's, at settings that its calibration never timed.

On a GPU; several processes, one a GPU, share the rows through a folder (`CUDA_VISIBLE_DEVICES`):

    fmsim hw calibrate --model scenarios/one-gpu --out mine.yaml
    python benchmarks/blind.py --parts blind --seconds 230

Anywhere, from the folder and the preset:

    python benchmarks/blind.py --join blind --hardware mine.yaml [--before earlier]

A row is a policy, a context and a batch: whole decode steps of V4-Flash with 16 of its 256 experts
a layer and random weights, requests in step on a recorded trace. What is measured knows nothing of
what is simulated, and the other way round; a digest of the simulator's source is written beside
each row, and `--join` says whether the simulator that predicts is that one still. A row that an
`earlier` folder has was looked at before, with code that may have been mended on seeing it: such
rows are counted apart. What a later simulator says of rows that were looked at is a result of its
own, and no blind one:

    python benchmarks/blind.py --join blind --hardware mine.yaml --before blind \
        --out benchmarks/results/blind-after-h200.json
    python benchmarks/blind.py --show benchmarks/results/blind-after-h200.json

`--draw 30 --seed 1129` takes so many other rows, drawn by the seed, on both sides.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import regions
import yaml
from blind_rows import ROWS, Ask, drawn
from claims import paragraph
from headline import MODEL, ROOT, scenario

from fmsim.errors import FmsimError
from fmsim.files import write_text

RESULTS = ROOT / "benchmarks" / "results"
PAGE = "benchmarks/results/blind-rows.md"
PLACE = "<!-- rows of another card come here -->"  # in the page
ERROR = 0.05  # of a step's median and of tokens/s
SHARE = 0.95  # of the rows, that are to be within it
FROZEN = ("hw", "sim", "replay", "policies", "geometry")  # rooms whose source a prediction runs

Row = dict[str, Any]


class Bench:
    """Measures `rows` on one GPU, with one set of random weights."""

    def __init__(self, model: str, device: str, rows: Sequence[Ask] = ROWS) -> None:
        self.model = model
        self.device = device
        self.rows = rows
        self.weights: Any = None
        self.n_experts = 0
        self._worlds: dict[tuple[str, int], Any] = {}

    def worlds(self, ask: Ask) -> Any:
        """A context's trace with all policies that are asked for there, read once."""
        from fmsim.experiments.validate import Worlds

        key = ask.context, ask.steps
        if key not in self._worlds:
            alike = [other for other in self.rows if (other.context, other.steps) == key]
            entries = {other.label: other.entry for other in alike}
            file = scenario(ask.context, list(entries.values()), self.model)
            self._worlds[key] = Worlds(file, self.device, ask.steps)
        return self._worlds[key]

    def row(self, ask: Ask) -> Row:
        """A row's measured part; "failed" says why where it cannot be had."""
        import torch

        from fmsim.exec.decode.trace_driven import device_name
        from fmsim.exec.runs.synthetic import weights_for
        from fmsim.experiments.whole_steps import measured

        start = time.perf_counter()
        row: Row = ask._asdict() | {"steps": ask.steps}
        try:
            worlds = self.worlds(ask)
            if self.weights is None:
                self.weights, self.n_experts = weights_for(worlds.geometry, self.device, 0, seed=0)
            row |= measured(worlds, ask.label, ask.batch, self.weights)
        except (FmsimError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
            row["failed"] = f"{type(error).__name__}: {error}"
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return row | {
            "experts": self.n_experts,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device_name(self.device),
            "software": f"torch {torch.__version__}, Python {platform.python_version()}",
            "model": self.model,
            "simulator": simulator(),
            "wall_s": round(time.perf_counter() - start, 1),
        }


def simulator() -> str:
    """A digest of all source that a prediction runs."""
    digest = hashlib.sha256()
    for room in FROZEN:
        for path in sorted((ROOT / "fmsim" / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def measure(asks: Sequence[Ask], bench: Bench, seconds: float, folder: Path) -> int:
    """Rows that no process has measured or is measuring, one after the other into `folder`, until
    `seconds` have gone by; -> how many failed.

    None is begun that would end later if it took as long as the longest before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    longest_s = 0.0
    n_failed = 0
    for ask in asks:
        if time.perf_counter() - start + longest_s > seconds:
            print(f"{ask.name}: and what follows is left out", file=sys.stderr)
            break
        if (folder / f"{ask.name}.json").exists() or not _claimed(folder / f"{ask.name}.claim"):
            continue
        row = bench.row(ask)
        longest_s = max(longest_s, row["wall_s"])
        n_failed += "failed" in row
        write_text(folder / f"{ask.name}.json", json.dumps(row, indent=1) + "\n")
        shown = row.get("failed") or f"{1e3 * row['measured_step_p50_s']:.2f} ms"
        print(f"{ask.name}: {shown}, took {row['wall_s']} s", file=sys.stderr, flush=True)
    return n_failed


def _claimed(path: Path) -> bool:
    """Take a row for this process; one that a dead process had is free."""
    while True:
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
            return True
        except FileExistsError:
            owner = path.read_text() or "0"
        if owner == "0" or _lives(int(owner)):
            return False
        path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def join(
    folder: Path, hardware: Path, before: Sequence[Path] = (), asks: Sequence[Ask] = ROWS
) -> Row:
    """The result: all rows of `folder` that are asked, each with what is simulated for it on
    `hardware`, and whether one of the folders `before` has it too.
    """
    from fmsim.experiments.whole_steps import errors, simulated
    from fmsim.hw import load_hardware

    preset = yaml.safe_load(hardware.read_text(encoding="utf-8"))
    hw = load_hardware(hardware.name, hardware.resolve().parent)
    rows: list[Row] = []
    missing: list[str] = []
    benches: dict[str, Bench] = {}
    for ask in asks:
        path = folder / f"{ask.name}.json"
        if not path.exists():
            missing.append(ask.name)
            continue
        row = json.loads(path.read_text(encoding="utf-8"))
        row["looked_at"] = any((each / path.name).exists() for each in before)
        if "failed" not in row:
            bench = benches.setdefault(row["model"], Bench(row["model"], "cpu", asks))
            worlds = bench.worlds(ask)
            row |= simulated(worlds, ask.label, hw, ask.batch, row["warm_up_steps"])
            row |= errors(row)
        rows.append(row)
    if not rows:
        raise FmsimError(f"--join {folder}: holds no rows; measure some with --parts {folder}")
    common = ("device", "software", "model", "experts", "simulator")
    for key in common:
        if len({row[key] for row in rows}) > 1:
            found = ", ".join(sorted({str(row[key]) for row in rows}))
            raise FmsimError(f"--join {folder}: rows differ in their {key}: {found}")
    head = {key: rows[0][key] for key in common}
    within = [row for row in rows if "failed" not in row and off(row) <= ERROR]
    unseen = [row for row in rows if not row["looked_at"]]
    return head | {
        "date": max(row["date"] for row in rows),
        "command": "python benchmarks/blind.py --parts blind",
        "preset": {"title": preset["title"], "kernel_source": preset["kernel_source"]},
        "frozen": head["simulator"] == simulator(),
        "predicted_by": simulator(),
        "measured": ["measured_step_p50_s", "measured_tokens_per_s"],
        "simulated": ["simulated_step_p50_s", "simulated_tokens_per_s"],
        "within": len(within),
        "unseen": len(unseen),
        "unseen_within": sum(not row["looked_at"] for row in within),
        "missing": missing,
        "rows": [
            {key: value for key, value in row.items() if key not in (*common, "params")}
            | {"params": row["params"]}
            for row in rows
        ],
    }


def off(row: Row) -> float:
    """The larger of a row's two errors."""
    return max(abs(row["step_error"]), abs(row["tokens_error"]))


def table(result: Row) -> str:
    """What the marked part of the results' page holds."""
    lines = [
        "| context | policy | requests | step simulated, ms | measured, ms | off"
        " | tokens/s simulated | measured | off |",
        "|---" * 9 + "|",
    ]
    failed = []
    for row in result["rows"]:
        if "failed" in row:
            failed.append(f"{row['context']}, `{row['label']}`, {row['batch']}: {row['failed']}")
            continue
        seen = " (seen)" if row["looked_at"] and result["unseen"] else ""
        cells = (
            row["context"],
            row["label"] + seen,
            str(row["batch"]),
            f"{1e3 * row['simulated_step_p50_s']:.2f}",
            f"{1e3 * row['measured_step_p50_s']:.2f}",
            f"{row['step_error']:+.1%}",
            f"{row['simulated_tokens_per_s']:,.1f}",
            f"{row['measured_tokens_per_s']:,.1f}",
            f"{row['tokens_error']:+.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    n_rows = len(result["rows"])
    after = "" if result["frozen"] else " The simulator was changed after these rows were measured."
    head = (
        f"{result['device']}, {result['date'][:10]}: {result['within']} of {n_rows} rows within"
        f" {ERROR:.0%} in both figures.{after}"
    )
    if not result["unseen"]:
        head += " All had been seen before it said this of them."
    elif result["unseen"] < n_rows:
        head += (
            f" Those marked as seen had been measured before, and the simulator was mended on"
            f" seeing them. Of the {result['unseen']} others {result['unseen_within']} are within."
        )
    if result["missing"]:
        failed.append(f"Not measured: {len(result['missing'])} rows.")
    return "\n\n".join([paragraph(head), "\n".join(lines), *failed])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, help="folder that rows are measured into")
    parser.add_argument(
        "--row", action="append", help="only those of such a name (*); repeat, and in this order"
    )
    parser.add_argument("--draw", type=int, help="so many rows at random, for those that stand")
    parser.add_argument("--seed", type=int, default=0, help="of --draw")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row later")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one by default")
    parser.add_argument("--model", default=MODEL, help="a preset, or a folder with a config.json")
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    parser.add_argument("--join", type=Path, help="folder of rows that were measured")
    parser.add_argument(
        "--before", type=Path, nargs="+", default=[], help="folders of rows of earlier code"
    )
    parser.add_argument("--hardware", type=Path, help="preset of `fmsim hw calibrate`, for --join")
    parser.add_argument("--show", type=Path, help="a result, to be put into its page")
    parser.add_argument("--out", type=Path, help="the result; by default results/blind-DEVICE.json")
    given = parser.parse_args()
    rows = drawn(given.draw, given.seed) if given.draw else ROWS
    patterns = given.row or ["*"]
    asked = {ask.name: ask for each in patterns for ask in rows if fnmatch(ask.name, each)}
    asks = list(asked.values())
    if given.list:
        print("\n".join(ask.name for ask in asks))
        return 0
    if given.show:
        show(given.show)
        return 0
    try:
        if given.join:
            if given.hardware is None:
                parser.error("--join needs --hardware, the preset that was calibrated there")
            result = join(given.join, given.hardware, given.before, rows)
            if given.draw:
                result["command"] += f" --draw {given.draw} --seed {given.seed}"
            return _write(result, given.out)
        if given.parts is None:
            parser.error("give --parts, a folder for the rows, or --join")
        import torch

        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        n_failed = measure(asks, Bench(given.model, device, rows), given.seconds, given.parts)
    except FmsimError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if n_failed else 0


def part_of(path: Path) -> tuple[str, str]:
    """The page, and the name of its part, that shows a result file."""
    return PAGE, path.stem.replace("-", " ")


def _write(result: Row, out: Path | None) -> int:
    card = result["device"].split()[1].lower() if "NVIDIA" in result["device"] else "cpu"
    path = out or RESULTS / f"blind-{card}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    if out is None:
        show(path)
    print(table(result))
    return 0 if result["within"] >= SHARE * len(result["rows"]) else 1


def show(path: Path) -> None:
    """Put a result's table into its part of the page, which is made where there is none."""
    _, part = part_of(path)
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    if part not in regions.find(page):
        page = page.replace(PLACE, f"{regions.marked(part, 'benchmarks/blind.py')}\n{PLACE}")
    made = table(json.loads(path.read_text(encoding="utf-8")))
    write_text(ROOT / PAGE, regions.replace(page, part, made))


if __name__ == "__main__":
    sys.exit(main())
