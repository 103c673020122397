"""A dense causal LM with its weights frozen: what each layer's attention does is seen, or replaced.

A text is read in one pass, without a cache, so that a layer's queries and keys are all there at
once. Scores are materialised for some queries at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmsim.trace.importers.dense import load_model

ATTENTION = "fmsim_witness"
CHUNK_QUERIES = 512
CHUNK_LOGITS = 2048  # tokens whose logits stand at once


@dataclass(frozen=True)
class FrozenAttention:
    """One layer's attention over S tokens, before it is done.

    ``states`` [S, hidden] is what it reads, after its norm. ``query``, ``key`` and ``value`` are
    [heads, S, d], the first two rotated, keys and values repeated for the heads that share them.
    """

    layer: int
    states: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float

    def until(self, tokens: int) -> FrozenAttention:
        """Of the first ``tokens`` alone."""
        parts = (self.query[:, :tokens], self.key[:, :tokens], self.value[:, :tokens])
        return FrozenAttention(self.layer, self.states[:tokens], *parts, self.scaling)

    def probabilities(self, rows: Tensor, chosen: Tensor | None = None) -> Tensor:
        """float32 [heads, n, W] of the queries ``rows`` [n], ascending, over the first W = rows[-1]
        + 1 tokens: softmax over the tokens not after each, or over the ``chosen``, bool [n, W].
        """
        width = int(rows[-1]) + 1
        scores = (self.query[:, rows] @ self.key[:, :width].mT).float() * self.scaling
        allowed = before(rows) if chosen is None else chosen
        return scores.masked_fill_(~allowed, -torch.inf).softmax(-1)


def before(rows: Tensor) -> Tensor:
    """bool [n, rows[-1] + 1]: tokens that the queries ``rows`` [n], ascending, may see."""
    return torch.arange(int(rows[-1]) + 1, device=rows.device) <= rows[:, None]


Attend = Callable[[FrozenAttention], Tensor]  # -> the output [heads, S, d]
Choose = Callable[[Tensor], Tensor]  # queries [n] -> the tokens each may attend to, bool [n, W]


def dense(attention: FrozenAttention) -> Tensor:
    """The model's own attention, causal."""
    parts = (part[None] for part in (attention.query, attention.key, attention.value))
    return F.scaled_dot_product_attention(*parts, is_causal=True, scale=attention.scaling)[0]


def sparse(
    selector: Callable[[FrozenAttention], Choose],
    first: int = 0,
    seen: Callable[[int, Tensor, Tensor, Tensor], None] = lambda layer, rows, chosen, mass: None,
) -> Attend:
    """From position ``first`` on, attention to what ``selector`` chooses for each query, and to
    nothing else; before it the model's own.

    ``seen`` is told of layer, queries [n], what was chosen [n, W], and its probability [n, W], mean
    over heads.
    """

    def attend(attention: FrozenAttention) -> Tensor:
        choose, found = selector(attention), [dense(attention.until(first))]
        for rows in torch.arange(first, len(attention.states)).split(CHUNK_QUERIES):
            rows = rows.to(attention.states.device)
            chosen = choose(rows)
            probs = attention.probabilities(rows, chosen)
            seen(attention.layer, rows, chosen, probs.mean(0))
            value = attention.value[:, : probs.shape[2]]
            found.append(probs.to(value.dtype) @ value)
        return torch.cat(found, 1)

    return attend


class FrozenModel:
    """A transformers causal LM whose layers attend as `read` is told."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        self.model = model.requires_grad_(False)
        self._attend: Attend = dense
        self._states: Tensor | None = None
        AttentionInterface.register(ATTENTION, _handed_on)
        model.set_attn_implementation(ATTENTION)
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._reads, with_kwargs=True)
            layer.self_attn.witness = self._attention

    @classmethod
    def load(cls, place: Path, device: str) -> FrozenModel:
        """Of a transformers directory or a GGUF file."""
        return cls(load_model(place, device))

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _reads(self, module: Any, given: Any, named: dict[str, Any]) -> None:
        self._states = (named["hidden_states"] if "hidden_states" in named else given[0])[0]

    def _attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """query [heads, S, d], key and value [kv_heads, S, d] -> [heads, S, d]."""
        group = len(query) // len(key)
        key, value = (part.repeat_interleave(group, 0) for part in (key, value))
        assert self._states is not None
        return self._attend(FrozenAttention(layer, self._states, query, key, value, scaling))

    @torch.no_grad()
    def read(self, tokens: Sequence[int] | np.ndarray, attend: Attend = dense) -> Tensor:
        """Read ``tokens`` from position 0 on -> last hidden states [S, hidden]."""
        self._attend = attend
        ids = torch.as_tensor(np.asarray(tokens, np.int64), device=self.device)[None]
        return self.model.model(ids, use_cache=False).last_hidden_state[0]

    @torch.no_grad()
    def losses(self, tokens: Sequence[int] | np.ndarray, attend: Attend = dense) -> Tensor:
        """Negative log-likelihood of each token but the first, float32 [S - 1], in nats."""
        states = self.read(tokens, attend)[:-1]
        wanted = torch.as_tensor(np.asarray(tokens[1:], np.int64), device=self.device)
        parts = zip(states.split(CHUNK_LOGITS), wanted.split(CHUNK_LOGITS), strict=True)
        return torch.cat(
            [
                F.cross_entropy(self.model.lm_head(part).float(), ids, reduction="none")
                for part, ids in parts
            ]
        )

    def rotate_by(self, rope: dict[str, Any]) -> None:
        """Other rotary frequencies from now on: ``rope`` as transformers' `rope_parameters`."""
        config = copy.deepcopy(self.config)
        config.rope_parameters = rope
        rotary = self.model.model.rotary_emb
        self.model.model.rotary_emb = type(rotary)(config).to(self.device)

    def stretched(self, way: str) -> dict[str, Any]:
        """`rope_parameters` for texts longer than the model knows: ``way`` is "own", "ntk:F" or
        "yarn:F", F the factor (NTK-aware base; arXiv 2309.00071).
        """
        own = dict(self.config.rope_parameters)
        kind, _, factor = way.partition(":")
        if kind == "own":
            return own
        times, dims = float(factor), self.config.head_dim
        if kind == "ntk":
            return own | {"rope_theta": own["rope_theta"] * times ** (dims / (dims - 2))}
        known = self.config.max_position_embeddings
        return own | {
            "rope_type": "yarn",
            "factor": times,
            "original_max_position_embeddings": known,
        }


def _handed_on(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, heads, S, d] each -> [1, S, heads, d]."""
    parts = query[0], key[0], value[0]
    found = module.witness(module.layer_idx, *parts, options["scaling"])
    return found.transpose(0, 1)[None].contiguous(), None
