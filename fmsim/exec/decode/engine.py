"""A decode under a policy: the replay's own keeper, ledger and step order, with a model that
attends to what is kept.

A step is: the policies' decisions and their recalls; the model with its selections
(`fmsim.exec.decode.pager`), on a GPU one CUDA graph from kernels; then what was fetched gets its
slots. No step waits for the host: tokens are chosen, logged and read on the device, and every shape
is static.

What the ledger says was wanted is always the selection among all entries, and its mass what
attention would have put there, given this decode's own past; a layer that does not keep all its
index keys (`fmsim.exec.kv.keys`) does not know it, and the ledger says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.decode import step_state
from fmsim.exec.decode.pager import LayerPager
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.request import Request, Select
from fmsim.exec.decode.selections import Selections
from fmsim.exec.kernels.lang import HAS_TRITON
from fmsim.exec.kernels.layout import Layout, plain
from fmsim.exec.kernels.tuning import MOST_EXPERT_TOKENS
from fmsim.exec.kv.keys import IndexKeys, Where
from fmsim.exec.kv.paired import PairedTiers
from fmsim.exec.kv.tiered import AHEAD, RequestSize
from fmsim.exec.measure.step_clock import StepClock
from fmsim.exec.model.deepseek_v4 import CSA
from fmsim.policies.base import Policy

GRAPH_STEPS = 32  # a shorter decode, such as an answer, is over before a capture would pay


@dataclass(frozen=True)
class Timeline:
    """When each step ran, seconds [T] from the first, and what of it went into loading misses and
    recalls: measured.

    `stall_s` is nan where misses are loaded within a CUDA graph, which tells no parts of its time.
    """

    batch: int
    start_s: np.ndarray
    end_s: np.ndarray
    stall_s: np.ndarray
    recall_wait_s: np.ndarray
    h2d_bytes: np.ndarray  # copied from the mirror in the step


class Batch:
    """Requests of any lengths that decode side by side, each under a policy of its own, all of one
    kind: `policy`.

    ``kernels``: attention from GPU kernels; by default where there is a GPU. ``index_keys``
    "tiered" keeps on the GPU all index keys of the layers that the policy's memory indexer scores,
    and in the others those of resident entries: what was lost there is then not measured. Raises
    FmsimError before anything starts where memory is short, and for what the policy cannot do.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        policy: Policy,
        *,
        select: Select = "resident",
        tau: int = 64,
        seed: int = 0,
        hindsight: Request | None = None,
        kernels: bool | None = None,
        index_keys: Where = "all",
    ):
        self.model, self.policy, self.select = prompts[0].model, policy, select
        self.device, config = self.model.lm_head.weight.device, self.model.config
        dtype = self.model.lm_head.weight.dtype
        capacities = [
            (len(prompt.tokens) + prompt.max_steps) // config.compress_rates[CSA]
            for prompt in prompts
        ]
        self.layers = config.layer_types.count(CSA)
        layout, key = plain(dtype, config.head_dim), plain(dtype, config.index_head_dim)
        if (select, index_keys) == ("all", "tiered"):
            raise FmsimError(
                'select="all" takes the scores of all index keys; leave out index_keys="tiered"'
            )
        self.keys = IndexKeys(index_keys, policy, key, self.layers, capacities, self.device)
        self._fill_keys(self.keys.kept, prompts)
        self.max_steps = min(prompt.max_steps for prompt in prompts)
        self.selections = Selections(
            self.max_steps,
            self.layers,
            len(prompts),
            config.index_topk,
            config.hidden_size,
            self.device,
        )
        self.requests = [
            Request(
                prompt,
                type(policy)(policy.params),
                index=b,
                selections=self.selections,
                entry_bytes=layout.entry_bytes,
                keys_of=partial(self.keys.first, b),
                select=select,
                tau=tau,
                seed=seed,
                hindsight=hindsight,
                unmeasured=self.keys.tiered,
            )
            for b, prompt in enumerate(prompts)
        ]
        self.tiers = self._tiers(layout, key)
        self._tables = self._new_tables()
        self._lay_keys_beside()
        self._fill_keys(self.keys.tiered, prompts)
        self.pagers = [LayerPager(self, layer, self._blocks(layer)) for layer in range(self.layers)]
        self._on_gpu = self.device.type == "cuda" and HAS_TRITON
        kernels = self._on_gpu if kernels is None else kernels
        self.state = (step_state.from_kernels if kernels else step_state.from_torch)(
            self.model, prompts, self.pagers, layout, key
        )
        self.logits = torch.stack([prompt.logits for prompt in prompts])
        self.step_count = 0
        self._input = torch.zeros(len(prompts), dtype=torch.int64, device=self.device)
        self._positions = torch.tensor(
            [len(prompt.tokens) for prompt in prompts], dtype=torch.int32, device=self.device
        )
        self._clock = StepClock(self.device)
        captured = (
            self._on_gpu
            and kernels
            and self.max_steps >= GRAPH_STEPS
            and len(prompts) <= MOST_EXPERT_TOKENS
        )
        self._forward: Callable[[], None] = (
            step_state.graph_after_one(self._compute) if captured else self._compute
        )

    @property
    def among_resident(self) -> bool:
        """The indexers select among resident entries alone."""
        return self.requests[0].among_resident

    @torch.inference_mode()
    def step(self, tokens: Sequence[int | None] | None = None) -> None:
        """Process one token of each request, its own choice where none is given; `logits` [B,
        vocabulary] are then those of the next.
        """
        if self.step_count == self.max_steps:
            raise FmsimError(
                f"the prompts were read with room for {self.step_count} decode steps, and they are"
                " used up; read them with more"
            )
        with self._clock.step(self.tiers.moved_bytes):
            with self._clock.recall():
                self._recall()
            self._choose(tokens or [None] * len(self.requests))
            self.selections.tokens[self.step_count].copy_(self._input)
            self._forward()
            self.selections.keep(self.step_count)
            self.step_count += 1
            self._positions += 1
            for b, request in enumerate(self.requests):
                moves = request.settle()
                if moves is not None and self.tiers.entries.stage_pages:
                    self.tiers.settle(moves.pages, moves.slots, self._tables[:, b : b + 1], b)

    def _choose(self, tokens: Sequence[int | None]) -> None:
        """The step's input: what is given, and the model's own choice elsewhere, which the host is
        not told.
        """
        own = self.logits.argmax(-1)
        if any(token is not None for token in tokens):
            given = torch.tensor(
                [-1 if token is None else token for token in tokens], device=self.device
            )
            own = torch.where(given < 0, own, given)
        self._input.copy_(own)

    def generate(
        self, count: int, progress: Callable[[int], None] | None = None
    ) -> list[list[int]]:
        """Greedy tokens of each request, each processed as it is chosen."""
        first = self.step_count
        for _ in range(count):
            self.step()
            if progress is not None:
                progress(1)
        return [request.tokens[first:] for request in self.requests]

    def timeline(self) -> Timeline:
        """Of the steps so far; on a GPU without the first, which compiles kernels and captures the
        graph.
        """
        step_s, stall_s, recall_s, moved = self._clock.figures()
        first = 1 if self._on_gpu and self.step_count > 1 else 0
        h2d_bytes = np.diff(moved, prepend=0.0)
        end_s = step_s[first:].cumsum()
        return Timeline(
            len(self.requests),
            end_s - step_s[first:],
            end_s,
            stall_s[first:],
            recall_s[first:],
            h2d_bytes[first:],
        )

    @property
    def gpu_kv_bytes(self) -> int:
        """What was allocated for the batch's KV: slots, spare pages, index keys, HCA entries,
        windows and open compressor windows.
        """
        return self.tiers.pool_bytes + self.fixed_kv_bytes

    @property
    def full_kv_bytes(self) -> int:
        """What would be allocated if every page had a slot."""
        return self.tiers.full_bytes + self.fixed_kv_bytes

    @property
    def fixed_kv_bytes(self) -> int:
        """What no decision changes: index keys of layers that keep all, HCA entries, windows, open
        compressor windows.
        """
        return self.keys.kept_bytes + self.state.n_bytes

    @property
    def h2d_bytes(self) -> int:
        """Copied from the mirror so far."""
        return int(self.tiers.moved_bytes())

    def stalled(self) -> AbstractContextManager[None]:
        """Around the loading of misses: it counts as a stall."""
        return self._clock.stall()

    def _compute(self) -> None:
        """The part of a step that a CUDA graph holds."""
        for b, request in enumerate(self.requests):
            table = request.residency.table
            self.tiers.entries.blocks(b, table, self._tables[:, b, : table.shape[1]])
            if self.tiers.resident is not None:
                visible = (self._positions[b] + 1) // self.model.config.compress_rates[CSA]
                self.tiers.resident.list(request.residency.slots, visible, b)
        self.logits.copy_(self.model.decode(self._input, self._positions, self.state.attends))

    def _recall(self) -> None:
        for b, request in enumerate(self.requests):
            moves = request.begin()
            if moves is not None:
                self.tiers.recall(moves.pages, moves.slots, b)
            foreseen = request.foresee(self.tiers.entries.sizes[b].ahead)
            if foreseen is not None:
                self.tiers.recall_ahead(foreseen, b)

    def _lay_keys_beside(self) -> None:
        """The tiered layers' index keys into the slots of their entries."""
        for layer in self.keys.tiered:
            group = self.requests[0].group(layer)
            tables = [request.residency.table[group] for request in self.requests]
            self.keys.lay_beside(
                layer, self.tiers.keys, tables, self._blocks(layer), self.tiers.resident, group
            )

    def _fill_keys(self, layers: Iterable[int], prompts: Sequence[Prompt]) -> None:
        """What the prefills left."""
        for layer in layers:
            for b, prompt in enumerate(prompts):
                cache = prompt.csa_caches[layer].index
                self.keys[layer].fill(b, cache.entries[0, : cache.closed])

    def _tiers(self, layout: Layout, key: Layout) -> PairedTiers:
        params, sizes, lossy = self.policy.params, [], False
        for request in self.requests:
            ctx = request.keeper.ctx
            full = request.keeper.keeps_all
            lossy |= not full
            staged = 0 if full or params.on_miss == "mask" else min(ctx.topk, ctx.n_pages)
            ahead = -(-ctx.n_slots // AHEAD) if request.policy.decides_ahead and not full else 0
            sizes.append(RequestSize(ctx.n_pages, ctx.n_slots, staged, ahead))
        groups = [self.requests[0].group(layer) for layer in range(self.layers)]
        tiers = PairedTiers(
            layout,
            key,
            groups,
            self.keys.tiered,
            params.granularity,
            sizes,
            self.device,
            mirrored=lossy,
        )
        for b, request in enumerate(self.requests):
            for layer, cache in enumerate(request.prompt.csa_caches):
                tiers.entries.fill(
                    b,
                    layer,
                    cache.kv.entries[0, : cache.kv.closed],
                    request.residency.table[request.group(layer)],
                )
        return tiers

    def _new_tables(self) -> Tensor:
        """int32 [L or G, B, P + 1]: what each layer's pager takes for its blocks.

        Layers that share a set share them, unless they load on their own.
        """
        rows = (
            self.layers if self.tiers.entries.stage_pages else self.requests[0].keeper.ctx.n_groups
        )
        pages = max(request.keeper.ctx.n_pages for request in self.requests)
        return torch.full(
            (rows, len(self.requests), pages + 1), -1, dtype=torch.int32, device=self.device
        )

    def _blocks(self, layer: int) -> Tensor:
        """int32 [B, P + 1]: the layer's part of the tables."""
        return self._tables[layer % len(self._tables)]


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
