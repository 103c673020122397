"""What fmsim's own engine takes in a step beside the model's modules, as a calibration timed it.

Between two graphs of a decode the engine looks up what is resident, lets a policy learn, gives
slots and writes block tables. Within a graph a policy may ask a CSA layer for masses, for small
pages, for a choice among resident entries, or for its misses. A preset without a calibration of
these prices none of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fmsim.geometry import Geometry
from fmsim.hw.spec import Bookkeeping, EngineTimes, Grid, StepWork
from fmsim.hw.tables import Curve
from fmsim.replay.ledger import Ledger
from fmsim.sim.footprint import Footprint, keyed_layers
from fmsim.sim.transfer_cost import GatherCurve

Floats = NDArray[np.float64]
PAGE_ENTRIES = 64  # of the pages that modules are timed with
# of what a decision recalls late: fmsim/exec/kernels/tuning.py
LATE_LAUNCHES = 6


class EngineCosts:
    """Of the decode that `ledger` describes, `batch` requests in step on one GPU.

    One cache manager decides for all of them, so a decision ranks as many pages as for one; lists
    of moves and block tables grow with requests. What is missed, and what a decision recalls late,
    crosses the link for every request, also where all read one mirror
    (benchmarks/results/blind-rows.md). With ``one_text`` they miss the same pages, and a part of
    these comes from the GPU's L2. ``before_s`` is what the layers take that come before the first
    that selects: where misses are loaded, the bookkeeping runs beside these.
    """

    def __init__(
        self,
        times: EngineTimes,
        ledger: Ledger,
        geometry: Geometry,
        place: Footprint,
        gather: GatherCurve,
        batch: float,
        before_s: float = 0.0,
        one_text: bool = False,
    ) -> None:
        self.times = times
        self.ledger = ledger
        self.geometry = geometry
        self.place = place
        self.gather = gather
        self.batch = batch
        self.one_text = one_text
        self.granularity = ledger.granularity
        self.n_pages = -(-int(geometry.csa_entries(place.tokens)[-1]) // ledger.granularity)
        self.loads = ledger.miss_slots > 0
        self.hidden_ms = 1e3 * before_s if self.loads else 0.0

    def step_s(self) -> Floats:
        """[T]: all but misses and recalls."""
        bookkeeping = self.times.steps[self._kind()]
        movable = self.ledger.miss_slots or self.ledger.topk
        ms = np.full(self.ledger.n_steps, self._plain_ms(bookkeeping, movable))
        ms[self._begins()] += self._work_ms(bookkeeping.closing, movable)
        cadence = self.ledger.cadence
        if cadence > 1:
            kind = "ahead" if self.ledger.decides_ahead else "decided"
            ms[cadence::cadence] += self._decision_ms(self.times.steps[kind])
        ms = np.maximum(ms - self.hidden_ms, 0.0) + self._in_graph_ms()
        closing_ms = Curve.of(self.times.closing_batch_ms).one(self.batch)
        ms[self._closes()] += self.geometry.n_csa * closing_ms
        return np.asarray(ms / 1e3)

    def miss_s(self) -> Floats:
        """[T, n_csa]: what a layer's misses take beyond a layer that has none."""
        loads = self.ledger.demand_loads[:, self.place.groups].astype(np.float64)
        if not self.loads:
            return np.zeros_like(loads)
        more_ms = self._staged_ms(loads) - self._staged_ms(np.zeros(1))
        return np.asarray(np.where(loads > 0, np.maximum(more_ms, 0.0) / 1e3, 0.0))

    def kept_pages(self) -> Floats:
        """[T, G]: of the pages that were missed, those that get a slot at the step's end: no more
        than there are slots of pages that the step does not use. Its hits are as many pages to its
        misses as they are entries.
        """
        ledger = self.ledger
        missed = np.maximum((ledger.accessed - ledger.hit).sum(axis=1), 1)
        used = ledger.demand_loads * (ledger.hit.sum(axis=1) / missed)[:, None]
        free = np.maximum(np.array(ledger.group_slots) - used, 0.0)
        return np.asarray(np.minimum(ledger.demand_loads, free))

    def _staged_ms(self, loads: Floats) -> Floats:
        """Of a layer that loads them. Between the sizes of pages that were timed as the logarithm
        is, at as many bytes; larger pages, and more than were timed, as gathers of the rest.
        """
        by_entries = self._timed_loads()
        timed = sorted(by_entries)
        place = float(np.interp(np.log2(self.granularity), np.log2(timed), range(len(timed))))
        ms, timed_s, most = np.zeros_like(loads), np.zeros_like(loads), np.inf
        for number in {int(place), math.ceil(place)}:
            share, entries = 1 - abs(place - number), timed[number]
            line = _line(by_entries[entries], self.batch)
            most = min(most, entries * line.at[-1])
            pages = np.minimum(loads * self.granularity / entries, line.at[-1])
            ms = ms + share * line(pages)
            timed_s = timed_s + share * self._gathered_s(entries, pages)
        more_s = np.maximum(self._gathered_s(self.granularity, loads) - timed_s, 0.0)
        beyond = (self.granularity > timed[-1]) | (loads * self.granularity > most)
        return np.asarray(ms + np.where(beyond, 1e3 * more_s, 0.0))

    def _timed_loads(self) -> dict[int, Grid]:
        """By entries a page. Few steps of fallback load, and their queries are made before."""
        times = self.times
        if self._kind() != "fetched" or not times.fetching_ms:
            return {1: times.staging_ms}
        return times.common_fetching_ms if self.one_text else times.fetching_ms

    def _gathered_s(self, entries: int, pages: Floats) -> Floats:
        """Of every request so many pages of so many entries, in one gather."""
        row_bytes = self.geometry.slot_bytes(entries, with_keys=False)
        return self.gather.seconds(row_bytes, self.batch * pages * row_bytes)

    def _kind(self) -> str:
        """Of `STEP_KINDS`, how a step without a decision keeps its books."""
        if min(self.ledger.group_slots) >= self.n_pages:
            return "kept"
        if self.loads:
            return "fallback" if self.ledger.on_miss == "fallback" else "fetched"
        return "observed" if self.ledger.observes else "held"

    def _closes(self) -> np.ndarray:
        """bool [T]: steps in which an entry closes."""
        entries = self.geometry.csa_entries(self.place.tokens)
        return np.asarray(np.diff(entries, prepend=entries[0]) > 0)

    def _begins(self) -> np.ndarray:
        """bool [T]: steps in which a page begins, or more of the resident entries are visible."""
        began = self.ledger.written.any(axis=1)
        return np.asarray(began | self._closes() if self.place.keys_tiered else began)

    def settled_s(self, pages: np.ndarray, hbm_bytes_per_s: float) -> Floats:
        """[T]: `pages` [T] that came ahead of a decision, of all layers and requests, go from spare
        pages to their slots. In an older preset they are read and written as bytes are.
        """
        entry_bytes, key_bytes = self._row_bytes()
        rates = self.times.within_bytes_per_s
        moving = 1 - keyed_layers(self.ledger, self.geometry) / self.geometry.n_keyed
        found = np.zeros(len(pages))
        for row_bytes, rows in ((entry_bytes, pages), (key_bytes, moving * pages)):
            if row_bytes:
                rate = _between(rates, row_bytes) if rates else hbm_bytes_per_s / 2
                found = found + rows * row_bytes / rate
        return found

    def _row_bytes(self) -> tuple[int, int]:
        """Of a page's entries, and of its keys where they come and go with these."""
        geometry, keyed = self.geometry, self.place.keys_tiered
        entry_bytes = geometry.slot_bytes(self.granularity, with_keys=False)
        return entry_bytes, geometry.slot_bytes(self.granularity, with_keys=keyed) - entry_bytes

    def late_s(self, pages: np.ndarray, compute_s: np.ndarray) -> Floats:
        """[T]: by how much steps of `compute_s` are longer, while what decisions recall late comes:
        `pages` [T] of all layers and requests, at the step of the decision.

        Keys come first, beside the step of the decision, whose layers wait for theirs. Where misses
        are loaded, all layers wait for their entries. Elsewhere these come in the course of steps,
        and each of the steps reads those of them that it attends to: its `topk` times the share of
        the slots whose pages have not come.
        """
        entry_bytes, key_bytes = self._row_bytes()
        entries_s = self._come_late_s(entry_bytes, pages)
        if self.loads:
            return self._waited_s(entries_s, compute_s)
        before = keyed_layers(self.ledger, self.geometry) / self.geometry.n_csa
        keys_s = self._come_late_s(key_bytes, (1 - before) * pages)
        slower = self._late_slower(entry_bytes)
        found, come_s = self._waited_s(keys_s, compute_s, before), keys_s + entries_s
        left_s = read_s = 0.0  # reads are of a step for each second of what has not come
        for step in range(len(pages)):
            if pages[step]:
                left_s += float(come_s[step])
                read_s = self._read_s(float(pages[step])) / float(come_s[step])
            found[step] += min(read_s * left_s, self._read_s(math.inf))
            beside_s = min(left_s, float(compute_s[step] + found[step]))
            found[step] += beside_s * slower
            left_s -= beside_s
        return found

    def _waited_s(self, come_s: np.ndarray, compute_s: np.ndarray, before: float = 0.0) -> Floats:
        """[T]: what comes in LATE_LAUNCHES parts, and layers whose part is here go on; those that
        need nothing of it take the share ``before`` of a step.
        """
        done_s = before * compute_s
        layers_s = (1 - before) * compute_s / LATE_LAUNCHES
        for part in range(1, LATE_LAUNCHES + 1):
            done_s = np.maximum(done_s, come_s * part / LATE_LAUNCHES) + layers_s
        return np.asarray(np.where(come_s > 0, done_s - compute_s, 0.0))

    def _read_s(self, pages: float) -> float:
        """Of a step that has all these late pages of all layers and requests, what it reads of
        them, entry by entry.
        """
        slots = sum(self.ledger.group_slots) / self.ledger.n_groups
        share = min(1.0, pages / (slots * self.geometry.n_csa * self.batch))
        entry_bytes = self.geometry.slot_bytes(1, with_keys=False)
        rows = np.array([share * self.ledger.topk * self.batch])
        return self.geometry.n_csa * float(self._copied_s(entry_bytes, rows)[0])

    def _late_slower(self, row_bytes: float) -> float:
        """By which share a step is slower beside late rows, by those of the nearest size."""
        timed = self.times.late_slower
        if not timed:
            return self.times.beside_slower
        return timed[min(timed, key=lambda each: abs(np.log2(each / row_bytes)))]

    def _come_late_s(self, row_bytes: float, rows: np.ndarray) -> np.ndarray:
        """Of so many rows, by the few programs that copy beside steps."""
        rates = self.times.late_bytes_per_s
        if not rates or not row_bytes:
            return self._copied_s(row_bytes, rows)
        return np.asarray(rows * row_bytes / _between(rates, row_bytes))

    def _copied_s(self, row_bytes: float, rows: np.ndarray) -> np.ndarray:
        """Of so many rows; none where they have no bytes."""
        if not row_bytes:
            return np.zeros(len(rows))
        return self.gather.seconds(row_bytes, rows * row_bytes)

    def _plain_ms(self, bookkeeping: Bookkeeping, movable: int) -> float:
        """Of a step in which nothing closes and nobody decides."""
        if not bookkeeping.loading_ms:
            return self._work_ms(bookkeeping.plain, movable)
        slots_ms = bookkeeping.plain.slot_ns * sum(self.ledger.group_slots) / 1e6
        of_one = self._listed_pages / self.batch
        return max(0.0, _line(bookkeeping.loading_ms, self.batch).one(of_one) + slots_ms)

    def _work_ms(self, work: StepWork, movable: int) -> float:
        """Of a step's bookkeeping at this decode's sizes, `movable` pages in each layer."""
        return self._sized_ms(work, work.page_ns * self._listed_pages, movable)

    def _decision_ms(self, bookkeeping: Bookkeeping) -> float:
        work = bookkeeping.decision
        if work is None:
            return 0.0
        ranked = self.ledger.n_groups * self.n_pages
        pages_ns = work.page_ns * ranked + work.table_ns * self._listed_pages
        return self._sized_ms(work, pages_ns, max(self.ledger.group_slots))

    @property
    def _listed_pages(self) -> float:
        """Pages in all requests' block tables."""
        uneven = len(set(self.ledger.group_slots)) > 1
        by_layer = self.loads or uneven
        rows = self.geometry.n_csa if by_layer else self.ledger.n_groups
        return rows * self.n_pages * self.batch

    def _sized_ms(self, work: StepWork, pages_ns: float, movable: int) -> float:
        slots_ns = work.slot_ns * sum(self.ledger.group_slots)
        # a list for all, or each
        rows = 1 if self.ledger.n_groups == 1 and not self.loads else self.geometry.n_csa
        moves_ns = work.move_ns * rows * movable * self.batch
        return max(0.0, work.fixed_ms + (slots_ns + pages_ns + moves_ns) / 1e6)

    def _in_graph_ms(self) -> float:
        """What the policy asks of all CSA layers, but for misses."""
        times, batch = self.times, self.batch
        ms = 0.0
        if self.ledger.observes_mass:
            ms += Curve.of(times.masses_batch_ms).one(batch)
        if self.place.keys_tiered and times.residents_ms:
            ms += self._residents_ms()
        else:
            ms += _of_pages(times.pages_batch_ms, self.granularity, batch)
            if self.place.keys_tiered:
                ms += Curve.of(times.listed_batch_ms).one(batch)
                ms += self._list_scores_ms()
        if self.loads:
            ms += float(self._staged_ms(np.zeros(1))[0])
        return self.geometry.n_csa * ms

    def _residents_ms(self) -> float:
        """Of a layer that selects among residents. Between the sizes of pages that were timed as
        the logarithm is.
        """
        grids, scored = self.times.residents_ms, float(self.place.scored_entries.mean())
        timed = sorted(grids)
        ms = [_line(grids[entries], self.batch).one(scored) for entries in timed]
        return float(np.interp(np.log2(self.granularity), np.log2(timed), ms))

    def _list_scores_ms(self) -> float:
        """Of a layer that scores its resident entries, in pages of their own."""
        works = self.times.listed_scores
        near = min(works, key=lambda entries: abs(np.log2(entries / self.granularity)))
        if self.granularity >= PAGE_ENTRIES:
            return 0.0
        scored = self.batch * float(self.place.scored_entries.mean())
        work = works[near]
        return max(0.0, work.fixed_ms + work.slot_ns * scored / 1e6)


def _between(rates: Mapping[int, float], row_bytes: float) -> float:
    """Of rows between those that were timed, as the logarithm is."""
    timed = sorted(rates)
    return float(np.interp(np.log(row_bytes), np.log(timed), [rates[each] for each in timed]))


def _of_pages(by_entries: Grid, entries: int, batch: float) -> float:
    """By the nearest number of entries a page; pages of 64 are what all is timed with."""
    if entries >= PAGE_ENTRIES:
        return 0.0
    near = min(by_entries, key=lambda each: abs(np.log2(each / entries)))
    return Curve.of(by_entries[near]).one(batch)


def _line(by_batch: Mapping[int, Mapping[int, float]], batch: float) -> Curve:
    """Of a grid by batch and number, the curve by number at a batch between."""
    numbers = sorted(next(iter(by_batch.values())))
    columns = {
        number: Curve.of({at: by_batch[at][number] for at in by_batch}).one(batch)
        for number in numbers
    }
    return Curve.of(columns)
