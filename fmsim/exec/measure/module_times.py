"""Times of a decode step's modules, each alone: attention of both kinds, experts, hyper-connections
and the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV4Config

from fmsim.exec.decode.decode_attention import DecodeAttention
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kernels.norms.rounded_rows import round_rows
from fmsim.exec.kernels.products.hyper_connection import Pending, enter, read_out
from fmsim.exec.kv.home import Home
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure.jobs import Report
from fmsim.exec.measure.timing import median_s
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.experts import MoE
from fmsim.exec.model.hyper_connection import HyperConnection, HyperHead
from fmsim.exec.model.kinds import CSA
from fmsim.exec.model.norm_rope import RMSNorm
from fmsim.exec.model.projections import linear
from fmsim.exec.model.weights.loader import KEPT_FLOAT32
from fmsim.exec.model.weights.quantised import (
    fill_float8,
    has_float8_rows,
    hold_float8,
    published_float8,
)

Work = Callable[[], object]


class AttentionTimer:
    """Times one layer's attention of a kind, with one set of weights for all shapes."""

    def __init__(
        self,
        config: DeepseekV4Config,
        kind: str,
        layouts: tuple[Layout, Layout],
        device: str,
        report: Report,
    ) -> None:
        self.config = config
        self.kind = kind
        self.layouts = layouts
        self.device = device
        self.report = report
        with torch.device(device):
            # what turns positions is made on the CPU, whatever the device
            self.attention = random_weights(Attention(config, kind), config).to(device)

    def ms(self, batch: int, tokens: int) -> float:
        """Milliseconds of a step at a context of ``tokens`` in every sequence."""
        found = 1e3 * median_s(self.work(batch, tokens), self.device)
        name = "CSA" if self.kind == CSA else "HCA"
        self.report(f"{name} attention, batch {batch}, {tokens:,} tokens: {found:.4f} ms")
        return found

    def closing_ms(self, batch: int, tokens: int) -> float:
        """Milliseconds that a token takes more which closes an entry in every sequence."""
        plain_s, closing_s = (
            median_s(self.work(batch, tokens, closes), self.device) for closes in (False, True)
        )
        found = 1e3 * (closing_s - plain_s)
        self.report(f"an entry that closes, batch {batch}: {found:+.4f} ms")
        return found

    def work(
        self,
        batch: int,
        tokens: int,
        closes: bool = False,
        pager: Callable[..., Any] | None = None,
    ) -> Work:
        """A step over entries of made-up content.

        Unless it `closes` one, the token closes no entry, as in three steps of four of a CSA layer
        and in 127 of 128 of an HCA layer. A CSA layer's `pager` may be another than `AllEntries`,
        and is made of the same arguments.
        """
        with torch.device(self.device):
            own = None
            if pager is not None:
                entries = tokens // self.attention.compressor.rate
                own = pager(self.attention, batch, entries, *self.layouts)
            decode = DecodeAttention(self.attention, batch, tokens, *self.layouts, own)
            for appender in filter(None, (decode.entries, decode.keys)):
                _fill(appender.layout, appender.homes[0])
            x = torch.randn(batch, 1, self.config.hidden_size).to(torch.bfloat16)
            if self.attention.takes_float8(batch):
                x = round_rows(x)  # as the launch before does
            # once a step, not once a layer: not timed
            position = tokens - (1 if closes else 2)
            now = decode.moment(torch.full((batch,), position, dtype=torch.int32))
        return lambda: decode.attend(x, now)


def attention_bytes(config: DeepseekV4Config, kind: str) -> int:
    """What one layer's attention reads of weights."""
    with torch.device("meta"):
        attention = random_weights(Attention(config, kind), config)
    return sum(tensor.nbytes for tensor in [*attention.parameters(), *attention.buffers()])


def _fill(layout: Layout, home: Home) -> None:
    """Entries of made-up content, in pages that lie in random order."""
    if layout.kind != "plain":
        cases.fill_entries(home.pool, layout)
        order = torch.randperm(home.table.numel(), device=home.table.device)
        home.table.copy_(order.view(home.table.shape).to(torch.int32))


def module_ms(
    name: str, config: DeepseekV4Config, batches: Iterable[int], device: str, report: Report
) -> dict[int, float]:
    """Milliseconds of a module of MODULES by batch."""
    with torch.device(device):
        work = MODULES[name](config)
    found = {}
    for batch in batches:
        found[batch] = 1e3 * median_s(work(batch), device)
        report(f"{name}, batch {batch}: {found[batch]:.4f} ms")
    return found


def random_weights(module: nn.Module, config: DeepseekV4Config | None = None) -> nn.Module:
    """Random bfloat16 weights, float32 for those that a loaded model keeps so; of a float8 model,
    whose ``config`` says so, float8 for those that are published so.
    """
    for name, parameter in module.named_parameters():
        parameter.normal_(std=max(parameter.shape) ** -0.5)
        kept = torch.float32 if KEPT_FLOAT32.search(name) else torch.bfloat16
        parameter.data = parameter.to(kept)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not KEPT_FLOAT32.search(name):
            buffer.data = buffer.to(torch.bfloat16)
    if config is not None and is_float8(config):
        hold_float8(module, published_float8(module), has_float8_rows(config))
        fill_float8(module)
    return module


def is_float8(config: DeepseekV4Config) -> bool:
    return bool(getattr(config, "quantization_config", None))


def _experts(config: DeepseekV4Config) -> Callable[[int], Work]:
    layer = random_weights(MoE(config, hashed=False), config)

    def at(batch: int) -> Work:
        x = torch.randn(batch, 1, config.hidden_size, device=layer.gate.weight.device)
        tokens = torch.zeros(batch, 1, dtype=torch.long)
        x, tokens = x.to(torch.bfloat16), tokens.to(x.device)
        return lambda: layer(x, tokens)

    return at


def _hyper_connections(config: DeepseekV4Config) -> Callable[[int], Work]:
    """Those of a layer: into and out of the attention, into and out of the experts, with the norms
    between.
    """
    connections = [
        (
            random_weights(HyperConnection(config)).float(),
            random_weights(RMSNorm(config.hidden_size, config.rms_norm_eps)),
        )
        for _ in range(2)
    ]

    def at(batch: int) -> Work:
        given = _after_a_block(connections[0][0], batch, config)

        def work() -> object:
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


def _head(config: DeepseekV4Config) -> Callable[[int], Work]:
    norm = random_weights(RMSNorm(config.hidden_size, config.rms_norm_eps))
    last = random_weights(HyperConnection(config)).float()
    head = random_weights(HyperHead(config)).float()
    out = random_weights(linear(config.hidden_size, config.vocab_size))

    def at(batch: int) -> Work:
        given = _after_a_block(last, batch, config)
        return lambda: out(read_out(*given, head, norm))

    return at


# name in KernelTable -> what builds it
MODULES = {"moe": _experts, "hyper_connections": _hyper_connections, "head": _head}
