"""Scenarios to start from: those that fmsim carries, and one made for a model, GPU and context."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError, shown
from fmsim.experiments.run import Setting, build_policies
from fmsim.files import strict_json, strict_yaml, write_text
from fmsim.geometry import Geometry, geometry_named
from fmsim.scenario import ScenarioFile, schema, shipped
from fmsim.trace import Trace, read

TRACE = re.compile(r"^trace:.*?([\w.-]+)\.safetensors", re.MULTILINE)
BUDGETS = ("12.5% gpu", "25% gpu")
EDITOR = re.compile(r"^# yaml-language-server:.*\n", re.MULTILINE)


def listed() -> list[dict[str, Any]]:
    """One row a scenario that fmsim carries."""
    return [_row(name, ScenarioFile(name)) for name in shipped.scenarios()]


def _row(name: str, file: ScenarioFile) -> dict[str, Any]:
    scenario = file.scenario
    return {
        "name": name,
        "description": scenario.description,
        "model": scenario.model,
        "hardware": scenario.hardware,
        "trace": scenario.trace.stem,
        "policies": [spec.label for spec in scenario.policies],
        "workload": None if scenario.workload is None else scenario.workload.kind,
        "file": str(file.path),
    }


def text_of(name: str) -> str:
    """A carried scenario as it can be kept anywhere: its trace by name."""
    files = shipped.scenarios()
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        fix = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(files)}"
        raise FmsimError(f"scenario show {shown(name)}: fmsim carries none of that name; {fix}")
    text = files[name].read_text(encoding="utf-8")
    return EDITOR.sub("", TRACE.sub(r"trace: \1", text))


@dataclass(frozen=True)
class Wish:
    """What a new scenario is for."""

    model: str  # a preset, or a path from the working directory
    hardware: str  # likewise
    context_tokens: int
    batch: int = 1


def write(path: Path, wish: Wish, replace: bool = False) -> str:
    """Write a scenario with comments, and beside it the schema for editors; returns its trace.

    The trace is the carried one whose length is nearest to the wished one. Raises FmsimError, and
    writes nothing, where the scenario could not run.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise FmsimError(f"{shown(path)}: a scenario's file ends in .yaml")
    if path.exists() and not replace:
        raise FmsimError(f"{shown(path)}: is there already; name another, or give --force")
    geometry = geometry_named(wish.model)
    geometry.check_replayable()
    found = {
        name: read(file) for name, file in shipped.traces().items() if name.endswith("needles")
    }
    lengths = {name: _tokens(trace, geometry) for name, trace in found.items()}
    name = min(lengths, key=lambda name: abs(lengths[name] - wish.context_tokens))
    stands_in = found[name].header.entry_tokens != geometry.csa_rate
    keys = _stands_in(geometry) if stands_in else ""
    if lengths[name] + found[name].n_steps * geometry.csa_rate > (geometry.max_positions or np.inf):
        keys += "beyond_positions: true # the trace is longer than what the model knows\n"

    def text(model: str, hardware: str) -> str:
        return _text(path.stem, replaced(wish, model=model, hardware=hardware), name, keys)

    here = strict_yaml.load(text(wish.model, wish.hardware), "fmsim init")
    setting = Setting(ScenarioFile(here))
    build_policies(setting.file)
    setting.hw.kv_pool_bytes(setting.geometry)
    try:
        write_text(path, text(*(_from(path, given) for given in (wish.model, wish.hardware))))
        write_text(path.parent / schema.FILE, strict_json.dump(schema.of_scenarios()) + "\n")
    except OSError as error:
        raise FmsimError(
            f"{shown(path)}: cannot be written ({error.strerror}); choose another place"
        ) from None
    return f"{name}, {lengths[name]:,} tokens of {geometry.name}"


def _tokens(trace: Trace, geometry: Geometry) -> int:
    """How long a prompt of the model is whose entries are as many as the trace's."""
    return int(trace.header.prompt_tokens // trace.header.entry_tokens * geometry.csa_rate)


def _from(path: Path, given: str) -> str:
    """A preset's name as it is; a path as the scenario at `path` has to write it."""
    return os.path.relpath(given, path.parent) if Path(given).exists() else given


def _stands_in(geometry: Geometry) -> str:
    """Keys for a trace of a family with entries of another length."""
    return (
        f"entry_tokens: {geometry.csa_rate} # the trace is of another family: each of its entries"
        " stands for one of so many tokens\n"
        "layer_map: spread # its layers drive the model's in equal shares\n"
    )


def _text(name: str, wish: Wish, trace: str, keys: str) -> str:
    """The YAML, with further `keys` behind the hardware."""
    return f"""\
# yaml-language-server: $schema={schema.FILE}
name: {json.dumps(name)}
description: {json.dumps(f"{wish.model} on {wish.hardware}")}
# What a model looked at, step by step: one that fmsim carries, or a file of your own
# (`fmsim trace import`), relative to this one. This one's length is nearest to
# {wish.context_tokens:,} tokens; `fmsim plan FILE --context {wish.context_tokens}` counts with
# just that.
trace: {trace}
model: {json.dumps(wish.model)} # fmsim model list
hardware: {json.dumps(wish.hardware)} # fmsim hw list, or a file of fmsim hw calibrate
{keys}batch: {wish.batch} # equal requests side by side

# What a request may take on the GPU, as a share of what the full cache takes, or as "0.5 GiB gpu".
# Each policy without a budget of its own runs at each.
budgets: [{", ".join(BUDGETS)}]

# fmsim policy list; fmsim policy show lsa has the parameters.
policies:
  - full # keeps all: what the others are measured by
  - recency
  - {{policy: lru, label: lru held, cadence: 64, on_miss: mask, prompt_history: true}}
  - h2o
  - lsa
  - oracle # knows the future: a bound, not a policy to deploy

# With a workload the run is one of many requests on a server. Take the marks away to have it.
# workload:
#   kind: poisson # or closed_loop, bursts, sessions, file
#   rate_per_s: 1
#   prompt_tokens: {wish.context_tokens} # or [low, high], drawn uniformly
#   output_tokens: [500, 2000]
#   duration_s: 300
#   slo: {{ttft_s: 60, tpot_s: 0.05}}
# server:
#   prefill: separate # on other servers; or chunked, or done
"""
