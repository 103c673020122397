"""A running model as the source of a decode's accesses: its indexers, behind a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fmsim.exec.decode import step_state
from fmsim.exec.decode.device_tiers import StepTables, show_residents
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.request import Request
from fmsim.exec.decode.selections import Selections
from fmsim.exec.kv.paired import PairedTiers
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
        requests: Sequence[Request],
        selections: Selections,
        tiers: PairedTiers,
        tables: StepTables,
        attends: Sequence[Attend],
        captured: bool,
    ) -> None:
        self.model: DeepseekV4 = prompts[0].model
        self.requests = list(requests)
        self.selections = selections
        self.tiers = tiers
        self.tables = tables
        self.attends = list(attends)
        self.rate = self.model.config.compress_rates[CSA]
        self.given: Sequence[int | None] = [None] * len(requests)
        self.logits = torch.stack([prompt.logits for prompt in prompts])
        device = self.logits.device
        lengths = [len(prompt.tokens) for prompt in prompts]
        self._input = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        self._positions = torch.tensor(lengths, dtype=torch.int32, device=device)
        self._forward: Callable[[], None] = (
            step_state.graph_after_one(self._compute) if captured else self._compute
        )

    def n_entries(self, request: int, step: int) -> int:
        return self.requests[request].n_entries(step)

    def serve(self, step: int) -> list[Served | None]:
        self._choose()
        self.selections.tokens[step].copy_(self._input)
        self._forward()
        self.selections.keep(step)
        self._positions += 1
        return [request.served() for request in self.requests]

    def _choose(self) -> None:
        """The step's input: what is given, and the model's own choice elsewhere, which the host is
        not told.
        """
        own = self.logits.argmax(-1)
        if any(token is not None for token in self.given):
            numbers = [-1 if token is None else token for token in self.given]
            given = torch.tensor(numbers, device=own.device)
            own = torch.where(given < 0, own, given)
        self._input.copy_(own)

    def _compute(self) -> None:
        """The part of a step that a CUDA graph holds."""
        show_residents(self.tables, [request.manager for request in self.requests])
        if self.tiers.resident is not None:
            for b, request in enumerate(self.requests):
                visible = (self._positions[b] + 1) // self.rate
                self.tiers.resident.list(request.residency.slots, visible, b)
        self.logits.copy_(self.model.decode(self._input, self._positions, self.attends))
