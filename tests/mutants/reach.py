"""Plugins of pytest: which lines each test reaches, and a run of chosen tests alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest


class Reach:
    """Writes, for every test that passes, its time and what it ran below `folders`.

    These are functions, as "path:Class.function", and lines, as "path:7"; before Python 3.12
    functions alone, for there lines cost too much.
    What a fixture ran counts for every test of the file: the fixture may be made once for all.
    Only each `of`th test runs, from number `part`.
    """

    def __init__(self, root: Path, folders: list[str], out: Path, part: int, of: int) -> None:
        self.part = part
        self.of = of
        self.root = f"{root}/"
        self.folders = tuple(f"{root}/{folder}/" for folder in folders)
        self.out = out
        self.tests: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, None] = {}
        self.shared: set[str] = set()  # what fixtures and the import of the file ran
        self.seen = self.shared
        self._watch()

    def _watch(self) -> None:
        if sys.version_info >= (3, 12):
            watch = sys.monitoring
            watch.use_tool_id(watch.PROFILER_ID, "mutants")
            watch.register_callback(watch.PROFILER_ID, watch.events.PY_START, self._began)
            watch.register_callback(watch.PROFILER_ID, watch.events.LINE, self._at_line)
            watch.set_events(watch.PROFILER_ID, watch.events.PY_START)
            return

        def on_call(frame: FrameType, event: str, arg: Any) -> None:
            if event == "call":
                self._ran(frame.f_code)

        sys.setprofile(on_call)

    def _began(self, code: CodeType, at: int) -> Any:
        watch = sys.monitoring
        if self._ran(code):
            watch.set_local_events(watch.PROFILER_ID, code, watch.events.LINE)
        return watch.DISABLE

    def _at_line(self, code: CodeType, line: int) -> Any:
        self.seen.add(f"{code.co_filename.removeprefix(self.root)}:{line}")
        return sys.monitoring.DISABLE

    def _ran(self, code: CodeType) -> bool:
        ours = code.co_filename.startswith(self.folders)
        if ours:
            path = code.co_filename.removeprefix(self.root)
            self.seen.add(f"{path}:{code.co_qualname.partition('.<locals>')[0]}")
        return ours

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.part :: self.of]

    def _into(self, seen: set[str]) -> None:
        self.seen = seen
        if sys.version_info >= (3, 12):
            sys.monitoring.restart_events()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        self._into(self.shared)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        own: set[str] = set()
        self._into(own)
        began_s = _cpu_s()
        result = yield  # raises where the test fails: it is not noted
        seconds = _cpu_s() - began_s
        self.tests[item.nodeid] = {"seconds": round(seconds, 4), "reached": sorted(own)}
        self._into(self.shared)
        return result

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.left_out[report.nodeid] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.left_out[report.nodeid] = None
            self.tests.pop(report.nodeid, None)  # its teardown failed

    def pytest_sessionfinish(self) -> None:
        found = {
            "tests": self.tests,
            "shared": sorted(self.shared),
            "left_out": list(self.left_out),
        }
        self.out.write_text(json.dumps(found), encoding="utf-8")


def _cpu_s() -> float:
    """Of this process and of those that it waited for: a busy machine changes it little."""
    return sum(os.times()[:4])


class Chosen:
    """Runs the tests `wanted`, in their order; writes the first one that fails."""

    def __init__(self, wanted: list[str], out: Path) -> None:
        self.place = {name: at for at, name in enumerate(wanted)}
        self.out = out

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(chosen, key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.out.write_text(report.nodeid, encoding="utf-8")
