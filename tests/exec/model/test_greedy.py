"""The favoured token, in blocks and in one go."""

import pytest
import torch

from fmsim.exec.model.greedy import likeliest


@pytest.mark.parametrize("width", [100, 128, 1024])
def test_it_is_the_first_of_the_greatest(width):
    """Of few levels, so that the greatest comes more than once, in one block and in others."""
    logits = torch.randint(0, 3, (50, width)).bfloat16()
    logits[:20] *= torch.rand(20, width) < 0.02
    assert torch.equal(likeliest(logits), logits.argmax(-1))
