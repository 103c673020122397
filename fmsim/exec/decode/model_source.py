"""A running model as the source of a decode's accesses: its indexers, behind a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fmsim.exec.decode import step_state
from fmsim.exec.decode.device_tiers import DeviceTiers
from fmsim.exec.decode.keeper import Keeper
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.selections import Selections
from fmsim.exec.kernels.selection.greedy import likeliest
from fmsim.exec.model.cache import Attend
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA
from fmsim.replay.cache_manager import Served


class ModelSource:
    """`fmsim.replay.decode_loop.AccessSource`: one token of each request a step.

    `given` are the tokens of the step to come, None for the model's own choice. `logits` [B,
    vocabulary] are those of the next token. With `captured` the model's part of a step is a CUDA
    graph, after a first run.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        keepers: Sequence[Keeper],
        selections: Selections,
        tiers: DeviceTiers,
        attends: Sequence[Attend],
        captured: bool,
    ) -> None:
        self.model: DeepseekV4 = prompts[0].model
        self.keepers = list(keepers)
        self.requests = [request for keeper in keepers for request in keeper.requests]
        self.selections = selections
        self.tiers = tiers
        self.attends = list(attends)
        self.rate = self.model.config.compress_rates[CSA]
        self.given: Sequence[int | None] = [None] * len(prompts)
        self.logits = torch.stack([prompt.logits for prompt in prompts])
        device = self.logits.device
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        lengths = [len(prompt.tokens) for prompt in prompts]
        self._input = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        self._positions = torch.tensor(lengths, dtype=torch.int32, device=device)
        self._forward: Callable[[], None] = (
            step_state.graph_after_one(self._compute) if captured else self._compute
        )

    def n_entries(self, request: int, step: int) -> int:
        return self.keepers[request].n_entries(step)

    def serve(self, step: int) -> list[Served | None]:
        self._choose()
        self.selections.tokens[step].copy_(self._input)
        self._forward()
        self.selections.keep()
        self._positions += 1
        self._step += 1
        for request in self.requests:
            request.keep_state()
        return [self._served(keeper, step) for keeper in self.keepers]

    def _served(self, keeper: Keeper, step: int) -> Served | None:
        if not keeper.settles_inside:
            return keeper.served()
        keeper.settled(step)
        return None

    def _choose(self) -> None:
        """The step's input: what is given, and the model's own choice elsewhere, which the host is
        not told.
        """
        own = likeliest(self.logits)
        if any(token is not None for token in self.given):
            numbers = [-1 if token is None else token for token in self.given]
            given = torch.tensor(numbers, device=own.device)
            own = torch.where(given < 0, own, given)
        self._input.copy_(own)

    def _compute(self) -> None:
        """The part of a step that a CUDA graph holds."""
        resident = self.tiers.tiers.resident
        if resident is not None:
            resident.see((self._positions + 1) // self.rate)
        self.logits.copy_(self.model.decode(self._input, self._positions, self.attends))
        for keeper in self.keepers:
            if keeper.settles_inside:
                keeper.settle(self._step, self.tiers.tiers, self.tiers.tables.rows)
