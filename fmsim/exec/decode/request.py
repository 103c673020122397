"""One request of a decode under a policy: the replay's own keeper and tally, and what its ledger
and its trace are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import array_api_compat.torch as xp
import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.decode.hindsight import Hindsight
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.selections import Selections
from fmsim.exec.model.deepseek_v4 import CSA
from fmsim.policies.base import Context, LookaheadState, Policy
from fmsim.replay.cache_manager import Accesses, Keeper
from fmsim.replay.ledger import Ledger
from fmsim.replay.paging import page_mass, page_step
from fmsim.replay.residency import Moves
from fmsim.replay.tally import Tally

Select = Literal["resident", "all"]


class Request:
    """`prompt`, and the steps decoded after it under `policy`, as request number `index` of a
    batch.

    `step` counts them; `selections` is what the batch's layers select. `hidden` float32 [L, H] by
    window. `keys_of(n)` gives the index keys of the first n entries, float32 [L, n, D]. Of the
    layers ``unmeasured`` it is not known what they would have selected among all entries.
    ``hindsight``, a decode of the same prompt that is over, is what a policy that looks into the
    future is told. Raises FmsimError for a policy that an engine cannot run, such as that one
    without it.
    """

    def __init__(
        self,
        prompt: Prompt,
        policy: Policy,
        *,
        index: int,
        selections: Selections,
        entry_bytes: int,
        keys_of: Callable[[int], Tensor],
        select: Select,
        tau: int,
        seed: int,
        hindsight: Request | None = None,
        unmeasured: Sequence[int] = (),
    ):
        self.hindsight, self.unmeasured = hindsight, list(unmeasured)
        if policy.evidence == "future" and hindsight is None:
            raise FmsimError(
                f"policy {policy.name}: looks into the future, which a running model does not have;"
                " replay it with `fmsim run`"
            )
        config, self.device = prompt.model.config, prompt.model.lm_head.weight.device
        self.prompt, self.policy, self.index, self.selections = prompt, policy, index, selections
        self.keys_of, self.select, self.tau = keys_of, select, tau
        self.rate, self.topk, self.layers = (
            config.compress_rates[CSA],
            config.index_topk,
            config.layer_types.count(CSA),
        )
        self.n_entries = (len(prompt.tokens) + prompt.max_steps) // self.rate  # at the end
        self.shared = policy.params.scope == "shared"
        self.hidden = {0: torch.from_numpy(prompt.hidden).to(self.device)}
        self.keeper = Keeper(policy, self._context(entry_bytes, seed))
        self.keeper.start()
        self.residency, self.tally = self.keeper.residency, Tally(self.keeper, prompt.max_steps)
        self.step = 0  # the decode step that is under way, or that comes next

    @property
    def among_resident(self) -> bool:
        """The indexer selects among resident entries alone."""
        return self.policy.params.on_miss == "mask" and self.select == "resident"

    @property
    def tokens(self) -> list[int]:
        """Processed since the prompt."""
        return self.selections.tokens[: self.step, self.index].tolist()

    @property
    def wanted(self) -> Tensor:
        """Of the steps so far, the selection among all entries: int32 [t, L, K], -1 = none."""
        return self._logged("wanted")

    @property
    def mass(self) -> Tensor:
        """Its attention mass, float32 [t, L, K]."""
        return self._logged("mass")

    @property
    def near_mass(self) -> Tensor:
        """Of the steps so far, mass on the window and on the sink: float32 [t, L, 2]."""
        return self._logged("near_mass")

    def group(self, layer: int) -> int:
        return 0 if self.shared else layer

    def begin(self) -> Moves | None:
        """A step begins; what its decision recalls, if there is one."""
        return self.tally.begin(self.step, (len(self.prompt.tokens) + self.step + 1) // self.rate)[
            1
        ]

    def foresee(self, most: int) -> Tensor | None:
        """At a decision: up to `most` pages that the next one will recall, int64 [G, most]; None at
        other steps, or where nothing can be foreseen.
        """
        cadence = self.policy.params.cadence
        if not most or self.step % cadence:
            return None
        then = self.step + cadence
        return self.keeper.foresee(then, (len(self.prompt.tokens) + then + 1) // self.rate, most)

    def settle(self) -> Moves | None:
        """All layers have attended: the policy sees it, and what was fetched gets its slots."""
        step, self.step = self.step, self.step + 1
        if (step + 1) % self.tau == 0:
            self.hidden[(step + 1) // self.tau] = self.selections.hidden[:, self.index].clone()
        if self.keeper.passive:
            return self.tally.rest(step)
        ctx, picked = self.keeper.ctx, self.selections
        ids, mass = picked.ids[:, self.index].long(), picked.seen_mass[:, self.index]
        seen = ids if self.among_resident else picked.wanted[:, self.index].long()
        use = page_step(seen, mass, ctx.granularity, self.shared)
        used = ctx.table(0, "bool")
        ctx.put(used, page_step(ids, mass, ctx.granularity, self.shared).pages, True)
        return self.tally.settle(step, use, self._fetched(use, used)).moves

    def ledger(self) -> Ledger:
        """What moved and what was kept in the steps so far; measured."""
        return self.tally.ledger(
            *(self._logged(name).cpu().numpy() for name in ("wanted", "mass", "hit", "attended")),
            unmeasured=self.unmeasured,
        )

    def _fetched(self, use: Accesses, used: Tensor) -> Tensor:
        """What was attended to without being resident was loaded for this step."""
        return (
            self.keeper.ctx.read(used, use.pages)
            & (use.pages >= 0)
            & (self.residency.lookup(use.pages) < 0)
        )

    def _logged(self, name: str) -> Tensor:
        return self.selections.log[name][: self.step, :, self.index]

    def _context(self, entry_bytes: int, seed: int) -> Context:
        prompt, params = self.prompt, self.policy.params
        entries = len(prompt.tokens) // self.rate
        n_pages = -(-self.n_entries // params.granularity)
        sizes = {
            "prompt_entries": entries,
            "topk": self.topk,
            "entry_bytes": entry_bytes,
            "model_layers": self.layers,
        }
        mass = page_mass(prompt.mass, params.granularity, n_pages, self.shared)
        return Context(
            n_layers=self.layers,
            n_groups=1 if self.shared else self.layers,
            n_pages=n_pages,
            n_slots=self.policy.n_slots(n_pages, **sizes),
            granularity=params.granularity,
            prompt_entries=entries,
            topk=self.topk,
            n_steps=prompt.max_steps,
            tau=self.tau,
            entry_tokens=self.rate,
            seed=seed,
            prompt_mass=torch.from_numpy(mass).to(self.device),
            lookahead=self._lookahead,
            future=(
                Hindsight(self.hindsight, params.granularity, self.shared, n_pages)
                if self.policy.evidence == "future"
                else None
            ),
            xp=xp,
            device=self.device,
        )

    def _lookahead(self, window: int) -> LookaheadState:
        """The state at the last token before decode window `window`."""
        position = len(self.prompt.tokens) + self.tau * window - 1
        n_entries = (position + 1) // self.rate
        return LookaheadState(self.hidden[window], position, self.keys_of(n_entries), n_entries)
