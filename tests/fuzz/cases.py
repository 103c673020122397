"""Damaged inputs by class, and what fmsim may answer to them.

A case is made from (class, seed) alone. Whatever it is, fmsim ends with exit code 0, 1 or 2 within
20 s and 2 GiB, in its own words: no traceback, no "bug in fmsim", no NaN in its JSON.
"""

from __future__ import annotations

import contextlib
import random
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fmsim.experiments.workers import parallel
from fmsim.files import strict_json
from tests.fuzz.classes import CLASSES
from tests.fuzz.sound import Sound, fmsim_here

MOST_SECONDS = 20
MOST_MIB = 2048


class TooLong(BaseException):
    """A case did not end in time; no exception that fmsim would take for one of its own."""


class Bench:
    """A folder with sound inputs, and the cases made from them."""

    def __init__(self, folder: Path) -> None:
        self.sound = Sound(folder)

    def run(self, kind: str, seed: int, workers: bool = True) -> str | None:
        """What is wrong with fmsim's answer to a case, or None.

        Without `workers` a case's policies run in this process: to fork one that has loaded torch
        takes several times as long as the rest of a case.
        """
        chance = random.Random(f"{kind} {seed}")
        arguments = CLASSES[kind](self.sound, chance)
        case = f"{kind} {seed}"
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(MOST_SECONDS)
        _forget_peak()
        children_mib = _children_mib()
        try:
            with warnings.catch_warnings(), contextlib.ExitStack() as stack:
                warnings.simplefilter("ignore")
                if not workers:
                    stack.enter_context(mock.patch.object(parallel, "_supervised", _one_by_one))
                done = fmsim_here(*arguments, folder=self.sound.folder)
        except TooLong:
            return f"{case}: takes longer than {MOST_SECONDS} s: {arguments}"
        except BaseException as error:
            return f"{case}: {type(error).__name__}: {error}: {arguments}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        mib = max(_peak_mib(), _children_mib() if _children_mib() > children_mib else 0)
        if mib > MOST_MIB:
            return f"{case}: takes {mib} MiB: {arguments}"
        if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr:
            return f"{case}: exit code {done.returncode}: {done.stderr[-300:]}: {arguments}"
        if done.returncode != 0 and not done.stderr:
            return f"{case}: exit code {done.returncode} without a word: {arguments}"
        if "\x1b" in done.stderr + done.stdout:
            return f"{case}: prints an escape sequence: {arguments}"
        if done.returncode == 0 and "--json" in arguments:
            try:
                strict_json.parse(done.stdout, "output")
            except Exception as error:
                return f"{case}: {error}: {arguments}"
        return None


def _one_by_one(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    jobs: int,
    start_method: str | None,
    lost: object,
    timeout_s: float | None,
    told: parallel.Told | None,
    announced: bool = False,
) -> Iterator[tuple[int, Any]]:
    """`parallel._supervised` without processes: none is lost, or ended after a time."""
    with contextlib.redirect_stdout(sys.stderr):
        yield from enumerate(parallel.one_by_one(work, items, told))


def _too_long(number: int, frame: object) -> None:
    raise TooLong


def _forget_peak() -> None:
    """Let the kernel count this process's peak of memory anew."""
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> int:
    """Of memory that this process held since `_forget_peak`; 0 where nobody says."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) // 1024 if found else 0


def _children_mib() -> int:
    """The most that an ended worker held."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
