"""fmsim: which KV pages should stay in GPU memory, and what that choice costs and saves.

>>> import fmsim
>>> trace = fmsim.load_trace("traces/nano-32k-needles.safetensors")
>>> ledger = fmsim.replay_trace(trace, "lru:budget=4x topk", max_steps=64)
>>> fmsim.simulate_decode(ledger, hardware="h100").step_s.shape
(64,)

Everything in `__all__` is public. Each name is imported when it is first used, so that `import
fmsim` is fast and loads neither numpy nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmsim.api import (
        build_policy,
        list_policies,
        load_frame,
        load_rows,
        load_trace,
        plan_capacity,
        replay_trace,
        row,
        run_scenario,
        save_rows,
        simulate_decode,
        simulate_server,
        sweep_scenario,
    )
    from fmsim.errors import FmsimError
    from fmsim.geometry import Geometry
    from fmsim.hw import Hardware
    from fmsim.policies.base import LookaheadPolicy, Pins, Policy, PolicyParams
    from fmsim.policies.budget import Budget
    from fmsim.replay.ledger import Ledger
    from fmsim.scenario import Scenario
    from fmsim.sim.timeline import Timeline
    from fmsim.testing import check_policy, policy_checks
    from fmsim.trace import Trace, TraceRecorder

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "FmsimError",
    "Geometry",
    "Hardware",
    "Ledger",
    "LookaheadPolicy",
    "Pins",
    "Policy",
    "PolicyParams",
    "Scenario",
    "Timeline",
    "Trace",
    "TraceRecorder",
    "build_policy",
    "check_policy",
    "list_policies",
    "load_frame",
    "load_rows",
    "load_trace",
    "plan_capacity",
    "policy_checks",
    "replay_trace",
    "row",
    "run_scenario",
    "save_rows",
    "simulate_decode",
    "simulate_server",
    "sweep_scenario",
]

# Where the names live that are not functions of fmsim.api.
_PLACES = {
    "Budget": "fmsim.policies.budget",
    "FmsimError": "fmsim.errors",
    "Geometry": "fmsim.geometry",
    "Hardware": "fmsim.hw",
    "Ledger": "fmsim.replay.ledger",
    "LookaheadPolicy": "fmsim.policies.base",
    "Pins": "fmsim.policies.base",
    "Policy": "fmsim.policies.base",
    "PolicyParams": "fmsim.policies.base",
    "Scenario": "fmsim.scenario",
    "Timeline": "fmsim.sim.timeline",
    "Trace": "fmsim.trace",
    "TraceRecorder": "fmsim.trace",
    "check_policy": "fmsim.testing",
    "policy_checks": "fmsim.testing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fmsim' has no attribute {name!r}")
    value = getattr(import_module(_PLACES.get(name, "fmsim.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
