"""The time of one decode step without stalls: measured module times, added up.

A model, not a measurement.

One step = for each layer: hyper-connections, attention module (CSA or HCA; a sliding layer is taken
as an HCA layer of an empty context), the exchange between GPUs that the deployment needs, router
and routed experts (the shared expert runs beside them); then the output head, and, where the times
come from an engine's kernels, what the engine does between steps.

Ranks of data-parallel attention meet in every layer, so the busiest one's attention counts, and
the experts' tokens are those of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmsim.geometry import Geometry
from fmsim.geometry.memory_indexer import PUBLISHED_HEADS, PUBLISHED_WIDTH
from fmsim.hw.modules import Modules, modules
from fmsim.hw.spec import Hardware


@dataclass(frozen=True)
class StepCosts:
    """Times of one decode step on one GPU for a batch of requests, in seconds, one value a step."""

    csa_s: NDArray[np.float64]  # [T] one CSA layer's attention
    rest_s: NDArray[np.float64]  # [T] everything else of the step, all layers

    def total_s(self, n_selecting: int) -> NDArray[np.float64]:
        """Of a model with so many layers that attend to selected entries."""
        return n_selecting * self.csa_s + self.rest_s


@dataclass(frozen=True)
class Spread:
    """A quantity over the requests of a batch: what all have together, and what the largest has.

    Arrays [T].
    """

    total: np.ndarray
    largest: np.ndarray


class StepModel:
    """Step times of one model on one deployment. Made once, asked often."""

    def __init__(self, hw: Hardware, geometry: Geometry, draft_tokens: int = 0) -> None:
        """`draft_tokens`: that a step drafts for each request, one after another by a layer of
        their own, and checks together with the next token. Raises FmsimError where no table has
        this deployment.
        """
        self.draft_tokens = draft_tokens
        self.hw = hw
        self.geometry = geometry
        self.modules: Modules = modules(hw, geometry)
        self._csa: dict[int, np.ndarray] = {}
        self._hca: dict[int, np.ndarray] = {}
        self._rest: dict[tuple[int, int], float] = {}

    def equal(self, batch: int, tokens: np.ndarray, scored_entries: np.ndarray) -> StepCosts:
        """`batch` equal requests on the server, spread over its ranks.

        `tokens` [T]: context of each step; `scored_entries` [T]: entries that the lightning indexer
        scores in a CSA layer.
        """
        ranked = self.hw.placed.ranked(batch)
        return self.mixed(
            ranked,
            Spread(ranked * tokens, tokens),
            Spread(ranked * scored_entries, scored_entries),
            batch,
        )

    def mixed(
        self, ranked: int, tokens: Spread, scored_entries: Spread, batch: int | None = None
    ) -> StepCosts:
        """`ranked` requests of any sizes on the busiest rank, of `batch` on the server (by default
        as many on every rank), with their contexts and the entries that each scores in a CSA layer.
        """
        found, share = self.modules, 1 / self.hw.placed.cp
        batch = ranked * self.hw.placed.dp if batch is None else batch
        if ranked not in self._csa:
            # a request's positions read its keys together, and are as many rows of all else
            positions = ranked * (1 + self.draft_tokens)
            self._csa[ranked] = found.csa.of_batch(positions)
            self._hca[ranked] = found.hca.of_batch(positions)
        scored_tokens = self.geometry.csa_rate * share
        csa_ms = found.csa.ms(
            self._csa[ranked],
            ranked,
            scored_entries.total * scored_tokens,
            scored_entries.largest * scored_tokens,
        )
        if found.topk is not None:
            csa_ms = csa_ms + found.topk(scored_entries.largest * scored_tokens)
        hca_ms = found.hca.ms(
            self._hca[ranked], ranked, tokens.total * share, tokens.largest * share
        )
        rest_ms = self._rest_ms(ranked, batch) + self.geometry.n_hca * hca_ms
        return StepCosts(csa_s=csa_ms / 1e3, rest_s=rest_ms / 1e3)

    def before_selecting_s(self, batch: int) -> float:
        """Of the layers before the first that selects, their attention that of an empty context."""
        kinds = [layer.kind for layer in self.geometry.layers]
        before = kinds.index("sparse") if "sparse" in kinds else 0
        if not before:
            return 0.0
        ranked, found = self.hw.placed.ranked(batch), self.modules
        head_and_one_ms = found.draft_ms(ranked, batch)
        layer_ms = (found.rest_ms(ranked, batch) - head_and_one_ms) / (len(kinds) - 1)
        layer_ms += float(found.hca.of_batch(ranked)[0])
        return before * layer_ms / 1e3

    def _rest_ms(self, ranked: int, batch: int) -> float:
        """What does not depend on contexts."""
        if (ranked, batch) not in self._rest:
            positions = 1 + self.draft_tokens
            sliding_ms = self.modules.n_sliding * float(self._hca[ranked][0])
            rest_ms = self.modules.rest_ms(ranked * positions, batch * positions)
            if self.draft_tokens:
                # a drafting layer attends to its window, as a sliding layer does
                attending_ms = float(self.modules.hca.of_batch(ranked)[0])
                drafting_ms = attending_ms + self.modules.draft_ms(ranked, batch)
                rest_ms += self.draft_tokens * drafting_ms
            self._rest[ranked, batch] = sliding_ms + rest_ms
        return self._rest[ranked, batch]


def memory_indexer_s(hw: Hardware, geometry: Geometry, scored: np.ndarray | float) -> np.ndarray:
    """Time to score `scored` entries (all its layers together): the larger of its operations and
    its reads of index keys.
    """
    flops = scored * PUBLISHED_HEADS * 2.0 * PUBLISHED_WIDTH
    return np.maximum(
        flops / hw.matmul_flops.value, scored * geometry.index_key_bytes / hw.hbm_bytes_per_s.value
    )
