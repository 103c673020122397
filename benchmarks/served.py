"""One request file, served in five ways: benchmarks/results/served.md.

    python benchmarks/served.py conversation_trace.jsonl

The file is Mooncake's conversation trace (github.com/kvcache-ai/Mooncake, Apache-2.0); its first
3,000 lines are served, at 0.3 of its speed, on 8 x H100 under two policies that replay a trace of
nano. All is simulated. It takes some two minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import regions
from claims import bullets, paragraph
from published_tables import table

from fmsim.experiments.serve import serve_scenario
from fmsim.files import write_text
from fmsim.geometry import PRESETS
from fmsim.scenario import ScenarioFile

ROOT = Path(__file__).parents[1]
FILE = "benchmarks/results/served.json"
PAGE = "benchmarks/results/served.md"
LINES, SPEED = 3000, 0.3
BLOCK_TOKENS = 512
SMALL_HOST = 240e9  # bytes
DRAFTS, ACCEPTANCE = 3, 0.7
POLICIES = ["full", {"policy": "lru", "budget": "2x topk"}]
SERVERS: dict[str, list[str]] = {  # by name: what is set
    "off": ["server.reuse_prefixes=false"],
    "on": [],
    "small host": [f"hardware_figures.host_bytes={SMALL_HOST:g}"],
    "NVMe": [f"hardware_figures.host_bytes={SMALL_HOST:g}", "server.nvme=true"],
    "drafts": [f"server.draft_tokens={DRAFTS}", f"server.acceptance={ACCEPTANCE}"],
}
KEPT = (  # of a row of `fmsim run`
    *("tokens_per_step", "held_mean", "ttft_s_mean", "ttft_s_p95", "tpot_s_mean", "tpot_s_p50"),
    *("h2d_bytes", "d2h_bytes", "prefill_share", "simulated_s", "prefix_reused_share"),
    *("prefix_hit_tokens_GPU", "prefix_hit_tokens_host", "prefix_hit_tokens_NVMe"),
)

Result = Mapping[str, Any]


def measured(path: Path) -> dict[str, Any]:
    """A row a server and policy, of the first lines of a request file."""
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.jsonl"
        with path.open(encoding="utf-8") as lines:
            requests.write_text("".join(itertools.islice(lines, LINES)))
        scenario = {
            "name": "conversations",
            "trace": str(ROOT / "traces" / "nano-128k-needles.safetensors"),
            "model": "v4-flash",
            "hardware": "h100",
            "policies": POLICIES,
            "workload": {"kind": "file", "file": str(requests), "speed": SPEED},
        }
        reports = {
            name: serve_scenario(ScenarioFile(scenario, set_)) for name, set_ in SERVERS.items()
        }
    about = reports["on"].scenario
    rows = {
        name: {row["policy"]: {key: row.get(key, 0) for key in KEPT} for row in report.flat_rows()}
        for name, report in reports.items()
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/served.py {path.name}",
        "trace": "nano-128k-needles",
        "trace_sha256": about["trace"]["content_sha256"],
        "requests": about["workload"]["first_requests"],
        "prompt_tokens_mean": about["workload"]["prompt_tokens_mean"],
        "output_tokens_mean": about["workload"]["output_tokens_mean"],
        "speed": SPEED,
        "set": SERVERS,
        "simulated": list(KEPT),
        "servers": rows,
    }


def _columns(result: Result, names: Sequence[str]) -> list[Mapping[str, float]]:
    servers = result["servers"]
    return [servers[name][policy] for policy in ("full", "lru") for name in names]


def _seconds(row: Mapping[str, float]) -> str:
    return f"{row['ttft_s_mean']:.2f} / {row['ttft_s_p95']:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.2f}"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f}"


def _hits(row: Mapping[str, float], tiers: Sequence[str]) -> str:
    return " + ".join(_millions(row[f"prefix_hit_tokens_{tier}"]) for tier in tiers)


def about(result: Result) -> str:
    rate = result["requests"] / result["servers"]["on"]["full"]["simulated_s"]
    return paragraph(
        f"The first {result['requests']:,} lines of Mooncake's conversation trace at"
        f" {result['speed']} of its speed: {rate:.2f} requests a second of"
        f" {result['prompt_tokens_mean']:,.0f} + {result['output_tokens_mean']:,.0f} tokens (mean),"
        f" on 8 x H100, TP8, replaying `{result['trace']}`."
    )


def prefixes(result: Result) -> str:
    columns = _columns(result, ("off", "on"))
    rows = [
        ["prompt tokens reused", *(f"{row['prefix_reused_share']:.1%}" for row in columns)],
        ["found on GPU + host, M tokens", *(_hits(row, ("GPU", "host")) for row in columns)],
        ["TTFT, mean / p95, s", *map(_seconds, columns)],
        ["TPOT, mean, ms", *(_ms(row["tpot_s_mean"]) for row in columns)],
        ["from host to GPU, GB", *(_gb(row["h2d_bytes"]) for row in columns)],
        ["from GPU to host, GB", *(_gb(row["d2h_bytes"]) for row in columns)],
    ]
    return table(["", "full, off", "full, on", "lru, off", "lru, on"], rows)


def by_hand(result: Result) -> str:
    """What reused prefixes come to, from sizes and counts alone."""
    full, lru = (result["servers"]["on"][policy] for policy in ("full", "lru"))
    without = result["servers"]["off"]["lru"]
    geometry = PRESETS["v4-flash"]
    tokens = BLOCK_TOKENS
    block = geometry.host_kv_bytes(tokens) + geometry.dense_bytes(tokens)
    reused = lru["prefix_hit_tokens_host"] + lru["prefix_hit_tokens_GPU"]
    loaded = [row["prefix_hit_tokens_host"] / tokens for row in (full, lru)]
    more = lru["h2d_bytes"] - without["h2d_bytes"]
    return bullets(
        [
            f"A block of {tokens} tokens is {block:,} bytes. `full` loads {loaded[0]:,.0f} of"
            f" them: {loaded[0] * block / 1e9:.2f} GB.",
            f"`lru` loads {loaded[1]:,.0f}: {loaded[1] * block / 1e9:.2f} GB. Its link carries"
            f" {more / 1e9:.2f} GB more.",
            f"What is reused is not written again: {reused:,.0f} tokens of"
            f" {geometry.host_kv_bytes(tokens) / tokens:,.0f} mirrored bytes are"
            f" {reused * geometry.host_kv_bytes(tokens) / tokens / 1e9:.1f} GB;"
            f" {(without['d2h_bytes'] - lru['d2h_bytes']) / 1e9:.1f} GB fewer are written.",
        ]
    )


def drives(result: Result) -> str:
    columns = _columns(result, ("small host", "NVMe"))
    tiers = ("GPU", "host", "NVMe")
    rows = [
        ["prompt tokens reused", *(f"{row['prefix_reused_share']:.1%}" for row in columns)],
        ["on GPU + host + NVMe, M tokens", *(_hits(row, tiers) for row in columns)],
        ["TTFT, mean / p95, s", *map(_seconds, columns)],
        ["TPOT, mean, ms", *(_ms(row["tpot_s_mean"]) for row in columns)],
    ]
    return table(["", "full", "full, NVMe", "lru", "lru, NVMe"], rows)


def drafts(result: Result) -> str:
    columns = _columns(result, ("on", "drafts"))
    rows = [
        ["tokens a step", *(f"{row['tokens_per_step']:.3f}" for row in columns)],
        [
            "TPOT, mean / median, ms",
            *(f"{_ms(row['tpot_s_mean'])} / {_ms(row['tpot_s_p50'])}" for row in columns),
        ],
        ["TTFT, mean, s", *(f"{row['ttft_s_mean']:.2f}" for row in columns)],
        ["requests held, mean", *(f"{row['held_mean']:.1f}" for row in columns)],
        ["from host to GPU, GB", *(_gb(row["h2d_bytes"]) for row in columns)],
    ]
    drafted = f"{DRAFTS} of {ACCEPTANCE}"
    return table(["drafts", "full, 0", f"full, {drafted}", "lru, 0", f"lru, {drafted}"], rows)


PARTS = {
    (PAGE, "request file"): about,
    (PAGE, "prefixes"): prefixes,
    (PAGE, "prefixes by hand"): by_hand,
    (PAGE, "drives"): drives,
    (PAGE, "drafts"): drafts,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requests", type=Path, help="Mooncake's conversation_trace.jsonl")
    given = parser.parse_args()
    result = measured(given.requests)
    write_text(ROOT / FILE, json.dumps(result, indent=1) + "\n")
    for (page, part), render in PARTS.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        write_text(ROOT / page, regions.replace(text, part, render(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
