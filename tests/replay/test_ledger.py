"""A ledger's file says what was counted; a damaged one says so."""

import zipfile

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
