"""Many requests after one context, decoded side by side, each under a policy of its own.

`fmsim.exec.decode.engine.Batch` gives every request a cache of its own, and all of them one policy.
Here the context's entries and index keys lie on the device once, and a request has a table of what
is resident for it. So one product scores all entries for all requests, and one step decodes what
would else be dozens of batches. The cache managers run beside it, on the CPU. The order of a step
is `fmsim.replay.decode_loop`'s; tests hold tokens and ledgers to those of `Batch`.

Nothing is moved: whatever is not resident is only left out. So it tells no time.

Axes: B requests, L CSA layers, E entries, K selected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.decode.keeper import Keeper
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.request import Request
from fmsim.exec.decode.selections import Selections, rounded
from fmsim.exec.decode.step_state import step_layers
from fmsim.exec.kernels.selection.top_k import top_k as best
from fmsim.exec.model.cache import Access, StepCompressor, StepLayer
from fmsim.exec.model.kinds import CSA
from fmsim.policies.base import Policy
from fmsim.replay.cache_manager import Served, heaviest_missing
from fmsim.replay.decode_loop import DecodeLoop, NoTiers
from fmsim.replay.needs import GpuMemory
from fmsim.replay.paging import page_step
from fmsim.replay.residency import Moves
from fmsim.trace.format import TAU

CPU = torch.device("cpu")
# of `Selections`: what a `_Pager` calls it
BOOKED = {name: name for name in ("wanted", "ids", "hit", "mass", "seen_mass", "near_mass")} | {
    "hidden": "hidden",
    "attended": "attended_to",
}


@dataclass(frozen=True)
class Asked:
    """A prompt that goes on with `context`, the policy to decode it under, and for a policy that
    looks into the future a decode of the same prompt that is over.
    """

    prompt: Prompt
    policy: Policy
    hindsight: Request | None = None


class AfterOne:
    """`asked`, decoded after `context`; `decode` runs them to their ends.

    `memory` says what a budget in bytes buys. `refused` has, by place in `asked`, the error of each
    request that cannot be: its budget is too small. `requests` are the others by their place.
    """

    def __init__(
        self,
        context: Prompt,
        asked: Sequence[Asked],
        memory: GpuMemory,
        *,
        tau: int = TAU,
        seed: int = 0,
    ):
        self.context = context
        self.model = context.model
        self.rate = context.rate
        prompts = {id(one.prompt): one.prompt for one in asked}
        keys = _ContextKeys(context, prompts)
        known: dict[int, dict[Any, Any]] = {name: {} for name in prompts}
        self.refused: dict[int, FmsimError] = {}
        # the longest answers first: those that are over leave from the end
        order = sorted(range(len(asked)), key=lambda place: -asked[place].prompt.max_steps)
        config = self.model.config
        longest = max((one.prompt.max_steps for one in asked), default=0)
        layers = config.layer_types.count(CSA)
        sizes = (config.index_topk, config.hidden_size)
        found: list[tuple[int, Request]] = []
        self.selections = Selections(longest, layers, len(asked), *sizes, CPU)
        for place in order:
            one = asked[place]
            try:
                request = Request(
                    one.prompt,
                    type(one.policy)(one.policy.params),
                    index=len(found),
                    selections=self.selections,
                    memory=memory,
                    keys_of=partial(keys.first, id(one.prompt), len(found)),
                    select="resident",
                    tau=tau,
                    seed=seed,
                    hindsight=one.hindsight,
                    device=CPU,
                    known=known[id(one.prompt)],
                )
            except FmsimError as error:
                self.refused[place] = error
            else:
                found.append((place, request))
        self.requests = dict(found)
        self._rows = [request for _, request in found]
        self._keys = keys

    @torch.inference_mode()
    def decode(self) -> None:
        """Greedy tokens of every request, as many as its prompt has room for."""
        if not self._rows:
            return
        source = _Source(self.context, self._rows, self.selections)
        self._keys.pagers = source.pagers
        loop = DecodeLoop([request.book for request in self._rows], source, source.table)
        while loop.books:
            loop.advance()
            left = sum(request.prompt.max_steps > loop.step for request in self._rows)
            del loop.books[left:]
            source.keep_first(left)


class _ContextKeys:
    """Index keys as policies see them, float32 on the CPU: the context's once, and each prompt's
    own; `pagers`, once there are any, have those of what a row decoded too.
    """

    def __init__(self, context: Prompt, prompts: dict[int, Prompt]):
        self.shared = [_keys(cache, 0) for cache in context.csa_caches]
        entries = len(self.shared[0])
        self.own = {
            name: [_keys(cache, entries) for cache in prompt.csa_caches]
            for name, prompt in prompts.items()
        }
        self.pagers: Sequence[_Pager] = ()

    def first(self, prompt: int, row: int, n_entries: int) -> _KeysByLayer:
        """Of the first `n_entries` of a row, which goes on with a prompt; of layer l by [l]."""
        own = self.own[prompt]
        n_own = n_entries - len(self.shared[0])
        if n_own > len(own[0]):
            own = [pager.own_keys[row, :n_own].cpu() for pager in self.pagers]
        return _KeysByLayer(self.shared, own, n_entries)


class _KeysByLayer:
    """`LookaheadState.keys`: `[layer]` float32 [n, D]; `shape` (L, n, D)."""

    def __init__(self, shared: list[Tensor], own: list[Tensor], n_entries: int):
        self.shared = shared
        self.own = own
        self.shape = (len(shared), n_entries, shared[0].shape[1])

    def __getitem__(self, layer: int) -> Tensor:
        return torch.cat((self.shared[layer], self.own[layer]))[: self.shape[1]]


def _keys(cache: Any, first: int) -> Tensor:
    return cache.index.entries[0, first : cache.index.closed].float().cpu()


class _Source:
    """`fmsim.replay.decode_loop.AccessSource`: one token of each row a step."""

    def __init__(self, context: Prompt, rows: Sequence[Request], selections: Selections):
        self.model = context.model
        self.rows = list(rows)
        self.keepers = [Keeper([row], row.manager, row.book, selections, False) for row in rows]
        self.selections = selections
        prompts = list({id(row.prompt): row.prompt for row in rows}.values())
        places = {id(prompt): place for place, prompt in enumerate(prompts)}
        device = self.model.lm_head.weight.device
        of_row = torch.tensor([places[id(row.prompt)] for row in rows], device=device)
        own = max((len(prompt.tokens) + prompt.max_steps) // context.rate for prompt in prompts) - (
            len(context.tokens) // context.rate
        )
        self.table = _Table(self.rows, len(context.tokens) // context.rate + own, device)
        self.pagers = [
            _Pager(self.table, layer, context, prompts, of_row, own)
            for layer in range(len(context.csa_caches))
        ]
        self.states = [
            _by_row(state, of_row) for state in step_layers(self.model, prompts, self.pagers)
        ]
        self.logits = torch.stack([prompt.logits for prompt in prompts])[of_row]
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts], device=device)
        self.positions = lengths.int()[of_row]

    def n_entries(self, request: int, step: int) -> int:
        return self.rows[request].n_entries(step)

    def serve(self, step: int) -> list[Served | None]:
        self.table.update()
        chosen = self.logits.argmax(-1)
        attends = [
            partial(layer.self_attn.decode, state=state)
            for layer, state in zip(self.model.model.layers, self.states, strict=True)
        ]
        self.logits = self.model.decode(chosen, self.positions, attends)
        self.positions = self.positions + 1
        now = len(self.rows)
        self._book(step, chosen, now)
        self.selections.keep()
        for row in self.rows:
            row.keep_state()
        return [keeper.served() for keeper in self.keepers]

    def _book(self, step: int, chosen: Tensor, rows: int) -> None:
        """Into `selections`, on the CPU, what the step's first `rows` selected.

        The host waits once: processes that share a GPU take turns, and each wait is for all of
        them.
        """
        found = {
            name: torch.stack([getattr(pager, own) for pager in self.pagers]).to(
                CPU, non_blocking=True
            )
            for name, own in BOOKED.items()
        }
        tokens = chosen.to(CPU, non_blocking=True)
        if chosen.is_cuda:
            torch.cuda.current_stream(chosen.device).synchronize()
        self.selections.tokens[step, :rows] = tokens
        for name, value in found.items():
            getattr(self.selections, name)[:, :rows] = value

    def keep_first(self, rows: int) -> None:
        """The others' answers are over."""
        if rows == len(self.rows):
            return
        del self.rows[rows:], self.keepers[rows:]
        self.logits = self.logits[:rows]
        self.positions = self.positions[:rows]
        first = slice(rows)
        self.states = [_part(state, lambda tensor: tensor[first]) for state in self.states]


class _Table(NoTiers):
    """What is resident for each row: bool [L, B, E + 1], of which the last is padding's.

    As the decode loop's tiers it is told what moves; what a page became is looked up when the step
    that follows attends.
    """

    def __init__(self, rows: Sequence[Request], entries: int, device: torch.device):
        self.rows = list(rows)
        self.layers = rows[0].layers
        resident = torch.zeros(self.layers, len(rows), entries + 1, dtype=torch.bool)
        for b, row in enumerate(rows):
            present = row.residency.present().repeat_interleave(row.manager.ctx.granularity, 1)
            width = min(present.shape[1], entries)
            resident[:, b, :width] = present[:, :width]
        self.resident = resident.to(device)
        self.touched: list[tuple[int, Tensor]] = []

    def wrote(self, request: int, moves: Moves) -> None:
        self._touch(request, moves)

    def recall(self, request: int, moves: Moves) -> None:
        self._touch(request, moves)

    def settle(self, request: int, moves: Moves) -> None:
        self._touch(request, moves)

    def _touch(self, request: int, moves: Moves) -> None:
        self.touched += [(request, pages) for pages in (moves.pages, moves.out) if pages.shape[1]]

    def update(self) -> None:
        """Enter what moved since the last step."""
        places, values = [], []
        _, batch, width = self.resident.shape
        for b, pages in self.touched:
            row = self.rows[b]
            granularity = row.manager.ctx.granularity
            here = row.residency.lookup(pages) >= 0
            entries = pages.long()[..., None] * granularity + torch.arange(granularity)
            entries = entries.masked_fill((pages < 0)[..., None], width - 1)
            entries = entries.clamp(max=width - 1)
            start = (torch.arange(self.layers) * batch + b)[:, None, None] * width
            places.append((start + entries).flatten())
            shown = (here & (pages >= 0))[..., None] & (entries < width - 1)
            values.append(shown.expand(self.layers, -1, -1).flatten())
        self.touched = []
        if places:
            device = self.resident.device
            flat = self.resident.view(-1)
            flat[torch.cat(places).to(device)] = torch.cat(values).to(device)


class _Pager:
    """`fmsim.exec.model.cache.Pager` of one CSA layer of all rows.

    `pool` [context's entries + B x (own + 1), C]: the context's, and each row's own, whose last
    place takes what closes nothing. Of the step: `wanted`, `ids` int32 [B, K], `hit` and `attended`
    bool, and the masses.
    """

    def __init__(
        self,
        table: _Table,
        layer: int,
        context: Prompt,
        prompts: Sequence[Prompt],
        of_row: Tensor,
        own: int,
    ):
        self.table = table
        self.layer = layer
        self.own = own
        read = context.csa_caches[layer]
        self.shared = read.kv.closed
        self.keys = read.index.entries[0, : self.shared].float()
        kv = read.kv.entries.new_zeros(len(prompts), own + 1, read.kv.entries.shape[-1])
        keys = self.keys.new_zeros(len(prompts), own + 1, self.keys.shape[1])
        for place, prompt in enumerate(prompts):
            cache = prompt.csa_caches[layer]
            more = cache.kv.closed - self.shared
            kv[place, :more] = cache.kv.entries[0, self.shared : cache.kv.closed]
            keys[place, :more] = cache.index.entries[0, self.shared : cache.index.closed]
        self.pool = torch.cat((read.kv.entries[0, : self.shared], kv[of_row].flatten(0, 1)))
        self.own_keys = keys[of_row]

    def append(self, entry: Tensor, key: Tensor, index: Tensor) -> None:
        rows = torch.arange(len(index), device=index.device)
        place = torch.where(index < 0, self.own, index - self.shared).long()
        self.pool[self.shared + rows * (self.own + 1) + place] = entry
        self.own_keys[rows, place] = key.float()

    def select(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> Tensor:
        lengths = visible.int()
        scores = self._scores(queries[:, 0].float(), weights[:, 0].float())
        resident = self.table.resident[self.layer, : len(scores)]
        self.wanted = best(scores, lengths, top_k)
        none = self.wanted < 0
        self.hit = resident.gather(1, torch.where(none, resident.shape[1] - 1, self.wanted).long())
        weight = scores.gather(1, self.wanted.clamp(min=0).long())
        weight = weight.masked_fill(none, float("-inf")).softmax(-1)
        self.attended_to = self.hit.clone()
        among = best(scores.masked_fill_(~resident[:, :-1], float("-inf")), lengths, top_k)
        self.ids = among
        for rows, fetched in self._fetched(weight):
            self.attended_to[rows] |= fetched & ~none[rows]
            self.ids[rows] = self.wanted[rows].masked_fill(~self.attended_to[rows], -1)
        return self.ids

    def _fetched(self, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows that load misses, and which of their wanted entries they load, bool [rows, K]: as
        `on_miss` says of the layer's pages, heaviest first by the indexer's softmax.
        """
        kinds: dict[tuple, list[int]] = {}
        for b, row in enumerate(self.table.rows[: len(weight)]):
            params = row.policy.params
            if params.on_miss != "mask":
                above, below = params.fallback_above, params.fallback_below
                kind = (params.on_miss, params.granularity, above, below)
                kinds.setdefault(kind, []).append(b)
        found = []
        for (on_miss, granularity, above, below), numbers in kinds.items():
            rows = torch.tensor(numbers, device=weight.device)
            if on_miss == "fetch":
                found.append((rows, torch.ones_like(self.hit[rows])))
                continue
            wanted, hit = self.wanted[rows], self.hit[rows]
            use = page_step(wanted.long(), weight[rows], granularity, shared=False)
            # a page is here if its entries are; each page's first wanted entry tells
            pages = torch.where(wanted < 0, -1, wanted // granularity)
            same = use.pages[:, :, None] == pages[:, None, :]
            here = (same & hit[:, None, :]).any(2)
            load = heaviest_missing(use, (use.pages >= 0) & ~here, above, below)
            found.append((rows, (same & load[:, :, None]).any(1)))
        return found

    def read(self, ids: Tensor) -> Tensor:
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        ids = ids.long().clamp(min=0)
        own = self.shared + rows * (self.own + 1) + (ids - self.shared)
        return self.pool[torch.where(ids < self.shared, ids, own)]

    def attended(
        self, access: Access, masses_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        wanted = masses_of(self.wanted, self.read(self.wanted))
        self.seen_mass = rounded(access.mass[:, 0])
        self.mass = rounded(wanted[0][:, 0])
        self.near_mass = torch.stack([part[:, 0] for part in wanted[1:]], 1)
        self.hidden = access.hidden[:, 0]

    def _scores(self, queries: Tensor, weights: Tensor) -> Tensor:
        """float32 [B, E] of queries [B, heads, D] and weights [B, heads], float32: the context's
        entries, and each row's own.
        """
        rows, heads, _ = queries.shape
        scores = queries.new_empty(rows, self.shared + self.own)
        common = scores[:, : self.shared]
        for head in range(heads):
            part = (queries[:, head] @ self.keys.T).relu_().mul_(weights[:, head, None])
            common.copy_(part) if head == 0 else common.add_(part)
        own = torch.einsum("bhd,bed->bhe", queries, self.own_keys[:rows, : self.own]).relu()
        scores[:, self.shared :] = (own * weights[..., None]).sum(1)
        return scores


def _by_row(state: StepLayer, of_row: Tensor) -> StepLayer:
    """What prompts keep, a copy for each row."""
    return _part(state, lambda tensor: tensor[of_row])


def _part(state: StepLayer, part: Callable[[Tensor], Tensor]) -> StepLayer:
    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return part(value)
        if isinstance(value, tuple):
            return tuple(part(tensor) for tensor in value)
        if isinstance(value, StepCompressor):
            return StepCompressor(of(value.kv), of(value.gate), of(value.prior))
        return value

    return replace(state, **{each.name: of(getattr(state, each.name)) for each in fields(state)})
