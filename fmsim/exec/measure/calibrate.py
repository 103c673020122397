"""Measures a GPU for the simulator: memory, link, launches, kernels by shape, a decode step's
modules, and what the engine does beside them.

`fmsim hw calibrate`.

The modules are `fmsim.exec.model`'s with random weights at full width, float8 where the
model's are published so and bfloat16 elsewhere, their attention from kernels. A preset made here
says what this engine does on this GPU, not what a serving framework would.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4Config

import fmsim.exec
from fmsim.exec.kernels.layout import KEY, LATENT, Layout
from fmsim.exec.measure import device_figures, engine_cases, step_work
from fmsim.exec.measure.compile_ahead import compile_ahead
from fmsim.exec.measure.fetching import fetching_ms
from fmsim.exec.measure.jobs import Job, Report, numbered, run_jobs
from fmsim.exec.measure.layer_rows import LayerRow, in_row_ms
from fmsim.exec.measure.module_times import MODULES, AttentionTimer, is_float8, module_ms
from fmsim.exec.measure.sizes import Sizes
from fmsim.exec.model.kinds import CSA, HCA
from fmsim.exec.model.weights.synthetic import synthetic_config
from fmsim.geometry import Geometry
from fmsim.hw.calibration import Calibration, Timing
from fmsim.hw.spec import Bookkeeping, EngineTimes, KernelTable

Figures = dict[str, Any]
ATTENTION = {"csa": CSA, "hca": HCA}


def calibrate(
    geometry: Geometry,
    device: str,
    seed: int = 0,
    report: Report = lambda line: None,
    part: Path | None = None,
) -> Calibration:
    """Everything, for the modules of ``geometry``.

    Takes minutes; ``report`` is told what they will be, and each figure as it comes. Figures are
    kept in `part`, where the next call finds them should this one be killed.
    """
    config = synthetic_config(geometry, geometry.n_experts)
    return measure(geometry, config, (LATENT, KEY), device, Sizes(), seed, report, part)


def _engine_digest() -> str:
    """Of `fmsim.exec`'s source and tables: what was timed of another engine is not gone on with."""
    found = hashlib.sha256()
    for path in sorted(Path(fmsim.exec.__file__).parent.rglob("*")):
        if path.suffix in (".py", ".json"):
            found.update(path.read_bytes())
    return found.hexdigest()


@torch.inference_mode()
def measure(
    geometry: Geometry,
    config: DeepseekV4Config,
    layouts: tuple[Layout, Layout],
    device: str,
    sizes: Sizes,
    seed: int,
    report: Report,
    part: Path | None = None,
) -> Calibration:
    """`calibrate` at any sizes, for modules of any configuration."""
    torch.manual_seed(seed)
    gc.collect()
    gc.freeze()  # what libraries made at their import: each capture collects garbage before
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    about = {
        "device": name,
        "software": software,
        "model": config.to_dict(),
        "sizes": asdict(sizes),
        "seed": seed,
        "engine": _engine_digest(),
    }
    report(f"{name}, {software}")
    jobs = _jobs(geometry, config, layouts, device, sizes, seed, report)
    found = run_jobs(jobs, about, part, report)
    rates = found["memory, link and launches"]
    return Calibration(
        device=name,
        software=software,
        weights="float8 weights (compressors and head bf16)"
        if is_float8(config)
        else "bf16 weights",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        hbm_bytes=found["memory in use"][0],
        reserve_bytes=found["memory in use"][1],
        host_bytes=device_figures.host_bytes(),
        gathers={size: numbered(found[_gathers(size)]) for size in sizes.gathers},
        kernels={geometry.name: _table(found, config, sizes)},
        timings=tuple(Timing(**timing) for timing in found["kernels"]),
        **rates,
    )


def _gathers(row_bytes: int) -> str:
    return f"gathers of {row_bytes} bytes"


def _jobs(
    geometry: Geometry,
    config: DeepseekV4Config,
    layouts: tuple[Layout, Layout],
    device: str,
    sizes: Sizes,
    seed: int,
    report: Report,
) -> list[Job]:
    """All of the work. What is in use before anything is allocated comes first."""
    on_device = (device, sizes, report)
    jobs = [Job("memory in use", 1, partial(device_figures.memory_bytes, device))]
    if device == "cuda":
        ahead = partial(compile_ahead, config, layouts, device, sizes, report)
        jobs.append(Job("kernels' compilation", 52, ahead))
    jobs += [
        Job("memory, link and launches", 7, partial(device_figures.rates, *on_device)),
    ]
    for size in sizes.gathers:
        jobs.append(Job(_gathers(size), 2, partial(device_figures.gathers, size, *on_device)))
    jobs += [
        Job("a gather beside a decode", 1, partial(device_figures.beside, *on_device)),
        Job("copies within the GPU", 1, partial(device_figures.within, *on_device)),
        Job("kernels", 2, partial(device_figures.kernels, *on_device)),
    ]
    timers: dict[str, AttentionTimer] = {}

    def timer(kind: str) -> AttentionTimer:
        """Made when it is needed: nothing may be allocated before memory in use is read."""
        if kind not in timers:
            timers[kind] = AttentionTimer(config, kind, layouts, device, report)
        return timers[kind]

    def fetching() -> Figures:
        return fetching_ms(timer(CSA), layouts[0], *on_device)

    for name, kind in ATTENTION.items():
        jobs += _attention(name, partial(timer, kind), sizes)
    for name in MODULES:
        module = partial(module_ms, name, config, sizes.batches, device, report)
        jobs.append(Job(name, 3, module))
    jobs += [
        Job("layers in a row", 24, partial(_in_a_row, config, layouts, seed, *on_device)),
        Job("steps beside recalls", 8, partial(_beside, config, layouts, seed, *on_device)),
    ]
    jobs += [
        Job("masses", 1, partial(engine_cases.masses_ms, *on_device)),
        Job("small pages", 5, lambda: engine_cases.pages_ms(timer(CSA), *on_device)),
        Job(
            "choices among residents", 10, lambda: engine_cases.residents_ms(timer(CSA), *on_device)
        ),
        Job("loading misses", 1, partial(engine_cases.staging_ms, layouts[0], *on_device)),
        Job("fetching misses", 16, fetching),
    ]
    jobs.append(Job("steps", 18, partial(step_work.all_kinds, geometry, *on_device)))
    return [Job(job.name, job.seconds, _freed(job.run)) for job in jobs]


def _freed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same, and its memory is given back."""

    def then_free() -> Any:
        found = run()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    return then_free


def _attention(name: str, timer: Callable[[], AttentionTimer], sizes: Sizes) -> list[Job]:
    """One layer's: by batch at the smallest context, by context at one request, and of crowds; of a
    CSA layer also what an entry takes that closes.
    """
    first, *longer = sizes.contexts

    def by_batch() -> Figures:
        return {batch: timer().ms(batch, first) for batch in sizes.batches}

    def by_context() -> Figures:
        return {tokens: timer().ms(1, tokens) for tokens in longer}

    def of_crowds() -> Figures:
        return {
            batch: {tokens: timer().ms(batch, tokens) for tokens in sizes.crowd_contexts}
            for batch in sizes.crowds
        }

    def closing() -> Figures:
        return {batch: timer().closing_ms(batch, first) for batch in sizes.some_batches}

    jobs = [
        Job(f"{name} attention by batch", 4, by_batch),
        Job(f"{name} attention by context", 2, by_context),
        Job(f"{name} attention of crowds", 8 if name == "csa" else 4, of_crowds),
    ]
    return [*jobs, Job("an entry that closes", 2, closing)] if name == "csa" else jobs


def _in_a_row(
    config: DeepseekV4Config,
    layouts: tuple[Layout, Layout],
    seed: int,
    device: str,
    sizes: Sizes,
    report: Report,
) -> Figures:
    """Layers one after another, by batch."""
    on_gpu = device == "cuda"
    free_bytes = torch.cuda.mem_get_info()[0] if on_gpu else device_figures.host_bytes()
    row = LayerRow(config, layouts, device, sizes.row_share * free_bytes, seed)
    report(f"{len(row.kinds)} of {config.num_hidden_layers} layers in a row")
    first = sizes.contexts[0]
    return {
        "kinds": row.kinds,
        "ms": {batch: row.ms(batch, first, report) for batch in sizes.batches},
    }


def _beside(
    config: DeepseekV4Config,
    layouts: tuple[Layout, Layout],
    seed: int,
    device: str,
    sizes: Sizes,
    report: Report,
) -> Figures:
    """Steps beside recalls, of the fewest layers that are made: one request's beside what is
    recalled ahead, and many requests' beside what is recalled late.
    """
    row = LayerRow(config, layouts, device, 0.0, seed)
    tokens, many = sizes.contexts[0], sizes.some_batches[-1]
    return {
        "ahead": row.beside(1, tokens, 584, report)._asdict(),
        "late": {
            size: row.beside(many, tokens, size, report, late=True)._asdict()
            for size in sizes.recalled_rows
        },
    }


def _table(found: Figures, config: DeepseekV4Config, sizes: Sizes) -> KernelTable:
    """The figures as the simulator adds them up."""
    columns: dict[str, Any] = {}
    crowds = {}
    for name, kind in ATTENTION.items():
        batches = numbered(found[f"{name} attention by batch"])
        longer = numbered(found[f"{name} attention by context"])
        contexts = {sizes.contexts[0]: batches[1]} | longer
        crowds[name] = _grid(found[f"{name} attention of crowds"])
        columns[f"{name}_batch_ms"] = batches
        columns[f"{name}_context_ms"] = contexts
        columns[f"{name}_entry_ns"] = _entry_ns(
            contexts, batches, crowds[name], config.compress_rates[kind], sizes
        )
    for name in MODULES:
        columns[f"{name}_batch_ms"] = numbered(found[name])
    # one GPU reduces nothing, and the router is timed within its experts
    none = dict.fromkeys(sizes.batches, 0.0)
    alone = {
        name: columns[f"{name}_batch_ms"]
        for name in ("csa", "hca", "moe", "hyper_connections", "head")
    }
    row = found["layers in a row"]
    own, common = (_grids(found["fetching misses"][kind]) for kind in ("own", "common"))
    beside = found["steps beside recalls"]
    late = numbered(beside["late"])
    engine = EngineTimes(
        in_row_batch_ms=in_row_ms(row["kinds"], numbered(row["ms"]), alone),
        csa_crowd_ms=crowds["csa"],
        hca_crowd_ms=crowds["hca"],
        closing_batch_ms=numbered(found["an entry that closes"]),
        masses_batch_ms=numbered(found["masses"]),
        pages_batch_ms=_grid(found["small pages"]),
        residents_ms=_grids(found["choices among residents"]),
        staging_ms=_grid(found["loading misses"]),
        fetching_ms=own,
        common_fetching_ms=common,
        beside_bytes_per_s=found["a gather beside a decode"],
        beside_slower=beside["ahead"]["slower"],
        late_slower={size: of_rows["slower"] for size, of_rows in late.items()},
        late_bytes_per_s={size: of_rows["bytes_per_s"] for size, of_rows in late.items()},
        within_bytes_per_s=numbered(found["copies within the GPU"]),
        steps={kind: Bookkeeping.model_validate(work) for kind, work in found["steps"].items()},
    )
    return KernelTable(**columns, all_reduce_batch_ms=none, router_batch_ms=none, engine=engine)


def _grid(found: Figures) -> dict[int, dict[int, float]]:
    """Columns of figures, both by number."""
    return {number: numbered(column) for number, column in numbered(found).items()}


def _grids(found: Figures) -> dict[int, dict[int, dict[int, float]]]:
    return {number: _grid(grid) for number, grid in numbered(found).items()}


def _entry_ns(
    one: dict[int, float],
    many: dict[int, float],
    crowds: dict[int, dict[int, float]],
    rate: int,
    sizes: Sizes,
) -> float:
    """Of what the largest crowd's attention takes more than the same batch at the smallest context,
    and one request more at its context than there: the part of one entry.
    """
    batch, tokens, first = sizes.crowds[-1], sizes.crowd_contexts[-1], sizes.contexts[0]
    at = sorted(one)
    low = max(place for place in at if place <= tokens)
    high = min(place for place in at if place >= tokens)
    share = (tokens - low) / (high - low) if high > low else 0.0
    grown_ms = one[low] + share * (one[high] - one[low]) - one[first]
    more_ms = crowds[batch][tokens] - many[batch] - grown_ms
    return max(0.0, 1e6 * more_ms / ((batch - 1) * (tokens - first) / rate))
