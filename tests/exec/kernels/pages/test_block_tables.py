"""Block tables out of a residency's: the kernel against its reference."""

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.pages.block_tables import enter_slots_reference, enter_slots_triton


@on_each_device
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 3),
    batch=st.integers(1, 3),
    pages=st.integers(1, 70),
    alike=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_it_is_its_reference(device, seed, layers, batch, pages, alike):
    """Tables of some requests among others, in which a step has more pages than they."""
    generator = torch.Generator().manual_seed(seed)
    one_table, one_request, one_first = alike
    shape = (1 if one_table else layers, 1 if one_request else batch, pages)
    table = torch.randint(-1, 40, shape, generator=generator, dtype=torch.int32).to(device)
    first = torch.arange(0, 50 * layers * batch, 50, dtype=torch.int32).view(layers, batch)
    first = first[: 1 if one_first else layers].to(device)
    found = []
    for run in (enter_slots_reference, partial(enter_slots_triton, block_pages=16)):
        rows = torch.full((layers, batch + 2, pages + 3), 7, dtype=torch.int32, device=device)
        run(table, first, rows[:, 1 : batch + 1, :pages])
        found.append(rows)
    assert torch.equal(*found)


def test_by_hand():
    table, first = torch.tensor([[[1, -1, 0]]]).int(), torch.tensor([[0, 5], [2, 7]]).int()
    rows = torch.zeros(2, 2, 3, dtype=torch.int32)
    enter_slots_reference(table, first, rows)
    assert rows.tolist() == [[[1, -1, 0], [6, -1, 5]], [[3, -1, 2], [8, -1, 7]]]
