"""Times every kernel over a grid of its tuning values (`fmsim/exec/kernels/tuning.py`) on one GPU:
what those values are chosen by.

    python benchmarks/tune_kernels.py [--kernel NAME ...] [--seconds 100] [--out FILE.json]

A line a setting, its time at each shape; the best of each shape is marked. A setting that does not
compile (out of registers or shared memory) is left out, and one whose result is not the reference's
is an error. Processes beside this one compile first, into Triton's cache. For the recall also how
much slower a stream of matrix products beside it becomes, which decides its number of programs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from kernel_sweeps import DEVICE, SWEEPS, Sweep

from fmsim.exec.kernels import tuning
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure.timing import captured, median_s

LIMIT = 1e-2  # relative error against the reference
RUNS = 8


def set_to(sweep: Sweep, setting: dict[str, int]) -> None:
    setattr(tuning, sweep.value, STARTING[sweep.value]._replace(**setting))


STARTING = {sweep.value: getattr(tuning, sweep.value) for sweep in SWEEPS.values()}


def error_of(case: cases.Case) -> float | None:
    if case.reference is None:
        return None
    expected, found = case.reference().double(), case.run().double()
    return float((found - expected).norm() / expected.norm())


def why_not(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"


# -------------------------------------------------------------------- compiling ahead, in processes


@torch.inference_mode()
def compile_some(jobs: list[tuple[str, str, dict[str, int]]], deadline: float) -> None:
    """Run each job once, for Triton's cache of compiled kernels.

    The time that is left is the caller's too.
    """
    for kernel, shape, setting in jobs:
        if time.time() > deadline:
            return
        set_to(SWEEPS[kernel], setting)
        try:
            SWEEPS[kernel].shapes[shape]().run()
        except Exception as error:  # it will fail again where it is timed, and be told there
            print(f"{kernel}, {shape}, {setting}: {why_not(error)}", file=sys.stderr)
        torch.cuda.empty_cache()  # the others need room too


def compile_ahead(kernels: list[str], processes: int, deadline: float) -> None:
    """All settings of all shapes, but for the recall's, whose gigabytes of pinned memory cost more
    than its compilation.
    """
    jobs = [
        (name, shape, setting)
        for name in kernels
        if name != "recall"
        for shape in SWEEPS[name].shapes
        for setting in [{}, *SWEEPS[name].settings]
    ]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_some, args=(jobs[n::processes], deadline))
        for n in range(min(processes, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


# ------------------------------------------------------------------------------------------- timing


def table_of(kernel: str, deadline: float) -> list[dict[str, Any]]:
    sweep = SWEEPS[kernel]
    rows = [
        {"kernel": kernel, "setting": setting, "us": {}, "failed": {}}
        for setting in [{}, *sweep.settings]
    ]
    for label, build in sweep.shapes.items():
        case = build()
        for row in rows:
            if time.time() > deadline:
                row["failed"][label] = "no time left"
                continue
            set_to(sweep, row["setting"])
            try:
                error = error_of(case)
                row["us"][label] = median_s(case.run, DEVICE, runs=RUNS) * 1e6
            except Exception as why:  # OutOfResources and the compiler's own errors
                row["failed"][label] = why_not(why)
                continue
            if error is not None and not error <= (0.0 if kernel == "top-k" else LIMIT):
                row["failed"][label] = f"relative error {error:.1e}"
        del case
        torch.cuda.empty_cache()
    setattr(tuning, sweep.value, STARTING[sweep.value])
    return rows


def print_table(kernel: str, rows: list[dict[str, Any]]) -> None:
    labels = list(SWEEPS[kernel].shapes)
    print(f"\n{kernel}: us at {'; '.join(labels)}")
    best = {
        label: min(
            (row["us"][label] for row in rows if label in row["us"] and label not in row["failed"]),
            default=None,
        )
        for label in labels
    }
    for row in rows:
        told = [
            (
                f"{row['us'][label]:9.1f}{'*' if row['us'][label] == best[label] else ' '}"
                if label in row["us"]
                else "        - "
            )
            for label in labels
        ]
        setting = (
            ", ".join(f"{name} {value}" for name, value in row["setting"].items()) or "as it is set"
        )
        print(
            " ".join(told),
            f" {setting}",
            *(f"[{label}: {why}]" for label, why in row["failed"].items()),
            flush=True,
        )


def slowdowns(programs: Iterable[int], deadline: float) -> list[dict[str, Any]]:
    """How much slower 5 ms of matrix products are while entries are recalled all the time: large
    ones, and a decode's with few rows.
    """
    entries = cases.recall(584, 32_768, DEVICE)
    square, thin = (torch.randn(n, 8192, device=DEVICE, dtype=torch.bfloat16) for n in (8192, 8))
    weights = torch.randn(8192, 32_768, device=DEVICE, dtype=torch.bfloat16)
    work = {
        "large products": lambda: [square @ square for _ in range(4)],
        "a decode's products": lambda: [thin @ weights for _ in range(24)],
    }
    rows = []
    for count in programs:
        if time.time() > deadline:
            break
        set_to(SWEEPS["recall"], {"programs": count})
        recall_s = median_s(entries.run, DEVICE, runs=RUNS, cold=False)
        recall, slower = captured(entries.run), {}
        for label, products in work.items():
            run = captured(products)
            alone_s = _beside(run, lambda: None, 0)
            slower[label] = _beside(run, recall, round(1.5 * alone_s / recall_s) + 1) / alone_s - 1
        rows.append(
            {
                "programs": count,
                "recall_us": recall_s * 1e6,
                "gb_per_s": entries.n_bytes / recall_s / 1e9,
                "slower": slower,
            }
        )
        told = "; ".join(f"{label} {share:+.1%}" for label, share in slower.items())
        print(
            f"recall on {count} programs, {rows[-1]['gb_per_s']:.1f} GB/s; beside it {told}",
            flush=True,
        )
    set_to(SWEEPS["recall"], {})
    return rows


def _beside(run: Callable[[], object], recall: Callable[[], object], times: int) -> float:
    """Seconds of ``run`` while ``recall`` goes on, ``times`` over, on another stream; the median of
    five.
    """
    side, found = torch.cuda.Stream(), []
    for _ in range(6):
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(times):
                recall()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found[1:])[2]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/tune_kernels.py --kernel recall --seconds 60",
    )
    parser.add_argument(
        "--kernel", action="append", choices=list(SWEEPS), help="only this one; repeat for more"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=100.0,
        help="time for all of it; what is not timed by then is left out and told",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=max(1, min(14, (os.cpu_count() or 2) - 1)),
        help="that compile ahead",
    )
    parser.add_argument("--out", type=Path, help="write all times as JSON")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/tune_kernels.py needs a CUDA device, and torch finds none")
    start, kernels = time.time(), given.kernel or list(SWEEPS)
    deadline = start + given.seconds
    compile_ahead(kernels, given.processes, start + 0.5 * given.seconds)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    rows, beside = [], []
    for number, kernel in enumerate(kernels):
        # of what is left; a kernel that needs less leaves more
        share = (deadline - time.time()) / (len(kernels) - number)
        found = table_of(kernel, time.time() + share * (0.6 if kernel == "recall" else 1.0))
        print_table(kernel, found)
        rows += found
        if kernel == "recall":
            beside = slowdowns((4, 8, 12, 16, 24, 32), deadline)
        if given.out:  # after each kernel: a run that is cut off leaves what it measured
            given.out.parent.mkdir(parents=True, exist_ok=True)
            found = {
                "device": torch.cuda.get_device_name(),
                "rows": rows,
                "recall_beside_products": beside,
            }
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
