"""What a decode keeps beside its CSA entries: each layer's way to attend, made from what prefills
left; and a step as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.decode.decode_attention import DecodeAttention, EntryPager
from fmsim.exec.decode.pager import LayerPager
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.streams import STEP_PRIORITY
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.measure.timing import no_collection
from fmsim.exec.model.cache import (
    Attend,
    CompressorState,
    LayerCache,
    Pager,
    StepCompressor,
    StepLayer,
)
from fmsim.exec.model.compressor import Compressor
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA, HCA, MASKED, SLIDING


class StepState(NamedTuple):
    """`attends`: each layer's attention; `n_bytes`: all that they keep, pagers aside."""

    attends: list[Attend]
    n_bytes: int


def from_kernels(
    model: DeepseekV4,
    prompts: Sequence[Prompt],
    pagers: Sequence[LayerPager],
    latent: Layout,
    key: Layout,
) -> StepState:
    """Attention from kernels, for a GPU (or their references)."""
    longest = max(len(prompt.tokens) + prompt.max_steps for prompt in prompts)
    attends = decode_attentions(model, len(prompts), longest, latent, key, pagers)
    for number, attend in enumerate(attends):
        for b, prompt in enumerate(prompts):
            attend.take(b, prompt.cache.layers[number], len(prompt.tokens))
    return StepState(
        attends,
        sum(a.cache_bytes + sum(tensor.nbytes for tensor in a.open_windows) for a in attends),
    )


def decode_attentions(
    model: DeepseekV4,
    batch: int,
    max_tokens: int,
    latent: Layout,
    key: Layout,
    pagers: Sequence[EntryPager],
) -> list[DecodeAttention]:
    """Each layer's, in order; a CSA layer's with its pager.

    Layers of a kind share what the first of them works out of a step's positions.
    """
    attends, left, first = [], iter(pagers), {}
    for layer in model.model.layers:
        kind = layer.self_attn.kind
        attends.append(
            DecodeAttention(
                layer.self_attn,
                batch,
                max_tokens,
                latent,
                key,
                next(left) if kind == CSA else None,
                first.get(kind),
            )
        )
        first.setdefault(kind, attends[-1])
    leader, *others = first.values()
    leader.lead(others)
    return attends


def from_torch(
    model: DeepseekV4,
    prompts: Sequence[Prompt],
    pagers: Sequence[LayerPager],
    latent: Layout,
    key: Layout,
) -> StepState:
    """`Attention.decode`, in plain torch: the reference, and the CPU's way."""
    states = step_layers(model, prompts, pagers)
    attends = [
        partial(layer.self_attn.decode, state=state)
        for layer, state in zip(model.model.layers, states)
    ]
    return StepState(attends, sum(tensor.nbytes for state in states for tensor in _tensors(state)))


def step_layers(
    model: DeepseekV4, prompts: Sequence[Prompt], pagers: Sequence[Pager]
) -> list[StepLayer]:
    """What each layer keeps of the prompts, for `Attention.decode`; a CSA layer's with its
    pager.
    """
    states, left = [], iter(pagers)
    for number, layer in enumerate(model.model.layers):
        caches, attention = [prompt.cache.layers[number] for prompt in prompts], layer.self_attn
        state = StepLayer(
            torch.cat(
                [_ring(cache, len(p.tokens), attention.window) for cache, p in zip(caches, prompts)]
            )
        )
        if attention.kind != SLIDING:
            state.kv = _step_compressor(attention.compressor, [cache.kv for cache in caches])
        if attention.kind == HCA:
            entries = torch.nn.utils.rnn.pad_sequence(
                [cache.kv.entries[0] for cache in caches], batch_first=True
            )
            state.entries = torch.nn.functional.pad(entries, (0, 0, 0, 1))
        if attention.kind == CSA:
            state.index = _step_compressor(
                attention.compressor.indexer, [cache.index for cache in caches]
            )
            state.pager = next(left)
        states.append(state)
    return states


def graph_after_one(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` on a GPU: run as it is the first time, which compiles its kernels, and replayed as a
    CUDA graph from then on.

    Captured right after that first run; a capture runs nothing.
    """
    replay: list[Callable[[], None]] = []

    def run() -> None:
        if replay:
            return replay[0]()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(priority=STEP_PRIORITY)
        with no_collection(), torch.cuda.graph(graph, stream=stream):
            work()
        replay.append(graph.replay)

    return run


def _step_compressor(
    compressor: Compressor, prefilled: Sequence[CompressorState]
) -> StepCompressor:
    """The open windows that prefills left, one row a request."""
    width, count = compressor.kv_proj.out_features, len(prefilled)
    like = compressor.kv_proj.weight
    kv, gate = (like.new_zeros(count, compressor.rate, width) for _ in range(2))
    prior = None
    if compressor.overlapping:
        prior = (
            like.new_zeros(count, compressor.rate, compressor.width),
            like.new_full((count, compressor.rate, compressor.width), MASKED),
        )
    for b, state in enumerate(prefilled):
        n = 0 if state.open_kv is None else state.open_kv.shape[1]
        if n:
            kv[b, :n], gate[b, :n] = (
                state.open_kv[0],
                state.open_gate[0] + compressor.position_bias[:n],
            )
        if prior is not None and state.prior_kv is not None:
            prior[0][b], prior[1][b] = state.prior_kv[0], state.prior_gate[0]
    return StepCompressor(kv, gate, prior)


def _ring(cache: LayerCache, tokens: int, window: int) -> Tensor:
    """The window of a prefill [1, n, C] with token p at p % window, [1, window, C]."""
    known = cache.window.shape[1]
    ring = cache.window.new_zeros(1, window, cache.window.shape[2])
    ring[:, torch.arange(tokens - known, tokens, device=ring.device) % window] = cache.window
    return ring


def _tensors(state: StepLayer) -> list[Tensor]:
    found = [state.window]
    for compressor in (state.kv, state.index):
        if compressor is not None:
            found += [compressor.kv, compressor.gate, *(compressor.prior or ())]
    return found if state.entries is None else [*found, state.entries]
