"""What the simulator predicts beside what a GPU measured: bytes of a request and step times, every
policy at three contexts.

On a GPU (rows are written as they come, so that several GPUs may share the work):

    fmsim hw calibrate --model scenarios/one-gpu --out mine.yaml
    python benchmarks/headline.py --context 512K --out part.json

Anywhere, from the parts and the preset:

    python benchmarks/headline.py --join part.json other.json --hardware mine.yaml

The bytes alone, in seconds a row (no step is decoded), and their place in the result, whose times
stay as they are:

    python benchmarks/headline.py --memory --out part.json
    python benchmarks/headline.py --join part.json

Each row is what `fmsim validate --whole-steps` does. A policy runs on a trace as a replay and in
the engine, whose slots must be the same at every step and whose tensors torch's allocator counts;
then whole steps of V4-Flash with 16 of its 256 experts a layer and random weights are timed under
it. Simulated figures come from the replay and the preset, with nothing of the measured run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regions
import yaml

from fmsim.errors import FmsimError
from fmsim.files import write_text
from fmsim.geometry import Geometry
from fmsim.scenario import ScenarioFile

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "headline.json"
MODEL = "scenarios/one-gpu"
TRACES = {
    "32K": "traces/nano-32k-needles.safetensors",
    "128K": "traces/nano-128k-needles.safetensors",
    "512K": "traces/nano-500k-needles.safetensors",
}
LOW = ("12.5% gpu",)
# of what all index keys leave room for, the least
LEAST = ("25% gpu", "40% gpu")
HELD = {"cadence": 64, "on_miss": "mask", "prompt_history": True}
# By label: a policy's parameters, and the budgets of which it takes the first that it fits. Those
# of the README's table come first, should time run out.
POLICIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "full": ({"policy": "full"}, ()),
    "h2o": ({"policy": "h2o"}, LOW),
    "lru held": ({"policy": "lru"} | HELD, LOW),
    "lsa-history": ({"policy": "lsa-history"}, LOW),
    "lru": ({"policy": "lru"}, LEAST),
    "lsa": ({"policy": "lsa"}, LOW),
    "recency": ({"policy": "recency"}, LOW),
    "lfu held": ({"policy": "lfu"} | HELD, LOW),
    "lfu held sees all": ({"policy": "lfu", "sees": "all"} | HELD, LEAST),
}
SHORT = ("full", "h2o", "lru held", "lsa-history", "lru")  # in the README, at 512K
PAGES = {
    "docs/tutorial/run-on-a-gpu.md": "headline",
    "benchmarks/results/whole-steps.md": "headline by context",
}
MIB = 2**20
# What --memory measures of a row; `memory` of the result says when and on what.
OF_MEMORY = (
    *("tokens", "full_gpu_bytes", "memory_holds", "memory_error", "predicted_gpu_bytes"),
    *("built_gpu_bytes", "allocator_gpu_bytes", "page_bytes", "spare_bytes", "lists_bytes"),
)

Row = dict[str, Any]


def scenario(
    context: str, policies: Sequence[dict[str, Any]], model: str, hardware: str = "h100"
) -> ScenarioFile:
    """One request of `context` under each of `policies`; `model` is a folder, or a preset."""
    folder = ROOT / model
    return ScenarioFile(
        {
            "name": context,
            "trace": str(ROOT / TRACES[context]),
            "model": str(folder) if folder.is_dir() else model,
            "hardware": hardware,
            "policies": list(policies),
        }
    )


def entry(label: str, budget: str | None) -> dict[str, Any]:
    """An entry of a scenario's `policies`."""
    params, _ = POLICIES[label]
    return {"label": label} | params | ({"budget": budget} if budget else {})


class Bench:
    """Measures rows on one GPU, with one set of random weights; or their bytes alone."""

    def __init__(
        self, model: str, device: str, memory_only: bool = False, steps: int | None = None
    ) -> None:
        """Of each trace only the first `steps`, all of them unless given."""
        self.model = model
        self.device = device
        self.memory_only = memory_only
        self.steps = steps
        self.weights: Any = None
        self.n_experts = 0

    def row(self, context: str, label: str) -> Row:
        """A policy at the first of its budgets that it fits; "failed" says why where it cannot."""
        start = time.perf_counter()
        row: Row = {"context": context, "policy": label}
        _, budgets = POLICIES[label]
        for budget in budgets or (None,):
            found = self._measured(context, label, budget)
            row |= {"budget": budget} | found
            if "failed" not in found:
                row.pop("failed", None)
                break
        return row | {"wall_s": round(time.perf_counter() - start, 1)}

    def _measured(self, context: str, label: str, budget: str | None) -> Row:
        from fmsim.experiments.validate import Worlds
        from fmsim.experiments.whole_steps import measured
        from fmsim.experiments.workers.failures import Failure

        try:
            file = scenario(context, [entry(label, budget)], self.model)
            worlds = Worlds(file, self.device, self.steps)
            found = worlds.memory(label) if self.memory_only else worlds.check(label)
            if isinstance(found, Failure):
                return {"failed": found.error}
            row = found.row()
            if not self.memory_only:
                gc.collect()  # what the check held, a pinned mirror say
                if self.weights is None:
                    self._fill(worlds.geometry)
                row |= {"experts": self.n_experts} | measured(worlds, label, 1, self.weights)
        except (FmsimError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
            return {"failed": f"{type(error).__name__}: {error}"}
        finally:
            gc.collect()
        header, steps = worlds.trace.header, worlds.replayer.n_steps
        tokens = header.prompt_tokens + steps
        return {
            "tokens": tokens,
            "steps": steps,
            "trace_sha256": header.content_sha256,
            "full_gpu_bytes": worlds.geometry.full_gpu_bytes(tokens),
        } | {key: value for key, value in row.items() if key != "policy"}

    def _fill(self, geometry: Geometry) -> None:
        """Random weights beside which the longest context fits."""
        from fmsim.exec.runs.synthetic import weights_for

        kv_bytes = 2 * geometry.full_gpu_bytes(self._longest())
        self.weights, self.n_experts = weights_for(geometry, self.device, kv_bytes, seed=0)

    def _longest(self) -> int:
        """Tokens of the longest context."""
        from fmsim.trace import read

        traces = [read(ROOT / path) for path in TRACES.values()]
        return max(trace.header.prompt_tokens + trace.n_steps for trace in traces)


def measure(
    contexts: Sequence[str],
    labels: Sequence[str],
    bench: Bench,
    seconds: float,
    out: Path,
    command: str,
) -> list[Row]:
    """Rows of each context and policy into `out`, one after the other, until `seconds` have gone
    by: none is begun that would end later if it took as long as the longest before it.
    """
    start = time.perf_counter()
    rows: list[Row] = []
    longest_s = 0.0
    for context in contexts:
        for label in labels:
            elapsed_s = time.perf_counter() - start
            if elapsed_s + longest_s > seconds:
                print(f"{context} {label}: left out, {elapsed_s:.0f} s gone", file=sys.stderr)
                continue
            row = bench.row(context, label)
            longest_s = max(longest_s, row["wall_s"])
            rows.append(row)
            write_text(out, json.dumps(about(bench, command) | {"rows": rows}, indent=1) + "\n")
            shown = row.get("failed") or _shown(row)
            print(f"{context} {label}: {shown}, took {row['wall_s']} s", file=sys.stderr)
    return rows


def _shown(row: Row) -> str:
    if "measured_step_p50_s" in row:
        return f"{1e3 * row['measured_step_p50_s']:.2f} ms"
    return f"{_allocated(row) / MIB:,.1f} MiB, {row['memory_error']:+.2%}"


def _allocated(row: Row) -> int:
    """What torch's allocator was asked for; on a CPU what was built."""
    found: int = row["allocator_gpu_bytes"] or row["built_gpu_bytes"]
    return found


def about(bench: Bench, command: str) -> Row:
    """Date, command, device and software of a measurement."""
    import torch

    from fmsim.exec.decode.trace_driven import device_name

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": device_name(bench.device),
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "model": bench.model,
        "memory_only": bench.memory_only,
    }


def _read_parts(parts: Sequence[Path]) -> tuple[list[Row], list[Row]]:
    """What the parts say of themselves, and all their rows in the tables' order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in parts]
    heads = [{key: each[key] for key in each if key != "rows"} for each in found]
    for key in ("device", "model", "memory_only"):
        if len({head[key] for head in heads}) > 1:
            values = ", ".join(str(head[key]) for head in heads)
            raise FmsimError(f"--join: the parts differ in their {key}: {values}")
    rows = {(row["context"], row["policy"]): row for each in found for row in each["rows"]}
    ordered = [
        rows[context, label] for context in TRACES for label in POLICIES if (context, label) in rows
    ]
    return heads, ordered


def join_memory(result: Row, parts: Sequence[Path]) -> Row:
    """`result` with the bytes that `parts` of --memory measured in the place of its own; what it
    says of times stays. Rows of policies that are not measured any more go.
    """
    heads, rows = _read_parts(parts)
    by_name = {(row["context"], row["policy"]): row for row in rows if "failed" not in row}
    known = [row for row in result["rows"] if row["policy"] in POLICIES]
    wanted = {(row["context"], row["policy"]): row for row in known if "failed" not in row}
    for name in wanted:
        if name not in by_name:
            raise FmsimError(f"--join: no part has the bytes of {' '.join(name)}; measure all")
        if by_name[name]["budget"] != wanted[name]["budget"]:
            raise FmsimError(
                f"--join: {' '.join(name)} has now {by_name[name]['budget']} and was timed with"
                f" {wanted[name]['budget']}; measure times anew"
            )
    joined = []
    for row in known:
        found = by_name.get((row["context"], row["policy"]))
        if "failed" in row or found is None:
            joined.append(row)
            continue
        joined.append(
            row
            | {key: found[key] for key in OF_MEMORY if key in found}
            | {"memory_steps": found["steps"]}
        )
    memory = {
        "date": max(head["date"] for head in heads),
        "device": heads[0]["device"],
        "software": heads[0]["software"],
        "commands": list(dict.fromkeys(head["command"] for head in heads)),
        "note": "The bytes of all rows are of this run; steps, times and bytes moved are not.",
        "trace_sha256": {
            row["context"]: row["trace_sha256"] for row in rows if "failed" not in row
        },
    }
    return result | {"memory": memory, "rows": joined}


def join(parts: Sequence[Path], hardware: Path) -> Row:
    """The result: rows of all parts, in the tables' order, each with what is simulated for it."""
    heads, ordered = _read_parts(parts)
    with_simulated(ordered, heads[0]["model"], hardware)
    preset = yaml.safe_load(hardware.read_text(encoding="utf-8"))
    return {
        "date": max(head["date"] for head in heads),
        "device": heads[0]["device"],
        "software": heads[0]["software"],
        "commands": list(dict.fromkeys(head["command"] for head in heads)),
        "model": heads[0]["model"],
        "preset": {"title": preset["title"], "kernel_source": preset["kernel_source"]},
        "measured": ["allocator_gpu_bytes", "measured_step_p50_s", "measured_tokens_per_s"],
        "simulated": ["simulated_step_p50_s", "simulated_tokens_per_s"],
        "replayed": ["predicted_gpu_bytes"],
        "rows": ordered,
    }


def with_simulated(rows: list[Row], model: str, hardware: Path) -> None:
    """Put each row's simulated step time and rate into it, of the steps that were measured, and by
    how much they are off.
    """
    from fmsim.experiments.validate import Worlds
    from fmsim.experiments.whole_steps import errors, simulated
    from fmsim.hw import load_hardware

    hw = load_hardware(hardware.name, hardware.resolve().parent)
    for context in TRACES:
        ran = [row for row in rows if row["context"] == context and "failed" not in row]
        if not ran:
            continue
        file = scenario(context, [entry(row["policy"], row["budget"]) for row in ran], model)
        for steps in dict.fromkeys(row["steps"] for row in ran):
            worlds = Worlds(file, "cpu", steps)
            for row in ran:
                if row["steps"] == steps:
                    row |= simulated(worlds, row["policy"], hw, 1, row["warm_up_steps"])
                    row |= errors(row)


def tables(result: Row) -> dict[str, str]:
    """What the marked parts of README and docs hold, by name."""
    rows = [row for row in result["rows"] if "failed" not in row]
    short = [row for row in rows if row["context"] == "512K" and row["policy"] in SHORT]
    by_context = []
    for context in TRACES:
        own = [row for row in rows if row["context"] == context]
        if own:
            steps = own[0]["steps"]
            told = f"{own[0]['tokens'] - steps:,} tokens, {steps:,} steps"
            by_context.append(f"{context} ({told}):\n\n{_table(own)}")
    by_context += [
        f"{row['context']}: `{row['policy']}`: {row['failed']}"
        for row in result["rows"]
        if "failed" in row
    ]
    return {"headline": _table(short), "headline by context": "\n\n".join(by_context)}


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| policy | budget | MiB predicted | MiB allocated | off | step simulated, ms"
        " | measured, ms | off | tokens/s simulated | measured | off |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        cells = (
            row["policy"],
            (row["budget"] or "").removesuffix(" gpu"),
            f"{row['predicted_gpu_bytes'] / MIB:,.1f}",
            f"{_allocated(row) / MIB:,.1f}",
            f"{row['memory_error']:+.2%}",
            f"{1e3 * row['simulated_step_p50_s']:.2f}",
            f"{1e3 * row['measured_step_p50_s']:.2f}",
            f"{row['step_error']:+.0%}",
            f"{row['simulated_tokens_per_s']:.1f}",
            f"{row['measured_tokens_per_s']:.1f}",
            f"{row['tokens_error']:+.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", action="append", choices=[*TRACES], help="all by default")
    parser.add_argument("--policy", action="append", choices=[*POLICIES], help="all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row later")
    parser.add_argument("--steps", type=int, help="only the first of each trace; all by default")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one by default")
    parser.add_argument("--model", default=MODEL, help="a preset, or a folder with a config.json")
    parser.add_argument("--memory", action="store_true", help="only the bytes of a request")
    parser.add_argument("--join", type=Path, nargs="+", help="parts that were measured")
    parser.add_argument(
        "--hardware",
        type=Path,
        help="preset of `fmsim hw calibrate`; needed to --join parts with times",
    )
    parser.add_argument("--out", type=Path, default=None, help="a part, or the result")
    given = parser.parse_args()
    asked = [f"--context {context}" for context in given.context or ()]
    asked += [f"--policy '{label}'" for label in given.policy or ()]
    asked += [f"--steps {given.steps}"] if given.steps else []
    asked += ["--memory"] if given.memory else []
    command = " ".join(["python benchmarks/headline.py", *asked])
    try:
        if given.join:
            out = given.out or RESULT
            if given.hardware is None:
                before = json.loads(RESULT.read_text(encoding="utf-8"))
                result = join_memory(before, given.join)
            else:
                result = join(given.join, given.hardware)
            write_text(out, json.dumps(result, indent=1) + "\n")
            made = tables(result)
            if out == RESULT:
                _write_pages(made)
            print("\n\n".join(made.values()))
            return 0
        import torch

        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        rows = measure(
            given.context or [*TRACES],
            given.policy or [*POLICIES],
            Bench(given.model, device, given.memory, given.steps),
            given.seconds,
            given.out or Path("headline-part.json"),
            command,
        )
    except FmsimError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if rows and not any("failed" in row for row in rows) else 1


def _write_pages(made: dict[str, str]) -> None:
    for name, part in PAGES.items():
        page = ROOT / name
        with contextlib.suppress(ValueError):  # not marked there
            written = regions.replace(page.read_text(encoding="utf-8"), part, made[part])
            write_text(page, written)


if __name__ == "__main__":
    sys.exit(main())
