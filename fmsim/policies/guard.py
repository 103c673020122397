"""Turns a policy's faults into one clear error that names the policy and the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from fmsim.arrays import WORTH_BITS
from fmsim.errors import FmsimError
from fmsim.policies.base import Context, Observation, Pins, Policy


class Guarded:
    """A policy whose every answer is checked.

    For numpy only: on a GPU the checks would wait for the device.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name, self.params = policy, policy.name, policy.params

    @property
    def evidence(self) -> str:
        return self.policy.evidence

    @property
    def floor(self) -> float | None:
        return self.policy.floor

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

    def n_slots(self, n_pages: int, **sizes: Any) -> int:
        slots: int = self._call("reset", self.policy.n_slots, n_pages, **sizes)
        return slots

    def layer_shares(self, n_layers: int) -> Sequence[float] | None:
        shares: Sequence[float] | None = self._call("reset", self.policy.layer_shares, n_layers)
        return shares

    def target_layers(self) -> tuple[int, ...]:
        layers: tuple[int, ...] = self._call("reset", self.policy.target_layers)
        return layers

    def _call(self, where: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except FmsimError:
            raise
        except Exception as error:  # whatever a plug-in raises
            raise FmsimError(
                f"policy {self.name}, {where}: {method.__name__} raised {type(error).__name__}:"
                f" {error}"
            ) from error

    def reset(self, ctx: Context) -> None:
        self.ctx = ctx
        if ctx.prompt_mass is not None:
            ctx = replace(ctx, prompt_mass=read_only(ctx.prompt_mass))
        self._call("reset", self.policy.reset, ctx)

    def pins(self) -> Pins:
        pins: Pins = self._call("reset", self.policy.pins)
        return pins

    def observe(self, step: int, obs: Observation) -> None:
        shown = Observation(*(read_only(getattr(obs, f.name)) for f in fields(obs)))
        self._call(f"step {step}", self.policy.observe, step, shown)

    def moved(self, step: int, loaded: np.ndarray, evicted: np.ndarray) -> None:
        self._call(f"step {step}", self.policy.moved, step, read_only(loaded), read_only(evicted))

    def prefetch(self, step: int) -> np.ndarray | None:
        """The pages that the policy asks for, if they are pages."""
        pages: np.ndarray | None = self._call(f"step {step}", self.policy.prefetch, step)
        fault = None if pages is None else self._not_pages(pages)
        if fault:
            raise FmsimError(f"policy {self.name}, step {step}: prefetch {fault}")
        return pages

    def _not_pages(self, pages: Any) -> str | None:
        """What is wrong with `pages` as rows of page numbers, or None."""
        if not isinstance(pages, np.ndarray) or pages.dtype.kind != "i":
            return "must return an array of integers, or None"
        if pages.ndim != 2 or len(pages) != self.ctx.n_groups:
            return f"has shape {pages.shape}; it must be [{self.ctx.n_groups}, n]"
        ranked = np.sort(pages, axis=1)
        if ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any():
            return "asks for a page twice"
        return None

    def wrote(self, step: int, pages: np.ndarray) -> None:
        self._call(f"step {step}", self.policy.wrote, step, pages)

    def decide(self, step: int) -> None:
        self._call(f"step {step}", self.policy.decide, step)

    def scored_entries(self, step: int) -> int:
        scored: int = self._call(f"step {step}", self.policy.scored_entries, step)
        return scored

    def worth(self, step: int, pages: np.ndarray) -> np.ndarray:
        """The policy's worth, if it is one: right shape, right type, no NaN."""
        return self._checked(
            step, self._call(f"step {step}", self.policy.worth, step, pages), pages.shape
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
            raise FmsimError(f"policy {self.name}, step {step}: worth {fault}")
        checked: np.ndarray = worth
        return checked


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def fault_of(worth: Any, shape: tuple[int, ...]) -> str | None:
    """What is wrong with `worth` as an answer about pages of this shape, or None."""
    if not isinstance(worth, np.ndarray):
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
