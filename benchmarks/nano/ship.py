"""Makes of recorded traces what ships: ``python benchmarks/nano/ship.py RECORDED OUT --keyed 1,4
--whole nano-32k --steps nano-500k-memory:512 ...``.

Traces of one context share a file, with the index keys of the CSA layers ``--keyed``, or all of
them where the name begins as ``--whole`` says. ``--steps`` shortens a trace. A shorter one counts
the answers that are whole in it; that it can only where all of the longer one are right, since a
trace holds no verdict of each.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.nano.measure.record_traces import MASS_BITS, with_misses
from fmsim.trace import Trace
from fmsim.trace.cut import cut, parse_numbers


def shortened(trace: Trace, steps: int) -> Trace:
    """The first steps, with their answers and `lru`'s misses in the header."""
    forced = np.asarray(trace.forced[:]).astype(bool)
    ends = np.flatnonzero(~forced & np.append(forced[1:], True)) + 1  # one past each answer
    asked, exact = (trace.header.quality.get(key, 0) for key in ("asked", "exact"))
    if not asked == exact == len(ends):
        raise FmsimError(
            f"{trace.path}: {exact} of {asked} answers are right; which ones, it does not say:"
            " leave out its --steps"
        )
    within = int((ends <= steps).sum())
    quality = {"asked": within, "exact": within} if asked else {}
    return with_misses(cut(trace, 0, steps).with_header(quality=quality))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recorded", type=Path, help="folder of traces with all layers' keys")
    parser.add_argument("out", type=Path)
    parser.add_argument("--keyed", required=True, help="CSA layers, from 0, with commas between")
    parser.add_argument("--whole", default="", help="of these contexts all layers keep their keys")
    parser.add_argument("--steps", nargs="*", default=[], help="NAME:STEPS of traces to shorten")
    args = parser.parse_args()
    most = {name: int(steps) for name, steps in (item.split(":") for item in args.steps)}
    keyed = parse_numbers(args.keyed, "--keyed")
    contexts: dict[str, list[str]] = defaultdict(list)
    for path in sorted(args.recorded.glob("*.safetensors")):
        contexts[path.stem.rpartition("-")[0]].append(path.stem)
    args.out.mkdir(parents=True, exist_ok=True)
    for context, names in contexts.items():
        whole = bool(args.whole) and context.startswith(args.whole)
        made = []
        for name in names:
            found = traces.read(args.recorded / f"{name}.safetensors", check=True)
            if name in most:
                found = shortened(found, most[name])
            made.append(traces.lightened(found, None if whole else keyed, MASS_BITS))
        paths = [args.out / f"{name}.safetensors" for name in names]
        shared = traces.write_shared(paths, made)
        print(f"{shared}: {shared.stat().st_size / 1e6:.1f} MB")
        for path, found in zip(paths, made, strict=True):
            size = path.stat().st_size / 1e6
            print(f"{path}: {found.n_steps} steps, {size:.1f} MB, {found.header.quality}")


if __name__ == "__main__":
    main()
