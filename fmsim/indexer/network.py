"""The memory indexer's network in torch, for training; `fmsim.indexer.scorer` is the same function
without torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fmsim.indexer.scorer import LayerWeights, ScorerConfig, hadamard_matrix


class Retriever(nn.Module):
    """One CSA layer's scorer, see `fmsim.indexer.scorer` for the formula; parameter names are
    FlashMemory's.
    """

    def __init__(
        self, hidden_size: int, heads: int, head_dim: int, rank: int, config: ScorerConfig
    ):
        super().__init__()
        self.heads, self.head_dim, self.config = heads, head_dim, config
        self.wq_a = nn.Linear(hidden_size, rank, bias=False)
        self.q_norm_weight = nn.Parameter(torch.ones(rank))
        self.wq_b = nn.Linear(rank, heads * head_dim, bias=False)
        self.weights_proj = nn.Linear(hidden_size, heads, bias=False)
        for linear in (self.wq_a, self.wq_b, self.weights_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if config.hadamard:
            self.register_buffer(
                "hadamard", torch.from_numpy(hadamard_matrix(head_dim)), persistent=False
            )

    def queries(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [W, hidden_size] -> q [W, heads, head_dim]."""
        latent = self.wq_a(hidden)
        latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + self.config.norm_eps)
        query = self.wq_b(latent * self.q_norm_weight).unflatten(-1, (self.heads, self.head_dim))
        query = rotated(query, [part[:, None] for part in rotation], self.config.rope_dims)
        if self.config.hadamard:
            query = query @ self.hadamard
        return query

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        """Logits [W, E] of keys [E, head_dim], every query against every key."""
        query = self.queries(hidden, rotation)
        head_weights = self.weights_proj(hidden) * (self.heads * self.head_dim) ** -0.5
        # [W, heads, E]
        products = (query.flatten(0, 1) @ keys.T).relu().unflatten(0, (-1, self.heads))
        return (head_weights[:, None] @ products)[:, 0]


def rotated(values: Tensor, rotation: Sequence[Tensor], rope_dims: int) -> Tensor:
    """Values [..., D] with their last ``rope_dims``, pairs side by side, turned by angles whose
    cosine and sine [..., rope_dims / 2] are given.
    """
    cos, sin = rotation
    still = values.shape[-1] - rope_dims
    even, odd = values[..., still::2], values[..., still + 1 :: 2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((values[..., :still], turned), dim=-1)


class ServedIndexer(nn.Module):
    """Some CSA layers' keys, scored for each of all layers apart: a retriever's heads are weighed
    anew for each layer that attends. Of several retrievers an entry has the highest logit. See
    `scorer.served_logits`.

    ``served`` is [layers scored, layers served, heads, hidden_size].
    """

    def __init__(
        self,
        layers: list[int],
        served: int,
        hidden_size: int,
        heads: int,
        head_dim: int,
        rank: int,
        config: ScorerConfig,
    ):
        super().__init__()
        self.layers, self.config = layers, config
        self.retrievers = nn.ModuleList(
            Retriever(hidden_size, heads, head_dim, rank, config) for _ in layers
        )
        for retriever in self.retrievers:
            retriever.weights_proj = None  # each served layer has its own
        size = (len(layers), served, heads, hidden_size)
        self.served = nn.Parameter(torch.randn(size) * hidden_size**-0.5)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        """hidden [W, layers scored, hidden_size], keys [layers scored, E, head_dim] -> logits [W,
        layers served, E].
        """
        found = []
        for n, retriever in enumerate(self.retrievers):
            query = retriever.queries(hidden[:, n], rotation)  # [W, heads, head_dim]
            products = (query.flatten(0, 1) @ keys[n].T).relu().unflatten(0, (len(query), -1))
            weights = torch.einsum("wh,lnh->wln", hidden[:, n], self.served[n])
            found.append(weights * (query.shape[1] * query.shape[2]) ** -0.5 @ products)
        return torch.stack(found).amax(0)

    def weights(self) -> tuple[dict[int, LayerWeights], dict[int, np.ndarray]]:
        """What a checkpoint holds: retrievers, whose head weights are the mean over the layers
        served, and the served ones.
        """
        served = {
            layer: weights.detach().cpu().numpy().copy()
            for layer, weights in zip(self.layers, self.served)
        }
        found = {}
        for layer, retriever in zip(self.layers, self.retrievers):
            parts = (retriever.wq_a.weight, retriever.q_norm_weight, retriever.wq_b.weight)
            plain = (part.detach().cpu().numpy().copy() for part in parts)
            found[layer] = LayerWeights(*plain, served[layer].mean(0))
        return found, served


class MemoryIndexer(nn.Module):
    """Retrievers of some CSA layers; their logits are combined by the maximum over layers, a union
    of their sets.

    ``margin`` is the logit where a loss over single entries puts its border: the network itself has
    no bias and gives 0 to whatever no head responds to. It stays out of the checkpoint, whose
    threshold does its work.
    """

    def __init__(
        self,
        layers: list[int],
        hidden_size: int,
        heads: int,
        head_dim: int,
        rank: int,
        config: ScorerConfig,
    ):
        super().__init__()
        self.layers, self.config = layers, config
        build = {
            f"l{layer}": Retriever(hidden_size, heads, head_dim, rank, config) for layer in layers
        }
        self.retrievers = nn.ModuleDict(build)
        self.margin = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        """hidden [W, L, hidden_size], keys [L, E, head_dim], L the layers scored -> logits [L, W,
        E].

        ``rotation``: cosine and sine of the queries' angles, [W, rope_dims / 2] each, as
        `scorer.rotation` gives them.
        """
        scored = [
            self.retrievers[f"l{layer}"](hidden[:, n], rotation, keys[n])
            for n, layer in enumerate(self.layers)
        ]
        return torch.stack(scored)

    def weights(self) -> dict[int, LayerWeights]:
        """The parameters as numpy arrays, for a checkpoint or the torch-free scorer."""
        found = {}
        for layer in self.layers:
            retriever = self.retrievers[f"l{layer}"]
            parts = (
                retriever.wq_a.weight,
                retriever.q_norm_weight,
                retriever.wq_b.weight,
                retriever.weights_proj.weight,
            )
            found[layer] = LayerWeights(*(part.detach().cpu().numpy().copy() for part in parts))
        return found
