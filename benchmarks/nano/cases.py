"""Streams of contexts on a device, as a memory indexer and a policy see them, window by window.

Axes: W windows, L CSA layers, E entries at the stream's end, B budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmsim.indexer.scorer import ScorerConfig, rotation
from fmsim.trace import ENTRY_TOKENS, TAU

HEAD_SHARE = 0.6  # of a step's attention, which golden entries carry
HEAVY = 0.05  # of a step's attention: what an answer hangs on
HIDDEN = -1e30  # the worth of what is not there yet


class Case:
    """One stream of a context (`contexts.py`)."""

    def __init__(self, context: dict[str, Any], stream: dict[str, Any], device: str):
        self.length, self.kind = int(context["length"]), str(stream["kind"])
        self.prompt_keys, self.later_keys = context["keys"], stream["keys"].to(device)
        self.prompt_mass = context["prompt_mass"]
        self.ids, self.mass = stream["ids"].to(device), stream["mass"].to(device)
        self.hidden = stream["hidden"].to(device).float()
        self.device, self.layers = device, self.ids.shape[1]
        self.windows = len(self.ids) // TAU
        self.prompt_entries = self.prompt_keys.shape[1]
        self.entries = self.prompt_entries + self.later_keys.shape[1]
        self.window_mass = torch.stack([self._mass(w) for w in range(self.windows)]).half()
        self.heavy_mass = torch.stack([self._mass(w, HEAVY) for w in range(self.windows)]).half()
        self.golden = torch.stack([self._golden(w) for w in range(self.windows)])

    def visible(self, age: int = 0) -> Tensor:
        """int64 [W]: entries that the state ``age`` windows before each window sees."""
        states = (torch.arange(self.windows, device=self.device) - age).clamp(min=0)
        return (self.length + TAU * states) // ENTRY_TOKENS

    def seen(self, age: int = 0) -> Tensor:
        """bool [W, E]."""
        return torch.arange(self.entries, device=self.device) < self.visible(age)[:, None]

    def states(self, age: int = 0) -> Tensor:
        """[W, L, H]."""
        return self.hidden[(torch.arange(self.windows) - age).clamp(min=0)]

    def turns(self, config: ScorerConfig, age: int = 0) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the states' positions, [W, rope_dims / 2]."""
        states = np.maximum(np.arange(self.windows) - age, 0)
        cos, sin = rotation(config, self.length + TAU * states - 1)
        return torch.from_numpy(cos).to(self.device), torch.from_numpy(sin).to(self.device)

    def keys(self, layers: Sequence[int]) -> Tensor:
        """float32 [len(layers), E, D]."""
        rows = list(layers)
        return torch.cat((self.prompt_keys[rows], self.later_keys[rows]), 1).float()

    def _mass(self, window: int, least: float = 0.0) -> Tensor:
        """float32 [L, E]: the window's attention, where a step's is ``least`` or more."""
        ids, mass = self._steps(window)
        mass = torch.where(mass >= least, mass, 0.0)
        found = torch.zeros(self.layers, self.entries, device=self.device)
        layer = torch.arange(self.layers, device=self.device)[:, None] * self.entries
        found.view(-1).index_add_(0, (layer + ids).reshape(-1), mass.reshape(-1))
        return found

    def _golden(self, window: int) -> Tensor:
        """bool [E]: golden in a step of some layer."""
        ids, mass = self._steps(window)
        mass, order = mass.sort(-1, descending=True)
        head = (mass.cumsum(-1) - mass < HEAD_SHARE * mass.sum(-1, keepdim=True)) & (mass > 0)
        found = torch.zeros(self.entries, dtype=torch.bool, device=self.device)
        found[ids.gather(-1, order)[head]] = True
        return found

    def _steps(self, window: int) -> tuple[Tensor, Tensor]:
        """ids int64 and mass float32 [steps, L, K] of a window; padding is entry 0 with no mass."""
        steps = slice(window * TAU, (window + 1) * TAU)
        ids, mass = self.ids[steps].long(), self.mass[steps].float()
        return ids.clamp(min=0), torch.where(ids >= 0, mass, 0.0)


def load(folder: Path, split: str, device: str) -> list[list[Case]]:
    """The streams of each context, those of the first seeds first."""
    paths = sorted(folder.glob(f"{split}-*.pt"), key=lambda path: int(path.stem.split("-")[2]))
    found = []
    for path in paths:
        context = torch.load(path, weights_only=True)
        for name in ("keys", "prompt_mass"):
            context[name] = context[name].to(device)
        found.append([Case(context, stream, device) for stream in context["streams"]])
    return found


def lengths(contexts: Sequence[Sequence[Case]]) -> dict[str, int]:
    """How many contexts there are of each length."""
    found = [streams[0].length for streams in contexts]
    return {str(length): found.count(length) for length in sorted(set(found))}


def best(worth: Tensor, visible: int, slots: Tensor) -> Tensor:
    """bool like worth [B, L, E]: the best slots[b] of the first ``visible``, and all later ones; of
    equals the newer.
    """
    kept = torch.ones_like(worth, dtype=torch.bool)
    order = worth[..., :visible].flip(-1).argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(visible, device=worth.device).expand_as(order))
    kept[..., :visible] = (place < slots[:, None, None]).flip(-1)
    return kept


Decide = Callable[[int, dict[str, Tensor]], Tensor]


class Kept(NamedTuple):
    """Of a closed loop, summed over layers: [B, W] of the attention, and of the part that lay on
    heavy entries, what was kept; [W] what there was.
    """

    mass: Tensor
    heavy: Tensor
    whole: Tensor
    whole_heavy: Tensor


@torch.no_grad()
def closed_loop(
    case: Case, decide: Decide, slots: Sequence[int], fade: float, tables: list | None = None
) -> Kept:
    """A policy that decides at each window and sees the attention of what it holds alone.

    ``decide(window, seen)`` gives the worth [B, L, E] from what it saw: ``own``, each layer's
    attention so far, of which ``fade`` is left from one window to the next, ``held``, whether a
    page was held in the window before. The first entry and the four newest stay. ``tables``
    collects what was seen at each window, of the first budget.
    """
    shape = (len(slots), case.layers, case.entries)
    budgets = torch.tensor(slots, device=case.device)
    own = torch.zeros(shape, device=case.device)
    held = torch.ones(shape, dtype=torch.bool, device=case.device)
    kept: list[list[Tensor]] = [[], []]
    for window, visible in enumerate(case.visible().tolist()):
        seen = {"own": own, "held": held}
        if tables is not None:
            tables.append({name: table[0].half() for name, table in seen.items()})
        worth = decide(window, seen).clone()
        worth[..., 0] = worth[..., visible - 4 : visible] = -HIDDEN
        held = best(worth, visible, budgets.clamp(max=visible))
        mass = case.window_mass[window].float()
        for part, found in zip((mass, case.heavy_mass[window].float()), kept, strict=True):
            found.append((held * part).sum((1, 2)))
        own = own * fade + held * mass
    whole = (part.float().sum((1, 2)) for part in (case.window_mass, case.heavy_mass))
    return Kept(*(torch.stack(found, 1) for found in kept), *whole)


def lru(case: Case, slots: Sequence[int]) -> Kept:
    """`lru` that is held for a window and begins with the prompt's attention."""
    last = torch.zeros(case.windows, case.layers, case.entries, device=case.device)
    steps = torch.arange(1, len(case.ids) + 1, device=case.device)[:, None, None]
    layer = torch.arange(case.layers, device=case.device)[:, None] * case.entries
    for window in range(case.windows):
        part = slice(window * TAU, (window + 1) * TAU)
        used = torch.where(case.ids[part] >= 0, steps[part], 0).float()
        where = (layer + case.ids[part].clamp(min=0)).long().reshape(-1)
        last[window].view(-1).scatter_reduce_(0, where, used.reshape(-1), "amax")
    born = torch.arange(case.entries, device=case.device) - case.prompt_entries
    used = torch.zeros(len(slots), case.layers, case.entries, device=case.device)
    used[..., : case.prompt_entries] = 1e-6 * case.prompt_mass.float()
    used[..., case.prompt_entries :] = (born[born >= 0] * ENTRY_TOKENS).float()

    def decide(window: int, seen: dict[str, Tensor]) -> Tensor:
        if window:
            used.copy_(torch.maximum(used, seen["held"] * last[window - 1]))
        return used

    return closed_loop(case, decide, slots, 0.0)


def oracle(case: Case, slots: Sequence[int]) -> Kept:
    """The window's own heaviest entries, in each layer."""
    return closed_loop(
        case, lambda window, seen: case.window_mass[window].float()[None] + 0 * seen["own"],
        slots, 0.0,
    )  # fmt: skip


def shares(found: Sequence[Kept]) -> list[list[float]]:
    """By budget: the share of the attention kept over windows from the second on, and that of the
    heavy entries' over all windows.
    """
    mass = sum(kept.mass[:, 1:].sum(1) for kept in found)
    heavy = sum(kept.heavy.sum(1) for kept in found)
    mass, heavy = (
        mass / sum(kept.whole[1:].sum() for kept in found),
        heavy / sum(kept.whole_heavy.sum() for kept in found),
    )
    return [mass.tolist(), heavy.tolist()]


def by_kind(cases: Sequence[Case], run: Callable[[Case], Kept]) -> dict[str, list[list[float]]]:
    """`shares` of each length and kind, and their mean."""
    groups: dict[str, list[Kept]] = {}
    for case in cases:
        groups.setdefault(f"{case.length}-{case.kind}", []).append(run(case))
    rows = {name: shares(found) for name, found in groups.items()}
    rows["mean"] = np.mean(list(rows.values()), axis=0).tolist()
    return {name: [[round(x, 4) for x in part] for part in row] for name, row in rows.items()}
