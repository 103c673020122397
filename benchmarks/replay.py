"""How fast policies replay: lru against libCacheSim on the same accesses, all policies, and growth
with the context.

    python benchmarks/replay.py [--trace TRACE] [--repeats 3] [--out benchmarks/results/replay.json]

The accesses are V4-Flash's in shape (21 CSA layers, 512 steps, 512 entries selected) and made up in
content: seven in ten come back at the next step. Only times and hit counts are taken from them.
libCacheSim replays one file a layer through one cache a layer, each step's entries in ascending
order; hit counts differ since it evicts within a step and fmsim between steps. Its hash tables are
sized to the cache (2^12 buckets); with its default of 2^24 for each of 21 caches, clearing and
paging them takes most of its time, so that figure stands beside as "default_tables". Times are CPU
seconds of one thread, which other work on the machine disturbs less than it does the clock.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fmsim.policies import registry
from fmsim.replay.replayer import Replayer

LAYERS, STEPS, TOPK = 21, 512, 512
RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])


class Made:
    """Made-up accesses over `entries` entries of prompt.

    With `still`, no entry closes, as a cache benchmark needs.
    """

    def __init__(
        self, entries: int, layers: int = LAYERS, still: bool = False, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.entry_ids = np.empty((STEPS, layers, TOPK), dtype=np.int32)
        for layer in range(layers):
            chosen = rng.choice(entries, TOPK, replace=False)
            for step in range(STEPS):
                kept = chosen[rng.random(TOPK) < 0.7]
                fresh = np.unique(np.concatenate([kept, rng.integers(0, entries, 2 * TOPK)]))
                fresh = np.setdiff1d(fresh, kept, assume_unique=True)
                chosen = np.concatenate([kept, rng.permutation(fresh)[: TOPK - kept.size]])
                self.entry_ids[step, layer] = np.sort(chosen)
        mass = rng.random(self.entry_ids.shape, dtype=np.float32) ** 8
        self.mass = (mass / mass.sum(-1, keepdims=True) / 2).astype(np.float16).astype(np.float32)
        self.header = SimpleNamespace(prompt_tokens=4 * entries, entry_tokens=4, tau=64, seed=seed)
        self.hidden = self.index_keys = self.prompt_mass = None
        self.holds_labels, self.csa_numbers = False, range(layers)
        self.still = still

    def n_entries(self, step: int) -> int:
        return (self.header.prompt_tokens + (0 if self.still else step + 1)) // 4


def best_of(repeats: int, work: Any) -> tuple[float, Any]:
    """The shortest of several runs, in CPU seconds (both sides use one thread), and the last
    result.
    """
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result


def against_libcachesim(repeats: int) -> dict[str, Any]:
    """lru here and there, in turn, on the same accesses with the same slots: 2 x top-k in each
    layer, empty at first.
    """
    import libcachesim as lcs

    made = Made(128_000, still=True)
    replayer, slots = Replayer(made, cold=True), 2 * TOPK
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(layer) for layer in range(LAYERS)]
        for layer, path in enumerate(paths):
            records = np.zeros(STEPS * TOPK, RECORD)
            records["time"], records["size"], records["next"] = (
                np.arange(STEPS * TOPK) // TOPK,
                1,
                -1,
            )
            records["id"] = made.entry_ids[:, layer].reshape(-1) + 1
            records.tofile(path)

        def theirs(table_bits: int) -> float:
            readers = [
                lcs.TraceReader(str(path), lcs.TraceType.ORACLE_GENERAL_TRACE) for path in paths
            ]
            return (
                sum(
                    1 - lcs.LRU(cache_size=slots, hashpower=table_bits).process_trace(reader)[0]
                    for reader in readers
                )
                / LAYERS
            )

        pairs = [
            (
                best_of(1, lambda: replayer.run(registry.build("lru"))),
                best_of(1, lambda: theirs(12)),
            )
            for _ in range(repeats)
        ]
        default_s, _ = best_of(1, lambda: theirs(24))
    accesses = made.entry_ids.size
    ours_s, theirs_s = min(ours[0] for ours, _ in pairs), min(other[0] for _, other in pairs)
    ledger = pairs[-1][0][1]
    return {
        "accesses": accesses,
        "fmsim_cpu_s": [round(ours[0], 4) for ours, _ in pairs],
        "libcachesim_cpu_s": [round(other[0], 4) for _, other in pairs],
        "libcachesim_default_tables_cpu_s": round(default_s, 4),
        "fmsim_accesses_per_s": round(accesses / ours_s),
        "libcachesim_accesses_per_s": round(accesses / theirs_s),
        "speed_ratio": round(theirs_s / ours_s, 3),
        "fmsim_hit_share": round(float(ledger.hit.sum() / ledger.accessed.sum()), 4),
        "libcachesim_hit_share": round(pairs[-1][1][1], 4),
    }


def all_policies(repeats: int, trace: Any) -> dict[str, Any]:
    """Seconds of each policy, one after another, on one core."""
    read_s, replayer = best_of(repeats, lambda: Replayer(trace))
    names = [name for name in registry.names() if replayer.has_lookahead or name != "lsa"]
    seconds = {
        name: round(best_of(repeats, lambda name=name: replayer.run(registry.build(name)))[0], 4)
        for name in names
    }
    return {
        "shape": list(replayer.ids.shape),
        "entries": replayer.entries[-1],
        "read_cpu_s": round(read_s, 4),
        "policy_cpu_s": seconds,
        "total_cpu_s": round(read_s + sum(seconds.values()), 4),
    }


def growth(repeats: int) -> list[dict[str, Any]]:
    """Seconds from 32K to 1M tokens of context."""
    rows = []
    for tokens in (32_768, 131_072, 524_288, 1_048_576):
        replayer = Replayer(Made(tokens // 4))
        times = {
            name: round(
                best_of(repeats, lambda name=name: replayer.run(registry.build(name)))[0], 4
            )
            for name in ("lru", "h2o", "oracle")
        }
        rows.append({"context_tokens": tokens, "cpu_s": times})
        print(
            f"  {tokens:>9,} tokens  "
            + "  ".join(f"{name} {value:.2f} s" for name, value in times.items()),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--trace", type=Path, help="a recorded trace to time all policies on, lsa among them"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "replay.json"
    )
    given = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": (
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python"
            f" {platform.python_version()}, numpy {np.__version__}"
        ),
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    versus = result["lru_against_libcachesim"] = against_libcachesim(given.repeats)
    print(
        f"lru, {versus['accesses']:,} accesses: fmsim {versus['fmsim_accesses_per_s'] / 1e6:.1f}"
        f" million/s, libCacheSim {versus['libcachesim_accesses_per_s'] / 1e6:.1f} million/s, ratio"
        f" {versus['speed_ratio']:.2f}"
    )
    tables = {"made_up_21_layers": Made(128_000)}
    if given.trace:
        from fmsim.trace import read

        tables[given.trace.name] = read(given.trace)
    for label, trace in tables.items():
        row = result.setdefault("all_policies", {})[label] = all_policies(given.repeats, trace)
        print(
            f"{label} {row['shape']} of {row['entries']:,}: "
            + ", ".join(f"{k} {v:.2f}" for k, v in row["policy_cpu_s"].items())
            + f"; total {row['total_cpu_s']:.2f} s"
        )
    print("growth with the context:")
    result["growth"] = growth(given.repeats)
    result["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"peak memory {result['peak_memory_gib']:.2f} GiB; written to {given.out}")


if __name__ == "__main__":
    main()
