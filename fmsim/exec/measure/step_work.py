"""What an engine does between the graphs of a decode: looking up, observing, giving slots, block
tables, decisions.

The engine's own loop runs over made-up accesses with a pause in the place of the model. What a step
takes beside the pause is its bookkeeping, on a GPU by device events: the pause lets the host get
ahead, as a model's graph does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from fmsim.exec.decode.synthetic_decode import SyntheticStep
from fmsim.exec.decode.trace_driven import TraceDrivenDecode
from fmsim.exec.measure.jobs import Report
from fmsim.exec.measure.sizes import Sizes, StepSize
from fmsim.geometry import Geometry
from fmsim.policies import registry
from fmsim.policies.base import Array, Policy, PolicyParams
from fmsim.replay.replayer import Replayer

N_STEPS = 40
CADENCE = 8
CHANGING = 64
WARM_UP = CADENCE + 4  # steps
ENTRY_TOKENS = 4
CYCLES_PER_S = 1.5e9  # or more, of a GPU: how long a pause lasts is measured, not taken from this


class Ahead(Policy):
    """Decides from what it knew all along. Few pages change at a decision, one in CHANGING: lists
    of moves are as long as the slots however many are moved, and copies are priced apart.
    """

    name = "ahead"
    action = "hierarchical"
    evidence = "predicted_future"
    decision_scope = "layer"

    class Params(PolicyParams):
        pass

    @property
    def decides_ahead(self) -> bool:
        return True

    def worth(self, step: int, pages: Array) -> Array:
        turn = step // self.params.cadence % 2
        xp = self.ctx.xp
        return xp.astype(pages % CHANGING != turn, xp.float32)

    def ahead(self, step: int, n: int) -> Array:
        xp = self.ctx.xp
        return self.worth_of_first(step, n) + xp.zeros(
            (self.ctx.n_groups, n), dtype=xp.float32, device=self.ctx.device
        )


class StepKind(NamedTuple):
    """A policy, and the numbers of sizes, of `Sizes.steps` and then `Sizes.decisions`, at which its
    steps are timed. What other sizes add to a step without a decision is taken from a kind that is
    `like` it.
    """

    spec: dict[str, Any]
    sizes: tuple[int, ...]
    like: str = ""


EVERY = (0, 1, 2, 3)
KINDS = {
    "kept": StepKind({"policy": "full"}, (0, 1, 3)),
    "held": StepKind({"policy": "recency"}, EVERY),
    "observed": StepKind({"policy": "h2o"}, (0,), "held"),
    "fetched": StepKind({"policy": "lru"}, EVERY),
    "fallback": StepKind({"policy": "lru", "on_miss": "fallback"}, (0,), "fetched"),
    "ahead": StepKind({"cadence": CADENCE, "on_miss": "mask"}, (*EVERY, 4, 5)),
    "decided": StepKind(
        {"policy": "lru", "on_miss": "mask", "cadence": CADENCE}, (0, 1, 2, 4, 5), "ahead"
    ),
}
LOADING = ("fetched", "fallback")
DECIDING = ("decided", "ahead")
KEYED = ("kept", *LOADING)  # all index keys stay


def _policy(kind: str, slots: int) -> Policy:
    spec = KINDS[kind].spec
    if kind == "kept":
        return registry.build(spec)
    if kind == "ahead":
        return Ahead(**spec, budget=f"{slots} entries")
    return registry.build(spec | {"budget": f"{slots} entries"})


class Seconds(NamedTuple):
    """Of a step's bookkeeping: a plain one, and what more one takes in which an entry closes, and
    one that begins with a decision.
    """

    plain: float
    closing: float
    decision: float


def all_kinds(
    geometry: Geometry, device: str, sizes: Sizes, report: Report
) -> dict[str, dict[str, Any]]:
    """`fmsim.hw.spec.Bookkeeping`'s fields, by kind."""
    found: dict[str, dict[str, Any]] = {}
    all_sizes = (*sizes.steps, *sizes.decisions)
    for name, kind in KINDS.items():
        asked = [all_sizes[number] for number in kind.sizes]
        if name in LOADING:
            asked += sizes.loading
        by_size = {
            size: _timed(name, geometry, device, sizes, size) for size in dict.fromkeys(asked)
        }
        timed = {number: by_size[all_sizes[number]] for number in kind.sizes}
        for size, seconds in by_size.items():
            plain, closing, decision = (1e3 * part for part in seconds)
            report(
                f"{name}, {size.entries:,} entries, {size.slots:,} slots, batch {size.batch}:"
                f" {plain:.3f} ms a step, {closing:+.3f} closing, {decision:+.3f} deciding"
            )
        found[name] = {}
        like = found[kind.like] if kind.like else {}
        for part in ("plain", "closing"):
            of_part = {number: getattr(seconds, part) for number, seconds in timed.items()}
            # of the block tables: where layers load their misses, one each
            rows = geometry.n_csa if name in LOADING else sizes.step_groups
            moves = geometry.n_csa * sizes.step_topk  # of a request: what a step selects
            found[name][part] = _work(of_part, rows, moves, sizes, like.get(part))
        if name in LOADING:
            slot_ns = found[name]["plain"]["slot_ns"]
            found[name]["loading_ms"] = _loading_ms(by_size, geometry.n_csa, sizes, slot_ns)
        if name in DECIDING:
            decisions = {number: seconds.decision for number, seconds in timed.items()}
            found[name]["decision"] = _decision(decisions, geometry.n_csa, sizes)
    return found


def _loading_ms(
    by_size: dict[StepSize, Seconds], n_csa: int, sizes: Sizes, slot_ns: float
) -> dict[int, dict[int, float]]:
    """A plain step at each of `Sizes.loading`, by requests and by pages in the block tables of one;
    without what slots take.
    """
    found: dict[int, dict[int, float]] = {batch: {} for batch in sizes.loading_batches}
    for size in sizes.loading:
        slots_ms = slot_ns * sizes.step_groups * size.slots / 1e6
        found[size.batch][n_csa * size.entries] = 1e3 * by_size[size].plain - slots_ms
    return found


def _decision(seconds: dict[int, float], n_csa: int, sizes: Sizes) -> dict[str, float]:
    """`fmsim.hw.spec.DecisionWork`'s fields, from times at the first three of `Sizes.steps` and at
    `Sizes.decisions`.

    A request's lists of moves are as long as its slots, in each of `n_csa` layers.
    """
    first, wide, deep, _ = sizes.steps
    groups, others = sizes.step_groups, sizes.decisions[0].batch - 1
    deeper = deep.slots - wide.slots
    of_others = seconds[4] - seconds[1]
    move = max(0.0, (seconds[5] - seconds[2] - of_others) / (n_csa * deeper * others))
    tables = of_others - move * n_csa * wide.slots * others
    table = max(0.0, tables / (groups * wide.entries * others))
    of_pages = (seconds[1] - seconds[0]) / (groups * (wide.entries - first.entries))
    page = max(0.0, of_pages - table)
    slot = max(0.0, (seconds[2] - seconds[1] - move * n_csa * deeper) / (groups * deeper))
    fixed = seconds[0] - slot * groups * first.slots - move * n_csa * first.slots
    fixed -= (page + table) * groups * first.entries
    return {
        "fixed_ms": 1e3 * fixed,
        "slot_ns": 1e9 * slot,
        "page_ns": 1e9 * page,
        "table_ns": 1e9 * table,
        "move_ns": 1e9 * move,
    }


def _work(
    seconds: dict[int, float],
    rows: int,
    moves: int,
    sizes: Sizes,
    like: dict[str, float] | None = None,
) -> dict[str, float]:
    """Times at some of `Sizes.steps` as a fixed part and what each size adds, with so many `rows`
    of block tables, and pages that a request may move; or what it adds `like` that.

    Each size differs from the first, or from the second, in one thing.
    """
    first, wide, deep, crowd = sizes.steps
    slot = page = move = 0.0
    if like is not None:
        slot, page, move = (like[f"{name}_ns"] / 1e9 for name in ("slot", "page", "move"))
    if 1 in seconds:
        page = max(0.0, (seconds[1] - seconds[0]) / (rows * (wide.entries - first.entries)))
    if 2 in seconds:
        more = seconds[2] - seconds.get(1, seconds[0])
        slot = max(0.0, more / (sizes.step_groups * (deep.slots - wide.slots)))
    if 3 in seconds:
        others = crowd.batch - 1
        more = seconds[3] - seconds[0] - page * rows * first.entries * others
        move = max(0.0, more / (moves * others))
    fixed = seconds[0] - slot * sizes.step_groups * first.slots
    fixed -= page * rows * first.entries + move * moves
    return {
        "fixed_ms": 1e3 * fixed,
        "slot_ns": 1e9 * slot,
        "page_ns": 1e9 * page,
        "move_ns": 1e9 * move,
    }


def _timed(kind: str, geometry: Geometry, device: str, sizes: Sizes, size: StepSize) -> Seconds:
    replayer = Replayer(made_accesses(sizes, size))
    policy = _policy(kind, size.slots)
    keyed = geometry.n_csa if kind in KEYED else 0
    groups = [layer * sizes.step_groups // geometry.n_csa for layer in range(geometry.n_csa)]
    with torch.inference_mode():
        decode = TraceDrivenDecode(
            replayer, policy, geometry, groups, keyed, device, batch=size.batch, watch=False
        )
        pause = _Pause(device, sizes.busy_s)
        outcome = decode.run(_Idle(decode, tuple(groups), pause))
    left_s = outcome.step_s - pause.seconds()
    number = np.arange(N_STEPS)
    after = number >= WARM_UP
    closes = (number + 1) % ENTRY_TOKENS == 0
    decides = number % CADENCE == 0
    plain = float(np.median(left_s[after & ~closes & ~decides]))
    del decode
    gc.collect()
    return Seconds(
        plain,
        float(np.median(left_s[after & closes])) - plain,
        float(np.median(left_s[after & decides])) - plain,
    )


class _Idle(SyntheticStep):
    """What `SyntheticStep` does around its graph, and a pause in that one's place. The pause waits
    for the bookkeeping, all of which so takes its own time.
    """

    def __init__(
        self, decode: TraceDrivenDecode, layer_map: tuple[int, ...], pause: Callable[[], None]
    ) -> None:
        self.decode = decode
        self.layer_map = layer_map
        self.first_token = decode.replayer.header.prompt_tokens
        self._selected = torch.from_numpy(decode.replayer.ids.copy()).to(decode.device)
        layers, width = self._selected.shape[1:]
        self.given = torch.full(
            (layers, decode.batch, width), -1, dtype=torch.int32, device=decode.device
        )
        self._positions = torch.zeros(decode.batch, dtype=torch.int32, device=decode.device)
        self._indexer = ()  # scores nothing: what a memory indexer takes is priced apart
        self._pause = pause

    def _forward(self) -> None:
        self.decode.wait_until_shown()
        self._pause()


class _Pause:
    """Keeps a GPU busy, and tells afterwards for how long each time; on a CPU it does nothing."""

    def __init__(self, device: str, seconds: float) -> None:
        self.on_gpu = device == "cuda"
        self.cycles = int(CYCLES_PER_S * seconds)
        self._marks: list[tuple[Any, Any]] = []

    def __call__(self) -> None:
        start = self._mark()
        if self.on_gpu:
            torch.cuda._sleep(self.cycles)
        self._marks.append((start, self._mark()))

    def seconds(self) -> np.ndarray:
        if not self.on_gpu:
            return np.array([end - start for start, end in self._marks])
        torch.cuda.synchronize()
        return np.array([start.elapsed_time(end) / 1e3 for start, end in self._marks])

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def made_accesses(sizes: Sizes, size: StepSize) -> Any:
    """A trace of random selections among the newest half of what the slots hold, so that hardly
    anything is missed. What bookkeeping takes does not depend on what is selected.
    """
    rng = np.random.default_rng(0)
    shape = (N_STEPS, sizes.step_groups, sizes.step_topk)
    reach = min(size.slots // 2, size.entries)
    ids = np.stack(
        [
            np.sort(rng.choice(reach, sizes.step_topk, replace=False))
            for _ in range(shape[0] * shape[1])
        ]
    ).reshape(shape)
    prompt_tokens = ENTRY_TOKENS * size.entries
    return SimpleNamespace(
        entry_ids=(size.entries - 1 - ids[..., ::-1]).astype(np.int32),
        mass=np.full(shape, 1 / sizes.step_topk, dtype=np.float32),
        header=SimpleNamespace(
            prompt_tokens=prompt_tokens, entry_tokens=ENTRY_TOKENS, tau=CADENCE, seed=0
        ),
        prompt_mass=None,
        hidden=None,
        index_keys=None,
        n_layers=sizes.step_groups,
        keyed=[],
        holds_labels=False,
        csa_numbers=list(range(sizes.step_groups)),
        n_entries=lambda step: (prompt_tokens + step + 1) // ENTRY_TOKENS,
    )
