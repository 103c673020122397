"""One launch of every kernel of nano's training, forward and backward, at nano's shapes and in its
types, and those of a prompt read at once; content does not matter.
"""

from collections.abc import Callable

import torch
from transformers import DeepseekV4Config

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA, HCA, SLIDING
from fmsim.exec.model.weights.loader import KEPT_FLOAT32
from fmsim.exec.whole import attention, device, fused, index_scores
from fmsim.exec.whole.prefill import read_whole
from fmsim.exec.whole.sinkhorn import sinkhorn
from fmsim.nano.config import nano_config

TOKENS, HEADS, SIZE, ENTRIES = 256, 6, 64, 64
STREAMS, HIDDEN, WIDTH = 4, 384, 32


def low(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def high(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def both_ways(function: Callable, *inputs: torch.Tensor) -> Callable[[], None]:
    """A launch of ``function`` on ``inputs`` and of its gradient."""

    def launch() -> None:
        device.runs_kernels = lambda tensor: True  # this process does nothing else
        out = function(*(part.requires_grad_() for part in inputs))
        out = out[0] if isinstance(out, tuple) else out
        out.sum().backward()

    return launch


def shares() -> None:
    device.runs_kernels = lambda tensor: True
    q, near = low(1, TOKENS, HEADS, SIZE), high(1, TOKENS, HEADS)
    attention.attention_over_entries(q, low(1, ENTRIES, SIZE), whole(1, TOKENS), near)


def reading(dtype: torch.dtype) -> Callable[[], None]:
    """A layer of each kind, with weights of ``dtype``, reads a prompt long enough that the indexer
    selects 64 of its entries.
    """
    fields = nano_config().to_dict() | {
        "layer_types": [SLIDING, CSA, HCA], "num_hidden_layers": 3,
        "mlp_layer_types": ["hash_moe", "moe", "moe"], "index_topk": 64,
    }  # fmt: skip

    def launch() -> None:
        device.runs_kernels = lambda tensor: True
        model = DeepseekV4(DeepseekV4Config.from_dict(fields)).requires_grad_(False).eval()
        for name, parameter in model.named_parameters():
            if not KEPT_FLOAT32.search(name):
                parameter.data = parameter.data.to(dtype)
        read_whole(model, torch.zeros(384, dtype=torch.int64), model.new_cache(1, 384))

    return launch


ATTENDED = low(1, TOKENS, HEADS, SIZE), low(1, TOKENS, SIZE), high(HEADS), low(1, ENTRIES, SIZE)
TURNS = high(TOKENS, 8), high(TOKENS, 8)
LAUNCHES = {
    "training, window and range": both_ways(
        lambda q, kv, sinks, entries: attention.attend(
            q, kv, 128, sinks, entries, whole(1, TOKENS)
        ),
        *ATTENDED,
    ),
    "training, chosen": both_ways(
        lambda q, kv, sinks, entries: attention.attend(
            q, kv, 128, sinks, entries, None, whole(1, TOKENS, 512)
        ),
        *ATTENDED,
    ),
    "training, shares": shares,
    "training, index scores": both_ways(
        lambda queries, weights, keys: index_scores.index_scores(
            queries, weights, keys, whole(1, TOKENS)
        ),
        low(1, TOKENS, 8, WIDTH), low(1, TOKENS, 8), low(1, ENTRIES, WIDTH),
    ),
    "training, sinkhorn": both_ways(
        lambda mix: sinkhorn(mix, 6, 1e-6), high(TOKENS, STREAMS, STREAMS)
    ),
    "training, read": both_ways(fused.read, low(TOKENS, STREAMS, HIDDEN), high(TOKENS, STREAMS)),
    "training, leave": both_ways(
        fused.leave, low(TOKENS, STREAMS, HIDDEN), low(TOKENS, HIDDEN), high(TOKENS, STREAMS),
        high(TOKENS, STREAMS, STREAMS),
    ),
    "training, norm": both_ways(
        lambda x, weight: fused.norm_rotate(x, weight, 1e-6, TURNS), low(TOKENS, SIZE), high(SIZE)
    ),
    "training, turned back": both_ways(
        lambda x: fused.norm_rotate(x, None, None, TURNS, back=True), low(TOKENS, HEADS, SIZE)
    ),
    "training, gated": both_ways(
        lambda gate_up, share: fused.gated(gate_up, share, 7.0),
        low(TOKENS, 5, 320), high(TOKENS, 5),
    ),
    "reading, bfloat16": reading(torch.bfloat16),
    "reading, float32": reading(torch.float32),
}  # fmt: skip
