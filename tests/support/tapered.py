"""Policies whose layers have different numbers of slots: each half as many as the one before."""

from fmsim.policies.lru import LRU
from fmsim.policies.lsa import LSA


class Tapered(LRU):
    """LRU with most slots in the first layer."""

    name = "tapered"

    def layer_shares(self, n_layers):
        return [2.0**-layer for layer in range(n_layers)]


class TaperedLSA(LSA):
    """LSA with most slots in the first layer."""

    name = "tapered-lsa"

    def layer_shares(self, n_layers):
        return [2.0**-layer for layer in range(n_layers)]
