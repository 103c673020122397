"""Measures a GPU for the simulator: memory, link, launches, every kernel by shape, and a decode
step's modules.

`fmsim hw calibrate`.

The modules are `fmsim.exec.model`'s with random weights at full width, float8 where the
model's are published so and bfloat16 elsewhere, their attention from kernels. A preset made here
says what this engine does on this GPU, not what a serving framework would.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DeepseekV4Config

from fmsim.exec.decode.decode_attention import DecodeAttention
from fmsim.exec.kernels.hyper_connection import Pending, enter, read_out
from fmsim.exec.kernels.layout import KEY, LATENT, Layout
from fmsim.exec.kv.home import Home
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure.timing import median_s
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.experts import MoE
from fmsim.exec.model.hyper_connection import HyperConnection, HyperHead
from fmsim.exec.model.kinds import CSA, HCA
from fmsim.exec.model.norm_rope import RMSNorm
from fmsim.exec.model.projections import linear
from fmsim.exec.model.weights.quantised import (
    fill_float8,
    has_float8_rows,
    hold_float8,
    published_float8,
)
from fmsim.exec.model.weights.synthetic import synthetic_config
from fmsim.geometry import Geometry
from fmsim.hw.calibration import Calibration, Timing
from fmsim.hw.spec import KernelTable

Report = Callable[[str], object]


@dataclass(frozen=True)
class Sizes:
    """What to measure.

    Contexts in tokens, from one on at which a CSA layer finds its top 512 entries; ``gathers`` maps
    the bytes of a row to numbers of rows.
    """

    contexts: tuple[int, ...] = (4096, 16_384, 65_536, 131_072, 262_144, 524_288, 1_048_576)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    crowd: tuple[int, int] = (
        128,
        262_144,
        # one of the batches at one of the contexts,
        # for what a further request's entries add to a GPU
        # that is busy
    )
    gathers: dict[int, tuple[int, ...]] = field(
        default_factory=lambda: {
            584: (512, 4096, 32_768, 131_072),
            2336: (128, 4096, 32_768),
            37_376: (8, 96, 384, 2000),
        }
    )
    kernel_shapes: tuple[tuple[int, int], ...] = (
        (1, 8192),
        (1, 32_768),
        (1, 131_072),
        (1, 262_144),
        (8, 32_768),
        (8, 131_072),
        (32, 32_768),
    )
    copy_bytes: int = 2**32
    link_bytes: int = 2**30
    host_bytes: int = 2**31
    matmul: int = 8192


def calibrate(
    geometry: Geometry, device: str, seed: int = 0, report: Report = lambda line: None
) -> Calibration:
    """Everything, for the modules of ``geometry``.

    Takes minutes; ``report`` is told each figure as it comes.
    """
    return measure(
        geometry,
        synthetic_config(geometry, geometry.n_experts),
        (LATENT, KEY),
        device,
        Sizes(),
        seed,
        report,
    )


@torch.inference_mode()
def measure(
    geometry: Geometry,
    config: DeepseekV4Config,
    layouts: tuple[Layout, Layout],
    device: str,
    sizes: Sizes,
    seed: int,
    report: Report,
) -> Calibration:
    torch.manual_seed(seed)
    cuda = device == "cuda"
    total, held = _memory_bytes(device)
    report(
        f"{torch.cuda.get_device_name() if cuda else platform.processor() or 'CPU'}:"
        f" {total / 1e9:.1f} GB, {held / 1e9:.2f} held by the runtime"
    )
    figures = _memory_figures(device, sizes) | _launches(device)
    for name, value in figures.items():
        report(f"{name} {value:.4g}")
    gathers = {
        size: {rows: _gather_bytes_per_s(size, rows, device, sizes, report) for rows in counts}
        for size, counts in sizes.gathers.items()
    }
    timings = tuple(_kernels(device, sizes, report))
    table = module_table(config, layouts, device, sizes, report)
    return Calibration(
        device=torch.cuda.get_device_name() if cuda else "CPU",
        software=f"torch {torch.__version__}, Python {platform.python_version()}",
        weights="float8 weights (compressors and head bf16)" if _float8(config) else "bf16 weights",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        hbm_bytes=total,
        reserve_bytes=held,
        host_bytes=_host_bytes(),
        gathers=gathers,
        kernels={geometry.name: table},
        timings=timings,
        **figures,
    )


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_bytes(device: str) -> tuple[int, int]:
    """Of the device: in all, and what is in use before anything is allocated (context,
    libraries).
    """
    if device != "cuda":
        return _host_bytes(), 2**20
    # loads the matrix library and its workspace
    torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total, total - free


def _memory_figures(device: str, sizes: Sizes) -> dict[str, float]:
    source = torch.randint(0, 256, (sizes.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device)
    host = torch.randint(
        0, 256, (sizes.link_bytes,), dtype=torch.uint8, pin_memory=device == "cuda"
    )
    link_s = median_s(
        lambda: target[: sizes.link_bytes].copy_(host, non_blocking=True), device, graph=False
    )
    a, b = (
        torch.randn(sizes.matmul, sizes.matmul, device=device).to(torch.bfloat16) for _ in range(2)
    )
    matmul_s = median_s(lambda: a @ b, device)
    return {
        "copy_bytes_per_s": 2 * sizes.copy_bytes / copy_s,
        "link_bytes_per_s": sizes.link_bytes / link_s,
        "matmul_flops": 2 * sizes.matmul**3 / matmul_s,
    }


def _launches(device: str, count: int = 200) -> dict[str, float]:
    """Seconds of one launch of a kernel that does nearly nothing: within a graph, and by the
    host.
    """
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(count):
            x.add_(1)

    in_graph_s = median_s(many, device, cold=False) / count
    many()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    many()  # returns when the last one is launched, not when it is done
    return {"graph_launch_s": in_graph_s, "host_launch_s": (time.perf_counter() - start) / count}


def _gather_bytes_per_s(
    row_bytes: int, rows: int, device: str, sizes: Sizes, report: Report
) -> float:
    case = cases.recall(row_bytes, rows, device, host_bytes=sizes.host_bytes)
    rate = case.n_bytes / median_s(case.run, device)
    report(f"gather of {rows:,} rows of {row_bytes:,} bytes: {rate / 1e9:.1f} GB/s")
    return rate


def _kernels(device: str, sizes: Sizes, report: Report):
    """Every kernel of the decode at every (batch, entries)."""
    builders = (cases.index_scoring, cases.selection, cases.attention, cases.memory_scoring)
    for batch, entries in sizes.kernel_shapes:
        for build in builders:
            case = build(batch, entries, device)
            seconds = median_s(case.run, device)
            report(
                f"{case.kernel}, {case.shape}: {seconds * 1e6:.1f} us,"
                f" {case.n_bytes / seconds / 1e9:.0f} GB/s"
            )
            yield Timing(
                kernel=case.kernel, shape=case.shape, n_bytes=case.n_bytes, seconds=seconds
            )


# --------------------------------------------------------------------- the modules of a decode step


def module_table(
    config: DeepseekV4Config,
    layouts: tuple[Layout, Layout],
    device: str,
    sizes: Sizes,
    report: Report,
) -> KernelTable:
    """Times of the modules of a decode step on one GPU, as the simulator adds them up."""

    @functools.cache  # one request at the smallest context stands in two columns
    def attention_ms(kind: str, batch: int, tokens: int) -> float:
        milliseconds = 1e3 * attention_s(config, kind, batch, tokens, layouts, device)
        report(
            f"{'CSA' if kind == CSA else 'HCA'} attention, batch {batch}, {tokens:,} tokens:"
            f" {milliseconds:.4f} ms"
        )
        return milliseconds

    columns = {}
    for name, kind in (("csa", CSA), ("hca", HCA)):
        columns[f"{name}_context_ms"] = {
            tokens: attention_ms(kind, 1, tokens) for tokens in sizes.contexts
        }
        columns[f"{name}_batch_ms"] = {
            batch: attention_ms(kind, batch, sizes.contexts[0]) for batch in sizes.batches
        }
        columns[f"{name}_entry_ns"] = _entry_ns(
            columns, name, config.compress_rates[kind], sizes, attention_ms(kind, *sizes.crowd)
        )
    for name, build in _MODULES.items():
        columns[f"{name}_batch_ms"] = {}
        with torch.device(device):
            work = build(config)
        for batch in sizes.batches:
            milliseconds = 1e3 * median_s(work(batch), device)
            report(f"{name}, batch {batch}: {milliseconds:.4f} ms")
            columns[f"{name}_batch_ms"][batch] = milliseconds
    # one GPU reduces nothing, and the router is timed within its experts
    none = dict.fromkeys(sizes.batches, 0.0)
    return KernelTable(**columns, all_reduce_batch_ms=none, router_batch_ms=none)


def _entry_ns(
    columns: dict[str, dict[int, float]], name: str, rate: int, sizes: Sizes, crowd_ms: float
) -> float:
    """Of what a crowd's attention takes more than the same batch at the smallest context, and one
    request more at the crowd's context than there: the part of one entry.
    """
    (batch, tokens), first = sizes.crowd, sizes.contexts[0]
    one, many = columns[f"{name}_context_ms"], columns[f"{name}_batch_ms"]
    more_ms = crowd_ms - many[batch] - (one[tokens] - one[first])
    return max(0.0, 1e6 * more_ms / ((batch - 1) * (tokens - first) / rate))


def attention_s(
    config: DeepseekV4Config,
    kind: str,
    batch: int,
    tokens: int,
    layouts: tuple[Layout, Layout],
    device: str,
) -> float:
    """Seconds of one layer's attention at a context of ``tokens`` in every sequence, over entries
    of made-up content.

    The token closes no entry, as in three steps of four of a CSA layer and in 127 of 128 of an HCA
    layer.
    """
    with torch.device(device):
        # what turns positions is made on the CPU, whatever the device
        attention = _random(Attention(config, kind), config).to(device)
        decode = DecodeAttention(attention, batch, tokens, *layouts)
        for appender in filter(None, (decode.entries, decode.keys)):
            _fill(appender.layout, appender.homes[0])
        x = torch.randn(batch, 1, config.hidden_size).to(torch.bfloat16)
        # once a step, not once a layer: not timed
        now = decode.moment(torch.full((batch,), tokens - 2, dtype=torch.int32))
    return median_s(lambda: decode.attend(x, now), device)


def attention_bytes(config: DeepseekV4Config, kind: str) -> int:
    """What one layer's attention reads of weights."""
    with torch.device("meta"):
        attention = _random(Attention(config, kind), config)
    return sum(tensor.nbytes for tensor in [*attention.parameters(), *attention.buffers()])


def _fill(layout: Layout, home: Home) -> None:
    """Entries of made-up content, in pages that lie in random order."""
    if layout.kind != "plain":
        pool, table = cases.paged(
            layout, len(home.table), home.table.shape[1] * cases.PER_PAGE, home.pool.device
        )
        home.pool.copy_(pool)
        home.table.copy_(table)


def _random(module: nn.Module, config: DeepseekV4Config | None = None) -> nn.Module:
    """Random bfloat16 weights; of a float8 model, whose ``config`` says so, float8 for those that
    are published so.
    """
    for parameter in module.parameters():
        parameter.normal_(std=max(parameter.shape) ** -0.5)
    module.to(torch.bfloat16)
    if config is not None and _float8(config):
        hold_float8(module, published_float8(module), has_float8_rows(config))
        fill_float8(module)
    return module


def _float8(config: DeepseekV4Config) -> bool:
    return bool(getattr(config, "quantization_config", None))


def _experts(config: DeepseekV4Config):
    layer = _random(MoE(config, hashed=False), config)

    def at(batch: int):
        x = torch.randn(batch, 1, config.hidden_size, device=layer.gate.weight.device)
        tokens = torch.zeros(batch, 1, dtype=torch.long)
        x, tokens = x.to(torch.bfloat16), tokens.to(x.device)
        return lambda: layer(x, tokens)

    return at


def _hyper_connections(config: DeepseekV4Config):
    """Those of a layer: into and out of the attention, into and out of the experts, with the norms
    between.
    """
    connections = [
        (
            _random(HyperConnection(config)).float(),
            _random(RMSNorm(config.hidden_size, config.rms_norm_eps)),
        )
        for _ in range(2)
    ]

    def at(batch: int):
        given = _after_a_block(connections[0][0], batch, config)

        def work():
            streams, pending = given
            for connection, norm in connections:
                streams, x, write, mix = enter(streams, pending, connection, norm)
                pending = Pending(connection, x, write, mix)
            return streams

        return work

    return at


def _after_a_block(
    connection: HyperConnection, batch: int, config: DeepseekV4Config
) -> tuple[torch.Tensor, Pending]:
    """Streams, and a block's output that is not yet in them."""
    streams = torch.randn(
        batch, 1, config.hc_mult, config.hidden_size, device=connection.fn.device
    ).to(torch.bfloat16)
    x, write, mix = connection.enter(streams)
    return streams, Pending(connection, x, write, mix)


def _head(config: DeepseekV4Config):
    norm = _random(RMSNorm(config.hidden_size, config.rms_norm_eps))
    last, head = _random(HyperConnection(config)).float(), _random(HyperHead(config)).float()
    out = _random(linear(config.hidden_size, config.vocab_size))

    def at(batch: int):
        given = _after_a_block(last, batch, config)
        return lambda: out(read_out(*given, head, norm))

    return at


# name in KernelTable -> what builds it
_MODULES = {"moe": _experts, "hyper_connections": _hyper_connections, "head": _head}
