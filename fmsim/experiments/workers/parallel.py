"""Independent work in supervised processes: they share what the parent read, and end with it.

A worker that dies, or takes too long, costs its own item alone. What work prints goes to standard
error, so that a command's own output stays whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

from fmsim.errors import FmsimError

Item = TypeVar("Item")
Result = TypeVar("Result")

Told = Callable[[int, float], None]  # which item, and which share of it is done

_PR_SET_PDEATHSIG = 1  # of prctl(2)
TELL_EVERY_S = 0.1
# a worker's answers that are none yet
BEGUN = "begun"  # its time counts from now on
SHARE = "share"


class _Teller:
    """Passes on that a process has begun its item, and now and then which share of it is done."""

    def __init__(
        self,
        say: Callable[[float], None] | None = None,
        say_begun: Callable[[], None] | None = None,
    ) -> None:
        self.say = say
        self.say_begun = say_begun
        self.said_s = float("-inf")

    def begin(self) -> None:
        if self.say_begun is not None:
            self.say_begun()

    def tell(self, share: float) -> None:
        now_s = time.monotonic()
        if self.say is not None and now_s >= self.said_s + TELL_EVERY_S:
            self.said_s = now_s
            self.say(share)


_teller = _Teller()  # of the item that this process works on; it tells nobody at first


def tell(share: float) -> None:
    """Work that is done in parts says here which share is done; that may be often."""
    _teller.tell(share)


def begin() -> None:
    """Work that is `announced` says here that it is ready: its time counts from now on."""
    _teller.begin()


@contextlib.contextmanager
def _telling(
    say: Callable[[float], None] | None, say_begun: Callable[[], None] | None = None
) -> Iterator[None]:
    """While the block runs, what `tell` is told goes to `say`, and `begin` calls `say_begun`."""
    global _teller
    before = _teller
    _teller = _Teller(say, say_begun)
    try:
        yield
    finally:
        _teller = before


def one_by_one(
    work: Callable[[Item], Result], items: Iterable[Item], told: Told | None = None
) -> Iterator[Result]:
    """work(item) of each in this process; `told` as in `in_parallel`."""
    for index, item in enumerate(items):
        with _telling(None if told is None else partial(told, index)):
            result = work(item)
        if told is not None:
            told(index, 1.0)
        yield result


def in_parallel(
    work: Callable[[int], Result],
    n: int,
    lost: Callable[[int, str], Result] | None = None,
    timeout_s: float | None = None,
    told: Told | None = None,
) -> Iterator[Result]:
    """work(0), ..., work(n - 1), in order, each as soon as it and those before it are there.

    On Linux they run in forked processes, which share the parent's arrays; elsewhere one after
    another in this one. An exception that `work` raises is raised here. `lost(i, why)` is the
    result where a worker died or worked longer than `timeout_s`; without it that is an FmsimError.
    `told(i, share)` hears what work says with `tell`, and 1.0 at its end.
    """
    if sys.platform != "linux":
        with contextlib.redirect_stdout(sys.stderr):
            yield from one_by_one(work, range(n), told)
        return
    early: dict[int, Result] = {}
    place = 0
    for index, result in _supervised(work, range(n), cores(), "fork", lost, timeout_s, told):
        early[index] = result
        while place in early:
            yield early.pop(place)
            place += 1


def as_they_end(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    jobs: int | None = None,
    start_method: str | None = None,
    lost: Callable[[Item, str], Result] | None = None,
    timeout_s: float | None = None,
    told: Told | None = None,
    announced: bool = False,
) -> Iterator[Result]:
    """work(item) of each, as each ends, in `jobs` processes (one a core by default).

    `start_method` is multiprocessing's; "spawn" for work on a GPU, whose driver does not outlive a
    fork. `lost`, `timeout_s` and `told` as in `in_parallel`. `timeout_s` counts from when a process
    has its item, or, where work is `announced`, from its `begin`.
    """
    found = _supervised(
        work, items, jobs or cores(), start_method, lost, timeout_s, told, announced
    )
    for _, result in found:
        yield result


def alone(
    work: Callable[[Item], Result],
    item: Item,
    lost: Callable[[Item, str], Result],
    timeout_s: float | None = None,
    told: Told | None = None,
    announced: bool = False,
) -> Result:
    """work(item) in a new process, which may use the GPU: for a policy that is not fmsim's own.

    `lost`, `timeout_s` and `told` as in `in_parallel`, `announced` as in `as_they_end`.
    """
    [result] = as_they_end(work, [item], 1, "spawn", lost, timeout_s, told, announced)
    return result


def on_ray(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The same on a Ray cluster: the one at RAY_ADDRESS, or this machine's own. fmsim and the files
    must be on every node.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise FmsimError(
            "--engine ray: ray is not installed; pip install 'fmsim[ray]', or leave --engine out"
        ) from None
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="warning")
    try:
        task = ray.remote(work)
        waiting = [task.remote(item) for item in items]
        while waiting:
            [ended], waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(ended)
    finally:
        ray.shutdown()


class _WorkerTraceback(Exception):
    """Where a worker's exception came from; shown by `fmsim --debug`."""


class _Worker:
    """A process that works on one item after another."""

    def __init__(
        self,
        context: Any,
        work: Callable[[Any], Any],
        timeout_s: float | None,
        announced: bool,
    ) -> None:
        self.connection, theirs = context.Pipe()
        arguments = (work, theirs, os.getpid(), announced)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.timeout_s = timeout_s or float("inf")
        self.index = -1
        self.item: Any = None
        self.ends_s = float("inf")

    def give(self, index: int, item: Any) -> None:
        self.index = index
        self.item = item
        self.ends_s = float("inf")
        with contextlib.suppress(OSError):  # a worker that died is found when its answer is read
            self.connection.send(item)

    def begins(self) -> None:
        """Its time runs from now on."""
        self.ends_s = time.monotonic() + self.timeout_s

    def answer(self) -> tuple[str, Any, str] | None:
        """What it sent, or None where it died instead."""
        try:
            found: tuple[str, Any, str] = self.connection.recv()
            return found
        except (EOFError, OSError):
            return None

    def how_it_ended(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            hint = "; was there enough memory?" if -code == signal.SIGKILL else ""
            return f"its process was killed by {signal.Signals(-code).name}{hint}"
        return f"its process left with exit code {code} and no result"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _supervised(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    jobs: int,
    start_method: str | None,
    lost: Callable[[Item, str], Result] | None,
    timeout_s: float | None,
    told: Told | None,
    announced: bool = False,
) -> Iterator[tuple[int, Result]]:
    """(index, result) of each item, as they end."""
    context = multiprocessing.get_context(start_method)
    left = enumerate(items)
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while True:
            while len(busy) < jobs and (following := next(left, None)) is not None:
                worker = idle.pop() if idle else _Worker(context, work, timeout_s, announced)
                worker.give(*following)
                busy.append(worker)
            if not busy:
                return
            for worker, answer in _next_answers(busy):
                if answer[0] == BEGUN:
                    worker.begins()
                    continue
                if answer[0] == SHARE:
                    if told is not None:
                        told(worker.index, answer[1])
                    continue
                busy.remove(worker)
                if told is not None:
                    told(worker.index, 1.0)
                if isinstance(answer, str):
                    worker.end()
                    if lost is None:
                        raise FmsimError(f"a worker was lost: {answer}; run it again")
                    yield worker.index, lost(worker.item, answer)
                    continue
                idle.append(worker)
                kind, value, text = answer
                if kind == "raised":
                    raise value from _WorkerTraceback(f"\n{text}")
                yield worker.index, value
    finally:
        for worker in [*idle, *busy]:
            worker.end()


def _next_answers(busy: Sequence[_Worker]) -> Iterator[tuple[_Worker, tuple[str, Any, str] | str]]:
    """Wait until some worker has answered, died, or run out of time; for these their answers, or
    what became of them.
    """
    soonest_s = min(worker.ends_s for worker in busy)
    wait_s = None if soonest_s == float("inf") else max(0.0, soonest_s - time.monotonic())
    ready = wait([worker.connection for worker in busy], wait_s)
    for worker in list(busy):
        if worker.connection in ready:
            answer = worker.answer()
            yield worker, worker.how_it_ended() if answer is None else answer
        elif worker.ends_s <= time.monotonic():
            yield worker, "it took longer than its time limit (--policy-timeout)"


def _serve(
    work: Callable[[Any], Any], connection: Connection, parent: int, announced: bool
) -> None:
    """A worker's life: items in, answers out, until the parent has no more."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent deals with Ctrl-C, and ends workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout.flush()
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    begun = partial(connection.send, (BEGUN, None, ""))
    while True:
        try:
            item = connection.recv()
            if not announced:
                begun()
        except (EOFError, OSError):
            _leave()
        try:
            with _telling(lambda share: connection.send((SHARE, share, "")), begun):
                answer = ("done", work(item), "")
        except Exception as error:
            answer = ("raised", _portable(error), traceback.format_exc())
        try:
            connection.send(answer)
        except BrokenPipeError:
            _leave()


def _leave() -> NoReturn:
    sys.stderr.flush()
    os._exit(0)  # without the parent's exit handlers


def _portable(error: Exception) -> Exception:
    """The exception, or one that says the same, where it does not survive a pipe."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with(parent: int) -> None:
    """A worker whose parent was killed must not live on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
