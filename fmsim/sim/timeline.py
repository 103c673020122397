"""When each step of a decode ran, and what it waited for: simulated or measured."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmsim.errors import FmsimError
from fmsim.files import strict_json, write_text
from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, read_json


class Transfer(NamedTuple):
    """Bytes on one direction of the link, from the gather's start (or the copy's) to its end.

    `kind` is "recall", "write_back", or "misses": of one layer, or of all layers of a step where
    they had the link alone. `step` is the decode step that asked for it; of a recall, the step that
    its window begins with.
    """

    kind: str
    step: int
    start_s: float
    end_s: float
    n_bytes: float


@dataclass(frozen=True)
class Timeline:
    """Of a batch: arrays [T], in seconds from the first step's start, and bytes."""

    batch: int
    start_s: np.ndarray
    end_s: np.ndarray
    # Waiting for misses inside the step; nan where they are loaded within a CUDA graph, which
    # tells no parts of its time.
    stall_s: np.ndarray
    recall_wait_s: np.ndarray  # waiting for a recall that was not there when its window began
    h2d_bytes: np.ndarray  # asked for by this step's misses and by the decision it begins with

    def __repr__(self) -> str:
        """One line: the arrays would take pages."""
        return f"<{type(self).__name__}: {len(self.start_s)} steps, batch {self.batch}>"

    @property
    def step_s(self) -> np.ndarray:
        step_s: np.ndarray = self.end_s - self.start_s
        return step_s

    def after(self, steps: int) -> Timeline:
        """Of the steps after the first `steps`."""
        return Timeline(
            self.batch,
            self.start_s[steps:],
            self.end_s[steps:],
            self.stall_s[steps:],
            self.recall_wait_s[steps:],
            self.h2d_bytes[steps:],
        )


@dataclass(frozen=True, repr=False)
class SimulatedTimeline(Timeline):
    """A simulated one, with all that the simulation knows."""

    policy: str
    hardware: str
    model: str
    d2h_bytes: np.ndarray  # write-back of entries closed since the last one
    kv_bytes: np.ndarray  # of one request, logical: the full cache's times the kept share of CSA
    transfers: tuple[Transfer, ...]  # that ended within the decode

    def save(self, path: str | Path) -> None:
        """Write JSON; it appears whole or not at all."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }
        write_text(Path(path), strict_json.dump(plain))

    def check(self) -> None:
        """Raise ValueError where a field is of another kind than the class says."""
        if type(self.batch) is not int or self.batch < 1:
            raise ValueError("batch is no count")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "np.ndarray" and (
                not isinstance(value, np.ndarray)
                or value.dtype.kind not in "iuf"
                or value.shape != (len(self.end_s),)
                or not len(value)
            ):
                raise ValueError(f"{f.name} is no array of a number a step")
            if f.type == "str" and not isinstance(value, str):
                raise ValueError(f"{f.name} is no text")
        for transfer in self.transfers:
            if not isinstance(transfer.kind, str) or not all(
                isinstance(number, (int, float)) for number in transfer[1:]
            ):
                raise ValueError("a transfer is not one")

    @classmethod
    def load(cls, path: str | Path) -> SimulatedTimeline:
        """Read what `save` wrote.

        Raises FmsimError for a file that is missing, truncated or foreign.
        """
        try:
            plain = read_json(Path(path), MOST_BYTES_OF_RESULTS)
            transfers = tuple(Transfer(*transfer) for transfer in plain.pop("transfers"))
            values: dict[str, Any] = {
                name: np.array(value) if isinstance(value, list) else value
                for name, value in plain.items()
            }
            found = cls(**values, transfers=transfers)
            found.check()
            return found
        except FileNotFoundError:
            raise FmsimError(f"{path}: no such timeline file") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FmsimError(
                f"{path}: not a whole fmsim timeline ({error}); run the scenario again with --out"
            ) from None
