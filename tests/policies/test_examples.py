"""docs/examples: policies as a newcomer writes them from docs/reference/policy.md."""

import ast
from collections import deque

import numpy as np
import pytest
from every_policy import EXAMPLES, FOLDER, example
from hand_trace import stream

from fmsim import policy_checks
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer


def found(name):
    return registry.get(example(name))


@pytest.mark.parametrize(
    "check",
    [check for name in EXAMPLES for check in policy_checks(found(name))],
    ids=lambda check: f"{check.policy}-{check}",
)
def test_an_example_keeps_every_rule(check):
    check()


def test_the_list_is_that_of_the_folder():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_takes_less_than_forty_lines(name):
    """Lines of code: without imports, docstrings, comments and blank ones."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    text = set()
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            text.add(node.lineno)
    lines = enumerate((FOLDER / f"{name}.py").read_text().splitlines(), 1)
    code = [line for at, line in lines if at not in text and line.split("#")[0].strip()]
    assert len(code) < 40


def sieve(entries, slots):
    """Which accesses hit: the paper's Algorithm 1."""
    queue, used, hand, hits = [], {}, None, []  # the oldest first
    for entry in entries:
        hits.append(entry in used)
        if entry in used:
            used[entry] = True
            continue
        if len(queue) == slots:
            at = queue.index(hand) if hand in used else 0
            while used[queue[at]]:
                used[queue[at]] = False
                at = (at + 1) % slots
            gone = queue.pop(at)
            hand = queue[at] if at < len(queue) else None
            del used[gone]
        queue.append(entry)
        used[entry] = False
    return hits


def s3fifo(entries, slots):
    """Which accesses hit: the paper's Algorithm 1."""
    small, main, uses, left, hits = deque(), deque(), {}, {}, []
    gone, share = 0, max(1, slots // 10)
    for entry in entries:
        hits.append(entry in uses)
        if entry in uses:
            uses[entry] = min(3, uses[entry] + 1)
            continue
        while len(uses) == slots:
            if len(small) >= share or not main:
                first = small.popleft()
                if uses[first] > 1:
                    uses[first] = 0
                    main.append(first)
                    continue
                gone += 1
                left[first] = gone
                del uses[first]
            else:
                first = main.popleft()
                if uses[first]:
                    uses[first] -= 1
                    main.append(first)
                else:
                    del uses[first]
        known = entry in left and gone - left.pop(entry) < slots * 9 // 10
        (main if known else small).append(entry)
        uses[entry] = 0
    return hits


@pytest.mark.parametrize("slots", [1, 2, 5, 10, 23, 40])
@pytest.mark.parametrize("plain", [sieve, s3fifo])
def test_an_example_hits_where_its_papers_algorithm_does(plain, slots):
    drawn = np.random.default_rng(slots).zipf(1.3, 400) % 200
    policy = found(plain.__name__)(budget=f"{slots} entries")
    ledger = Replayer(stream(drawn, 300), cold=True).run(policy)
    assert ledger.hit[:, 0].tolist() == plain(drawn.tolist(), slots)
    # after a prompt, as if its end had come page by page
    prompt = [*range(300 - slots, 300)]
    policy = found(plain.__name__)(budget=f"{slots} entries")
    ledger = Replayer(stream(drawn, 300)).run(policy)
    assert ledger.hit[:, 0].tolist() == plain([*prompt, *drawn.tolist()], slots)[slots:]


def test_a_pyramid_has_more_in_the_first_layers():
    shares = found("pyramidkv")(beta=10).layer_shares(5)
    assert np.allclose(np.diff(shares), np.diff(shares)[0]) and np.isclose(sum(shares), 5)
    assert shares[-1] == pytest.approx(0.1)
