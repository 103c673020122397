"""One request of a decode under a policy: the replay's own keeper and tally, and what its ledger and its trace are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import array_api_compat.torch as xp
import torch
from torch import Tensor

from fmsim.accesses import page_mass, page_step
from fmsim.errors import FmsimError
from fmsim.exec.hindsight import Hindsight
from fmsim.exec.model import CSA
from fmsim.exec.prompt import Prompt
from fmsim.keeper import Keeper
from fmsim.ledger import Ledger
from fmsim.policies.base import Context, LookaheadState, Policy
from fmsim.residency import Moves
from fmsim.tally import Tally

Select = Literal["resident", "all"]


class Request:
    """`prompt`, and the steps decoded after it under `policy`.

    Per step, CSA layer and place of the selection among all entries, torch on the device: `wanted` int32 [T, L, K] ids (-1 = none), `mass`
    float32, `hit` and `attended` bool; `near_mass` float32 [T, L, 2] on window and sink. `hidden` float32 [L, H] by window. `keys_of(n)`
    gives the index keys of the first n entries, float32 [L, n, D]. ``hindsight``, a decode of the same prompt that is over, is what a policy
    that looks into the future is told. Raises FmsimError for a policy that an engine cannot run, such as that one without it.
    """

    def __init__(
        self, prompt: Prompt, policy: Policy, *, entry_bytes: int, keys_of: Callable[[int], Tensor], select: Select, tau: int, seed: int,
        hindsight: Request | None = None,
    ):  # fmt: skip
        self.hindsight = hindsight
        if policy.evidence == "future" and hindsight is None:
            raise FmsimError(f"policy {policy.name}: looks into the future, which a running model does not have; replay it with `fmsim run`")
        config, self.device = prompt.model.config, prompt.model.lm_head.weight.device
        self.prompt, self.policy, self.keys_of, self.select, self.tau = prompt, policy, keys_of, select, tau
        self.rate, self.topk, self.layers = config.compress_rates[CSA], config.index_topk, config.layer_types.count(CSA)
        self.n_entries = (len(prompt.tokens) + prompt.max_steps) // self.rate  # at the end
        self.shared = policy.params.scope == "shared"
        self.hidden = {0: torch.from_numpy(prompt.hidden).to(self.device)}
        self.keeper = Keeper(policy, self._context(entry_bytes, seed))
        self.keeper.start()
        self.residency, self.tally = self.keeper.residency, Tally(self.keeper, prompt.max_steps)
        self.tokens: list[int] = []
        shape = (prompt.max_steps, self.layers, self.topk)
        self.wanted = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        self.mass = torch.zeros(shape, device=self.device)
        self.hit, self.attended = (torch.zeros(shape, dtype=torch.bool, device=self.device) for _ in range(2))
        self.near_mass = torch.zeros(*shape[:2], 2, device=self.device)
        self._ids = torch.full(shape[1:], -1, dtype=torch.int64, device=self.device)  # attended to in this step
        self._seen_mass = torch.zeros(shape[1:], device=self.device)

    @property
    def step(self) -> int:
        """The decode step that is under way, or that comes next."""
        return len(self.tokens)

    @property
    def among_resident(self) -> bool:
        """The indexer selects among resident entries alone."""
        return self.policy.params.on_miss == "mask" and self.select == "resident"

    def group(self, layer: int) -> int:
        return 0 if self.shared else layer

    def begin(self) -> Moves | None:
        """A step begins; what its decision recalls, if there is one."""
        return self.tally.begin(self.step, (len(self.prompt.tokens) + self.step + 1) // self.rate)[1]

    def here(self, layer: int, ids: Tensor) -> Tensor:
        """bool, whether entries lie in a slot."""
        table = self.residency.table[self.group(layer)]
        return table[torch.where(ids < 0, -1, ids // self.keeper.ctx.granularity)] >= 0

    def book_selection(self, layer: int, wanted: Tensor, hit: Tensor, attended: Tensor, ids: Tensor) -> None:
        """All [K]: the selection among all entries, what of it is resident and is attended to, and what is attended to in all."""
        at = (self.step, layer)
        self.wanted[at], self.hit[at], self.attended[at], self._ids[layer] = wanted.int(), hit, attended, ids

    def book_masses(self, layer: int, attended: Tensor, wanted: tuple[Tensor, ...], hidden: Tensor) -> None:
        """Mass [K] of what was attended to, and (entries [K], window, sink) of the selection among all; hidden [H]."""
        at = (self.step, layer)
        self.mass[at] = rounded(wanted[0])
        self.near_mass[at] = torch.stack(wanted[1:])
        self._seen_mass[layer] = self.mass[at] if self.select == "all" else rounded(attended)
        if (self.step + 1) % self.tau == 0:
            state = self.hidden.setdefault((self.step + 1) // self.tau, torch.empty_like(self.hidden[0]))
            state[layer] = hidden

    def settle(self, token: int) -> Moves | None:
        """All layers have attended: the policy sees it, and what was fetched gets its slots."""
        ctx, step = self.keeper.ctx, self.step
        seen = self._ids if self.among_resident else self.wanted[step].long()
        use = page_step(seen, self._seen_mass, ctx.granularity, self.shared)
        used = ctx.table(0, "bool")
        ctx.put(used, page_step(self._ids, self._seen_mass, ctx.granularity, self.shared).pages, True)
        fetched = ctx.read(used, use.pages) & (use.pages >= 0) & (self.residency.lookup(use.pages) < 0)
        moves = self.tally.settle(step, use, fetched).moves
        self.tokens.append(token)
        return moves

    def ledger(self) -> Ledger:
        """What moved and what was kept in the steps so far; measured."""
        return self.tally.ledger(*(part[: self.step].cpu().numpy() for part in (self.wanted, self.mass, self.hit, self.attended)))

    def _context(self, entry_bytes: int, seed: int) -> Context:
        prompt, params = self.prompt, self.policy.params
        entries = len(prompt.tokens) // self.rate
        n_pages = -(-self.n_entries // params.granularity)
        sizes = {"prompt_entries": entries, "topk": self.topk, "entry_bytes": entry_bytes, "model_layers": self.layers}
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
            future=Hindsight(self.hindsight, params.granularity, self.shared, n_pages) if self.policy.evidence == "future" else None,
            xp=xp,
            device=self.device,
        )

    def _lookahead(self, window: int) -> LookaheadState:
        """The state at the last token before decode window `window`."""
        position = len(self.prompt.tokens) + self.tau * window - 1
        n_entries = (position + 1) // self.rate
        return LookaheadState(self.hidden[window], position, self.keys_of(n_entries), n_entries)


def rounded(mass: Tensor) -> Tensor:
    """float32 as a trace keeps it: in float16. So a replay of this decode's trace sees the same."""
    return mass.half().float()
