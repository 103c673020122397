"""What is installed here, what GPU there is, and which commands would run: `fmsim doctor`."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from fmsim import __version__
from fmsim.scenario import shipped

EXTRA = re.compile(r"""^(?P<name>[\w.-]+).*\bextra\s*==\s*["'](?P<extra>[\w-]+)["']""")
FOR_DEVELOPERS = ("dev", "docs", "test")


@dataclass(frozen=True)
class Task:
    """What fmsim does, and what it needs beyond the base install."""

    what: str
    extra: str | None = None
    gpu: bool = False


TASKS = (
    Task("run, plan, sweep, compare, trace, report: replay, simulate and draw"),
    Task("tune: search for a policy's parameters", "tune"),
    Task("load_frame: results as a pandas table", "pandas"),
    Task("--out and --requests as Parquet", "parquet"),
    Task("sweep --engine ray: on a cluster", "ray"),
    Task("eval, exec, validate, trace record, indexer train: a real model", "model"),
    Task("trace import of a GGUF model", "gguf"),
    Task("exec, validate --whole-steps: at a GPU's speed", "model", gpu=True),
    Task("hw calibrate: measure this machine", "model", gpu=True),
)


def look() -> dict[str, Any]:
    """The findings as plain values."""
    extras = _extras()
    gpus, why_no_gpu = _gpus()
    return {
        "fmsim": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "scenarios": list(shipped.scenarios()),
        "extras": extras,
        "gpus": gpus,
        "why_no_gpu": why_no_gpu,
        "tasks": [_judged(task, extras, why_no_gpu) for task in TASKS],
    }


def _extras() -> dict[str, dict[str, str | None]]:
    """By extra its packages, each with the version that is installed."""
    found: dict[str, dict[str, str | None]] = {}
    try:
        needed = metadata.requires("fmsim") or []
    except metadata.PackageNotFoundError:  # read from its folder, without an installation
        needed = []
    for line in needed:
        match = EXTRA.match(line)
        if match is None or match["extra"] in FOR_DEVELOPERS:
            continue
        if "sys_platform" in line and platform.system() != "Linux":
            continue
        found.setdefault(match["extra"], {})[match["name"]] = _version(match["name"])
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Those that torch sees; or none, and why."""
    if find_spec("torch") is None:
        return [], "torch is not installed, so no GPU can be used: pip install 'fmsim[model]'"
    import torch

    if not torch.cuda.is_available():
        return [], f"torch {torch.__version__} finds no CUDA device"
    every = (torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count()))
    return [
        {"name": gpu.name, "bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in every
    ], None


def _judged(
    task: Task, extras: dict[str, dict[str, str | None]], why_no_gpu: str | None
) -> dict[str, Any]:
    """Whether it would run, and if not what to do."""
    fix = None
    if task.extra is not None:
        packages = extras.get(task.extra, {})
        if not packages or None in packages.values():
            fix = f"pip install 'fmsim[{task.extra}]'"
    if fix is None and task.gpu:
        fix = why_no_gpu
    return {"what": task.what, "runs": fix is None, "fix": fix}
