"""Damaged inputs by class, and what fmsim may answer to them.

A case is made from (class, seed) alone. Whatever it is, fmsim ends with exit code 0, 1 or 2 within
20 s, in its own words: no traceback, no "bug in fmsim", no NaN in its JSON.
"""

from __future__ import annotations

import json
import random
import signal
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from command import fmsim_here
from made_trace import make_trace

from fmsim.files import strict_json
from fmsim.trace import write

MOST_SECONDS = 20
CONFIG = json.loads(
    (Path(__file__).parents[2] / "scenarios/one-gpu/config.json").read_text(encoding="utf-8")
)
WORKLOADS = (
    "{kind: poisson, rate_per_s: 1, prompt_tokens: 2000, output_tokens: 8, duration_s: 3}",
    "{kind: bursts, burst: 2, every_s: 1, prompt_tokens: [100, 900], output_tokens: 4,"
    " duration_s: 2, slo: {ttft_s: 1, tpot_s: 0.05}}",
    "{kind: closed_loop, requests: 2, prompt_tokens: 700, output_tokens: 3, duration_s: 0.1}",
)
SCENARIO = (
    "name: case\n"
    "description: of a fuzzer\n"
    "trace: small.safetensors\n"
    "model: v4-flash\n"
    "hardware: h100\n"
    "hardware_figures: {link_bytes_per_s: 27.0e+9}\n"
    "batch: 1\n"
    "policies: [{policy: lru, budget: 20%, label: a, granularity: 4}]\n"
)
VALUES = [
    "null",
    "true",
    "yes",
    "0",
    "-1",
    "1",
    "1.9",
    "0777",
    "12:30:45",
    "2021-13-45",
    "1e308",
    "1e-308",
    ".inf",
    ".nan",
    "1e999",
    "[]",
    "{}",
    "[[]]",
    "''",
    "'1'",
    "9223372036854775808",
    "-9223372036854775809",
    "100000000000000000000000000000000",
    "!!float",
    "a",
    "&x",
    "*x",
    '"\\e[31m"',
    "../../etc/passwd",
    "/dev/zero",
    "h200",
    "lsa",
    "random",
    "belady",
    "5%",
    "3x",
    "topk",
    "[1,2]",
    "[2,1]",
    "{a:",
    "1}",
    "true:",
    "&a",
    "[*a]",
]


def _mutate_text(text: str, chance: random.Random) -> str:
    """One to three edits: a value replaced, a line dropped, doubled or moved, a character."""
    for _ in range(chance.randint(1, 3)):
        lines = text.split("\n")
        at = chance.randrange(len(lines))
        kind = chance.randrange(7)
        if kind <= 2:
            parts = text.replace("{", " { ").replace("}", " } ").replace(",", " , ").split(" ")
            parts[chance.randrange(len(parts))] = chance.choice(VALUES)
            text = " ".join(parts)
        elif kind == 3:
            text = "\n".join(lines[:at] + lines[at + 1 :])
        elif kind == 4:
            text = "\n".join([*lines[:at], lines[at], *lines[at:]])
        elif kind == 5:
            place = chance.randrange(len(text) + 1)
            odd = chance.choice("\x00\t{}[]:,&*!|>%@`\"'\\\u2028é\x1b0-")
            text = text[:place] + odd + text[place:]
        else:
            text = text[: chance.randrange(len(text) + 1)]
    return text


def _mutate_value(value: Any, chance: random.Random) -> Any:
    """A JSON value with one place changed."""
    odd = chance.choice(
        [None, True, -1, 0, 1.9, 1e308, 10**30, "", "x" * 300, [], {}, [[1]], "\x1b[31m", 3]
    )
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        if chance.random() < 0.15:
            del changed[key]
        else:
            changed[key] = _mutate_value(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        return [*value[:at], _mutate_value(value[at], chance), *value[at + 1 :]]
    return odd


def _mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        kind = chance.randrange(3)
        at = chance.randrange(max(1, min(len(changed), chance.choice([16, 2000, 10**9]))))
        if not changed:
            break
        if kind == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**62, 2**64 - 1]))
        else:
            del changed[at : at + chance.randint(1, 64)]
    return bytes(changed)


class Bench:
    """A folder with sound inputs, and the cases made from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        trace = make_trace(prompt_tokens=256, n_steps=8, n_layers=1)
        write(folder / "small.safetensors", trace)
        (folder / "small.yaml").write_text(SCENARIO)
        done = fmsim_here("run", "small.yaml", "--out", "out", folder=folder)
        assert done.returncode == 0, done.stderr
        swept = fmsim_here("sweep", "small.yaml", "-g", "batch=1,2", folder=folder)
        assert swept.returncode == 0, swept.stderr
        self.trace = (folder / "small.safetensors").read_bytes()
        self.report = json.loads((folder / "out/report.json").read_text())
        self.ledger = (folder / "out/ledgers/a.npz").read_bytes()
        self.timeline = json.loads((folder / "out/timelines/a.json").read_text())
        self.rows = (folder / "sweep.jsonl").read_text()

    def run(self, kind: str, seed: int) -> str | None:
        """What is wrong with fmsim's answer to a case, or None."""
        chance = random.Random(f"{kind} {seed}")
        arguments = CLASSES[kind](self, chance)
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(MOST_SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = fmsim_here(*arguments, folder=self.folder)
        except TimeoutError:
            return f"{kind} {seed}: takes longer than {MOST_SECONDS} s: {arguments}"
        except BaseException as error:
            return f"{kind} {seed}: {type(error).__name__}: {error}: {arguments}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr:
            return f"{kind} {seed}: exit code {done.returncode}: {done.stderr[-300:]}: {arguments}"
        if done.returncode != 0 and not done.stderr:
            return f"{kind} {seed}: exit code {done.returncode} without a word: {arguments}"
        if "\x1b" in done.stderr + done.stdout:
            return f"{kind} {seed}: prints an escape sequence: {arguments}"
        if done.returncode == 0 and "--json" in arguments:
            try:
                strict_json.parse(done.stdout, "output")
            except Exception as error:
                return f"{kind} {seed}: {error}: {arguments}"
        return None


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError


def scenario(bench: Bench, chance: random.Random) -> list[str]:
    text = SCENARIO
    if chance.random() < 0.5:
        text += f"workload: {chance.choice(WORKLOADS)}\nserver: {{prefill: done, max_batch: 4}}\n"
    (bench.folder / "case.yaml").write_text(_mutate_text(text, chance))
    return ["run", "case.yaml", "--json", "-q"]


def override(bench: Bench, chance: random.Random) -> list[str]:
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
    return [command, "small.yaml", "--set", _mutate_text(given, chance), "--json"]


def requests(bench: Bench, chance: random.Random) -> list[str]:
    text = chance.choice(
        [
            '{"timestamp": 0, "input_length": 500, "output_length": 5, "hash_ids": [1, 2]}\n'
            '{"timestamp": 9.5, "input_length": 50, "output_length": 2, "hash_ids": [1]}\n',
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.5,400,6\n",
            "Timestamp,Model,Request tokens,Response tokens\n5,a,400,6\n6.5,b,40,2\n",
        ]
    )
    (bench.folder / "case.requests").write_text(_mutate_text(text, chance))
    workload = f"workload={{kind: file, file: {bench.folder}/case.requests}}"
    return ["run", "small.yaml", "--json", "--set", workload]


def config(bench: Bench, chance: random.Random) -> list[str]:
    value = _mutate_value(CONFIG, chance)
    text = json.dumps(value) if chance.random() < 0.8 else _mutate_text(json.dumps(value), chance)
    (bench.folder / "case-config.json").write_text(text)
    return ["run", "small.yaml", "--json", "--set", f"model={bench.folder}/case-config.json"]


def trace(bench: Bench, chance: random.Random) -> list[str]:
    (bench.folder / "case.safetensors").write_bytes(_mutate_bytes(bench.trace, chance))
    return ["trace", "info", "case.safetensors", "--json"]


def results(bench: Bench, chance: random.Random) -> list[str]:
    folder = bench.folder / "case-out"
    for name in ("ledgers", "timelines"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    kind = chance.randrange(3)
    report = _mutate_value(bench.report, chance) if kind == 0 else bench.report
    ledger = _mutate_bytes(bench.ledger, chance) if kind == 1 else bench.ledger
    timeline = _mutate_value(bench.timeline, chance) if kind == 2 else bench.timeline
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "ledgers/a.npz").write_bytes(ledger)
    (folder / "timelines/a.json").write_text(json.dumps(timeline))
    return ["report", "case-out", "-q", "--trace", "small.safetensors"]


def rows(bench: Bench, chance: random.Random) -> list[str]:
    (bench.folder / "case.jsonl").write_text(_mutate_text(bench.rows, chance))
    return ["sweep", "small.yaml", "-g", "batch=1", "--out", "case.jsonl", "--json"]


def grid(bench: Bench, chance: random.Random) -> list[str]:
    text = chance.choice(["batch=1,2", "policies.a.budget=5%,10%", "hardware=h100,h200"])
    (bench.folder / "grid.jsonl").unlink(missing_ok=True)
    given = _mutate_text(text, chance)
    return ["sweep", "small.yaml", "--grid", given, "--out", "grid.jsonl", "--json"]


CLASSES: dict[str, Callable[[Bench, random.Random], list[str]]] = {
    function.__name__: function
    for function in (scenario, override, requests, config, trace, results, rows, grid)
}
