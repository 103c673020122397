"""How long a user waits: whole commands, start-up included, each as a process of its own.

python benchmarks/run.py [--repeats 3] [--out benchmarks/results/run.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMANDS = {
    "help": ["--help"],
    "500k, policies at two budgets": ["run", "scenarios/500k.yaml", "--quiet"],
    "128k, nine policies": ["run", "scenarios/128k.yaml", "--quiet"],
    "32k, nine policies": ["run", "scenarios/32k.yaml", "--quiet"],
}


def once(arguments: list[str]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds of the process and its children, GiB of the largest one's peak
    memory).
    """
    code = "import sys; from fmsim.cli import main; main()"
    measured = (
        f"import resource, subprocess, sys; done = subprocess.run([sys.executable, '-c', {code!r},"
        " *sys.argv[1:]], stdout=subprocess.DEVNULL); "
    )
    measured += (
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime,"
        " u.ru_maxrss); sys.exit(done.returncode)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", measured, *arguments], capture_output=True, text=True, check=True
    )
    cpu_s, peak_kib = map(float, done.stdout.split())
    return time.perf_counter() - start, cpu_s, peak_kib / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "run.json")
    given = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": (
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python"
            f" {platform.python_version()}"
        ),
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commands": {},
    }
    for name, arguments in COMMANDS.items():
        runs = [once(arguments) for _ in range(given.repeats)]
        row = {
            "wall_s": sorted(round(run[0], 3) for run in runs),
            "cpu_s": sorted(round(run[1], 3) for run in runs),
        }
        result["commands"][name] = row | {"peak_gib": round(max(run[2] for run in runs), 3)}
        print(
            f"{name:20} wall {row['wall_s'][0]:.2f} to {row['wall_s'][-1]:.2f} s, CPU"
            f" {row['cpu_s'][0]:.2f} s, peak {result['commands'][name]['peak_gib']:.2f} GiB"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
