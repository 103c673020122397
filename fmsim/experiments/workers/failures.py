"""What became of a policy that could not be run to its end, while the others' results stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fmsim.errors import BudgetTooSmall, DoesNotFit, FmsimError, PolicyError

Result = TypeVar("Result")

TIMEOUT_S = 3600.0  # a policy's run takes seconds or minutes


@dataclass(frozen=True)
class Failure:
    """A policy's label, and one line that names it and says what happened."""

    label: str
    error: str
    least_bytes: int | None = None  # on the GPU, where the policy's budget is below it
    fits: bool = True  # False where it needs more memory than is simulated

    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = {"policy": self.label, "error": self.error}
        if self.least_bytes is not None:
            found["least_gpu_bytes"] = self.least_bytes
        return found


def guarded(label: str, run: Callable[[], Result]) -> Result | Failure:
    """`run()`, or the failure of a policy that misbehaved, or whose KV does not fit.

    The user's own mistakes (a wrong parameter, say) still end the command.
    """
    try:
        return run()
    except BudgetTooSmall as error:
        return Failure(label, _named(label, error), error.least_bytes, fits=False)
    except (PolicyError, DoesNotFit) as error:
        return Failure(label, _named(label, error), fits=not isinstance(error, DoesNotFit))


def _named(label: str, error: FmsimError) -> str:
    """What went wrong, with the policy's label where the error does not say it."""
    return str(error) if label in str(error) else f"{label}: {error}"


def lost(label: str, why: str) -> Failure:
    """Of a policy whose worker process died, or took too long."""
    return Failure(label, f"policy {label}: {why}")


def raise_if_all(failures: tuple[Failure, ...], succeeded: int) -> None:
    """Raise PolicyError where nothing is left to report."""
    if failures and not succeeded:
        raise PolicyError("\n".join(dict.fromkeys(failure.error for failure in failures)))
