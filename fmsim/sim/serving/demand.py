"""What one request of any length asks of a server, step by step, from a ledger that was recorded at
one length.

This is a model: a ledger says what a policy did at its own trace's length, and a request of another
length is taken to do the same in shares.

- Slots, and resident and recalled entries, are shares of the history, and grow with it, where the
  policy's budget is a share of the history (or it keeps everything). A budget in multiples of top-k
  follows the model's top-k, one in entries or bytes stays what it is. One in bytes on the GPU is
  solved anew for each length; a request too short for it gets one slot.
- Spare pages follow from the slots, and from the model's top-k.
- Missed entries are shares of the model's top-k, whatever the length; a request that fits its
  budget whole misses nothing.
- A memory indexer scores the whole history.
- A request that is longer than the ledger replays the ledger's whole windows again, without the
  first ones, which are the prefill's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fmsim.geometry import Geometry
from fmsim.hw.spec import Hardware
from fmsim.policies.budget import Budget
from fmsim.replay.ledger import Ledger
from fmsim.replay.needs import Slots, most_that_fit, spare_ahead
from fmsim.sim.footprint import Allocation, allocated, footprint
from fmsim.sim.transfer_cost import GatherCurve


@dataclass(frozen=True)
class Pools:
    """Whole bytes of one request and its whole life: `gpu` on every GPU, `mirror` on the host."""

    gpu: Allocation
    mirror: int

    @property
    def gpu_bytes(self) -> int:
        return self.gpu.total


class Demand:
    """One ledger in a geometry's bytes. Arrays over ledger steps [T]; G groups of CSA layers."""

    def __init__(
        self, ledger: Ledger, geometry: Geometry, layer_map: Sequence[int] | None = None
    ) -> None:
        """Raises FmsimError for a layer map that does not fit."""
        place = footprint(ledger, geometry, layer_map)
        self.geometry, self.ledger_entries, self.cadence = (
            geometry,
            ledger.prompt_entries,
            ledger.cadence,
        )
        self.keys_tiered = place.keys_tiered
        self.entry_bytes = geometry.slot_bytes(
            1, with_keys=place.keys_tiered
        )  # that come over the link for one entry
        self.row_bytes = geometry.slot_bytes(ledger.granularity, with_keys=place.keys_tiered)
        self.group_layers = np.bincount(
            place.groups, minlength=ledger.n_groups
        )  # [G] model layers that each group serves
        self.miss_bytes = (
            ledger.demand_loads.astype(np.float64)
            * self.row_bytes
            * geometry.index_topk
            / ledger.topk
        )  # [T, G] of each layer
        self.recall_bytes = (
            ledger.lookahead_loads.astype(np.float64) @ self.group_layers * self.row_bytes
        )  # [T] of all layers
        entries = geometry.csa_entries(place.tokens)
        resident = np.minimum(
            ledger.resident.astype(np.int64) * ledger.granularity, entries[:, None]
        )
        self.resident = (
            resident @ self.group_layers / geometry.n_csa
        )  # [T] entries a layer, mean over layers
        self._fullest = resident[self.resident.argmax()]  # [G] entries, at the fullest step
        self.holds_all = bool((resident >= entries[:, None]).all())
        self._ledger, self._layer_map = ledger, place.layer_map
        self._topk_ratio = geometry.index_topk / ledger.topk
        budget = str(ledger.params.get("budget", "all"))
        self._budget = None if budget == "all" else Budget.parse(budget)
        self._solutions: dict[int, float] = {}  # by tokens
        self.indexer_scored = ledger.scored.astype(np.float64)
        self.tokens_per_step = 1.0
        self.positions = 1  # that a step computes and selects for
        self._drafted: dict[tuple[int, float], Demand] = {}
        self.misses, self.recalls = (
            bool(ledger.demand_loads.any()),
            bool(ledger.lookahead_loads.any()),
        )
        self.mirrored = ledger.comes_back
        self.overlaps = ledger.decides_ahead  # a recall may run during the window before its own
        self._first, self._end = _repeated_steps(ledger)

    def drafted(self, draft_tokens: int, acceptance: float) -> Demand:
        """The same of a server whose steps draft tokens (`spec.Server.draft_tokens`).

        A step selects for all its positions, and fetches what any of them misses, as the ledger's
        steps at those positions do: also for drafts that are then rejected, whose places later
        steps come to again. So misses are an upper bound. A window holds a whole number of steps;
        they make its `cadence` tokens, which sets `tokens_per_step`.
        """
        if not draft_tokens:
            return self
        key = draft_tokens, acceptance
        if key not in self._drafted:
            self._drafted[key] = self._with_drafts(draft_tokens, acceptance)
        return self._drafted[key]

    def _with_drafts(self, draft_tokens: int, acceptance: float) -> Demand:
        made = tokens_per_step(draft_tokens, acceptance)
        n_steps = len(self.recall_bytes)
        if self.cadence == 1:
            cadence = 1
            starts = np.floor(np.arange(0, n_steps - made + 1e-9, made)).astype(np.int64)
            first, end = 0, len(starts)
        else:
            cadence = max(1, round(self.cadence / made))
            made = self.cadence / cadence
            windows = np.arange(n_steps // self.cadence) * self.cadence
            within = np.floor(np.arange(cadence) * made).astype(np.int64)
            starts = (windows[:, None] + within).ravel()
            first, end = self._first // self.cadence * cadence, len(starts)
        if first >= end:
            first = 0
        ends = np.append(starts[1:], min(n_steps, int(starts[-1] + math.ceil(made))))
        positions = np.minimum(starts[:, None] + np.arange(1 + draft_tokens), n_steps - 1)
        found = copy.copy(self)
        for name in ("miss_counts", "_recalled"):
            found.__dict__.pop(name, None)
        found.tokens_per_step, found.positions = made, 1 + draft_tokens
        found.cadence, found._first, found._end = cadence, first, end
        found.miss_bytes = self.miss_bytes[positions].sum(axis=1)
        found.resident = self.resident[starts]
        for name in ("recall_bytes", "indexer_scored"):
            sums = np.append(0.0, np.cumsum(getattr(self, name)))
            setattr(found, name, sums[ends] - sums[starts])
        return found

    @cached_property
    def miss_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Different steps' misses [D, G], and the share of steps that each stands for [D]."""
        distinct, counts = np.unique(self.miss_bytes, axis=0, return_counts=True)
        return distinct, counts / counts.sum()

    @property
    def offsets(self) -> np.ndarray:
        """Ledger steps at which a request may begin: the windows' starts."""
        return np.arange(0, self._end, self.cadence)

    def at(self, position: np.ndarray) -> np.ndarray:
        """Ledger step of each position: the ledger once, then its whole windows over and over."""
        again = self._first + (position - self._end) % (self._end - self._first)
        return np.where(position < self._end, position, again)

    def recalled_at(self, position: int) -> float:
        """Bytes that the decision at one position recalls, in the ledger's own size."""
        if position >= self._end:
            position = self._first + (position - self._end) % (self._end - self._first)
        return self._recalled[position]

    @cached_property
    def _recalled(self) -> list[float]:
        recalled: list[float] = self.recall_bytes.tolist()
        return recalled

    def length_ratio(self, prompt_tokens: int) -> float:
        """A request's history over the ledger's."""
        return self.geometry.csa_entries(prompt_tokens) / max(1, self.ledger_entries)

    def growth(self, prompt_tokens: int) -> float:
        """What the ledger's slots, resident and recalled entries are multiplied by."""
        if self.holds_all or self._budget is None or self._budget.unit == "share":
            return self.length_ratio(prompt_tokens)
        if self._budget.on_gpu:
            tokens = prompt_tokens + self._ledger.n_steps
            if tokens not in self._solutions:
                self._solutions[tokens] = self._solved(tokens)
            return self._solutions[tokens]
        return self._topk_ratio if self._budget.unit == "topk" else 1.0

    def _solved(self, tokens: int) -> float:
        """Growth of a budget on the GPU: the most slots that leave a request within it."""
        assert self._budget is not None
        full_bytes = self.geometry.full_gpu_bytes(tokens)
        limit_bytes = self._budget.gpu_bytes(full_bytes)
        most = max(self._ledger.group_slots)
        pages = -(-self.geometry.csa_entries(tokens) // self._ledger.granularity)

        def fits(slots: int) -> bool:
            return self._allocated(slots / most, tokens).total <= limit_bytes

        return max(1, most_that_fit(fits, max(pages, most))) / most

    def _allocated(self, growth: float, tokens: int) -> Allocation:
        """With the ledger's slots times `growth`, of a request of `tokens` in all.

        What has a slot for every page has nothing spare, unless it recalls ahead all the same.
        """
        ledger = self._ledger
        pages = -(-self.geometry.csa_entries(tokens) // ledger.granularity)
        slots = tuple(
            pages if self.holds_all else max(1, min(pages, math.floor(n * growth + 1e-9)))
            for n in ledger.group_slots
        )
        ahead = spare_ahead(slots) if any(ledger.ahead_slots) else (0,) * len(slots)
        whole = min(slots) >= pages and not any(ahead)
        missed = math.ceil(ledger.miss_slots * self._topk_ratio) * self.positions
        needs = Slots(
            n_layers=ledger.n_layers,
            n_groups=ledger.n_groups,
            granularity=ledger.granularity,
            group_slots=slots,
            ahead_slots=ahead,
            miss_slots=0 if whole else min(missed, pages),
            all_keys=ledger.all_keys or whole,
            target_layers=tuple(ledger.target_layers),
        )
        return allocated(needs, self.geometry, self._layer_map, tokens)

    def fits_whole(self, prompt_tokens: int, output_tokens: int) -> bool:
        """The budget holds all entries that the request ever has."""
        return self._most_resident(prompt_tokens, output_tokens) >= self.geometry.csa_entries(
            prompt_tokens + output_tokens
        )

    def pools(self, prompt_tokens: int, output_tokens: int) -> Pools:
        """What has to be there for the whole of a request's life."""
        tokens = prompt_tokens + output_tokens
        return Pools(
            gpu=self._allocated(self.growth(prompt_tokens), tokens),
            mirror=self.geometry.host_kv_bytes(tokens) if self.mirrored else 0,
        )

    @property
    def may_be_whole(self) -> bool:
        """A request may as well have all its entries on the GPU: it is exact, and scores all keys
        either way.
        """
        return self.misses and not self.keys_tiered

    def whole_bytes(self, prompt_tokens: int, output_tokens: int) -> int:
        """On every GPU, of a request that has all its entries there."""
        return self.geometry.full_gpu_bytes(prompt_tokens + output_tokens)

    def _most_resident(self, prompt_tokens: int, output_tokens: int) -> float:
        """Entries a layer, mean over layers; none has more than there are."""
        entries = self.geometry.csa_entries(prompt_tokens + output_tokens)
        growth = self.growth(prompt_tokens)
        wanted = self._fullest * growth
        if self.holds_all or (wanted >= entries).all():
            return float(entries)
        beyond = np.maximum(wanted - entries, 0) @ self.group_layers / self.geometry.n_csa
        return float(self.resident.max() * growth - beyond)

    def first_set_bytes(self, prompt_tokens: int, output_tokens: int) -> float:
        """What a request that comes with its whole KV in the mirror loads before its first step."""
        return (
            self._most_resident(prompt_tokens, output_tokens)
            * self.geometry.n_csa
            * self.entry_bytes
        )

    def mean_stall_s(self, engine: Hardware, requests: Sequence[tuple[int, int]]) -> float:
        """Mean over steps of the wait for misses of requests of these prompt and output tokens on
        one rank of `engine`, on an idle link.
        """
        missing = sum(not self.fits_whole(*sizes) for sizes in requests)
        if not self.misses or not missing:
            return 0.0
        missed, weights = self.miss_counts
        n_bytes = missing * missed / engine.placed.cp
        gathers = GatherCurve(engine.link).seconds(self.row_bytes, n_bytes)
        return float((gathers @ self.group_layers) @ weights)

    def recall_bytes_per_step(self, prompt_tokens: int) -> float:
        """Mean over the windows that repeat."""
        return float(self.recall_bytes[self._first : self._end].mean()) * self.growth(prompt_tokens)


def tokens_per_step(draft_tokens: int, acceptance: float) -> float:
    """Mean tokens that a step makes: the next one, and each draft while those before it were
    accepted: 1 + a + a^2 + ... + a^draft_tokens.
    """
    return sum(acceptance**n for n in range(draft_tokens + 1))


def _repeated_steps(ledger: Ledger) -> tuple[int, int]:
    """[first, end) of the ledger steps that a long request replays again and again: whole windows
    whose recall is a decision's own.

    The first window is filled by the prefill. A policy that decides one window ahead by a state has
    seen nothing new at its second decision either.
    """
    cadence, stale = ledger.cadence, ledger.decides_ahead and bool(ledger.target_layers)
    first, end = cadence * (1 + stale), ledger.n_steps // ledger.cadence * ledger.cadence
    return (first, end) if cadence > 1 and first < end else (0, ledger.n_steps)
