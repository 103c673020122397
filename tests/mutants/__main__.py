"""Which small mutations of fmsim's core no test notices.

    python -m tests.mutants --seed 1 --count 400 -j 14 --json out.jsonl

Mutations are drawn by the seed from all that `mutations.py` finds in replay, sim, policies and
indexer. First every near test runs once, unchanged, and the lines it reaches are noted. Then each
mutant meets the tests that reach it, the nearest files and the quickest tests first, until one
fails. It has a process, a copy of the tree and a time limit of its own; a test that never ends
kills it too. Needs Linux, no network and no GPU; Python 3.12 notes lines, an older one functions,
which takes longer; `--save-reach` keeps what was noted, for `--reach` of another machine. The same
seed gives the same mutants. Outcomes are written as they come, behind a line that says which tests
were left out, for they fail or are skipped without a mutation.

It is a script of ours and no library, because a fork of a process that has imported torch and
pytest starts a mutant's tests in a fraction of a second, and each mutant runs in a copy.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import ctypes
import importlib
import json
import os
import py_compile
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the GPU is another's
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

from tests.mutants.mutations import Mutation, every
from tests.mutants.near import Near, file_of
from tests.mutants.reach import Chosen, Reach

ROOT = Path(__file__).parents[2]
# Rooms, in the order of the table; the first that fits a file is its room.
ROOMS = {
    "replay": "fmsim/replay",
    "serving": "fmsim/sim/serving",
    "sim": "fmsim/sim",
    "policies": "fmsim/policies",
    "indexer": "fmsim/indexer",
}
NEAR = ("replay", "sim", "policies", "indexer", "testing", "experiments", "test_api.py")
PARTS = {  # files that take long without a mutation are noted by several processes
    "tests/policies/test_builtin.py": 10,
    "tests/experiments/test_misbehaving.py": 6,
    "tests/testing/test_checks.py": 6,
    "tests/test_api.py": 5,
    "tests/experiments/test_sweep.py": 4,
    "tests/experiments/test_run.py": 3,
    "tests/experiments/test_tune.py": 3,
    "tests/indexer/test_train.py": 3,
    "tests/replay/test_libcachesim.py": 3,
    "tests/sim/serving/capacity/test_plan.py": 3,
    "tests/experiments/captures/test_captured.py": 2,
    "tests/experiments/test_serve.py": 2,
    "tests/experiments/test_validate_every_policy.py": 2,
    "tests/policies/test_examples.py": 2,
    "tests/sim/serving/test_prefix.py": 2,
    "tests/testing/test_new_plugin.py": 2,
}
COPIED = ("fmsim", "tests", "scenarios", "traces", "docs", "benchmarks", "pyproject.toml")
LINKED_BYTES = 200_000  # larger files are linked, not copied; no test writes into one
PRELOADED = (
    "numpy torch safetensors.numpy pydantic simpy yaml typer rich.table array_api_compat.torch"
    " array_api_compat.numpy ml_dtypes hypothesis unittest.mock triton transformers.modeling_utils"
)
LEAST_S = 30.0  # time limit of a mutant whose tests take no time
SLOWER = 6.0  # a mutant's tests may take so much longer than without it
MEMORY = 32 * 2**30
TICK_S = 0.02
DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass
class Outcome:
    """What became of a mutant."""

    mutation: Mutation
    room: str
    state: str  # killed, timed out, survived, unreached; unfinished where the run was cut
    by: str  # the test that noticed
    n_tests: int
    seconds: float


@dataclass
class Child:
    """A forked process, in a process group of its own."""

    pid: int
    copy: Path
    ends_s: float
    began_s: float
    done: Callable[[int | None], None]  # is told the exit code, or None where time ran out


@dataclass
class Outcomes:
    """What became of the mutants so far, told as it comes."""

    sources: dict[str, str]
    n_drawn: int
    out: IO[str] | None
    all: list[Outcome] = field(default_factory=list)

    def note(self, mutation: Mutation, state: str, by: str, n_tests: int, seconds: float) -> None:
        room = next(name for name, folder in ROOMS.items() if mutation.path.startswith(folder))
        outcome = Outcome(mutation, room, state, by, n_tests, round(seconds, 2))
        self.all.append(outcome)
        diff = mutation.diff(self.sources[mutation.path])
        self.write(asdict(outcome) | {"diff": diff})
        if state not in ("killed", "timed out"):
            print(f"\n{state} ({n_tests} tests) {diff}", flush=True)
        if len(self.all) % 50 == 0:
            print(f"... {len(self.all)} of {self.n_drawn}", flush=True)

    def write(self, row: dict[str, Any]) -> None:
        if self.out:
            self.out.write(json.dumps(row) + "\n")
            self.out.flush()


def main() -> None:
    given = _arguments()
    os.nice(given.nice)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    began = time.monotonic()
    sources = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for folder in ROOMS.values()
        for path in (ROOT / folder).rglob("*.py")
    }
    mutations = [one for one in every(sources) if given.only in one.path]
    drawn = _survivors(Path(given.again), mutations, sources) if given.again else []
    fresh = random.Random(given.seed).sample(mutations, min(given.count, len(mutations)))
    print(f"Of {len(mutations)} mutations {len(drawn)} are met again, {len(fresh)} are drawn")
    drawn += [one for one in fresh if one not in drawn]
    _preload()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fmsim-mutants-"))
        out = stack.enter_context(open(given.json, "w", encoding="utf-8")) if given.json else None
        outcomes = Outcomes(sources, len(drawn), out)
        stack.callback(lambda: _table(outcomes.all, time.monotonic() - began))
        copies = _copies(Path(folder), given.jobs)
        near = Near()
        for path in given.reach:
            near.load(Path(path))
        if not given.reach:
            near = _near_tests(copies, given.near, given.near_seconds, began + given.seconds)
        if given.save_reach:
            near.save(Path(given.save_reach))
        outcomes.write(vars(given) | {"tests": near.seconds, "left_out": near.left_out})
        print(
            f"{len(near.seconds)} tests pass without a mutation, {len(near.left_out)} are left out"
            f" ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        _meet(drawn, outcomes, near, copies, began + given.seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="mutants to draw; 100, or with --again none")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", default="", help="files whose path holds this, alone")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="end after this time; what runs is unfinished"
    )
    parser.add_argument("--near", nargs="+", default=NEAR, help="folders and files of tests")
    parser.add_argument(
        "--near-seconds", type=float, default=1200.0, help="tests of slower files are left out"
    )
    parser.add_argument("--reach", nargs="+", default=(), help="what --save-reach wrote")
    parser.add_argument("--save-reach", help="file for what the tests reach")
    parser.add_argument("--again", help="a file of outcomes: first what survived there")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--json", help="file for all outcomes, a line each")
    given = parser.parse_args()
    if given.count is None:
        given.count = 0 if given.again else 100
    return given


def _survivors(
    path: Path, mutations: Sequence[Mutation], sources: dict[str, str]
) -> list[Mutation]:
    """Of an earlier run, known again by their function and lines, wherever these stand now."""

    def known(diff: str) -> tuple[str, ...]:
        head, _, *lines = diff.split("\n")
        return (re.sub(r":\d+ ", " ", head, count=1), *lines)

    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()[1:])
    survived = {known(row["diff"]) for row in rows if row["state"] in ("survived", "unreached")}
    return [one for one in mutations if known(one.diff(sources[one.path])) in survived]


def _preload() -> None:
    """What every child would import, but for fmsim itself."""
    for name in PRELOADED.split():
        with contextlib.suppress(Exception):  # a child that needs it says what is wrong
            importlib.import_module(name)


def _copies(folder: Path, jobs: int) -> list[Path]:
    """Trees of the project, a process each; compiled once."""
    first = _copy(folder / "copy0")
    others = [folder / f"copy{number}" for number in range(1, jobs)]
    for place in others:
        shutil.copytree(first, place, copy_function=_link_or_copy)
    return [first, *others]


def _copy(folder: Path) -> Path:
    """A tree of its own, compiled so that a changed source is noticed by its content."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results", "fuzz", "mutants")
            shutil.copytree(source, folder / name, ignore=ignored, copy_function=_link_or_copy)
        elif source.exists():
            shutil.copy(source, folder / name)
    for path in ROOT.glob("*.md"):
        shutil.copy(path, folder)
    for path in ROOT.glob("fmsim-*.dist-info"):  # where fmsim lies on the path, not installed
        shutil.copytree(path, folder / path.name)
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(folder / "fmsim", quiet=2, invalidation_mode=mode)
    return folder


def _link_or_copy(source: str, target: str) -> None:
    if os.path.getsize(source) > LINKED_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            pass
    shutil.copy2(source, target)


def _near_tests(copies: list[Path], folders: Sequence[str], limit_s: float, ends_s: float) -> Near:
    """Run the near tests once, unchanged; those that pass count. `limit_s`: of one file."""
    files: list[str] = []
    for name in folders:
        place = ROOT / "tests" / name
        paths = sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
        files += [str(path.relative_to(ROOT)) for path in paths]
    parts = [(name, part) for name in files for part in range(PARTS.get(name, 1))]
    near = Near()
    todo = iter(sorted(parts, key=lambda one: one[0] not in PARTS))  # the long ones first

    def start(copy: Path) -> Child | None:
        name, part = next(todo, ("", 0))
        if not name:
            return None
        out = copy / "reach.json"
        out.unlink(missing_ok=True)

        def done(code: int | None) -> None:
            if code not in (0, 5):
                text = (copy / "log").read_text(errors="replace")[-1500:]
                print(f"{name} fails without a mutation, exit code {code}:\n{text}", flush=True)
            if out.exists():
                near.add(json.loads(out.read_text(encoding="utf-8")))
            else:
                near.left_out.append(name)

        of = PARTS.get(name, 1)
        plugin = lambda: Reach(copy, list(ROOMS.values()), out, part, of)
        return _fork(copy, [[name]], plugin, limit_s, done)

    _run(copies, start, ends_s)
    return near


def _meet(
    mutations: list[Mutation], outcomes: Outcomes, near: Near, copies: list[Path], ends_s: float
) -> None:
    """Let every mutant meet its tests, until the time is over."""
    todo = iter(mutations)

    def start(copy: Path) -> Child | None:
        for mutation in todo:
            tests = near.of(mutation)
            if tests:
                return _mutant(copy, mutation, tests, near, outcomes)
            outcomes.note(mutation, "unreached", "", 0, 0.0)
        return None

    _run(copies, start, ends_s)


def _mutant(
    copy: Path,
    mutation: Mutation,
    tests: list[str],
    near: Near,
    outcomes: Outcomes,
) -> Child:
    source = outcomes.sources[mutation.path]
    limit_s = LEAST_S + SLOWER * sum(near.seconds[test] for test in tests)
    place = copy / mutation.path
    place.write_text(mutation.apply(source), encoding="utf-8")
    killer = copy / "killer"
    killer.unlink(missing_ok=True)
    began = time.monotonic()

    def done(code: int | None) -> None:
        place.write_text(source, encoding="utf-8")
        by = killer.read_text(encoding="utf-8") if killer.exists() else ""
        seconds = time.monotonic() - began
        if code is None:
            state = "timed out" if seconds > limit_s else "unfinished"
        else:
            state = "killed" if code else "survived"
        outcomes.note(mutation, state, by, len(tests), seconds)

    files = dict.fromkeys(map(file_of, tests))  # a file that is not needed is not even read
    return _fork(
        copy, [[name, "-x"] for name in files], lambda: Chosen(tests, killer), limit_s, done
    )


def _fork(
    copy: Path,
    runs: list[list[str]],
    plugin: Callable[[], Any],
    limit_s: float,
    done: Callable[[int | None], None],
) -> Child:
    """A child that runs pytest in the copy, with fmsim imported from there, until a run fails."""
    sys.stdout.flush()
    pid = os.fork()
    now = time.monotonic()
    if pid:
        return Child(pid, copy, now + limit_s, now, done)
    code = 3
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(copy)
        sys.dont_write_bytecode = True
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "fmsim")]:
            del sys.modules[name]
        here = {"", str(ROOT)}
        sys.path[:] = [str(copy), *(path for path in sys.path if path not in here)]
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(copy), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.environ["XDG_CACHE_HOME"] = str(copy / "cache")
        options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain", "--tb=short"]
        temporary = f"--basetemp={copy / 'tmp'}"
        random.seed(0)
        for arguments in runs:
            code = int(pytest.main([*arguments, *options, temporary], plugins=[plugin()]))
            if code not in (0, 5):
                break
            code = 0
    finally:
        os._exit(code)


def _run(copies: list[Path], start: Callable[[Path], Child | None], ends_s: float) -> None:
    """Keep every copy at work until `start` has nothing left or the time is over."""
    free = list(copies)
    busy: list[Child] = []
    more = True
    try:
        while more or busy:
            over = time.monotonic() > ends_s
            while more and free and not over:
                child = start(free[-1])
                more = child is not None
                if child is not None:
                    free.pop()
                    busy.append(child)
            for child in list(busy):
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                late = over or time.monotonic() > child.ends_s
                if not pid and not late:
                    continue
                _end(child)
                if not pid:
                    os.waitpid(child.pid, 0)
                busy.remove(child)
                free.append(child.copy)
                child.done(os.waitstatus_to_exitcode(status) if pid else None)
            if over:
                return
            time.sleep(TICK_S)
    finally:
        for child in busy:
            _end(child)


def _end(child: Child) -> None:
    """Kill it, with all that it started."""
    for kill in (os.killpg, os.kill):  # one that has no group of its own yet, too
        with contextlib.suppress(ProcessLookupError):
            kill(child.pid, signal.SIGKILL)


def _table(outcomes: list[Outcome], seconds: float) -> None:
    unfinished = sum(one.state == "unfinished" for one in outcomes)
    print(
        f"\n{'room':10} {'mutants':>8} {'killed':>8} {'timed out':>10} {'survived':>9} {'died':>7}"
    )
    for room in [*ROOMS, "all"]:
        states = [
            one.state for one in outcomes if room in ("all", one.room) and one.state != "unfinished"
        ]
        if not states:
            continue
        killed, late = states.count("killed"), states.count("timed out")
        survived = len(states) - killed - late
        share = (killed + late) / len(states)
        print(f"{room:10} {len(states):8} {killed:8} {late:10} {survived:9} {share:7.1%}")
    print(f"{seconds:.0f} s; {unfinished} unfinished and not counted", flush=True)


if __name__ == "__main__":
    main()
