"""A decode under a policy: the replay's own keeper, ledger and step order, with a model that attends to what is kept.

In a step, new entries are written and a decision may recall pages. Then each CSA layer's indexer selects: with `on_miss`
"fetch" and "fallback" among all entries, since all index keys are scored; with "mask" among the resident ones alone, as
FlashMemory does (arXiv 2606.09079), so that the next best resident entry takes the place of one that is not there. A replay has
only what was selected among all. To compare the two, `select="all"` selects as the recorded model did, and then leaves out what is
missing.

What the ledger says was wanted is always the selection among all entries, and its mass what attention would have put there, given
this decode's own past.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmsim.accesses import page_step
from fmsim.errors import FmsimError
from fmsim.exec.kernels.layout import Layout, plain
from fmsim.exec.kernels.top_k import top_k as best
from fmsim.exec.keys import IndexKeys
from fmsim.exec.model import CSA, HCA, MASKED, SLIDING, Access, Compressor, CompressorState, LayerCache, StepCompressor, StepLayer
from fmsim.exec.prompt import Prompt
from fmsim.exec.request import Request, Select
from fmsim.exec.tiered import RequestSize, TieredCache
from fmsim.policies.base import Policy


@dataclass(frozen=True)
class Timeline:
    """When each step ran, seconds [T] from the first, and what of it went into loading misses and recalls: measured."""

    batch: int
    start_s: np.ndarray
    end_s: np.ndarray
    stall_s: np.ndarray
    recall_wait_s: np.ndarray
    h2d_bytes: np.ndarray  # copied from the mirror in the step


class Batch:
    """Requests of any lengths that decode side by side, each under a policy of its own, all of one kind: `policy`.

    Raises FmsimError before anything starts where memory is short, and for what the policy cannot do.
    """

    def __init__(
        self, prompts: Sequence[Prompt], policy: Policy, *, select: Select = "resident", tau: int = 64, seed: int = 0,
        hindsight: Request | None = None,
    ):  # fmt: skip
        self.model, self.policy = prompts[0].model, policy
        self.device, config = self.model.lm_head.weight.device, self.model.config
        dtype = self.model.lm_head.weight.dtype
        capacities = [(len(prompt.tokens) + prompt.max_steps) // config.compress_rates[CSA] for prompt in prompts]
        layers, layout = config.layer_types.count(CSA), plain(dtype, config.head_dim)
        self.keys = IndexKeys(plain(dtype, config.index_head_dim), layers, capacities, self.device)
        self._fill_keys(prompts)
        self.requests = [
            Request(
                prompt, type(policy)(policy.params), entry_bytes=layout.entry_bytes, keys_of=self._keys_of(b), select=select, tau=tau, seed=seed,
                hindsight=hindsight,
            )  # fmt: skip
            for b, prompt in enumerate(prompts)
        ]
        self.tiers = self._tiers(layout, layers)
        self.states = self._states(prompts)
        self.logits = torch.stack([prompt.logits for prompt in prompts])
        self._clock: list[tuple[float, float, float, int]] = []  # of each step: seconds, in stalls, in recalls; bytes moved before its end
        self.stall_s = 0.0  # of the step under way

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> None:
        """Process one token of each request; `logits` [B, vocabulary] are then those of the next."""
        room = min(request.prompt.max_steps - request.step for request in self.requests)
        if not room:
            raise FmsimError(f"the prompts were read with room for {self.requests[0].step} decode steps, and they are used up; read them with more")
        start_s = time.perf_counter()
        self.stall_s = 0.0
        self._recall()
        recall_s = time.perf_counter() - start_s
        positions = torch.tensor([len(request.prompt.tokens) + request.step for request in self.requests], device=self.device)
        self.logits = self.model.decode(torch.tensor(list(tokens), device=self.device), positions, self.states)
        for b, (request, token) in enumerate(zip(self.requests, tokens, strict=True)):
            moves = request.settle(int(token))
            if moves is not None:
                for pager in self.pagers:
                    self.tiers.settle(b, pager.layer, moves, pager.blocks[b], request.group(pager.layer))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._clock.append((time.perf_counter() - start_s, self.stall_s, recall_s, self.h2d_bytes))

    def generate(self, count: int, progress: Callable[[int], None] | None = None) -> list[list[int]]:
        """Greedy tokens of each request, each processed as it is chosen."""
        first = [request.step for request in self.requests]
        for _ in range(count):
            self.step(self.logits.argmax(-1).tolist())
            if progress is not None:
                progress(1)
        return [request.tokens[start:] for request, start in zip(self.requests, first)]

    def timeline(self) -> Timeline:
        """Of the steps so far."""
        step_s, stall_s, recall_s, moved_bytes = np.array(self._clock, dtype=np.float64).reshape(-1, 4).T
        end_s = step_s.cumsum()
        return Timeline(len(self.requests), end_s - step_s, end_s, stall_s, recall_s, np.diff(moved_bytes, prepend=0.0))

    @property
    def pagers(self) -> list[LayerPager]:
        return [state.pager for state in self.states if state.pager is not None]

    @property
    def gpu_kv_bytes(self) -> int:
        """What was allocated for the batch's KV: slots, staging, index keys, HCA entries, windows and open compressor windows."""
        return self.tiers.pool_bytes + self.fixed_kv_bytes

    @property
    def full_kv_bytes(self) -> int:
        """What would be allocated if every page had a slot."""
        return self.tiers.full_bytes + self.fixed_kv_bytes

    @property
    def fixed_kv_bytes(self) -> int:
        """What no policy changes: index keys, HCA entries, windows, open compressor windows."""
        return self.keys.pool_bytes + sum(tensor.untyped_storage().nbytes() for state in self.states for tensor in _tensors(state))

    @property
    def h2d_bytes(self) -> int:
        """Copied from the mirror so far."""
        return int(self.tiers.recalled_pages + self.tiers.staged_pages) * self.tiers.page_bytes

    def _recall(self) -> None:
        for b, request in enumerate(self.requests):
            moves = request.begin()
            if moves is not None:
                for layer in range(request.layers):
                    group = request.group(layer)
                    self.tiers.recall(b, layer, moves.pages[group], moves.slots[group])

    def _keys_of(self, request: int) -> Callable[[int], Tensor]:
        return lambda n_entries: torch.stack([self.keys.read(request, layer, n_entries) for layer in range(len(self.keys.pool))])

    def _fill_keys(self, prompts: Sequence[Prompt]) -> None:
        for b, prompt in enumerate(prompts):
            for layer, cache in enumerate(prompt.csa_caches):
                keys = cache.index.entries[0, : cache.index.closed]
                self.keys.write(b, layer, torch.arange(len(keys), device=self.device), keys)

    def _tiers(self, layout: Layout, layers: int) -> TieredCache:
        params, sizes, lossy = self.policy.params, [], False
        for request in self.requests:
            ctx = request.keeper.ctx
            full = ctx.n_slots >= ctx.n_pages
            lossy |= not full
            staged = 0 if full or params.on_miss == "mask" else min(ctx.topk, ctx.n_pages)
            sizes.append(RequestSize(ctx.n_pages, ctx.n_slots, staged))
        tiers = TieredCache(layout, layers, params.granularity, sizes, self.device, mirrored=lossy)
        for b, request in enumerate(self.requests):
            for layer, cache in enumerate(request.prompt.csa_caches):
                tiers.fill(b, layer, cache.kv.entries[0, : cache.kv.closed], request.residency.table[request.group(layer)])
        return tiers

    def _states(self, prompts: Sequence[Prompt]) -> list[StepLayer]:
        """Each layer's state for decode steps, from what the prompts' prefills left."""
        states, csa = [], 0
        for number, layer in enumerate(self.model.model.layers):
            caches, attention = [prompt.cache.layers[number] for prompt in prompts], layer.self_attn
            state = StepLayer(torch.cat([_ring(cache, len(p.tokens), attention.window) for cache, p in zip(caches, prompts)]))
            if attention.kind != SLIDING:
                state.kv = step_compressor(attention.compressor, [cache.kv for cache in caches])
            if attention.kind == HCA:
                entries = [cache.kv.entries[0] for cache in caches]
                state.entries = torch.nn.utils.rnn.pad_sequence(entries, batch_first=True)
                state.entries = torch.nn.functional.pad(state.entries, (0, 0, 0, 1))
            if attention.kind == CSA:
                state.index = step_compressor(attention.compressor.indexer, [cache.index for cache in caches])
                state.pager = LayerPager(self, csa)
                csa += 1
            states.append(state)
        return states


class Engine(Batch):
    """A batch of one request."""

    def __init__(self, prompt: Prompt, policy: Policy, **options):
        super().__init__([prompt], policy, **options)
        [self.request] = self.requests

    @property
    def tokens(self) -> list[int]:
        """Read and generated since the prompt."""
        return self.request.tokens

    def read(self, tokens: Iterable[int], progress: Callable[[int], None] | None = None) -> None:
        """Process given tokens, one decode step each."""
        for token in tokens:
            self.step([token])
            if progress is not None:
                progress(1)

    def generate(self, count: int, progress: Callable[[int], None] | None = None) -> list[int]:
        """Greedy tokens, each processed as it is chosen."""
        return super().generate(count, progress)[0]

    def ledger(self):
        """What moved and what was kept in the steps so far; measured."""
        return self.request.ledger()


class LayerPager:
    """`fmsim.exec.model.Pager` of one CSA layer of a batch."""

    def __init__(self, batch: Batch, layer: int):
        self.batch, self.layer = batch, layer
        self.blocks: list[Tensor] = []  # each request's pages -> pages of the pool, in this step

    def append(self, entry: Tensor, key: Tensor, index: Tensor) -> None:
        for b, request in enumerate(self.batch.requests):
            table = request.residency.table[request.group(self.layer)]
            self.batch.tiers.append(b, self.layer, entry[b : b + 1], index[b : b + 1], table)
            self.batch.keys.write(b, self.layer, index[b : b + 1], key[b : b + 1])

    def select(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> Tensor:
        batch, lengths = self.batch, visible.int()
        scores = batch.keys.scores(self.layer, queries, weights, visible)
        self.wanted = best(scores, lengths, top_k).long()
        self.hit = self._each(lambda request, b: request.here(self.layer, self.wanted[b]))
        self.blocks = [batch.tiers.blocks(b, r.residency.table[r.group(self.layer)]) for b, r in enumerate(batch.requests)]
        if batch.requests[0].among_resident:
            numbers = torch.arange(scores.shape[1], device=scores.device)
            here = self._each(lambda request, b: request.here(self.layer, torch.where(numbers < request.n_entries, numbers, -1)))
            self.ids, attended = best(scores.masked_fill(~here, float("-inf")), lengths, top_k).long(), self.hit
        else:
            attended = self._each(lambda request, b: self._load(request, b, scores[b]))
            self.ids = torch.where(attended, self.wanted, -1)
        for b, request in enumerate(batch.requests):
            request.book_selection(self.layer, self.wanted[b], self.hit[b], attended[b], self.ids[b])
        return self.ids

    def read(self, ids: Tensor) -> Tensor:
        tiers, dtype = self.batch.tiers, self.batch.logits.dtype
        return torch.stack([tiers.read(self.layer, blocks, ids[b]) for b, blocks in enumerate(self.blocks)]).to(dtype)

    def attended(self, access: Access, masses_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        tiers, wanted_masses = self.batch.tiers, (access.mass, access.window_mass, access.sink_mass)
        if tiers.mirrored and self.batch.policy.params.on_miss != "fetch":
            entries = torch.stack([tiers.read_mirror(b, self.layer, ids) for b, ids in enumerate(self.wanted)])
            wanted_masses = masses_of(self.wanted, entries.to(self.batch.logits.dtype))
        for b, request in enumerate(self.batch.requests):
            request.book_masses(self.layer, access.mass[b, 0], tuple(part[b, 0] for part in wanted_masses), access.hidden[b, 0])

    def _each(self, make: Callable[[Request, int], Tensor]) -> Tensor:
        return torch.stack([make(request, b) for b, request in enumerate(self.batch.requests)])

    def _load(self, request: Request, b: int, scores: Tensor) -> Tensor:
        """Load what `on_miss` says of the wanted entries; bool [K], which of them can be attended to.

        "fallback" takes the heaviest pages first: by the indexer's softmax, which is trained to follow the attention mass.
        """
        hit, wanted, batch = self.hit[b], self.wanted[b], self.batch
        if request.policy.params.on_miss == "mask" or not batch.tiers.mirrored:
            return hit
        start_s = time.perf_counter()
        granularity = request.keeper.ctx.granularity
        weight = torch.where(wanted < 0, float("-inf"), scores[wanted]).softmax(-1)
        use = page_step(wanted[None], weight[None], granularity, shared=False)
        missing = (use.pages >= 0) & ~request.here(self.layer, use.pages.long() * granularity)
        fetched = request.keeper.to_fetch(use, missing)
        batch.tiers.stage(b, self.layer, use.pages[0].long(), fetched[0], self.blocks[b])
        batch.stall_s += time.perf_counter() - start_s
        return (wanted >= 0) & (self.blocks[b][torch.where(wanted < 0, -1, wanted // granularity)] >= 0)


def step_compressor(compressor: Compressor, prefilled: Sequence[CompressorState]) -> StepCompressor:
    """The open windows that prefills left, one row a request."""
    width, count = compressor.kv_proj.out_features, len(prefilled)
    like = compressor.kv_proj.weight
    kv, gate = (like.new_zeros(count, compressor.rate, width) for _ in range(2))
    prior = None
    if compressor.overlapping:
        prior = (like.new_zeros(count, compressor.rate, compressor.width), like.new_full((count, compressor.rate, compressor.width), MASKED))
    for b, state in enumerate(prefilled):
        n = 0 if state.open_kv is None else state.open_kv.shape[1]
        if n:
            kv[b, :n], gate[b, :n] = state.open_kv[0], state.open_gate[0] + compressor.position_bias[:n]
        if prior is not None and state.prior_kv is not None:
            prior[0][b], prior[1][b] = state.prior_kv[0], state.prior_gate[0]
    return StepCompressor(kv, gate, prior)


def _ring(cache: LayerCache, tokens: int, window: int) -> Tensor:
    """The window of a prefill [1, n, C] with token p at p % window, [1, window, C]."""
    known = cache.window.shape[1]
    ring = cache.window.new_zeros(1, window, cache.window.shape[2])
    ring[:, torch.arange(tokens - known, tokens, device=ring.device) % window] = cache.window
    return ring


def _tensors(state: StepLayer) -> list[Tensor]:
    found = [state.window]
    for compressor in (state.kv, state.index):
        if compressor is not None:
            found += [compressor.kv, compressor.gate, *(compressor.prior or ())]
    return found if state.entries is None else [*found, state.entries]
