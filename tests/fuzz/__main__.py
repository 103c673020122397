"""python -m tests.fuzz CLASS --seconds N: fresh seeds of one class, or of "all"."""

import argparse
import tempfile
import time
from pathlib import Path

from tests.fuzz.cases import CLASSES, Bench


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("kind", metavar="CLASS", choices=[*CLASSES, "all"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**12)
    given = parser.parse_args()
    kinds = list(CLASSES) if given.kind == "all" else [given.kind]
    counts = dict.fromkeys(kinds, 0)
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        ends = time.monotonic() + given.seconds
        while time.monotonic() < ends:
            kind = kinds[sum(counts.values()) % len(kinds)]
            fault = bench.run(kind, given.seed + counts[kind])
            counts[kind] += 1
            if fault:
                faults.append(fault)
                print(fault, flush=True)
    print(f"{sum(counts.values())} cases from seed {given.seed}: {counts}; {len(faults)} faults")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
