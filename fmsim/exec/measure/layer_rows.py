"""Layers one after another, as a decode step runs them: what modules that were timed alone take
together.

Alone, a module has an event before and behind it and no neighbour, and its tokens choose their
experts at random. In a step it follows another at once, and the tokens of a batch resemble each
other. So the sum of the modules is not the step, and this says by how much.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from copy import copy
from math import ceil
from typing import NamedTuple

import torch
from transformers import DeepseekV4Config

from fmsim.exec.decode.decode_attention import AllEntries
from fmsim.exec.decode.step_state import decode_attentions
from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kernels.selection.greedy import likeliest
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure.jobs import Report
from fmsim.exec.measure.module_times import is_float8
from fmsim.exec.measure.timing import captured, median_s
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA
from fmsim.exec.model.weights.loader import allocate, meta_model
from fmsim.exec.model.weights.quantised import has_float8_rows, hold_float8, published_float8
from fmsim.exec.model.weights.synthetic import fill

FEWEST = 4  # layers: some of each kind
RECALLED_BYTES = 19_000_000  # at once, beside a step


class SlowedStep(NamedTuple):
    """Beside a recall: by which share it is slower, and the bytes/s that come."""

    slower: float
    bytes_per_s: float


class LayerRow:
    """The first layers of a model of `config` with random weights, as many as fit `weight_bytes`,
    and its head. `kinds` are the layers'.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        layouts: tuple[Layout, Layout],
        device: str,
        weight_bytes: float,
        seed: int,
    ) -> None:
        self.layouts = layouts
        self.device = device
        count = config.num_hidden_layers
        while True:
            shorter = _first_layers(config, count)
            model = _on_meta(shorter)
            n_bytes = sum(part.nbytes for part in [*model.parameters(), *model.buffers()])
            if n_bytes <= weight_bytes or count <= FEWEST:
                break
            count = max(FEWEST, min(count - 1, int(count * weight_bytes / n_bytes)))
        self.kinds = list(shorter.layer_types)
        self.model = allocate(model, device).eval().requires_grad_(False)
        fill(self.model, seed)

    def ms(self, batch: int, tokens: int, report: Report) -> float:
        """Milliseconds of a step at a context of ``tokens`` in every sequence."""
        found = 1e3 * median_s(self._step(batch, tokens), self.device, runs=15, cold=False)
        report(f"{len(self.kinds)} layers in a row, batch {batch}: {found:.4f} ms")
        gc.collect()
        return found

    def beside(
        self, batch: int, tokens: int, row_bytes: int, report: Report, late: bool = False
    ) -> SlowedStep:
        """A step while rows are recalled beside it, ahead of a decision or ``late``."""
        if self.device != "cuda":
            return SlowedStep(0.0, 1e9)
        work = self._step(batch, tokens)  # kept as long as its graph, which reads its buffers
        step = captured(work)
        rows = RECALLED_BYTES // row_bytes
        recall = cases.recall(
            row_bytes, rows, self.device, tuning.GATHER_BESIDE, host_bytes=2**29, late=late
        )
        copies, side = captured(recall.run), torch.cuda.Stream()
        recall_s = median_s(recall.run, self.device, runs=8, cold=False)

        def timed(times: int, further: int = 0) -> tuple[float, float]:
            """Medians, in seconds: a step, and so many recalls that begin with it, beside which
            ``further`` steps follow.
            """
            marks = []
            for _ in range(9):
                torch.cuda.synchronize()
                begin, come, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
                with torch.cuda.stream(side):
                    begin.record()
                    for _ in range(times):
                        copies()
                    come.record()
                start.record()
                step()
                end.record()
                for _ in range(further):
                    step()
                torch.cuda.synchronize()
                marks.append((start.elapsed_time(end) / 1e3, begin.elapsed_time(come) / 1e3))
            step_s, come_s = (sorted(column)[len(marks) // 2] for column in zip(*marks))
            return step_s, come_s

        alone_s, _ = timed(0)
        times = round(1.3 * alone_s / recall_s) + 1
        step_s, come_s = timed(times, further=ceil(2 * times * recall_s / alone_s))
        found = SlowedStep(max(0.0, step_s / alone_s - 1), times * recall.n_bytes / come_s)
        del work
        report(
            f"a step of {batch} beside a recall of {row_bytes:,} bytes a row: {found.slower:+.1%},"
            f" {found.bytes_per_s / 1e9:.1f} GB/s come"
        )
        return found

    def _step(self, batch: int, tokens: int) -> Callable[[], None]:
        """What a step computes, as `SyntheticStep` does."""
        pagers = [
            AllEntries(
                layer.self_attn,
                batch,
                tokens // layer.self_attn.compressor.rate,
                *self.layouts,
            )
            for layer in self.model.model.layers
            if layer.self_attn.kind == CSA
        ]
        attends = decode_attentions(self.model, batch, tokens, *self.layouts, pagers)
        latent, key = self.layouts
        pools = [(attend.window, latent) for attend in attends]
        pools += [(attend.hca.pool, latent) for attend in attends if attend.hca is not None]
        pools += [(home.pool, latent) for pager in pagers for home in pager.homes]
        pools += [(home.pool, key) for pager in pagers for home in pager.key_homes]
        for pool, layout in pools:
            cases.fill_entries(pool, layout)
        ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        # of a token that closes no entry
        positions = torch.full((batch,), tokens - 2, dtype=torch.int32, device=self.device)

        def step() -> None:
            ids.copy_(likeliest(self.model.decode(ids, positions, attends)))

        return step


def in_row_ms(
    kinds: Sequence[str], together: dict[int, float], alone: dict[str, dict[int, float]]
) -> dict[int, float]:
    """Of a layer, by batch: what layers of these `kinds` and the head took `together`, less their
    modules `alone`.
    """
    n_csa = kinds.count(CSA)
    n_hca = len(kinds) - n_csa  # a sliding layer counts as one
    found = {}
    for batch, ms in together.items():
        attention = n_csa * alone["csa"][batch] + n_hca * alone["hca"][batch]
        modules = alone["hyper_connections"][batch] + alone["moe"][batch]
        found[batch] = (ms - attention - alone["head"][batch]) / len(kinds) - modules
    return found


def _first_layers(config: DeepseekV4Config, count: int) -> DeepseekV4Config:
    shorter = copy(config)
    shorter.num_hidden_layers = count
    shorter.layer_types = list(config.layer_types)[:count]
    shorter.mlp_layer_types = list(config.mlp_layer_types)[:count]
    return shorter


def _on_meta(config: DeepseekV4Config) -> DeepseekV4:
    model = meta_model(config, torch.bfloat16)
    if is_float8(config):
        hold_float8(model, published_float8(model), has_float8_rows(config))
    return model
