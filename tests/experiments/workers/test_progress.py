"""How far a command is: within a policy too, in other processes as in this one."""

import time

import pytest

import fmsim
from fmsim.experiments.workers import parallel
from fmsim.experiments.workers.progress import StepsTold, Tally


def in_parts(index):
    for part in (0.25, 0.5, 0.75):
        time.sleep(2 * parallel.TELL_EVERY_S)
        parallel.tell(part)
    return index


def one_by_one(told):
    return list(parallel.one_by_one(in_parts, range(3), told))


def side_by_side(told):
    return list(parallel.in_parallel(in_parts, 3, told=told))


def as_they_end(told):
    return sorted(parallel.as_they_end(in_parts, range(3), 2, told=told))


@pytest.mark.parametrize("way", [one_by_one, side_by_side, as_they_end])
def test_work_says_how_far_it_is_and_ends_whole(way):
    shares = {0: [], 1: [], 2: []}
    assert way(lambda index, share: shares[index].append(share)) == [0, 1, 2]
    assert shares == {index: [0.25, 0.5, 0.75, 1.0] for index in range(3)}


def test_it_is_not_said_more_often_than_need_be_and_to_nobody_unless_asked():
    parallel.tell(0.5)
    told = []

    def work(index):
        for step in range(1, 1001):
            parallel.tell(step / 1000)

    list(parallel.one_by_one(work, range(1), lambda index, share: told.append(share)))
    assert told[0] == 0.001 and told[-1] == 1.0 and len(told) < 100


def test_a_tally_adds_what_is_under_way():
    seen = []
    tally = Tally(["a", "b"], 2, lambda *event: seen.append(event))
    for index, share in ((0, 0.5), (1, 0.25), (0, 1.0), (1, 1.0)):
        tally(index, share)
    assert seen == [("a", 0.5, 2), ("b", 0.75, 2), ("a", 1.25, 2), ("b", 2.0, 2)]


def test_steps_may_be_a_part_of_the_work():
    told = []

    def work(index):
        steps = StepsTold(4, start=0.5)
        steps.advance(2)

    list(parallel.one_by_one(work, range(1), lambda index, share: told.append(share)))
    assert told == [0.75, 1.0]


def test_a_run_is_told_of_within_its_policies():
    told = []
    fmsim.run_scenario("32k", ["lru", "lsa"], progress=lambda *event: told.append(event))
    dones = [done for _, done, _ in told]
    assert dones[0] == 0 and dones[-1] == told[-1][2] and dones == sorted(dones)
    assert sum(done % 1 > 0 for done in dones) >= len(dones) // 3
