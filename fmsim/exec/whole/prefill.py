"""Read a long prompt at once, layer by layer, into the cache that chunked prefill fills.

Each layer sees the whole prompt: its attention is gathered for the selected entries, its selection
made in blocks of queries. What it leaves is what `DeepseekV4.forward` would have left, chunk after
chunk; the test compares them. It tells nothing of what was attended to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmsim.exec.model.cache import Cache, CompressorState, LayerCache
from fmsim.exec.model.compressor import Compressor
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA, SLIDING
from fmsim.exec.whole.forward import Entered, Manner, train_forward

# beyond these the kernels do not fit, or every expert on every token costs too much
MOST_EXPERTS, MOST_HEAD_SIZE = 8, 128


def grain(model: DeepseekV4) -> int:
    """Of how many tokens the number must be a multiple that is read at once."""
    return max([1, *model.config.compress_rates.values()])


def reads_whole(model: DeepseekV4) -> bool:
    """Whether a model is made for it: few small experts, small heads, no float8 weights."""
    config = model.config
    small = config.n_routed_experts <= MOST_EXPERTS and config.head_dim <= MOST_HEAD_SIZE
    weights = (*model.parameters(), *model.buffers())
    return small and all(weight.dtype != torch.float8_e4m3fn for weight in weights)


@torch.inference_mode()
def read_whole(
    model: DeepseekV4,
    tokens: Tensor,
    cache: Cache,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Fill an empty ``cache`` of one sequence with int64 tokens [S], S a multiple of `grain`.

    ``progress`` is told of tokens: after each layer of its share of them.
    """
    if cache.length or len(tokens) % grain(model):
        raise ValueError(f"{len(tokens)} tokens after {cache.length} cannot be read at once")

    def keep(number: int, entered: Entered) -> None:
        _keep(model.model.layers[number].self_attn, entered, cache.layers[number])
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)  # what is told is done
        layers = len(model.model.layers)
        progress(len(tokens) * (number + 1) // layers - len(tokens) * number // layers)

    positions = torch.arange(len(tokens), device=tokens.device)[None]
    manner = Manner(model.config.index_topk, index_loss=False, entered=keep)
    train_forward(model, tokens[None], positions, manner)
    cache.length = len(tokens)


def _keep(own, entered: Entered, cache: LayerCache) -> None:
    """What one layer's attention keeps of the prompt."""
    cache.window = entered.kv[-own.window :][None].clone()
    if own.kind == SLIDING:
        return
    _fill(own.compressor, entered.x, entered.entries, cache.kv)
    if own.kind == CSA:
        _fill(own.compressor.indexer, entered.x, entered.index[2], cache.index)


def _fill(compressor: Compressor, x: Tensor, entries: Tensor, state: CompressorState) -> None:
    """A compressor's entries [E, C] of the layer's inputs x [S, D], all of them closed."""
    last = x[None, -compressor.rate :]
    kv = compressor.kv_proj(last)
    gate = compressor.gate_proj(last) + compressor.position_bias
    state.entries[0, : len(entries)] = entries
    state.closed = len(entries)
    state.open_kv, state.open_gate = kv[:, :0], gate[:, :0]
    if compressor.overlapping:
        width = compressor.width
        state.prior_kv, state.prior_gate = kv[..., :width], gate[..., :width]
