"""What a timeline may hold."""

from dataclasses import replace

import numpy as np
import pytest

from fmsim.sim.timeline import SimulatedTimeline, Transfer

ZEROS = np.zeros(3)
SOUND = SimulatedTimeline(
    policy="lru",
    hardware="h100",
    model="v4-flash",
    batch=1,
    start_s=np.array([0.0, 1.0, 3.0]),
    end_s=np.array([1.0, 3.0, 3.5]),
    stall_s=np.array([0.5, 0.0, np.nan]),
    recall_wait_s=ZEROS,
    h2d_bytes=np.array([4, 5, 6]),
    d2h_bytes=np.array([1, 2, 3], np.uint8),
    kv_bytes=ZEROS,
    transfers=(Transfer("recall", 0, 0.0, 0.5, 12),),
)


def test_a_step_lasts_from_its_start_to_its_end():
    SOUND.check()
    assert SOUND.step_s.tolist() == [1.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 0}, "batch is no count"),
        ({"batch": True}, "batch is no count"),
        ({"batch": 1.0}, "batch is no count"),
        ({"start_s": ZEROS[:2]}, "start_s is no array of a number a step"),
        ({"start_s": ZEROS[None]}, "start_s is no array"),
        ({"kv_bytes": [0, 0, 0]}, "kv_bytes is no array"),
        ({"h2d_bytes": np.array(["1", "2", "3"])}, "h2d_bytes is no array"),
        ({"stall_s": np.array([True] * 3)}, "stall_s is no array"),
        ({"policy": 3}, "policy is no text"),
        ({"hardware": None}, "hardware is no text"),
        ({"transfers": (Transfer(1, 0, 0.0, 0.5, 12),)}, "a transfer is not one"),
        ({"transfers": (Transfer("recall", 0, 0.0, "0.5", 12),)}, "a transfer is not one"),
        ({"transfers": (Transfer("recall", None, 0.0, 0.5, 12),)}, "a transfer is not one"),
    ],
)
def test_a_field_of_another_kind_is_told(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(SOUND, **changes).check()


def test_a_timeline_of_no_step_is_none():
    arrays = ("start_s", "end_s", "stall_s", "recall_wait_s", "h2d_bytes", "d2h_bytes", "kv_bytes")
    with pytest.raises(ValueError, match="is no array of a number a step"):
        replace(SOUND, **dict.fromkeys(arrays, np.zeros(0))).check()
