"""The compressor of CSA and HCA layers: tokens pooled into entries.

Shapes: B sequences, S tokens of a call, D hidden size, E closed entries, C width of an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.model.cache import CompressorState, StepCompressor
from fmsim.exec.model.kinds import MASKED
from fmsim.exec.model.norm_rope import RMSNorm, rotate
from fmsim.exec.model.projections import linear


class Compressor(nn.Module):
    """Pools every ``rate`` tokens into one entry, softmax-gated per channel (eqs. 9-12 for CSA,
    20-23 for HCA).

    With ``overlapping`` series an entry pools its own window's Cb and the previous window's Ca: 2 x
    rate tokens.
    """

    def __init__(self, config: DeepseekV4Config, kind: str, width: int, overlapping: bool):
        super().__init__()
        series = 2 if overlapping else 1
        self.rate, self.width, self.overlapping = config.compress_rates[kind], width, overlapping
        self.kv_proj = linear(config.hidden_size, series * width)
        self.gate_proj = linear(config.hidden_size, series * width)
        self.position_bias = nn.Parameter(torch.zeros(self.rate, series * width))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps)

    def compress(
        self, x: Tensor, positions: Tensor, inv_freq: Tensor, state: CompressorState | None
    ) -> Tensor:
        """Entries that x [B, S, D] closes, rotated at their first token: all of them [B, E, C]
        (with ``state``, those of earlier calls too).

        ``positions`` int64 [B, S] serves the call without state; with one, positions are contiguous
        from the start.
        """
        kv, gate = self.kv_proj(x), self.gate_proj(x)
        if state is not None and state.open_kv is not None:
            kv, gate = torch.cat((state.open_kv, kv), 1), torch.cat((state.open_gate, gate), 1)
        windows = kv.shape[1] // self.rate
        usable = windows * self.rate
        if state is not None:
            state.open_kv, state.open_gate = kv[:, usable:], gate[:, usable:]
        if windows == 0:
            return (
                kv.new_zeros(kv.shape[0], 0, self.width)
                if state is None
                else state.entries[:, : state.closed]
            )
        shape = (kv.shape[0], windows, self.rate, -1)
        kv = kv[:, :usable].reshape(shape)
        gate = gate[:, :usable].reshape(shape) + self.position_bias
        entries = self._pool(
            kv,
            gate,
            None if state is None or state.prior_kv is None else (state.prior_kv, state.prior_gate),
        )
        if state is not None and self.overlapping:
            state.prior_kv, state.prior_gate = (part[:, -1, :, : self.width] for part in (kv, gate))
        if state is None:
            first = positions[:, : usable : self.rate]
        else:
            first = (state.closed + torch.arange(windows, device=x.device))[None] * self.rate
        entries = rotate(self.kv_norm(entries), first[..., None].float() * inv_freq)
        if state is None:
            return entries
        state.entries[:, state.closed : state.closed + windows] = entries
        state.closed += windows
        return state.entries[:, : state.closed]

    def close(
        self, x: Tensor, positions: Tensor, inv_freq: Tensor, state: StepCompressor
    ) -> Tensor:
        """Take in one token of each sequence, x [B, 1, D] at ``positions`` [B]; -> the entry that
        it closes, [B, C].

        Where the position is not the last of a window the entry is meaningless, and the caller
        drops it.
        """
        rows, place = torch.arange(len(x), device=x.device), positions % self.rate
        state.kv[rows, place] = self.kv_proj(x)[:, 0]
        state.gate[rows, place] = (self.gate_proj(x)[:, 0] + self.position_bias[place]).to(
            state.gate.dtype
        )
        entry = self._pool(state.kv[:, None], state.gate[:, None], state.prior)[:, 0]
        if self.overlapping:
            closes = (place == self.rate - 1)[:, None, None]
            for prior, part in zip(state.prior, (state.kv, state.gate)):
                prior.copy_(torch.where(closes, part[..., : self.width], prior))
        return rotate(self.kv_norm(entry), (positions - place)[:, None].float() * inv_freq)

    def _pool(self, kv: Tensor, gate: Tensor, prior: tuple[Tensor, Tensor] | None) -> Tensor:
        """Weighted mean over a window, kv and gate [B, N, rate, width or 2 x width] -> [B, N,
        width].

        ``prior`` is the Ca series of the window before the first, kv and gate [B, rate, width], if
        there was one.
        """
        if self.overlapping:
            kv_a, kv_b = kv.split(self.width, -1)
            gate_a, gate_b = gate.split(self.width, -1)
            before_kv, before_gate = prior or (
                torch.zeros_like(kv_a[:, 0]),
                torch.full_like(gate_a[:, 0], MASKED),
            )
            kv = torch.cat((torch.cat((before_kv[:, None], kv_a[:, :-1]), 1), kv_b), 2)
            gate = torch.cat((torch.cat((before_gate[:, None], gate_a[:, :-1]), 1), gate_b), 2)
        return (kv * gate.softmax(2, dtype=torch.float32).to(kv.dtype)).sum(2)
