"""The answers that `fmsim eval` has got, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmsim.errors import FmsimError
from fmsim.experiments.accuracy.plan import Item, Plan
from fmsim.files import write_text

Line = dict[str, Any]
KEY = ("policy", "task", "tokens", "seed", "sample", "question")
EXTENT = (
    "lengths",
    "samples",
    "policies",
    "seeds",
    "fewer",
)  # of a plan: how much is asked, not what is answered


class Lines:
    """Answers by their `KEY`, and the file that keeps them, if any.

    The file's first line is the plan's part that decides an answer, and `about`, the model and
    text; a file of another plan, model or text is refused.
    """

    def __init__(self, plan: Plan, about: dict[str, Any], path: Path | None = None):
        self.path, self.found = path, {}
        decides = {key: value for key, value in asdict(plan).items() if key not in EXTENT}
        head = json.dumps({"plan": json.loads(json.dumps(decides)), "about": about})
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                self._load(path, head)
            else:
                path.write_text(head + "\n", encoding="utf-8")
        except OSError as error:
            raise FmsimError(
                f"{path}: the answers cannot be kept there ({error.strerror}); give another --out"
            ) from None

    def _load(self, path: Path, head: str) -> None:
        # a kill may cut the last
        whole = [
            text
            for text in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if text.endswith("\n")
        ]
        if not whole or whole[0].strip() != head:
            raise FmsimError(
                f"{path}: holds answers of another plan, model or text; give another --out, or take"
                " it away"
            )
        for number, text in enumerate(whole[1:], start=2):
            try:
                line = json.loads(text)
                if "max_requests" not in line and "refused" not in line:
                    raise ValueError("an answer of an older fmsim")
                self.found[self.key(line)] = line
            except (ValueError, KeyError, TypeError):
                raise FmsimError(
                    f"{path}: line {number} is no answer; take it out, and it is asked again"
                ) from None
        write_text(path, "".join(whole))

    @staticmethod
    def key(line: Line) -> tuple:
        return tuple(line[name] for name in KEY)

    def add(self, line: Line) -> None:
        self.found[self.key(line)] = line
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def of(self, items: Iterable[Item], policies: Iterable[str]) -> list[Line]:
        """Those of ``items`` and ``policies``, in their order; of one item by question."""
        item_of = {
            (item.seed, item.tokens, item.sample, task): place
            for place, item in enumerate(items)
            for task in item.tasks
        }
        policy_of = {policy: place for place, policy in enumerate(policies)}
        places = {}
        for policy, task, tokens, seed, sample, question in self.found:
            item = item_of.get((seed, tokens, sample, task))
            if item is not None and policy in policy_of:
                places[policy, task, tokens, seed, sample, question] = (
                    item,
                    question,
                    policy_of[policy],
                )
        return [self.found[key] for key in sorted(places, key=places.__getitem__)]
