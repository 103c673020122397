"""The classes of damaged inputs: each writes a case's files, and gives the command for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from fmsim.hw.deployment import Deployment
from fmsim.policies import registry
from fmsim.sim.serving.spec import Bursts, ClosedLoop, Poisson, Server
from tests.fuzz.edits import VALUES, edited_bytes, edited_text, edited_value
from tests.fuzz.sound import CONFIG, SCENARIO, START_LOG, WORKLOADS, Sound


def scenario(sound: Sound, chance: random.Random) -> list[str]:
    text = SCENARIO
    if chance.random() < 0.5:
        text += f"workload: {chance.choice(WORKLOADS)}\nserver: {{prefill: done, max_batch: 4}}\n"
    (sound.folder / "case.yaml").write_text(edited_text(text, chance))
    return ["run", "case.yaml", "--json", "-q"]


def override(sound: Sound, chance: random.Random) -> list[str]:
    keys = [
        "batch",
        "name",
        "model",
        "hardware",
        "trace",
        "layer_map",
        "policies.a.budget",
        "policies.*.granularity",
        "policies.0.cadence",
        "policies.a.on_miss",
        "policies",
        "workload",
        "workload.seed",
        "server.mirror",
        "a.b.c",
        "hardware_figures.host_bytes",
        "policies.a.fallback_above",
        ".",
        "=",
    ]
    given = f"{chance.choice(keys)}={chance.choice(VALUES)}"
    command = chance.choice(["run", "plan"])
    return [command, "small.yaml", "--set", edited_text(given, chance), "--json"]


def requests(sound: Sound, chance: random.Random) -> list[str]:
    text = chance.choice(
        [
            '{"timestamp": 0, "input_length": 500, "output_length": 5, "hash_ids": [1, 2]}\n'
            '{"timestamp": 9.5, "input_length": 50, "output_length": 2, "hash_ids": [1]}\n',
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.5,400,6\n",
            "Timestamp,Model,Request tokens,Response tokens\n5,a,400,6\n6.5,b,40,2\n",
        ]
    )
    (sound.folder / "case.requests").write_text(edited_text(text, chance))
    workload = f"workload={{kind: file, file: {sound.folder}/case.requests}}"
    return ["run", "small.yaml", "--json", "--set", workload]


def config(sound: Sound, chance: random.Random) -> list[str]:
    value = edited_value(CONFIG, chance)
    text = json.dumps(value) if chance.random() < 0.8 else edited_text(json.dumps(value), chance)
    (sound.folder / "case-config.json").write_text(text)
    return ["run", "small.yaml", "--json", "--set", f"model={sound.folder}/case-config.json"]


def trace(sound: Sound, chance: random.Random) -> list[str]:
    (sound.folder / "case.safetensors").write_bytes(edited_bytes(sound.trace, chance))
    return ["trace", "info", "case.safetensors", "--json"]


def packed(sound: Sound, chance: random.Random) -> list[str]:
    """A packed trace, or what it shares with others, read with and without a check."""
    folder = sound.folder / "case-packed"
    folder.mkdir(exist_ok=True)
    damaged = chance.choice([sound.packed, sound.packed, sound.context])
    for path in (sound.packed, sound.context):
        data = path.read_bytes()
        (folder / path.name).write_bytes(edited_bytes(data, chance) if path == damaged else data)
    name = f"case-packed/{sound.packed.name}"
    check = chance.choice([[], ["--no-verify"]])
    if chance.random() < 0.4:
        return ["run", "small.yaml", "--json", "-q", "--set", f"trace={name}", *check]
    return ["trace", chance.choice(["info", "stats"]), name, "--json"]


def results(sound: Sound, chance: random.Random) -> list[str]:
    folder = sound.folder / "case-out"
    for name in ("ledgers", "timelines"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    kind = chance.randrange(3)
    report = edited_value(sound.report, chance) if kind == 0 else sound.report
    ledger = edited_bytes(sound.ledger, chance) if kind == 1 else sound.ledger
    timeline = edited_value(sound.timeline, chance) if kind == 2 else sound.timeline
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "ledgers/a.npz").write_bytes(ledger)
    (folder / "timelines/a.json").write_text(json.dumps(timeline))
    return ["report", "case-out", "-q", "--trace", "small.safetensors"]


def rows(sound: Sound, chance: random.Random) -> list[str]:
    (sound.folder / "case.jsonl").write_text(edited_text(sound.rows, chance))
    return ["sweep", "small.yaml", "-g", "batch=1", "--out", "case.jsonl", "--json"]


def grid(sound: Sound, chance: random.Random) -> list[str]:
    text = chance.choice(["batch=1,2", "policies.a.budget=5%,10%", "hardware=h100,h200"])
    (sound.folder / "grid.jsonl").unlink(missing_ok=True)
    given = edited_text(text, chance)
    return ["sweep", "small.yaml", "--grid", given, "--out", "grid.jsonl", "--json"]


def hardware(sound: Sound, chance: random.Random) -> list[str]:
    (sound.folder / "case-link.yaml").write_text(sound.link)
    (sound.folder / "case-hw.yaml").write_text(edited_text(sound.hardware, chance))
    return ["run", "small.yaml", "--json", "-q", "--set", "hardware=case-hw.yaml"]


def link(sound: Sound, chance: random.Random) -> list[str]:
    (sound.folder / "case-link.yaml").write_text(edited_text(sound.link, chance))
    (sound.folder / "case-hw.yaml").write_text(sound.hardware)
    return ["run", "small.yaml", "--json", "-q", "--set", "hardware=case-hw.yaml"]


def start_log(sound: Sound, chance: random.Random) -> list[str]:
    lines = START_LOG.splitlines(keepends=True)
    text = "".join(chance.sample(lines, chance.randint(1, len(lines))))
    (sound.folder / "case.log").write_text(edited_text(text, chance))
    return ["run", "small.yaml", "--json", "-q", "--start-log", "case.log"]


def checkpoint(sound: Sound, chance: random.Random) -> list[str]:
    """A memory indexer's weights, read by the policy that uses them or by `convert`."""
    if chance.random() < 0.4:
        (sound.folder / "case.pt").write_bytes(edited_bytes(sound.checkpoint_pt, chance))
        return ["indexer", "convert", "case.pt", "converted.safetensors"]
    (sound.folder / "case-indexer.safetensors").write_bytes(edited_bytes(sound.checkpoint, chance))
    if chance.random() < 0.5:
        return ["indexer", "convert", "case-indexer.safetensors", "converted.safetensors"]
    policy = "policies=[{policy: lsa, budget: 20%, checkpoint: case-indexer.safetensors}]"
    return ["run", "three.yaml", "--json", "-q", "--set", policy]


def dump(sound: Sound, chance: random.Random) -> list[str]:
    (sound.folder / "doc_00000.pkl").write_bytes(edited_bytes(sound.dump, chance))
    return ["trace", "import", "doc_00000.pkl", "--out", "imported.safetensors"]


def capture(sound: Sound, chance: random.Random) -> list[str]:
    kind = chance.choice(["sglang", "vllm", "npy", "csv"])
    sizes = ["--topk", "4", "--layers", "3", "--prompt-tokens", "40"]
    if kind in sound.captures:
        value = edited_value(sound.captures[kind], chance)
        text = json.dumps(value)
        if chance.random() < 0.2:
            text = edited_text(text, chance)
        (sound.folder / "case.json").write_text(text)
        sizes = ["--model", "tiny-v32/config.json"]
    elif kind == "npy":
        (sound.folder / "case.npy").write_bytes(edited_bytes(sound.npy, chance))
    else:
        rows = [f"{step},{layer},{step} {step + 1}" for step in range(4) for layer in range(3)]
        text = "\n".join(["time,layer,ids", *rows]) + "\n"
        (sound.folder / "case.csv").write_text(edited_text(text, chance))
    name = "case.json" if kind in sound.captures else f"case.{kind}"
    return ["trace", "import", name, "--format", kind, *sizes, "--out", "imported.safetensors"]


def indexer(sound: Sound, chance: random.Random) -> list[str]:
    """Options of training, most of them odd."""
    options = [
        "--heads",
        "--rank",
        "--random-negatives",
        "--hard-negatives",
        "--mass-power",
        "--focal-gamma",
        "--learning-rate",
        "--weight-decay",
        "--warm-up",
        "--traces-per-step",
        "--evaluate-every",
        "--patience",
        "--kept-share",
        "--head-share",
        "--min-layers",
        "--horizon",
        "--seed",
        "--steps",
    ]
    odd = ["0", "-1", "1", "2", "0.5", "1e308", "1e-308", "nan", "inf", "99999999999", "x", ""]
    given = ["--heads", "2", "--rank", "4", "--steps", "2", "--device", "cpu"]
    given += ["--loss", chance.choice(["infonce", "focal"])]
    for option in chance.sample(options, chance.randint(1, 3)):
        given += [option, chance.choice(odd)]
    traces = ["three.safetensors", "--held-out", "three.safetensors"]
    return ["indexer", "train", *traces, "--out", "trained.safetensors", *given]


SIZES = [0, 1, 2, 3, 64, 0.5, 0.99, 1e-9, 1000, 10**6, 2**31, 2**63, 10**15, 10**18, 10**30, 1e308]
TRAFFIC: dict[str, Any] = {"prompt_tokens": 2000, "output_tokens": 8, "duration_s": 2}


def parameter(sound: Sound, chance: random.Random) -> list[str]:
    """Numbers, most of them odd, for a policy, the deployment, the server or the workload."""
    policy = registry.get(chance.choice(registry.names()))
    model, kind = chance.choice(
        [(Bursts, "bursts"), (ClosedLoop, "closed_loop"), (Poisson, "poisson")]
    )
    rate = {"bursts": {"burst": 2, "every_s": 1}, "closed_loop": {"requests": 2}}
    given: dict[str, dict[str, Any]] = {
        "policy": {"policy": policy.name, "budget": "20%"},
        "deployment": {},
        "server": {},
        "workload": {"kind": kind, **TRAFFIC, **rate.get(kind, {"rate_per_s": 1})},
    }
    if "checkpoint" in policy.Params.model_fields:
        given["policy"]["checkpoint"] = "indexer.safetensors"
    models = {"policy": policy.Params, "deployment": Deployment, "server": Server}
    for block in chance.choices([*given], k=chance.randint(1, 3)):
        fields = models.get(block, model).model_fields
        numbers = [name for name in fields if isinstance(fields[name].default, (int, float))]
        numbers = [name for name in numbers if not isinstance(fields[name].default, bool)]
        numbers += [name for name in fields if "int | None" in str(fields[name].annotation)]
        numbers += [name for name in fields if "float | None" in str(fields[name].annotation)]
        given[block][chance.choice([*numbers, *given[block]])] = chance.choice(SIZES)
    given["policies"] = [given.pop("policy")]  # type: ignore[assignment]
    if chance.random() < 0.5:
        del given["workload"], given["server"]
    sets = [
        part for key, value in given.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    return [chance.choice(["run", "plan"]), "three.yaml", "--json", *sets]


CLASSES: dict[str, Callable[[Sound, random.Random], list[str]]] = {
    function.__name__: function
    for function in (
        scenario,
        override,
        requests,
        config,
        trace,
        packed,
        results,
        rows,
        grid,
        hardware,
        link,
        start_log,
        checkpoint,
        dump,
        capture,
        indexer,
        parameter,
    )
}
