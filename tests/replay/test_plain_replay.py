"""The whole replay beside one that walks through sets of pages, a group and a page at a time."""

import math

import numpy as np
import pytest
from hand_trace import HandTrace

from fmsim.errors import DoesNotFit
from fmsim.policies.base import Pins, Policy, PolicyParams
from fmsim.replay.replayer import Replayer

LAYERS, TAU = 2, 4
BY_LAYER = (
    "accessed",
    "hit",
    "golden",
    "golden_hit",
    "mass_total",
    "mass_kept",
    "heaviest_lost",
)


def worth_of(step, page):
    return (page * 37 + step * 11) % 23


class Known(Policy):
    """Worths that anybody can reckon; it notes what it is shown."""

    name, action, evidence, decision_scope = "known", "evict", "position", "layer"

    class Params(PolicyParams):
        sink: int = 0
        recent: int = 0
        decoded: bool = False
        lowest: float | None = None

    def reset(self, ctx):
        super().reset(ctx)
        self.floor = self.params.lowest
        self.seen = [[] for _ in range(ctx.n_groups)]
        self.decided = False

    def pins(self):
        return Pins(self.params.sink, self.params.recent, self.params.decoded)

    def worth(self, step, pages):
        return worth_of(step, pages).astype(np.float32)

    def decide(self, step):
        self.decided = True  # what it lets go has no order

    def observe(self, step, obs):
        for group, note in enumerate(self.seen):
            columns = (obs.pages, obs.count, obs.mass, obs.hit, obs.fetched)
            rows = zip(*(column[group].tolist() for column in columns), strict=True)
            note.append(("saw", sorted(row for row in rows if row[0] >= 0)))

    def moved(self, step, loaded, evicted):
        for group, note in enumerate(self.seen):
            came, went = ([p for p in part[group].tolist() if p >= 0] for part in (loaded, evicted))
            if came or went:
                note.append(("moved", came, sorted(went) if self.decided else went))
        self.decided = False


class Asking(Known):
    """It prefetches, too."""

    name = "asking"

    def prefetch(self, step):
        return np.tile(asked_for(step), (self.ctx.n_groups, 1))


def asked_for(step):
    return np.array([step * 5 % 7, 8 + step % 3, -1, step * 5 % 7 + 1])


class PlainGroup:
    """One group's pages. Counts are by step; `notes` are what the policy should be shown."""

    def __init__(self, params, n_slots, n_pages, prompt_entries, n_steps, cold):
        self.params, self.n_slots, self.n_pages = params, n_slots, n_pages
        self.prompt_pages = prompt_entries // params.granularity
        self.resident, self.notes, self.step = set(), [], 0
        names = ("written", "lookahead_loads", "demand_loads", "evicted", "resident")
        self.counts = {name: [0] * n_steps for name in names}
        self.see(prompt_entries)
        if not cold:
            self.decide()
        self.initial, self.before, self.overlaps = len(self.resident), set(self.resident), []

    def see(self, n_entries):
        size = self.params.granularity
        self.visible = math.ceil(n_entries / size)
        self.tail = self.visible - max(self.params.recent, 1 if n_entries % size else 0)
        if self.params.decoded:
            self.tail = min(self.tail, self.prompt_pages)

    def pinned(self, page):
        return page < self.params.sink or page >= self.tail

    def rank(self, page):
        return (worth_of(self.step, page), page)

    def note(self, came, went):
        if came or went:
            self.notes.append(("moved", came, went))

    def decide(self):
        pinned = sorted(filter(self.pinned, range(self.visible)))
        lowest = -math.inf if self.params.lowest is None else self.params.lowest
        others = [p for p in range(self.visible) if not self.pinned(p)]
        others = sorted((p for p in others if worth_of(self.step, p) >= lowest), key=self.rank)
        chosen = set((others + pinned)[-self.n_slots :])
        came, went = sorted(chosen - self.resident), self.resident - chosen
        self.resident = chosen
        self.note(came, sorted(went))
        return len(came), len(went)

    def admit(self, pages, in_use=()):
        if not pages:
            return 0, 0
        stay = {page for page in self.resident if self.pinned(page) or page in in_use}
        victims = sorted(self.resident - stay, key=self.rank)
        came, went = [], []
        for page in pages[: self.n_slots]:
            if len(self.resident) == self.n_slots:
                if not victims:
                    break
                went.append(victims.pop(0))
                self.resident.remove(went[-1])
            self.resident.add(page)
            came.append(page)
        self.note(came, went)
        return len(pages), len(went) + len(pages) - len(came)

    def count(self, name, loaded_and_evicted):
        self.counts[name][self.step] += loaded_and_evicted[0]
        self.counts["evicted"][self.step] += loaded_and_evicted[1]

    def missing_to_fetch(self, use):
        """`use`: (entries, mass) by page."""
        missing = [page for page in use if page not in self.resident]
        if self.params.on_miss != "fallback":
            return missing if self.params.on_miss == "fetch" else []
        total = sum(mass for _, mass in use.values())
        taken = {page for page in missing if use[page][1] > total * self.params.fallback_above}
        entries = sum(count for count, _ in use.values())
        there = entries - sum(use[page][0] for page in missing)
        for page in sorted(missing, key=lambda page: (use[page][1], page), reverse=True):
            if there < math.ceil(entries * self.params.fallback_below):
                taken.add(page)
                there += use[page][0]
        return sorted(taken)

    def walk(self, step, n_entries, use, asks):
        """One step; returns the pages that were there, and those attended to."""
        self.step, first = step, self.visible
        self.see(n_entries)
        self.count("written", self.admit(list(range(first, self.visible))))
        cadence = self.params.cadence
        if step and cadence > 1 and step % cadence == 0:
            self.count("lookahead_loads", self.decide())
        if asks:
            wanted = [p for p in asked_for(step).tolist() if 0 <= p < self.visible]
            new = [p for p in wanted if p not in self.resident]
            self.count("lookahead_loads", self.admit(new))
        if step and step % TAU == 0:
            both, either = self.resident & self.before, self.resident | self.before
            self.overlaps.append(len(both) / len(either) if either else 1.0)
            self.before = set(self.resident)
        hit = {page for page in use if page in self.resident}
        fetched = self.missing_to_fetch(use)
        masked = self.params.on_miss == "mask" and self.params.sees == "resident"
        # where every page has a slot, all index keys stay too
        masked = masked and (self.n_slots < self.n_pages or self.params.lowest is not None)
        shown = [
            (
                page,
                count,
                mass if page in hit or page in fetched else 0.0,
                page in hit,
                page in fetched,
            )
            for page, (count, mass) in sorted(use.items())
            if not masked or page in hit
        ]
        self.notes.append(("saw", shown))
        self.count("demand_loads", self.admit(fetched, hit))
        self.counts["resident"][step] = len(self.resident)
        return hit, hit | set(fetched)


def golden_of(row):
    """Entries that carry the first 0.6 of a row's mass: [(entry, mass)]."""
    total, before, found = sum(mass for _, mass in row), 0.0, set()
    for entry, mass in sorted(row, key=lambda one: -one[1]):
        if before < np.float32(0.6) * np.float32(total) and mass > 0:
            found.add(entry)
        before += mass
    return found


def random_case(rng):
    n_steps, prompt = int(rng.integers(1, 19)), int(rng.integers(1, 22))
    ids, masses = [], []
    for step in range(n_steps):
        visible = (4 * prompt + step + 1) // 4
        rows = [
            np.sort(rng.choice(visible, rng.integers(1, min(visible, 6) + 1), False))
            for _ in range(LAYERS)
        ]
        ids.append([row.tolist() for row in rows])
        masses.append([(rng.permutation(64)[: len(row)] / 256).tolist() for row in rows])
    params = {
        "budget": f"{rng.integers(1, 14)} entries",
        "granularity": int(rng.choice([1, 4])),
        "scope": str(rng.choice(["per_layer", "shared"])),
        "sees": str(rng.choice(["resident", "all"])),
        "fallback_above": float(rng.choice([0.1, 0.4, 1.0])),
        "fallback_below": float(rng.choice([0.0, 0.5, 0.9])),
        "sink": int(rng.integers(0, 3)),
        "recent": int(rng.integers(0, 4)),
        "decoded": bool(rng.integers(2)),
        "lowest": [None, 9.0][rng.integers(2)],
    }
    return HandTrace(ids, masses, prompt, still=False, tau=TAU), prompt, params


@pytest.mark.parametrize("cadence", [1, 4, 3])
@pytest.mark.parametrize("on_miss", ["fetch", "mask", "fallback"])
def test_a_replay_is_what_sets_of_pages_say(on_miss, cadence):
    rng = np.random.default_rng([cadence, len(on_miss)])
    n_ran = 0
    for _ in range(16):
        trace, prompt, given = random_case(rng)
        asks, cold = cadence == 1 and bool(rng.integers(2)), bool(rng.integers(2))
        policy = (Asking if asks else Known)(**given, on_miss=on_miss, cadence=cadence)
        params, size = policy.params, policy.params.granularity
        n_steps = len(trace.entry_ids)
        n_pages = math.ceil(max(trace.n_entries(n_steps - 1), prompt) / size)
        n_slots = min(n_pages, max(1, int(params.budget.amount) // size))
        decoded = n_pages - prompt // size if params.decoded else 0
        if min(n_pages, params.sink + max(params.recent, decoded, 1)) > n_slots:
            with pytest.raises(DoesNotFit, match="are pinned by the end"):
                Replayer(trace, cold=cold).run(policy)
            continue
        n_ran += 1
        ledger = Replayer(trace, cold=cold).run(policy)
        layers_of = [[0, 1]] if params.scope == "shared" else [[0], [1]]
        groups = [PlainGroup(params, n_slots, n_pages, prompt, n_steps, cold) for _ in layers_of]
        expected = {name: np.zeros((n_steps, LAYERS)) for name in BY_LAYER}
        for step in range(n_steps):
            rows = [
                [(e, m) for e, m in zip(*row, strict=True) if e >= 0]
                for row in zip(
                    trace.entry_ids[step].tolist(), trace.mass[step].tolist(), strict=True
                )
            ]
            for group, layers in zip(groups, layers_of, strict=True):
                use = {}
                for entry, mass in sorted(each for layer in layers for each in rows[layer]):
                    count, sum_so_far = use.get(entry // size, (0, 0.0))
                    use[entry // size] = (count + 1, sum_so_far + mass)
                hit, attended = group.walk(step, trace.n_entries(step), use, asks)
                for layer in layers:
                    row, golden = rows[layer], golden_of(rows[layer])
                    here = [entry for entry, _ in row if entry // size in hit]
                    lost = [mass for entry, mass in row if entry // size not in attended]
                    values = (
                        len(row),
                        len(here),
                        len(golden),
                        len(golden & set(here)),
                        sum(mass for _, mass in row),
                        sum(mass for _, mass in row) - sum(lost),
                        max(lost, default=0.0),
                    )
                    for name, value in zip(BY_LAYER, values, strict=True):
                        expected[name][step, layer] = value
        for name in groups[0].counts:
            expected[name] = np.array([group.counts[name] for group in groups]).T
        expected["initial"] = [group.initial for group in groups]
        expected["set_overlap"] = np.mean([group.overlaps for group in groups], axis=0)
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(ledger, name), value, rtol=1e-6, err_msg=name)
        assert (ledger.n_slots, ledger.n_groups) == (n_slots, len(groups))
        assert policy.seen == [group.notes for group in groups]
    assert n_ran >= 5


def test_a_single_step_has_no_set_before_it():
    trace = HandTrace([[[0, 1]]], prompt_entries=4, tau=1)
    assert Replayer(trace).run(Known(budget="2 entries")).set_overlap.shape == (0,)
