"""A ledger's file says what was counted; a damaged one says so."""

import zipfile
from dataclasses import MISSING, fields, replace

import numpy as np
import pytest
from hand_ledger import ledger

from fmsim.errors import FmsimError
from fmsim.replay.ledger import Ledger


def test_what_is_saved_is_loaded(tmp_path):
    made = ledger(n_steps=4, accessed=np.arange(12, dtype=np.int32).reshape(4, 3))
    made.save(tmp_path / "a.npz")
    found = Ledger.load(tmp_path / "a.npz")
    assert found.accessed.tolist() == made.accessed.tolist()
    assert (found.policy, found.group_slots, found.params) == ("hand-made", [800], {})


@pytest.mark.parametrize("kind", ["an unknown compression", "a later zip", "an encrypted member"])
def test_members_that_zipfile_cannot_read_are_told(tmp_path, kind):
    ledger(n_steps=4).save(tmp_path / "a.npz")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        first = data.find(b"PK\x01\x02", archive.start_dir)  # of the directory
    place = {"an unknown compression": 10, "a later zip": 6, "an encrypted member": 8}[kind]
    data[first + place] = 255 if place != 8 else data[first + 8] | 1
    if place == 8:  # the member says so itself
        data[6] |= 1
    (tmp_path / "b.npz").write_bytes(data)
    with pytest.raises(FmsimError, match=r"b\.npz: not a whole fmsim ledger"):
        Ledger.load(tmp_path / "b.npz")


def test_every_field_is_of_its_kind_and_its_size():
    """Two steps, three layers, one group: no size is another's."""
    made = ledger(n_steps=2)
    made.check()
    replace(made, n_slots=0, topk=0).check()

    def told(says, **changes):
        with pytest.raises(ValueError, match=f"^{says}"):
            replace(made, **changes).check()

    for field in fields(Ledger):
        name, value = field.name, getattr(made, field.name)
        if field.type == "int":
            for wrong in (-1, True, 1.5, "3", None):
                told(f"{name} is no count", **{name: wrong})
        elif field.type == "str":
            told(f"{name} is no text", **{name: 7})
        elif field.type == "np.ndarray":
            for wrong in (value.tolist(), value.astype(str), value.astype(bool)):
                told(f"{name} is no array of numbers", **{name: wrong})
            if value.dtype.kind == "f":
                not_finite = np.full(value.shape, np.nan, np.float32)
                told(f"{name} holds a value that is not finite", **{name: not_finite})
            for axis in range(value.ndim if name != "set_overlap" else 0):
                longer = np.repeat(value, 2, axis=axis)
                told(f"{name} has shape", **{name: longer})
                told(f"{name} has shape", **{name: longer[..., None]})
    told("params or granularity", params=[])
    told("params or granularity", granularity=0)


def test_what_a_ledger_does_not_say():
    said = {f.name: getattr(ledger(), f.name) for f in fields(Ledger) if f.default is MISSING}
    for name in ("unmeasured", "target_layers", "ahead_slots"):
        del said[name]
    made = Ledger(**said)
    assert {f.name: getattr(made, f.name) for f in fields(Ledger) if f.name not in said} == {
        "unmeasured": [],
        "decides_ahead": False,
        "target_layers": [],
        "all_keys": True,
        "ahead_slots": [],
        "miss_slots": 0,
        "observes": False,
        "observes_mass": False,
        "comes_back": False,
        "entry_tokens": 4,
        "masses": True,
    }


def test_a_budget_in_entries_is_the_mean_over_groups():
    made = ledger(n_groups=3, group_slots=[2, 1, 1], granularity=4)
    assert made.budget_entries == 5  # 16 entries in three groups


def rows_of(frame):
    """A frame's rows as dicts, with pandas or without."""
    return frame.to_dict("records") if hasattr(frame, "to_dict") else frame


def test_a_frame_by_step_sums_and_by_layer_leaves_shared_counts_out():
    """Two layers that share one set: 3 of 4 and 1 of 2 selected entries were there; 5 were loaded
    for both together.
    """
    made = ledger(
        n_steps=1,
        n_layers=2,
        accessed=np.array([[4, 2]], np.int32),
        hit=np.array([[3, 1]], np.int32),
        heaviest_lost=np.array([[0.25, 0.5]], np.float32),
        demand_loads=np.array([[5]], np.int32),
    )
    [step] = rows_of(made.to_frame())
    assert (step["step"], step["accessed"], step["hit"], step["misses"]) == (0, 6, 4, 2)
    assert (step["hit_rate"], step["heaviest_lost"]) == (pytest.approx(4 / 6), 0.5)
    assert step["demand_loads"] == 5 and "layer" not in step
    first, second = rows_of(made.to_frame(by="layer"))
    assert [(row["layer"], row["misses"]) for row in (first, second)] == [(0, 1), (1, 1)]
    assert (first["hit_rate"], second["hit_rate"]) == (0.75, 0.5)
    assert "demand_loads" not in first and "resident" not in first
    one, none = np.array([[1]], np.int32), np.array([[0]], np.int32)
    for selected, there, rate in ((one, one, 1.0), (one, none, 0.0), (none, none, 0.0)):
        lean = ledger(n_steps=1, n_layers=1, accessed=selected, hit=there)
        [step] = rows_of(lean.to_frame())
        assert step["hit_rate"] == rate
    with pytest.raises(FmsimError, match="write 'step' or 'layer'"):
        made.to_frame(by="page")
