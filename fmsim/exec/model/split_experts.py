"""Routed experts that ranks hold a part of each: attention data-parallel, experts split.

Each rank decodes requests of its own, with all weights but the others' experts. In a layer's
feed-forward block every rank gets all tokens, routes them, and computes the pairs of its experts;
then each gets the sum of its own tokens back. So a step of few requests, which reads weights, reads
each expert on one GPU alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from fmsim.errors import FmsimError
from fmsim.exec.kernels.experts.mixture import mixture_of_experts
from fmsim.exec.kernels.experts.tiles import OwnPairs
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.exchange import Exchange
from fmsim.exec.model.experts import MoE


class SplitMoE(nn.Module):
    """A `MoE` of which this rank holds one part of the routed experts, and router and shared expert
    whole. All ranks call it together, with as many tokens each.
    """

    def __init__(self, whole: MoE, exchange: Exchange):
        super().__init__()
        count = len(whole.gate.weight) // exchange.count
        self.exchange, self.first = exchange, exchange.rank * count
        self.gate, self.experts, self.shared_experts = (
            whole.gate,
            whole.experts,
            whole.shared_experts,
        )
        self.experts.keep(slice(self.first, self.first + count))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, None]:
        """`MoE.forward` of this rank's tokens, without gradients."""
        own = tokens.numel()
        every, ids = self.exchange.gather(x.flatten(0, 1)), tokens.flatten()
        if self.gate.hashed:
            ids = self.exchange.gather(ids)
        chosen, weights = self.gate(every, ids)
        part = OwnPairs(self.first, self.exchange.rank * own, own)
        out = mixture_of_experts(every, chosen, weights, self.experts, self.shared_experts, part)
        return self.exchange.reduce_scatter(out).view_as(x), None

    def decode(self, x: Tensor, tokens: Tensor) -> Tensor:
        """`MoE.decode`, whose shares are added up here, for they lie on several ranks."""
        return self(x, tokens)[0]


def split_experts(model: DeepseekV4, exchange: Exchange) -> None:
    """Keep this rank's part of each layer's experts, in place; also of a model without memory.

    Raises FmsimError where they do not split evenly.
    """
    count = model.config.n_routed_experts
    if count % exchange.count:
        raise FmsimError(
            f"{count} experts a layer do not split over {exchange.count} ranks; take a number that"
            " divides them"
        )
    for layer in model.model.layers:
        layer.mlp = SplitMoE(layer.mlp, exchange)


def share_weights(model: DeepseekV4, exchange: Exchange) -> None:
    """Rank 0's into every rank's, in place, but for the experts, which each has of its own."""
    own = {
        id(tensor)
        for layer in model.model.layers
        for tensor in (*layer.mlp.experts.parameters(), *layer.mlp.experts.buffers())
    }
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in own:
            exchange.share(tensor.detach())
