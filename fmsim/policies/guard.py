"""Turns a policy's faults into one clear error that names the policy and the step.

What a policy is shown it can only read: a plug-in that writes into an observation would change what
the replay counts.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.arrays import WORTH_BITS
from fmsim.errors import FmsimError, PolicyError, short, shown
from fmsim.policies.base import Context, Future, LookaheadState, Observation, Pins, Policy


class Guarded:
    """A policy whose every answer is checked.

    With numpy all is checked. On a GPU the checks of values would wait for the device, so that only
    what is raised is named there.
    """

    def __init__(self, policy: Policy, csa_numbers: Sequence[int] = ()) -> None:
        """`csa_numbers` are the trace's layers, those that a policy may score; none: not known."""
        self.policy = policy
        self._csa_numbers = csa_numbers
        self._was_reset = False
        self.name = policy.name
        self.params = policy.params

    @property
    def evidence(self) -> str:
        return self.policy.evidence

    @property
    def decides_ahead(self) -> bool:
        return self.policy.decides_ahead

    @property
    def needs_mass(self) -> bool:
        return self.policy.needs_mass

    @property
    def observes(self) -> bool:
        return self.policy.observes

    @property
    def watches(self) -> bool:
        return self.policy.watches

    @property
    def prefetches(self) -> bool:
        return self.policy.prefetches

    @property
    def state_steps(self) -> int | None:
        return self.policy.state_steps

    @property
    def floor(self) -> float | None:
        """The policy's floor, if it is one."""
        floor: Any = called(f"policy {self.name}: floor", getattr, self.policy, "floor")
        if floor is None:
            return None
        if not is_number(floor):
            raise PolicyError(
                f"policy {self.name}: floor is {short(floor)}; it must be a number or None"
            )
        number: float = floor
        return number

    def _call(self, where: str, method: Callable[..., Any], *args: Any) -> Any:
        return called(f"policy {self.name}, {where}: {method.__name__}", method, *args)

    def reset(self, ctx: Context) -> None:
        self.ctx = ctx
        self._call("reset", self.policy.reset, shown_context(ctx))
        self._was_reset = True

    def pins(self) -> Pins:
        """The policy's pins, if they are such."""
        pins: Any = self._call("reset", self.policy.pins)
        whole = isinstance(pins, Pins) and all(
            isinstance(count, (int, np.integer)) and count >= 0
            for count in (pins.sink, pins.recent)
        )
        if not whole:
            raise PolicyError(
                f"policy {self.name}, reset: pins returned {short(pins)}, no Pins of whole numbers"
            )
        checked: Pins = pins
        return checked

    def n_slots(self, n_pages: int, **sizes: Any) -> int:
        return slots_of(self.policy, n_pages, **sizes)

    def layer_shares(self, n_layers: int) -> Sequence[float] | None:
        shares: Sequence[float] | None = self._call("reset", self.policy.layer_shares, n_layers)
        return shares

    def target_layers(self) -> tuple[int, ...]:
        """The layers that the policy scores, if they are such.

        Whether the trace has them is asked once the policy was reset: there it says itself what it
        lacks in a trace.
        """
        found: Any = self._call("reset", self.policy.target_layers)
        whole = (
            isinstance(found, Sequence)
            and all(is_whole(layer) and layer >= 0 for layer in found)
            and len(set(found)) == len(found)
        )
        known = set(self._csa_numbers) if self._was_reset else set()
        if not whole or (known and not known.issuperset(found)):
            numbers = list(self._csa_numbers)
            among = f" among the trace's, {numbers}" if numbers else ", from 0"
            raise PolicyError(
                f"policy {self.name}, reset: target_layers returned {short(found)}; it must return"
                f" a tuple of different CSA layers{among}"
            )
        return tuple(int(layer) for layer in found)

    def observe(self, step: int, obs: Observation) -> None:
        seen = Observation(*(read_only(getattr(obs, f.name)) for f in fields(obs)))
        self._call(f"step {step}", self.policy.observe, step, seen)

    def moved(self, step: int, loaded: np.ndarray, evicted: np.ndarray) -> None:
        self._call(f"step {step}", self.policy.moved, step, read_only(loaded), read_only(evicted))

    def prefetch(self, step: int) -> np.ndarray | None:
        """The pages that the policy asks for, if they are pages."""
        pages: np.ndarray | None = self._call(f"step {step}", self.policy.prefetch, step)
        fault = None if pages is None else self._not_pages(pages)
        if fault:
            raise PolicyError(f"policy {self.name}, step {step}: prefetch {fault}")
        return None if pages is None else np.asarray(pages)

    def _not_pages(self, pages: Any) -> str | None:
        """What is wrong with `pages` as rows of page numbers, or None."""
        if not is_array(pages) or pages.dtype.kind != "i":
            return "must return an array of integers, or None"
        if pages.ndim != 2 or len(pages) != self.ctx.n_groups:
            return f"has shape {pages.shape}; it must be [{self.ctx.n_groups}, n]"
        ranked = np.sort(pages, axis=1)
        if ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any():
            return "asks for a page twice"
        return None

    def wrote(self, step: int, pages: np.ndarray) -> None:
        self._call(f"step {step}", self.policy.wrote, step, read_only(pages))

    def decide(self, step: int) -> None:
        self._call(f"step {step}", self.policy.decide, step)

    def scored_entries(self, step: int) -> int:
        """How many entries were scored, if it is a number."""
        found = self._call(f"step {step}", self.policy.scored_entries, step)
        if not is_number(found) or not 0 <= found < 2**62:
            raise PolicyError(
                f"policy {self.name}, step {step}: scored_entries returned {short(found)}, no"
                " number of entries"
            )
        return int(found)

    def worth(self, step: int, pages: np.ndarray) -> np.ndarray:
        """The policy's worth, if it is one: right shape, right type, no NaN."""
        return self._checked(
            step, self._call(f"step {step}", self.policy.worth, step, read_only(pages)), pages.shape
        )

    def worth_of_first(self, step: int, n: int) -> np.ndarray:
        """The same of the first n pages."""
        return self._checked(
            step,
            self._call(f"step {step}", self.policy.worth_of_first, step, n),
            (self.ctx.n_groups, n),
        )

    def ahead(self, step: int, n: int) -> np.ndarray:
        """The same of a later decision's first n pages."""
        return self._checked(
            step, self._call(f"step {step}", self.policy.ahead, step, n), (self.ctx.n_groups, n)
        )

    def _checked(self, step: int, worth: Any, shape: tuple[int, ...]) -> np.ndarray:
        fault = fault_of(worth, shape)
        if fault:
            raise PolicyError(f"policy {self.name}, step {step}: worth {fault}")
        return np.asarray(worth)


def slots_of(policy: Policy, n_pages: int, **sizes: Any) -> int:
    """Slots in each group: from 1 to `n_pages`, whatever the policy answers."""
    found = called(f"policy {policy.name}: n_slots", policy.n_slots, n_pages, **sizes)
    if not is_whole(found):
        raise PolicyError(f"policy {policy.name}: n_slots returned {short(found)}, no whole number")
    if not 1 <= found <= max(1, n_pages):
        raise PolicyError(
            f"policy {policy.name}: n_slots returned {found}; it must be from 1 to {n_pages}, the"
            " pages that there are"
        )
    return int(found)


def called(where: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`method(...)`; whatever a plug-in raises, or its leaving, becomes a PolicyError that begins
    with `where` and ends with the line of the plug-in's file.
    """
    owner = method if inspect.isclass(method) else type(getattr(method, "__self__", None))
    try:
        return method(*args, **kwargs)
    except FmsimError:
        raise
    except (Exception, SystemExit) as error:  # whatever a plug-in raises
        if isinstance(error, SystemExit):
            what = f"called sys.exit({short(error.code)})"
        else:
            what = f"raised {type(error).__name__}: {shown(error)}"
        raise PolicyError(f"{where} {what}{line_in(owner.__module__, error)}") from error


def line_in(module: str, error: BaseException) -> str:
    """The deepest line of `module` that `error` came through, as " (FILE, line N)", or nothing."""
    lines = [
        (frame.f_code.co_filename, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == module
    ]
    return f" ({shown(Path(lines[-1][0]).name)}, line {lines[-1][1]})" if lines else ""


def read_only(array: Any) -> Any:
    """A view that cannot be written through; arrays of other libraries as they are."""
    if not isinstance(array, np.ndarray):
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def shown_context(ctx: Context) -> Context:
    """The context as a policy gets it: the trace's own arrays only to read."""

    def shown_states(
        of: Callable[[int], LookaheadState] | None,
    ) -> Callable[[int], LookaheadState] | None:
        if of is None:
            return None

        def state(number: int) -> LookaheadState:
            found = of(number)
            return replace(found, hidden=read_only(found.hidden), keys=read_only(found.keys))

        return state

    return replace(
        ctx,
        prompt_mass=read_only(ctx.prompt_mass),
        lookahead=shown_states(ctx.lookahead),
        newest_state=shown_states(ctx.newest_state),
        future=None if ctx.future is None else _ShownFuture(ctx.future),
    )


class _ShownFuture:
    """What is to come, only to read."""

    def __init__(self, future: Future) -> None:
        self.future = future
        self.never = future.never

    def window(self, step: int, horizon: int) -> tuple[Any, Any]:
        mass, used = self.future.window(step, horizon)
        return read_only(mass), read_only(used)

    def first_use(self) -> Any:
        return read_only(self.future.first_use())

    def next_use(self, step: int) -> Any:
        return read_only(self.future.next_use(step))


def is_number(value: Any) -> bool:
    """A number, NaN and bool aside."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return not math.isnan(value)


def is_whole(value: Any) -> bool:
    """A whole number, bool aside."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_array(value: Any) -> bool:
    """An array of numpy, all of whose elements count: none is masked."""
    return isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)


def fault_of(worth: Any, shape: tuple[int, ...]) -> str | None:
    """What is wrong with `worth` as an answer about pages of this shape, or None."""
    if not is_array(worth):
        return f"returned {type(worth).__name__}, not an array"
    if worth.shape != shape:
        return f"has shape {worth.shape}, but pages of shape {shape} were asked about"
    if worth.dtype.kind == "f":
        if worth.dtype != np.float32:
            return f"has dtype {worth.dtype}; it must be float32 or an integer"
        return "is NaN for some page" if np.isnan(worth).any() else None
    if worth.dtype.kind not in "iu":
        return f"has dtype {worth.dtype}; it must be float32 or an integer"
    if worth.size and (worth.min() < 0 or worth.max() >= 2**WORTH_BITS):
        return f"is outside [0, 2**{WORTH_BITS}), the range of an integer worth"
    return None
