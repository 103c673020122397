"""The favoured token: the kernels against torch."""

import pytest
import torch
from kernel_pools import on_each_device

from fmsim.exec.kernels.selection.greedy import likeliest_reference, likeliest_triton


@on_each_device
@pytest.mark.parametrize("width", [100, 1024, 2500])
def test_it_is_the_first_of_the_greatest(device, width):
    """Of few levels, so that the greatest comes more than once, in one block and in others."""
    logits = torch.randint(0, 3, (12, width)).bfloat16()
    logits[:5] *= torch.rand(5, width) < 0.02
    logits[5] = float("-inf")
    logits[6, width // 2] = float("inf")
    expected = logits.argmax(-1)
    logits[7, 60:] = float("nan")
    expected[7] = 60
    found = likeliest_triton(logits.to(device))
    assert found.dtype == torch.int64 and torch.equal(found.cpu(), expected)
    assert torch.equal(likeliest_reference(logits), expected)
