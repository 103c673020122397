"""Whole decode steps of a model under a policy, at any batch: measured, and simulated for the same
steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.runs import synthetic as synthetic_run
from fmsim.experiments.workers.progress import StepsTold
from fmsim.hw import Hardware, times_figure
from fmsim.policies.base import Policy
from fmsim.replay.replayer import Replayer
from fmsim.sim import metrics
from fmsim.sim.decode import simulate
from fmsim.sim.timeline import Timeline

if TYPE_CHECKING:
    from fmsim.experiments.validate import Worlds


@dataclass(frozen=True)
class WholeSteps:
    """Whole steps to time: at which batches, the scenario's unless given, and how many steps of
    each trace, all unless given.
    """

    batches: tuple[int, ...] = ()
    steps: int | None = None


def measured(worlds: Worlds, label: str, batch: int, weights: DeepseekV4) -> dict[str, Any]:
    """Decode whole steps of a model of random `weights` under a policy, `batch` requests of the
    trace together: its times after the warm-up, and the bytes that a request took.
    """
    replayer = worlds.replayer
    run = synthetic_run.run(
        label,
        worlds.make(label),
        replayer,
        worlds.geometry,
        worlds.layer_map,
        weights,
        worlds.device,
        batch,
        progress=StepsTold(replayer.n_steps).advance,
    )
    timeline = run.timeline()
    figures = metrics.timed(timeline)
    return {
        "batch": batch,
        "warm_up_steps": run.warm_up_steps,
        "measured_step_p50_s": figures["step_s"]["p50"],
        "measured_tokens_per_s": figures["decode_tokens_per_s"],
        "measured_step_s_of": _by_kind(timeline, replayer, run.policy, run.warm_up_steps),
        "modelled_gpu_bytes": run.gpu_bytes,
    }


def simulated(
    worlds: Worlds, label: str, hw: Hardware, batch: int, warm_up_steps: int
) -> dict[str, Any]:
    """What the simulator says of the same steps on `hw`.

    All requests follow one trace and share its mirror, as in the engine.
    """
    shared = times_figure(hw, "host_bytes", batch)
    policy = worlds.make(label)()
    ledger = worlds.replayer.run(policy)
    whole = simulate(ledger, worlds.geometry, shared, worlds.layer_map, batch, one_text=True)
    timeline = whole.after(warm_up_steps)
    figures = metrics.timed(timeline)
    return {
        "simulated_step_p50_s": figures["step_s"]["p50"],
        "simulated_tokens_per_s": figures["decode_tokens_per_s"],
        "simulated_step_s_of": _by_kind(timeline, worlds.replayer, policy, warm_up_steps),
    }


def errors(row: dict[str, Any]) -> dict[str, float]:
    """By how much a row's simulated figures are off its measured ones."""
    return {
        "step_error": row["simulated_step_p50_s"] / row["measured_step_p50_s"] - 1,
        "tokens_error": row["simulated_tokens_per_s"] / row["measured_tokens_per_s"] - 1,
    }


def _by_kind(
    timeline: Timeline, replayer: Replayer, policy: Policy, first: int
) -> dict[str, float]:
    """The median step of a kind: one that begins with a decision, one in which an entry closes, or
    another; of a timeline that begins with step `first`.
    """
    entries = replayer.entries
    number = np.arange(first, replayer.n_steps)
    closes = np.diff(entries, prepend=entries[0])[first:] > 0
    decides = (number % policy.params.cadence == 0) & (policy.params.cadence > 1)
    kinds = np.where(decides, "decision", np.where(closes, "closing", "plain"))
    step_s = timeline.step_s
    return {str(kind): float(np.median(step_s[kinds == kind])) for kind in np.unique(kinds)}
