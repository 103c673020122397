"""What decisions of `lsa` recall, and what of it comes late: a replay of the shipped traces.

    python benchmarks/bursts.py [--context 500k] [--requests 97] [--out FILE.json]

A row is a decision. Of one request: pages of a layer that it recalls, those that have spare pages
and so come ahead of it, and those that are late. Of so many requests that follow the trace, each
with a text of its own: how long all that is late would take over the link, which is what a step
would wait for; and what V4-Flash's layers wait for instead, which are the index keys that come and
go with their entries, and the late entries that the step attends to, each by itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from claims import bullets, paragraph
from published_tables import NOT_MEASURED

from fmsim import trace as traces
from fmsim.geometry import PRESETS
from fmsim.policies import registry
from fmsim.replay.decode_loop import DecodeLoop, NoTiers
from fmsim.replay.replayer import Replayer
from fmsim.replay.residency import Moves
from fmsim.sim.footprint import ModelMemory, keyed_layers, spread

ROOT = Path(__file__).parents[1]
PAGE = "benchmarks/results/bursts.md"
LINK_BYTES_PER_S = 55e9  # of a PCIe 5 link: hw/links/h200-1gpu.yaml
SPECS: tuple[dict[str, Any], ...] = (
    {"policy": "lsa", "budget": "10%", "granularity": 64},
    {"policy": "lsa", "budget": "12.5% gpu"},
)
TEXTS = ("needles", "memory", "continuation")


class Late(NoTiers):
    """Tiers that move nothing, and know of the last decision what it recalled, and late."""

    def __init__(self, spare: int) -> None:
        self.spare = spare
        self.recalled = self.pages = np.zeros(0, dtype=np.int64)
        self._ahead = self.pages

    def ahead_pages(self, request: int) -> int:
        return self.spare

    def recall_ahead(self, request: int, pages: np.ndarray, part: int) -> None:
        self._ahead = pages[pages >= 0]

    def recall(self, request: int, moves: Moves) -> None:
        self.recalled = moves.pages[moves.pages >= 0]
        self.pages = np.setdiff1d(self.recalled, self._ahead)


def decisions(path: Path, spec: dict[str, Any], requests: int) -> Iterator[dict[str, Any]]:
    """Rows of a trace under a policy whose layers share one set."""
    geometry = PRESETS["v4-flash"]
    found = traces.read(path)
    replayer = Replayer(found, memory=ModelMemory(geometry))
    policy = registry.build(spec)
    source = replayer.source(policy)
    needs = source.manager.needs
    tiers = Late(max(needs.ahead_slots))
    loop = DecodeLoop([source.book], source, tiers)
    layers = list(spread(found.n_layers, geometry.n_csa))
    keyed = keyed_layers(needs, geometry)
    for step in range(replayer.n_steps):
        loop.advance()
        if step == 0 or step % policy.params.cadence:
            continue
        page = replayer.ids[step] // needs.granularity
        attended = np.isin(page, tiers.pages) & (replayer.ids[step] >= 0)
        of_layers = attended.sum(axis=1)[layers]
        entry_bytes = needs.granularity * geometry.kv_entry_bytes * geometry.n_csa
        key_bytes = needs.granularity * geometry.index_key_bytes * (geometry.n_csa - keyed)
        late = requests * len(tiers.pages)
        yield {
            "trace": path.stem,
            "spec": spec,
            "step": step,
            "slots": max(needs.group_slots),
            "spare": tiers.spare,
            "recalled": len(tiers.recalled),
            "late": len(tiers.pages),
            "late_gb": late * (entry_bytes + key_bytes) / 1e9,
            "all_late_ms": 1e3 * late * (entry_bytes + key_bytes) / LINK_BYTES_PER_S,
            "keys_ms": 1e3 * late * key_bytes / LINK_BYTES_PER_S,
            "attended_ms": 1e3
            * requests
            * int(of_layers.sum())
            * geometry.kv_entry_bytes
            / LINK_BYTES_PER_S,
        }


def table(result: dict[str, Any]) -> str:
    """Each trace's decision that has most late, of bursts.json."""
    lines = [
        "| trace | entries a page | slots | spare | recalled | late | all late, ms | keys, ms"
        " | attended to, ms |",
        "|---" * 9 + "|",
    ]
    largest: dict[tuple[str, int], dict[str, Any]] = {}
    for row in result["rows"]:
        key = row["trace"], row["spec"].get("granularity", 1)
        largest[key] = max(largest.get(key, row), row, key=lambda each: each["late"])
    for (trace, granularity), row in largest.items():
        counts = (f"{row[name]:,}" for name in ("slots", "spare", "recalled", "late"))
        times = (f"{row[f'{name}_ms']:.1f}" for name in ("all_late", "keys", "attended"))
        cells = (trace.removeprefix("nano-"), str(granularity), *counts, *times)
        lines.append(f"| {' | '.join(cells)} |")
    told = (
        f"{result['date'][:10]}, {result['requests']} requests with texts of their own, over"
        f" {result['link_bytes_per_s'] / 1e9:.0f} GB/s. Of each trace the decision that has most"
        " late. Slots and pages are one request's, in each layer."
    )
    return "\n".join([paragraph(told), "", *lines])


def measured(result: dict[str, Any]) -> str:
    """Steps from the largest decision on, of bursts-h200.json."""
    if not result["rows"]:
        return NOT_MEASURED
    lines = [
        "| context | entries a page | requests | step, ms | slowest | steps from the decision on |",
        "|---" * 6 + "|",
    ]
    for row in result["rows"]:
        if "failed" in row:
            continue
        after = ", ".join(f"{ms:.1f}" for ms in row["steps_from_it_on_ms"])
        cells = (
            row["trace"].split("-")[1],
            str(row["spec"].get("granularity", 1)),
            str(row["batch"]),
            f"{row['step_p50_ms']:.1f}",
            f"{row['step_max_ms']:.1f}",
            after,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([paragraph(f"{result['device']}, {result['date'][:10]}."), "", *lines])


def tried(result: dict[str, Any]) -> str:
    """Steps of engines that were not kept, of bursts-tries-h200.json."""
    return bullets(
        f"{row['engine']}: {', '.join(f'{ms:.1f}' for ms in row['steps_from_it_on_ms'])} ms"
        for row in result["rows"]
    )


def parts(result: dict[str, Any]) -> str:
    """Where the step of a decision goes, of burst-parts-h200.json."""
    lines = [
        "| entries a page | decision | memory scores | lists | within the GPU | keys, GB | keys"
        " | entries, GB | entries | stood still |",
        "|---" * 10 + "|",
    ]
    for row in result["rows"]:
        lists_ms = row["lists_ms"] + row["residents_ms"]
        times = (row["decide_ms"], row["memory_scores_ms"], lists_ms, row["within_ms"])
        cells = [str(row["entries_a_page"]), *(f"{ms:.1f}" for ms in times)]
        for name in ("keys", "entries"):
            cells += [f"{row[f'{name}_gb']:.2f}", f"{row[f'{name}_ms']:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {row['graph_stood_still_ms']:.1f} |")
    told = f"{result['device']}, {result['date'][:10]}, 97 requests at 512K, in ms."
    return "\n".join([paragraph(told), "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", default="500k", help="of the shipped traces: 32k, 128k, 500k")
    parser.add_argument("--requests", type=int, default=97)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bursts.json")
    given = parser.parse_args()
    paths = [ROOT / "traces" / f"nano-{given.context}-{text}.safetensors" for text in TEXTS]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": "none: a replay",
        "command": f"python benchmarks/bursts.py --context {given.context}"
        f" --requests {given.requests}",
        "requests": given.requests,
        "link_bytes_per_s": LINK_BYTES_PER_S,
        "rows": [
            row for path in paths for spec in SPECS for row in decisions(path, spec, given.requests)
        ],
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(
            f"{row['trace']}, pages of {row['spec'].get('granularity', 1)}, step {row['step']}:"
            f" {row['recalled']} recalled, {row['late']} late, {row['all_late_ms']:.1f} ms;"
            f" keys {row['keys_ms']:.1f}, attended to {row['attended_ms']:.1f}"
        )


if __name__ == "__main__":
    main()
