"""Fresh cases of one class of damaged inputs, or of all, on as many cores as there are.

    python -m tests.fuzz all --seconds 500 -j 14 --json out.json
    python -m tests.fuzz trace --seed 17 --cases 1

Every class gets the same time. A process that hangs or dies is a fault of its case, and another
takes its place. The file of counts and faults is written anew every few seconds. The exit status is
1 where there was a fault. Needs Linux.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the GPU is another's
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz.cases import CLASSES, MOST_SECONDS, Bench

TELL_S = 3.0  # between two writings of the file
LONGEST_S = 3 * MOST_SECONDS  # of a case, where the process does not stop by itself


@dataclass
class Worker:
    """A process, and the case that it works on."""

    number: int
    process: Any
    connection: Connection
    case: tuple[str, int] | None
    began_s: float


def main() -> None:
    given = _arguments()
    kinds = list(CLASSES) if given.kind == "all" else [given.kind]
    counts: Counter[str] = Counter()
    faults: list[str] = []
    began = told_s = time.monotonic()
    workers = [_start(number, kinds, given, 0) for number in range(given.jobs)]
    while workers:
        if time.monotonic() - told_s > TELL_S:
            told_s = time.monotonic()
            _write(given, counts, faults, told_s - began)
        ready = wait([worker.connection for worker in workers], timeout=1.0)
        for worker in list(workers):
            late = time.monotonic() - worker.began_s > LONGEST_S and worker.case is not None
            if worker.connection in ready:
                ended = _hear(worker, counts, faults)
            elif late:
                faults.append(f"{worker.case}: takes longer than {LONGEST_S} s and does not stop")
                ended = True
            else:
                continue
            if not ended:
                continue
            workers.remove(worker)
            worker.process.kill()
            worker.process.join()
            left_s = given.seconds - (time.monotonic() - began)
            if worker.case is not None:
                print(faults[-1], flush=True)
                counts[worker.case[0]] += 1
                if left_s > 0:
                    workers.append(_start(worker.number, kinds, given, sum(counts.values())))
    _tell(given, counts, faults, time.monotonic() - began)
    raise SystemExit(bool(faults))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("kind", metavar="CLASS", choices=[*CLASSES, "all"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=10**9, help="of each class and process")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**12)
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", help="file for counts and faults")
    return parser.parse_args()


def _start(number: int, kinds: list[str], given: argparse.Namespace, skipped: int) -> Worker:
    """`skipped` cases lie between this worker's first and the seed's own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    first = given.seed + number + given.jobs * skipped
    arguments = (theirs, kinds, first, given.jobs, given.cases, time.monotonic() + given.seconds)
    process = context.Process(target=_work, args=arguments)
    process.start()
    theirs.close()
    return Worker(number, process, ours, None, time.monotonic())


def _work(
    connection: Connection, kinds: list[str], first: int, step: int, cases: int, ends_s: float
) -> None:
    """Cases of the class that had least time so far, told when they begin and when they end."""
    spent = dict.fromkeys(kinds, 0.0)
    done = dict.fromkeys(kinds, 0)
    with tempfile.TemporaryDirectory(prefix="fmsim-fuzz-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        bench = Bench(Path(folder))
        while time.monotonic() < ends_s:
            open_kinds = [kind for kind in kinds if done[kind] < cases]
            if not open_kinds:
                break
            kind = min(open_kinds, key=spent.__getitem__)
            seed = first + step * done[kind]
            connection.send(("begins", kind, seed))
            began = time.monotonic()
            fault = bench.run(kind, seed)
            spent[kind] += time.monotonic() - began
            done[kind] += 1
            connection.send(("ended", kind, fault))


def _hear(worker: Worker, counts: Counter[str], faults: list[str]) -> bool:
    """Take in what a worker says; -> whether it has ended."""
    try:
        what, kind, about = worker.connection.recv()
    except (EOFError, OSError):
        if worker.case is not None:
            worker.process.join(5)
            faults.append(f"{worker.case}: the process ended, code {worker.process.exitcode}")
        return True
    worker.began_s = time.monotonic()
    worker.case = (kind, about) if what == "begins" else None
    if what == "ended":
        counts[kind] += 1
        if about:
            faults.append(about)
            print(about, flush=True)
    return False


def _tell(
    given: argparse.Namespace, counts: Counter[str], faults: list[str], seconds: float
) -> None:
    for kind, count in sorted(counts.items()):
        print(f"{kind:12} {count:8,}")
    total = sum(counts.values())
    print(f"{total:,} cases from seed {given.seed} in {seconds:.0f} s; {len(faults)} faults")
    _write(given, counts, faults, seconds)


def _write(
    given: argparse.Namespace, counts: Counter[str], faults: list[str], seconds: float
) -> None:
    """All or nothing: who kills this process finds the file of before."""
    if given.json:
        found = {"seed": given.seed, "seconds": seconds, "counts": counts, "faults": faults}
        part = Path(f"{given.json}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        part.replace(given.json)


if __name__ == "__main__":
    main()
