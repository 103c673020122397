"""One request of a decode under a policy: its cache manager, and what its ledger and its trace are
made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.selections import Selections
from fmsim.exec.model.kinds import CSA
from fmsim.policies.base import Context, LookaheadState, Policy
from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.context import RequestShape, build_context
from fmsim.replay.ledger import Ledger
from fmsim.replay.ledger_builder import LedgerBuilder
from fmsim.replay.needs import GpuMemory
from fmsim.replay.paging import Paged, page_trace
from fmsim.replay.residency import Residency

Select = Literal["resident", "all"]


class Request:
    """`prompt`, and the steps decoded after it under `policy`, as request number `index` of a
    batch.

    `step` counts them; `manager` and `book` are the request's own, or show its part of what is kept
    for many (`fmsim.exec.decode.keeper`). `selections` is what the batch's layers select. `hidden`
    float32 [L, H] by the step that it comes before. `keys_of(n)` gives the index keys of the first
    n entries, float32 [L, n, D]. Of the layers ``unmeasured`` it is not known what they would have
    selected among all entries. `memory` says what a budget in bytes buys. The policy's arrays,
    `selections` and keys lie on ``device``, the model's unless given. ``hindsight``, a decode of
    the same prompt that is over, is what a policy that looks into the future is told; ``known``
    holds what is worked out of the prompt's last state, for requests that share it. Raises
    FmsimError for a policy that an engine cannot run, such as that one without it.
    """

    def __init__(
        self,
        prompt: Prompt,
        policy: Policy,
        *,
        index: int,
        selections: Selections,
        memory: GpuMemory,
        keys_of: Callable[[int], Tensor],
        select: Select,
        tau: int,
        seed: int,
        hindsight: Request | None = None,
        unmeasured: Sequence[int] = (),
        device: torch.device | None = None,
        known: dict[Any, Any] | None = None,
    ):
        if policy.evidence == "future" and hindsight is None:
            raise FmsimError(
                f"policy {policy.name}: looks into the future, which a running model does not have;"
                " replay it with `fmsim run`"
            )
        config = prompt.model.config
        self.device = device or prompt.model.lm_head.weight.device
        self.prompt = prompt
        self.policy = policy
        self.index = index
        self.selections = selections
        self.keys_of = keys_of
        self.select = select
        self.tau = tau
        self.unmeasured = list(unmeasured)
        self.rate = config.compress_rates[CSA]
        self.topk = config.index_topk
        self.layers = config.layer_types.count(CSA)
        self.shared = policy.params.scope == "shared"
        self.hidden = {0: torch.from_numpy(prompt.hidden).to(self.device)}
        self.known = {} if known is None else known
        self.state_steps = policy.state_steps or tau
        self.manager = CacheManager(policy, self._context(memory, seed, hindsight))
        self.book = LedgerBuilder(self.manager, prompt.max_steps)

    @property
    def step(self) -> int:
        """The decode step that is under way, or that comes next; the last one's number plus one
        where the prompt has room for no more.
        """
        return min(self.selections.step, self.prompt.max_steps)

    @property
    def residency(self) -> Residency:
        return self.manager.residency

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
        """The residency's group that a CSA layer follows."""
        return 0 if self.shared else layer

    def n_entries(self, step: int) -> int:
        """Entries that are visible in a step."""
        return (len(self.prompt.tokens) + step + 1) // self.rate

    def keep_state(self) -> None:
        """The state before the step to come, if it is one of those that are kept: of every tau for
        the trace, and the policy's own last two.
        """
        step = self.step
        if step % self.tau and step % self.state_steps:
            return
        self.hidden[step] = self.selections.hidden[:, self.index].clone()
        past = step - 2 * self.state_steps
        if past % self.tau:
            self.hidden.pop(past, None)

    def lookahead(self, window: int) -> LookaheadState:
        """The state at the last token before decode window `window`."""
        return self.state_before(self.tau * window)

    def newest_state(self, step: int) -> LookaheadState:
        """The newest state that is kept from before decode step `step`."""
        return self.state_before(max(kept for kept in self.hidden if kept <= step))

    def state_before(self, step: int) -> LookaheadState:
        """The state at the last token before decode step `step`, which is kept."""
        position = len(self.prompt.tokens) + step - 1
        n_entries = (position + 1) // self.rate
        keys = self.keys_of(n_entries)
        known = {} if step else self.known
        return LookaheadState(self.hidden[step], position, keys, n_entries, known=known)

    def ledger(self) -> Ledger:
        """What moved and what was kept in the steps so far; measured."""
        return self.book.ledger(
            *(self._logged(name).cpu().numpy() for name in ("wanted", "mass", "hit", "attended")),
            masses=True,
            unmeasured=self.unmeasured,
            all_keys=not self.unmeasured,
        )

    def _logged(self, name: str) -> Tensor:
        return self.selections.log[name][: self.step, :, self.index]

    def _context(self, memory: GpuMemory, seed: int, hindsight: Request | None) -> Context:
        tokens = len(self.prompt.tokens)
        shape = RequestShape(
            n_layers=self.layers,
            prompt_entries=tokens // self.rate,
            n_entries=(tokens + self.prompt.max_steps) // self.rate,
            topk=self.topk,
            n_steps=self.prompt.max_steps,
            entry_tokens=self.rate,
            tau=self.tau,
            memory=memory,
            seed=seed,
        )
        future = None
        if hindsight is not None and self.policy.evidence == "future":
            future = self._seen_by(hindsight, shape)
        return build_context(
            self.policy,
            shape,
            prompt_mass=self.prompt.mass,
            lookahead=self.lookahead,
            newest_state=self.newest_state,
            future=future,
            xp=xp,
            device=self.device,
        )

    def _seen_by(self, decoded: Request, shape: RequestShape) -> Paged:
        """What another decode of the prompt selected, by pages. Its text may differ from what is to
        be decoded.
        """
        granularity = self.policy.params.granularity
        ids, mass = (
            np.ascontiguousarray(part.cpu().numpy()) for part in (decoded.wanted, decoded.mass)
        )
        return page_trace(ids, mass, granularity, self.shared, shape.n_pages(granularity))
