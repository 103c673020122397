"""A trace or an engine's capture by itself as a scenario: every policy that it can drive."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS
from fmsim.scenario import NamedPolicy, ScenarioFile
from fmsim.trace import Trace, read
from fmsim.trace.importers import files

BUDGET = "2x topk"


def of_trace(
    path: Path, overrides: Sequence[str] = (), chosen: Sequence[NamedPolicy] = ()
) -> ScenarioFile:
    """The scenario of one trace file. Its model is the preset that its header names, unless
    ``overrides`` say which.
    """
    trace = read(path)
    scenario = {
        "name": path.stem,
        "description": f"every policy that this trace can drive, at {BUDGET}",
        "trace": str(path.resolve()),
        "policies": policies(trace),
    }
    if trace.header.model.name in PRESETS:
        scenario["model"] = trace.header.model.name
    elif not any(override.startswith("model=") for override in overrides):
        raise FmsimError(
            f"{path}: is of {trace.header.model.name!r}, which is no preset; give --model, the"
            " model that it shall drive"
        )
    found = ScenarioFile(scenario, overrides, chosen)
    found.path = path  # for messages
    return found


def policies(trace: Trace) -> list[Any]:
    """Those that need nothing that the trace lacks, at one budget."""
    found: list[Any] = ["full"]
    found += [{"policy": name, "budget": BUDGET} for name in ("recency", "lru", "lfu")]
    if trace.has_mass:
        found += [{"policy": name, "budget": BUDGET} for name in ("h2o", "oracle")]
    found.append({"policy": "belady", "budget": BUDGET})
    return found


def of_capture(
    path: Path,
    kind: str,
    model: str | None,
    prompt_tokens: int | None,
    overrides: Sequence[str] = (),
    chosen: Sequence[NamedPolicy] = (),
    keep: Path | None = None,
) -> ScenarioFile:
    """The same of one captured request.

    Its trace is written into the folder `keep`, or into one that goes with this process.
    """
    if kind not in files.READERS:
        raise FmsimError(f"--format {kind}: there are {', '.join(files.READERS)}")
    if model is None:
        raise FmsimError(f"{path}: give --model, what was captured (`fmsim model list`)")
    watched = files.model_of(model, None, None, 1)
    if keep is None:
        keep = Path(tempfile.mkdtemp(prefix="fmsim-"))
        atexit.register(shutil.rmtree, keep, ignore_errors=True)
    place = keep / f"{path.stem}.safetensors"
    written = list(files.import_file(path, place, kind, watched, prompt_tokens))
    if len(written) > 1:
        raise FmsimError(
            f"{path}: holds {len(written)} requests; import them (`fmsim trace import`) and run one"
        )
    return of_trace(place, overrides, chosen)
