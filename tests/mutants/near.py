"""The tests near the core, and which of them a mutant meets."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mutants.mutations import Mutation

MOST_TESTS_S = 30.0  # of tests that pass, a mutant meets at most so many seconds


@dataclass
class Near:
    """The tests, and what they reach."""

    seconds: dict[str, float] = field(default_factory=dict)  # by test
    by_place: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    by_path: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    left_out: list[str] = field(default_factory=list)  # fail or are skipped, or a file that died

    def add(self, found: dict[str, Any]) -> None:
        self.left_out += found["left_out"]
        for test, about in found["tests"].items():
            self.seconds[test] = about["seconds"]
            reached = {*about["reached"], *found["shared"]}
            for place in reached:
                self.by_place[place].append(test)
            for path in {place.partition(":")[0] for place in reached}:
                self.by_path[path].append(test)

    def save(self, path: Path) -> None:
        """Write what is known, packed; lines are those of the sources as they are now."""
        numbers = {test: number for number, test in enumerate(self.seconds)}
        by_place = {
            place: sorted(numbers[test] for test in set(tests))
            for place, tests in self.by_place.items()
        }
        known = {"seconds": self.seconds, "left_out": self.left_out, "by_place": by_place}
        with gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump(known, file)

    def load(self, path: Path) -> None:
        """Add what `save` wrote; it says anew what the tests of its files reach."""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            known = json.load(file)
        tests = list(known["seconds"])
        again = {file_of(test) for test in (*tests, *known["left_out"])}
        for by in (self.by_place, self.by_path):
            for place, old in by.items():
                by[place] = [test for test in old if file_of(test) not in again]
        self.left_out = [test for test in self.left_out if file_of(test) not in again]
        self.left_out += known["left_out"]
        self.seconds = {
            test: seconds for test, seconds in self.seconds.items() if file_of(test) not in again
        } | known["seconds"]
        for place, numbers in known["by_place"].items():
            reached = [tests[number] for number in numbers]
            self.by_place[place] += reached
            source = place.partition(":")[0]
            self.by_path[source] = list(dict.fromkeys([*self.by_path[source], *reached]))

    def of(self, mutation: Mutation) -> list[str]:
        """Tests that reach the mutated statement, or its function where no line is noted: those of
        its own file, then the quickest; then, as far as time allows, the others of these files,
        which may see what a shared helper made. What a module or a class says is run once, by the
        test that imports it first: there the others are as near.
        """
        first, last = mutation.lines
        lines = [self.by_place.get(f"{mutation.path}:{at}", []) for at in range(first, last + 1)]
        reach = list(dict.fromkeys(itertools.chain(*lines)))
        if not mutation.function:
            reach = self.by_path.get(mutation.path, [])
        elif not reach:
            reach = self.by_place.get(f"{mutation.path}:{mutation.function}", [])
        files = {file_of(test) for test in reach}
        others = [test for test in self.seconds if file_of(test) in files]
        if not mutation.function:
            reach = others
        ordered = [
            *sorted(reach, key=lambda test: self._place(mutation.path, test)),
            *sorted(others, key=lambda test: self._place(mutation.path, test)),
        ]
        chosen: list[str] = []
        spent = 0.0
        for test in dict.fromkeys(ordered):
            spent += self.seconds[test]
            if chosen and spent > MOST_TESTS_S:
                break
            chosen.append(test)
        return chosen

    def _place(self, path: str, test: str) -> tuple[bool, float, str]:
        own = file_of(test).endswith(f"test_{Path(path).stem}.py")
        return (not own, self.seconds[test], test)


def file_of(test: str) -> str:
    return test.partition("::")[0]
