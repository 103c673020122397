"""A decode under a policy, with a model that attends to what is kept.

The order of a step is `fmsim.replay.decode_loop`'s, as in a replay. On a GPU the model's part, with
its selections (`fmsim.exec.decode.pager`), is one CUDA graph from kernels. No step waits for the
host: tokens are chosen, logged and read on the device, and every shape is static.

What the ledger says was wanted is always the selection among all entries, and its mass what
attention would have put there, given this decode's own past. A layer that does not keep all its
index keys (`fmsim.exec.kv.keys`) does not know it, and the ledger says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.decode import step_state
from fmsim.exec.decode.device_tiers import DeviceTiers, StepTables
from fmsim.exec.decode.keeper import keepers_of
from fmsim.exec.decode.model_source import ModelSource
from fmsim.exec.decode.pager import LayerPager, StepView
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.request import Request, Select
from fmsim.exec.decode.selections import Selections
from fmsim.exec.decode.unscaled import unscaled
from fmsim.exec.kernels.lang import HAS_TRITON
from fmsim.exec.kernels.layout import Layout, plain
from fmsim.exec.kernels.tuning import MOST_EXPERT_TOKENS
from fmsim.exec.kv.keys import KeptKeys, LayerKeys, ResidentKeys, Where
from fmsim.exec.kv.paired import PairedTiers
from fmsim.exec.kv.tiered import RequestSize
from fmsim.exec.measure.step_clock import StepClock
from fmsim.exec.model.kinds import CSA
from fmsim.policies.base import Policy
from fmsim.replay.decode_loop import DecodeLoop
from fmsim.replay.ledger import Ledger
from fmsim.replay.needs import GpuMemory
from fmsim.sim.footprint import ModelMemory
from fmsim.sim.timeline import Timeline
from fmsim.trace.format import TAU

GRAPH_STEPS = 32  # a shorter decode, such as an answer, is over before a capture would pay


class Batch:
    """Requests of any lengths that decode side by side, each under a policy of its own, all of one
    kind: `policy`.

    ``kernels``: attention from GPU kernels; by default where there is a GPU. ``index_keys``
    "tiered" keeps on the GPU all index keys of the layers that the policy's memory indexer scores,
    and in the others those of resident entries: what was lost there is then not measured. A budget
    in bytes on the GPU is of ``memory``, this model's own unless given. Raises
    FmsimError before anything starts where memory is short, and for what the policy cannot do.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        policy: Policy,
        *,
        select: Select = "resident",
        tau: int = TAU,
        seed: int = 0,
        hindsight: Request | None = None,
        kernels: bool | None = None,
        index_keys: Where = "all",
        memory: GpuMemory | None = None,
    ):
        if (select, index_keys) == ("all", "tiered"):
            raise FmsimError(
                'select="all" takes the scores of all index keys; leave out index_keys="tiered"'
            )
        self.model = prompts[0].model
        self.policy = policy
        self.device = self.model.lm_head.weight.device
        self.max_steps = min(prompt.max_steps for prompt in prompts)
        config, dtype = self.model.config, self.model.lm_head.weight.dtype
        entry, key = plain(dtype, config.head_dim), plain(dtype, config.index_head_dim)
        layers = range(config.layer_types.count(CSA))
        capacities = [
            (len(prompt.tokens) + prompt.max_steps) // config.compress_rates[CSA]
            for prompt in prompts
        ]
        self.keys = KeptKeys(index_keys, policy, key, len(layers), capacities, self.device)
        fill_keys(self.keys.kept, prompts)
        self.selections = Selections(
            self.max_steps,
            len(layers),
            len(prompts),
            config.index_topk,
            config.hidden_size,
            self.device,
        )
        memory = memory or ModelMemory(unscaled(config, dtype))
        self.requests = [
            Request(
                prompt,
                type(policy)(policy.params),
                index=b,
                selections=self.selections,
                memory=memory,
                keys_of=partial(self.keys.first, b),
                select=select,
                tau=tau,
                seed=seed,
                hindsight=hindsight,
                unmeasured=self.keys.tiered,
            )
            for b, prompt in enumerate(prompts)
        ]
        self.tiers = new_tiers(self.requests, entry, key, self.keys.tiered)
        ctx = self.requests[0].manager.ctx
        n_pages = max(request.manager.ctx.n_pages for request in self.requests)
        tables = StepTables(self.tiers, ctx.n_groups, n_pages, len(prompts))
        keepers = keepers_of(self.requests, self.selections, self.max_steps)
        beside = keys_beside(self.requests, self.keys, self.tiers, tables)
        fill_keys(beside, prompts)
        self._clock = StepClock(self.device)
        view = StepView(
            requests=self.requests,
            tiers=self.tiers.entries,
            tables=tables,
            keys=self.keys.kept | beside,
            selections=self.selections,
            select=select,
            dtype=dtype,
            stalled=self._clock.stall,
            wait_for=self.tiers.wait_for,
        )
        self.pagers = [LayerPager(view, layer) for layer in layers]
        self._on_gpu = self.device.type == "cuda" and HAS_TRITON
        kernels = self._on_gpu if kernels is None else kernels
        new_state = step_state.from_kernels if kernels else step_state.from_torch
        self.state = new_state(self.model, prompts, self.pagers, entry, key)
        captured = (
            self._on_gpu
            and kernels
            and self.max_steps >= GRAPH_STEPS
            and len(prompts) <= MOST_EXPERT_TOKENS
        )
        moved = DeviceTiers(self.tiers, tables, keepers)
        self._source = ModelSource(
            prompts, keepers, self.selections, moved, self.state.attends, captured
        )
        self._loop = DecodeLoop(
            [keeper.book for keeper in keepers], self._source, moved, self._clock
        )

    @property
    def logits(self) -> Tensor:
        """[B, vocabulary]: of the token that comes next."""
        return self._source.logits

    @torch.inference_mode()
    def step(self, tokens: Sequence[int | None] | None = None) -> None:
        """Process one token of each request, its own choice where none is given."""
        if self._loop.step == self.max_steps:
            raise FmsimError(
                f"the prompts were read with room for {self.max_steps} decode steps, and they are"
                " used up; read them with more"
            )
        self._source.given = tokens or [None] * len(self.requests)
        self._loop.advance()

    def generate(
        self, count: int, progress: Callable[[int], None] | None = None
    ) -> list[list[int]]:
        """Greedy tokens of each request, each processed as it is chosen."""
        first = self._loop.step
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
        first = 1 if self._on_gpu and self._loop.step > 1 else 0
        h2d_bytes = np.diff(moved, prepend=0.0)
        end_s = step_s[first:].cumsum()
        return Timeline(
            batch=len(self.requests),
            start_s=end_s - step_s[first:],
            end_s=end_s,
            stall_s=stall_s[first:],
            recall_wait_s=recall_s[first:],
            h2d_bytes=h2d_bytes[first:],
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

    def ledger(self) -> Ledger:
        """What moved and what was kept in the steps so far; measured."""
        return self.request.ledger()


def new_tiers(
    requests: Sequence[Request], entry: Layout, key: Layout, tiered: Sequence[int]
) -> PairedTiers:
    """The batch's CSA entries in two tiers, filled with what the prefills left.

    A lossy policy has a mirror too: what it lost is measured there.
    """
    first, managers = requests[0], [request.manager for request in requests]
    tiers = PairedTiers(
        entry,
        key,
        [first.group(layer) for layer in range(first.layers)],
        tiered,
        first.manager.ctx.granularity,
        [
            RequestSize(
                pages=manager.ctx.n_pages,
                slots=manager.ctx.group_slots,
                staged=manager.needs.miss_slots,
                ahead=manager.needs.ahead_slots,
            )
            for manager in managers
        ],
        first.device,
        mirrored=not all(manager.needs.keeps_all for manager in managers),
    )
    for b, request in enumerate(requests):
        for layer, cache in enumerate(request.prompt.csa_caches):
            table = request.residency.table[request.group(layer)]
            tiers.entries.fill(b, layer, cache.kv.entries[0, : cache.kv.closed], table)
    return tiers


def keys_beside(
    requests: Sequence[Request], keys: KeptKeys, tiers: PairedTiers, tables: StepTables
) -> dict[int, ResidentKeys]:
    """The tiered layers' index keys, in the slots of their entries; not filled yet."""
    found = {}
    for number, layer in enumerate(keys.tiered):
        group = requests[0].group(layer)
        found[layer] = ResidentKeys(
            tiers.keys,
            number,
            [request.residency.table[group] for request in requests],
            tables.blocks(layer, group),
            keys.buffers,
            tiers.resident,
            group,
        )
    return found


def fill_keys(keys: Mapping[int, LayerKeys], prompts: Sequence[Prompt]) -> None:
    """Into each layer what the prefills left."""
    for layer, of_layer in keys.items():
        for b, prompt in enumerate(prompts):
            cache = prompt.csa_caches[layer].index
            of_layer.fill(b, cache.entries[0, : cache.closed])
