"""Numbers that launches leave at zero: shared by those that follow one another only."""

import torch

from fmsim.exec.kernels.arrivals import MOST, arrivals


def test_launches_that_follow_one_another_share_numbers():
    numbers = arrivals(torch.device("cpu"))
    assert numbers.shape == (MOST,) and numbers.dtype == torch.int32 and not numbers.any()
    assert arrivals(torch.device("cpu")).data_ptr() == numbers.data_ptr()
